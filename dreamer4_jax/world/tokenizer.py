"""Causal tokenizer: a masked autoencoder with a tanh bottleneck (paper 3.1).

Encoder and decoder are efficient transformers over the tokens of a frame: P patches and the latents. In the encoder
latents see everything and patches see patches; in the decoder latents see latents and patches see everything, so
pixels reach the decoder only through the bottleneck. Time layers are causal, so video streams through both halves.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dreamer4_jax.config import TokenizerConfig
from dreamer4_jax.nn import cache as ring
from dreamer4_jax.nn import layers
from dreamer4_jax.nn.attention import Mask
from dreamer4_jax.nn.transformer import Transformer
from dreamer4_jax.world.perceptual import Distance, perceptual_loss

PATCH, LATENT = 0, 1
ENCODER_RULES = ((True, False), (True, True))  # rows: patch, latent; columns: what they may see
DECODER_RULES = ((True, True), (False, True))


@partial(jax.tree_util.register_dataclass, data_fields=["encoder", "decoder"], meta_fields=[])
@dataclass(frozen=True)
class TokenizerCache:
    """Streaming state of both halves."""

    encoder: ring.Cache
    decoder: ring.Cache


def patchify(video: Float[Array, "B T Y X 3"], patch: int) -> Float[Array, "B T P E"]:
    """Row-major patches, each flattened as (row, column, colour)."""
    *lead, y, x, c = video.shape
    grid = video.reshape(*lead, y // patch, patch, x // patch, patch, c)
    return jnp.moveaxis(grid, -4, -3).reshape(*lead, (y // patch) * (x // patch), patch * patch * c)


def unpatchify(patches: Float[Array, "B T P E"], grid: tuple[int, int], patch: int) -> Float[Array, "B T Y X 3"]:
    """Inverse of `patchify`."""
    *lead, _, _ = patches.shape
    blocks = patches.reshape(*lead, *grid, patch, patch, 3)
    return jnp.moveaxis(blocks, -3, -4).reshape(*lead, grid[0] * patch, grid[1] * patch, 3)


def grid_coordinates(rows: int, columns: int) -> np.ndarray:
    """Row and column of each cell, float32 [rows * columns, 2]."""
    return np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2).astype("f4")


def latent_coordinates(cfg: TokenizerConfig) -> np.ndarray:
    """Positions of the latents: their patch's place, or a line (equal row and column: 1-D RoPE)."""
    if cfg.latent_grid:
        return grid_coordinates(*cfg.grid)
    return np.repeat(np.arange(cfg.latents, dtype=np.float32)[:, None], 2, axis=1)


def token_coordinates(cfg: TokenizerConfig) -> np.ndarray:
    """Positions of the packed tokens, float32 [N, 2]: the mean place of their latents, in units of a token."""
    rows, columns = cfg.pack_block
    of_latent = latent_coordinates(cfg)[pack_order(cfg)].reshape(cfg.tokens, cfg.pack, 2).mean(1)
    scale = np.array([rows, columns] if cfg.latent_grid else [columns, columns], np.float32)
    return (of_latent - of_latent.min(0)) / scale


