"""Sweeps: many runs of one experiment, in parallel on this machine, resumable, the bad ones stopped early.

What is to be run stands in a sweep file (launch.sweep_file), what has ended in the sweep's directory
(launch.sweep_records). The same command again goes on: finished and pruned trials stay as they are, those that were
under way resume from their checkpoints, and failed ones are tried again, but not those of a study, whose sampler has
learned from the failure.
"""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from dreamer4_jax.cli import resolve
from dreamer4_jax.config import Config, ConfigError
from dreamer4_jax.presets import BASELINES
from launch.metric import Curve, Metric, MetricError, below_median
from launch.process import LOG_LINES, Backend, Process, Trial
from launch.spec import INTERRUPTED, RunSpec
from launch.study import Study
from launch.sweep_file import Sweep, expand, make_trial, trial_name
from launch.sweep_records import Records, State, locked, open_directory

GRACE = 60.0  # seconds for a pruned trial to save, which nobody will need, and end


class SweepFailed(Exception):
    """Some trials failed; all others are done."""

    exit_code = 1


class SweepInterrupted(Exception):
    """Trials saved and ended before they were done: those under way at a SIGTERM or Ctrl-C, or (not `asked`) some by
    themselves, and all others are done."""

    exit_code = INTERRUPTED

    def __init__(self, text: str, *, asked: bool = True):
        super().__init__(text)
        self.asked = asked


def local(spec: RunSpec) -> int:
    """The backend of this machine; of a run that failed it prints the end of the output."""
    from launch.local import run

    if code := run(spec, log_to_terminal=False):
        output = Path(spec.directory) / "logs" / "process-0.log"
        print("\n".join(output.read_text(errors="replace").splitlines()[-LOG_LINES:]))
    return code


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
    phase = "dynamics" if series.phase in BASELINES else series.phase
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
      SweepInterrupted: after SIGTERM or Ctrl-C, every running trial saved; or trials were interrupted by themselves.
      UserError: before anything is started or written, if a trial's config cannot work.
    """
    trials = expand(sweep, directory)[:limit]
    if sweep.prune:
        _steps(resolve(sweep.experiment, sweep.size, 0, ()), sweep.prune)
    jobs = jobs or max(1, cores() // sweep.cores)
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        open_directory(sweep, directory)
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
        mine = list(records.latest) if sweep.space else [trial.name for trial in trials]
        states = [records.state(name) for name in mine]
        if left := states.count("interrupted"):
            failed = f", {states.count('failed')} failed" if "failed" in states else ""
            raise SweepInterrupted(
                f"{left} trials were interrupted{failed}; the same command goes on with {directory}", asked=False
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
