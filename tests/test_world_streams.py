"""Continuous batching: a slot's numbers are its own, whatever the others do, and nothing is compiled twice."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.agent.heads import ContinueHead, PolicyHead, RewardHead, ValueHead
from dreamer4_jax.agent.model import readout_width
from dreamer4_jax.nn import cache as ring
from dreamer4_jax.world import Actions, Dynamics, Tokenizer, shortcut, streams
from dreamer4_jax.world.precision import cast_once
from dreamer4_jax.world.slots import Heads
from dreamer4_jax.world.streams import Streams
from tests.small import MOVES, config, drawn, latents, moves

STACKS = ("dynamics.transformer", "tokenizer.encoder", "tokenizer.decoder")
# One space and one time layer, each: half to compile.
SHORT = {f"{stack}.{field}": 2 for stack in STACKS for field in ("layers", "time_every")}
CFG = config(**SHORT, **{"agent.hidden": 8, "agent.bins": 7, "agent.mtp": 1})
SLOTS, CONTEXT, WINDOW = 3, 4, CFG.dynamics.transformer.window
TASK = np.array([1, 3], np.int32)


def heads(cfg=CFG):
    width, a = readout_width(cfg), cfg.agent
    return Heads(
        drawn(lambda k: RewardHead(width, a, k), 2),
        drawn(lambda k: ContinueHead(width, a, k), 3),
        drawn(lambda k: PolicyHead(width, a, cfg.actions, k), 4),
        drawn(lambda k: ValueHead(width, a, k), 5),
    )


@pytest.fixture(scope="module")
def models():
    return drawn(lambda k: Tokenizer(CFG.tokenizer, k)), drawn(lambda k: Dynamics(CFG, k), 1), heads()


@pytest.fixture(scope="module")
def batch(models):
    return Streams(*models, slots=SLOTS, context=CONTEXT)


def video(frames, seed):
    return np.random.default_rng(seed).integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)


def context(frames=CONTEXT, seed=0):
    """Arguments of `join` after the slot."""
    rng = np.random.default_rng(seed)
    return video(frames, seed), {"move": rng.integers(0, MOVES, frames)}, TASK, 100 + seed


def move(*values):
    return {"move": np.array(values)}


def slot_of(tree, slot):
    """What a state or `Shown` holds of one slot, in NumPy."""

    def pick(path, x):
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ring_array = any(getattr(p, "name", "") in ("cache", "decoder") for p in path) and x.ndim == 6
        return np.asarray(x)[:, slot] if ring_array else np.asarray(x)[slot]

    return jax.tree_util.tree_map_with_path(pick, tree)


def assert_same(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def play(batch, slot, plan, *, before=(), others=None):
    """The frames that `slot` shows over `plan` = [(move, steps), ..]; `others(step, state)` meddles in between."""
    state, shown = batch.join(batch.empty(), slot, *context(seed=slot))
    out = [slot_of(shown, slot)]
    for i, (action, steps) in enumerate(plan):
        actions, k = np.zeros(batch.slots, int), np.ones(batch.slots, int)
        go = np.zeros(batch.slots, bool)
        if others is not None:
            state, actions, go, k = others(i, state, actions, go, k)
        actions[slot], go[slot], k[slot] = action, True, steps
        state, shown = batch.step(state, {"move": actions}, go, k)
        out.append(slot_of(shown, slot))
    return out


PLAN = [(i % MOVES, (4, 1, 8, 2)[i % 4]) for i in range(2 * WINDOW + 3)]  # past the end of every ring


def test_a_stream_is_its_own_whatever_the_other_slots_do(models, batch):
    alone = play(batch, 1, PLAN)

    def meddle(i, state, actions, go, k):
        """Others join, leave, start anew, rest, act and choose other numbers of steps."""
        if i % 3 == 0:
            state, _ = batch.join(state, 0, *context(frames=1 + i % CONTEXT, seed=10 + i))
        if i == 2:
            state, _ = batch.join(state, 2, *context(seed=30))
        if i == 5:
            state = batch.leave(state, 0)
        go[0], go[2] = i % 2 == 0, i > 2
        actions[[0, 2]], k[[0, 2]] = (i + 1) % MOVES, (8, 2)
        return state, actions, go, k

    crowded = play(batch, 1, PLAN, others=meddle)
    assert_same(alone, crowded)
    assert np.ptp([shown.age for shown in alone]) == len(PLAN)
    # In a batch of one, the products round differently.
    single = Streams(*models, slots=1, context=CONTEXT)
    state, shown = single.join(single.empty(), 0, *context(seed=1))
    for expected, (action, steps) in zip(alone, [*PLAN, (0, 1)], strict=True):
        got = slot_of(shown, 0)
        np.testing.assert_allclose(got.z, expected.z, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(got.h, expected.h, rtol=1e-3, atol=1e-3)
        assert np.abs(got.frame.astype(int) - expected.frame).max() <= 1
        state, shown = single.step(state, move(action), np.ones(1, bool), steps)


def test_joins_leaves_and_rests_keep_the_other_slots_bit_for_bit(batch):
    state = batch.empty()
    for slot in range(SLOTS):
        state, _ = batch.join(state, slot, *context(seed=slot))
    for _ in range(WINDOW + 1):
        state, shown = batch.step(state, move(0, 1, 2), np.ones(SLOTS, bool), 2)
    kept, seen = (slot_of(state, 1), slot_of(state, 2)), (slot_of(shown, 1), slot_of(shown, 2))
    state, shown = batch.join(state, 0, *context(frames=2, seed=7))
    assert_same((slot_of(state, 1), slot_of(state, 2)), kept)
    assert_same((slot_of(shown, 1), slot_of(shown, 2)), seen)
    state, shown = batch.step(state, move(1, 1, 1), np.array([True, False, False]), 8)
    assert_same((slot_of(state, 1), slot_of(state, 2)), kept)
    assert_same((slot_of(shown, 1), slot_of(shown, 2)), seen)
    assert shown.age.tolist() == [1, WINDOW + 1, WINDOW + 1]
    state = batch.leave(state, 0)
    assert_same((slot_of(state, 1), slot_of(state, 2)), kept)
    # What was left is forgotten, and rests until it is joined again.
    assert not np.any(state.frame[0]) and not np.any(state.h[0]) and np.all(state.cache.pos[0] == -1)
    left = slot_of(state, 0)
    state, _ = batch.step(state, move(1, 1, 1), np.ones(SLOTS, bool), 1)
    assert_same(slot_of(state, 0), left)


def test_a_slot_that_starts_anew_begins_like_a_fresh_one(batch):
    first = play(batch, 0, PLAN[:2])
    state, _ = batch.join(batch.empty(), 0, *context(seed=9))
    for _ in range(WINDOW):
        state, _ = batch.step(state, move(2, 0, 0), np.array([True, False, False]), 1)
    state, shown = batch.join(state, 0, *context(seed=0))
    for expected, (action, steps) in zip(first, [*PLAN[:2], (0, 1)], strict=True):
        assert_same(slot_of(shown, 0), expected)
        state, shown = batch.step(state, move(action, 0, 0), np.array([True, False, False]), steps)


def test_a_step_is_denoise_observe_and_streamed_decode(models):
    """Against the whole history computed at once, without caches, and heads read off h."""
    tokenizer, dynamics, head = models
    single = Streams(*models, slots=1, context=CONTEXT)
    encode, decode = jax.jit(lambda m, x: m.encode(x)), jax.jit(lambda m, z: m.decode(z))
    forward = jax.jit(lambda m, parts, led: m(*parts, led, task=jnp.tile(TASK, (1, len(parts[1][0]), 1))))
    join = lambda a, b: [jnp.concatenate(pair, axis=1) for pair in zip(a, b, strict=True)]
    frames, actions, task, seed = context()
    state, shown = single.join(single.empty(), 0, frames, actions, task, seed)
    stream, write = jax.random.split(jax.random.key(np.uint32(seed)))
    z = encode(tokenizer, frames[None])
    moved = jnp.asarray(actions["move"], jnp.int32)[None]
    there = jnp.array([[False] + [True] * (CONTEXT - 1)])
    history = shortcut.settle(dynamics, z, write)
    out = forward(dynamics, history, Actions({"move": moved}, {"move": there}))
    np.testing.assert_allclose(shown.h, out.h[:, -1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(shown.frame[0] / 255, decode(tokenizer, z)[0, -1], atol=1 / 255)
    noise, context_noise, draw = jax.random.split(jax.random.fold_in(stream, 0), 3)
    intention = shown.intention["move"]
    np.testing.assert_allclose(intention, head.policy(shown.h).intention()["move"], rtol=1e-5)
    assert intention.shape == (1, 2, MOVES) and np.allclose(intention.sum(-1), 1, atol=1e-5)
    assert shown.greedy["move"][0] == np.argmax(intention[0, 0])
    assert shown.action["move"][0] == head.policy.next(shown.h[0]).sample(draw)["move"]

    state, shown = single.step(state, move(2), np.ones(1, bool), 2)
    # The same frame without a cache: history and new frame in one pass. The window is shorter than the history.
    x = jax.random.normal(noise, (1, 4, 4))[None]
    led = Actions({"move": jnp.append(moved, 2)[None]}, {"move": jnp.append(there, True)[None]})
    level = lambda value: jnp.full((1, 1), value)
    for tau in (0.0, 0.5):
        z1 = forward(dynamics, join(history, (x, level(tau), level(0.5))), led).z1
        x = shortcut.euler_step(x, z1[:, -1:], tau, 0.5)
    np.testing.assert_allclose(shown.z, x[:, 0], rtol=1e-3, atol=1e-4)
    h = forward(dynamics, join(history, shortcut.settle(dynamics, x, context_noise[None])), led).h[:, -1]
    np.testing.assert_allclose(shown.h, h, rtol=1e-3, atol=1e-3)
    for name, value in (("reward", head.reward.mean(h)), ("cont", head.cont.prob(h)), ("value", head.value.mean(h))):
        np.testing.assert_allclose(getattr(shown, name), value, rtol=1e-2, atol=1e-3, err_msg=name)
    pixels = decode(tokenizer, jnp.concatenate([z, x], axis=1))[0, -1]
    np.testing.assert_allclose(shown.frame[0] / 255, pixels, atol=1.1 / 255)


def test_shorter_contexts_see_no_filling_and_longer_ones_their_end(batch):
    frames, actions, task, seed = context(CONTEXT + 3)
    _, long = batch.join(batch.empty(), 0, frames, actions, task, seed)
    every = {"move": np.ones(CONTEXT, bool)}
    _, end = batch.join(batch.empty(), 0, frames[3:], {"move": actions["move"][3:]}, task, seed, present=every)
    assert_same(slot_of(long, 0), slot_of(end, 0))
    _, without = batch.join(
        batch.empty(), 0, frames[3:], {"move": actions["move"][3:]}, task, seed, present={"move": ~every["move"]}
    )
    assert np.any(without.h[0] != end.h[0])
    # One frame of context: its read-out is that of a frame alone, with an action that is not there.
    tokenizer, dynamics, _ = batch.models
    _, one = batch.join(batch.empty(), 0, frames[:1], {"move": actions["move"][:1]}, task, seed)
    write = jax.random.split(jax.random.key(np.uint32(seed)))[1]
    z, tau, d = shortcut.settle(dynamics, jnp.repeat(tokenizer.encode(frames[None, :1]), CONTEXT, axis=1), write)
    none = Actions({"move": jnp.zeros((1, 1), jnp.int32)}, {"move": jnp.zeros((1, 1), bool)})
    h = dynamics(z[:, -1:], tau[:, -1:], d[:, -1:], none, task=jnp.asarray(task)[None, None]).h
    np.testing.assert_allclose(one.h[0], h[0, 0], rtol=1e-3, atol=1e-4)


def test_nothing_is_compiled_after_the_warm_up_and_the_state_is_donated(batch):
    batch.warm_up()
    sizes = [f._cache_size() for f in (streams._join, streams._step, streams._leave)]
    state, first = batch.join(batch.empty(), 0, *context(1))
    for i in range(3 * WINDOW):
        state, _ = batch.join(state, i % 2, *context(1 + i % 6, seed=i))
        old = state
        state, shown = batch.step(state, move(i % 3, 0, 1), np.array([True, i % 2 == 0, False]), [1 + (i % 2), 8, 3])
        assert old.cache.k.is_deleted() and old.frame.is_deleted() and not shown.frame.is_deleted()
        if i % 5 == 0:
            state = batch.leave(state, i % 2)
    assert sizes == [f._cache_size() for f in (streams._join, streams._step, streams._leave)]
    assert np.asarray(first.frame).any()  # what was shown outlives the state that it was shown with


def test_slots_of_fixed_and_of_adaptive_steps_share_a_batch(batch):
    """A slot's frame is the one that it would get in a batch of its own kind."""
    go, steps, never = np.ones(SLOTS, bool), np.array([4, 1, 2], np.int32), np.full(SLOTS, np.inf)

    def joined():
        state = batch.empty()
        for slot in range(SLOTS):
            state, _ = batch.join(state, slot, *context(2, seed=slot))
        return state

    plain = jax.jit(streams.step_slots)(batch.models, joined(), move(0, 1, 0), go, steps)[1]
    equal = batch.step(joined(), move(0, 1, 0), go, steps, never)[1]
    mixed = batch.step(joined(), move(0, 1, 0), go, steps, np.array([np.inf, 0.0, np.inf]))[1]
    assert plain.passes.tolist() == equal.passes.tolist() == [4, 1, 2]
    assert mixed.passes[1] > 8 and mixed.passes[0] == 4 and mixed.passes[2] == 2  # k_max = 8 steps, and comparisons
    for slot in range(SLOTS):
        np.testing.assert_allclose(plain.z[slot], equal.z[slot], rtol=1e-5, atol=1e-5)
    for slot in (0, 2):
        assert_same(slot_of(equal, slot), slot_of(mixed, slot))
    finest = batch.step(joined(), move(0, 1, 0), go, 8)[1]
    np.testing.assert_allclose(mixed.z[1], finest.z[1], rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(mixed.z[1] - plain.z[1])).max() > 0.01, "one step and eight must not be the same frame"
    with pytest.raises(ValueError, match="tolerance = -0.5: must be at least 0"):
        batch.step(joined(), move(0, 0, 0), go, 1, -0.5)


