"""Records a number of episodes of one policy in any environment: scripted, or trained. ``dreamer4 collect ENV``.

Episode i is a function of (seed, i), the policy and the config alone, so the data does not depend on the number of
workers. Shards hold whole episodes; behind the last one, the shard's last chunk is filled with the beginning of one
more, which is marked as ``filler`` and not counted.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from dreamer4_jax.config import Config, EnvConfig, UserError, override, preset, to_dict
from dreamer4_jax.data import writer
from dreamer4_jax.data.schema import Episode, chunks
from dreamer4_jax.data.store import DatasetSpec
from dreamer4_jax.envs import kinds, spaces
from dreamer4_jax.envs.collect import FIRST_SEED, Scripted, Tally, check_config, record, write_shards
from dreamer4_jax.envs.kinds import ExpertFailure

SCRIPTS = {"random": "aimless", "expert": "bot", "noisy": "noisy_bot"}
SHARD_FRAMES = 4096  # that a shard has at most, where every episode is as long as it may be
LEAST_SHARDS = 8
ATTEMPTS = 20  # at an episode in which the expert fails


def is_run(policy: str) -> bool:
    """Whether a policy is the directory of a training run."""
    return (Path(policy) / "config.json").is_file()


def recording_config(
    kind: str, levels: Sequence[str], *, policy: str = "random", size: tuple[int, int] | None = None
) -> Config:
    """The config to record an environment with. Only what a recording needs is in it.

    A trained policy sees what it was trained on: where it was trained on this kind of environment, the view, the tiles
    and the time limit are its run's.

    Args:
        size: (height, width) of frames; by default 64 x 64, or the size that a trained policy was trained at.
    """
    about = kinds.KINDS[kind]
    words, vocabulary = about.words, about.vocabulary
    env = EnvConfig(kind=kind, levels=tuple(levels), max_steps=about.max_steps)  # type: ignore[arg-type]
    if policy not in SCRIPTS and is_run(policy):
        from dreamer4_jax.inference import read_config

        trained = read_config(policy)
        t = trained.tokenizer
        if size and size != (t.height, t.width):
            raise UserError(f"--size {size[0]}x{size[1]}: {policy} was trained at {t.height}x{t.width}")
        size, words = (t.height, t.width), trained.agent.task_words
        if trained.env.kind == kind:
            env = dataclasses.replace(trained.env, levels=env.levels)
    height, width = size or (64, 64)
    values: dict[str, Any] = {
        "name": kind,
        "env": to_dict(env),
        "actions": [to_dict(part) for part in about.actions(env)],
        "agent.task_words": words,
        "agent.task_vocab": vocabulary,
        "data.burst": about.burst,
        # A recording knows the size of frames alone: no patches that they would have to be divided into.
        "tokenizer": {"height": height, "width": width, "patch": 1, "latent_grid": False},
    }
    return override(preset("tiny"), values)


def check_policy(config: Config, policy: str) -> None:
    """Raises `UserError` for a policy that there is not, or that cannot play the config's environment."""
    kind = kinds.KINDS[config.env.kind]
    if policy == "random":
        return
    if policy in SCRIPTS:
        if not kind.expert:
            raise UserError(f"--policy {policy}: there is no scripted expert for {kind.name}; take random, or a run")
        return
    if not is_run(policy):
        raise UserError(f"--policy {policy!r}: choose of {', '.join(SCRIPTS)}, or give the directory of a run")
    from dreamer4_jax.inference import read_config

    trained = read_config(policy)
    if not spaces.same(trained.actions, config.actions):
        raise UserError(
            f"--policy {policy}: it acts with {spaces.describe(trained.actions)}, {kind.name} takes "
            f"{spaces.describe(config.actions)}"
        )
    have = (trained.tokenizer.height, trained.tokenizer.width, trained.agent.task_words)
    want = (config.tokenizer.height, config.tokenizer.width, config.agent.task_words)
    if have != want:
        raise UserError(
            f"--policy {policy}: it sees {have[0]} x {have[1]} pixels and {have[2]} task words, the recording has "
            f"{want[0]} x {want[1]} and {want[2]}"
        )
    if trained.env.kind == config.env.kind:
        for field in ("view", "tile"):
            seen, shown = getattr(trained.env, field), getattr(config.env, field)
            if seen != shown:
                raise UserError(
                    f"--policy {policy}: it was trained with env.{field} = {seen}, the recording has {shown}; give "
                    f"env.{field}={seen}"
                )


def identify(run: str) -> dict[str, str]:
    """Which trained policy a run has now, for a dataset's request: another one there later records other data."""
    _leave_accelerators()
    from dreamer4_jax.inference import load_world
    from dreamer4_jax.training.checkpoint import checksum

    world = load_world(run)
    return {
        "policy": str(Path(run).resolve()),
        "phase": "agent" if world.actor is None else "imagination",
        "weights": checksum((world.tokenizer, world.agent.dynamics, world.policy)),
    }


