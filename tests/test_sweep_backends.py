"""Sweeps whose trials run in the cloud, against stand-ins of its tools: they end as here, and nothing is left."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dreamer4_jax.cli import main
from dreamer4_jax.config import Config, UserError
from launch.algebra import product, values
from launch.backends import LIVES, Remote
from launch.process import Process, Trial
from launch.spec import RunSpec
from launch.sweep import SweepInterrupted, run
from launch.sweep_file import Sweep, trial_name
from launch.sweep_records import Records
from tests import cloud_stand_in, fake_backend
from tests.cloud_stand_in import left, transcript
from tests.test_sweep_run import LOSS, LR, SCORE, by_rate, grid, interrupt, meanwhile, start_sweep, until

WHERE = RunSpec(
    "sweep",
    "tiny",
    output="gs://b/sweeps/sweep",
    accelerator="v5litepod-16",
    archive="gs://b/c.tar.gz",
    image="gcr.io/p/dreamer4",
    cluster="c",
    retries=3,
)
BACKENDS = tuple(LIVES)


@pytest.fixture
def cloud(tmp_path, monkeypatch) -> Iterator[Path]:
    """A cloud of its own for the test; the sweep directory is `cloud.parent / "sweep"`."""
    here = tmp_path / "cloud"
    cloud_stand_in.install(here)
    (here / "bucket" / "b" / "sweeps").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(here), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    yield here
    for path in here.glob("*/pid"):  # of a test that failed
        with contextlib.suppress(ProcessLookupError):
            cloud_stand_in.end(path.parent, signal.SIGKILL)


def go(backend: str, sweep: Sweep, directory: Path, **options) -> Records:
    remote = Remote(backend, WHERE, follow=sweep.prune is not None, poll_s=0.05)
    return run(sweep, directory, backend=remote, poll=0.02, **{"jobs": 1, **options})


def plan(cloud: Path, **what) -> None:
    (cloud / "bucket" / "b" / "sweeps" / "plan.json").write_text(json.dumps(what))


def in_bucket(cloud: Path, rate: float) -> Path:
    spec = Remote("tpu", WHERE).spec(RunSpec(trial_name("tiny", {LR: rate})))
    return cloud / "bucket" / "b" / "sweeps" / "sweep" / spec.name


def steps(cloud: Path, rate: float) -> list[int]:
    path = in_bucket(cloud, rate) / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def starts(cloud: Path, *rates: float) -> list[int]:
    return [len((in_bucket(cloud, rate) / "starts").read_text()) for rate in rates]


@pytest.mark.parametrize("backend", BACKENDS)
def test_trials_end_as_they_do_here_and_nothing_is_left(backend, cloud, tmp_path):
    sweep, directory = grid(0.1, 0.2, 0.3), tmp_path / "sweep"
    plan(cloud, fail=[0.2])
    records = go(backend, sweep, directory, jobs=3)
    found = by_rate(directory)
    assert {rate: r["state"] for rate, r in found.items()} == {0.1: "finished", 0.2: "failed", 0.3: "finished"}
    assert found[0.2]["log"][-2:] == ["starting", "loss is not finite at 0.2"]  # of the run on its machine
    assert found[0.2]["code"] == (3 if backend == "tpu" else 1)
    for rate in (0.1, 0.3):
        copy = directory / found[rate]["name"]
        assert SCORE.value(copy) == (1 - rate, 0.9 - rate, 1.1 - rate)
        assert (copy / "metrics.jsonl").read_bytes() == (in_bucket(cloud, rate) / "metrics.jsonl").read_bytes()
    assert records.count("finished") == 2 and left(cloud) == []

    plan(cloud)
    commands = len(transcript(cloud))
    assert go(backend, sweep, directory).count("finished") == 3
    assert starts(cloud, 0.1, 0.2, 0.3) == [1, 2, 1] and steps(cloud, 0.2) == list(range(1, fake_backend.STEPS + 1))
    assert left(cloud) == []
    others = {in_bucket(cloud, rate).name for rate in (0.1, 0.3)}
    assert not any(name in " ".join(argv) for argv in transcript(cloud)[commands:] for name in others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_trial_saves_gives_back_its_machines_and_goes_on(backend, cloud, tmp_path):
    sweep, directory = grid(0.1, 0.2), tmp_path / "sweep"
    plan(cloud, wait={"0.2": 4})
    with meanwhile(lambda: steps(cloud, 0.2)[-1:] == [4], interrupt), pytest.raises(SweepInterrupted, match="1 of 2"):
        go(backend, sweep, directory)
    assert by_rate(directory)[0.2]["state"] == "interrupted" and by_rate(directory)[0.2]["code"] == 42
    assert left(cloud) == []
    # SkyPilot takes the machines without a word; the others are told and save.
    ended = (cloud / in_bucket(cloud, 0.2).name / "exit").read_text()
    assert ended == ("137" if backend == "skypilot" else "42")
    plan(cloud)
    assert go(backend, sweep, directory).count("finished") == 2
    assert starts(cloud, 0.1, 0.2) == [1, 2] and steps(cloud, 0.2) == list(range(1, fake_backend.STEPS + 1))
    assert left(cloud) == []


def kill_all(root: int, but: int) -> None:
    """kill -9 to a process and all below it, none of which sees another one die."""
    stopped: set[int] = set()
    while True:
        lines = subprocess.run(
            ["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        parents = dict(map(int, line.split()) for line in lines[1:])
        found = {root}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        if not (new := found - stopped - {but}):
            break
        for pid in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        stopped |= new
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_dead_machine_left_is_found_and_followed(backend, cloud, tmp_path):
    """kill -9 to the sweep and its trial at once, as when a laptop's battery ends: the run goes on, and is found."""
    directory = tmp_path / "sweep"
    plan(cloud, wait={"0.2": 4})
    with start_sweep(tmp_path, f"test_sweep_backends:{backend!r}, grid(0.2), Path({str(directory)!r})") as process:
        until(lambda: steps(cloud, 0.2)[-1:] == [4])
        kill_all(process.pid, but=int((cloud / in_bucket(cloud, 0.2).name / "pid").read_text()))
    assert left(cloud) == [in_bucket(cloud, 0.2).name]
    commands = len(transcript(cloud))

    def followed() -> bool:
        return (cloud / in_bucket(cloud, 0.2).name / "found").exists() or len(transcript(cloud)) > commands + 8

    with meanwhile(followed, (cloud / "bucket" / "b" / "sweeps" / "go").touch):
        assert go(backend, grid(0.2), directory).count("finished") == 1
    assert starts(cloud, 0.2) == [1] and left(cloud) == []


