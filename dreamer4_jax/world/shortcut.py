"""Shortcut forcing (paper Eq 4, 6, 7, 8) and the samplers: fixed K, K as a traced argument (`adaptive` has another).

Everything here is float32: signal levels, targets, losses.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dreamer4_jax.config import DynamicsConfig
from dreamer4_jax.nn.cache import Cache
from dreamer4_jax.parallel.sharding import batch_groups, constrain
from dreamer4_jax.world.dynamics import Actions, Dynamics


def sample_tau_d(
    key: Array, shape: tuple[int, ...], k_max: int, *, coarsest: int = 0, finest: int | None = None
) -> tuple[Array, Array]:
    """Signal level and step size per frame (paper Eq 4), float32 of the given shape.

    ``d = 2^-i`` with i uniform over the ladder {0, .., log2 k_max} (or from `coarsest` to `finest`, both included),
    ``tau`` uniform over {0, d, 2d, .., 1 - d}.
    """
    finest = k_max.bit_length() - 1 if finest is None else finest
    of_d, of_tau = jax.random.split(key)
    exponent = jax.random.randint(of_d, shape, coarsest, finest + 1)
    steps = 2**exponent
    # randint has no per-element bound: floor of a uniform, kept below the bound against rounding.
    index = jnp.minimum(jnp.floor(jax.random.uniform(of_tau, shape) * steps), steps - 1)
    return index / steps.astype(jnp.float32), 1.0 / steps.astype(jnp.float32)


def ramp(tau: Array) -> Array:
    """Loss weight ``w(tau) = 0.9 tau + 0.1`` (paper Eq 8)."""
    return 0.9 * tau + 0.1


def add_noise(z1: Array, noise: Array, tau: Float[Array, "B T"]) -> Array:
    """``z~ = (1 - tau) z0 + tau z1`` (paper Eq 6)."""
    tau = tau[..., None, None]
    return (1.0 - tau) * noise + tau * z1


def euler_step(z: Array, z1_hat: Array, tau: Array, d: Array) -> Array:
    """``z + (z1_hat - z) d / (1 - tau)``; with tau = 1 - d this is z1_hat itself. `tau`, `d` broadcast against z."""
    return z + (z1_hat - z) * (d / (1.0 - tau))


def bootstrap_target(f, z: Array, tau: Float[Array, "B T"], d: Float[Array, "B T"]) -> Array:
    """Two half steps of the teacher as one clean prediction: ``sg(z~ + (1 - tau) (b' + b'') / 2)``, x-space of Eq 7.

    ``f(z, tau, d) -> z1_hat`` is the teacher. The squared error of z1_hat to this equals Eq 7's bootstrap term with its
    factor (1 - tau)^2.
    """
    t, half = tau[..., None, None], d[..., None, None] / 2
    b1 = (f(z, tau, d / 2) - z) / (1.0 - t)
    middle = z + b1 * half
    b2 = (f(middle, tau + d / 2, d / 2) - middle) / (1.0 - (t + half))
    return jax.lax.stop_gradient(z + (1.0 - t) * (b1 + b2) / 2)


def sample_levels(key: Array, shape: tuple[int, ...], cfg: DynamicsConfig, bootstrap: np.ndarray):
    """(tau, d) of a batch, float32 [B, T].

    mix = "rows": rows that `bootstrap` (bool [B]) marks take d above 1/k_max, the rest 1/k_max. mix = "frames": Eq 4
    for every frame. Plain diffusion forcing has no bootstrap frames.
    """
    finest = cfg.k_max.bit_length() - 1
    of_flow, of_bootstrap = jax.random.split(key)
    if cfg.objective == "shortcut" and cfg.mix == "frames":
        return sample_tau_d(of_flow, shape, cfg.k_max)
    fine = sample_tau_d(of_flow, shape, cfg.k_max, coarsest=finest)
    if not bootstrap.any():
        return fine
    # Drawn for all rows and chosen from: to write rows into a sharded array would move it between devices.
    coarse = sample_tau_d(of_bootstrap, shape, cfg.k_max, finest=finest - 1)
    return jax.tree.map(lambda x, y: jnp.where(bootstrap[:, None], x, y), coarse, fine)


def bootstrap_rows(cfg: DynamicsConfig, rows: int) -> range:
    """Which of the first `rows` rows are on the bootstrap branch, spread evenly, so that devices which hold rows have
    equal shares of it; at least one, and at least one is left for flow."""
    if cfg.objective == "diffusion":
        return range(0)
    if cfg.mix == "frames":
        return range(rows)
    count = max(1, min(rows - 1, round(cfg.bootstrap_fraction * rows)))
    stride = rows // count
    return range(0, count * stride, stride)


def teacher_rows(boot: range, total: int, groups: int) -> range:
    """The rows that the teacher computes: those on the bootstrap branch and, where these cannot be divided among
    `groups` of devices, more of the batch's `total` rows, so that each group computes as many and none of another's."""
    if len(boot) % groups:
        for step in range(boot.step, 0, -1):
            more = range(0, total, step)
            even = not (boot.step % step or total % step or len(more) % groups)
            if even and len(more) // groups <= len(boot):
                return more
    return boot


def _rows_of(x: Array, rows: range) -> Array:
    """The rows `rows` of x [B, ...], over the devices as a batch is."""
    if x.shape[0] % rows.step == 0:
        picked = x.reshape(-1, rows.step, *x.shape[1:])[:, 0][: len(rows)]  # stays where it is if B is sharded
    else:
        picked = x[rows.start : rows.stop : rows.step]
    return constrain(picked, "batch", *(None for _ in x.shape[1:]))


def _spread_rows(x: Array, rows: range, total: int) -> Array:
    """x [rows, ...] at the places `rows` of `total` rows; what stands between them is not to be read."""
    wide = jnp.broadcast_to(x[:, None], (len(rows), rows.step, *x.shape[1:])).reshape(-1, *x.shape[1:])
    return jnp.pad(wide, ((0, total - len(wide)), *((0, 0) for _ in x.shape[1:])))


def shortcut_forward(
    model: Dynamics,
    teacher: Dynamics,
    z1: Float[Array, "B T N C"],
    actions: Actions,
    key: Array,
    *,
    task: Int[Array, "B T words"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    rows: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Array], Float[Array, "B T D"] | None]:
    """`shortcut_loss` that also returns the agent read-out h of the noisy frames (None without a task).

    Only the first `rows` rows carry the loss (all by default). Frames of the other rows are noised to the context level
    alone: it is the level at which h is read when the agent acts.
    """
    cfg = model.cfg.dynamics
    z1 = z1.astype(jnp.float32)
    rows = z1.shape[0] if rows is None else rows
    boot = bootstrap_rows(cfg, rows)
    index = np.arange(z1.shape[0])
    bootstrap = np.isin(index, boot)
    of_levels, of_noise = jax.random.split(key)
    tau, d = sample_levels(of_levels, z1.shape[:2], cfg, bootstrap)
    if rows < z1.shape[0]:
        tau = jnp.where(index[:, None] < rows, tau, model.context_level)
        d = jnp.where(index[:, None] < rows, d, 1.0 / cfg.k_max)
    flow = d == 1.0 / cfg.k_max
    z = add_noise(z1, jax.random.normal(of_noise, z1.shape, jnp.float32), tau)
    with jax.named_scope("student"):
        out = model(z, tau, d, actions, task=task, segments=segments)
    target = z1
    # Online weights as teacher: stopped here, the program keeps none of the teacher's activations for a gradient.
    teacher = jax.tree.map(jax.lax.stop_gradient, teacher)
    if boot:
        taught = teacher_rows(boot, z1.shape[0], batch_groups())
        z_b, tau_b, d_b, actions_b, segments_b, flow_b = jax.tree.map(
            lambda x: _rows_of(x, taught), (z, tau, d, actions, segments, flow)
        )

        def f(half_z, half_tau, half_d):
            # Frames that are already at the finest step have no half step: they stay as they are, as context.
            return teacher(
                jnp.where(flow_b[..., None, None], z_b, half_z),
                jnp.where(flow_b, tau_b, half_tau),
                jnp.where(flow_b, d_b, half_d),
                actions_b,
                segments=segments_b,
            ).z1

        with jax.named_scope("teacher"):
            goal = bootstrap_target(f, z_b, tau_b, d_b)
        apart = bootstrap[:, None] & ~flow
        target = jnp.where(apart[..., None, None], _spread_rows(goal, taught, z1.shape[0]), z1)
    error = jnp.mean((out.z1 - jax.lax.stop_gradient(target)) ** 2, axis=(-2, -1))[:rows]
    tau, flow = tau[:rows], flow[:rows]
    if cfg.loss_space == "v":  # v = (z1 - z~) / (1 - tau) of prediction and target
        error = error / (1.0 - tau) ** 2
    weight = {"both": ramp(tau), "flow": jnp.where(flow, ramp(tau), 1.0), "none": jnp.ones_like(tau)}[cfg.ramp]
    metrics = {"flow": jnp.sum(error * flow) / jnp.maximum(jnp.sum(flow), 1)}
    if boot:
        metrics["bootstrap"] = jnp.sum(error * ~flow) / jnp.maximum(jnp.sum(~flow), 1)
    return jnp.mean(weight * error), metrics, out.h


def shortcut_loss(
    model: Dynamics,
    teacher: Dynamics,
    z1: Float[Array, "B T N C"],
    actions: Actions,
    key: Array,
    *,
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Shortcut forcing (paper Eq 7 with Eq 8): flow term at d = 1/k_max, bootstrap term above, both in x-space (with
    `dynamics.loss_space` = "v" the literal Eq 3, the errors of velocities).

    Args:
      z1: clean tokens.
      teacher: weights of the bootstrap target (EMA or online); no gradient flows into it.
      segments: episode numbers; a number per frame makes the frames of a row separate images.

    Returns:
      The ramp-weighted mean over rows and frames, and the unweighted errors "flow" and "bootstrap".
    """
    loss, metrics, _ = shortcut_forward(model, teacher, z1, actions, key, segments=segments)
    return loss, metrics


# ---------------------------------------------------------------------------------------------------------------------
# Samplers. Where they take a key, one for each stream [B] does too: a stream's noise then depends on its own key alone.


def _normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal numbers, float32."""
    if key.ndim == 0:
        return jax.random.normal(key, shape, jnp.float32)
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:], jnp.float32))(key)


def settle(dynamics: Dynamics, z1: Float[Array, "B T N C"], key: Array) -> tuple[Array, Array, Array]:
    """Finished frames as later ones see them: noised to the context level, with that level as label. (z, tau, d)."""
    tau = jnp.full(z1.shape[:2], dynamics.context_level, jnp.float32)
    d = jnp.full(z1.shape[:2], 1.0 / dynamics.k_max, jnp.float32)
    return add_noise(z1.astype(jnp.float32), _normal(key, z1.shape), tau), tau, d


def observe(
    dynamics: Dynamics,
    cache: Cache,
    z1: Float[Array, "B T N C"],
    actions: Actions,
    key: Array,
    *,
    task: Int[Array, "B T words"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    streams: Bool[Array, " B"] | None = None,
) -> tuple[Cache, Float[Array, "B T D"] | None]:
    """Writes finished frames, noised to the context level, of `streams` (all by default). Returns the cache and h."""
    with jax.named_scope("observe"):
        out = dynamics(*settle(dynamics, z1, key), actions, task=task, segments=segments, cache=cache, streams=streams)
    assert out.cache is not None
    return out.cache, out.h


def denoise(
    dynamics: Dynamics,
    cache: Cache,
    actions: Actions,
    key: Array,
    *,
    steps: Int[Array, ""] | Int[Array, " B"] | int,
) -> Float[Array, "B 1 N C"]:
    """Samples the next frame from pure noise in `steps` equal steps. `steps` is a power of two up to k_max and may be
    traced: one program serves every K. Agent tokens take no part: nothing that is predicted here depends on them.

    Streams may have different numbers of steps [B]: there are as many passes as the largest, and a stream that has
    taken its own waits for the others.
    """
    size = 1.0 / jnp.asarray(steps, jnp.float32)
    with jax.named_scope("denoise"):
        return _steps(dynamics, cache, actions, start_noise(dynamics, cache, key), size, 0, steps)


def start_noise(dynamics: Dynamics, cache: Cache, key: Array) -> Float[Array, "B 1 N C"]:
    """Pure noise in the shape of a frame of every stream."""
    t = dynamics.cfg.tokenizer
    return _normal(key, (cache.pos.shape[0], 1, t.tokens, t.token_channels))


def _steps(dynamics: Dynamics, cache: Cache, actions: Actions, z: Array, size: Array, first: int, steps) -> Array:
    """Euler steps `first` to `steps` - 1 of the frame that follows what `cache` holds."""
    one = z.shape[:2]
    steps = jnp.asarray(steps, jnp.int32)
    if steps.ndim:
        steps, size = steps[:, None], size[:, None]

    def body(i, z):
        tau = jnp.minimum(i, steps - 1).astype(jnp.float32) * size  # those that wait stay on the grid
        out = dynamics(z, jnp.broadcast_to(tau, one), jnp.broadcast_to(size, one), actions, cache=cache)
        if not steps.ndim:
            return euler_step(z, out.z1, tau, size)
        after = euler_step(z, out.z1, tau[..., None, None], size[..., None, None])
        return jnp.where((i < steps)[..., None, None], after, z)

    return jax.lax.fori_loop(jnp.int32(first), jnp.max(steps), body, z)


def next_frame(
    dynamics: Dynamics,
    cache: Cache,
    last: Float[Array, "B 1 N C"],
    last_actions: Actions,
    actions: Actions,
    keys: tuple[Array, Array],
    *,
    steps: Int[Array, ""] | int,
) -> tuple[Cache, Float[Array, "B 1 N C"]]:
    """Writes the last finished frame and samples the one after it, in `steps` passes: the pass that writes is also the
    first denoising step. Equal to `observe` followed by `denoise`, which take one pass more.

    Args:
      cache: history in front of the last frame.
      last: the last frame, clean, with the actions that led to it.
      actions: that lead to the new frame.
      keys: of the last frame's noise and of the new frame's.
    """
    size = 1.0 / jnp.asarray(steps, jnp.float32)
    cache, noise, z1_hat = write_and_start(dynamics, cache, last, last_actions, actions, keys, size=size)
    with jax.named_scope("denoise"):
        z = euler_step(noise, z1_hat, jnp.float32(0.0), size)
        return cache, _steps(dynamics, cache, actions, z, size, 1, steps)


def write_and_start(
    dynamics: Dynamics,
    cache: Cache,
    last: Float[Array, "B 1 N C"],
    last_actions: Actions,
    actions: Actions,
    keys: tuple[Array, Array],
    *,
    size: Array | float,
) -> tuple[Cache, Float[Array, "B 1 N C"], Float[Array, "B 1 N C"]]:
    """One pass over the last finished frame, which it writes, and the new one at signal level 0 and step `size`.

    Returns the cache, the new frame's noise, and what the pass predicts of it.
    """
    noise = start_noise(dynamics, cache, keys[1])
    z, tau, d = (
        jnp.concatenate([x, y], axis=1)
        for x, y in zip(
            settle(dynamics, last, keys[0]),
            (noise, jnp.zeros(noise.shape[:2]), jnp.full(noise.shape[:2], size)),
            strict=True,
        )
    )
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), last_actions, actions)
    with jax.named_scope("observe"):
        out = dynamics(z, tau, d, both, cache=cache, finished=1)
    assert out.cache is not None
    return out.cache, noise, out.z1[:, 1:]


def generate(
    dynamics: Dynamics,
    context: Float[Array, "B T N C"],
    actions: Actions,
    key: Array,
    *,
    steps: Int[Array, ""] | int,
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N C"]:
    """Continues `context` by the frames whose actions are given (paper 3.2, inference); K passes a frame.

    Args:
      context: clean tokens of the first frames, T_context of them.
      actions: actions of context and future, [B, T_context + T_future].
      steps: K, may be traced.
      segments: episode numbers of the context frames.

    Returns:
      Tokens of the T_future generated frames.
    """
    frame = partial(next_frame, steps=steps)
    out, _ = roll(lambda *args: (*frame(dynamics, *args), None), dynamics, context, actions, key, segments=segments)
    return out


def roll(
    frame: Callable[..., tuple[Cache, Array, Any]],
    dynamics: Dynamics,
    context: Float[Array, "B T N C"],
    actions: Actions,
    key: Array,
    *,
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T N C"], Any]:
    """The loop of `generate`; ``frame(cache, last, last_actions, actions, keys)`` is `next_frame` or another sampler
    and returns something of its own beside the cache and the frame, which comes back with T in front."""
    frames = context.shape[1]
    cut = lambda start, stop: jax.tree.map(lambda x: x[:, start:stop], actions)
    future = jax.tree.leaves(actions)[0].shape[1] - frames
    of_context, of_last, of_future = jax.random.split(key, 3)
    cache = dynamics.init_cache(context.shape[0])
    if frames > 1:
        before = None if segments is None else segments[:, :-1]
        cache, _ = observe(dynamics, cache, context[:, :-1], cut(0, frames - 1), of_context, segments=before)
        if segments is not None:  # the last frame may begin an episode
            same = segments[:, -2:-1] == segments[:, -1:]
            cache = Cache(cache.k, cache.v, jnp.where(same, cache.pos, -1), cache.next)

    def body(carry, scanned):
        cache, last, last_action, write = carry
        action, k = scanned
        noise, write_next = jax.random.split(k)
        cache, z, more = frame(cache, last, last_action, action, (write, noise))
        return (cache, z, action, write_next), (z[:, 0], more)

    start = (cache, context[:, -1:].astype(jnp.float32), cut(frames - 1, frames), of_last)
    after = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1)[:, :, None], cut(frames, None))
    _, (out, more) = jax.lax.scan(body, start, (after, jax.random.split(of_future, future)))
    return jnp.swapaxes(out, 0, 1), more
