"""Records episodes by scripted policies: BabyAI's expert, the expert with bursts of random actions, random play.

The data is meant to be mediocre: the noisy expert errs at any moment, also in front of the goal, so only a part of its
episodes succeeds within ``env.max_steps``. Every episode is kept, successes and failures. Each shard is a function of
(seed, shard index) and the config alone, so the data does not depend on the number of workers.

Nothing here imports JAX: worker processes must start fast and leave the accelerator alone.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Bool, Int, UInt8
from minigrid.utils.baby_ai_bot import BabyAIBot

from dreamer4_jax.config import ActionComponent, Config, DataConfig, UserError
from dreamer4_jax.data import writer
from dreamer4_jax.data.jobs import make_shards
from dreamer4_jax.data.schema import Episode, action_array, chunks
from dreamer4_jax.data.store import SPLITS, DatasetSpec
from dreamer4_jax.envs import kinds

POLICIES = ("bot", "noisy_bot", "aimless")
# Levels whose missions BabyAI's bot cannot solve, according to its own documentation and our trials.
UNSOLVABLE = (
    "BabyAI-KeyInBox-v0",
    "BabyAI-PutNextS5N2Carrying-v0",
    "BabyAI-PutNextS6N3Carrying-v0",
    "BabyAI-PutNextS7N4Carrying-v0",
)
# Episodes are recorded with environment seeds from here up to 2^31; evaluate with seeds below, and they never meet.
FIRST_SEED = 2**30


class BotFailure(Exception):
    """BabyAI's bot raised an exception: its plan met a state it was not written for."""


class Scripted:
    """One scripted policy in one episode, with privileged access to the simulator."""

    def __init__(self, policy: str, data: DataConfig, env: gymnasium.Env, rng: np.random.Generator):
        self._rng, self._data, self._policy = rng, data, policy
        self._shares = env.get_wrapper_attr("random_shares")
        self._bot = None if policy == "aimless" else BabyAIBot(env)
        self._taken: int | None = None
        self._burst = 0

    def act(self) -> int:
        action = self._choose()
        self._taken = action
        return action

    def _choose(self) -> int:
        if self._bot is None:
            return self._random()
        try:
            # The bot follows the episode even through a burst, told of each action that was really taken.
            best = int(self._bot.replan(self._taken))
        except Exception as error:
            raise BotFailure(f"{type(error).__name__}: {error}") from error
        if self._policy == "noisy_bot":
            if self._burst == 0 and self._rng.random() < self._data.burst:
                self._burst = self._data.burst_length
            if self._burst > 0:
                self._burst -= 1
                return self._random()
        return best

    def _random(self) -> int:
        return int(np.searchsorted(np.cumsum(self._shares), self._rng.random() * sum(self._shares), side="right"))


def choose_policy(data: DataConfig, rng: np.random.Generator) -> str:
    """Draws one of `POLICIES` with the shares of the config."""
    x = rng.random()
    return "bot" if x < data.bot else "noisy_bot" if x < data.bot + data.noisy_bot else "aimless"


