"""Where a dream can begin: frames of held-out episodes, and fresh episodes of the real environment.

A recorded episode says from which level and seed it came. Where the environment, begun from that seed and given the
recorded actions, shows the recorded frames bit for bit, it goes on beside the dream like a fresh one.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dreamer4_jax.config import Config
from dreamer4_jax.data.schema import action_array
from dreamer4_jax.data.store import Dataset
from dreamer4_jax.play.controls import Action
from dreamer4_jax.play.protocol import ProtocolError

MAX_EPISODES = 400  # held-out episodes that are offered
SPLIT = "holdout"


@dataclass(frozen=True)
class Start:
    """Context frames of a dream in the alignment of the package: index t holds the action that led to frame t."""

    frames: UInt8[np.ndarray, "T H W 3"]
    actions: dict[str, np.ndarray]  # name -> [T, ...]
    present: dict[str, np.ndarray]  # name -> bool [T]
    task: np.ndarray  # int32 [words]
    title: str
    mission: str
    seed: int  # of the dream's noise


@dataclass(frozen=True)
class Episode:
    """A held-out episode: where its frames are, and what is known of how it came about."""

    at: int
    length: int
    meta: dict[str, Any]


def encode_image(frame: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """WebP; small frames without loss, since they are shown enlarged."""
    out = io.BytesIO()
    if frame.shape[0] * frame.shape[1] <= 128 * 128:
        Image.fromarray(frame).save(out, "WEBP", lossless=True, quality=0, method=0)
    else:
        Image.fromarray(frame).save(out, "WEBP", quality=90, method=2)
    return out.getvalue()


class LiveEnv:
    """A real environment that takes the dream's actions, and can go back by playing them again from its seed."""

    def __init__(self, env: gymnasium.Env, seed: int):
        self._env, self._seed = env, seed
        self._restart()

    def _restart(self) -> None:
        observation, info = self._env.reset(seed=self._seed)
        self.frame: np.ndarray = observation["image"]
        self.task: np.ndarray = observation["task"]
        self.mission = str(info.get("mission", ""))
        self.actions: list[Any] = []
        self.reward, self.ended = 0.0, ""

    def step(self, action: Action) -> None:
        """One step, unless the episode is over: then the last frame stays."""
        if self.ended:
            return
        value = next(iter(action.values())) if len(action) == 1 else action
        self.actions.append(value)
        observation, reward, terminated, truncated, info = self._env.step(value)
        self.frame, self.reward = observation["image"], float(reward)
        if terminated or truncated:
            won = info.get("success", terminated and self.reward > 0)
            self.ended = "solved" if won else "failed" if terminated else "out of time"

    def rewind(self, steps: int) -> None:
        """The state after the first `steps` actions."""
        actions = self.actions[:steps]
        self._restart()
        for action in actions:
            self.step({"": action})

    @property
    def age(self) -> int:
        return len(self.actions)

    def close(self) -> None:
        self._env.close()


class Catalogue:
    """Starts by number. `dataset` is None where the run's recording is not at hand.

    Args:
      make_env: level -> environment with observations ``{"image", "task"}``; None where it cannot be played.
      context: frames of context that the model sees at most.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset | None,
        make_env: Callable[[str], gymnasium.Env] | None,
        *,
        context: int,
    ):
        self._config, self._data, self._make, self.context = config, dataset, make_env, context
        self.levels = config.env.levels if make_env else ()
        self.episodes = _episodes(dataset) if dataset else []

    def to_json(self) -> dict[str, Any]:
        """What the page lists."""
        return {
            "levels": list(self.levels),
            "episodes": [
                {"frames": e.length, **{k: e.meta[k] for k in ("level", "mission", "policy") if k in e.meta}}
                for e in self.episodes
            ],
        }

    def fresh(self, level: int, seed: int) -> tuple[Start, LiveEnv]:
        """The first frame of a new episode, and its environment."""
        if self._make is None or level >= len(self.levels):
            raise ProtocolError(f"level {level}: there are {len(self.levels)}")
        name = self.levels[level]
        live = LiveEnv(self._make(name), seed)
        actions = {p.name: action_array(p, 1) for p in self._config.actions}
        present = {p.name: np.zeros(1, bool) for p in self._config.actions}
        start = Start(live.frame[None], actions, present, live.task, f"{name}, seed {seed}", live.mission, seed)
        return start, live

    def recorded(self, number: int, frame: int) -> tuple[Start, LiveEnv | None]:
        """The frames of an episode up to `frame`, and the environment in that state where it can be restored."""
        episode = self._episode(number, frame)
        assert self._data is not None
        first = max(0, frame + 1 - self.context)
        whole = self._data.window(SPLIT, episode.at, frame + 1)
        part = {k: np.array(v[first:]) for k, v in whole.items()}
        names = [p.name for p in self._config.actions]
        start = Start(
            part["frames"],
            {n: part[f"actions/{n}"] for n in names},
            {n: part[f"present/{n}"] for n in names},
            part["task"][-1],
            f"recorded episode {number}, frame {frame}",
            str(episode.meta.get("mission", "")),
            number * 1009 + frame,
        )
        return start, self._restore(episode, whole)

    def thumbnail(self, number: int, frame: int) -> bytes:
        """A frame of an episode as an image."""
        episode = self._episode(number, frame)
        assert self._data is not None
        return encode_image(self._data.window(SPLIT, episode.at + frame, 1)["frames"][0])

    def _episode(self, number: int, frame: int) -> Episode:
        if number >= len(self.episodes):
            raise ProtocolError(f"episode {number}: there are {len(self.episodes)}")
        episode = self.episodes[number]
        if frame >= episode.length:
            raise ProtocolError(f"frame {frame}: episode {number} has {episode.length}")
        return episode

    def _restore(self, episode: Episode, whole: dict[str, np.ndarray]) -> LiveEnv | None:
        """The environment after the recorded actions, if it shows every recorded frame again."""
        level, seed = episode.meta.get("level"), episode.meta.get("seed")
        if self._make is None or level not in self.levels or not isinstance(seed, int):
            return None
        live = LiveEnv(self._make(level), seed)
        names = [p.name for p in self._config.actions]
        for t, frame in enumerate(whole["frames"]):
            if t:
                live.step({n: whole[f"actions/{n}"][t] for n in names})
            if not np.array_equal(live.frame, frame):
                live.close()
                return None
        return live


def _episodes(data: Dataset) -> list[Episode]:
    """The first episodes of the held-out split that are there from their beginning."""
    found: list[Episode] = []
    at, chunk = 0, data.spec.chunk
    for stream in data.streams(SPLIT):
        first = np.asarray(data.window(SPLIT, at, stream)["is_first"])
        starts = np.flatnonzero(first)
        ends = [*starts[1:], stream]
        metas = {}
        for c in range(stream // chunk):
            for meta in data.segments(SPLIT, at // chunk + c):
                if meta.get("offset") == 0:
                    metas[c * chunk + meta["start"]] = meta
        found += [Episode(at + int(s), int(e - s), metas.get(int(s), {})) for s, e in zip(starts, ends, strict=True)]
        at += stream
        if len(found) >= MAX_EPISODES:
            break
    return found[:MAX_EPISODES]