def test_weights_cast_once_give_what_weights_cast_in_every_pass_give():
    cfg = config(**SHORT, **{f"{stack}.dtype": "bfloat16" for stack in (STACKS[0], STACKS[2])})
    model, tokenizer = drawn(lambda k: Dynamics(cfg, k)), drawn(lambda k: Tokenizer(cfg.tokenizer, k))
    once, decoder = cast_once(model), cast_once(tokenizer)
    assert model.transformer.periods.time.mlp.up.dtype == jnp.float32, "the given model is left as it is"
    periods = once.transformer.periods
    for cast in (periods.time.attention.qkv, periods.space[0].attention.o, periods.space[0].mlp.down):
        assert cast.dtype == jnp.bfloat16
    for kept in (periods.time.attention.q_scale, once.embed.w, once.signal, decoder.encoder.periods):
        assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype("float32")}
    z, tau = latents(2, 2), jnp.full((2, 2), 0.5)
    run = jax.jit(lambda m: m(z, tau, tau, moves(2, 2), task=jnp.ones((2, 2, 2), jnp.int32)))
    assert_same(*((out.z1, out.h) for out in (run(once), run(model))))
    decode = jax.jit(lambda m: m.decode(z))
    np.testing.assert_array_equal(decode(decoder), decode(tokenizer))
    # The other way: float32 from a bfloat16 config is the float32 model.
    plain = drawn(lambda k: Dynamics(config(**SHORT), k))
    np.testing.assert_array_equal(run(cast_once(model, "float32")).z1, run(plain).z1)
    with pytest.raises(ValueError, match="'float16': must be one of"):
        cast_once(model, "float16")


