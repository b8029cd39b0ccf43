"""Samplers: what the network is shown, K as a traced argument, cached generation against full recomputation; oracle."""

from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.world import Actions, Dynamics, DynamicsOutput, generate, shortcut
from dreamer4_jax.world.oracle import TransitionOracle, one_frame
from tests import reference
from tests.small import config, drawn, latents, moves

CFG = config()
K_MAX = CFG.dynamics.k_max
CONTEXT, FUTURE = 3, 5


@dataclass
class Knowing:
    """The interface of `Dynamics`; it answers the true tokens of the frame asked for, and records what it is shown.

    Its cache is the number of frames written.
    """

    truth: np.ndarray
    cfg: object = CFG
    k_max: int = K_MAX
    context_level: float = 0.875
    calls: list = field(default_factory=list)

    def init_cache(self, batch):
        return SimpleCache(jnp.zeros((batch, 1), jnp.int32))

    def __call__(self, z, tau, d, actions, *, task=None, segments=None, cache=None, finished=None, streams=None):
        at = int(cache.pos[0, 0])
        self.calls.append(SimpleNamespace(z=z, tau=tau, d=d, actions=actions, segments=segments, at=at))
        frames = z.shape[1]
        after = SimpleCache(cache.pos + (frames if finished is None else finished))
        return DynamicsOutput(jnp.asarray(self.truth[:, at : at + frames]), None, after)


@partial(jax.tree_util.register_dataclass, data_fields=["pos"], meta_fields=[])
@dataclass(frozen=True)
class SimpleCache:
    pos: jax.Array


def watch(steps, batch=2):
    """Generates with a `Knowing` model, operation by operation."""
    truth = np.asarray(latents(batch, CONTEXT + FUTURE))
    model, actions = Knowing(truth), moves(batch, CONTEXT + FUTURE)
    with jax.disable_jit():
        out = generate(model, jnp.asarray(truth[:, :CONTEXT]), actions, jax.random.key(0), steps=steps)
    return model, truth, actions, out


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_every_input_of_the_network_is_on_the_grid_and_at_its_level(steps):
    """Peer mistakes 1 and 5."""
    model, truth, actions, out = watch(steps)
    np.testing.assert_allclose(out, truth[:, CONTEXT:], rtol=1e-5, atol=1e-6)
    grid = {(t, d) for t, d, _ in reference.tau_d_grid(K_MAX)}
    for call in model.calls:
        assert {*zip(np.ravel(call.tau).tolist(), np.ravel(call.d).tolist(), strict=True)} <= grid
        assert call.tau.dtype == call.d.dtype == call.z.dtype == jnp.float32
    prefill, *rest = model.calls
    assert prefill.at == 0 and prefill.z.shape[1] == CONTEXT - 1
    assert len(rest) == FUTURE * steps  # no pass only to write
    noises = [(prefill.z - 0.875 * truth[:, : CONTEXT - 1]) / 0.125]
    for i in range(FUTURE):
        at = CONTEXT + i
        both, *denoising = rest[i * steps : (i + 1) * steps]
        # The first pass shows the last finished frame at the context level, and the new frame as pure noise.
        assert both.at == at - 1 and both.z.shape[1] == 2
        assert np.all(both.tau == np.array([0.875, 0])) and np.all(both.d == np.array([1 / K_MAX, 1 / steps]))
        noise, true = both.z[:, 1:], truth[:, at : at + 1]
        for j, call in enumerate(denoising, 1):
            assert call.at == at and np.all(call.tau == j / steps) and np.all(call.d == 1 / steps)
            # The straight line from the noise to the truth, at the very level that the label names.
            np.testing.assert_allclose(call.z, (1 - j / steps) * noise + j / steps * true, rtol=1e-5, atol=1e-5)
        for call in (both, *denoising):
            for name in ("values", "present"):
                shown, given = getattr(call.actions, name)["move"], getattr(actions, name)["move"]
                assert np.array_equal(shown, given[:, call.at : at + 1])
        noises += [noise, (both.z[:, :1] - 0.875 * truth[:, at - 1 : at]) / 0.125]
    # What is left beside the truth at its label is standard normal noise, drawn anew each time.
    every = np.concatenate([np.ravel(n) for n in noises])
    assert abs(every.mean()) < 5 / len(every) ** 0.5 and abs(every.std() - 1) < 5 / (2 * len(every)) ** 0.5
    assert len(np.unique(every)) == len(every)


def test_observe_labels_frames_with_their_noise_level():
    model = Knowing(np.asarray(latents(64, 4)))
    z1 = jnp.asarray(model.truth)
    shortcut.observe(model, model.init_cache(64), z1, moves(64, 4), jax.random.key(5), segments=jnp.zeros((64, 4)))
    (call,) = model.calls
    assert np.all(call.tau == model.context_level) and call.segments is not None
    noise = np.asarray(call.z - call.tau[..., None, None] * z1) / (1 - model.context_level)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# The real model


