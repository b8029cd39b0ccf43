"""Records what any policy does in any gymnasium environment: one .npz file an episode, for `dreamer4 data convert`."""

import os
import uuid
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from dreamer4_jax.data.schema import DataError

# A grid of symbols is uint8 as a picture is (MiniGrid's view: 7 x 7 x 3). Its values are promised to end below this, or
# it has fewer cells a side than a picture has pixels.
LEAST_WHITE, LEAST_SIDE = 128, 16


def image_of(env: gymnasium.Env, observation: Any) -> np.ndarray:
    """The picture of a step: the observation itself, an image in it, or what the environment renders."""
    space: Any = env.observation_space
    if isinstance(observation, dict):
        key = next((k for k in ("image", "pixels", "rgb", "pov") if k in observation), None)
        observation = None if key is None else observation[key]
        space = None if key is None else space[key]
    shaped = isinstance(observation, np.ndarray) and observation.dtype == np.uint8 and observation.ndim in (2, 3)
    if shaped and not _symbolic(space, observation.shape):
        return observation
    try:
        picture = env.render()
    except NotImplementedError:  # as environments without pictures answer
        picture = None
    if isinstance(picture, np.ndarray):
        return picture
    if shaped:
        raise DataError(
            f"environment {env}: its observation {[*observation.shape]} is a grid of symbols and no picture (a side "
            f"under {LEAST_SIDE} pixels, or values that end below {LEAST_WHITE}): make it with "
            'render_mode="rgb_array", or wrap it so that it observes pixels, as minigrid\'s RGBImgObsWrapper does'
        )
    raise DataError(
        f'environment {env}: neither its observation nor render() is a picture: make it with render_mode="rgb_array"'
    )


def _symbolic(space: Any, shape: tuple[int, ...]) -> bool:
    """Whether an array of bytes is no picture, by its space and its shape."""
    low = isinstance(space, gymnasium.spaces.Box) and space.high.max() < LEAST_WHITE
    return low or sorted(shape)[-2] < LEAST_SIDE  # the two longest are the sides: channels may come first or last


def flatten(space: gymnasium.Space, action: Any, name: str = "action") -> dict[str, np.ndarray]:
    """An action as one value for each component: parts of dictionaries, tuples and lists of classes by name."""
    s = gymnasium.spaces
    match space:
        case s.Dict():
            return {k: v for n, sub in space.spaces.items() for k, v in flatten(sub, action[n], n).items()}
        case s.Tuple():
            pairs = enumerate(zip(space.spaces, action, strict=True))
            return {k: v for i, (sub, a) in pairs for k, v in flatten(sub, a, f"{name}_{i}").items()}
        case s.Discrete():
            return {name: np.asarray(int(action) - int(space.start))}
        case s.MultiDiscrete():
            values = np.asarray(action).reshape(-1) - np.asarray(space.start).reshape(-1)
            return {f"{name}_{i}": np.asarray(int(v)) for i, v in enumerate(values)}
        case s.MultiBinary():
            return {name: np.asarray(action).reshape(-1).astype(bool)}
        case s.Box():
            return {name: np.asarray(action, np.float32).reshape(-1)}
    raise DataError(f"action space {space}: only Discrete, MultiDiscrete, MultiBinary, Box and Dict or Tuple of them")


class RecordEpisodes(gymnasium.Wrapper):
    """Keeps every episode, complete or cut off by `reset` or `close`, as a file in `directory`.

    Play as always through the wrapper. Frame t is the picture after t steps; row t of ``actions/...`` and ``reward`` is
    the action that led to it and the reward that came with it.
    """

    def __init__(self, env: gymnasium.Env, directory: str | Path, *, task: str = ""):
        super().__init__(env)
        self.directory, self.task = Path(directory), task
        self.directory.mkdir(parents=True, exist_ok=True)
        self._frames: list[np.ndarray] = []
        self._actions: list[dict[str, np.ndarray]] = []
        self._rewards: list[float] = []
        self._terminal = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.save()
        observation, info = self.env.reset(seed=seed, options=options)
        self._frames = [np.array(image_of(self.env, observation))]
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._frames.append(np.array(image_of(self.env, observation)))
        self._actions.append(flatten(self.env.action_space, action))
        self._rewards.append(float(reward))
        self._terminal = bool(terminated)
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        self.save()
        super().close()

    def save(self) -> Path | None:
        """Writes the episode so far and forgets it; None if there is none."""
        if not self._actions:
            return None
        first = {name: np.zeros_like(value) for name, value in self._actions[0].items()}
        columns = {name: np.stack([a[name] for a in [first, *self._actions]]) for name in first}
        present = np.arange(len(self._frames)) > 0
        draft = self.directory / f".episode.{uuid.uuid4().hex}.npz"
        arrays: dict[str, Any] = {
            "frames": np.stack(self._frames),
            "reward": np.asarray([0.0, *self._rewards], np.float32),
            "is_terminal": np.asarray(self._terminal),
            "task": np.asarray(self.task),
        }
        arrays |= {f"actions/{name}": value for name, value in columns.items()}
        arrays |= {f"present/{name}": present for name in columns}
        np.savez_compressed(draft, **arrays)
        path = self._claim()
        os.replace(draft, path)
        self._frames, self._actions, self._rewards, self._terminal = [], [], [], False
        return path

    def _claim(self) -> Path:
        """The name behind the last episode's, held by an empty file: other processes record into the same folder."""
        while True:
            numbers = [p.stem.removeprefix("episode-") for p in self.directory.glob("episode-*.npz")]
            after = max((int(n) for n in numbers if n.isdecimal()), default=-1) + 1
            path = self.directory / f"episode-{after:06d}.npz"
            try:
                path.open("x").close()
            except FileExistsError:  # another process was faster
                continue
            return path