def test_a_killed_sweep_stops_its_trials(cloud, tmp_path):
    directory = tmp_path / "sweep"
    plan(cloud, wait={"0.2": 4})
    with start_sweep(tmp_path, f"test_sweep_backends:'tpu', grid(0.2), Path({str(directory)!r})"):
        until(lambda: steps(cloud, 0.2)[-1:] == [4])
    until(lambda: left(cloud) == [])
    assert (cloud / in_bucket(cloud, 0.2).name / "exit").read_text() == "42"


def test_machines_that_are_asked_for_are_given_back(cloud, tmp_path):
    """A request that is under way takes effect, whatever becomes of the command that made it."""
    (cloud / "slow").touch()
    with meanwhile((cloud / "asked").exists, interrupt), pytest.raises(SweepInterrupted, match="0 of 1"):
        go("tpu", grid(0.1), tmp_path / "sweep")
    time.sleep(2 * cloud_stand_in.SLOW)
    assert left(cloud) == [] and not in_bucket(cloud, 0.1).exists()


def test_told_to_end_twice_it_is_removed_without_having_saved(cloud, tmp_path):
    trial = Trial({LR: 0.2}, RunSpec(trial_name("tiny", {LR: 0.2}), overrides=(f"{LR}=0.2",), output="sweep"), Config())
    plan(cloud, wait={"0.2": 4})
    (cloud / "deaf").touch()
    process = Process(trial, Remote("tpu", WHERE, poll_s=0.05), tmp_path / "log.txt")
    until(lambda: steps(cloud, 0.2)[-1:] == [4])
    process.stop()
    until(lambda: any("kill -TERM" in argv[-1] for argv in transcript(cloud)))
    assert process.exit_code is None and left(cloud) == [in_bucket(cloud, 0.2).name]
    process.stop(grace=0)
    until(lambda: process.exit_code is not None)
    assert process.exit_code == 42 and left(cloud) == []
    assert (cloud / in_bucket(cloud, 0.2).name / "exit").read_text() == "137"
    assert "told to end a second time" in (tmp_path / "log.txt").read_text()


