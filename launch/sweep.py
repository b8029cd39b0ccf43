"""Sweeps: many runs of one experiment, in parallel on this machine, resumable, the bad ones stopped early.

A sweep file is Python:

::

    EXPERIMENT = "quickstart"                      # a file of experiments/ or a preset
    SIZE = "smoke"                                 # "quick" if left out
    SWEEP = product(values(...), values(...))      # launch.algebra
    STUDY, TRIALS = {field: log_uniform(...)}, 40  # or a search by Optuna (launch.study), so many trials long
    METRIC = Metric("...", "max")                  # launch.metric: what is looked for
    PRUNE = Metric("dynamics:loss", "min")         # optional: a series to stop bad trials by
    COST = "seconds"                               # optional, or "steps": what the metric is plotted against
    CORES = 1                                      # optional: processor cores of one trial

The sweep directory holds sweep.json, trials.jsonl (one line for each attempt that ended; the last one of a name
counts), logs/, one run directory for each trial, and of a study study.db. The same command again goes on: finished and
pruned trials stay as they are, those that were under way resume from their checkpoints, and failed ones are tried
again, but not those of a study, whose sampler has learned from the failure.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import runpy
import signal
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal, Protocol

from dreamer4_jax.cli import resolve
from dreamer4_jax.config import Config, ConfigError, UserError
from launch.algebra import Overrides, arguments
from launch.metric import Curve, Metric, MetricError, below_median
from launch.process import LOG_LINES, Backend, Process, Trial
from launch.spec import INTERRUPTED, RunSpec
from launch.study import Distribution, Study

State = Literal["finished", "pruned", "failed", "interrupted"]

GRACE = 60.0  # seconds for a pruned trial to save, which nobody will need, and end


class SweepFailed(Exception):
    """Some trials failed; all others are done."""

    exit_code = 1


class SweepInterrupted(Exception):
    """SIGTERM or Ctrl-C arrived, and every trial that was under way has saved and ended."""

    exit_code = INTERRUPTED


def local(spec: RunSpec) -> int:
    """The backend of this machine; of a run that failed it prints the end of the output."""
    from launch.local import run

    if code := run(spec, log_to_terminal=False):
        output = Path(spec.directory) / "logs" / "process-0.log"
        print("\n".join(output.read_text(errors="replace").splitlines()[-LOG_LINES:]))
    return code


# ---------------------------------------------------------------------------------------------------------------------
# What is to be run


@dataclass(frozen=True)
class Sweep:
    """A sweep file; see the top of this module."""

    path: Path
    experiment: str
    size: str
    metric: Metric
    grid: tuple[Overrides, ...] = ()
    space: dict[str, Distribution] = field(default_factory=dict)
    trials: int = 0
    prune: Metric | None = None
    cost: str = "seconds"
    cores: int = 1

    def identity(self) -> dict[str, Any]:
        """What the trials in a sweep directory have in common. A grid may grow, and its metric is only read."""
        out: dict[str, Any] = {"experiment": self.experiment, "size": self.size}
        if self.space:
            metric = {"path": self.metric.path, "goal": self.metric.goal}
            out |= {"metric": metric, "study": {name: repr(spec) for name, spec in self.space.items()}}
        return out


def load(file: str) -> Sweep:
    """Reads a sweep file: a path, or the name of one in experiments/sweeps/."""
    import experiments

    path = Path(file)
    if path.suffix != ".py":
        path = Path(experiments.__path__[0]) / "sweeps" / f"{file}.py"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in (Path(experiments.__path__[0]) / "sweeps").glob("[!_]*.py")))
        raise UserError(f"no sweep file {path}: give a path, or one of experiments/sweeps/: {names}")
    try:
        found = runpy.run_path(str(path))
    except UserError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else "?"
        raise UserError(f"{path}:{line}: {type(error).__name__}: {error}") from error

    def take(name: str, kind: Any, default: Any = None) -> Any:
        if name not in found and default is None:
            raise UserError(f"{path}: has no {name}; a sweep file needs EXPERIMENT, METRIC, and SWEEP or STUDY")
        value = found.get(name, default)
        if not isinstance(value, kind):
            raise UserError(f"{path}: {name} = {value!r}: must be a {kind.__name__}")
        return value

    if ("SWEEP" in found) == ("STUDY" in found):
        raise UserError(f"{path}: needs either SWEEP, a list of overrides, or STUDY, a space to search")
    kind: dict[str, Any]
    if "SWEEP" in found:
        kind = {"grid": tuple(take("SWEEP", list))}
        if not kind["grid"] or not all(isinstance(overrides, dict) for overrides in kind["grid"]):
            raise UserError(f"{path}: SWEEP must hold at least one trial, and each be a dict of overrides")
    else:
        kind = {"space": take("STUDY", dict), "trials": take("TRIALS", int)}
        if not kind["space"] or kind["trials"] < 1:
            raise UserError(f"{path}: STUDY needs at least one field, and TRIALS must be at least 1")
    prune = found.get("PRUNE")
    sweep = Sweep(
        path,
        take("EXPERIMENT", str),
        take("SIZE", str, "quick"),
        take("METRIC", Metric),
        prune=None if prune is None else take("PRUNE", Metric),
        cost=take("COST", str, "seconds"),
        cores=take("CORES", int, 1),
        **kind,
    )
    if sweep.cost not in ("seconds", "steps"):
        raise UserError(f"{path}: COST = {sweep.cost!r}: choose 'seconds' or 'steps'")
    if sweep.prune and not sweep.prune.series:
        raise UserError(f"{path}: PRUNE = {sweep.prune.path}: must be a series, as phase:name")
    return sweep


def trial_name(experiment: str, overrides: Mapping[str, Any]) -> str:
    """A name that depends on nothing but the experiment and the overrides, not even on their order."""
    digest = hashlib.sha256(json.dumps(sorted(arguments(overrides))).encode()).hexdigest()[:10]
    return f"{re.sub('[^a-z0-9]+', '-', experiment.lower()).strip('-')[:29].rstrip('-')}-{digest}"


def make_trial(sweep: Sweep, overrides: Overrides, directory: Path) -> Trial:
    """A trial of a sweep; raises `ConfigError` if its config cannot work."""
    words = arguments(overrides)
    try:
        config = resolve(sweep.experiment, sweep.size, 0, words)
    except ConfigError as error:
        raise ConfigError(f"trial {' '.join(words) or 'without overrides'}: {error}") from error
    spec = RunSpec(
        trial_name(sweep.experiment, overrides),
        sweep.experiment,
        sweep.size,
        overrides=words,
        output=str(directory),
        devices_per_process=sweep.cores,
    )
    return Trial(overrides, spec, config)


def expand(sweep: Sweep, directory: Path) -> list[Trial]:
    """All trials of a grid, validated. Of trials with the same config, which train the same, the first one stays.

    Of a study, whose trials are drawn later: none, but each end of each field is tried on the config.
    """
    for name, spec in sweep.space.items():
        if not isinstance(spec, Distribution):
            raise ConfigError(
                f"STUDY[{name!r}] = {spec!r}: use uniform, log_uniform, integers or choice of launch.study"
            )
        for corner in spec.corners:
            make_trial(sweep, {name: corner}, directory)
    out: dict[Config, Trial] = {}
    for overrides in sweep.grid:
        trial = make_trial(sweep, overrides, directory)
        out.setdefault(trial.config, trial)
    return list(out.values())


# ---------------------------------------------------------------------------------------------------------------------
# The sweep directory


class Records:
    """trials.jsonl: one line for each attempt that ended. Lines are only ever added, whole and synced.

    Anybody may read, also while a sweep runs; only who holds the lock of the directory may add.
    """

    def __init__(self, directory: Path):
        self._path = directory / "trials.jsonl"
        data = self._path.read_bytes() if self._path.exists() else b""
        self._end = data.rfind(b"\n") + 1  # what follows is the beginning of a line, cut off by a kill
        self.latest: dict[str, dict[str, Any]] = {}
        for line in data[: self._end].splitlines():
            record = json.loads(line)
            self.latest[record["name"]] = record

    def state(self, name: str) -> State | None:
        """How the newest attempt at a trial ended."""
        return self.latest[name]["state"] if name in self.latest else None

    def add(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        with self._path.open("ab", buffering=0) as file:
            file.truncate(self._end)
            file.write(line)
            os.fsync(file.fileno())
        self._end += len(line)
        self.latest[record["name"]] = record

    def count(self, state: State) -> int:
        return sum(record["state"] == state for record in self.latest.values())


def _open(sweep: Sweep, directory: Path) -> None:
    """Makes the sweep directory, or checks that an existing one belongs to this sweep."""
    from dreamer4_jax.training.metrics import write_atomic

    path = directory / "sweep.json"
    mine = sweep.identity()
    if path.exists():
        theirs = json.loads(path.read_text())
        for name in sorted(set(mine) | set(theirs)):
            if mine.get(name) != theirs.get(name):
                raise UserError(
                    f"{directory} holds another sweep: {name} is {theirs.get(name)!r} there and {mine.get(name)!r} "
                    "here; choose another --out"
                )
    else:
        if directory.exists() and any(p.name != "lock" for p in directory.iterdir()):
            raise UserError(f"{directory}: not empty, and no sweep (no sweep.json); choose another --out")
        write_atomic(path, json.dumps(mine, indent=2) + "\n")


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keeps a second process out of the sweep directory; the lock goes with the process, however it ends."""
    with (directory / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory}: another process is working on this sweep") from None
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Where trials come from, and who judges them


