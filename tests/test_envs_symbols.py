"""The symbol decoder: exact on rendered frames of unseen seeds, whatever the level."""

import numpy as np
import pytest

from dreamer4_jax.config import EnvConfig, UserError
from dreamer4_jax.envs import babyai
from dreamer4_jax.envs.symbols import PADDING_SYMBOL, SymbolDecoder


def play(level, *, tile=8, view="full", size=64, steps=30, seeds=range(4)):
    env = babyai.make(EnvConfig(tile=tile, view=view), level, height=size, width=size, words=48)
    rng, frames = np.random.default_rng(0), []
    for seed in seeds:
        frames.append(env.reset(seed=seed)[0]["image"])
        for _ in range(steps):
            observation, _, terminated, truncated, _ = env.step(rng.integers(7))
            frames.append(observation["image"])
            if terminated or truncated:
                break
    return np.stack(frames)


@pytest.mark.parametrize(
    ("level", "size"),
    [("BabyAI-GoToLocal-v0", 64), ("BabyAI-KeyCorridorS3R3-v0", 64), ("BabyAI-BlockedUnlockPickup-v0", 96),
     ("BabyAI-OpenDoorLoc-v0", 176), ("BabyAI-GoToLocalS5N2-v0", 64)],
)  # fmt: skip
@pytest.mark.parametrize("view", ["full", "agent"])
def test_exact_on_rendered_frames(level, size, view):
    decoder = SymbolDecoder(8, view)
    frames = play(level, size=size, view=view)
    assert decoder.exact(frames) == 1.0
    symbols = decoder.decode(frames)
    assert symbols.dtype == np.int32 and symbols.shape == (len(frames), size // 8, size // 8)
    np.testing.assert_array_equal(decoder.render(symbols), frames)
    if view == "full":  # one agent a frame
        agents = [i for i, name in enumerate(decoder.names) if name.startswith("agent")]
        assert (np.isin(symbols, agents).sum((1, 2)) == 1).all()


def test_other_tile_sizes():
    assert SymbolDecoder(12).exact(play("BabyAI-PutNextLocal-v0", tile=12, size=96)) == 1.0
    with pytest.raises(UserError, match="env.tile = 3.*at least 6"):
        SymbolDecoder(3)


def test_symbols_survive_noise_and_inexact_tiles_are_counted():
    decoder, rng = SymbolDecoder(8), np.random.default_rng(0)
    frames = play("BabyAI-GoToLocal-v0")
    noisy = np.clip(frames + rng.normal(0, 8, frames.shape), 0, 255).astype(np.uint8)
    assert (decoder.decode(noisy) == decoder.decode(frames)).mean() > 0.999
    assert decoder.exact(noisy) < 0.1
    one = frames.copy()
    one[0, 0, 0, 0] ^= 1
    assert decoder.exact_tiles(one).sum() == decoder.exact_tiles(frames).sum() - 1


def test_matches_brute_force():
    decoder, rng = SymbolDecoder(8), np.random.default_rng(0)
    frame = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for r in range(2):
        for c in range(2):
            tile = frame[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].astype(np.int64)
            distance = ((decoder.templates.astype(np.int64) - tile) ** 2).sum((1, 2, 3))
            assert decoder.decode(frame)[r, c] == distance.argmin()


def test_padding_has_its_own_symbol():
    symbols = SymbolDecoder(8).decode(play("BabyAI-GoToLocalS5N2-v0"))
    assert (symbols[:, 5:] == PADDING_SYMBOL).all() and (symbols[:, :5, :5] != PADDING_SYMBOL).all()


def test_wrong_shapes_are_named():
    with pytest.raises(UserError, match="multiples of env.tile = 8"):
        SymbolDecoder(8).decode(np.zeros((60, 64, 3), np.uint8))