def test_a_jobset_that_failed_when_nobody_looked_is_made_anew(cloud, tmp_path):
    room = cloud / in_bucket(cloud, 0.1).name
    room.mkdir()
    for name, text in {"state": "JOBSET", "pid": "0", "exit": "1"}.items():
        (room / name).write_text(text)
    assert go("jobset", grid(0.1), tmp_path / "sweep").count("finished") == 1
    verbs = [argv[1] for argv in transcript(cloud) if argv[0] == "kubectl"]
    assert verbs.index("delete") < verbs.index("create") and left(cloud) == []


def test_a_jobset_that_somebody_else_removed_is_said(cloud, tmp_path):
    plan(cloud, wait={"0.2": 4})
    room = cloud / in_bucket(cloud, 0.2).name

    def remove() -> None:
        (room / "state").unlink()
        cloud_stand_in.end(room, signal.SIGKILL)

    with meanwhile(lambda: steps(cloud, 0.2)[-1:] == [4] and (room / "state").exists(), remove):
        go("jobset", grid(0.2), tmp_path / "sweep")
    assert by_rate(tmp_path / "sweep")[0.2]["state"] == "failed"
    assert "removed by somebody else" in by_rate(tmp_path / "sweep")[0.2]["log"][-1]


def test_a_managed_job_that_somebody_else_cancelled_is_not_a_failure(cloud, tmp_path):
    plan(cloud, wait={"0.2": 4})
    room = cloud / in_bucket(cloud, 0.2).name

    def cancel() -> None:
        (room / "state").write_text("CANCELLED")
        cloud_stand_in.end(room, signal.SIGKILL)

    with meanwhile(lambda: steps(cloud, 0.2)[-1:] == [4] and (room / "job").exists(), cancel):
        with pytest.raises(SweepInterrupted, match="1 trials were interrupted"):
            go("skypilot", grid(0.2), tmp_path / "sweep")
    assert by_rate(tmp_path / "sweep")[0.2]["state"] == "interrupted"
    plan(cloud)
    assert go("skypilot", grid(0.2), tmp_path / "sweep").count("finished") == 1
    assert steps(cloud, 0.2) == list(range(1, fake_backend.STEPS + 1)) and left(cloud) == []


def test_a_bad_trial_is_judged_by_what_is_copied_and_stopped(cloud, tmp_path):
    directory, rates = tmp_path / "sweep", (0.1, 0.2, 0.3, 0.4, 0.9)
    plan(cloud, wait={"0.9": 9})
    sweep = grid(*rates, prune=LOSS)
    sweep = replace(sweep, grid=tuple(product(list(sweep.grid), values("train.dynamics.steps", fake_backend.STEPS))))
    go("tpu", sweep, directory)
    states = {rate: record["state"] for rate, record in by_rate(directory).items()}
    assert states == dict.fromkeys(rates, "finished") | {0.9: "pruned"}
    assert left(cloud) == []
    pruned = directory / by_rate(directory)[0.9]["name"]
    assert LOSS.curve(pruned) and not (pruned / "results.json").exists()


@pytest.mark.parametrize("verbs", ["create", "describe delete rsync", "rsync rsync rsync"])
def test_a_network_that_is_gone_for_a_while_ends_nothing(verbs, cloud, tmp_path):
    (cloud / "broken").write_text(verbs)
    assert go("tpu", grid(0.1), tmp_path / "sweep").count("finished") == 1
    assert starts(cloud, 0.1) == [1] and left(cloud) == [] and (cloud / "broken").read_text() == ""
    assert "the network was gone; once more in" in next((tmp_path / "sweep" / "logs").iterdir()).read_text()


