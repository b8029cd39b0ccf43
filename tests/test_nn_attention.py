"""Attention and its masks against float64 references; every path of the one surface agrees."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.nn import Mask, attention
from tests import reference

CLOSE = dict(rtol=2e-5, atol=2e-6)


def arrays(*lead, length=5, columns=5, heads=4, groups=2, dim=8, scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((*lead, length, heads, dim)) * scale
    k, v = (rng.standard_normal((*lead, columns, groups, dim)) * s for s in (scale, 1.0))
    return [jnp.asarray(x, jnp.float32) for x in (q, k, v)]


CAUSAL = Mask(q_pos=jnp.arange(5), k_pos=jnp.arange(5), window=3)
TYPED = Mask(types=(0, 0, 1, 2, 1), rules=((True, False, True), (True, True, False), (False, False, True)))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("mask", [None, CAUSAL, TYPED], ids=["all", "causal", "typed"])
def test_against_the_reference(groups, softcap, mask):
    q, k, v = arrays(2, 3, groups=groups, scale=3.0)
    dense = None if mask is None else np.asarray(mask.dense())
    expected = reference.attention(q, k, v, dense, softcap)
    np.testing.assert_allclose(attention(q, k, v, mask, softcap=softcap, impl="reference"), expected, **CLOSE)
    np.testing.assert_allclose(attention(q, k, v, mask, softcap=softcap), expected, **CLOSE)
    if softcap is None:
        np.testing.assert_allclose(attention(q, k, v, mask, impl="xla"), expected, **CLOSE)


@pytest.mark.parametrize("impl, softcap", [("reference", 5.0), ("xla", None)])
def test_heads_first_is_another_order_of_the_same(impl, softcap):
    q, k, v = arrays(2, 3)
    first = [jnp.swapaxes(x, -3, -2) for x in (q, k, v)]
    out = attention(*first, CAUSAL, softcap=softcap, impl=impl, heads_first=True)
    np.testing.assert_array_equal(jnp.swapaxes(out, -3, -2), attention(q, k, v, CAUSAL, softcap=softcap, impl=impl))


def test_soft_cap_bounds_the_logits():
    q, k, v = arrays(scale=100.0)
    capped = reference.attention(q, k, v, None, 2.0)
    np.testing.assert_allclose(attention(q, k, v, softcap=2.0), capped, **CLOSE)
    assert np.abs(capped - np.asarray(attention(q, k, v))).max() > 0.1


@pytest.mark.parametrize("softcap", [None, 50.0, 1000.0])
def test_extreme_logits_overflow_nothing(softcap):
    """Without a maximum where the cap bounds the logits, with one where it does not; half the rows see one column."""
    q, k, v = arrays(length=64, columns=64, scale=100.0)
    see = Mask(q_pos=jnp.arange(64), k_pos=jnp.arange(64), window=2)
    expected = reference.attention(q, k, v, np.asarray(see.dense()), softcap)
    np.testing.assert_allclose(attention(q, k, v, see, softcap=softcap), expected, rtol=1e-3, atol=1e-3)
    gradient = jax.grad(lambda q: attention(q, k, v, see, softcap=softcap).sum())(q)
    assert np.isfinite(gradient).all()


def test_xla_path_with_masks_of_each_batch():
    q, k, v = arrays(2, 3)
    seg = jnp.asarray([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])[:, None]
    mask = Mask(CAUSAL.q_pos, CAUSAL.k_pos, seg, seg, window=2)
    both = [attention(q, k, v, mask, impl=impl) for impl in ("reference", "xla")]
    np.testing.assert_allclose(*both, **CLOSE)
    expected = reference.attention(q, k, v, np.broadcast_to(mask.dense(), (2, 3, 5, 5)))
    np.testing.assert_allclose(both[0], expected, **CLOSE)


def test_biases_are_added_to_the_logits_of_each_head():
    q, k, v = arrays(2, 3)
    heads = q.shape[-2]
    rng = np.random.default_rng(1)
    shared, own = rng.normal(size=(heads, 5, 5)), rng.normal(size=(2, 1, heads, 5, 5))
    for bias in (jnp.asarray(shared, jnp.float32), jnp.asarray(own, jnp.float32)):
        for softcap, impls in ((None, ("reference", "xla")), (1.5, ("reference",))):
            expected = reference.attention(q, k, v, np.asarray(CAUSAL.dense()), softcap, np.asarray(bias, np.float64))
            for impl in impls:
                out = attention(q, k, v, CAUSAL, bias, softcap=softcap, impl=impl)
                np.testing.assert_allclose(out, expected, **CLOSE)
    parts = attention(q, (k[..., :2, :, :], k[..., 2:, :, :]), (v[..., :2, :, :], v[..., 2:, :, :]), (None, None),
                      (bias[..., :2], bias[..., 2:]))  # fmt: skip
    np.testing.assert_allclose(parts, reference.attention(q, k, v, bias=np.asarray(bias, np.float64)), **CLOSE)


def test_xla_path_refuses_what_it_cannot_do():
    q, k, v = arrays()
    with pytest.raises(ValueError, match="softcap"):
        attention(q, k, v, softcap=5.0, impl="xla")
    with pytest.raises(ValueError, match="one source"):
        attention(q, (k, k), (v, v), (None, None), impl="xla")


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_two_sources_equal_their_concatenation(softcap):
    q, k, v = arrays(2, columns=9)
    old, new = Mask(jnp.arange(5, 10), jnp.asarray([4, -1, 3, 2]), window=4), Mask(jnp.arange(5, 10), jnp.arange(5, 10))
    both = np.concatenate([old.dense(), new.dense()], axis=-1)
    out = attention(q, (k[:, :4], k[:, 4:]), (v[:, :4], v[:, 4:]), (old, new), softcap=softcap)
    np.testing.assert_allclose(out, reference.attention(q, k, v, both, softcap), **CLOSE)


def test_bfloat16_inputs_take_a_float32_softmax():
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays(length=64, columns=256))
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = reference.attention(*(np.asarray(x, np.float64) for x in (q, k, v)))
    assert np.abs(np.asarray(out, np.float64) - exact).max() < 0.01


def test_dense_masks_against_their_definition():
    q_pos, k_pos = np.array([[3, 4, 5], [0, 1, 2]]), np.array([[5, -1, 3, 1, 2], [-1, 0, 1, -1, 2]])
    q_seg, k_seg = np.array([[1, 1, 2], [0, 0, 0]]), np.array([[2, 2, 1, 0, 1], [0, 0, 0, 0, 1]])
    types, rules = (1, 0, 1), ((True, False), (True, True))
    mask = Mask(*map(jnp.asarray, (q_pos, k_pos, q_seg, k_seg)), window=3).dense()
    for b, i, j in itertools.product(range(2), range(3), range(5)):
        held = k_pos[b, j] >= 0
        seen = q_pos[b, i] - 3 < k_pos[b, j] <= q_pos[b, i]
        assert bool(mask[b, i, j]) == (held and seen and q_seg[b, i] == k_seg[b, j])
    typed = Mask(types=types, rules=rules).dense()
    for i, j in itertools.product(range(3), range(3)):
        assert bool(typed[i, j]) == rules[types[i]][types[j]]


def test_masks_that_allow_everything_cost_nothing():
    assert Mask().dense() is None
    assert Mask(types=(0, 0), rules=((True,),)).dense() is None


def test_masked_columns_get_exactly_nothing():
    q, k, v = arrays()
    allowed = np.asarray(CAUSAL.dense())
    of_k, of_v = jax.jacrev(lambda k, v: attention(q, k, v, CAUSAL, softcap=50.0).sum((1, 2)), (0, 1))(k, v)
    assert np.array_equal((np.asarray(of_v) != 0).any((2, 3)), allowed)
    of_k = np.abs(np.asarray(of_k)).max((2, 3))
    assert not of_k[~allowed].any()
    # A row that sees one column gives it all weight whatever its key is: what is left is rounding.
    several = allowed.sum(1) > 1
    assert (of_k[several][allowed[several]] > 1e-3).all() and (of_k[~several] < 1e-5).all()
