"""Interrupts runs at random until the end is the same all the same: SIGTERM and kill -9 to processes of a local launch.

    python -m launch.endurance --trials 20                 # quickstart at smoke size, 2 processes of 4 devices
    python -m launch.endurance --trials 2 --events 4       # fewer runs, more interruptions in each

First one run that nobody disturbs; then trials of the same command, each disturbed `--events` times at random moments,
by SIGTERM or SIGKILL to a random process by turns. A trial passes if its launcher ends with 0 and all parameters of all
phases equal the undisturbed run bit for bit. Writes <out>/endurance.json; a trial that failed keeps its run directory.
Needs a Unix `ps`.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from dreamer4_jax.cli import PHASES
from dreamer4_jax.training.metrics import write_atomic


def command(args: argparse.Namespace, name: str) -> list[str]:
    """The launcher's command line of one run."""
    return [
        *(sys.executable, "-m", "dreamer4_jax.cli", "launch", args.experiment, "--smoke", "--backend", "local"),
        *("--name", name, "--output", str(args.out), "--retries", str(3 * args.events + 3)),
        *("--processes", str(args.processes), "--devices-per-process", str(args.devices_per_process)),
        *args.overrides,
    ]


def children(pid: int) -> list[int]:
    """Processes that `pid` has started and that have not ended."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True)
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [int(row[0]) for row in rows if int(row[1]) == pid and not row[2].startswith("Z")]


def disturb(launcher: subprocess.Popen, rng: random.Random, events: int, within_s: float) -> list[dict[str, Any]]:
    """Sends the signals, at moments spread over the time that an undisturbed run takes; returns what was sent."""
    began, done = time.monotonic(), []
    for i, moment in enumerate(sorted(rng.uniform(0.05, 0.95) * within_s for _ in range(events))):
        while time.monotonic() - began < moment and launcher.poll() is None:
            time.sleep(0.05)
        victims = children(launcher.pid)
        while not victims and launcher.poll() is None:  # between two attempts
            time.sleep(0.05)
            victims = children(launcher.pid)
        if launcher.poll() is not None:
            break
        number = (signal.SIGTERM, signal.SIGKILL)[i % 2]
        victim = rng.choice(victims)
        try:
            os.kill(victim, number)
        except ProcessLookupError:  # it has just ended by itself
            continue
        sent = {"signal": number.name, "process": victims.index(victim), "after_s": round(time.monotonic() - began, 1)}
        done.append(sent)
    return done


def parameters(run: Path) -> dict[str, np.ndarray]:
    """The arrays of all finished phases of a run by path."""
    import jax

    from dreamer4_jax.config import Config, from_dict
    from dreamer4_jax.runner import Run

    config = from_dict(Config, json.loads((run / "config.json").read_text()))
    opened, out = Run(config, run, resume=True, progress=False), {}
    for phase in PHASES:
        for path, leaf in jax.tree_util.tree_leaves_with_path(opened.model(phase)):
            out[phase + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return out


def differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """Names of the arrays that are not equal bit for bit."""
    return [
        name for name in a.keys() | b.keys() if name not in a or name not in b or not np.array_equal(a[name], b[name])
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="quickstart")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--events", type=int, default=2, help="interruptions of each trial (2)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices-per-process", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--out", type=Path, default=Path("runs/endurance"))
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Every restart compiles the same programs again: kept, since all runs are on one machine.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((args.out / "compiled").absolute()))
    whole, began = args.out / "undisturbed", time.monotonic()
    subprocess.run([*command(args, whole.name)], check=True)
    seconds = time.monotonic() - began
    expected, rng = parameters(whole), random.Random(args.seed)
    trials: list[dict[str, Any]] = []
    while len(trials) < args.trials:
        i = len(trials)
        name, began = f"trial-{i}", time.monotonic()
        shutil.rmtree(args.out / name, ignore_errors=True)
        launcher = subprocess.Popen(command(args, name), stdout=subprocess.DEVNULL)
        sent = disturb(launcher, rng, args.events, seconds)
        code = launcher.wait()
        if code == 0 and len(sent) < args.events:  # compiled programs are kept, so a trial is faster than the first run
            seconds = min(time.monotonic() - began, 0.8 * seconds)
            print(f"trial {i}: over before it was disturbed {args.events} times; again, with moments closer together")
            continue
        wrong = differing(expected, parameters(args.out / name)) if code == 0 else ["(the launcher failed)"]
        trials.append(
            {"sent": sent, "code": code, "seconds": round(time.monotonic() - began, 1), "differing": wrong[:5]}
        )
        print(f"trial {i}: {'equal' if not wrong else 'DIFFERENT: ' + ', '.join(wrong[:3])} after {sent}", flush=True)
        if not wrong:
            shutil.rmtree(args.out / name)
        passed = sum(not t["differing"] for t in trials)
        report = {"command": " ".join(command(args, "NAME")[2:]), "undisturbed_s": round(seconds, 1)}
        report |= {"seed": args.seed, "passed": f"{passed} of {len(trials)}", "trials": trials}
        write_atomic(args.out / "endurance.json", json.dumps(report, indent=1) + "\n")
    print(f"{passed} of {len(trials)} trials ended as the undisturbed run did")
    return 0 if passed == len(trials) else 1


if __name__ == "__main__":
    sys.exit(main())