def test_machines_that_could_not_be_given_back_are_named(cloud, tmp_path):
    (cloud / "broken").write_text("delete " * 99)
    assert go("tpu", grid(0.1), tmp_path / "sweep").count("failed") == 1
    (name,) = left(cloud)
    log = by_rate(tmp_path / "sweep")[0.1]["log"]
    assert any(f"{name} could not be given back, and may cost money: gcloud" in line for line in log)
    (cloud / "broken").unlink()
    assert go("tpu", grid(0.1), tmp_path / "sweep").count("finished") == 1
    assert left(cloud) == []


def test_sweeps_do_not_share_machines():
    trial, other = RunSpec(trial_name("tiny", {LR: 0.1})), replace(WHERE, output="gs://b/sweeps/other")
    names = {Remote("tpu", where).spec(trial).name for where in (WHERE, other)}
    assert len(names) == 2 and names == {Remote("tpu", where).spec(trial).name for where in (WHERE, other)}
    longest = RunSpec(
        trial_name("An_experiment with a very long name, longer than any", {}), "tiny", "smoke", 3, ("a=1",)
    )
    spec = Remote("tpu", WHERE).spec(longest)
    assert len(spec.name) <= 40 and (spec.experiment, spec.size, spec.seed, spec.overrides) == (
        "tiny",
        "smoke",
        3,
        ("a=1",),
    )
    assert spec.directory == f"gs://b/sweeps/sweep/{spec.name}" and spec.accelerator == "v5litepod-16"


# ---------------------------------------------------------------------------------------------------------------------
# The command line

ARGS = {
    "tpu": ["--accelerator", "v5e-16", "--archive", "gs://b/c.tar.gz", "--bucket", "gs://b/sweeps"],
    "jobset": ["--accelerator", "v5e-16", "--image", "i", "--bucket", "gs://b/sweeps"],
    "xpk": ["--accelerator", "v5e-16", "--image", "i", "--cluster", "c", "--bucket", "gs://b/sweeps"],
    "skypilot": ["--accelerator", "v5e-16", "--archive", "gs://b/c.tar.gz", "--bucket", "gs://b/sweeps"],
}


@pytest.fixture
def file(cloud, tmp_path) -> str:
    (tmp_path / "mine.py").write_text(
        f"from launch.algebra import values\nfrom launch.metric import Metric\nEXPERIMENT = 'tiny'\n"
        f"SWEEP = values({LR!r}, 0.1, 0.2)\nMETRIC = Metric({SCORE.path!r}, 'max')\n"
    )
    return "mine.py"