class DataPolicy:
    """The data's own behaviour as a closed-loop policy: the mixture of the config, or one of `POLICIES` alone.

    Follows the `Policy` and `SeesEnvironment` protocols of `evaluation.closed_loop`. Where the bot fails, it stands
    still for the rest of the episode.
    """

    def __init__(self, data: DataConfig, *, component: str = "move", policy: str | None = None):
        if policy is not None and policy not in POLICIES:
            raise UserError(f"scripted policy {policy!r}: choose one of {', '.join(POLICIES)}")
        self.name = policy or "data"
        self._data, self._component, self._only = data, component, policy
        self._scripts: dict[int, Scripted] = {}

    def begin(self, stream: int, env: gymnasium.Env, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._scripts[stream] = Scripted(self._only or choose_policy(self._data, rng), self._data, env, rng)

    def end(self, stream: int) -> None:
        self._scripts.pop(stream, None)

    def reset(self, starting: Bool[np.ndarray, " E"]) -> None:
        """Nothing to forget: `begin` starts each episode afresh."""

    def act(self, images: UInt8[np.ndarray, "E H W 3"], tasks: Int[np.ndarray, "E words"]) -> dict[str, np.ndarray]:
        # "Done" does nothing in BabyAI, where alone there are experts that fail.
        actions = np.full(len(images), kinds.KINDS["babyai"].actions - 1, np.int32)
        for stream in list(self._scripts):
            try:
                actions[stream] = self._scripts[stream].act()
            except BotFailure:
                del self._scripts[stream]
        return {self._component: actions}


def record(
    env: gymnasium.Env,
    act: Callable[[], int],
    first: tuple[dict[str, np.ndarray], dict[str, Any]],
    component: ActionComponent,
    meta: dict[str, Any],
) -> Episode:
    """Plays one episode to its end and returns it in the alignment of `data.schema`.

    Args:
        env: an adapter with `image` and `task` observations and one categorical action; already reset.
        act: the next action.
        first: what ``env.reset`` returned.
    """
    observation, info = first
    frames, task = [observation["image"]], observation["task"]
    actions, rewards = [], [0.0]
    terminated = truncated = False
    while not (terminated or truncated):
        action = int(act())
        observation, reward, terminated, truncated, info = env.step(action)
        actions.append(action)
        frames.append(observation["image"])
        rewards.append(float(reward))
    t = len(frames)
    moves, present = action_array(component, t), np.ones(t, np.bool_)
    moves[1:], present[0] = actions, False
    return Episode(
        frames=np.stack(frames),
        actions={component.name: moves},
        present={component.name: present},
        reward=np.asarray(rewards, np.float32),
        is_terminal=bool(terminated),
        task=task,
        meta={**meta, "steps": t - 1, "success": bool(info.get("success", sum(rewards) > 0))},
    )


@dataclass(frozen=True)
class _Job:
    """What a worker needs to make one shard."""

    config: Config
    seed: int
    shard: int
    chunks: int
    path: str

    @property
    def frames(self) -> int:
        return self.chunks * self.config.data.chunk


class _Tally:
    """Counts of complete episodes by level and policy, and of episodes dropped because the bot failed."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, dict[str, float]]] = {}
        self.dropped: list[dict[str, Any]] = []

    def add(self, episode: Episode) -> None:
        m = episode.meta
        row = self.counts.setdefault(m["level"], {}).setdefault(
            m["policy"], {"episodes": 0, "success": 0, "steps": 0, "return": 0.0}
        )
        row["episodes"] += 1
        row["success"] += int(m["success"])
        row["steps"] += m["steps"]
        row["return"] += float(episode.reward.sum())


def episodes(config: Config, seed: int, shard: int, tally: _Tally | None = None) -> Iterator[Episode]:
    """The endless stream of episodes of one shard, a function of (seed, shard) and the config."""
    t, component = config.tokenizer, config.actions[0]
    tally = tally or _Tally()
    envs: dict[str, gymnasium.Env] = {}
    rng = np.random.default_rng([seed, shard])
    kept = 0
    while True:
        level = config.env.levels[int(rng.integers(len(config.env.levels)))]
        policy = choose_policy(config.data, rng)
        episode_seed = int(rng.integers(FIRST_SEED, 2**31))
        if level not in envs:
            envs[level] = kinds.make(config.env, level, height=t.height, width=t.width, words=config.agent.task_words)
        env = envs[level]
        first = env.reset(seed=episode_seed)
        meta = {"level": level, "policy": policy, "seed": episode_seed, "mission": first[1]["mission"]}
        try:
            script = Scripted(policy, config.data, env, np.random.default_rng([seed, shard, episode_seed]))
            episode = record(env, script.act, first, component, meta)
        except BotFailure as error:
            tally.dropped.append({**meta, "error": str(error)})
            if len(tally.dropped) > 20 + kept:
                raise UserError(
                    f"env.levels: BabyAI's bot fails on level {level} more often than not (last: {error}); "
                    "remove the level, or set data.bot and data.noisy_bot to 0"
                ) from error
            continue
        kept += 1
        tally.add(episode)
        yield episode


def _make_shard(job: _Job) -> dict[str, Any]:
    """Worker: writes one shard."""
    tally = _Tally()
    stream = chunks(
        (e.validate(job.config.actions) for e in episodes(job.config, job.seed, job.shard, tally)),
        job.config.data.chunk,
    )
    extra: dict[str, Any] = {"counts": tally.counts, "dropped": tally.dropped}
    first = (next(stream) for _ in range(job.chunks))
    return writer.write_shard(Path(job.path), DatasetSpec.of(job.config), first, extra)


def check_config(config: Config) -> None:
    """Raises `UserError` for a config whose episodes cannot be recorded, before anything is written."""
    kind = kinds.KINDS[config.env.kind]
    if len(config.actions) != 1 or config.actions[0].kind != "categorical" or config.actions[0].size != kind.actions:
        raise UserError(
            f"actions = {config.actions!r}: {kind.name} takes one categorical component of size {kind.actions}"
        )
    if config.agent.task_vocab < kind.vocabulary:
        raise UserError(
            f"agent.task_vocab = {config.agent.task_vocab}: {kind.name}'s words need at least {kind.vocabulary}"
        )
    if not kind.expert and config.data.bot + config.data.noisy_bot > 0:
        raise UserError(
            f"data.bot = {config.data.bot}, data.noisy_bot = {config.data.noisy_bot}: must be 0, there is no scripted "
            f"expert for {kind.name}"
        )
    if not config.env.levels:
        raise UserError("env.levels is empty: name at least one level, e.g. BabyAI-GoToLocal-v0")
    d, t = config.data, config.tokenizer
    for level in config.env.levels:
        if level in UNSOLVABLE and d.bot + d.noisy_bot > 0:
            raise UserError(
                f"env.levels: BabyAI's bot cannot solve {level}; remove it, or set data.bot and data.noisy_bot to 0"
            )
        kinds.make(config.env, level, height=t.height, width=t.width, words=config.agent.task_words).close()
    for name, value, least in (("chunk", d.chunk, 2), ("chunks_per_shard", d.chunks_per_shard, 1),
                               ("workers", d.workers, 1), ("frames", d.frames, 1)):  # fmt: skip
        if value < least:
            raise UserError(f"data.{name} = {value}: must be at least {least}")
    for name, share in (("bot", d.bot), ("noisy_bot", d.noisy_bot), ("burst", d.burst)):
        if not 0 <= share <= 1:
            raise UserError(f"data.{name} = {share}: must be in [0, 1]")
    if d.burst_length < 1:
        raise UserError(f"data.burst_length = {d.burst_length}: must be at least 1")


def _plan(data: DataConfig) -> list[tuple[str, int]]:
    """(split, chunks) of each shard: at least one shard of each split, of nearly equal sizes."""
    total = max(2, -(-data.frames // data.chunk))
    count = max(2, -(-total // data.chunks_per_shard))
    held = min(count - 1, max(1, round(data.holdout * count)))
    sizes = [total // count + (i < total % count) for i in range(count)]
    return [("holdout" if i >= count - held else "train", size) for i, size in enumerate(sizes)]


def summarize(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Success rate, mean length and mean return by level and policy, and over all levels ("all levels", "all")."""
    sums: dict[tuple[str, str], dict[str, float]] = {}
    for entry in entries:
        for level, rows in entry["counts"].items():
            for policy, row in rows.items():
                for key in ((level, policy), (level, "all"), ("all levels", policy), ("all levels", "all")):
                    into = sums.setdefault(key, dict.fromkeys(row, 0))
                    for name, value in row.items():
                        into[name] += value
    out: dict[str, Any] = {}
    for (level, policy), row in sorted(sums.items()):
        n = row["episodes"]
        out.setdefault(level, {})[policy] = {
            "episodes": int(n),
            "success_rate": round(row["success"] / n, 4),
            "mean_steps": round(row["steps"] / n, 3),
            "mean_return": round(row["return"] / n, 4),
        }
    return out


def collect(config: Config, out_dir: str | Path, *, seed: int, progress: bool = True) -> dict[str, Any]:
    """Records ``data.frames`` frames into `out_dir`; returns the manifest.

    Runs ``data.workers`` processes. Shards that an interrupted run left whole are kept; a complete dataset of the same
    config is only checked. A directory that holds anything else is refused.
    """
    check_config(config)
    directory = Path(out_dir)
    plan = _plan(config.data)
    d = dataclasses.asdict(config.data)
    for name in ("workers", "source", "readers", "also", "weights", "labelled", "labelled_levels"):
        del d[name]  # how it ran and is read is no part of what was recorded, and it was made from no source
    spec = DatasetSpec.of(config)
    request = {"seed": seed, "env": dataclasses.asdict(config.env), "data": d, "spec": spec.to_json()}
    writer.write_request(directory, request)
    counts = {split: sum(s == split for s, _ in plan) for split in SPLITS}
    entries: dict[str, list[dict[str, Any]]] = {split: [{}] * n for split, n in counts.items()}
    jobs: list[_Job] = []
    place: list[tuple[str, int]] = []
    for shard, (split, size) in enumerate(plan):
        index = sum(s == split for s, _ in place)
        place.append((split, index))
        path = directory / writer.shard_file(split, index, counts[split])
        jobs.append(_Job(config, seed, shard, size, str(path)))
    made = make_shards(jobs, _make_shard, workers=config.data.workers, progress=progress, what="recording")
    for shard, entry in made:
        split, index = place[shard]
        entries[split][index] = entry
    everything = [e for shards in entries.values() for e in shards]
    return writer.finish(
        directory,
        spec,
        entries,
        request=request,
        statistics=summarize(everything),
        dropped=[episode for e in everything for episode in e["dropped"]],
    )