class Source(Protocol):
    """Trials in the order in which they are to be started."""

    total: int

    def next(self) -> Trial | None: ...
    def bad(self, trial: Trial, curve: Curve) -> bool: ...
    def ended(self, trial: Trial, state: State, value: float | None) -> None: ...


class Grid:
    """The trials of a list; bad is what lies below the median of those that ended."""

    def __init__(self, sweep: Sweep, trials: list[Trial], records: Records):
        self._sweep, self.total = sweep, len(trials)
        self._queue: list[Trial] = []
        self._curves: list[Curve] = []
        for trial in trials:
            if (state := records.state(trial.name)) in ("finished", "pruned"):
                self.ended(trial, state, None)
            else:
                self._queue.append(trial)

    def next(self) -> Trial | None:
        return self._queue.pop(0) if self._queue else None

    def bad(self, trial: Trial, curve: Curve) -> bool:
        assert self._sweep.prune is not None
        return below_median(curve, self._curves, self._sweep.prune, _steps(trial.config, self._sweep.prune))

    def ended(self, trial: Trial, state: State, value: float | None) -> None:
        if self._sweep.prune and state in ("finished", "pruned"):
            self._curves.append(self._sweep.prune.curve(trial.spec.directory))


class Search:
    """The trials of an Optuna study. Its numbers that were given the same overrides share one run."""

    def __init__(self, sweep: Sweep, directory: Path, total: int, records: Records):
        self._sweep, self._directory, self._records, self.total = sweep, directory, records, total
        steps = _steps(resolve(sweep.experiment, sweep.size, 0, ()), sweep.prune) if sweep.prune else 1
        self._study = Study(sweep.space, sweep.metric, sweep.prune, steps, directory / "study.db", seed=0)
        self._numbers: dict[str, list[int]] = {}
        # Under way when an earlier process ended, or done but not told.
        self._queue = list(self._study.running().items())

    def next(self) -> Trial | None:
        while self._queue or len(self._study) < self.total:
            number, overrides = self._queue.pop(0) if self._queue else self._study.ask()
            try:
                trial = make_trial(self._sweep, overrides, self._directory)
            except ConfigError as error:  # fields that do not go together
                name = trial_name(self._sweep.experiment, overrides)
                self._records.add(
                    {"name": name, "state": "failed", "overrides": overrides, "code": 2, "log": [str(error)]}
                )
                self._study.tell(number, "failed")
                continue
            under_way = trial.name in self._numbers
            self._numbers.setdefault(trial.name, []).append(number)
            state = self._records.state(trial.name)
            if state not in (None, "interrupted"):
                self.ended(trial, state, measure(self._sweep.metric, trial, state)[0])
            elif not under_way:
                return trial
        return None

    def bad(self, trial: Trial, curve: Curve) -> bool:
        return self._study.prune(self._numbers[trial.name][0], curve)

    def ended(self, trial: Trial, state: State, value: float | None) -> None:
        if state == "interrupted":
            return
        told = "failed" if state == "finished" and value is None else state
        for number in self._numbers.pop(trial.name):
            self._study.tell(number, told, value if told == "finished" else None)


