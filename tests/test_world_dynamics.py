"""The dynamics: action tokens, agent tokens that nothing sees, streaming with and without a task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.config import ActionComponent
from dreamer4_jax.nn import cache as ring
from dreamer4_jax.nn.transformer import first_of_segment
from dreamer4_jax.world import Actions, Dynamics
from dreamer4_jax.world.dynamics import ActionEncoder, TaskEncoder, context_level, input_gain
from tests.small import config, dependencies, drawn, latents, moves, nonzero

CFG = config()
B, T = 2, 7
TASK = jnp.asarray(np.random.default_rng(0).integers(1, 6, (B, T, 2)))


@pytest.fixture(scope="module")
def model():
    return drawn(lambda key: Dynamics(CFG, key))


def levels(batch, frames, seed=0):
    """A level and a step on the grid for each frame."""
    rng = np.random.default_rng(seed)
    k = 2 ** rng.integers(0, 4, (batch, frames))
    return jnp.asarray(rng.integers(0, k) / k, jnp.float32), jnp.asarray(1 / k, jnp.float32)


def call(model, z, actions, task=None, segments=None, cache=None, seed=0):
    tau, d = levels(*z.shape[:2], seed)
    return model(z, tau, d, actions, task=task, segments=segments, cache=cache)


forward = jax.jit(call)


# ---------------------------------------------------------------------------------------------------------------------
# Layout


@pytest.mark.parametrize("registers,agents", [(0, 1), (1, 1), (2, 1), (3, 2)])
def test_registers_fill_a_frame_up_to_a_multiple_of_eight(registers, agents):
    cfg = config(**{"dynamics.registers": registers, "dynamics.agent_tokens": agents})
    model = jax.eval_shape(lambda key: Dynamics(cfg, key), jax.random.key(0))
    assert model.tokens % 8 == 0
    assert registers <= model.registers.shape[0] < registers + 8


def test_context_level_is_rounded_down_to_the_grid():
    assert context_level(0.9, 8) == 0.875 and context_level(0.9, 64) == 57 / 64 and context_level(0.9, 2) == 0.5
    assert context_level(0.75, 8) == 0.75 and context_level(0.0, 8) == 0.0


def test_output_is_float32_of_the_right_shapes(model):
    out = forward(model, latents(B, T), moves(B, T), TASK)
    assert out.z1.shape == (B, T, 4, 4) and out.h.shape == (B, T, 32) and out.cache is None
    assert out.z1.dtype == out.h.dtype == jnp.float32
    assert forward(model, latents(B, T), moves(B, T)).h is None


# ---------------------------------------------------------------------------------------------------------------------
# Input of noisy tokens


def test_input_gain_is_the_least_squares_coefficient_of_the_clean_token():
    """E[z1 z~] / E[z~^2] of unit-variance latents, measured."""
    rng = np.random.default_rng(0)
    z0, z1 = rng.standard_normal((2, 200_000))
    for tau in (0.125, 0.5, 0.875):
        noisy = (1 - tau) * z0 + tau * z1
        assert float(input_gain(jnp.float32(tau), 0.0)) == pytest.approx((z1 @ noisy) / (noisy @ noisy), abs=0.01)
    ends = [[float(input_gain(jnp.float32(tau), floor)) for tau in (0.0, 1.0)] for floor in (0.0, 0.1, 1.0)]
    np.testing.assert_allclose(ends, [[0, 1], [0.1, 1], [1, 1]], rtol=1e-6)
    grid = jnp.linspace(0, 1, 9)
    assert np.array_equal(input_gain(grid, 1.0), np.ones(9))


@pytest.mark.parametrize("floor,visible", [(0.0, False), (0.1, True)])
def test_noise_at_level_zero_is_seen_through_the_floor_alone(floor, visible):
    model = drawn(lambda key: Dynamics(config(**{"dynamics.input_floor": floor}), key))
    zero, d = jnp.zeros((B, 2)), jnp.ones((B, 2))
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(model(z, zero, d, moves(B, 2)).z1 ** 2)))(latents(B, 2))
    assert nonzero(gradient) == visible


@pytest.mark.parametrize("added", [False, True])
def test_conditions_reach_the_tokens_without_attention_if_they_are_added(added):
    model = drawn(lambda key: Dynamics(config(**{"dynamics.condition_spatial": added}), key))
    for layer in (*model.transformer.periods.space, model.transformer.periods.time):
        layer.attention.o = jax.tree.map(jnp.zeros_like, layer.attention.o)
    gradient = jax.jit(jax.grad(lambda model: jnp.sum(call(model, latents(B, T), moves(B, T)).z1 ** 2)))(model)
    for part in (gradient.actions, gradient.signal, gradient.step):
        assert nonzero(part) == added


# ---------------------------------------------------------------------------------------------------------------------
# Actions (peer mistake 12)

KINDS = (
    ActionComponent("move", "categorical", 5),
    ActionComponent("keys", "binary", 3),
    ActionComponent("arm", "continuous", 2),
    ActionComponent("mouse", "mouse", 121),
)


def all_actions(batch=3, frames=4, seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch, frames)
    values = {
        "move": rng.integers(0, 5, shape).astype(np.int32),
        "keys": rng.integers(0, 2, (*shape, 3)).astype(np.uint8),
        "arm": rng.uniform(-1, 1, (*shape, 2)).astype(np.float32),
        "mouse": rng.integers(0, 121, shape).astype(np.int32),
    }
    return values, {name: rng.random(shape) < 0.5 for name in values}


@pytest.fixture(scope="module")
def encoder():
    return drawn(lambda key: ActionEncoder(key, KINDS, 16))


encode = jax.jit(lambda encoder, values, present: encoder(Actions(values, present)))


def test_action_token_is_the_sum_of_base_and_present_components(encoder):
    values, present = all_actions()
    tables = {name: np.asarray(encoder.tables[name][...], np.float64) for name in values}
    expected = np.empty((3, 4, 16))
    for b, t in np.ndindex(3, 4):
        total = np.asarray(encoder.base[...], np.float64)
        if present["move"][b, t]:
            total = total + tables["move"][values["move"][b, t]]
        if present["mouse"][b, t]:
            total = total + tables["mouse"][values["mouse"][b, t]]
        if present["keys"][b, t]:
            total = total + sum(tables["keys"][i, key] for i, key in enumerate(values["keys"][b, t]))
        if present["arm"][b, t]:
            total = total + values["arm"][b, t].astype(np.float64) @ tables["arm"]
        expected[b, t] = total
    np.testing.assert_allclose(encode(encoder, values, present), expected, rtol=1e-5, atol=1e-6)


def test_a_continuous_value_beyond_the_range_is_its_end(encoder):
    """As environments clip: the world model must not reward what lies beyond the range, where samples may go."""
    values, present = all_actions()
    wide = {**values, "arm": 3.0 * values["arm"]}
    ends = {**values, "arm": np.clip(wide["arm"], -1, 1)}
    assert (wide["arm"] != ends["arm"]).any()
    assert np.array_equal(encode(encoder, wide, present), encode(encoder, ends, present))


def test_missing_per_frame_and_per_sample_in_one_batch_leaves_the_base(encoder):
    values, _ = all_actions()
    present = {name: np.ones((3, 4), bool) for name in values}
    for mask in present.values():
        mask[0, 1] = mask[2] = False  # one frame of a labelled video, and an unlabelled video
    token = np.asarray(encode(encoder, values, present))
    base = np.asarray(encoder.base[...])
    missing = ~present["move"]
    assert np.array_equal(token[missing], np.broadcast_to(base, (5, 16)))
    assert (np.abs(token[~missing] - base).max(-1) > 0.01).all()
    whole = np.asarray(encode(encoder, values, {name: np.ones((3, 4), bool) for name in values}))
    assert np.array_equal(token[~missing], whole[~missing])


@pytest.mark.parametrize("name", ["move", "keys", "arm", "mouse"])
def test_the_value_of_an_absent_action_changes_nothing(encoder, name):
    values, present = all_actions()
    other = {"move": 4, "keys": 1, "arm": np.nan, "mouse": 7}[name]  # NaN: whatever stands in unlabelled video
    absent = present[name].reshape(present[name].shape + (1,) * (values[name].ndim - 2))
    changed = {**values, name: np.where(absent, values[name], other).astype(values[name].dtype)}
    assert np.array_equal(encode(encoder, values, present), encode(encoder, changed, present))
    gradients = [
        jax.grad(lambda e, v: jnp.sum(e(Actions(v, present)) ** 2))(encoder, v).tables[name][...]
        for v in (values, changed)
    ]
    assert np.array_equal(*gradients)


def test_task_words_of_padding_add_nothing():
    encoder = drawn(lambda key: TaskEncoder(key, 3, 5, 8))
    table = np.asarray(encoder.table[...])
    expected = [table[0, 2] + table[1, 4], np.zeros(8)]
    np.testing.assert_allclose(encoder(jnp.array([[[2, 4, 0], [0, 0, 0]]]))[0], expected, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Who sees whom


def of_latents(z, model, actions, segments):
    """Per frame: predictions beside the read-out."""
    out = call(model, z.reshape(B, T, 4, 4), actions, TASK, segments)
    return jnp.concatenate([out.z1.reshape(B, T, -1), out.h], -1)


@pytest.mark.parametrize("segments", [np.zeros((B, T), np.int32), np.array([[0] * 3 + [1] * 4, [2] * 5 + [3] * 2])])
def test_frames_depend_on_the_past_of_their_own_row_and_episode(model, segments):
    seen = dependencies(of_latents, latents(B, T).reshape(B, T, 16), model, moves(B, T), segments)
    now, then = np.arange(T)[:, None], np.arange(T)[None]
    window = (then <= now) & (then > now - 3)
    expected = np.zeros((B, T, B, T), bool)
    for b in range(B):
        expected[b, :, b] = window & np.equal.outer(segments[b], segments[b])
    assert np.array_equal(seen, expected.reshape(B * T, B * T))


@pytest.fixture(scope="module")
def gradients(model):
    """Gradients of a projection of z1, and of h, with respect to the parameters and z."""

    def project(model, z, weights):
        out = call(model, z, moves(B, T), TASK)
        return jnp.sum(weights[0] * out.z1) + jnp.sum(weights[1] * out.h)

    rng = np.random.default_rng(1)
    of_z1, of_h = (rng.standard_normal(shape).astype(np.float32) for shape in ((B, T, 4, 4), (B, T, 32)))
    grad = jax.jit(jax.grad(project, (0, 1)))
    z = latents(B, T)
    return {"z1": grad(model, z, (of_z1, 0 * of_h)), "h": grad(model, z, (0 * of_z1, of_h))}


def test_nothing_sees_the_agent(gradients):
    """Peer mistake 7: d z1_hat / d agent tokens and / d task are zero exactly, whatever the weights."""
    of_model, of_z = gradients["z1"]
    assert not nonzero(of_model.agent) and not nonzero(of_model.task)
    for part in (of_model.actions, of_model.signal, of_model.step, of_model.embed, of_model.registers, of_model.place):
        assert nonzero(part)
    assert nonzero(of_z)


def test_the_agent_sees_everything_and_trains(gradients):
    of_model, of_z = gradients["h"]
    for part in (of_model.agent, of_model.task, of_model.actions, of_model.signal, of_model.embed, of_z):
        assert nonzero(part)
    assert not nonzero(of_model.flow)


def test_predictions_with_and_without_a_task_are_equal(model):
    z, actions = latents(B, T), moves(B, T)
    plain = forward(model, z, actions)
    for task in (TASK, jnp.flip(TASK, 0)):
        np.testing.assert_allclose(forward(model, z, actions, task).z1, plain.z1, rtol=1e-5, atol=1e-5)


def test_the_read_out_sees_the_action_that_led_to_its_frame_and_none_after_it(model):
    """Peer mistakes 11 and 18."""
    z, actions, at = latents(B, T), moves(B, T), 4
    move = actions.values["move"]
    other = Actions({"move": move.at[:, at].set((move[:, at] + 1) % 3)}, actions.present)
    a, b = (forward(model, z, acted, TASK) for acted in (actions, other))
    for x, y in ((a.h, b.h), (a.z1, b.z1)):
        assert np.array_equal(x[:, :at], y[:, :at])
        assert (np.abs(x - y)[:, at : at + 3].reshape(B, 3, -1).max(-1) > 1e-4).all()


# ---------------------------------------------------------------------------------------------------------------------
# Streams


def stream(model, z, actions, task=None, *, starts=None):
    """One frame at a time."""
    tau, d = levels(*z.shape[:2])
    cache, outs = model.init_cache(len(z)), []
    for t in range(z.shape[1]):
        if starts is not None:
            cache = ring.reset(cache, starts[:, t])
        one = jax.tree.map(lambda x, t=t: x[:, t : t + 1], (z, tau, d, actions, task))
        out = step(model, *one[:4], one[4], cache)
        cache = out.cache
        outs.append((out.z1, out.h))
    return jax.tree.map(lambda *x: jnp.concatenate(x, 1), *outs), cache


@jax.jit
def step(model, z, tau, d, actions, task, cache):
    return model(z, tau, d, actions, task=task, cache=cache)


CLOSE = dict(rtol=3e-5, atol=3e-5)


def test_cached_equals_uncached_through_a_wrap(model):
    z, actions = latents(B, 11), moves(B, 11)
    (z1, _), cache = stream(model, z, actions)
    np.testing.assert_allclose(z1, forward(model, z, actions).z1, **CLOSE)


@pytest.fixture(scope="module")
def with_task(model):
    z, actions, task = latents(B, 11), moves(B, 11), jnp.concatenate([TASK, TASK[:, :4]], 1)
    return z, actions, task, stream(model, z, actions, task)


def test_cached_equals_uncached_with_agent_tokens(model, with_task):
    z, actions, task, ((z1, h), cache) = with_task
    whole = forward(model, z, actions, task)
    np.testing.assert_allclose(z1, whole.z1, **CLOSE)
    np.testing.assert_allclose(h, whole.h, **CLOSE)
    assert cache.k.shape[2] == model.tokens


def test_a_pass_without_task_predicts_and_writes_the_same_of_the_world(model, with_task):
    z, actions, task, (_, cache) = with_task
    more, acted = latents(B, 1, 5), moves(B, 1)
    tau, d = levels(B, 1)
    without, within = (step(model, more, tau, d, acted, which, cache) for which in (None, task[:, :1]))
    np.testing.assert_allclose(without.z1, within.z1, **CLOSE)
    agents = model.agent.shape[0]
    np.testing.assert_allclose(without.cache.k[:, :, :-agents], within.cache.k[:, :, :-agents], **CLOSE)
    assert without.h is None and within.h is not None


def test_prefill_with_segments_equals_stepping_with_resets(model, with_task):
    z, actions, task, _ = with_task
    starts = np.zeros((B, 11), bool)
    starts[:, 0] = starts[0, 4] = starts[1, [6, 9]] = True
    (z1, h), cache = stream(model, z, actions, task, starts=jnp.asarray(starts))
    segments = first_of_segment(jnp.asarray(starts))
    whole = forward(model, z, actions, task, segments, model.init_cache(B))
    np.testing.assert_allclose(z1, whole.z1, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(h, whole.h, rtol=1e-4, atol=1e-4)
    more = (latents(B, 1, 5), *levels(B, 1), moves(B, 1), task[:, :1])
    np.testing.assert_allclose(step(model, *more, cache).h, step(model, *more, whole.cache).h, rtol=1e-4, atol=1e-4)


def test_2000_frames_equal_windowed_recomputation(model):
    """Peer mistakes 3 and 4, with one time layer: a frame depends on a window of three."""
    frames = 2000
    z, actions, task = latents(1, frames), moves(1, frames), jnp.broadcast_to(TASK[:1, :1], (1, frames, 2))
    tau, d = levels(1, frames)

    @jax.jit
    def roll(model, inputs):
        def body(cache, one):
            out = step(model, *jax.tree.map(lambda x: x[:, None], one), cache)
            return out.cache, (out.z1[:, 0], out.h[:, 0])

        first = model.init_cache(1)
        return jax.lax.scan(body, first, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), inputs))

    inputs = (z, tau, d, actions, task)
    cache, (z1, h) = roll(model, inputs)
    assert sorted(np.asarray(cache.pos[0])) == [1997, 1998, 1999]
    for t in (5, 256, 257, 300, 1024, 1999):
        part = jax.tree.map(lambda x, t=t: x[:, t - 2 : t + 1], inputs)
        fresh = model.init_cache(1)
        # At the same positions, and at positions counted from 0: there the angles round differently.
        for first, close in ((t - 2, 3e-5), (0, 3e-3)):
            out = step(model, *part, ring.Cache(fresh.k, fresh.v, fresh.pos, fresh.next + first))
            np.testing.assert_allclose(z1[t], out.z1[:, -1], rtol=close, atol=close)
            np.testing.assert_allclose(h[t], out.h[:, -1], rtol=close, atol=close)


def test_the_model_is_a_pytree_of_parameters():
    model = jax.eval_shape(lambda key: Dynamics(CFG, key), jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 and leaf.size > 1 for leaf in jax.tree.leaves(model))
