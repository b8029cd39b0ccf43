"""Closed-loop evaluation in the real environment, and the policies every agent is set beside.

All policies play one fixed list of episodes: episode i has level ``levels[i % len(levels)]`` and a seed derived from
(seed, i, level). Each episode is finished, so long episodes count as much as short ones, however many environments
run side by side.
"""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import gymnasium
import numpy as np
from jaxtyping import Bool, Int, UInt8

from dreamer4_jax.config import ActionComponent, UserError
from dreamer4_jax.envs.spaces import from_env, nothing, to_env, uniform
from dreamer4_jax.evaluation.metrics import Interval, bootstrap_ci, bootstrap_difference_ci


class Policy(Protocol):
    """Acts in E streams at once, from pixels and task words alone."""

    name: str

    def reset(self, starting: Bool[np.ndarray, " E"]) -> None:
        """Streams that begin a new episode now: forget what was remembered of them."""

    def act(self, images: UInt8[np.ndarray, "E H W 3"], tasks: Int[np.ndarray, "E words"]) -> dict[str, np.ndarray]:
        """The next action of every stream: component name -> [E, ...]."""


@runtime_checkable
class SeesEnvironment(Protocol):
    """A policy with privileged access: told the environment of each stream, and a seed of the episode's own."""

    def begin(self, stream: int, env: gymnasium.Env, seed: int) -> None:
        """The episode of `env` has been reset and begins in `stream`."""

    def end(self, stream: int) -> None:
        """The episode of `stream` is over."""


