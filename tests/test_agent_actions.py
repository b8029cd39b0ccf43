"""Action distributions against closed forms, and VPT's mouse classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamer4_jax.agent import distribution, logits_size, mu_law_mouse
from dreamer4_jax.agent.actions import STD_RANGE, ActionDistribution
from dreamer4_jax.config import ActionComponent, ConfigError, UserError

MOVE = ActionComponent("move", "categorical", 7)
KEYS = ActionComponent("keys", "binary", 3)
MOUSE = ActionComponent("mouse", "mouse", 121)
ARM = ActionComponent("arm", "continuous", 2)
ALL = (MOVE, KEYS, MOUSE, ARM)


def outputs(shape=(2, 5), components=ALL, seed=0, scale=2.0):
    return scale * np.random.default_rng(seed).standard_normal((*shape, logits_size(components))).astype(np.float32)


def values(shape=(2, 5), seed=1):
    rng = np.random.default_rng(seed)
    return {
        "move": rng.integers(0, 7, shape).astype(np.int32),
        "keys": rng.integers(0, 2, (*shape, 3)).astype(np.uint8),
        "mouse": rng.integers(0, 121, shape).astype(np.int32),
        "arm": rng.uniform(-1, 1, (*shape, 2)).astype(np.float32),
    }


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def closed_forms(flat):
    """Float64 probabilities and moments of each component, from the documented order of the outputs."""
    flat = flat.astype(np.float64)
    low, high = np.log(STD_RANGE)
    std = np.exp(low + (high - low) / (1 + np.exp(-flat[..., 133:135])))
    return {
        "move": softmax(flat[..., :7]),
        "keys": 1 / (1 + np.exp(-flat[..., 7:10])),
        "mouse": softmax(flat[..., 10:131]),
        "arm": (np.tanh(flat[..., 131:133]), std),
    }


def test_sizes_and_order_of_the_outputs():
    assert logits_size(ALL) == 7 + 3 + 121 + 4
    # The paper's Minecraft action space.
    assert logits_size((ActionComponent("keys", "binary", 23), MOUSE)) == 144
    with pytest.raises(ConfigError, match="policy outputs = 8.*need 7"):
        distribution(jnp.zeros((8,)), (MOVE,))
    with pytest.raises(ConfigError, match="name of its own"):
        distribution(jnp.zeros((14,)), (MOVE, MOVE))


def test_log_prob_is_the_sum_of_closed_forms():
    flat, v = outputs(), values()
    p = closed_forms(flat)
    move = np.log(np.take_along_axis(p["move"], v["move"][..., None], -1))[..., 0]
    keys = np.log(np.where(v["keys"] == 1, p["keys"], 1 - p["keys"])).sum(-1)
    mouse = np.log(np.take_along_axis(p["mouse"], v["mouse"][..., None], -1))[..., 0]
    mean, std = p["arm"]
    arm = (-0.5 * ((v["arm"] - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(-1)
    dist = distribution(jnp.asarray(flat), ALL)
    terms = dist.log_probs(v)
    for name, expected in {"move": move, "keys": keys, "mouse": mouse, "arm": arm}.items():
        np.testing.assert_allclose(terms[name], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dist.log_prob(v), move + keys + mouse + arm, rtol=1e-4, atol=1e-4)


def test_entropy_and_kl_are_closed_forms():
    flat, other = outputs(), outputs(seed=9)
    p, q = closed_forms(flat), closed_forms(other)
    entropy = kl = 0.0
    for name in ("move", "mouse"):
        entropy = entropy - (p[name] * np.log(p[name])).sum(-1)
        kl = kl + (p[name] * np.log(p[name] / q[name])).sum(-1)
    a, b = p["keys"], q["keys"]
    entropy = entropy - (a * np.log(a) + (1 - a) * np.log(1 - a)).sum(-1)
    kl = kl + (a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))).sum(-1)
    (m, s), (n, t) = p["arm"], q["arm"]
    entropy = entropy + (np.log(s) + 0.5 * np.log(2 * np.pi * np.e)).sum(-1)
    kl = kl + (np.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5).sum(-1)
    dist, prior = distribution(jnp.asarray(flat), ALL), distribution(jnp.asarray(other), ALL)
    np.testing.assert_allclose(dist.entropy(), entropy, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dist.kl(prior), kl, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dist.kl(dist), 0.0, atol=1e-6)
    assert float(jnp.abs(dist.kl(prior) - prior.kl(dist)).max()) > 0.1  # the direction matters


@pytest.mark.parametrize("component", ALL, ids=lambda c: c.kind)
def test_kl_and_entropy_agree_with_samples(component):
    """KL(self || other) and the entropy are means over samples of self: checks log_prob, sample and both formulas."""
    n = 20_000
    dist = distribution(jnp.asarray(outputs((), (component,), scale=0.7)), (component,))
    prior = distribution(jnp.asarray(outputs((), (component,), seed=4, scale=0.7)), (component,))
    keys = jax.random.split(jax.random.key(0), n)
    drawn = jax.jit(jax.vmap(dist.sample))(keys)
    logp, logq = dist.log_prob(drawn), prior.log_prob(drawn)
    for mean, expected in ((logp - logq, dist.kl(prior)), (-logp, dist.entropy())):
        assert abs(float(mean.mean() - expected)) < 5 * float(mean.std()) / np.sqrt(n) + 1e-4


def test_absent_components_add_exactly_zero_per_sample_and_component():
    flat, v = outputs(), values()
    rng = np.random.default_rng(3)
    present = {name: rng.random((2, 5)) < 0.5 for name in v}
    dist = distribution(jnp.asarray(flat), ALL)
    terms = dist.log_probs(v)
    expected = sum(np.where(present[name], np.asarray(terms[name]), 0.0) for name in sorted(v))
    np.testing.assert_allclose(dist.log_prob(v, present), expected, rtol=1e-5, atol=1e-5)

    def total(x, actions):
        return distribution(x, ALL).log_prob(actions, present).sum()

    gradient = np.asarray(jax.grad(total)(jnp.asarray(flat), v))
    slices = {"move": slice(0, 7), "keys": slice(7, 10), "mouse": slice(10, 131), "arm": slice(131, 135)}
    for name, where in slices.items():
        moved = np.abs(gradient[..., where]).max(-1) > 0
        np.testing.assert_array_equal(moved, present[name])
    # What stands in place of an absent action is never read.
    junk = {
        "move": np.where(present["move"], v["move"], 99),
        "keys": np.where(present["keys"][..., None], v["keys"], 255),
        "mouse": np.where(present["mouse"], v["mouse"], -1),
        "arm": np.where(present["arm"][..., None], v["arm"], np.nan),
    }
    np.testing.assert_array_equal(dist.log_prob(junk, present), dist.log_prob(v, present))
    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(flat), junk), gradient)


def test_a_class_out_of_range_is_never_probable():
    dist = distribution(jnp.zeros((7,)), (MOVE,))
    for bad in (-1, 7, 1000):
        assert np.isnan(dist.log_prob({"move": jnp.int32(bad)}))


def test_unknown_or_missing_components_are_named():
    dist = distribution(jnp.zeros((7,)), (MOVE,))
    with pytest.raises(UserError, match=r"action values = \['keys'\].*\['move'\]"):
        dist.log_prob({"keys": jnp.zeros(3)})
    with pytest.raises(UserError, match="action masks"):
        dist.log_prob({"move": jnp.int32(0)}, {})


def test_samples_modes_and_types():
    dist = distribution(jnp.asarray(outputs((4, 3))), ALL)
    draw = jax.jit(lambda d, key: d.sample(key))
    for action in (draw(dist, jax.random.key(0)), dist.mode()):
        assert {n: (a.shape, str(a.dtype)) for n, a in action.items()} == {
            "move": ((4, 3), "int32"),
            "keys": ((4, 3, 3), "uint8"),
            "mouse": ((4, 3), "int32"),
            "arm": ((4, 3, 2), "float32"),
        }
    # The mode is at least as probable as any sample (per component).
    best = dist.log_probs(dist.mode())
    for seed in range(1, 5):
        for name, term in dist.log_probs(draw(dist, jax.random.key(seed))).items():
            assert bool((term <= best[name] + 1e-5).all())
    agreement = dist.agreement(dist.mode())
    for name in agreement:
        np.testing.assert_allclose(agreement[name], 1.0)


def test_distribution_is_a_pytree_and_jit_samples_the_same():
    components = (MOUSE, KEYS, MOVE)  # not in sorted order: jit sorts dicts
    dist = distribution(jnp.asarray(outputs((2,), components)), components)
    through: ActionDistribution = jax.jit(lambda d: d)(dist)
    assert list(through.parts) == sorted(dist.parts)
    direct, jitted = dist.sample(jax.random.key(3)), jax.jit(lambda d, k: d.sample(k))(dist, jax.random.key(3))
    for name in direct:
        np.testing.assert_array_equal(direct[name], jitted[name])
        np.testing.assert_array_equal(direct[name], through.sample(jax.random.key(3))[name])


def test_bfloat16_outputs_become_float32():
    dist = distribution(jnp.asarray(outputs(), jnp.bfloat16), ALL)
    assert {x.dtype for x in jax.tree.leaves(dist)} == {jnp.dtype("float32")}
    assert dist.entropy().dtype == jnp.float32


def test_continuous_outputs_are_bounded():
    dist = distribution(jnp.asarray([[1e4, -1e4, 1e4, -1e4]]), (ARM,)).parts["arm"]
    np.testing.assert_allclose(dist.mean[0], [1.0, -1.0])
    np.testing.assert_allclose(jnp.exp(dist.log_std)[0], [1.0, 0.05], rtol=1e-5)


# VPT: bin size 2, largest 10 degrees, mu 10.
CENTRES = np.array([-10, -5.809, -3.215, -1.609, -0.615, 0, 0.615, 1.609, 3.215, 5.809, 10])


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_all_mouse_classes_round_trip(array):
    index = array(np.arange(121))
    dx, dy = mu_law_mouse.decode(index)
    np.testing.assert_array_equal(mu_law_mouse.encode(dx, dy), np.arange(121))
    np.testing.assert_allclose(np.asarray(dx).reshape(11, 11)[3], CENTRES, atol=6e-4)
    np.testing.assert_allclose(np.asarray(dy).reshape(11, 11)[:, 3], CENTRES, atol=6e-4)  # id = 11 bin(dy) + bin(dx)
    assert isinstance(dx, jax.Array) == isinstance(index, jax.Array)
    assert mu_law_mouse.encode(0.0, 0.0) == 60
    assert mu_law_mouse.encode(0.7, 0.0) == 61  # VPT's integer camera bug would make this 60
    assert mu_law_mouse.encode(0.0, 0.7) == 71


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_mouse_picks_the_nearest_bin_in_foveated_space(dx, dy):
    def foveated(a):
        a = np.clip(np.asarray(a, np.float64), -10, 10) / 10
        return np.sign(a) * np.log(1 + 10 * np.abs(a)) / np.log(11)

    exact = np.sign(CENTRES) * (11.0 ** np.abs(np.linspace(-1, 1, 11)) - 1)
    index = int(mu_law_mouse.encode(dx, dy))
    assert 0 <= index < 121
    for angle, chosen in ((dx, index % 11), (dy, index // 11)):
        distance = np.abs(foveated(exact) - foveated(angle))
        assert distance[chosen] <= distance.min() + 1e-9
