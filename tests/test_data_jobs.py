"""Shards made by several processes: what becomes of the workers."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from dreamer4_jax.data.jobs import make_shards


@dataclass(frozen=True)
class Wait:
    """A job that says which process does it, and lasts."""

    path: str
    frames: int = 1


def wait(job: Wait) -> dict:
    Path(job.path + ".pid").write_text(str(os.getpid()))
    time.sleep(60)
    return {}


def alive(pid: int) -> bool:
    """Whether it runs; one that ended is not counted, though nobody has asked for its exit status yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux about processes")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_where_their_parent_is_killed(tmp_path, how):
    code = f"from tests.test_data_jobs import work; work({str(tmp_path)!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    try:
        marks, until = [tmp_path / f"{i}.pid" for i in range(2)], time.monotonic() + 60
        while not all(m.exists() and m.read_text() for m in marks) and time.monotonic() < until:
            time.sleep(0.05)
        workers = [int(m.read_text()) for m in marks]
        assert all(map(alive, workers))
        parent.send_signal(how)
        parent.wait(30)
        until = time.monotonic() + 50
        while any(map(alive, workers)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(map(alive, workers))
    finally:
        parent.kill()


def work(where: str) -> None:
    list(make_shards([Wait(f"{where}/{i}") for i in range(2)], wait, workers=2, progress=False, what="waiting"))
