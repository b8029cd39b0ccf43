"""A sampler that takes as many steps as a frame needs: step doubling on the dyadic grid of signal levels.

From signal level tau, one step of size d is compared with two of d/2. Where they differ by more than a tolerance, d is
halved and the first of the two half steps, which has been made already, is the one step to compare next; where they
agree, the two half steps are taken and the next step is the largest that ends on a coarser level. So the grid of each
frame of each stream is refined on its own, down to 1/k_max.

A pass serves all streams, each at its own level: a batch costs as many passes as its most demanding stream.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dreamer4_jax.nn.cache import Cache
from dreamer4_jax.world.dynamics import Actions, Dynamics
from dreamer4_jax.world.shortcut import euler_step, roll, start_noise, write_and_start

ONE, FIRST, SECOND = 0, 1, 2  # what a stream's next pass is: one step of d, or the first or second of two of d/2


class _State(NamedTuple):
    """Of each stream: `z` at level `at` (in units of 1/k_max), step `size` in the same units, the largest size it may
    have, the next pass, what one step and the first half step gave, and the passes so far."""

    z: Float[Array, "B 1 N C"]
    at: Int[Array, " B"]
    size: Int[Array, " B"]
    widest: Int[Array, " B"]
    part: Int[Array, " B"]
    one: Float[Array, "B 1 N C"]
    half: Float[Array, "B 1 N C"]
    passes: Int[Array, " B"]


def difference(x: Float[Array, "B 1 N C"], y: Float[Array, "B 1 N C"]) -> Float[Array, " B"]:
    """The largest root-mean-square difference of a token: what changes in a frame may be one tile of many."""
    return jnp.sqrt(jnp.mean((x - y) ** 2, axis=-1)).max(axis=(-2, -1))


def denoise(
    dynamics: Dynamics,
    cache: Cache,
    actions: Actions,
    key: Array,
    *,
    steps: Int[Array, " B"] | Int[Array, ""] | int = 1,
    tolerance: Float[Array, " B"] | Float[Array, ""] | float,
) -> tuple[Float[Array, "B 1 N C"], Int[Array, " B"]]:
    """As `shortcut.denoise`, with the `steps` of each stream refined where its `tolerance` asks for it.

    Both may be traced, and both may differ from stream to stream: with an infinite tolerance a stream takes exactly
    `steps` equal steps.

    Returns:
      The frame, and how many passes each stream took.
    """
    noise = start_noise(dynamics, cache, key)
    k_max, streams = dynamics.k_max, noise.shape[0]
    full = partial(jnp.full, (streams,), dtype=jnp.int32)
    widest = jnp.broadcast_to(k_max // jnp.asarray(steps, jnp.int32), (streams,))
    tolerance = _per_stream(tolerance, widest)
    state = _State(noise, full(0), widest, widest, _first_part(widest, tolerance), noise, noise, full(0))
    state = _refine(dynamics, cache, actions, state, tolerance)
    return state.z, state.passes


def next_frame(
    dynamics: Dynamics,
    cache: Cache,
    last: Float[Array, "B 1 N C"],
    last_actions: Actions,
    actions: Actions,
    keys: tuple[Array, Array],
    *,
    tolerance: Float[Array, ""] | float,
) -> tuple[Cache, Float[Array, "B 1 N C"], Int[Array, " B"]]:
    """As `shortcut.next_frame`, with steps as small as `tolerance` asks for; it may be traced.

    tolerance = 0 gives the frame of k_max equal steps, an infinite one that of a single step, with nothing to compare.

    Returns:
      The cache, the frame, and how many passes each stream took; one of them wrote the last frame.
    """
    k_max, streams = dynamics.k_max, last.shape[0]
    full = partial(jnp.full, (streams,), dtype=jnp.int32)
    limits = _per_stream(tolerance, full(k_max))
    part = _first_part(full(k_max), limits)
    # The pass that writes is also the first of the new frame: of one step, or, with two steps at most, of the half.
    size = jnp.where(part[0] == ONE, 1.0, 0.5)
    cache, noise, z1_hat = write_and_start(dynamics, cache, last, last_actions, actions, keys, size=size)
    state = _State(noise, full(0), full(k_max), full(k_max), part, noise, noise, full(1))
    state = _advance(state, euler_step(noise, z1_hat, jnp.float32(0.0), size), limits, k_max)
    state = _refine(dynamics, cache, actions, state, limits)
    return cache, state.z, state.passes


def _per_stream(tolerance: Array | float, widest: Int[Array, " B"]) -> Float[Array, " B"]:
    """The tolerance of each stream; infinite where the widest step cannot be halved."""
    found = jnp.broadcast_to(jnp.asarray(tolerance, jnp.float32), widest.shape)
    return jnp.where(widest == 1, jnp.inf, found)


def _first_part(size: Int[Array, " B"], tolerance: Float[Array, " B"]) -> Int[Array, " B"]:
    """What comes first at a new level: a pair of finest steps has nothing to be compared with, so no one step of d."""
    return jnp.where((size == 2) & ~jnp.isinf(tolerance), FIRST, ONE)


def _refine(dynamics: Dynamics, cache: Cache, actions: Actions, state: _State, tolerance: Array) -> _State:
    """All passes until every stream has arrived."""
    k_max = dynamics.k_max
    wide = lambda x: x[:, None, None, None]

    def body(s: _State) -> _State:
        running = s.at < k_max
        d = jnp.where(s.part == ONE, s.size, s.size // 2) / k_max
        tau = (s.at + jnp.where(s.part == SECOND, s.size // 2, 0)) / k_max
        tau = jnp.where(running, tau, 0.0)  # a finished stream is computed along: at a level at which it can be
        z = jnp.where(wide(s.part == SECOND), s.half, s.z)
        out = dynamics(z, tau[:, None], d[:, None], actions, cache=cache)
        made = euler_step(z, out.z1, wide(tau), wide(d))
        after = _advance(s._replace(passes=s.passes + 1), made, tolerance, k_max)
        return jax.tree.map(lambda new, old: jnp.where(running.reshape(-1, *(1,) * (new.ndim - 1)), new, old), after, s)

    with jax.named_scope("denoise"):
        return jax.lax.while_loop(lambda s: jnp.any(s.at < k_max), body, state)


def _advance(s: _State, made: Array, tolerance: Array, k_max: int) -> _State:
    """The state after a pass whose step led to `made`."""
    wide = lambda x: x[:, None, None, None]
    was_one, was_first, was_second = (s.part == p for p in (ONE, FIRST, SECOND))
    one, half = jnp.where(wide(was_one), made, s.one), jnp.where(wide(was_first), made, s.half)
    # Below two finest steps there is nothing to compare with: refused or not, it is these that are taken.
    agree = (difference(one, made) <= tolerance) | (s.size == 2)
    taken = (was_one & jnp.isinf(tolerance)) | (was_second & agree)
    refused = was_second & ~agree
    at = jnp.where(taken, s.at + s.size, s.at)
    aligned = jnp.where(at == 0, k_max, at & -at)  # the largest power of two that divides it
    size = jnp.where(taken, jnp.minimum(aligned, s.widest), jnp.where(refused, s.size // 2, s.size))
    # After a refusal the first half step is the one step of the new size.
    part = jnp.where(taken, _first_part(size, tolerance), jnp.where(was_one | refused, FIRST, SECOND))
    return _State(
        z=jnp.where(wide(taken), made, s.z),
        at=at,
        size=size,
        widest=s.widest,
        part=part,
        one=jnp.where(wide(refused), s.half, one),
        half=half,
        passes=s.passes,
    )


def generate(
    dynamics: Dynamics,
    context: Float[Array, "B T N C"],
    actions: Actions,
    key: Array,
    *,
    tolerance: Float[Array, ""] | float,
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T N C"], Int[Array, "B T"]]:
    """As `shortcut.generate`, with the same noise for the same key. Returns the frames and the passes of each."""
    frame = partial(next_frame, dynamics, tolerance=tolerance)
    z, passes = roll(frame, dynamics, context, actions, key, segments=segments)
    return z, passes.T
