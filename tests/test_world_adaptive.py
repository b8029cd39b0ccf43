"""The adaptive sampler: its two limits, a recursive reference, and streams that do not know of each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.world import Dynamics, adaptive, shortcut
from dreamer4_jax.world.adaptive import difference
from dreamer4_jax.world.shortcut import euler_step
from tests.small import config, drawn, latents, moves

CFG = config(**{"dynamics.transformer.layers": 2, "dynamics.transformer.time_every": 2})
K_MAX = CFG.dynamics.k_max
B, CONTEXT, FUTURE = 3, 2, 2


@pytest.fixture(scope="module")
def model():
    return drawn(lambda key: Dynamics(CFG, key))


@jax.jit
def adapted(model, context, actions, key, tolerance):
    return adaptive.generate(model, context, actions, key, tolerance=tolerance)


@jax.jit
def fixed(model, context, actions, key, steps):
    return shortcut.generate(model, context, actions, key, steps=steps)


@jax.jit
def one_frame(model, cache, last, last_actions, actions, keys, tolerance):
    return adaptive.next_frame(model, cache, last, last_actions, actions, keys, tolerance=tolerance)


def clip():
    return latents(B, CONTEXT), moves(B, CONTEXT + FUTURE), jax.random.key(3)


def finest_passes(size, has_one):
    """Passes where every comparison fails, by the rule itself: two half steps, then both halves."""
    if size == 2:
        return 2
    return (not has_one) + 2 + finest_passes(size // 2, True) + finest_passes(size // 2, False)


def test_without_tolerance_it_is_the_finest_fixed_sampler(model):
    context, actions, key = clip()
    z, passes = adapted(model, context, actions, key, jnp.float32(0.0))
    np.testing.assert_allclose(z, fixed(model, context, actions, key, jnp.int32(K_MAX)), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(passes, np.full((B, FUTURE), finest_passes(K_MAX, False)))


def test_with_infinite_tolerance_it_is_the_coarsest_fixed_sampler_in_one_pass(model):
    context, actions, key = clip()
    z, passes = adapted(model, context, actions, key, jnp.float32(np.inf))
    np.testing.assert_allclose(z, fixed(model, context, actions, key, jnp.int32(1)), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(passes, np.ones((B, FUTURE), int))


def test_with_a_tolerance_that_nothing_exceeds_it_takes_two_steps_after_three_passes(model):
    context, actions, key = clip()
    z, passes = adapted(model, context, actions, key, jnp.float32(1e6))
    np.testing.assert_allclose(z, fixed(model, context, actions, key, jnp.int32(2)), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(passes, np.full((B, FUTURE), 3))


def recursive(step, z, tau, d, tolerance, one=None):
    """Step doubling as a recursion for a single stream: the frame after d, and the passes it took."""
    if d == 2 / K_MAX:
        return step(step(z, tau, d / 2), tau + d / 2, d / 2), 2
    passes = 2 + (one is None)
    one = step(z, tau, d) if one is None else one
    half = step(z, tau, d / 2)
    two = step(half, tau + d / 2, d / 2)
    if float(difference(one, two)[0]) <= tolerance:
        return two, passes
    left, n = recursive(step, z, tau, d / 2, tolerance, half)
    right, m = recursive(step, left, tau + d / 2, d / 2, tolerance)
    return right, passes + n + m


@pytest.fixture(scope="module")
def history(model):
    context, actions, _ = clip()
    cut = lambda a, b: jax.tree.map(lambda x: x[:, a:b], actions)
    keys = jax.random.split(jax.random.key(5))
    cache, _ = jax.jit(shortcut.observe)(model, model.init_cache(B), context[:, :1], cut(0, 1), jax.random.key(4))
    return cache, context[:, 1:], cut(1, 2), cut(2, 3), keys


def test_every_stream_is_refined_as_a_recursion_of_its_own_would(model, history):
    cache, last, last_actions, actions, keys = history
    written, noise, _ = jax.jit(partial(shortcut.write_and_start, size=1.0))(model, *history)

    @jax.jit
    def step(cache, actions, z, tau, d):
        tau, d = (jnp.full((1, 1), x, jnp.float32) for x in (tau, d))
        out = model(z, tau, d, actions, cache=cache)
        return euler_step(z, out.z1, tau[..., None, None], d[..., None, None])

    # A tolerance between the streams' own first differences: some stop at once, others go on.
    one = lambda tree, b: jax.tree.map(lambda x: x[b : b + 1], tree)
    streams = []
    for b in range(B):
        ring = type(written)(
            written.k[:, b : b + 1], written.v[:, b : b + 1], written.pos[b : b + 1], written.next[b:][:1]
        )
        streams.append((partial(step, ring, one(actions, b)), noise[b : b + 1]))
    first = [float(difference(f(z, 0, 1.0), f(f(z, 0, 0.5), 0.5, 0.5))[0]) for f, z in streams]
    tolerance = float(np.median(first)) * 0.999
    _, z, passes = one_frame(model, *history, jnp.float32(tolerance))
    expected = [recursive(f, z, 0.0, 1.0, tolerance) for f, z in streams]
    assert len({n for _, n in expected}) > 1, "the streams need different numbers of passes"
    assert passes.tolist() == [n for _, n in expected]
    np.testing.assert_allclose(z, jnp.concatenate([x for x, _ in expected]), rtol=1e-3, atol=1e-3)


def test_a_smaller_tolerance_never_takes_fewer_passes(model):
    context, actions, key = clip()
    counts = [int(adapted(model, context, actions, key, jnp.float32(t))[1][:, 0].sum()) for t in (2.0, 0.5, 0.1, 0.0)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_the_difference_of_two_frames_is_that_of_their_worst_token():
    """Root-mean-square over its channels; what the other tokens do dilutes nothing."""
    x = np.zeros((2, 1, 16, 4), np.float32)
    y = x.copy()
    y[0, 0, 3] = [0.3, -0.3, 0.3, -0.3]
    y[1, 0, 5, 0] = 0.4  # one of four channels: half of it
    y[1, 0, 9] = 0.1
    np.testing.assert_allclose(adaptive.difference(jnp.asarray(x), jnp.asarray(y)), [0.3, 0.2], rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_denoise_without_a_tolerance_takes_equal_steps(model, history, steps):
    cache, _, actions, *_ = history
    keys = jax.random.split(jax.random.key(1), B)
    plain = jax.jit(shortcut.denoise)(model, cache, actions, keys, steps=jnp.full(B, steps))
    z, passes = jax.jit(adaptive.denoise)(
        model, cache, actions, keys, steps=jnp.full(B, steps), tolerance=jnp.full(B, jnp.inf)
    )
    assert passes.tolist() == [steps] * B
    np.testing.assert_allclose(z, plain, rtol=1e-5, atol=1e-5)


def test_denoise_refines_each_stream_by_its_own_tolerance_and_no_coarser_than_its_steps(model, history):
    cache, _, actions, *_ = history
    keys = jax.random.split(jax.random.key(1), B)
    adapt = jax.jit(adaptive.denoise)
    steps, tolerance = jnp.array([1, K_MAX // 2, K_MAX]), jnp.array([1e6, 1e6, 0.0])
    z, passes = adapt(model, cache, actions, keys, steps=steps, tolerance=tolerance)
    # Two steps after a comparison; pairs of finest steps, which are compared with nothing; finest steps alone.
    assert passes.tolist() == [3, K_MAX, K_MAX]
    for b, equal in enumerate((2, K_MAX, K_MAX)):
        plain = jax.jit(shortcut.denoise)(model, cache, actions, keys, steps=jnp.full(B, equal))
        np.testing.assert_allclose(z[b], plain[b], rtol=1e-4, atol=1e-4)
