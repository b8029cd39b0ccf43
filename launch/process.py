"""A trial of a sweep under way: a process of its own, so that it can be stopped and cannot take the others along."""

import contextlib
import fcntl
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dreamer4_jax.config import Config, UserError
from launch.algebra import Overrides
from launch.spec import RunSpec

Backend = Callable[[RunSpec], int]  # runs to the end and returns the exit code; passes a SIGTERM on to the run

LOG_LINES = 20  # of a failed trial, in its record
# A process that is forked from this one would inherit the locks of its threads.
_context = multiprocessing.get_context("forkserver")
# What every trial imports, most of it JAX, which none of these processes computes with: once instead of each time.
_context.set_forkserver_preload(["launch.sweep", "launch.backends"])


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    overrides: Overrides
    spec: RunSpec
    config: Config

    @property
    def name(self) -> str:
        return self.spec.name


class Process:
    """Runs a trial through a backend; its output goes to the file `log`."""

    def __init__(self, trial: Trial, backend: Backend, log: Path):
        self.trial, self.pruned = trial, False
        self._log, self._log_start = log, log.stat().st_size if log.exists() else 0
        self._told: float | None = None
        self._size = 0
        self._process = _context.Process(
            target=_child, args=(backend, trial.spec, log, dict(os.environ)), name=trial.name
        )
        self._process.start()
        self.sentinel = self._process.sentinel

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative after a signal."""
        return self._process.exitcode

    def stop(self, grace: float = math.inf) -> None:
        """Asks it to save and end, once; a second time after `grace` seconds, which ends a run without saving."""
        if self._told is None or time.monotonic() - self._told > grace:
            self._told = time.monotonic()
            self._process.terminate()

    def grown(self) -> bool:
        """Whether metrics.jsonl changed since the last call."""
        path = Path(self.trial.spec.directory) / "metrics.jsonl"
        before, self._size = self._size, path.stat().st_size if path.exists() else 0
        return self._size != before

    def log_lines(self) -> list[str]:
        """The last lines of this attempt's output."""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace").splitlines()[-LOG_LINES:]


def _child(backend: Backend, spec: RunSpec, log: Path, environment: dict[str, str]) -> None:
    """The main function of a trial's process."""
    os.environ.clear()  # it is forked from a server, which may be older than the environment of today
    os.environ.update(environment)
    os.setsid()  # Ctrl-C at a terminal reaches the sweep alone, which passes it on: a second one would end the run
    threading.Thread(target=_follow_parent, daemon=True).start()
    # A sweep that was killed may have left a run that is still saving. It holds the lock of its log, as does every
    # process that inherits its output.
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    fcntl.flock(file, fcntl.LOCK_EX)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ["JAX_NUM_CPU_DEVICES"] = str(spec.devices_per_process)
    try:
        code = backend(spec)
    except UserError as error:
        print(f"dreamer4: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


def _follow_parent() -> None:
    """Stops this process as a SIGTERM would, once the sweep is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


# ---------------------------------------------------------------------------------------------------------------------
# How a backend is told to end


class Terminated(BaseException):
    """SIGTERM arrived."""


class Termination:
    """Turns SIGTERM into `Terminated` where it may be heard; elsewhere it waits until it may."""

    def __init__(self) -> None:
        self._heard, self._shields, self._pending = False, 0, False

    def __enter__(self) -> "Termination":
        self._before = signal.signal(signal.SIGTERM, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _arrived(self, *_: object) -> None:
        self._pending = True
        self._raise()

    def _raise(self) -> None:
        if self._pending and self._heard and not self._shields:
            self._pending = False
            raise Terminated

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Lets a signal end the block."""
        self._heard = True
        try:
            self._raise()
            yield
        finally:
            self._heard = False

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """Lets a part of such a block be done to its end first."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        self._raise()