@pytest.fixture(scope="module")
def model():
    return drawn(lambda key: Dynamics(CFG, key))


@pytest.fixture(scope="module")
def sampler():
    return jax.jit(lambda model, z, actions, key, steps, segments: generate(
        model, z, actions, key, steps=steps, segments=segments
    ))  # fmt: skip


@jax.jit
def full_pass(model, z, tau, d, actions, segments):
    return model(z, tau, d, actions, segments=segments).z1


def generate_without_cache(model, context, actions, key, steps, segments):
    """The same noise, every pass over all frames anew."""
    batch, total = actions.values["move"].shape
    future = total - CONTEXT
    segments = jnp.concatenate([segments, jnp.repeat(segments[:, -1:], future, 1)], 1)
    of_context, of_last, of_future = jax.random.split(key, 3)
    level = model.context_level
    z, tau, d = np.zeros((batch, total, 4, 4), np.float32), np.zeros((batch, total)), np.full((batch, total), 1 / K_MAX)

    def settle(at, clean, key):
        z[:, at] = (1 - level) * jax.random.normal(key, clean.shape) + level * clean
        tau[:, at], d[:, at] = level, 1 / K_MAX

    settle(slice(0, CONTEXT - 1), np.asarray(context[:, :-1]), of_context)
    settle(slice(CONTEXT - 1, CONTEXT), np.asarray(context[:, -1:]), of_last)
    out = []
    for t, k in zip(range(CONTEXT, total), jax.random.split(of_future, future), strict=True):
        of_noise, of_write = jax.random.split(k)
        current = np.asarray(jax.random.normal(of_noise, (batch, 1, 4, 4)))
        for i in range(steps):
            z[:, t : t + 1], tau[:, t], d[:, t] = current, i / steps, 1 / steps
            z1 = full_pass(model, z, tau.astype("f4"), d.astype("f4"), actions, segments)  # later frames: not seen
            current = current + (np.asarray(z1[:, t : t + 1]) - current) / steps / (1 - i / steps)
        settle(slice(t, t + 1), current, of_write)
        out.append(current)
    return np.concatenate(out, 1)


def test_generation_equals_recomputation_and_steps_compile_nothing(model, sampler):
    """The window is three frames, so the ring wraps; one program serves K = 1, 2, 8."""
    z, actions, key = latents(2, CONTEXT), moves(2, CONTEXT + FUTURE), jax.random.key(7)
    segments = jnp.asarray([[0, 0, 0], [0, 0, 1]])
    results = []
    for steps in (1, 2, 8):
        out = sampler(model, z, actions, key, steps, segments)
        assert out.shape == (2, FUTURE, 4, 4) and out.dtype == jnp.float32
        expected = generate_without_cache(model, z, actions, key, steps, segments)
        np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)
        results.append(np.asarray(out))
    assert sampler._cache_size() == 1
    assert np.abs(results[0] - results[1]).max() > 0.01 and np.abs(results[1] - results[2]).max() > 0.01


@pytest.mark.parametrize("steps", [1, 4])
def test_a_frame_is_written_by_the_first_pass_of_the_next(model, steps):
    """K passes a frame: the same cache and frame as with a pass of its own for writing."""
    z, actions, keys = latents(2, CONTEXT), moves(2, CONTEXT + 2), jax.random.split(jax.random.key(3))
    cut = lambda start, stop: jax.tree.map(lambda x: x[:, start:stop], actions)
    last, led, new = z[:, -1:], cut(CONTEXT - 1, CONTEXT), cut(CONTEXT, CONTEXT + 1)

    @jax.jit
    def both(model, cache):
        cache, _ = shortcut.observe(model, cache, z[:, :-1], cut(0, CONTEXT - 1), jax.random.key(2))
        fused = shortcut.next_frame(model, cache, last, led, new, (keys[0], keys[1]), steps=steps)
        written, _ = shortcut.observe(model, cache, last, led, keys[0])
        return fused, (written, shortcut.denoise(model, written, new, keys[1], steps=steps))

    fused, apart = both(model, model.init_cache(2))
    assert np.array_equal(fused[0].next, apart[0].next) and np.array_equal(fused[0].pos, apart[0].pos)
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_single_frame_is_context_enough(model, sampler):
    z, actions = latents(2, 1), moves(2, 3)
    out = sampler(model, z, actions, jax.random.key(0), 2, jnp.zeros((2, 1), jnp.int32))
    assert out.shape == (2, 2, 4, 4) and np.isfinite(out).all()