def test_streams_in_bfloat16_are_near_those_in_float32(models):
    seen = []
    for dtype in (None, "bfloat16"):
        batch = Streams(*models, slots=1, context=CONTEXT, dtype=dtype)
        state, _ = batch.join(batch.empty(), 0, *context())
        assert state.cache.k.dtype == jnp.dtype(dtype or "float32")
        seen.append(batch.step(state, move(1), np.ones(1, bool), 1)[1])
    difference = np.abs(np.asarray(seen[0].z) - np.asarray(seen[1].z))
    assert 0 < difference.max() < 0.2 * np.abs(np.asarray(seen[0].z)).max()


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_writes_to_some_streams_leave_the_rest_of_the_ring_as_it_is(frames):
    """Against writes to all, put together by hand."""
    rng = np.random.default_rng(0)
    cfg = CFG.dynamics.transformer
    cache = ring.empty(cfg, 3, 2)
    new = lambda t: jnp.asarray(rng.standard_normal((1, 3, 2, 2, t, 8)), jnp.float32)
    cache = ring.write(cache, new(4), new(4))
    some, k, v = jnp.array([True, False, True]), new(frames), new(frames)
    every, written = ring.write(cache, k, v), ring.write(cache, k, v, None, some)
    for name, axis in (("k", 1), ("v", 1), ("pos", 0), ("next", 0)):
        expected = np.where(
            np.asarray(some).reshape(-1, *(1,) * (getattr(cache, name).ndim - axis - 1)),
            getattr(every, name),
            getattr(cache, name),
        )
        np.testing.assert_array_equal(getattr(written, name), expected, err_msg=name)


