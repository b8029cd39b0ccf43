"""The tokenizer: patches, packing, who sees whom, streaming, masked-autoencoder dropping, its loss."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.config import TokenizerConfig, preset
from dreamer4_jax.world import Tokenizer, tokenizer
from dreamer4_jax.world.tokenizer import DECODER_RULES, ENCODER_RULES
from tests.small import config, dependencies, drawn, nonzero

CFG = config().tokenizer  # 4 patches, 4 latents, 4 layers in each half, a window of three frames
B, T = 2, 8


@pytest.fixture(scope="module")
def model():
    return drawn(lambda key: Tokenizer(CFG, key))


def video(frames=T, seed=0, batch=B):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (batch, frames, 16, 16, 3)), jnp.uint8)


encode = jax.jit(Tokenizer.encode)
decode = jax.jit(Tokenizer.decode)

# ---------------------------------------------------------------------------------------------------------------------
# Patches and packing


def test_patchify_is_row_major_and_unpatchify_inverts_it():
    x = np.random.default_rng(0).random((2, 3, 8, 12, 3)).astype(np.float32)
    patches = tokenizer.patchify(jnp.asarray(x), 4)
    assert patches.shape == (2, 3, 6, 48)
    for row in range(2):
        for column in range(3):
            expected = x[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(2, 3, 48)
            assert np.array_equal(patches[:, :, 3 * row + column], expected)
    assert np.array_equal(tokenizer.unpatchify(patches, (2, 3), 4), x)


def test_packing_on_a_grid_merges_blocks_of_two_by_two():
    cfg = preset("tiny").tokenizer
    assert cfg.grid == (8, 8) and cfg.pack_block == (2, 2) and (cfg.tokens, cfg.token_channels) == (16, 32)
    z = jnp.arange(64 * 8, dtype=jnp.float32).reshape(1, 1, 64, 8)
    packed = tokenizer.pack(z, cfg)
    for token in range(16):
        row, column = 2 * (token // 4), 2 * (token % 4)
        members = [8 * row + column, 8 * row + column + 1, 8 * row + column + 8, 8 * row + column + 9]
        assert np.array_equal(packed[0, 0, token].reshape(4, 8), z[0, 0, members])
    assert np.array_equal(tokenizer.unpack(packed, cfg), z)
    places = tokenizer.token_coordinates(cfg)
    assert np.array_equal(places, tokenizer.grid_coordinates(4, 4))


def test_packing_of_the_paper_merges_adjacent_pairs():
    cfg = preset("paper").tokenizer
    assert (cfg.latents, cfg.channels, cfg.tokens, cfg.token_channels) == (512, 16, 256, 32)
    z = jnp.asarray(np.random.default_rng(0).random((1, 512, 16)), jnp.float32)
    packed = tokenizer.pack(z, cfg)
    assert np.array_equal(packed, z.reshape(1, 256, 32)) and np.array_equal(tokenizer.unpack(packed, cfg), z)
    assert np.array_equal(tokenizer.token_coordinates(cfg), np.repeat(np.arange(256.0)[:, None], 2, 1))


def test_packing_of_pairs_on_a_grid_and_of_nothing():
    small = preset("small").tokenizer
    z = jnp.asarray(np.random.default_rng(0).random((64, 16)), jnp.float32)
    assert small.pack_block == (1, 2)
    assert np.array_equal(tokenizer.unpack(tokenizer.pack(z, small), small), z)
    assert np.array_equal(tokenizer.token_coordinates(small), tokenizer.grid_coordinates(8, 4))
    single = replace(small, pack=1)
    assert np.array_equal(tokenizer.pack(z, single), z)


def test_latents_stand_at_their_patch_or_on_a_line():
    assert np.array_equal(tokenizer.latent_coordinates(CFG), [[0, 0], [0, 1], [1, 0], [1, 1]])
    line = TokenizerConfig(latent_grid=False, latents=5, pack=1)
    assert np.array_equal(tokenizer.latent_coordinates(line), [[i, i] for i in range(5)])


# ---------------------------------------------------------------------------------------------------------------------
# Who sees whom

PATCHES, LATENTS = slice(0, 4), slice(4, 8)
RULES = {"encoder": ENCODER_RULES, "decoder": DECODER_RULES}


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_rules_of_both_halves(model, half):
    """Encoder: patches see patches, latents see all. Decoder: latents see latents, patches see all."""
    net, mask, places = getattr(model, half), model._mask(RULES[half]), model._coordinates
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 8, 32)), jnp.float32)
    seen = dependencies(lambda x: net(x, coordinates=places, space_mask=mask)[0], x).reshape(2, 8, 2, 8)
    assert not seen[0, :, 1].any()  # causal
    for then, now in ((0, 0), (1, 1), (0, 1)):
        block = seen[now, :, then]
        assert block[PATCHES, PATCHES].all() and block[LATENTS, LATENTS].all()
        assert block[LATENTS, PATCHES].all() == (half == "encoder") == block[LATENTS, PATCHES].any()
        assert block[PATCHES, LATENTS].all() == (half == "decoder") == block[PATCHES, LATENTS].any()


NOW, THEN = np.arange(T)[:, None], np.arange(T)[None]
WINDOW = (THEN <= NOW) & (THEN > NOW - 3)  # one time layer in each half
BORDER = np.array([0, 0, 0, 1, 1, 1, 1, 1])


def test_tokens_depend_on_the_past_frames_of_their_episode(model):
    f = lambda x, segments: model.encode(x.reshape(1, T, 16, 16, 3), segments=segments).reshape(T, -1)
    x = jnp.asarray(video(batch=1), jnp.float32).reshape(T, -1) / 255
    assert np.array_equal(dependencies(f, x, np.zeros((1, T), np.int32)), WINDOW)
    assert np.array_equal(dependencies(f, x, BORDER[None]), WINDOW & np.equal.outer(BORDER, BORDER))


def test_pixels_depend_on_the_past_tokens_of_their_episode_and_on_nothing_else(model):
    """`reconstruct` takes z alone: the bottleneck is the only way by construction."""
    f = lambda z, segments: model.reconstruct(z.reshape(1, T, 4, 4), segments=segments).reshape(T, -1)
    z = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (T, 16)), jnp.float32)
    assert np.array_equal(dependencies(f, z, np.zeros((1, T), np.int32)), WINDOW)
    assert np.array_equal(dependencies(f, z, BORDER[None]), WINDOW & np.equal.outer(BORDER, BORDER))


def test_dropped_patches_reach_nothing(model):
    drop = np.zeros((1, 2, 4), bool)
    drop[0, 0, 1] = drop[0, 1, 2] = True
    x = jnp.asarray(video(2, batch=1), jnp.float32) / 255
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(9 * model.encode(x, drop=drop)))))(x)
    seen = (np.asarray(tokenizer.patchify(gradient, 8)) != 0).any(-1)
    assert np.array_equal(seen, ~drop)


# ---------------------------------------------------------------------------------------------------------------------
# Values


def test_tokens_are_strictly_within_one_and_pixels_within_zero_and_one(model):
    z = encode(model, video())
    assert z.shape == (B, T, 4, 4) and z.dtype == jnp.float32
    assert float(jnp.abs(z).max()) < 1 and float(z.std()) > 0.01
    pixels = decode(model, z * 50)
    assert pixels.shape == (B, T, 16, 16, 3) and float(pixels.min()) >= 0 and float(pixels.max()) <= 1


def test_bytes_and_floats_are_the_same_video(model):
    np.testing.assert_allclose(encode(model, video()), encode(model, video() / np.float32(255)), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Streams

encode_stream, decode_stream = jax.jit(Tokenizer.encode_stream), jax.jit(Tokenizer.decode_stream)


def test_streaming_equals_the_whole_clip_through_a_wrap(model):
    x = video()
    whole = encode(model, x)
    cache, z, pixels = model.init_cache(B), [], []
    for t in range(T):
        one, cache = encode_stream(model, x[:, t : t + 1], cache)
        z.append(one)
        one, cache = decode_stream(model, one, cache)
        pixels.append(one)
    np.testing.assert_allclose(np.concatenate(z, 1), whole, rtol=3e-5, atol=3e-5)
    np.testing.assert_allclose(np.concatenate(pixels, 1), decode(model, whole), rtol=3e-5, atol=3e-5)
    assert np.array_equal(cache.encoder.next, [T, T]) and np.array_equal(cache.decoder.next, [T, T])
    assert encode_stream._cache_size() == decode_stream._cache_size() == 1


def test_a_reset_stream_starts_anew_and_the_others_go_on(model):
    x, cache = video(), model.init_cache(B)
    z = encode(model, x)
    for t in range(4):
        _, cache = encode_stream(model, x[:, t : t + 1], cache)
        _, cache = decode_stream(model, z[:, t : t + 1], cache)
    reset = tokenizer.reset_streams(cache, jnp.array([True, False]))
    now = (x[:, 4:5], z[:, 4:5])
    fresh = model.init_cache(B)
    for stream, value in zip((encode_stream, decode_stream), now, strict=True):
        after, kept, new = (stream(model, value, c)[0] for c in (reset, cache, fresh))
        assert np.array_equal(after[1], kept[1]) and np.array_equal(after[0], new[0])
        assert not np.array_equal(after[0], kept[0])


# ---------------------------------------------------------------------------------------------------------------------
# Dropping and the loss


@pytest.mark.parametrize("mask_max", [0.9, 0.5])
def test_dropping_draws_a_share_per_image(mask_max):
    """p ~ U(0, mask_max): mean mask_max / 2, variance mask_max^2 / 12, another p in every image."""
    patches = 400
    drop = np.asarray(tokenizer.sample_drop(jax.random.key(0), (40, 50, patches), mask_max))
    share = drop.mean(-1).reshape(-1)
    assert share.max() < mask_max + 0.1 and share.min() < 0.02
    np.testing.assert_allclose(share.mean(), mask_max / 2, atol=5 * mask_max / (12 * 2000) ** 0.5)
    uniform = np.quantile(share, np.linspace(0.1, 0.9, 9)) / mask_max
    np.testing.assert_allclose(uniform, np.linspace(0.1, 0.9, 9), atol=0.06)
    # Within an image the patches are independent: halves of an image drop alike, neighbours beyond p do not.
    left, right = drop[..., :200].mean(-1).ravel(), drop[..., 200:].mean(-1).ravel()
    assert np.corrcoef(left, right)[0, 1] > 0.9
    centred = drop - drop.mean(-1, keepdims=True)
    assert abs((centred[..., 1:] * centred[..., :-1]).mean()) < 0.005


def test_no_dropping_at_zero():
    assert not np.any(tokenizer.sample_drop(jax.random.key(0), (4, 5, 6), 0.0))


def test_loss_is_the_mean_squared_error_over_the_whole_frame(model):
    x, key = video(3), jax.random.key(4)

    def total(model, x, key):
        terms, metrics = tokenizer.tokenizer_loss(model, x, key)
        assert set(terms) == {"reconstruction"}
        return terms["reconstruction"], metrics

    (loss, metrics), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(model, x, key)
    drop = tokenizer.sample_drop(key, (B, 3, 4), CFG.mask_max)
    assert 0 < int(drop.sum()) < drop.size
    output = np.asarray(jax.jit(lambda m: m.reconstruct(m.encode(x, drop=drop)))(model), np.float64)
    expected = ((output - np.asarray(x, np.float64) / 255) ** 2).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["mse"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["psnr_dropped"], -10 * np.log10(expected), rtol=1e-4)
    for name in ("embed", "masked", "latent", "encoder", "down", "up", "query", "decoder", "pixels"):
        assert nonzero(getattr(gradient, name)), name
