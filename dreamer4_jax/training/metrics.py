"""Where a run's numbers go: metrics.jsonl, TensorBoard, the progress bar and the ledger of wall-clock time."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from dreamer4_jax.config import UserError

TIME, EVAL = "time/", "eval/"  # prefixes of metrics that depend on the machine, and of a finished phase's scores


def write_atomic(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader, or a process that dies, sees the old text or the new, never a part."""
    draft = path.with_name(path.name + ".part")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _plain(value: Any) -> float | None:
    """A float of nine digits, which is every float32 exactly; None (JSON's null) where it is not finite."""
    number = float(value)
    return float(f"{number:.9g}") if math.isfinite(number) else None


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that was cut off by a kill is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    with _reading(path):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Names a file that is not what was written."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); restore it, or remove it: its numbers alone are lost") from error


class _Events:
    """TensorBoard's event file of a phase, written by who calls.

    tensorboardX's `SummaryWriter` writes in a thread. On a full disk that thread dies, and the training waits for it.
    """

    FLUSH_S = 30.0  # between two flushes, which wait for the disk

    def __init__(self, directory: Path, start: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._writer, self._flushed = EventsWriter(str(directory / "events")), -math.inf
        # TensorBoard forgets what it was shown of later steps.
        self._add(start + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, summary=Summary(value=[Summary.Value(tag=n, simple_value=v) for n, v in values.items()]))

    def _add(self, step: int, **what: Any) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time(), **what))
        if time.monotonic() - self._flushed > self.FLUSH_S:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


class MetricsWriter:
    """Appends one phase's metrics to ``run_dir/metrics.jsonl`` and ``run_dir/tb/<phase>``.

    Opening it drops, atomically, what this phase wrote after step `start`: those steps are about to be made again.
    Lines of other phases stay. All keys but those under "time/" are a function of the run's config and seed.

    Attributes:
      lost_s: seconds that a process which was killed had spent on those steps.
    """

    def __init__(self, run_dir: str | Path, phase: str, start: int = 0):
        run_dir = Path(run_dir)
        self.phase, path = phase, run_dir / "metrics.jsonl"
        lines = read_metrics(run_dir)
        kept = [line for line in lines if not self._stale(line, start)]
        self.lost_s, step = 0.0, start
        for line in lines:
            if self._stale(line, start) and (rate := line.get(TIME + "steps_per_s")):
                self.lost_s, step = self.lost_s + (line["step"] - step) / rate, line["step"]
        if path.exists():
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._events = _Events(run_dir / "tb" / phase, start)

    def _stale(self, line: dict[str, Any], start: int) -> bool:
        # An unfinished phase has no valid scores: a line of them was written by a process that died just afterwards.
        return line["phase"] == self.phase and (line["step"] > start or any(name.startswith(EVAL) for name in line))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the scalars of the update that made the state of `step`."""
        plain = {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps({"phase": self.phase, "step": step, **plain}) + "\n")
        self._file.flush()
        self._events.write(step, {name: value for name, value in plain.items() if value is not None})

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class NoWriter:
    """In place of a `MetricsWriter` in the processes that are not the main one."""

    lost_s = 0.0

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Ledger:
    """Seconds that each phase has cost, by activity, in ``run_dir/ledger.json``; accumulates across resumes.

    Activities: "setup" (initialisation or restore), "compile", "data" (the loop waiting for a batch), "train",
    "save", "evaluate", and "lost": what a killed process had spent on steps that had to be made again. Only "train"
    is productive; its share of the total is the goodput.
    """

    def __init__(self, run_dir: str | Path, phase: str):
        self._path, self.phase = Path(run_dir) / "ledger.json", phase
        self._all: dict[str, dict[str, float]] = read_ledger(run_dir)
        self.seconds = self._all.setdefault(phase, {})

    @contextmanager
    def time(self, activity: str) -> Iterator[None]:
        """Adds the time spent inside to an activity, whether it succeeds or not."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] = self.seconds.get(activity, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def add(self, activity: str, seconds: float) -> None:
        if seconds:
            self.seconds[activity] = self.seconds.get(activity, 0.0) + seconds

    def save(self) -> None:
        rounded = {p: {a: round(s, 3) for a, s in part.items()} for p, part in self._all.items()}
        write_atomic(self._path, json.dumps(rounded, indent=2) + "\n")


def read_ledger(run_dir: str | Path) -> dict[str, dict[str, float]]:
    """{phase: {activity: seconds}} of a run."""
    path = Path(run_dir) / "ledger.json"
    with _reading(path):
        return json.loads(path.read_text()) if path.exists() else {}


class ProgressBar:
    """A rich bar with loss, speed and the time left; prints nothing where the output is not a terminal."""

    def __init__(self, phase: str, total: int, start: int, enabled: bool):
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._bar.add_task(phase, total=total, completed=start, note="compiling")

    def update(self, step: int, note: str | None = None) -> None:
        self._bar.update(self._task, completed=step)
        if note is not None:
            self._bar.update(self._task, note=note)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
