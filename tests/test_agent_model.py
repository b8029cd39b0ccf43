"""The agent in a real environment, and the transition oracle that imagination and search stand on."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.agent import model as agent_model
from dreamer4_jax.agent.model import Agent, WorldModelPolicy, readout_width
from dreamer4_jax.nn.transformer import first_of_segment
from dreamer4_jax.world import Actions, Dynamics, Tokenizer
from dreamer4_jax.world.oracle import TransitionOracle
from dreamer4_jax.world.shortcut import add_noise
from tests import small

FIELDS = {"agent.hidden": 16, "agent.bins": 15, "agent.mtp": 2, "dynamics.transformer.window": 5}
QUICK = {"xla_backend_optimization_level": 0}  # compiles in less than half of the time
STREAMS = 3


@cache
def config():
    return small.config(**FIELDS)


@cache
def tokenizer() -> Tokenizer:
    return small.drawn(lambda key: Tokenizer(config().tokenizer, key), 1)


@cache
def agent() -> Agent:
    return small.drawn(lambda key: Agent(config(), Dynamics(config(), key), key))


def player(*, greedy=True, seed=0, step=0) -> WorldModelPolicy:
    a = agent()
    policy = WorldModelPolicy(tokenizer(), a.dynamics, a.policy, seed=seed, greedy=greedy)
    policy._step = step  # so that a later start meets the same noise
    return policy


def observations(steps, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (steps, STREAMS, 16, 16, 3)).astype(np.uint8)
    tasks = rng.integers(0, 6, (STREAMS, 2)).astype(np.int32)
    return images, tasks


def play(policy, images, tasks, resets):
    """Actions [steps, E]; `resets[t]` marks streams that begin an episode with step t."""
    out = []
    for t, image in enumerate(images):
        if np.any(resets[t]):
            policy.reset(np.asarray(resets[t], bool))
        out.append(policy.act(image, tasks)["move"])
    return np.stack(out)


def history(policy, stream):
    """Frame indices and keys of the frames that a stream remembers."""
    cache = policy._memory.dynamics
    pos = np.asarray(cache.pos[stream])
    return pos, np.asarray(cache.k[:, stream])[:, :, :, pos >= 0]


# ---------------------------------------------------------------------------------------------------------------------
# Playing


def test_a_reset_stream_acts_as_a_fresh_policy_would():
    images, tasks = observations(7)
    resets = np.zeros((7, STREAMS))
    resets[0] = 1
    resets[4, 1] = 1
    policy = player(greedy=False)
    actions = play(policy, images, tasks, resets)
    fresh = player(greedy=False, step=4)
    again = play(fresh, images[4:], tasks, np.ones((3, STREAMS)) * (np.arange(3) == 0)[:, None])
    np.testing.assert_array_equal(actions[4:, 1], again[:, 1])
    for ours, theirs in zip(history(policy, 1), history(fresh, 1), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    # The streams beside it were not touched: they play as if nothing had been reset.
    resets[4, 1] = 0
    undisturbed = player(greedy=False)
    plain = play(undisturbed, images, tasks, resets)
    np.testing.assert_array_equal(actions[:, [0, 2]], plain[:, [0, 2]])
    np.testing.assert_allclose(history(policy, 0)[1], history(undisturbed, 0)[1], atol=1e-5)
    # A window of frames is remembered, and after the reset only what came since.
    assert sorted(history(policy, 0)[0]) == [2, 3, 4, 5, 6] and sorted(history(policy, 1)[0]) == [-1, -1, 0, 1, 2]


def test_streaming_decisions_are_those_of_one_pass_over_the_video():
    """Peer mistake 11: block t holds the action that led to frame t, and the first block of an episode none."""
    steps = 8  # past the window
    images, tasks = observations(steps, seed=3)
    resets = np.zeros((steps, STREAMS), bool)
    resets[0] = True
    resets[3, 2] = True
    actions = play(player(), images, tasks, resets)

    @partial(jax.jit, compiler_options=QUICK)
    def one_pass(tokenizer, agent, led, present):
        segments = first_of_segment(jnp.asarray(resets.T))
        z = tokenizer.encode(jnp.swapaxes(images, 0, 1), segments=segments)
        keys = [jax.random.split(jax.random.fold_in(jax.random.key(0), t))[0] for t in range(steps)]
        noise = jnp.concatenate([jax.random.normal(k, (STREAMS, 1, *z.shape[2:])) for k in keys], axis=1)
        tau = jnp.full(z.shape[:2], agent.dynamics.context_level)
        d = jnp.full(z.shape[:2], 1 / agent.dynamics.k_max)
        wide = jnp.broadcast_to(tasks[:, None], (STREAMS, steps, 2))
        led = Actions({"move": led}, {"move": present})
        h = agent.dynamics(add_noise(z, noise, tau), tau, d, led, task=wide, segments=segments).h
        return agent.policy.next(h).parts["move"].logits

    led = np.concatenate([np.zeros((1, STREAMS), np.int32), actions[:-1]]).T
    logits = np.asarray(one_pass(tokenizer(), agent(), led, ~resets.T))
    np.testing.assert_array_equal(np.argmax(logits, -1).T, actions)
    top = np.sort(logits, -1)
    assert np.median(top[..., -1] - top[..., -2]) > 1e-3  # equality was not an accident of ties
    # And the last action matters: shifted by one step, decisions change.
    shifted = np.asarray(one_pass(tokenizer(), agent(), np.roll(led, 1, 1), ~resets.T))
    assert np.abs(shifted - logits).max() > 1e-3


def test_a_decision_compiles_once_and_costs_the_same_at_any_age():
    images, tasks = observations(2, seed=1)
    # Bound to a device, as trained and restored models are.
    models = jax.device_put((tokenizer(), agent().dynamics, agent().policy), jax.devices()[0])
    policy = WorldModelPolicy(*models, greedy=True)
    policy.reset(np.ones(STREAMS, bool))
    policy.act(images[0], tasks)
    programs = agent_model._act._cache_size()
    for t in range(50):
        if t % 7 == 3:
            policy.reset(np.arange(STREAMS) == t % STREAMS)
        policy.act(images[t % 2], tasks)
    assert agent_model._act._cache_size() == programs
    # The ring holds a window of frames, however long the stream.
    assert policy._memory.dynamics.pos.shape == (STREAMS, config().dynamics.transformer.window)


def test_keys_and_mouse_compile_once_too():
    parts = [{"name": "keys", "kind": "binary", "size": 4}, {"name": "look", "kind": "mouse", "size": 121},
             {"name": "stick", "kind": "continuous", "size": 2}]  # fmt: skip
    cfg = small.config(actions=parts, **FIELDS)
    a = small.drawn(lambda key: Agent(cfg, Dynamics(cfg, key), key))
    policy = WorldModelPolicy(tokenizer(), a.dynamics, a.policy)
    images, tasks = observations(3)
    policy.act(images[0], tasks)
    programs = agent_model._act._cache_size()
    for image in images[1:]:
        out = policy.act(image, tasks)
    assert agent_model._act._cache_size() == programs
    shapes = {name: (value.shape, value.dtype.name) for name, value in out.items()}
    assert shapes == {"keys": ((3, 4), "uint8"), "look": ((3,), "int32"), "stick": ((3, 2), "float32")}


def test_greedy_takes_the_mode_and_sampling_varies():
    images, tasks = observations(1, seed=2)
    images = np.broadcast_to(images[:, :1], (12, STREAMS, 16, 16, 3))
    once = np.zeros((12, STREAMS))
    once[:] = 1  # every step is the first of an episode: only the noise and the draw differ
    greedy, sampled = play(player(), images, tasks, once), play(player(greedy=False), images, tasks, once)
    other = play(player(greedy=False, seed=1), images, tasks, once)
    np.testing.assert_array_equal(sampled, play(player(greedy=False), images, tasks, once))  # the seed decides
    assert (sampled != other).any() and (sampled != greedy).any()
    assert len(np.unique(sampled)) > 1


def test_the_mission_reaches_the_decision():
    images, tasks = observations(1)

    def logits(words):
        a = agent()
        z = tokenizer().encode(images[0][:, None])
        led = Actions({"move": jnp.zeros((STREAMS, 1), jnp.int32)}, {"move": jnp.zeros((STREAMS, 1), bool)})
        level = jnp.full((STREAMS, 1), 0.5), jnp.full((STREAMS, 1), 1 / 8)
        return a.policy.next(a.dynamics(z, *level, led, task=words[:, None]).h).parts["move"].logits

    both = jax.jit(logits, compiler_options=QUICK)
    assert np.abs(both(jnp.asarray(tasks)) - both(jnp.asarray((tasks + 1) % 6))).max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# The oracle


def oracle(steps=2) -> TransitionOracle:
    a = agent()
    return TransitionOracle(None, a.dynamics, a.reward, a.cont, steps=steps)


@cache
def jitted_reset():
    def reset(oracle, z, actions, key, segments):
        return oracle.reset(z, actions, jnp.ones((z.shape[0], 2), jnp.int32), key, segments=segments)

    return jax.jit(reset, compiler_options=QUICK)


@cache
def jitted_step():
    return jax.jit(lambda oracle, state, action, key: oracle.step(state, action, key), compiler_options=QUICK)


def started(frames=4, batch=2):
    segments = jnp.zeros((batch, frames), jnp.int32)
    return jitted_reset()(
        oracle(), small.latents(batch, frames), small.moves(batch, frames), jax.random.key(0), segments
    )


def same(a, b, **close):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **close) if close else np.testing.assert_array_equal(x, y)


def test_a_step_is_a_pure_function():
    state = started()
    before = jax.tree.map(np.array, state)
    action, key = {"move": jnp.asarray([0, 2])}, jax.random.key(1)
    first, second = (jitted_step()(oracle(), state, action, key) for _ in range(2))
    same(first, second)
    same(state, before)
    other = jitted_step()(oracle(), state, {"move": jnp.asarray([1, 2])}, key)
    moved = np.abs(np.asarray(first[1].h) - np.asarray(other[1].h)).max(-1)
    assert moved[0] > 1e-4 and moved[1] == 0  # streams do not mix
    # The transition is that of the new frame, and the state holds it.
    after, seen = first
    np.testing.assert_array_equal(after.h, seen.h)
    np.testing.assert_array_equal(after.z, seen.z)
    np.testing.assert_allclose(seen.reward, oracle().reward.mean(seen.h), rtol=1e-4)
    np.testing.assert_allclose(seen.cont, oracle().cont.prob(seen.h), rtol=1e-4)
    assert seen.z.shape == (2, 4, 4) and seen.h.shape == (2, readout_width(config()))


def test_steps_of_many_keys_and_actions_under_vmap():
    """What a search does: from one state, several futures at once."""
    state, keys = started(), jax.random.split(jax.random.key(2), 3)
    actions = {"move": jnp.asarray([[0, 1], [1, 2], [2, 0]])}
    step = jax.vmap(lambda o, s, a, k: o.step(s, a, k), in_axes=(None, None, 0, 0))
    many = jax.jit(step, compiler_options=QUICK)
    after, seen = many(oracle(), state, actions, keys)
    for i in range(3):
        one = jitted_step()(oracle(), state, {"move": actions["move"][i]}, keys[i])
        same(jax.tree.map(lambda x, i=i: x[i], (after, seen)), one, atol=2e-4, rtol=1e-4)
    assert np.ptp(np.asarray(seen.z), axis=0).min() > 0


def test_a_step_keeps_its_shapes_and_its_program_past_the_window():
    state = started()
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    action = {"move": jnp.asarray([0, 1])}
    jitted_step()(oracle(), state, action, jax.random.key(0))
    programs = jitted_step()._cache_size()
    for t in range(2 * config().dynamics.transformer.window + 1):
        state, _ = jitted_step()(oracle(), state, action, jax.random.key(t))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    assert jitted_step()._cache_size() == programs


def test_a_context_that_holds_two_episodes_starts_with_the_second():
    """Frames, actions and noise of the earlier episode leave no trace, neither in the state nor in what follows."""
    segments = jnp.asarray([[0, 0, 1, 1], [0, 0, 0, 0]], jnp.int32)
    actions = small.moves(2, 4)
    actions = replace(actions, present={"move": actions.present["move"].at[0, 2].set(False)})
    other_actions = replace(actions, values={"move": actions.values["move"].at[:, 1].add(1) % small.MOVES})
    z = small.latents(2, 4)
    changed = z.at[:, :2].set(small.latents(2, 2, seed=9))
    a, b = (
        jitted_reset()(oracle(), x, led, jax.random.key(0), segments)
        for x, led in ((z, actions), (changed, other_actions))
    )
    np.testing.assert_allclose(a.h[0], b.h[0], atol=1e-5)
    assert np.abs(np.asarray(a.h[1] - b.h[1])).max() > 1e-3  # one episode: its first frames are seen
    step = {"move": jnp.asarray([1, 1])}
    (_, of_a), (_, of_b) = (jitted_step()(oracle(), s, step, jax.random.key(5)) for s in (a, b))
    np.testing.assert_allclose(of_a.z[0], of_b.z[0], atol=1e-5)
    np.testing.assert_allclose(of_a.h[0], of_b.h[0], atol=1e-5)
    assert np.abs(np.asarray(of_a.h[1] - of_b.h[1])).max() > 1e-3


def test_frames_need_a_tokenizer():
    with pytest.raises(ValueError, match="without a tokenizer"):
        oracle().decode(small.latents(1, 2))