def _leave_accelerators() -> None:
    """Processes cannot share an accelerator, and one of them alone would draw other actions than they."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def check_experts(config: Config) -> None:
    """Raises `UserError` for a level without a scripted expert, in an environment that has them for others."""
    t = config.tokenizer
    for level in config.env.levels:
        env = kinds.make(config.env, level, height=t.height, width=t.width, words=config.agent.task_words)
        env.reset(seed=0)
        env.get_wrapper_attr("expert")(np.random.default_rng(0))
        env.close()


@dataclass(frozen=True)
class Job:
    """What a worker needs to make one shard: episodes first .. first + count - 1. `phase` is of a trained policy."""

    config: Config
    policy: str
    phase: str | None
    seed: int
    first: int
    count: int
    path: str

    @property
    def frames(self) -> int:
        """Episodes are what is counted: how long they are is not known before."""
        return self.count


class _Player:
    """The policy of a shard, and the environments that it plays in."""

    def __init__(self, job: Job):
        self._job = job
        self._envs: dict[str, gymnasium.Env] = {}
        self._trained: Any = None
        if job.policy not in SCRIPTS:
            _leave_accelerators()
            from dreamer4_jax.inference import load_policy

            self._trained = load_policy(job.policy, phase=job.phase)

    def play(self, index: int, tally: Tally, limit: int | None = None) -> Episode:
        """Episode `index`, in the alignment of `data.schema`. Where the expert fails, another takes its place."""
        job, c = self._job, self._job.config
        level = c.env.levels[index % len(c.env.levels)]
        if level not in self._envs:
            t = c.tokenizer
            self._envs[level] = kinds.make(c.env, level, height=t.height, width=t.width, words=c.agent.task_words)
        env = self._envs[level]
        for attempt in range(ATTEMPTS):
            seed = FIRST_SEED + _draw(job.seed, index, level, attempt)
            first = env.reset(seed=seed)
            meta = {"level": level, "policy": job.policy, "seed": seed, "mission": first[1]["mission"]}
            try:
                act, labels = self._start(env, index, attempt)
                episode = record(env, act, first, c.actions, meta, limit)
            except ExpertFailure as error:
                tally.dropped.append({**meta, "error": str(error)})
                continue
            episode.meta.update(labels, index=index)
            return episode.validate(c.actions)
        raise UserError(f"--policy {job.policy}: the expert fails on level {level}, {ATTEMPTS} times in a row")

    def _start(self, env: gymnasium.Env, index: int, attempt: int) -> tuple[Callable[[Any], Any], dict[str, Any]]:
        job = self._job
        if self._trained is not None:
            self._trained.reset(seed=_draw(job.seed, index, "policy"))
            return self._trained.act, {}
        rng = np.random.default_rng([job.seed, index, attempt])
        script = Scripted(SCRIPTS[job.policy], job.config.data, env, rng)
        return script.act, script.labels

    def close(self) -> None:
        for env in self._envs.values():
            env.close()


def _draw(*what: int | str) -> int:
    """A number in [0, 2^30) that depends on everything given, and on nothing else."""
    words = [zlib.crc32(w.encode()) if isinstance(w, str) else w for w in what]
    return int(np.random.SeedSequence(words).generate_state(1)[0] >> 2)


def _stream(job: Job, player: _Player, tally: Tally) -> Iterator[Episode]:
    """The episodes of a shard, and the filler behind them."""
    frames, chunk = 0, job.config.data.chunk
    for index in range(job.first, job.first + job.count):
        episode = player.play(index, tally)
        tally.add(episode)
        frames += len(episode)
        yield episode
    # Numbers that no counted episode has, and no other shard: fewer than `chunk` fillers, of at least a frame each, do.
    extra = 2**32 + job.first * chunk
    while frames % chunk:
        episode = player.play(extra, tally, limit=chunk - frames % chunk)
        episode.meta["filler"] = True
        extra, frames = extra + 1, frames + len(episode)
        yield episode


def make_shard(job: Job) -> dict[str, Any]:
    """Worker: writes one shard."""
    tally, player = Tally(), _Player(job)
    extra: dict[str, Any] = {"counts": tally.counts, "dropped": tally.dropped}
    try:
        stream = chunks(_stream(job, player, tally), job.config.data.chunk)
        return writer.write_shard(Path(job.path), DatasetSpec.of(job.config), stream, extra)
    finally:
        player.close()


def collect_episodes(
    config: Config,
    out_dir: str | Path,
    *,
    policy: str,
    episodes: int,
    seed: int,
    workers: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Records `episodes` episodes, levels by turns, as a dataset in `out_dir`; returns the manifest.

    Shards that an interrupted run left whole are kept; a complete dataset of the same request is only checked. A
    directory that holds anything else is refused.

    Args:
        policy: one of `SCRIPTS`, or the directory of a run, whose policy acts on the CPU.
    """
    if episodes < 2:
        raise UserError(f"--episodes {episodes}: must be at least 2, one to train on and one held out")
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    shares = {"data.bot": float(policy == "expert"), "data.noisy_bot": float(policy == "noisy")}
    check_policy(config, policy)
    config = override(config, shares)
    check_config(config)
    if policy in ("expert", "noisy"):
        check_experts(config)
    d, directory = config.data, Path(out_dir)
    each = max(1, min(SHARD_FRAMES // config.env.max_steps, -(-episodes // LEAST_SHARDS)))
    starts = range(0, episodes, each)
    held = min(len(starts) - 1, max(1, round(d.holdout * len(starts))))
    splits = ["holdout" if i >= len(starts) - held else "train" for i in range(len(starts))]
    spec = DatasetSpec.of(config)
    player = {"policy": policy} if policy in SCRIPTS else identify(policy)
    request = {
        "seed": seed,
        **player,
        "episodes": episodes,
        "env": dataclasses.asdict(config.env),
        "data": {"burst": d.burst, "burst_length": d.burst_length, "holdout": d.holdout},
        "spec": spec.to_json(),
    }

    def job(shard: int, path: str) -> Job:
        count = min(each, episodes - starts[shard])
        return Job(config, player["policy"], player.get("phase"), seed, starts[shard], count, path)

    return write_shards(
        directory, spec, request, splits, job, make_shard, workers=workers, progress=progress, unit="episodes"
    )
