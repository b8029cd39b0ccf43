"""What the adapters of foreign simulators share: observations, time limits, and seeds that decide an episode alone."""

import abc
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import UInt8

from dreamer4_jax.config import ActionComponent, UserError
from dreamer4_jax.envs.spaces import action_space


class PixelEnv(gymnasium.Env, abc.ABC):
    """A simulator as pixels and a task.

    Observation: ``image`` uint8 [height, width, 3] and ``task`` int32 [words], whose first word is the task's. An
    episode depends on its seed alone: not on the process, nor on what was played before. Without a seed, `reset` draws
    the next one from the last that was given.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"
    shared: Sequence[str] = ()  # parts that copies may share (`evaluation.simulator.clone`)

    def __init__(
        self,
        level: str,
        actions: Sequence[ActionComponent],
        *,
        height: int,
        width: int,
        words: int,
        vocabulary: int,
        max_steps: int,
    ):
        self.level, self._limit, self._words = level, max_steps, words
        self.action_space = action_space(actions)
        self.observation_space = gymnasium.spaces.Dict(
            image=gymnasium.spaces.Box(0, 255, (height, width, 3), np.uint8),
            task=gymnasium.spaces.Box(0, vocabulary - 1, (words,), np.int32),
        )
        self._image = np.zeros((height, width, 3), np.uint8)
        self._taken = 0

    @abc.abstractmethod
    def _begin(self, seed: int) -> UInt8[np.ndarray, "H W 3"]:
        """Starts the episode of a seed in [0, 2^31); returns its first image."""

    @abc.abstractmethod
    def _advance(self, action: Any) -> tuple[UInt8[np.ndarray, "H W 3"], float, bool]:
        """Acts; returns the next image, the reward, and whether the game has ended."""

    @abc.abstractmethod
    def random_action(self, rng: np.random.Generator) -> Any:
        """An aimless action."""

    def _succeeded(self, ended: bool) -> bool | None:
        """At the end of an episode: whether it was a success; None where that means nothing. `ended`: by the game, not
        by the time limit."""
        return None

    def _mission(self) -> tuple[int, str]:
        """(word id, text) of the present task."""
        return 1, "play"

    def _observe(self, mission: tuple[int, str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        task = np.zeros(self._words, np.int32)
        task[0] = mission[0]
        return {"image": self._image.copy(), "task": task}, {"mission": mission[1]}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        self._image = self._begin(int(self.np_random.integers(2**31)) if seed is None else seed)
        self._taken = 0
        return self._observe(self._mission())

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        mission = self._mission()  # that the action is for: its reward comes with the frame that still shows it
        self._image, reward, terminated = self._advance(action)
        self._taken += 1
        truncated = not terminated and self._taken >= self._limit
        observation, info = self._observe(mission)
        if (terminated or truncated) and (success := self._succeeded(terminated)) is not None:
            info["success"] = bool(success)
        return observation, float(reward), bool(terminated), truncated, info

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        return self._image.copy()


def check_level(level: str, known: Sequence[str]) -> None:
    """Raises `UserError` unless the level is known."""
    if level not in known:
        shown = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
        raise UserError(f"env.levels: unknown level {level!r}; choose of {shown}")
