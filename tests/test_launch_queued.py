"""The life of a queued resource, against a stand-in `gcloud` that keeps a transcript and plays scripted states."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dreamer4_jax.config import UserError
from launch import cloud as cloud_module
from launch import queued, remote, render
from launch.cloud import Cloud, CommandFailed
from launch.spec import RunSpec

# Each describe plays the next of `states`, each connection and each run the next exit code; the last one stays.
GCLOUD = """#!{python} -IS
import json, os, sys
here = os.path.dirname(sys.argv[0])
argv = sys.argv[1:]
with open(here + "/transcript", "a") as file:
    print(json.dumps(argv), file=file)
with open(here + "/play") as file:
    play = json.load(file)
def next_of(name):
    value = play[name].pop(0) if len(play[name]) > 1 else play[name][0]
    with open(here + "/play", "w") as file:
        json.dump(play, file)
    return value
verb = argv[3]
if verb == "describe":
    state = next_of("states")
    if state is None:
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
    if state == "DENIED":
        sys.exit("WARNING: something\\nERROR: PERMISSION_DENIED: no role tpu.viewer")
    error = {{"failedData": {{"error": {{"message": "no quota"}}}}}} if state == "FAILED" else {{}}
    short = "--format=value(state.state)" in argv
    print(state if short else json.dumps({{"name": "x", "state": {{"state": state, **error}}}}))
elif verb == "ssh":
    command = argv[-1] if argv[-1].startswith("--command=") else argv[-2]
    if command == "--command=true":
        sys.exit(next_of("connections"))
    if "nohup" in command:
        print("step 1")
        sys.exit(next_of("runs"))