def without(argv: list[str], option: str) -> list[str]:
    at = argv.index(option)
    return argv[:at] + argv[at + 2 :]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dry_run_prints_the_commands_of_every_trial(backend, file, cloud, tmp_path, capsys):
    assert main(["sweep", file, "--backend", backend, *ARGS[backend], "--dry-run"]) == 0
    out = capsys.readouterr().out
    for rate in (0.1, 0.2):
        assert out.count(f"--seed 0 {LR}={rate}") == 1 or out.count(f"- {LR}={rate}\n") == 1
        name = trial_name("tiny", {LR: rate})
        assert f"runs/sweep-mine/{name}\n" in out  # the copy
        copy = next(shlex.split(line) for line in out.splitlines() if line.endswith(f"runs/sweep-mine/{name}"))
        assert copy[:3] == ["gcloud", "storage", "rsync"] and copy[3].startswith("gs://b/sweeps/sweep-mine/tiny-")
    assert transcript(cloud) == [] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--accelerator", "v5e-16"], "--backend local: trials run on this machine"),
        (["--mesh", "data=2"], "--backend local: trials run on this machine"),
        (["--check"], "--check compiles for a TPU"),
        (["--backend", "tpu", *without(ARGS["tpu"], "--bucket")], "--backend tpu needs --bucket"),
        (["--backend", "tpu", *ARGS["tpu"], "--bucket", "runs"], "--backend tpu needs --bucket, where"),
        (["--backend", "tpu", *ARGS["tpu"], "--bucket", "gs://"], "needs a bucket"),
        (["--backend", "tpu", *without(ARGS["tpu"], "--accelerator")], "--backend tpu needs --accelerator"),
        (["--backend", "tpu", *ARGS["tpu"], "--mesh", "data=8"], "multiply to 8, but there are 16 devices"),
        (["--backend", "tpu", *ARGS["tpu"], "--accelerator", "tpu7x-8"], "GKE alone"),
        (
            ["--backend", "tpu", *ARGS["tpu"], "--accelerator", "v5e-32"],
            "a batch of 16 rows cannot be divided among 32",
        ),
        (["--backend", "tpu", *ARGS["tpu"], "--label", "team"], "--label team: write it as key=value"),
        (["--backend", "xpk", *without(ARGS["xpk"], "--cluster")], "--backend xpk needs --cluster"),
        (["--backend", "skypilot", *ARGS["skypilot"], "--slices", "2"], "no slices"),
    ],
)
def test_refused_before_anything_is_started(argv, message, file, cloud, tmp_path, capsys):
    assert main(["sweep", file, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dreamer4: ") and message in err
    assert transcript(cloud) == [] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("values, match", [("16, 24", "a batch of 24 rows"), ("16, 32", "")])
def test_each_end_of_a_study_is_checked_for_the_machines(values, match, cloud, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from launch.metric import Metric\nfrom launch.study import choice\nEXPERIMENT, TRIALS = 'tiny', 3\n"
        f"STUDY = {{'train.agent.batch': choice({values})}}\nMETRIC = Metric({SCORE.path!r}, 'max')\n"
    )
    assert main(["sweep", "mine.py", "--backend", "tpu", *ARGS["tpu"], "--dry-run"]) == (2 if match else 0)
    assert match in capsys.readouterr().err and transcript(cloud) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tool_that_is_not_there_is_said_before_anything_is_started(backend, file, cloud, monkeypatch, capsys):
    missing = {"tpu": "gcloud", "jobset": "kubectl", "xpk": "xpk", "skypilot": "sky"}[backend]
    monkeypatch.setenv("PATH", str(cloud))
    (cloud / missing).unlink()
    assert main(["sweep", file, "--backend", backend, *ARGS[backend]]) == 2
    assert capsys.readouterr().err.startswith(f"dreamer4: {missing}: not found; install")
    assert transcript(cloud) == [] and not Path("runs").exists()


def test_every_trial_is_compiled_for_its_machines_first(file, cloud, monkeypatch, capsys):
    seen = []

    def check_fits(config: Config, accelerator: str, *, slices: int, mesh: str) -> list:
        seen.append((config.train.dynamics.lr, accelerator, slices, mesh))
        if config.train.dynamics.lr == 0.2:
            raise UserError("dynamics: does not fit")
        return []

    monkeypatch.setattr("dreamer4_jax.aot_cli.check_fits", check_fits)
    assert main(["sweep", file, "--backend", "tpu", *ARGS["tpu"], "--mesh", "data=16", "--check"]) == 2
    assert seen == [(0.1, "v5e-16", 1, "data=16"), (0.2, "v5e-16", 1, "data=16")]
    assert "does not fit" in capsys.readouterr().err and transcript(cloud) == [] and not Path("runs").exists()


def test_a_sweep_by_its_command(file, cloud, tmp_path, capsys):
    """Everything but the time between two looks: the report is written from what was copied."""
    assert main(["sweep", file, "--backend", "tpu", *ARGS["tpu"], "--jobs", "2"]) == 0
    page = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert page == Path("runs/sweep-mine/sweep.html") and page.exists()
    rows = (page.parent / "results.csv").read_text().splitlines()
    assert len(rows) == 3 and [row.split(",")[1] for row in rows[1:]] == ["finished", "finished"]
    assert left(cloud) == []
