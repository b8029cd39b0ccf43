"""Crafter (the `crafter` package): an open world that is seen from above, with 22 achievements up to the diamond.

Levels:

- ``Crafter``: its own rewards, 1 for each achievement's first time and a tenth for each point of health; one task.
- ``CrafterDiamond``: the ten milestones on the way to the diamond, one after the other as tasks: a frame's task is the
  first that is still missing, each is rewarded with 1, and the episode ends with the last.

In both an episode is a success if it has a diamond. Death ends it, the time limit cuts it.
"""

from typing import Any

import crafter
import numpy as np
from jaxtyping import UInt8

from dreamer4_jax.config import ActionComponent, EnvConfig, UserError
from dreamer4_jax.envs.babyai import draw
from dreamer4_jax.envs.pixels import PixelEnv, check_level

LEVELS = ("Crafter", "CrafterDiamond")
ACTIONS = tuple(crafter.constants.actions)
# Tasks are word ids 2, 3, ... in this order, which is part of the data format.
MILESTONES = (
    "collect_wood", "place_table", "make_wood_pickaxe", "collect_stone", "make_stone_pickaxe",
    "collect_coal", "collect_iron", "place_furnace", "make_iron_pickaxe", "collect_diamond",
)  # fmt: skip
VOCABULARY = len(MILESTONES) + 2
# How random actions are drawn: noop, four moves, do, sleep, and ten others that rarely do anything.
RANDOM = (0.02, *(0.15,) * 4, 0.25, 0.01, *(0.012,) * 10)
LEAST = 54  # pixels of a side: 9 x 9 cells of 6 pixels; digits cannot be read below


def actions(env_cfg: EnvConfig) -> tuple[ActionComponent, ...]:
    """Crafter's 17 actions."""
    return (ActionComponent("move", "categorical", len(ACTIONS)),)


class _Game(crafter.Env):
    """Crafter that plays a seed's episode alike in every process."""

    def _balance_chunk(self, chunk: Any, objs: Any) -> None:
        # Creatures of a chunk are kept as a set, ordered by their addresses, and one is drawn by its number.
        super()._balance_chunk(chunk, sorted(objs, key=lambda creature: tuple(creature.pos)))

    def begin(self, seed: int) -> UInt8[np.ndarray, "H W 3"]:
        self._seed, self._episode = seed, 0
        return self.reset()


class CrafterEnv(PixelEnv):
    """One level. `game` is Crafter's own environment, for those who may look into it.

    ``info["events"]`` names the achievements that an action was the first to reach.
    """

    idle = 0

    def __init__(self, env_cfg: EnvConfig, level: str, **sizes: int):
        super().__init__(level, actions(env_cfg), max_steps=env_cfg.max_steps, vocabulary=VOCABULARY, **sizes)
        self.game = _Game(size=(sizes["width"], sizes["height"]), length=0)
        self._achieved: tuple[str, ...] = ()

    def _begin(self, seed: int) -> UInt8[np.ndarray, "H W 3"]:
        self._achieved = ()
        return self.game.begin(seed)

    def _mission(self) -> tuple[int, str]:
        if self.level == "Crafter":
            return super()._mission()
        have = self.game._unlocked
        missing = next((i for i, name in enumerate(MILESTONES) if name not in have), len(MILESTONES) - 1)
        return missing + 2, MILESTONES[missing].replace("_", " ")

    def _advance(self, action: Any) -> tuple[UInt8[np.ndarray, "H W 3"], float, bool]:
        before = set(self.game._unlocked)
        image, reward, dead, _ = self.game.step(int(action))
        self._achieved = tuple(sorted(self.game._unlocked - before))
        if self.level == "CrafterDiamond":
            reward = float(sum(name in MILESTONES for name in self._achieved))
            return image, reward, bool(dead or "collect_diamond" in self._achieved)
        return image, float(reward), bool(dead)

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, {**info, "events": self._achieved}

    def _succeeded(self, ended: bool) -> bool:
        return "collect_diamond" in self.game._unlocked

    def reseed(self, seed: int) -> None:
        """The world draws from a generator of its own; reseeded in place, for every creature holds it too."""
        self.game._world.random.seed(seed)

    def random_action(self, rng: np.random.Generator) -> int:
        """One of the 17, with the shares of `RANDOM`."""
        return draw(RANDOM, rng)

    def expert(self, rng: np.random.Generator) -> Any:
        """The privileged planner."""
        from dreamer4_jax.envs.crafter_planner import Planner

        return Planner(self, rng)


def make(env_cfg: EnvConfig, level: str, *, height: int, width: int, words: int) -> CrafterEnv:
    """Builds a level with time limit ``env.max_steps``; see `babyai.make` for the arguments."""
    check_level(level, LEVELS)
    if min(height, width) < LEAST:
        raise UserError(
            f"tokenizer.height x tokenizer.width = {height} x {width}: Crafter shows 9 x 9 cells and digits, take at "
            f"least {LEAST} x {LEAST}"
        )
    return CrafterEnv(env_cfg, level, height=height, width=width, words=words)
