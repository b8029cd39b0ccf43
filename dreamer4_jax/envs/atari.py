"""Atari 2600 games (the `ale-py` package, which brings them), as the fifth version of the benchmark defines them.

An action lasts four frames of the console and is repeated once more with probability 0.25 (sticky actions). Every game
takes the same 18 actions, so that games can be mixed. The image is the brighter of the last two frames, for many games
draw an object in every other one only, averaged down. There is no measure of success but the score.
"""

from functools import lru_cache
from typing import Any

import ale_py
import numpy as np
from ale_py import roms
from jaxtyping import UInt8

from dreamer4_jax.config import ActionComponent, EnvConfig
from dreamer4_jax.data.readers.base import Fit
from dreamer4_jax.envs.pixels import PixelEnv, check_level

ACTIONS = 18
VOCABULARY = 2  # padding and the one task
REPEAT, STICKY = 4, 0.25


@lru_cache
def levels() -> tuple[str, ...]:
    """Gymnasium's names of all games, as "ALE/Breakout-v5"."""
    return tuple(f"ALE/{rom.title().replace('_', '')}-v5" for rom in sorted(roms.get_all_rom_ids()))


def actions(env_cfg: EnvConfig) -> tuple[ActionComponent, ...]:
    """The joystick's 9 positions, without and with its button."""
    return (ActionComponent("move", "categorical", ACTIONS),)


class AtariEnv(PixelEnv):
    """One game."""

    idle = 0

    def __init__(self, env_cfg: EnvConfig, level: str, **sizes: int):
        super().__init__(level, actions(env_cfg), max_steps=env_cfg.max_steps, vocabulary=VOCABULARY, **sizes)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._ale = ale_py.ALEInterface()
        self._ale.setFloat("repeat_action_probability", STICKY)
        self._rom = next(rom for rom in roms.get_all_rom_ids() if level == f"ALE/{rom.title().replace('_', '')}-v5")
        self._fit = Fit((sizes["height"], sizes["width"]))

    def _begin(self, seed: int) -> UInt8[np.ndarray, "H W 3"]:
        self._ale.setInt("random_seed", seed)
        path = roms.get_rom_path(self._rom)
        assert path is not None
        self._ale.loadROM(path)  # the seed is read here
        self._legal = self._ale.getLegalActionSet()
        self._ale.reset_game()
        return self._fit(self._ale.getScreenRGB())

    def _advance(self, action: Any) -> tuple[UInt8[np.ndarray, "H W 3"], float, bool]:
        reward, screens = 0.0, []
        for repeat in range(REPEAT):
            reward += self._ale.act(self._legal[int(action)])
            if repeat >= REPEAT - 2:
                screens.append(self._ale.getScreenRGB())
        return self._fit(np.maximum(*screens)), reward, self._ale.game_over()

    def random_action(self, rng: np.random.Generator) -> int:
        """Any of the 18."""
        return int(rng.integers(ACTIONS))


def make(env_cfg: EnvConfig, level: str, *, height: int, width: int, words: int) -> AtariEnv:
    """Builds a game with time limit ``env.max_steps``; see `babyai.make` for the arguments."""
    check_level(level, levels())
    return AtariEnv(env_cfg, level, height=height, width=width, words=words)