@dataclass(frozen=True)
class EvalResult:
    """What one policy did, one entry per episode, in the order of the episode list.

    `success` is 1 or 0, and NaN where the environment does not say what success is.
    """

    policy: str
    levels: tuple[str, ...]
    returns: np.ndarray
    success: np.ndarray
    lengths: np.ndarray
    seeds: np.ndarray
    seconds: float

    @property
    def episodes(self) -> int:
        return len(self.levels)

    def summary(self, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> dict[str, Any]:
        """Success, return and length with bootstrap intervals, overall (stratified by level) and per level.

        Success is None unless it is known of every episode.
        """

        def measure(rows: np.ndarray, strata: np.ndarray | None) -> dict[str, Any]:
            out: dict[str, Any] = {"episodes": int(rows.sum())}
            for name, values in (("success", self.success), ("return", self.returns), ("length", self.lengths)):
                known = np.isfinite(values[rows]).all()
                found = bootstrap_ci(values[rows], level, resamples, seed, strata=strata) if known else None
                out[name] = found and found._asdict()
            return out

        names = np.asarray(self.levels)
        everything = np.ones(len(names), bool)
        return {
            "policy": self.policy,
            **measure(everything, names),
            "levels": {n: measure(names == n, None) for n in dict.fromkeys(self.levels)},
            "seconds": self.seconds,
        }

    def to_json(self) -> dict[str, Any]:
        """Every episode as plain lists; `from_json` reads it back."""
        return {
            "policy": self.policy,
            "levels": list(self.levels),
            "returns": [float(x) for x in self.returns],
            "success": [None if np.isnan(x) else bool(x) for x in self.success],
            "lengths": [int(x) for x in self.lengths],
            "seeds": [int(x) for x in self.seeds],
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "EvalResult":
        return cls(
            policy=data["policy"],
            levels=tuple(data["levels"]),
            returns=np.asarray(data["returns"], np.float64),
            success=np.asarray(data["success"], np.float64),  # NumPy reads None as NaN
            lengths=np.asarray(data["lengths"], np.int64),
            seeds=np.asarray(data["seeds"], np.int64),
            seconds=float(data["seconds"]),
        )


def compare(first: EvalResult, second: EvalResult, *, level: float = 0.95, seed: int = 0) -> dict[str, Any]:
    """Success (None where it is not known) and return of `first` minus those of `second`, paired by episode and
    stratified by level."""
    if first.levels != second.levels or (first.seeds != second.seeds).any():
        raise UserError(
            f"policies {first.policy!r} and {second.policy!r} did not play the same episodes: "
            "evaluate both with the same levels, episodes and seed"
        )
    strata = np.asarray(first.levels)
    known = np.isfinite([first.success, second.success]).all()

    def difference(a: np.ndarray, b: np.ndarray) -> Interval:
        return bootstrap_difference_ci(a, b, level, seed=seed, strata=strata)

    return {
        "first": first.policy,
        "second": second.policy,
        "success": difference(first.success, second.success)._asdict() if known else None,
        "return": difference(first.returns, second.returns)._asdict(),
    }


def episode_seed(seed: int, index: int, level: str, use: int = 0) -> int:
    """The seed of episode `index`; `use` 0 is the environment's, 1 that of a scripted policy.

    Below 2^30: episodes are recorded with seeds above, so no evaluated episode begins like a recorded one.
    """
    sequence = np.random.SeedSequence([seed, index, zlib.crc32(level.encode()), use])
    return int(sequence.generate_state(1)[0] >> 2)


def evaluate_policy(
    policy: Policy,
    make_env: Callable[[str], gymnasium.Env],
    levels: Sequence[str],
    *,
    episodes: int,
    envs: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Plays `episodes` fixed episodes, up to `envs` of them in lockstep, in this process.

    Args:
        policy: is called once per lockstep with all E = min(envs, episodes) streams. A stream without an episode left
            keeps its last observation and its actions are ignored, so the shapes never change.
        make_env: level -> environment as `envs.kinds.make` describes.
        levels: episodes take them in turn.
        progress: called with (episodes finished, episodes) after each finished episode.
    """
    if not levels:
        raise UserError("levels = (): name at least one level to evaluate on")
    if episodes < 1 or envs < 1:
        raise UserError(f"evaluate.episodes = {episodes}, evaluate.envs = {envs}: both must be at least 1")
    began = time.perf_counter()
    streams = min(envs, episodes)
    plan = [levels[i % len(levels)] for i in range(episodes)]
    seeds = np.asarray([episode_seed(seed, i, level) for i, level in enumerate(plan)], np.int64)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    success = np.full(episodes, np.nan)
    spare: dict[str, list[gymnasium.Env]] = {level: [] for level in plan}
    made: list[gymnasium.Env] = []
    running: list[tuple[int, gymnasium.Env] | None] = [None] * streams
    images: np.ndarray | None = None
    tasks: np.ndarray | None = None
    upcoming, finished = 0, 0

    def observe(stream: int, observation: dict[str, np.ndarray]) -> None:
        nonlocal images, tasks
        if images is None or tasks is None:
            images = np.zeros((streams, *observation["image"].shape), np.uint8)
            tasks = np.zeros((streams, *observation["task"].shape), np.int32)
        images[stream], tasks[stream] = observation["image"], observation["task"]

    def start(stream: int) -> bool:
        """Begins the next episode of the list in `stream`; False when none is left."""
        nonlocal upcoming
        running[stream] = None
        if upcoming == episodes:
            return False
        index, level = upcoming, plan[upcoming]
        upcoming += 1
        if spare[level]:
            env = spare[level].pop()
        else:
            env = make_env(level)
            made.append(env)
        observation, _ = env.reset(seed=int(seeds[index]))
        observe(stream, observation)
        running[stream] = (index, env)
        if isinstance(policy, SeesEnvironment):
            policy.begin(stream, env, episode_seed(seed, index, level, use=1))
        return True

    try:
        starting = np.asarray([start(i) for i in range(streams)])
        while finished < episodes:
            if starting.any():
                policy.reset(starting)
            assert images is not None and tasks is not None  # set by the first start
            actions = policy.act(images.copy(), tasks.copy())
            starting = np.zeros(streams, bool)
            for stream, active in enumerate(running):
                if active is None:
                    continue
                index, env = active
                observation, reward, terminated, truncated, info = env.step(to_env(actions, stream))
                returns[index] += float(reward)
                lengths[index] += 1
                if not (terminated or truncated):
                    observe(stream, observation)
                    continue
                if "success" in info:
                    success[index] = bool(info["success"])
                if isinstance(policy, SeesEnvironment):
                    policy.end(stream)
                spare[plan[index]].append(env)
                starting[stream] = start(stream)
                finished += 1
                if progress is not None:
                    progress(finished, episodes)
    finally:
        for env in made:
            env.close()
    return EvalResult(policy.name, tuple(plan), returns, success, lengths, seeds, time.perf_counter() - began)


# ---------------------------------------------------------------------------------------------------------------------
# Policies without a model


class RandomPolicy:
    """Uniform actions; keys are pressed with probability one half, continuous values are uniform in [-1, 1]."""

    def __init__(self, actions: Sequence[ActionComponent], seed: int = 0, name: str = "random"):
        self.name = name
        self._actions = tuple(actions)
        self._rng = np.random.default_rng(seed)

    def reset(self, starting: np.ndarray) -> None:
        """Remembers nothing."""

    def act(self, images: np.ndarray, tasks: np.ndarray) -> dict[str, np.ndarray]:
        return uniform(self._actions, self._rng, len(images))


class ScriptedPolicy:
    """The policy that recorded the data, or any other with privileged access to the environment.

    `factory(env, seed)` is called after each reset and returns a function without arguments that gives the episode's
    next action, as the environment takes it; the seed is the episode's own, so that mixtures (expert, noisy, aimless)
    are drawn reproducibly.
    """

    def __init__(
        self,
        factory: Callable[[gymnasium.Env, int], Callable[[], Any]],
        actions: Sequence[ActionComponent],
        name: str = "data policy",
    ):
        self.name = name
        self._factory = factory
        self._actions = tuple(actions)
        self._streams: dict[int, Callable[[], Any]] = {}

    def begin(self, stream: int, env: gymnasium.Env, seed: int) -> None:
        self._streams[stream] = self._factory(env, seed)

    def end(self, stream: int) -> None:
        del self._streams[stream]

    def reset(self, starting: np.ndarray) -> None:
        """`begin` has already replaced the streams that start."""

    def act(self, images: np.ndarray, tasks: np.ndarray) -> dict[str, np.ndarray]:
        out = nothing(self._actions, len(images))
        for stream, following in self._streams.items():
            for name, value in from_env(following(), self._actions).items():
                out[name][stream] = value
        return out
