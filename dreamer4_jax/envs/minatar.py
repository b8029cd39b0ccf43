"""MinAtar (the `minatar` package): five small Atari games on 10 x 10 cells, drawn as squares of one colour each.

A cell shows the last of its channels, as MinAtar's own display does. All games take the same six actions, and repeat
the last one with probability 0.1 (sticky actions). There is no measure of success but the score.
"""

import colorsys
from typing import Any

import numpy as np
from jaxtyping import UInt8
from minatar import Environment

from dreamer4_jax.config import ActionComponent, EnvConfig, UserError
from dreamer4_jax.envs.pixels import PixelEnv, check_level

# The position of a game is its task's word id, less one: append, never reorder.
GAMES = {
    "MinAtar/Asterix-v0": "asterix",
    "MinAtar/Breakout-v0": "breakout",
    "MinAtar/Freeway-v0": "freeway",
    "MinAtar/Seaquest-v0": "seaquest",
    "MinAtar/SpaceInvaders-v0": "space_invaders",
}
ACTIONS = 6  # nothing, left, up, right, down, fire
VOCABULARY = len(GAMES) + 1
CELLS = 10


def levels() -> tuple[str, ...]:
    return tuple(GAMES)


def actions(env_cfg: EnvConfig) -> tuple[ActionComponent, ...]:
    """Nothing, left, up, right, down, fire."""
    return (ActionComponent("move", "categorical", ACTIONS),)


def palette(channels: int) -> UInt8[np.ndarray, "colours 3"]:
    """Black, and a hue for each channel."""
    hues = [colorsys.hsv_to_rgb(i / channels, 0.8, 1.0) for i in range(channels)]
    return np.round(255 * np.asarray([(0.0, 0.0, 0.0), *hues])).astype(np.uint8)


class MinAtarEnv(PixelEnv):
    """One game."""

    idle = 0

    def __init__(self, env_cfg: EnvConfig, level: str, **sizes: int):
        super().__init__(level, actions(env_cfg), max_steps=env_cfg.max_steps, vocabulary=VOCABULARY, **sizes)
        self._game = Environment(GAMES[level])
        self._cell = min(sizes["height"], sizes["width"]) // CELLS
        self._colours = palette(self._game.n_channels)

    def _mission(self) -> tuple[int, str]:
        return list(GAMES).index(self.level) + 1, f"play {GAMES[self.level].replace('_', ' ')}"

    def _begin(self, seed: int) -> UInt8[np.ndarray, "H W 3"]:
        self._game.seed(seed)
        self._game.last_action = 0  # it would stick from the episode before
        self._game.reset()
        return self._draw()

    def _advance(self, action: Any) -> tuple[UInt8[np.ndarray, "H W 3"], float, bool]:
        reward, ended = self._game.act(int(action))
        return self._draw(), float(reward), bool(ended)

    def _draw(self) -> UInt8[np.ndarray, "H W 3"]:
        state = self._game.state()
        last = np.where(state.any(-1), state.shape[-1] - np.argmax(state[..., ::-1], -1), 0)
        side = CELLS * self._cell
        image = np.zeros_like(self._image)
        image[:side, :side] = self._colours[last].repeat(self._cell, 0).repeat(self._cell, 1)
        return image

    def reseed(self, seed: int) -> None:
        """The game draws from a generator of its own, not from `np_random`."""
        self._game.seed(seed)

    def random_action(self, rng: np.random.Generator) -> int:
        """Any of the six."""
        return int(rng.integers(ACTIONS))


def make(env_cfg: EnvConfig, level: str, *, height: int, width: int, words: int) -> MinAtarEnv:
    """Builds a game with time limit ``env.max_steps``; see `babyai.make` for the arguments."""
    check_level(level, levels())
    if min(height, width) < CELLS:
        raise UserError(f"tokenizer.height x tokenizer.width = {height} x {width}: MinAtar needs at least 10 x 10")
    return MinAtarEnv(env_cfg, level, height=height, width=width, words=words)
