"""The efficient transformer (paper 3.4): space, space, space, causal time; scanned over periods.

Pre-layer RMSNorm, RoPE, SwiGLU, QK-norm, soft-capped logits, grouped-query attention. Each layer has one attention:
space layers attend over the N tokens of a frame, time layers over the frames of one token, or, where they are not
factorised (the paper's baseline), over all tokens of all frames.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dreamer4_jax.config import TransformerConfig
from dreamer4_jax.nn import layers
from dreamer4_jax.nn.attention import Mask, attention
from dreamer4_jax.nn.cache import Cache
from dreamer4_jax.nn.layers import Rotation
from dreamer4_jax.parallel.sharding import constrain

Placed = Bool[np.ndarray, " N"] | None  # which tokens have a place in the frame; None: all
Past = tuple[Array, Array, Rotation, Mask] | None


class Attention(nnx.Module):
    """Projections, QK-norm and rotation around `attention`."""

    def __init__(self, key: Array, cfg: TransformerConfig, local: float | np.ndarray, centres: Float[Array, "H K"]):
        """`centres`: unit biases of the queries, turned to where each head looks at first; `local`: their size, [K] if
        it is not the same for all channels."""
        q, k, v, o = jax.random.split(key, 4)
        d, h, g, dim = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim
        self.dim, self.groups = dim, g
        # One matrix for the three, whose columns are [G, R + 2, K]: of each group its R queries, the key and the value.
        # So one product makes them all, a mesh axis can divide the groups, and the columns stay in a TPU's tiles, where
        # [D, H, K] would be laid out anew for every product.
        parts = (layers.fan_in(key, (d, g, n, dim), ("embed",)) for key, n in ((q, h // g), (k, 1), (v, 1)))
        joined = jnp.concatenate([part[...] for part in parts], axis=2).reshape(d, -1)
        self.qkv = nnx.Param(joined, axes=("embed", "kv_heads"))
        self.o = layers.fan_in(o, (h * dim, d), ("heads", "embed"), scale=(2 * cfg.layers) ** -0.5)
        # Constants on both sides, the query's turned by the head's centre: after rotation their product peaks at the
        # key that stands where the centre points.
        ones = jnp.ones((dim,), jnp.float32)
        self.q_scale = nnx.Param(ones, axes=("head_dim",)) if cfg.qk_norm else None
        self.k_scale = nnx.Param(ones, axes=("head_dim",)) if cfg.qk_norm else None
        self.q_bias = nnx.Param(local * centres, axes=("heads", "head_dim")) if np.any(local) else None
        self.k_bias = nnx.Param(jnp.full((dim,), local, jnp.float32), axes=("head_dim",)) if np.any(local) else None
        self.softcap = cfg.softcap or None

    def project(self, x: Float[Array, "... L D"], rotation: Rotation) -> tuple[Array, Array, Array]:
        """q [..., H, L, K], k and v [..., G, L, K]; queries and keys normalised and turned."""
        # Heads first at once: everything that follows then works in one layout, and q, k and v are whole blocks of it.
        # Not drawn into the product: XLA would lay all weights out anew to have it write heads first.
        qkv = jax.lax.optimization_barrier(x @ self.qkv[...].astype(x.dtype))
        heads = jnp.swapaxes(qkv.reshape(*x.shape[:-1], -1, self.dim), -3, -2)
        *lead, _, length, dim = heads.shape
        heads = heads.reshape(*lead, self.groups, -1, length, dim)
        q = heads[..., :-2, :, :].reshape(*lead, -1, length, dim)
        k, v = heads[..., -2, :, :], heads[..., -1, :, :]
        if self.q_scale is not None and self.k_scale is not None:
            q, k = layers.rms_norm(q, self.q_scale[...]), layers.rms_norm(k, self.k_scale[...])
        rotation = rotation.each()
        return layers.rotate(q, rotation), layers.rotate(k, rotation), v

    def local(self, of_q: Rotation, of_k: Rotation) -> Float[Array, "... H L S"] | None:
        """Logits of local attention between tokens at two sets of rotations: the rotated biases' product.

        Added to those of the content instead of to queries and keys, where each bias would also meet the other
        side's content.
        """
        if self.q_bias is None or self.k_bias is None:
            return None
        q = layers.rotate(self.q_bias[...][:, None], of_q.each())
        k = layers.rotate(self.k_bias[...], of_k)
        return _logits(q, k)

    def local_jointly(self, of_q: Rotation, of_k: Rotation, placed: np.ndarray) -> Float[Array, "... H L S"] | None:
        """`local` between tokens in space and time; in space only among those that have a place, `placed` [L, S]."""
        if self.q_bias is None or self.k_bias is None:
            return None
        q = layers.rotate(self.q_bias[...][:, None], of_q.each())
        k = layers.rotate(self.k_bias[...], of_k)
        half = self.dim // 2
        both = _logits(q[..., :half], k[..., :half]) + placed * _logits(q[..., half:], k[..., half:])
        return 2**0.5 * both  # each half as strong as a whole head in a layer of its own

    def output(self, x: Float[Array, "... H L K"]) -> Float[Array, "... L D"]:
        x = jnp.swapaxes(x, -3, -2)
        return x.reshape(*x.shape[:-2], -1) @ self.o[...].astype(x.dtype)


def _logits(q: Float[Array, "... H L K"], k: Float[Array, "... S K"]) -> Float[Array, "... H L S"]:
    return jnp.einsum("...hlk,...sk->...hls", q, k) * q.shape[-1] ** -0.5


class Layer(nnx.Module):
    """One pre-norm residual layer: attention over space, time or both, then SwiGLU."""

    def __init__(self, key: Array, cfg: TransformerConfig, local: float | np.ndarray, centres: Float[Array, "H K"]):
        attn, mlp = jax.random.split(key)
        self.norm1 = layers.RMSNorm(cfg.width)
        self.attention = Attention(attn, cfg, local, centres)
        self.norm2 = layers.RMSNorm(cfg.width)
        self.mlp = layers.SwiGLU(mlp, cfg.width, cfg.ffn, out_scale=(2 * cfg.layers) ** -0.5)

    def space(
        self, x: Float[Array, "B T N D"], rotation: Rotation, mask: Mask, placed: Placed
    ) -> Float[Array, "B T N D"]:
        with jax.named_scope("space_attention"):
            x = constrain(x, "batch", "sharded", None, None)  # every device has frames of its own, whole
            q, k, v = self.attention.project(self.norm1(x), rotation)
            bias = self.attention.local(rotation, rotation)
            if bias is not None and placed is not None:
                bias = bias * np.outer(placed, placed)
            y = attention(q, k, v, mask, bias, softcap=self.attention.softcap, heads_first=True)
            x = x + self.attention.output(y)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.norm2(x))

    def time(
        self, x: Float[Array, "B T N D"], rotation: Rotation, mask: Mask, past: Past
    ) -> tuple[Float[Array, "B T N D"], tuple[Array, Array]]:
        """`past`: keys and values [B, N, G, W, K] of the ring, its rotation and mask. Returns also the new keys and
        values [B, N, G, T, K]."""
        with jax.named_scope("time_attention"):
            # From frames to tokens: every device has tokens of its own at all times.
            y = constrain(jnp.swapaxes(self.norm1(x), 1, 2), "batch", "sharded", None, None)
            q, k, v = self.attention.project(y, rotation.each())
            q, k, v = (constrain(z, "batch", "sharded", "heads", None, None) for z in (q, k, v))
            bias = self._local_in_time(rotation, rotation)
            sources: Any = (k, v, mask, bias)
            if past is not None:
                biases = self._local_in_time(rotation, past[2]), bias
                sources = (past[0], k), (past[1], v), (past[3], mask), biases
            y = attention(q, *sources, softcap=self.attention.softcap, heads_first=True)
            y = self.attention.output(constrain(y, "batch", "sharded", "heads", None, None))
            # Said of both sides of the way back: left to itself, XLA's partitioner loses a part of the gradient of o.
            y = constrain(y, "batch", "sharded", None, None)
            x = x + constrain(jnp.swapaxes(y, 1, 2), "batch", "sharded", None, None)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.norm2(x)), (k, v)

    def joint(
        self,
        x: Float[Array, "B T N D"],
        rotation: Rotation,
        mask: Mask,
        placed: Placed,
        past: Past,
    ) -> tuple[Float[Array, "B T N D"], tuple[Array, Array]]:
        """As `time`, over all tokens of all frames: `rotation` is of [B, T N, K], that of the ring of [B, N W, K]."""
        batch, frames, tokens, width = x.shape
        at = np.ones(tokens) if placed is None else placed.astype(float)
        rows = np.tile(at, frames)
        with jax.named_scope("joint_attention"):
            x = constrain(x, "batch", None, None, None)
            q, k, v = self.attention.project(self.norm1(x).reshape(batch, -1, width), rotation)
            sources: Any = (k, v, mask, self.attention.local_jointly(rotation, rotation, np.outer(rows, rows)))
            if past is not None:
                flat = lambda ring: jnp.moveaxis(ring, 2, 1).reshape(batch, ring.shape[2], -1, ring.shape[-1])
                over = np.outer(rows, np.repeat(at, past[0].shape[3]))
                biases = self.attention.local_jointly(rotation, past[2], over), sources[3]
                sources = (flat(past[0]), k), (flat(past[1]), v), (past[3], mask), biases
            y = attention(q, *sources, softcap=self.attention.softcap, heads_first=True)
            x = x + self.attention.output(y).reshape(x.shape)
            by_token = lambda new: jnp.moveaxis(new.reshape(*new.shape[:2], frames, tokens, -1), 3, 1)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.norm2(x)), (by_token(k), by_token(v))

    def _local_in_time(self, of_q: Rotation, of_k: Rotation) -> Float[Array, "B 1 H L S"] | None:
        bias = self.attention.local(of_q, of_k)
        return None if bias is None else bias[:, None]


def _centres(cfg: TransformerConfig) -> tuple[Array, Array]:
    """Unit query biases [H, K] of the space and the time layers, turned by `local_shift` places.

    Shifted heads look right, left, down and up by turns, as the taps of a convolution do, and at earlier frames.
    """
    sides, before = _offsets(cfg)
    unit = jnp.ones((cfg.heads, cfg.head_dim))
    around = Rotation.by(layers.space_angles(sides, cfg.head_dim, cfg.rope_base_space), axes=2)
    past = Rotation.by(layers.time_angles(before, cfg.head_dim, cfg.rope_base_time))
    return layers.rotate(unit, around), layers.rotate(unit, past)


def _offsets(cfg: TransformerConfig) -> tuple[np.ndarray, Array]:
    """Where each head looks at first: rows and columns [H, 2], and frames [H]."""
    sides = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)])[np.arange(cfg.heads) % 4] * cfg.local_shift
    return sides, jnp.full((cfg.heads,), -cfg.local_shift)


def _joint_centres(cfg: TransformerConfig) -> tuple[np.ndarray, Array]:
    """The size of the biases of a layer over space and time, [K], and their unit query biases [H, K]."""
    (sides, before), half = _offsets(cfg), cfg.head_dim // 2
    time = layers.time_angles(before, half, cfg.rope_base_time)
    angles = jnp.concatenate([time, layers.space_angles(sides, half, cfg.rope_base_space)], axis=-1)
    size = np.repeat([cfg.local_time, cfg.local_space], half)
    return size, layers.rotate(jnp.ones((cfg.heads, cfg.head_dim)), Rotation.by(angles, axes=4))


class Period(nnx.Module):
    """`time_every` layers, the last of them over time; a single space layer where there are no time layers."""

    def __init__(self, key: Array, cfg: TransformerConfig):
        keys = jax.random.split(key, cfg.period)
        space = cfg.period - 1 if cfg.time_every else 1
        around, before = _centres(cfg)
        self.space = nnx.List([Layer(k, cfg, cfg.local_space, around) for k in keys[:space]])
        last = (cfg.local_time, before) if cfg.time_factorised else _joint_centres(cfg)
        self.time = Layer(keys[-1], cfg, *last) if cfg.time_every else None


class Transformer(nnx.Module):
    """Stack of periods, parameters stacked on a leading "layers" axis, and a final norm."""

    def __init__(self, key: Array, cfg: TransformerConfig):
        self.cfg = cfg
        self.periods = jax.vmap(partial(Period, cfg=cfg))(jax.random.split(key, cfg.layers // cfg.period))
        self.norm = layers.RMSNorm(cfg.width)

    def __call__(
        self,
        x: Float[Array, "B T N D"],
        *,
        coordinates: np.ndarray,
        space_mask: Mask,
        placed: Placed = None,
        segments: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        keep: bool = False,
    ) -> tuple[Float[Array, "B T N D"], tuple[Array, Array] | None]:
        """Runs the stack.

        Args:
          coordinates: static float [N, 2], row and column of each token for the space layers' RoPE.
          space_mask: token types and rules of the space layers.
          placed: which tokens have a place in the frame. The others neither have nor attract local attention in the
            space layers: their logits start from content alone.
          segments: episode numbers of the frames; time attention stays inside a segment. Frames of one segment are
            adjacent. With a cache, its history belongs to the segment of the first frame.
          cache: history of the time layers; the T frames are the ones that follow it. It is read, not written.
          keep: return the time layers' keys and values [layers, B, N, G, T, K] (always with a cache).

        Returns:
          The normed output and the new keys and values for `cache.write`, or None.
        """
        cfg = self.cfg
        batch, frames = x.shape[:2]
        x = x.astype(cfg.dtype)
        start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.next
        positions = start[:, None] + jnp.arange(frames, dtype=jnp.int32)
        space = Rotation.by(layers.space_angles(coordinates, cfg.head_dim, cfg.rope_base_space), axes=2)
        ring_pos = ring_seg = None
        if cache is not None:
            ring_pos = cache.pos
            ring_seg = None if segments is None else jnp.broadcast_to(segments[:, :1], ring_pos.shape)
        view = _frames_of_a_token if cfg.time_factorised else _all_tokens(coordinates, space_mask)
        time, mask, of_past, past_mask = view(cfg, positions, segments, ring_pos, ring_seg)
        keep = keep or cache is not None

        def body(x, scanned):
            period, ring = scanned
            for layer in period.space:
                x = layer.space(x, space, space_mask, placed)
            if period.time is None:
                return x, None
            past = None if ring is None else (*ring, of_past, past_mask)
            if cfg.time_factorised:
                x, kv = period.time.time(x, time, mask, past)
            else:
                x, kv = period.time.joint(x, time, mask, placed, past)
            return x, kv if keep else None

        if cfg.remat == "full":
            body = jax.checkpoint(body)
        elif cfg.remat == "dots":
            body = jax.checkpoint(body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        ring = None if cache is None or not cfg.time_every else (cache.k, cache.v)
        if cfg.scan:
            x, kv = jax.lax.scan(body, x, (self.periods, ring))
        else:
            kvs = []
            for i in range(cfg.layers // cfg.period):
                x, kv_i = body(x, jax.tree.map(lambda leaf, i=i: leaf[i], (self.periods, ring)))
                kvs.append(kv_i)
            kv = jax.tree.map(lambda *leaves: jnp.stack(leaves), *kvs)
        return self.norm(x), kv


def _frames_of_a_token(
    cfg: TransformerConfig,
    positions: Int[Array, "B T"],
    seg: Int[Array, "B T"] | None,
    ring_pos: Int[Array, "B W"] | None,
    ring_seg: Int[Array, "B W"] | None,
) -> tuple[Rotation, Mask, Rotation | None, Mask | None]:
    """Rotations and masks of factorised time layers: of the T frames among themselves, and of the ring behind them."""
    of_token = lambda x: None if x is None else x[:, None]  # [B, 1, T], the same for every token
    turn = lambda at: Rotation.by(layers.time_angles(at, cfg.head_dim, cfg.rope_base_time))
    now, at = of_token(positions), of_token(seg)
    mask = Mask(q_pos=now, k_pos=now, q_seg=at, k_seg=at, window=cfg.window)
    if ring_pos is None:
        return turn(positions), mask, None, None
    past = Mask(q_pos=now, k_pos=of_token(ring_pos), q_seg=at, k_seg=of_token(ring_seg), window=cfg.window)
    return turn(positions), mask, turn(ring_pos), past


def _all_tokens(coordinates: np.ndarray, space_mask: Mask):
    """The same of layers over all tokens: block-causal, with the rules between types of tokens in every frame."""
    tokens = len(coordinates)

    def view(cfg, positions, seg, ring_pos, ring_seg):
        half = cfg.head_dim // 2
        space = layers.space_angles(coordinates, half, cfg.rope_base_space)
        time = partial(layers.time_angles, dim=half, base=cfg.rope_base_time)
        joint = layers.joint_angles(time(positions), space)
        wide = lambda x: None if x is None else jnp.repeat(x, tokens, axis=1)  # [B, T N]
        now, at = wide(positions), wide(seg)
        types, rules = space_mask.types, space_mask.rules
        rows = None if types is None else types * positions.shape[1]
        mask = Mask(now, now, at, at, cfg.window, rows, rules)
        turn = lambda angles: Rotation.by(angles.reshape(angles.shape[0], -1, half), axes=4)
        if ring_pos is None:
            return turn(joint), mask, None, None
        slots = ring_pos.shape[1]
        ring = jnp.swapaxes(layers.joint_angles(time(ring_pos), space), 1, 2)  # as the ring lies: [B, N, W, K/2]
        columns = None if types is None else tuple(t for t in types for _ in range(slots))
        old = lambda x: None if x is None else jnp.tile(x, (1, tokens))  # [B, N W]
        past = Mask(now, old(ring_pos), at, old(ring_seg), cfg.window, rows, rules, columns)
        return turn(joint), mask, turn(ring), past

    return view


def first_of_segment(is_first: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Segment numbers from episode starts: ``cumsum(is_first)``."""
    return jnp.cumsum(is_first.astype(jnp.int32), axis=1)
