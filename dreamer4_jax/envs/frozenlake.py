"""Gymnasium's FrozenLake as a pixel environment: slippery ice, with its transition table known.

Observation: ``image`` uint8 [height, width, 3], gymnasium's own picture averaged down, and ``task`` int32 [words], one
word. The picture shows the state, except that an agent in a hole is hidden: all holes look the same. They are the same
to whoever acts, too: the episode has ended without a reward. `classes` numbers the states by their pictures.
"""

from collections.abc import Sequence
from contextlib import closing
from functools import lru_cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv
from jaxtyping import Float, Int, UInt8

from dreamer4_jax.config import ActionComponent, EnvConfig, UserError
from dreamer4_jax.envs.pictures import headless

ACTIONS = ("left", "down", "right", "up")
LEVELS = {"FrozenLake-v1": "4x4", "FrozenLake8x8-v1": "8x8"}
VOCABULARY = 2  # padding and the one task


def actions(env_cfg: EnvConfig) -> tuple[ActionComponent, ...]:
    """The four moves."""
    return (ActionComponent("move", "categorical", len(ACTIONS)),)


def _lake(level: str, render_mode: str | None = None) -> FrozenLakeEnv:
    if level not in LEVELS:
        raise UserError(f"env.levels: unknown level {level!r}; choose of {', '.join(LEVELS)}")
    return FrozenLakeEnv(render_mode=render_mode, map_name=LEVELS[level], is_slippery=True)


@lru_cache
def pictures(level: str, height: int, width: int) -> UInt8[np.ndarray, "states H W 3"]:
    """The picture of every state."""
    with headless(), closing(_lake(level, "rgb_array")) as lake:
        lake.reset(seed=0)
        frames = []
        for state in range(lake.nrow * lake.ncol):
            lake.s = state
            frames.append(np.asarray(lake.render()))
    whole = np.stack(frames)
    _, rows, columns, _ = whole.shape
    if rows % height or columns % width:
        raise UserError(
            f"tokenizer.height x tokenizer.width = {height} x {width}: level {level} is drawn at {rows} x {columns} "
            "pixels; take divisors of these"
        )
    boxes = whole.reshape(len(whole), height, rows // height, width, columns // width, 3)
    out = np.round(boxes.mean((2, 4))).astype(np.uint8)
    out.flags.writeable = False
    return out


def classes(level: str, height: int, width: int) -> Int[np.ndarray, " states"]:
    """The class of every state: states with the same picture have one class; numbered in the order of the states."""
    flat = pictures(level, height, width).reshape(-1, height * width * 3)
    _, first, inverse = np.unique(flat, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))
    return order[inverse.reshape(-1)].astype(np.int32)


def table(level: str) -> dict[int, dict[int, list[tuple[float, int, float, bool]]]]:
    """Gymnasium's transition table: state -> action -> [(probability, next state, reward, ended)]."""
    return _lake(level).P


class StateDecoder:
    """Reads the state off a picture: the nearest one in squared distance. `decode` is as `symbols.SymbolDecoder`'s.

    Attributes:
        names: of the classes, "row,column" of their first state.
        templates: uint8 [classes, H, W, 3].
    """

    def __init__(self, level: str, height: int, width: int):
        group, frames = classes(level, height, width), pictures(level, height, width)
        first = [int(np.flatnonzero(group == c)[0]) for c in range(group.max() + 1)]
        side = round(len(frames) ** 0.5)
        self.names = tuple(f"{s // side},{s % side}" for s in first)
        self.templates = frames[first]
        apart = np.asarray([_squared(self.templates, t) for t in self.templates])
        np.fill_diagonal(apart, np.inf)
        self.nearest = float(apart.min())  # squared distance of the two closest pictures, summed over the pixels

    def distances(self, frames: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n classes"]:
        """Squared distance, summed over the pixels, to the picture of each class."""
        return np.stack([_squared(frames, t) for t in self.templates], axis=-1)

    def decode(self, frames: UInt8[np.ndarray, "*batch H W 3"]) -> Int[np.ndarray, "*batch 1 1"]:
        """Class of each frame, as a grid of one symbol."""
        flat = frames.reshape(-1, *frames.shape[-3:])
        return self.distances(flat).argmin(-1).astype(np.int32).reshape(*frames.shape[:-3], 1, 1)


def _squared(frames: np.ndarray, template: np.ndarray) -> Float[np.ndarray, " n"]:
    return np.square(frames.astype(np.float32) - template.astype(np.float32)).sum((-3, -2, -1), dtype=np.float64)


class FrozenLake(gymnasium.Wrapper):
    """One level as pixels. ``env.unwrapped`` is gymnasium's own environment."""

    shared: Sequence[str] = ("_pictures",)  # parts that copies may share (`evaluation.simulator.clone`)

    def __init__(self, lake: FrozenLakeEnv, level: str, *, height: int, width: int, words: int, max_steps: int):
        super().__init__(lake)
        self._lake, self._pictures = lake, pictures(level, height, width)
        self._limit, self._taken = max_steps, 0
        self.level = level
        self.observation_space = gymnasium.spaces.Dict(
            image=gymnasium.spaces.Box(0, 255, (height, width, 3), np.uint8),
            task=gymnasium.spaces.Box(0, VOCABULARY - 1, (words,), np.int32),
        )
        self._task = np.zeros(words, np.int32)
        self._task[0] = 1

    @property
    def state(self) -> int:
        """Gymnasium's number of the present state."""
        return int(self._lake.s)

    def _observe(self) -> dict[str, np.ndarray]:
        return {"image": self._pictures[self.state].copy(), "task": self._task.copy()}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        self._lake.reset(seed=seed, options=options)
        self._taken = 0
        return self._observe(), {"mission": "reach the goal"}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        _, reward, terminated, _, _ = self._lake.step(int(action))
        self._taken += 1
        truncated = not terminated and self._taken >= self._limit
        info: dict[str, Any] = {"mission": "reach the goal"}
        if terminated or truncated:
            info["success"] = bool(terminated and reward > 0)
        return self._observe(), float(reward), bool(terminated), truncated, info

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        return self._pictures[self.state].copy()

    def random_action(self, rng: np.random.Generator) -> int:
        """One of the four, uniformly."""
        return min(int(rng.random() * len(ACTIONS)), len(ACTIONS) - 1)


def make(env_cfg: EnvConfig, level: str, *, height: int, width: int, words: int) -> FrozenLake:
    """Builds a level with time limit ``env.max_steps``; see `babyai.make` for the arguments."""
    return FrozenLake(_lake(level), level, height=height, width=width, words=words, max_steps=env_cfg.max_steps)
