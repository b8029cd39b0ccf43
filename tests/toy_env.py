"""An environment for alignment tests: its frame shows the action that led to it, its reward depends on that action.

`frame_action` and `frame_step` read a frame back, so whatever pairs frames, actions and rewards can be checked to the
index. Episodes last `steps` steps; they end by truncation, or earlier in a terminal state after action `END`.
"""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from dreamer4_jax.config import ActionComponent, Config, preset
from dreamer4_jax.data.schema import Episode
from dreamer4_jax.data.store import DatasetSpec
from dreamer4_jax.data.writer import write_dataset
from dreamer4_jax.envs.collect import record

ACTIONS = 5
END = 4
COMPONENT = ActionComponent("move", "categorical", ACTIONS)


def reward_of(action: int) -> float:
    """The reward received with the frame that `action` led to: depends on exactly this action."""
    return float(action == 2)


class ShowAction(gymnasium.Env):
    """Red shows 40 * (last action + 1), 0 at the start; green the step number, blue the episode's number."""

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, size: int = 16, words: int = 3, steps: int = 9):
        self.size, self.words, self.steps = size, words, steps
        self.action_space = gymnasium.spaces.Discrete(ACTIONS)
        self.observation_space = gymnasium.spaces.Dict(
            image=gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8),
            task=gymnasium.spaces.Box(0, 255, (words,), np.int32),
        )
        self._episode = -1
        self._step, self._last = 0, -1

    def _observe(self) -> dict[str, np.ndarray]:
        image = np.empty((self.size, self.size, 3), np.uint8)
        image[:] = (40 * (self._last + 1), self._step, self._episode % 256)
        return {"image": image, "task": np.arange(1, self.words + 1, dtype=np.int32)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self._episode = self._episode + 1 if seed is None else seed
        self._step, self._last = 0, -1
        return self._observe(), {"mission": "show your action"}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        self._last, self._step = int(action), self._step + 1
        terminated = self._last == END
        truncated = not terminated and self._step >= self.steps
        info: dict[str, Any] = {"mission": "show your action"}
        if terminated or truncated:
            info["success"] = terminated
        return self._observe(), reward_of(self._last), terminated, truncated, info


def frame_action(frames: np.ndarray) -> np.ndarray:
    """The action each frame [..., H, W, 3] shows; -1: none."""
    return frames[..., 0, 0, 0].astype(np.int32) // 40 - 1


def frame_step(frames: np.ndarray) -> np.ndarray:
    """The step number each frame shows."""
    return frames[..., 0, 0, 1].astype(np.int32)


def toy_config(**overrides: Any) -> Config:
    """The tiny preset over this environment's frames and actions."""
    return preset(
        "tiny",
        **{
            "actions": [{"name": "move", "kind": "categorical", "size": ACTIONS}],
            "tokenizer.height": 16,
            "tokenizer.width": 16,
            "tokenizer.latents": 4,
            "agent.task_words": 3,
            **overrides,
        },
    )


def toy_episodes(count: int, *, seed: int = 0, size: int = 16, words: int = 3, steps: int = 9) -> list[Episode]:
    """Episodes of random actions; episode i of seed s shows the number 100 * s + i in blue."""
    env, rng = ShowAction(size, words, steps), np.random.default_rng(seed)
    meta = {"level": "toy", "policy": "random", "mission": "show your action"}
    play = lambda n: record(
        env, lambda _: int(rng.integers(ACTIONS)), env.reset(seed=n), (COMPONENT,), {**meta, "seed": n}
    )
    return [play(100 * seed + i) for i in range(count)]


def write_toy_dataset(directory: str | Path, *, chunk: int = 16, shards: int = 2, episodes: int = 30) -> dict[str, Any]:
    """A dataset of `shards` training shards and one held-out shard; returns its manifest."""
    spec = DatasetSpec("frames", chunk, (16, 16), 3, (COMPONENT,))
    streams = [toy_episodes(episodes, seed=s) for s in range(shards + 1)]
    return write_dataset(directory, spec, {"train": [*streams[:-1]], "holdout": [streams[-1]]})