def pack_order(cfg: TokenizerConfig) -> np.ndarray:
    """Latent indices in the order in which consecutive groups of `pack` form a token."""
    index = np.arange(cfg.latents)
    if not cfg.latent_grid:
        return index
    (rows, columns), (r, c) = cfg.grid, cfg.pack_block
    return index.reshape(rows // r, r, columns // c, c).swapaxes(1, 2).reshape(-1)


def pack(latents: Float[Array, "... L c"], cfg: TokenizerConfig) -> Float[Array, "... N C"]:
    """Merges neighbouring latents into tokens, e.g. 512 x 16 -> 256 x 32."""
    ordered = jnp.take(latents, pack_order(cfg), axis=-2)
    return ordered.reshape(*latents.shape[:-2], cfg.tokens, cfg.token_channels)


def unpack(tokens: Float[Array, "... N C"], cfg: TokenizerConfig) -> Float[Array, "... L c"]:
    """Inverse of `pack`."""
    latents = tokens.reshape(*tokens.shape[:-2], cfg.latents, cfg.channels)
    return jnp.take(latents, np.argsort(pack_order(cfg)), axis=-2)


def to_float(video: Array) -> Float[Array, "B T Y X 3"]:
    """uint8 frames to [0, 1]; float frames pass through."""
    return video.astype(jnp.float32) / 255.0 if video.dtype == jnp.uint8 else video.astype(jnp.float32)


class Tokenizer(nnx.Module):
    """Encodes video [B, T, Y, X, 3] to tokens z [B, T, N, C] in (-1, 1) and back."""

    def __init__(self, cfg: TokenizerConfig, key: Array):
        self.cfg = cfg
        keys = jax.random.split(key, 8)
        width, values = cfg.encoder.width, cfg.patch * cfg.patch * 3
        self.embed = layers.Linear(keys[0], (values, width), ("patch", "embed"))
        self.masked = layers.normal(keys[1], (width,), ("embed",))
        self.latent = layers.normal(keys[2], (cfg.latents, width), ("latent", "embed"))
        self.encoder = Transformer(keys[3], cfg.encoder)
        self.down = layers.Linear(keys[4], (width, cfg.channels), ("embed", "channel"))
        self.up = layers.Linear(keys[5], (cfg.channels, width), ("channel", "embed"))
        self.query = layers.normal(keys[6], (cfg.patches, width), ("patch", "embed"))
        self.decoder = Transformer(keys[7], cfg.decoder)
        self.pixels = layers.Linear(jax.random.fold_in(key, 8), (width, values), ("embed", "patch"))

    @property
    def _coordinates(self) -> np.ndarray:
        return np.concatenate([grid_coordinates(*self.cfg.grid), latent_coordinates(self.cfg)])

    def _mask(self, rules: tuple[tuple[bool, ...], ...]) -> Mask:
        return Mask(types=(PATCH,) * self.cfg.patches + (LATENT,) * self.cfg.latents, rules=rules)

    def _encode(self, video, drop, segments, cache):
        cfg = self.cfg
        with jax.named_scope("tokenizer_encoder"):
            patches = self.embed(patchify(to_float(video), cfg.patch) * 2.0 - 1.0)
            if drop is not None:
                patches = jnp.where(drop[..., None], self.masked[...], patches)
            latents = jnp.broadcast_to(self.latent[...], (*patches.shape[:2], *self.latent.shape))
            y, kv = self.encoder(
                jnp.concatenate([patches, latents], axis=2),
                coordinates=self._coordinates,
                space_mask=self._mask(ENCODER_RULES),
                segments=segments,
                cache=cache,
            )
            # The transformer's final RMSNorm stands in front of the bottleneck: without it training stays at the mean.
            z = jnp.tanh(self.down(y[:, :, cfg.patches :].astype(jnp.float32)))
            return pack(z, cfg), kv

    def _decode(self, z, segments, cache):
        cfg = self.cfg
        with jax.named_scope("tokenizer_decoder"):
            latents = self.up(unpack(z.astype(jnp.float32), cfg))
            queries = jnp.broadcast_to(self.query[...], (*latents.shape[:2], *self.query.shape))
            y, kv = self.decoder(
                jnp.concatenate([queries, latents], axis=2),
                coordinates=self._coordinates,
                space_mask=self._mask(DECODER_RULES),
                segments=segments,
                cache=cache,
            )
            patches = self.pixels(y[:, :, : cfg.patches].astype(jnp.float32)) * 0.5 + 0.5
            return unpatchify(patches, cfg.grid, cfg.patch), kv

    def encode(
        self,
        video: Float[Array, "B T Y X 3"],
        *,
        drop: Bool[Array, "B T P"] | None = None,
        segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T N C"]:
        """Tokens in (-1, 1) of video (uint8, or float in [0, 1]). `drop` replaces patches by the masked embedding."""
        return self._encode(video, drop, segments, None)[0]

    def reconstruct(self, z: Float[Array, "B T N C"], *, segments: Int[Array, "B T"] | None = None) -> Array:
        """Decoded video without the clip to [0, 1]: what the loss sees."""
        return self._decode(z, segments, None)[0]

    def decode(
        self, z: Float[Array, "B T N C"], *, segments: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T Y X 3"]:
        """Video in [0, 1] of tokens."""
        return jnp.clip(self.reconstruct(z, segments=segments), 0.0, 1.0)

    def init_cache(self, batch: int) -> TokenizerCache:
        """Streaming state of `batch` fresh streams."""
        tokens = self.cfg.patches + self.cfg.latents
        return TokenizerCache(ring.empty(self.cfg.encoder, batch, tokens), ring.empty(self.cfg.decoder, batch, tokens))

    def encode_stream(self, video: Array, cache: TokenizerCache) -> tuple[Float[Array, "B T N C"], TokenizerCache]:
        """`encode` of the frames that follow what `cache` has seen; equal to encoding the whole video at once."""
        z, kv = self._encode(video, None, None, cache.encoder)
        encoder = cache.encoder if kv is None else ring.write(cache.encoder, *kv)
        return z, TokenizerCache(encoder, cache.decoder)

    def decode_stream(self, z: Array, cache: TokenizerCache) -> tuple[Float[Array, "B T Y X 3"], TokenizerCache]:
        """`decode` of the tokens that follow what `cache` has seen."""
        video, decoder = self.decode_after(cache.decoder, z)
        return video, TokenizerCache(cache.encoder, decoder)

    def decode_after(
        self,
        cache: ring.Cache,
        z: Array,
        *,
        segments: Int[Array, "B T"] | None = None,
        streams: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T Y X 3"], ring.Cache]:
        """`decode_stream` with the decoder's cache alone; of `streams` only the marked ones are written to it."""
        video, kv = self._decode(z, segments, cache)
        after = cache if kv is None else ring.write(cache, kv[0], kv[1], segments, streams)
        return jnp.clip(video, 0.0, 1.0), after


def reset_streams(cache: TokenizerCache, streams: Bool[Array, " B"]) -> TokenizerCache:
    """Forgets the history of the marked streams."""
    return TokenizerCache(ring.reset(cache.encoder, streams), ring.reset(cache.decoder, streams))


def sample_drop(key: Array, shape: tuple[int, ...], mask_max: float) -> Bool[Array, "B T P"]:
    """Masked-autoencoder dropping: per image p ~ U(0, mask_max), each patch dropped with probability p (paper 3.1)."""
    level, patch = jax.random.split(key)
    p = jax.random.uniform(level, (*shape[:2], 1), maxval=mask_max)
    return jax.random.uniform(patch, shape) < p


def tokenizer_loss(
    model: Tokenizer,
    video: Array,
    key: Array,
    *,
    segments: Int[Array, "B T"] | None = None,
    distance: Distance | None = None,
) -> tuple[dict[str, Float[Array, ""]], dict[str, Array]]:
    """The terms of paper Eq 5, not yet weighted, over all patches of the frame, decoded from partly dropped inputs.

    Returns:
      {"reconstruction": mean squared error}, with "perceptual" where a `distance` is given; and metrics.
    """
    cfg = model.cfg
    target = to_float(video)
    drop = sample_drop(key, (*video.shape[:2], cfg.patches), cfg.mask_max)
    output = model.reconstruct(model.encode(video, drop=drop, segments=segments), segments=segments)
    mse = jnp.mean((output - target) ** 2)
    terms = {"reconstruction": mse}
    if distance is not None:
        key = jax.random.fold_in(key, 2)  # 0 and 1 are those that `sample_drop` splits off
        terms["perceptual"] = perceptual_loss(distance, output, target, key, cfg.perceptual_frames)
    return terms, {"mse": mse, "psnr_dropped": -10.0 * jnp.log10(jnp.maximum(mse, 1e-10))}
