"""Norms, rotary embeddings and SwiGLU against float64 references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.nn import layers
from dreamer4_jax.nn.layers import Rotation
from tests import reference

# float32 keeps 24 bits: a few dozen roundings stay below this.
CLOSE = dict(rtol=2e-5, atol=2e-6)


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm(scale):
    x, weight = normal(3, 5, 16, scale=scale), normal(16, seed=1)
    module = layers.RMSNorm(16)
    assert np.array_equal(module.scale[...], np.ones(16))
    np.testing.assert_allclose(module(x), reference.rms_norm(x), **CLOSE)
    np.testing.assert_allclose(layers.rms_norm(x, weight), reference.rms_norm(x, weight), **CLOSE)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    x = jnp.asarray(normal(4, 512, scale=30.0), jnp.bfloat16)
    y = layers.rms_norm(x)
    assert y.dtype == jnp.bfloat16
    # One rounding at the end (2^-9 relative), none in the mean of 512 squares.
    np.testing.assert_allclose(y.astype(np.float32), reference.rms_norm(np.asarray(x, np.float64)), rtol=2**-8)


def test_swiglu():
    module = layers.SwiGLU(jax.random.key(0), 16, 24)
    x = normal(2, 7, 16)
    expected = reference.swiglu(x, module.gate[...], module.up[...], module.down[...])
    np.testing.assert_allclose(module(x), expected, **CLOSE)


def test_linear():
    module = layers.Linear(jax.random.key(0), (16, 4), ("embed", "channel"))
    module = jax.tree.map(lambda p: p + 0.5, module)
    x = normal(3, 16)
    np.testing.assert_allclose(
        module(x), x.astype(np.float64) @ np.asarray(module.w[...]) + np.asarray(module.b[...]), **CLOSE
    )


@pytest.mark.parametrize("inputs,fan", [(1, 64), (2, 64 * 8)])
def test_fan_in_has_the_standard_deviation_it_names(inputs, fan):
    p = layers.fan_in(jax.random.key(0), (64, 8, 512), ("embed", None, None), inputs=inputs, scale=0.5)
    assert p.dtype == jnp.float32
    np.testing.assert_allclose(np.std(p[...]), 0.5 / np.sqrt(fan), rtol=0.02)
    assert float(jnp.abs(p[...]).max()) <= 2 * 0.5 / np.sqrt(fan) / 0.8796 * 1.0001


def test_rope_1d():
    x, positions = normal(2, 3, 6, 8), np.array([0, 1, 2, 5, 40, 300])
    angles = layers.time_angles(jnp.asarray(positions), 8, 10_000.0)
    expected = reference.rope_1d(x, positions, 10_000.0)
    np.testing.assert_allclose(layers.rotate(x, Rotation.by(angles)), expected, rtol=1e-4, atol=5e-5)


def test_rope_2d():
    x = normal(2, 3, 6, 8)
    rows, columns = np.array([0, 0, 0, 1, 1, 7]), np.array([0, 1, 2, 0, 1, 0.5])
    angles = layers.space_angles(np.stack([rows, columns], -1), 8, 10.0)
    assert angles.shape == (6, 4) and angles.dtype == np.float32
    expected = reference.rope_2d(x, rows, columns, 10.0)
    np.testing.assert_allclose(layers.rotate(x, Rotation.by(angles, axes=2)), expected, **CLOSE)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_by_a_product_is_the_same(monkeypatch, axes, dtype):
    """What a TPU does instead of slicing channels."""
    x, angles = jnp.asarray(normal(2, 3, 5, 8), dtype), layers.time_angles(jnp.arange(5), 8, 10_000.0)
    rotation = Rotation.by(angles, axes)
    sliced = layers.rotate(x, rotation)
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    assert np.array_equal(layers.rotate(x, rotation), sliced) and sliced.dtype == dtype


def test_rope_makes_scores_depend_on_distance_alone():
    q, k = normal(1, 8), normal(1, 8, seed=1)

    def score(i, j):
        turn = lambda x, at: layers.rotate(x, Rotation.by(layers.time_angles(jnp.array([at]), 8, 10_000.0)))
        return float(jnp.vdot(turn(q, i), turn(k, j)))

    assert score(7, 4) == pytest.approx(score(2003, 2000), abs=2e-3)
    assert abs(score(7, 4) - score(7, 5)) > 0.01


def test_time_angles_are_float32_at_frame_2000():
    """Peer mistake 3: bfloat16 has 8 bits, so frames past 256 collide."""
    positions = np.arange(1900, 2101)
    angles = layers.time_angles(jnp.asarray(positions, jnp.int32), 64, 10_000.0)
    exact = positions[:, None] * 10_000.0 ** (-2 * np.arange(32) / 64)
    assert angles.dtype == jnp.float32
    assert np.abs(np.asarray(angles) - exact).max() < 3e-4  # 2,000 radians times 2^-24, twice
    assert np.all(np.diff(np.asarray(angles)[:, 0]) > 0.9)


def test_rotation_of_bfloat16_uses_float32_angles():
    x = jnp.asarray(normal(2, 201, 16), jnp.bfloat16)
    positions = np.arange(1900, 2101)
    y = layers.rotate(x, Rotation.by(layers.time_angles(jnp.asarray(positions), 16, 10_000.0)))
    assert y.dtype == jnp.bfloat16
    exact = reference.rope_1d(np.asarray(x, np.float64), positions, 10_000.0)
    np.testing.assert_allclose(y.astype(np.float32), exact, rtol=2**-8, atol=2e-3)
