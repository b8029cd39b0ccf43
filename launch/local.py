"""A run as processes of this machine, joined like the hosts of a pod.

Each process finds its place in the environment: ``DREAMER4_COORDINATOR`` (an address for process 0 to listen at),
``DREAMER4_PROCESS_ID`` and ``DREAMER4_PROCESSES``. A process that is alone is told nothing. Their output is in
``<run directory>/logs``.
"""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dreamer4_jax.config import ConfigError
from launch.spec import RunSpec, retryable

PLACE = ("DREAMER4_COORDINATOR", "DREAMER4_PROCESS_ID", "DREAMER4_PROCESSES")
GRACE_S = 30.0  # how long the others may go on when one has failed: those that were interrupted too are saving
KILL_S = 10.0  # from SIGTERM, which a process that waits for a dead one does not hear, to SIGKILL
POLL_S = 0.05


def run(spec: RunSpec, *, log_to_terminal: bool = True) -> int:
    """Runs to the end and returns the exit code; restarts up to `spec.retries` times when a process is interrupted.

    Ctrl-C and SIGTERM go to all processes, which save; then nothing is restarted. (Signals reach the main thread alone:
    in another one this only waits.)
    """
    _check(spec)
    logs = Path(spec.directory) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for attempt in range(spec.retries + 1):
        with _Processes(spec, logs, log_to_terminal) as processes:
            code, cause = processes.run()
        if not retryable(code) or processes.stopped or attempt == spec.retries:
            break
        if log_to_terminal:
            print(f"dreamer4: {cause}; restart {attempt + 1} of {spec.retries}", file=sys.stderr, flush=True)
    if code and log_to_terminal:
        print(f"dreamer4: {cause}; its output is in {logs}", file=sys.stderr, flush=True)
    return 128 - code if code < 0 else code


def commands(spec: RunSpec) -> list[str]:
    """The processes as shell text, for --dry-run. The port is chosen when they start."""
    _check(spec)
    return [
        shlex.join(["env", *(f"{key}={value}" for key, value in _environment(spec, i, "127.0.0.1:PORT").items())])
        + f" {shlex.join(spec.command())}"
        for i in range(spec.processes)
    ]


def _check(spec: RunSpec) -> None:
    if "://" in spec.output:
        raise ConfigError(f"output {spec.output}: a local run writes into a directory, such as 'runs'")


def _environment(spec: RunSpec, process: int, coordinator: str) -> dict[str, str]:
    """What a process is told beyond the environment of this one."""
    place = dict(zip(PLACE, (coordinator, str(process), str(spec.processes)), strict=True))
    return {
        **(place if spec.processes > 1 else {}),
        "JAX_NUM_CPU_DEVICES": str(spec.devices_per_process),
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS") or "cpu",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _argv(spec: RunSpec) -> list[str]:
    """The command, with this very interpreter where it is our own: `dreamer4` need not be on PATH."""
    command = spec.command()
    return [sys.executable, "-m", "dreamer4_jax.cli", *command[1:]] if command[0] == "dreamer4" else command


def _cause(process: int, code: int) -> str:
    end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"process {process} {end}"


class _Processes:
    """One attempt: the processes, the signals that are passed on to them, and the output of process 0."""

    def __init__(self, spec: RunSpec, logs: Path, show: bool):
        self.stopped = False  # somebody asked for the end
        self._spec, self._logs = spec, logs
        self._prefix = "[0] " if spec.processes > 1 else ""
        self._children: list[subprocess.Popen] = []
        self._tail: BinaryIO | None = None
        if show:
            path = logs / "process-0.log"
            path.touch()
            self._tail = path.open("rb")
            self._tail.seek(0, os.SEEK_END)
        self._handlers: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._handlers = {s: signal.signal(s, self._pass_on) for s in (signal.SIGTERM, signal.SIGINT)}

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *error: object) -> None:
        for child in self._children:
            if child.poll() != 0:
                # The whole session: data workers of a process that was killed would stay.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._tail:
            self._show(rest=True)
            self._tail.close()

    def run(self) -> tuple[int, str]:
        """Starts them and waits for all; returns the exit code that counts, and whose it was.

        That is the code of the first that failed: the others fail because of it. Of several at once the retryable one.
        """
        self._start()
        code, cause, deadline, term = 0, "", 0.0, False
        for ended in self._endings():
            failed = [(i, c) for i, c in ended if c]
            if failed and not code:
                first, code = next(((i, c) for i, c in failed if retryable(c)), failed[0])
                cause, deadline = _cause(first, code), time.monotonic() + GRACE_S
            if code and time.monotonic() > deadline:
                self._signal(signal.SIGKILL if term else signal.SIGTERM)
                term, deadline = True, time.monotonic() + KILL_S
        return code, cause

    def _start(self) -> None:
        coordinator = f"127.0.0.1:{_free_port()}"
        inherited = {key: value for key, value in os.environ.items() if key not in PLACE}
        for i in range(self._spec.processes):
            with (self._logs / f"process-{i}.log").open("ab") as log:
                child = subprocess.Popen(
                    _argv(self._spec),
                    env={**inherited, "PYTHONUNBUFFERED": "1", **_environment(self._spec, i, coordinator)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # the terminal's Ctrl-C comes from us alone, once
                )
            self._children.append(child)
        if self.stopped:  # while they were started
            self._signal(signal.SIGTERM)

    def _endings(self) -> Iterator[list[tuple[int, int]]]:
        """At each look, who has ended since the last and how; until nobody is left."""
        running = dict(enumerate(self._children))
        while running:
            time.sleep(POLL_S)
            self._show()
            ended = [(i, code) for i, child in running.items() if (code := child.poll()) is not None]
            for i, _ in ended:
                del running[i]
            yield ended

    def _show(self, *, rest: bool = False) -> None:
        """New whole lines of process 0, on the terminal; with `rest` also a line that has no end."""
        if self._tail is None:
            return
        start = self._tail.tell()
        text = self._tail.read()
        whole = text if rest else text[: text.rfind(b"\n") + 1]
        self._tail.seek(start + len(whole))
        for line in whole.decode(errors="replace").splitlines():
            print(f"{self._prefix}{line}", flush=True)

    def _signal(self, number: int) -> None:
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)

    def _pass_on(self, number: int, frame: object) -> None:
        self.stopped = True
        self._signal(number)