def test_generated_frames_depend_on_actions_and_context_of_their_past_alone(model, sampler):
    z, actions, key = latents(2, CONTEXT), moves(2, CONTEXT + FUTURE), jax.random.key(7)
    segments = jnp.asarray([[0, 0, 0], [0, 0, 1]])
    base = sampler(model, z, actions, key, 2, segments)
    move = actions.values["move"]
    at = CONTEXT + 2
    other = Actions({"move": move.at[:, at].set((move[:, at] + 1) % 3)}, actions.present)
    changed = sampler(model, z, other, key, 2, segments)
    assert np.array_equal(base[:, :2], changed[:, :2]) and np.abs(base - changed)[:, 2].max() > 1e-3
    # In row 1 the second context frame belongs to a finished episode; in row 0 it is still in the window.
    changed = sampler(model, z.at[:, 1].add(1.0), actions, key, 2, segments)
    assert np.array_equal(base[1], changed[1]) and not np.array_equal(base[0], changed[0])


# ---------------------------------------------------------------------------------------------------------------------
# The oracle


@dataclass(frozen=True)
class Reads:
    """A head that reads one channel of h."""

    channel: int

    def mean(self, h):
        return h[..., self.channel]

    prob = mean


jax.tree_util.register_dataclass(Reads, data_fields=[], meta_fields=["channel"])


def test_oracle_steps_are_denoise_and_observe(model):
    oracle = TransitionOracle(None, model, Reads(0), Reads(1), steps=2)
    z, actions, key = latents(2, CONTEXT), moves(2, CONTEXT), jax.random.key(1)
    task = jnp.asarray([[1, 2], [3, 0]])
    state = jax.jit(TransitionOracle.reset)(oracle, z, actions, task, key)
    assert np.array_equal(state.z, z[:, -1]) and np.array_equal(state.cache.next, [CONTEXT] * 2)
    step = jax.jit(TransitionOracle.step)
    move = {"move": jnp.asarray([0, 2])}
    after, transition = step(oracle, state, move, jax.random.key(2))

    @jax.jit
    def expect(model, cache, key):
        of_noise, of_write = jax.random.split(key)
        z = shortcut.denoise(model, cache, one_frame(move), of_noise, steps=2)
        return z, *shortcut.observe(model, cache, z, one_frame(move), of_write, task=task[:, None])

    expected, cache, h = expect(model, state.cache, jax.random.key(2))
    np.testing.assert_allclose(transition.z, expected[:, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(transition.h, h[:, 0], rtol=1e-4, atol=1e-4)
    assert np.array_equal(transition.reward, transition.h[:, 0]) and np.array_equal(transition.cont, transition.h[:, 1])
    assert np.array_equal(after.cache.next, cache.next) and np.array_equal(after.cache.next, [CONTEXT + 1] * 2)
    assert np.array_equal(after.z, transition.z)
    # The new frame and its read-out depend on the action that led to them.
    _, other = step(oracle, state, {"move": jnp.asarray([1, 2])}, jax.random.key(2))
    assert np.abs(other.h - transition.h)[0].max() > 1e-4 and np.array_equal(other.h[1], transition.h[1])


def test_thousands_of_streams_are_one_program_and_vmap_is_the_same_oracle():
    """4,096 streams as 64 groups of 64, vmapped under one jit; each group is what it is alone, and all are distinct."""
    groups, each = 64, 64
    net = dict(layers=2, time_every=2, width=8, heads=1, kv_heads=1, head_dim=8, ffn=8, window=2)
    tiny = drawn(lambda key: Dynamics(config(**{"dynamics.transformer": net, "dynamics.registers": 0}), key))
    oracle = TransitionOracle(None, tiny, Reads(0), Reads(1), steps=2)

    def roll(z, actions, task, move, key):
        state = oracle.reset(z, actions, task, key)
        return oracle.step(state, move, key)[1]

    count = groups * each
    of_streams = (
        latents(count, 2),
        moves(count, 2),
        jnp.ones((count, 2), jnp.int32),
        {"move": jnp.arange(count) % 3},
    )
    split = jax.tree.map(lambda x: x.reshape(groups, each, *x.shape[1:]), of_streams)
    keys = jax.random.split(jax.random.key(1), groups)
    many, alone = jax.jit(jax.vmap(roll))(*split, keys), jax.jit(roll)
    # Whole states: of 4,096 single numbers two may be equal by chance.
    assert len(np.unique(np.asarray(many.z).reshape(count, -1), axis=0)) == count
    for i in (0, 17, groups - 1):
        one = alone(*jax.tree.map(lambda x, i=i: x[i], split), keys[i])
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
            np.testing.assert_allclose(a, b[i], rtol=1e-4, atol=1e-5)


def test_oracle_without_tokenizer_says_so(model):
    with pytest.raises(ValueError, match="without a tokenizer"):
        TransitionOracle(None, model, Reads(0), Reads(1)).decode(latents(1, 1))
