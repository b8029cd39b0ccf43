"""Records episodes by scripted policies: an environment's expert, the expert with random bursts, random play.

The data is meant to be mediocre: the noisy expert errs at any moment, also in front of the goal, so only a part of its
episodes succeeds within ``env.max_steps``. Every episode is kept, successes and failures. Each shard is a function of
(seed, shard index) and the config alone, so the data does not depend on the number of workers.

Nothing here imports JAX: worker processes must start fast and leave the accelerator alone.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Bool, Int, UInt8

from dreamer4_jax.config import ActionComponent, Config, DataConfig, UserError
from dreamer4_jax.data import writer
from dreamer4_jax.data.jobs import J, make_shards
from dreamer4_jax.data.schema import Episode, action_array, chunks
from dreamer4_jax.data.store import SPLITS, DatasetSpec
from dreamer4_jax.envs import kinds, spaces
from dreamer4_jax.envs.kinds import Expert, ExpertFailure

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


class Scripted:
    """One scripted policy in one episode, with privileged access to the simulator."""

    def __init__(self, policy: str, data: DataConfig, env: gymnasium.Env, rng: np.random.Generator):
        self._rng, self._data, self._policy = rng, data, policy
        self._random: Callable[[np.random.Generator], Any] = env.get_wrapper_attr("random_action")
        self._expert: Expert | None = None if policy == "aimless" else env.get_wrapper_attr("expert")(rng)
        self._taken: Any = None
        self._burst = self._steps = 0
        self.labels: dict[str, Any] = {}  # what an expert tells of the episode, for its meta data

    def act(self, observation: Any = None) -> Any:
        """The next action, as the environment takes it, whatever is observed; raises `ExpertFailure`."""
        action = self._choose()
        self._taken = action
        self._steps += 1
        if subgoal := getattr(self._expert, "subgoal", ""):
            runs = self.labels.setdefault("subgoals", [])
            if not runs or runs[-1][1] != subgoal:
                runs.append([self._steps, subgoal])
        return action

    def _choose(self) -> Any:
        if self._expert is None:
            return self._random(self._rng)
        # The expert follows the episode even through a burst, told of each action that was really taken.
        best = self._expert.act(self._taken)
        if self._policy == "noisy_bot":
            if self._burst == 0 and self._rng.random() < self._data.burst:
                self._burst = self._data.burst_length
            if self._burst > 0:
                self._burst -= 1
                return self._random(self._rng)
        return best


def choose_policy(data: DataConfig, rng: np.random.Generator) -> str:
    """Draws one of `POLICIES` with the shares of the config."""
    x = rng.random()
    return "bot" if x < data.bot else "noisy_bot" if x < data.bot + data.noisy_bot else "aimless"


class DataPolicy:
    """The data's own behaviour as a closed-loop policy: the mixture of the config, or one of `POLICIES` alone.

    Follows the `Policy` and `SeesEnvironment` protocols of `evaluation.closed_loop`. Where the expert fails, it does
    what the environment calls `idle` for the rest of the episode.
    """

    def __init__(self, config: Config, *, policy: str | None = None):
        if policy is not None and policy not in POLICIES:
            raise UserError(f"scripted policy {policy!r}: choose one of {', '.join(POLICIES)}")
        self.name = policy or "data"
        self._data, self._components, self._only = config.data, config.actions, policy
        self._scripts: dict[int, Scripted] = {}
        self._envs: dict[int, gymnasium.Env] = {}

    def begin(self, stream: int, env: gymnasium.Env, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._envs[stream] = env
        self._scripts[stream] = Scripted(self._only or choose_policy(self._data, rng), self._data, env, rng)

    def end(self, stream: int) -> None:
        self._scripts.pop(stream, None)
        self._envs.pop(stream, None)

    def reset(self, starting: Bool[np.ndarray, " E"]) -> None:
        """Nothing to forget: `begin` starts each episode afresh."""

    def act(self, images: UInt8[np.ndarray, "E H W 3"], tasks: Int[np.ndarray, "E words"]) -> dict[str, np.ndarray]:
        out = spaces.nothing(self._components, len(images))
        for stream, env in self._envs.items():
            action = self._next(stream, env)
            for name, value in spaces.from_env(action, self._components).items():
                out[name][stream] = value
        return out

    def _next(self, stream: int, env: gymnasium.Env) -> Any:
        if stream in self._scripts:
            try:
                return self._scripts[stream].act()
            except ExpertFailure:
                del self._scripts[stream]
        return env.get_wrapper_attr("idle")


def record(
    env: gymnasium.Env,
    act: Callable[[dict[str, np.ndarray]], Any],
    first: tuple[dict[str, np.ndarray], dict[str, Any]],
    components: Sequence[ActionComponent],
    meta: dict[str, Any],
    limit: int | None = None,
) -> Episode:
    """Plays one episode to its end and returns it in the alignment of `data.schema`.

    Args:
        env: an environment as `kinds.make` describes; already reset.
        act: from an observation to the next action, as the environment takes it.
        first: what ``env.reset`` returned.
        meta: of the episode; its steps are added, its success where the environment says what that is, and the frame of
            each event that it names.
        limit: the most frames; there an episode is cut.
    """
    observation, info = first
    frames, tasks = [observation["image"]], [observation["task"]]
    actions, rewards = [], [0.0]
    events: dict[str, int] = {}
    terminated = truncated = False
    while not (terminated or truncated or len(frames) == limit):
        action = act(observation)
        observation, reward, terminated, truncated, info = env.step(action)
        # Environments clip what lies beyond the range: data hold what was done.
        actions.append(spaces.clipped(spaces.from_env(action, components), components))
        for name in info.get("events", ()):
            events.setdefault(name, len(frames))
        frames.append(observation["image"])
        tasks.append(observation["task"])
        rewards.append(float(reward))
    t, task = len(frames), np.stack(tasks)
    taken = {part.name: action_array(part, t) for part in components}
    for part in components:
        if actions:
            taken[part.name][1:] = [action[part.name] for action in actions]
    return Episode(
        frames=np.stack(frames),
        actions=taken,
        present={part.name: np.arange(t) > 0 for part in components},
        reward=np.asarray(rewards, np.float32),
        is_terminal=bool(terminated),
        task=task[0] if (task == task[0]).all() else task,
        meta={**meta, "steps": t - 1}
        | ({"success": bool(info["success"])} if "success" in info else {})
        | ({"events": events} if events else {}),
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


class Tally:
    """Counts of complete episodes by level and policy, and of episodes dropped because the expert failed."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, dict[str, float]]] = {}
        self.dropped: list[dict[str, Any]] = []

    def add(self, episode: Episode) -> None:
        m = episode.meta
        known = {"success": 0} if "success" in m else {}
        row = self.counts.setdefault(m["level"], {}).setdefault(
            m["policy"], {"episodes": 0, **known, "steps": 0, "return": 0.0}
        )
        row["episodes"] += 1
        if known:
            row["success"] += int(m["success"])
        row["steps"] += m["steps"]
        row["return"] += float(episode.reward.sum())