def _steps(config: Config, series: Metric) -> int:
    """Steps of the phase that a series belongs to."""
    phase = "dynamics" if series.phase == "diffusion" else series.phase
    if not hasattr(config.train, phase):
        raise ConfigError(f"PRUNE {series.path}: {phase!r} is no phase")
    return getattr(config.train, phase).steps


def measure(metric: Metric, trial: Trial, state: State) -> tuple[float | None, str]:
    """The metric of a finished trial and "", or None and why there is none."""
    if state != "finished":
        return None, ""
    try:
        return metric.value(trial.spec.directory).mean, ""
    except MetricError as error:
        return None, str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Running


class _Stop:
    """The first SIGTERM or Ctrl-C is a request, the second one ends the process."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "_Stop":
        self._before = {n: signal.signal(n, self._first) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _first(self, *_: object) -> None:
        self.requested = True
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)


class Progress:
    """A bar over all trials on a terminal, and one line for each trial that ended."""

    def __init__(self, total: int, done: int, metric: Metric):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        columns = (TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self.bar = Bar(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        self._task = self.bar.add_task("", total=total, completed=done, note="")
        self._metric, self._best, self._log = metric, "", console.print
        self._value: float | None = None

    def ended(self, trial: Trial, state: State, value: float | None, note: str) -> None:
        """Shows what came of a trial."""
        shown = "" if value is None else f" {value:.4g}"
        words = " ".join(trial.spec.overrides)
        self._log(
            f"{trial.name}  {state}{shown}  {words}{'  ' + note if note else ''}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        if value is not None and (self._value is None or self._metric.better(value, self._value)):
            self._value, self._best = value, f"  best {value:.4g} ({trial.name})"
        if state != "interrupted":
            self.bar.advance(self._task)

    def running(self, count: int) -> None:
        self.bar.update(self._task, note=f"{count} running{self._best}")


def run(
    sweep: Sweep,
    directory: Path,
    *,
    jobs: int | None = None,
    limit: int | None = None,
    backend: Backend = local,
    poll: float = 2.0,
) -> Records:
    """Runs every trial that is not done yet, `jobs` at a time (as many as the cores allow).

    Args:
      limit: only the first so many trials of the sweep.
      backend: runs one trial; called in a process of its own, so it must be importable.
      poll: seconds between two looks at the metrics of running trials.

    Raises:
      SweepInterrupted: after SIGTERM or Ctrl-C, every running trial saved.
      UserError: before anything is started or written, if a trial's config cannot work.
    """
    trials = expand(sweep, directory)[:limit]
    if sweep.prune:
        _steps(resolve(sweep.experiment, sweep.size, 0, ()), sweep.prune)
    jobs = jobs or max(1, cores() // sweep.cores)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        _open(sweep, directory)
        (directory / "logs").mkdir(exist_ok=True)
        records = Records(directory)
        source: Source
        if sweep.space:
            source = Search(sweep, directory, min(sweep.trials, limit or sweep.trials), records)
            done = len(records.latest) - records.count("interrupted")
        else:
            source = Grid(sweep, trials, records)
            done = sum(records.state(t.name) in ("finished", "pruned") for t in trials)
        progress = Progress(source.total, done, sweep.metric)
        with _Stop() as stop, progress.bar:
            _Scheduler(sweep, source, records, directory, jobs, backend, poll, progress, stop).all()
        if stop.requested:
            raise SweepInterrupted(
                f"interrupted with {records.count('finished')} of {source.total} trials finished; the same command "
                f"goes on with {directory}"
            )
    return records


@dataclass
class _Scheduler:
    """Keeps `jobs` trials under way until there are none left, or a stop is requested."""

    sweep: Sweep
    source: Source
    records: Records
    directory: Path
    jobs: int
    backend: Backend
    poll: float
    progress: Progress
    stop: _Stop
    running: list[Process] = field(default_factory=list)

    def all(self) -> None:
        """Returns when nothing is left to do."""
        try:
            while self._fill() or self.running:
                self.progress.running(len(self.running))
                if self.stop.requested:
                    for process in self.running:
                        process.stop()
                wait([process.sentinel for process in self.running], timeout=self.poll)
                for process in [p for p in self.running if p.exit_code is not None]:
                    self.running.remove(process)
                    self._end(process)
                if self.sweep.prune:
                    for process in self.running:
                        self._judge(process, self.sweep.prune)
        finally:
            for process in self.running:  # after a mistake of ours: the runs save, and end
                process.stop()

    def _fill(self) -> bool:
        """Starts trials; whether any was."""
        before = len(self.running)
        while not self.stop.requested and len(self.running) < self.jobs and (trial := self.source.next()):
            log = self.directory / "logs" / f"{trial.name}.txt"
            self.running.append(Process(trial, self.backend, log))
        return len(self.running) > before

    def _end(self, process: Process) -> None:
        """Records how a trial ended."""
        trial, code = process.trial, process.exit_code
        state: State = "finished" if code == 0 else "failed"
        if code != 0 and process.pruned:
            state = "pruned"
        elif code != 0 and (self.stop.requested or code == INTERRUPTED):
            state = "interrupted"
        value, note = measure(self.sweep.metric, trial, state)
        record: dict[str, Any] = {"name": trial.name, "state": state, "overrides": trial.overrides, "code": code}
        if state == "failed":
            record["log"] = process.log_lines()
            note = failure(record)
        self.records.add(record)
        self.source.ended(trial, state, value)
        self.progress.ended(trial, state, value, note)

    def _judge(self, process: Process, series: Metric) -> None:
        """Stops a trial that is not worth going on with."""
        if process.pruned:
            process.stop(GRACE)
        elif process.grown():
            curve = series.curve(process.trial.spec.directory)
            if curve and self.source.bad(process.trial, curve):
                process.pruned = True
                process.stop()


def failure(record: Mapping[str, Any]) -> str:
    """Why a trial failed, in a line."""
    return record["log"][-1] if record["log"] else f"exit code {record['code']}, and no output"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