"""

SPEC = RunSpec(
    "mine", accelerator="v5litepod-16", spot=True, retries=3, output="gs://b/runs", archive="gs://b/c.tar.gz"
)


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """Puts the stand-in on PATH; returns a function that sets what it plays and one that returns its transcript."""
    here = tmp_path / "bin"
    here.mkdir()
    tool = here / "gcloud"
    tool.write_text(GCLOUD.format(python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(here), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)

    def play(states, runs=(0,), connections=(0,)):
        (here / "transcript").write_text("")
        (here / "play").write_text(
            json.dumps({"states": list(states), "runs": list(runs), "connections": list(connections)})
        )

    def transcript() -> list[list[str]]:
        return [["gcloud", *json.loads(line)] for line in (here / "transcript").read_text().splitlines()]

    play.transcript = transcript
    return play


def verbs(transcript: list[list[str]]) -> list[str]:
    """The transcript in words: what each command was for."""
    names = {
        tuple(render.create(SPEC)): "create",
        tuple(render.delete(SPEC)): "delete",
        tuple(render.warm_up(SPEC)): "connect",
        tuple(render.run(SPEC)): "run",
        tuple(render.set_up(SPEC)[0]): "set up",
    }
    found = [names.get(tuple(argv), argv[4]) for argv in transcript]
    return [name for name in found if name != "describe"]


def launch(spec=SPEC) -> int:
    return queued.launch(spec, Cloud(), poll_s=0)


def test_a_life_without_incident_is_the_plan(gcloud):
    gcloud([None, "ACTIVE"])
    assert launch() == 0
    assert gcloud.transcript() == queued.plan(SPEC)
    assert verbs(queued.plan(SPEC)) == ["create", "connect", "set up", "run", "delete"]


def test_waits_for_resources(gcloud, capsys):
    gcloud([None, "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    assert launch() == 0
    err = capsys.readouterr().err
    assert err.count("WAITING_FOR_RESOURCES") == 1 and err.count("PROVISIONING") == 1


def test_a_local_checkout_is_packed_and_copied(gcloud, tmp_path):
    checkout = Path(__file__).parents[1]
    spec = RunSpec("mine", accelerator="v5litepod-16", output="gs://b/runs", archive=str(checkout))
    gcloud([None, "ACTIVE"])
    assert launch(spec) == 0
    (copy,) = [argv for argv in gcloud.transcript() if argv[4] == "scp"]
    assert copy[5:7] == ["build/launch/mine.tar.gz", "mine:dreamer4.tar.gz"]
    names = subprocess.run(["tar", "-tzf", copy[5]], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {"pyproject.toml", "constraints.txt", "dreamer4_jax/cli.py", "experiments/quickstart.py"} <= set(names)
    assert not any("__pycache__" in name or name.startswith((".", "tests", "experiments/results")) for name in names)


def test_pre_emption_is_answered_by_recreation_and_resume(gcloud, capsys):
    # taken away during the run: ssh is lost, the request goes to SUSPENDING, then SUSPENDED
    gcloud([None, "ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "PROVISIONING", "ACTIVE"], runs=[255, 0])
    assert launch() == 0
    assert verbs(gcloud.transcript()) == [
        *("create", "connect", "set up", "run"),
        *("delete", "create", "connect", "set up", "run", "delete"),
    ]
    first, second = [argv for argv in gcloud.transcript() if argv == render.run(SPEC)]
    assert first == second and "--resume" in first[-2] + first[-1]
    assert "restart 1 of 3" in capsys.readouterr().err


def test_pre_emption_while_it_is_set_up(gcloud):
    gcloud([None, "ACTIVE", "SUSPENDED", "SUSPENDED", "SUSPENDED", "ACTIVE"], connections=[1, 0])
    assert launch() == 0
    assert verbs(gcloud.transcript()) == [
        *("create", "connect", "delete", "create"),
        *("connect", "set up", "run", "delete"),
    ]


def test_pre_emption_before_anything(gcloud):
    gcloud([None, "PROVISIONING", "SUSPENDED", "SUSPENDED", "ACTIVE"])
    assert launch() == 0
    assert verbs(gcloud.transcript())[:3] == ["create", "delete", "create"]


def test_an_interruption_on_machines_that_stay_is_resumed_there(gcloud):
    gcloud([None, "ACTIVE"], runs=[42, 137, 0])
    assert launch() == 0
    assert verbs(gcloud.transcript()).count("create") == 1 and verbs(gcloud.transcript()).count("run") == 3


def test_retries_end(gcloud, capsys):
    gcloud([None, "ACTIVE"], runs=[42])
    assert launch() == 42
    assert verbs(gcloud.transcript()).count("run") == 4 and "delete" not in verbs(gcloud.transcript())
    assert "--retries 3" in capsys.readouterr().err


@pytest.mark.parametrize("code, returned", [(2, 2), (1, 1), (remote.STOPPED, 42)])
def test_mistakes_and_stops_are_not_repeated_and_keep_the_machines(gcloud, capsys, code, returned):
    gcloud([None, "ACTIVE"], runs=[code])
    assert launch() == returned
    assert verbs(gcloud.transcript()) == ["create", "connect", "set up", "run"]
    assert "cost money" in capsys.readouterr().err


def test_a_failed_request_says_why(gcloud):
    gcloud([None, "WAITING_FOR_RESOURCES", "FAILED"])
    with pytest.raises(UserError, match="mine: the request FAILED: no quota"):
        launch()
    assert verbs(gcloud.transcript()) == ["create"]


def test_a_deleted_request_is_not_asked_for_again(gcloud):
    gcloud([None, "WAITING_FOR_RESOURCES", None])
    with pytest.raises(UserError, match="deleted by somebody else"):
        launch()


@pytest.mark.parametrize(
    "state, begins", [("ACTIVE", []), ("FAILED", ["delete", "create"]), ("SUSPENDED", ["delete", "create"])]
)
def test_what_is_there_already_is_taken_up(gcloud, state, begins):
    gcloud([state, "ACTIVE"])
    assert launch() == 0
    assert verbs(gcloud.transcript()) == [*begins, "connect", "set up", "run", "delete"]


def test_machines_that_let_nobody_in_yet(gcloud, monkeypatch):
    monkeypatch.setattr(queued, "SSH_TRIES", 3)
    gcloud([None, "ACTIVE"], connections=[255, 255, 0])
    assert launch() == 0
    gcloud([None, "ACTIVE"], connections=[255])
    with pytest.raises(CommandFailed, match="exit code 255"):
        launch()


def test_an_error_of_gcloud_ends_with_what_it_said(gcloud):
    gcloud(["DENIED"])
    with pytest.raises(UserError, match="(?s)describe: exit code 1.*PERMISSION") as error:
        launch()
    assert "WARNING" in str(error.value)


def test_actions(gcloud, capfd):
    gcloud(["ACTIVE"])
    actions = ("status", remote.status(), False), ("logs", remote.logs(), False), ("stop", remote.stop(), True)
    for action, command, everywhere in actions:
        assert queued.act(action, SPEC, Cloud()) == 0
        assert gcloud.transcript()[-1] == render.ssh(SPEC, command, everywhere=everywhere)
    assert capfd.readouterr().out.startswith("mine: ACTIVE")
    assert queued.act("delete", SPEC, Cloud()) == 0
    assert gcloud.transcript()[-1] == render.delete(SPEC)
    gcloud([None])
    assert queued.act("status", SPEC, Cloud()) == 0
    assert "no such request" in capfd.readouterr().out


def test_dry_run_runs_nothing(gcloud, capsys):
    gcloud(["DENIED"])
    assert queued.launch(SPEC, Cloud(dry_run=True)) == 0
    assert gcloud.transcript() == [] and capsys.readouterr().out.count("gcloud compute") == 7


def test_a_missing_tool_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for tool in cloud_module._INSTALL:
        with pytest.raises(UserError, match=f"{tool}: not found; install"):
            Cloud().show([tool, "x"])


# ---------------------------------------------------------------------------------------------------------------------
# The shell of a TPU VM

needs_linux = pytest.mark.skipif(not shutil.which("flock"), reason="the scripts are for TPU VMs, which have flock")


@pytest.fixture
def vm(tmp_path):
    """A home directory whose `dreamer4` is a shell script; returns a function that starts one of the scripts."""
    home = tmp_path / "home"
    (home / "dreamer4" / ".venv" / "bin").mkdir(parents=True)

    def start(script: str, dreamer4: str = "") -> subprocess.Popen:
        tool = home / "dreamer4" / ".venv" / "bin" / "dreamer4"
        if dreamer4:
            tool.write_text(f"#!/bin/sh\n{dreamer4}\n")
            tool.chmod(0o755)
        return subprocess.Popen(
            ["bash", "-c", script], env={**os.environ, "HOME": str(home)}, stdout=subprocess.PIPE, text=True
        )

    start.home = home / "dreamer4"
    return start


@needs_linux
def test_vm_runs_and_gives_the_exit_code(vm):
    command = RunSpec("a", overrides=("x=a b\n$(id)'\"",)).command()
    process = vm(remote.run(command), 'printf "%s|" "$@"; exit 3')
    out, _ = process.communicate(timeout=120)
    assert out == "|".join([*command[1:], ""]) and process.returncode == 3
    assert "ended with exit code 3" in vm(remote.status()).communicate(timeout=120)[0]
    assert "no run goes on" in vm(remote.stop()).communicate(timeout=120)[0]


@needs_linux
def test_vm_outlives_the_connection_and_is_found_again(vm):
    slow = "echo begin; echo x >> starts; while [ ! -e go ]; do sleep 0.05; done; echo end; exit 7"
    first = vm(remote.run(["dreamer4"]), slow)
    assert first.stdout.readline() == "begin\n"
    first.send_signal(signal.SIGKILL)  # the connection is cut
    assert vm(remote.status()).communicate(timeout=120)[0] == "running\nbegin\n"
    assert vm(remote.setup()).wait(timeout=120) == 0  # leaves a running run's code alone: there is no archive to unpack
    second = vm(remote.run(["dreamer4"]))
    assert second.stdout.readline() == "begin\n"
    (vm.home / "go").touch()
    assert second.communicate(timeout=120)[0] == "end\n" and second.returncode == 7
    assert (vm.home / "starts").read_text() == "x\n"  # it was started once
    first.stdout.close()


@needs_linux
def test_vm_stops_with_a_code_of_its_own_and_can_be_resumed(vm):
    saves = "trap 'echo saved; exit 42' TERM; echo begin; while :; do sleep 0.05; done"
    process = vm(remote.run(["dreamer4"]), saves)
    assert process.stdout.readline() == "begin\n"
    assert vm(remote.stop()).communicate(timeout=120)[0] == "ended with exit code 42\n"
    assert process.communicate(timeout=120)[0] == "saved\n" and process.returncode == remote.STOPPED
    assert vm(remote.run(["dreamer4"]), "exit 0").wait(timeout=120) == 0


@needs_linux
def test_vm_run_that_is_killed_or_missing(vm):
    assert vm(remote.run(["dreamer4"]), "kill -9 $$").wait(timeout=120) == 137
    (vm.home / ".venv" / "bin" / "dreamer4").unlink()
    assert vm(remote.run(["dreamer4"])).wait(timeout=120) == 127
    assert (vm.home / "run.pid").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The plain scripts


def script(name: str, *words: str) -> subprocess.CompletedProcess:
    path = Path(__file__).parents[1] / "launch" / name
    settings = {"NAME": "mine", "ZONE": "z", "TYPE": "v6e-8", "RUNTIME": "r", "POLL": "0"}
    return subprocess.run(
        [str(path), *words], env={**os.environ, **settings}, capture_output=True, text=True, timeout=30
    )


def test_script_create(gcloud):
    gcloud(["ACTIVE"])
    assert script("tpu_create.sh", "--spot").returncode == 0
    create, describe = gcloud.transcript()
    assert create[4:] == [
        *("create", "mine", "--node-id=mine", "--zone=z", "--accelerator-type=v6e-8", "--runtime-version=r", "--spot")
    ]
    assert describe[4:] == ["describe", "mine", "--zone=z", "--format=value(state.state)"]


def test_script_run_quotes_safely(gcloud, tmp_path, monkeypatch):
    copy = tmp_path / "copy"  # it packs the checkout that it belongs to
    shutil.copytree(Path(__file__).parents[1] / "launch", copy / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt", "LICENSE", "README.md", "dreamer4_jax", "experiments"):
        (copy / name).touch()
    gcloud(["ACTIVE"])
    words = ["quickstart", "--run", "gs://b/r", "x=a b\n$(id)'\"\\", "y=*"]
    env = {**os.environ, "NAME": "mine", "ZONE": "z"}
    subprocess.run([str(copy / "launch" / "tpu_run.sh"), *words], env=env, check=True, cwd=tmp_path)
    command = gcloud.transcript()[-1][-1].removeprefix("--command=cd ~/dreamer4 && .venv/bin/dreamer4 run ")
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    assert shown.stdout.split("\0")[:-1] == words
    assert [argv[4] for argv in gcloud.transcript()] == ["ssh", "scp", "ssh", "ssh"]


def test_script_delete(gcloud):
    gcloud(["ACTIVE"])
    assert script("tpu_delete.sh").returncode == 0
    assert gcloud.transcript()[0][4:] == ["delete", "mine", "--zone=z", "--force", "--quiet"]
    assert (
        "NAME"
        in subprocess.run(
            [str(Path(__file__).parents[1] / "launch" / "tpu_delete.sh")],
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        ).stderr
    )
