"""The sweep directory: which sweep it belongs to, how each trial ended, and who may write.

It holds sweep.json, trials.jsonl (one line for each attempt that ended; the last one of a name counts), logs/, one run
directory for each trial, and of a study study.db.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from dreamer4_jax.config import UserError
from dreamer4_jax.training.metrics import write_atomic
from launch.sweep_file import Sweep

State = Literal["finished", "pruned", "failed", "interrupted"]


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


def open_directory(sweep: Sweep, directory: Path) -> None:
    """Makes the sweep directory, or checks that an existing one belongs to this sweep."""
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
def locked(directory: Path) -> Iterator[None]:
    """Keeps a second process out of the sweep directory; the lock goes with the process, however it ends."""
    with (directory / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory}: another process is working on this sweep") from None
        yield
