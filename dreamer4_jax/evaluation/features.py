"""Frechet distances of frames and video clips over EfficientNet-Lite0 features: "FD-EffLite0" and "FVD-EffLite0".

The weights come with the extra `metrics` (`world.efficientnet`). The figures compare with each other alone, never with
an FVD over the usual I3D features: give the number of clips, and the floor that two sets of real clips have between
them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from scipy import stats

from dreamer4_jax.config import UserError
from dreamer4_jax.evaluation.metrics import Interval, frechet_distance
from dreamer4_jax.world.efficientnet import Weights, load_weights, stages

FRAME_FEATURES = 112
GROUPS = 10  # of the jackknife


@jax.jit
def frame_features(weights: Weights, frames: UInt8[Array, "n H W 3"]) -> Float[Array, "n 112"]:
    """Stage five of EfficientNet-Lite0, averaged over the image. Weights are an argument: XLA would fold constants."""
    return stages(weights, frames.astype(jnp.float32))[-1].mean((1, 2))


def clip_features(clips: UInt8[np.ndarray, "n T H W 3"], batch: int = 64) -> Float[np.ndarray, "n 224"]:
    """Of each clip its mean frame feature and the mean size of its change from frame to frame: the second half sees
    frozen and shuffled time, which no single frame shows."""
    weights, (count, length) = load_weights(), clips.shape[:2]
    flat = np.ascontiguousarray(clips.reshape(-1, *clips.shape[2:]))
    pad = -len(flat) % batch  # one shape, one compilation
    flat = np.concatenate([flat, np.zeros((pad, *flat.shape[1:]), np.uint8)])
    found = [np.asarray(frame_features(weights, flat[i : i + batch])) for i in range(0, len(flat), batch)]
    features = np.concatenate(found)[: count * length].reshape(count, length, -1)
    change = np.abs(np.diff(features, axis=1)).mean(1) if length > 1 else np.zeros_like(features[:, 0])
    return np.concatenate([features.mean(1), change], axis=-1)


def frechet_interval(x: Float[np.ndarray, "n f"], y: Float[np.ndarray, "n f"], level: float = 0.95) -> Interval:
    """The Frechet distance of two sets of as many features, with its delete-a-group jackknife interval.

    Not a bootstrap: clips that are drawn twice would shrink the covariances, and so move the distance itself.
    """
    if len(x) != len(y) or len(x) < 2 * GROUPS:
        raise UserError(
            f"frechet_interval of {len(x)} and {len(y)} clips: wants as many of both, at least {2 * GROUPS}"
        )
    group = np.arange(len(x)) * GROUPS // len(x)
    without = np.array([frechet_distance(x[group != g], y[group != g]) for g in range(GROUPS)])
    error = np.sqrt((GROUPS - 1) / GROUPS * np.sum((without - without.mean()) ** 2))
    half = float(stats.t.ppf((1 + level) / 2, GROUPS - 1) * error)
    middle = frechet_distance(x, y)
    return Interval(middle, middle - half, middle + half)