def episodes(config: Config, seed: int, shard: int, tally: Tally | None = None) -> Iterator[Episode]:
    """The endless stream of episodes of one shard, a function of (seed, shard) and the config."""
    t = config.tokenizer
    tally = tally or Tally()
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
            episode = record(env, script.act, first, config.actions, meta)
            episode.meta.update(script.labels)
        except ExpertFailure as error:
            tally.dropped.append({**meta, "error": str(error)})
            if len(tally.dropped) > 20 + kept:
                raise UserError(
                    f"env.levels: the scripted expert fails on level {level} more often than not (last: {error}); "
                    "remove the level, or set data.bot and data.noisy_bot to 0"
                ) from error
            continue
        kept += 1
        tally.add(episode)
        yield episode


def _make_shard(job: _Job) -> dict[str, Any]:
    """Worker: writes one shard."""
    tally = Tally()
    stream = chunks(
        (e.validate(job.config.actions) for e in episodes(job.config, job.seed, job.shard, tally)),
        job.config.data.chunk,
    )
    extra: dict[str, Any] = {"counts": tally.counts, "dropped": tally.dropped}
    first = (next(stream) for _ in range(job.chunks))
    return writer.write_shard(Path(job.path), DatasetSpec.of(job.config), first, extra)


def check_config(config: Config) -> None:
    """Raises `UserError` for a config whose episodes cannot be recorded, before anything is written."""
    if config.env.kind == "none":
        raise UserError("env.kind = 'none': there is no environment to record; give data.source or --data")
    kind = kinds.KINDS[config.env.kind]
    wanted = kind.actions(config.env)
    if not spaces.same(config.actions, wanted):
        raise UserError(f"actions = {config.actions!r}: {kind.name} takes {spaces.describe(wanted)}")
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
                    for name in list(into):  # what one part does not know (success), the whole does not
                        if name in row:
                            into[name] += row[name]
                        else:
                            del into[name]
    out: dict[str, Any] = {}
    for (level, policy), row in sorted(sums.items()):
        n = row["episodes"]
        out.setdefault(level, {})[policy] = {
            "episodes": int(n),
            **({"success_rate": round(row["success"] / n, 4)} if "success" in row else {}),
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

    def job(shard: int, path: str) -> _Job:
        return _Job(config, seed, shard, plan[shard][1], path)

    return write_shards(
        directory, spec, request, [split for split, _ in plan], job, _make_shard,
        workers=config.data.workers, progress=progress,
    )  # fmt: skip


def write_shards(
    directory: Path,
    spec: DatasetSpec,
    request: dict[str, Any],
    splits: Sequence[str],
    job: Callable[[int, str], J],
    make: Callable[[J], dict[str, Any]],
    *,
    workers: int,
    progress: bool,
    unit: str = "frames",
) -> dict[str, Any]:
    """Records the shards of a dataset and finishes it; returns the manifest.

    Args:
        request: what the directory is claimed for.
        splits: of the shards, in their order.
        job: (number of the shard, its path) -> what `make`, a module's function, makes it from.
        unit: what the jobs count.
    """
    writer.write_request(directory, request)
    entries: dict[str, list[dict[str, Any]]] = {split: [{}] * splits.count(split) for split in SPLITS}
    place = [(split, splits[:i].count(split)) for i, split in enumerate(splits)]
    files = [directory / writer.shard_file(split, at, splits.count(split)) for split, at in place]
    jobs = [job(i, str(file)) for i, file in enumerate(files)]
    made = make_shards(jobs, make, workers=workers, progress=progress, what="recording", unit=unit)
    for shard, entry in made:
        split, at = place[shard]
        entries[split][at] = entry
    everything = [e for shards in entries.values() for e in shards]
    return writer.finish(
        directory,
        spec,
        entries,
        request=request,
        statistics=summarize(everything),
        dropped=[episode for e in everything for episode in e["dropped"]],
    )
