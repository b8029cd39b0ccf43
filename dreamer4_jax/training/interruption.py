"""SIGTERM and Ctrl-C as requests: the step at hand is finished and saved, and the process ends with a code to retry."""

import signal
import threading
from pathlib import Path
from typing import Any, Self


class Interrupted(Exception):
    """SIGTERM or Ctrl-C arrived; the finished step was saved, and running again with resume goes on exactly there.

    The process should exit with `exit_code`: 42 is a code that TPU job controllers retry (xpk restarts on 42 and on
    codes from 127 up, and gives up on others).
    """

    exit_code = 42

    def __init__(self, phase: str, step: int, checkpoint: Path):
        super().__init__(f"{phase}: interrupted after step {step}; saved to {checkpoint}; run again with --resume")
        self.phase, self.step, self.checkpoint = phase, step, checkpoint


class Stop:
    """A context in which the first SIGTERM or Ctrl-C is a request, and the second ends the process at once.

    Python takes signals in the main thread alone; elsewhere nothing is ever requested.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self._raise: Interrupted | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._first) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's

    def _first(self, *_: object) -> None:
        self.requested = True
        for number in self._SIGNALS:
            # The system's own handler works even while Python is busy inside a long compilation.
            signal.signal(number, signal.SIG_DFL)
        if self._raise:
            raise self._raise

    def from_now(self, error: Interrupted) -> None:
        """Raises `error` if a stop was requested, or as soon as it is: everything worth keeping is saved."""
        self._raise = error
        if self.requested:
            raise error