def test_what_does_not_fit_is_refused_by_name(models, batch):
    state = batch.empty()
    frames, actions, task, seed = context()
    every = np.ones(SLOTS, bool)
    wrong = SimpleNamespace(join=lambda *a, **k: batch.join(state, *a, **k), step=lambda *a: batch.step(state, *a))
    for match, call in (
        ("slot = 3", lambda: wrong.join(3, frames, actions, task, seed)),
        (r"frames \(4, 8, 8, 3\)", lambda: wrong.join(0, frames[:, :8, :8], actions, task, seed)),
        ("frames are float64: must be uint8", lambda: wrong.join(0, frames / 255, actions, task, seed)),
        (r"actions\['move'\] \(3,\): must be \(4,\)", lambda: wrong.join(0, frames, move(0, 1, 2), task, seed)),
        (r"task \(3,\)", lambda: wrong.join(0, frames, actions, np.ones(3), seed)),
        (r"present\['move'\] \(2,\)", lambda: wrong.join(0, *context(), present={"move": np.ones(2, bool)})),
        (r"actions \['jump'\]", lambda: wrong.step({"jump": np.zeros(SLOTS)}, every, 1)),
        ("advance", lambda: wrong.step(move(0, 0, 0), every[:2], 1)),
        ("steps = 3: must be a power of two up to dynamics.k_max = 8", lambda: wrong.step(move(0, 0, 0), every, 3)),
        ("steps = 16", lambda: wrong.step(move(0, 0, 0), every, [1, 16, 1])),
        ("slots=0", lambda: Streams(*models, slots=0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
