"""Ring key/value cache of the time layers, with one position per stream.

Keys are rotated by their absolute frame index before they are stored, so order in the ring does not matter: a slot's
stored index says whether it is visible. Space layers need no cache. A pass only reads the ring; finished frames are
written by `write`, so denoising passes copy nothing.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dreamer4_jax.config import TransformerConfig
from dreamer4_jax.parallel.sharding import CACHE, constrain


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "pos", "next"], meta_fields=[])
@dataclass(frozen=True)
class Cache:
    """Attributes:
    k, v: [layers, B, N, G, W, K], the time layers' keys and values, in the order in which attention multiplies them: no
      pass has to lay the ring out anew.
    pos: int32 [B, W], absolute frame index held by each slot, -1 if empty.
    next: int32 [B], index of the stream's next frame.
    """

    k: Float[Array, "layers B N G W K"]
    v: Float[Array, "layers B N G W K"]
    pos: Int[Array, "B W"]
    next: Int[Array, " B"]


def empty(cfg: TransformerConfig, batch: int, tokens: int) -> Cache:
    """A cache of `batch` fresh streams of `tokens` tokens per frame."""
    shape = (cfg.time_layers, batch, tokens, cfg.kv_heads, cfg.window, cfg.head_dim)
    # Two buffers, not one twice: a cache is made to be donated.
    k, v = jnp.zeros(shape, jnp.dtype(cfg.dtype)), jnp.zeros(shape, jnp.dtype(cfg.dtype))
    k, v = constrain(k, *CACHE), constrain(v, *CACHE)
    return Cache(k, v, jnp.full((batch, cfg.window), -1, jnp.int32), jnp.zeros((batch,), jnp.int32))


def reset(cache: Cache, streams: Bool[Array, " B"]) -> Cache:
    """Forgets the history of the marked streams; the others are untouched."""
    pos = jnp.where(streams[:, None], -1, cache.pos)
    return Cache(cache.k, cache.v, pos, jnp.where(streams, 0, cache.next))


def put(cache: Cache, streams: Int[Array, " R"], some: Cache) -> Cache:
    """The histories of `some`, a cache of R streams, become those of the streams with the given numbers; a number
    beyond the last stream is dropped."""
    pairs = ((cache.k, some.k), (cache.v, some.v))
    k, v = (constrain(whole.at[:, streams].set(part, mode="drop"), *CACHE) for whole, part in pairs)
    pos, after = (
        whole.at[streams].set(part, mode="drop") for whole, part in ((cache.pos, some.pos), (cache.next, some.next))
    )
    return Cache(k, v, pos, after)


def write(
    cache: Cache,
    k: Array,
    v: Array,
    segments: Int[Array, "B T"] | None = None,
    streams: Bool[Array, " B"] | None = None,
) -> Cache:
    """Appends T finished frames to every stream.

    Args:
      k, v: [layers, B, N, G, T, K] of frames ``next .. next + T - 1``, rotated by those indices.
      segments: episode numbers of the frames. Only the last frame's episode stays visible to what follows; what the
        ring held before belongs to the episode of the first frame.
      streams: those that are written; the others keep what they hold, bit for bit.
    """
    window = cache.pos.shape[1]
    frames = k.shape[4]
    index = cache.next[:, None] + jnp.arange(frames, dtype=jnp.int32)
    after = cache.next + frames
    stored, held = index, cache.pos
    if segments is not None:
        stored = jnp.where(segments == segments[:, -1:], index, -1)
        held = jnp.where(segments[:, :1] == segments[:, -1:], held, -1)
    drop = max(0, frames - window)  # frames that the ring would overwrite at once
    k, v, index, stored = k[..., drop:, :], v[..., drop:, :], index[:, drop:], stored[:, drop:]
    slots = index % window
    if streams is not None:
        # A write beyond the ring is dropped: where a stream rests, nothing is moved or copied.
        slots = jnp.where(streams[:, None], slots, window + jnp.arange(slots.shape[1]))
        held = jnp.where(streams[:, None], held, cache.pos)
        after = jnp.where(streams, after, cache.next)

    def append(ring, new, slot):  # one stream: ring [layers, N, G, W, K]
        return ring.at[:, :, :, slot].set(new.astype(ring.dtype), unique_indices=True, mode="drop")

    over_streams = jax.vmap(append, in_axes=(1, 1, 0), out_axes=1)
    pos = jax.vmap(lambda p, s, i: p.at[s].set(i, unique_indices=True, mode="drop"))(held, slots, stored)
    k, v = (constrain(over_streams(ring, new, slots), *CACHE) for ring, new in ((cache.k, k), (cache.v, v)))
    return Cache(k, v, pos, after)
