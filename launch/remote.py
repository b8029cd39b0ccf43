"""What a TPU VM's shell is told: set up, run, status, logs, stop. Plain POSIX shell, the same on every worker.

A run belongs to the machine, not to the connection: it goes on when ssh is cut or the laptop is closed. The run holds
``run.lock`` while it lasts, so that it is never started twice; starting it again follows the one that is there.

In ``~/dreamer4`` of each worker: the code, ``.venv``, ``run.lock``, ``run.pid``, ``run.log``, ``run.exit`` (its exit
code) and ``run.stopped`` (somebody asked for the end).
"""

import shlex
from collections.abc import Sequence

CODE = "dreamer4.tar.gz"  # in the home directory
PYTHON = "3.11"  # TPU VMs come with 3.10; the releases of constraints.txt were tested with this one
STOPPED = 43  # exit code of `run` after `stop`: not an interruption that should be answered by a restart

_ENTER = "cd ~/dreamer4 || exit 1"
_IDLE = "flock -n run.lock true"


def install() -> list[str]:
    """Commands that make .venv from the code in the working directory, on a machine that has Python and pip."""
    return [
        "python3 -m pip install --quiet --user uv",
        f"python3 -m uv venv --quiet --allow-existing --python {PYTHON} .venv",
        "python3 -m uv pip install --quiet --python .venv/bin/python -c constraints.txt -e '.[tpu]'",
    ]


def fetch(archive: str) -> list[str]:
    """Commands that unpack the code in the working directory: from ``gs://``, or, if empty, as copied here before."""
    copy = [f"gcloud storage cp {shlex.quote(archive)} ~/{CODE}"] if archive else []
    return [*copy, f"tar -xzf ~/{CODE}"]


def setup(archive: str = "") -> str:
    """Unpacks the code and installs it, unless a run goes on here."""
    return "\n".join(
        [
            "set -e",
            "mkdir -p ~/dreamer4",
            "cd ~/dreamer4",
            f"{_IDLE} || exit 0  # a run that goes on keeps its code",
            *fetch(archive),
            *install(),
        ]
    )


def run(command: Sequence[str]) -> str:
    """Starts the run unless it goes on already, shows its output from the beginning, ends with its exit code."""
    inner = "\n".join(
        [
            f"{shlex.join(['.venv/bin/' + command[0], *command[1:]])} &",
            "echo $! > run.pid",
            "wait $!",
            "echo $? > run.exit",
        ]
    )
    return "\n".join(
        [
            _ENTER,
            f"if {_IDLE}; then",
            "  rm -f run.pid run.exit run.stopped",
            # -o: data workers must not inherit the lock, which would outlive the run with them
            f"  nohup flock -o run.lock sh -c {shlex.quote(inner)} > run.log 2>&1 < /dev/null &",
            "  while [ ! -s run.pid ]; do sleep 0.1; done",
            "fi",
            'tail -n +1 -f --pid="$(cat run.pid)" run.log',
            "flock run.lock true  # until the exit code is written",
            f"[ ! -e run.stopped ] || exit {STOPPED}",
            'exit "$(cat run.exit || echo 137)"',
        ]
    )


def status() -> str:
    """Whether the run goes on or how it ended, and the end of its output."""
    ended = 'echo "ended with exit code $(cat run.exit)"'
    return "\n".join([_ENTER, f"if {_IDLE}; then {ended}; else echo running; fi", "tail -n 3 run.log"])


def logs() -> str:
    """The output of the run, as it grows."""
    return "\n".join([_ENTER, "tail -n 100 -f run.log"])


def stop() -> str:
    """Asks the run to save and end, and waits until it has."""
    return "\n".join(
        [
            _ENTER,
            f"if {_IDLE}; then echo 'no run goes on'; exit 0; fi",
            "touch run.stopped",
            'kill -TERM "$(cat run.pid)"',
            "flock run.lock true",
            'echo "ended with exit code $(cat run.exit)"',
        ]
    )
