"""Norms, rotary embeddings, SwiGLU and parameter initialisation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dreamer4_jax.parallel.sharding import platform

Axes = tuple[str | None, ...]


def fan_in(key: Array, shape: Sequence[int], axes: Axes, *, inputs: int = 1, scale: float = 1.0) -> nnx.Param:
    """A float32 parameter of standard deviation ``scale / sqrt(fan in)``; the first `inputs` axes are contracted."""
    std = scale / np.sqrt(np.prod(shape[:inputs]))
    # 0.8796 is the standard deviation of a unit normal truncated at two.
    value = jax.random.truncated_normal(key, -2.0, 2.0, tuple(shape), jnp.float32) * (std / 0.87962566)
    return nnx.Param(value, axes=axes)


def zeros(shape: Sequence[int], axes: Axes) -> nnx.Param:
    return nnx.Param(jnp.zeros(tuple(shape), jnp.float32), axes=axes)


def ones(shape: Sequence[int], axes: Axes) -> nnx.Param:
    return nnx.Param(jnp.ones(tuple(shape), jnp.float32), axes=axes)


def normal(key: Array, shape: Sequence[int], axes: Axes, std: float = 0.02) -> nnx.Param:
    """A float32 table of embeddings or learned tokens."""
    return nnx.Param(jax.random.normal(key, tuple(shape), jnp.float32) * std, axes=axes)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"] | None = None, eps: float = 1e-6) -> Array:
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, in float32, returned in the dtype of `x`."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y if scale is None else y * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, width: int, axis: str = "embed"):
        self.scale = ones((width,), (axis,))

    def __call__(self, x: Float[Array, "... D"]) -> Array:
        return rms_norm(x, self.scale[...])


class Linear(nnx.Module):
    """``x @ w (+ b)`` over the last axis, in the dtype of `x`."""

    def __init__(self, key: Array, shape: tuple[int, int], axes: tuple[str | None, str | None], *, bias: bool = True):
        self.w = fan_in(key, shape, axes)
        self.b = zeros(shape[1:], axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "... I"]) -> Array:
        y = x @ self.w[...].astype(x.dtype)
        return y if self.b is None else y + self.b[...].astype(x.dtype)


class SwiGLU(nnx.Module):
    """``(silu(x w_gate) * (x w_up)) w_down``; `out_scale` shrinks the residual branch at initialisation."""

    def __init__(self, key: Array, width: int, ffn: int, out_scale: float = 1.0):
        gate, up, down = jax.random.split(key, 3)
        self.gate = fan_in(gate, (width, ffn), ("embed", "ffn"))
        self.up = fan_in(up, (width, ffn), ("embed", "ffn"))
        self.down = fan_in(down, (ffn, width), ("ffn", "embed"), scale=out_scale)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        gate = x @ self.gate[...].astype(x.dtype)
        up = x @ self.up[...].astype(x.dtype)
        return (jax.nn.silu(gate) * up) @ self.down[...].astype(x.dtype)


def rope_frequencies(dim: int, base: float) -> np.ndarray:
    """Frequencies ``base ** (-2 i / dim)`` of the ``dim / 2`` rotated pairs, float32 [dim / 2]."""
    return (base ** (-2.0 * np.arange(dim // 2) / dim)).astype(np.float32)


def time_angles(positions: Array, dim: int, base: float) -> Float[Array, "... K/2"]:
    """Rotation angles of absolute frame indices, int32 or float32 [...]. Always float32: bfloat16 merges frames."""
    return positions.astype(jnp.float32)[..., None] * rope_frequencies(dim, base)


def space_angles(coordinates: np.ndarray, dim: int, base: float) -> np.ndarray:
    """Axial 2-D angles, float32 [N, K/2], of (row, column) positions [N, 2]: rows turn the first half of a head,
    columns the second."""
    frequencies = rope_frequencies(dim // 2, base).astype(np.float64)
    return (np.asarray(coordinates, np.float64)[:, :, None] * frequencies).reshape(len(coordinates), -1).astype("f4")


def joint_angles(time: Array, space: np.ndarray) -> Float[Array, "... T N K/2"]:
    """Angles of tokens in space and time: the first half of a head turns by `time` [..., T, K/4], the second by `space`
    [N, K/4]: a `Rotation` of four axes."""
    wide = (*time.shape[:-1], *space.shape)
    return jnp.concatenate([jnp.broadcast_to(time[..., None, :], wide), jnp.broadcast_to(space, wide)], axis=-1)


@dataclass(frozen=True)
class Rotation:
    """What `rotate` turns channels by: float32 [..., L, K] of each channel, made once for all layers and heads.

    The K channels are `axes` equal blocks (1: time; 2: rows and columns; 4: two of time, rows and columns); in a block
    channel i pairs with i + half.
    """

    cos: Array
    sin: Array  # negative for the first of a pair
    axes: int

    @classmethod
    def by(cls, angles: Array | np.ndarray, axes: int = 1) -> "Rotation":
        """By `angles` [..., L, K/2] (float32)."""
        half = angles.shape[-1] // axes
        blocks = [slice(i * half, (i + 1) * half) for i in range(axes)]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        cos = jnp.concatenate([cos[..., b] for b in blocks for _ in range(2)], axis=-1)
        return cls(cos, jnp.concatenate([s * sin[..., b] for b in blocks for s in (-1.0, 1.0)], axis=-1), axes)

    def each(self) -> "Rotation":
        """[..., 1, L, K]: the same for all heads, or for all tokens."""
        return replace(self, cos=self.cos[..., None, :, :], sin=self.sin[..., None, :, :])


def rotate(x: Float[Array, "... L K"], by: Rotation) -> Float[Array, "... L K"]:
    """Rotary embedding: turns pairs of channels."""
    half = x.shape[-1] // by.axes // 2
    partner = np.arange(x.shape[-1]).reshape(by.axes, 2, half)[:, ::-1].reshape(-1)
    if platform() == "tpu":
        # Channels are lanes of a tile, between which only a product moves things fast. Each sum has one term: exact.
        other = jnp.matmul(x, np.eye(len(partner), dtype=x.dtype)[partner], precision="highest")
    else:
        other = jnp.concatenate([x[..., p : p + half] for p in partner[::half]], axis=-1)
    return (x.astype(jnp.float32) * by.cos + other.astype(jnp.float32) * by.sin).astype(x.dtype)
