"""The local backend: real processes that play a run in a few lines of Python."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreamer4_jax.config import ConfigError
from launch import local
from launch.spec import RunSpec

# What every process of a test begins with. `tries` counts its starts; -IS makes Python start in no time.
BEGIN = """
import json, os, signal, sys, time
me = os.environ.get("DREAMER4_PROCESS_ID", "0")
with open(f"tries-{me}", "a") as file:
    file.write("x")
tries = os.path.getsize(f"tries-{me}")
"""


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Runs processes that execute a script; returns the exit code of the launcher."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "KILL_S", 0.3)

    def run(script: str, *, processes: int = 2, retries: int = 3, show: bool = False, grace_s=30.0, **fields) -> int:
        monkeypatch.setattr(local, "GRACE_S", grace_s)
        monkeypatch.setattr(RunSpec, "command", lambda self: [sys.executable, "-ISuc", BEGIN + script])
        return local.run(RunSpec("a", processes=processes, retries=retries, **fields), log_to_terminal=show)

    return run


def tries(process: int) -> int:
    return len(Path(f"tries-{process}").read_text())


def log(process: int) -> str:
    return Path(f"runs/a/logs/process-{process}.log").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# What a process is told, and what is shown

TELL = "print(json.dumps({key: os.environ[key] for key in os.environ if key.startswith(('DREAMER4_', 'JAX_'))}))"


def test_processes_are_told_their_place(play, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    for name in ("JAX_PLATFORMS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):
        monkeypatch.delenv(name, raising=False)
    assert play(TELL, processes=3, devices_per_process=4) == 0
    told = [json.loads(log(i)) for i in range(3)]
    assert [one.pop("DREAMER4_PROCESS_ID") for one in told] == ["0", "1", "2"]
    assert told[0] == told[1] == told[2]
    host, _, port = told[0].pop("DREAMER4_COORDINATOR").partition(":")
    assert host == "127.0.0.1" and 1024 < int(port) < 65536
    assert told[0] == {"DREAMER4_PROCESSES": "3", "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}


def test_one_process_is_told_no_place_and_keeps_a_platform_that_is_set(play, monkeypatch):
    for name in local.PLACE:  # left from a run that launches this one
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    assert play(TELL, processes=1, devices_per_process=2) == 0
    assert json.loads(log(0)) == {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cuda"}


def test_output_of_process_0_is_shown_and_all_of_it_is_kept(play, capsys):
    assert play("print('of', me); print('error', file=sys.stderr); sys.stdout.write('no end')", show=True) == 0
    assert capsys.readouterr().out == "[0] of 0\n[0] error\n[0] no end\n"
    assert log(0) == "of 0\nerror\nno end" and log(1) == "of 1\nerror\nno end"
    assert play("print('alone')", processes=1, show=True) == 0
    assert capsys.readouterr().out == "alone\n"
    assert play("print('silent')", processes=1) == 0
    assert capsys.readouterr().out == "" and log(0).endswith("silent\n")


# ---------------------------------------------------------------------------------------------------------------------
# How it ends


@pytest.mark.parametrize("end", ["sys.exit(42)", "os.kill(os.getpid(), signal.SIGKILL)", "os.abort()"])
def test_interruptions_are_answered_by_a_restart(play, end, capfd):
    assert play(f"if tries < 3: {end}", show=True) == 0
    assert tries(0) == tries(1) == 3
    assert "restart 2 of 3" in capfd.readouterr().err


@pytest.mark.parametrize("end, code", [("sys.exit(42)", 42), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_retries_end(play, end, code):
    assert play(end, processes=1, retries=2) == code
    assert tries(0) == 3


def test_mistakes_are_not_repeated(play, capfd):
    assert play("sys.exit(2)", show=True) == 2
    assert tries(0) == tries(1) == 1
    assert "ended with exit code 2; its output is in runs/a/logs" in capfd.readouterr().err


def test_the_others_are_ended_when_one_has_died(play):
    # process 1 dies of a mistake, process 0 waits for it for ever and hears no SIGTERM
    begin = time.monotonic()
    script = "if me == '1': sys.exit(3)\nsignal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    assert play(script, grace_s=0.3) == 3
    assert time.monotonic() - begin < 50


def test_the_first_failure_counts_not_what_follows_from_it(play):
    # a killed process is resumed, although the other ends with an error of its own when it misses it
    killed = "if me == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0.2); sys.exit(1)"
    assert play(f"if tries == 1:\n  {killed.replace(chr(10), chr(10) + '  ')}") == 0
    assert tries(0) == tries(1) == 2
    # and an error is not repeated, although the other is killed for it
    assert play("if me == '0': sys.exit(1)\ntime.sleep(60)", grace_s=1.0) == 1
    assert tries(0) == tries(1) == 3


def test_a_process_may_finish_before_the_others(play):
    assert play("if me == '1': time.sleep(0.5)", grace_s=0.1) == 0  # nobody has failed


def test_nothing_is_left_behind(play):
    # a data worker, in the session of its process
    script = (
        "pid = os.fork()\nif pid == 0: time.sleep(60)\nprint(pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert play(script, processes=1, retries=0) == 137
    worker = int(log(0))
    end = time.monotonic() + 30
    while time.monotonic() < end and alive(worker):
        time.sleep(0.02)
    assert not alive(worker)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not yet waited for by anybody does not."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(done.stdout.strip()) and not done.stdout.startswith("Z")


SAVE = """
def save(*_):
    print("saved", flush=True)
    sys.exit(42)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
open(f"ready-{me}", "w").close()
time.sleep(60)
"""
LAUNCHER = """
import sys
from launch import local
from launch.spec import RunSpec
RunSpec.command = lambda self: [sys.executable, "-ISc", sys.argv[1]]
sys.exit(local.run(RunSpec("a", processes=2)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_all_and_nothing_is_restarted(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, BEGIN + SAVE], env=env)
    end = time.monotonic() + 30
    while not (Path("ready-0").exists() and Path("ready-1").exists()):
        assert launcher.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    launcher.send_signal(number)
    assert launcher.wait(timeout=30) == 42
    assert tries(0) == tries(1) == 1 and log(0) == log(1) == "saved\n"


def test_the_real_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # `dreamer4` need not be there
    assert local.run(RunSpec("a", experiment="nothing"), log_to_terminal=False) == 2
    assert "dreamer4: unknown experiment or preset 'nothing'" in log(0)


def test_a_bucket_is_refused():
    with pytest.raises(ConfigError, match="gs://b/r: a local run writes into a directory"):
        local.run(RunSpec("a", output="gs://b/r"))
