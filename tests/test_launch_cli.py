"""`dreamer4 launch` refuses what can't work before anything is started, and hands the rest to a backend."""

import re
import subprocess
import sys

import pytest

from dreamer4_jax import cli
from launch import local
from launch.spec import RunSpec, retryable

TPU = ["--backend", "tpu", "--accelerator", "v5e-16", "--archive", "gs://b/c.tar.gz", "--output", "gs://b/runs"]
JOBSET = ["--backend", "jobset", "--accelerator", "v5e-16", "--image", "i", "--output", "gs://b/runs"]
XPK = ["--backend", "xpk", "--cluster", "c", *JOBSET[2:]]


@pytest.fixture(autouse=True)
def nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail(f"ran {args}"))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail(f"started {args}"))


def without(argv: list[str], option: str) -> list[str]:
    at = argv.index(option)
    return argv[:at] + argv[at + 2 :]


@pytest.mark.parametrize(
    "argv, match",
    [
        (["nothing"], "unknown experiment or preset 'nothing'"),
        (["quickstart", "dynamics.kmax=8"], "unknown config field 'dynamics.kmax'"),
        (["quickstart", "dynamics.k_max=many"], "dynamics.k_max"),
        (["tiny", "--smoke"], "preset 'tiny' has one size"),
        (["quickstart", "--name", "My_Run"], "name 'My_Run'"),
        (["quickstart", "--processes", "0"], "processes = 0: must be at least 1"),
        (["quickstart", "--retries", "-1"], "retries = -1"),
        (["quickstart", "--label", "team"], "--label team: write it as key=value"),
        (["quickstart", "--output", "gs://b/r"], "a local run writes into a directory"),
        (["quickstart", "--action", "logs"], "its output is in runs/quickstart-seed0/logs"),
        (["quickstart", "--mesh", "data=3"], "multiply to 3, but there are 1 devices"),
        (["quickstart", "--mesh", "rows=3"], "unknown axis 'rows'"),
        (["quickstart", *without(TPU, "--accelerator")], "--backend tpu needs --accelerator"),
        (["quickstart", *TPU, "--accelerator", "v5e-15"], "unknown accelerator 'v5e-15'.*v5litepod-16"),
        (["quickstart", *TPU, "--accelerator", "tpu7x-8"], "GKE alone"),
        (["quickstart", *without(TPU, "--output")], "--output runs: .* needs a bucket"),
        (["quickstart", *TPU, "--output", "gs://"], "needs a bucket"),
        (["quickstart", *without(TPU, "--archive")], "--backend tpu needs --archive"),
        (["quickstart", *TPU, "--archive", "."], "is no checkout of this project"),
        (["quickstart", *TPU, "--archive", "code.tar.gz"], "there is no such file"),
        (["quickstart", *TPU, "--mesh", "data=8"], "multiply to 8, but there are 16 devices"),
        (["quickstart", *TPU, "--slices", "2", "--mesh", "data=16"], "multiply to 16, but there are 32 devices"),
        (["quickstart", *without(JOBSET, "--image")], "--backend jobset needs --image"),
        (["quickstart", *without(JOBSET, "--output")], "needs a bucket"),
        (["quickstart", *XPK, "--service-account", "me"], "--service-account: xpk has its own"),
        (["quickstart", *without(XPK, "--image")], "--backend xpk needs --image"),
        (["quickstart", *without(XPK, "--cluster")], "--backend xpk needs --cluster"),
        (["quickstart", *without(XPK, "--cluster"), "--action", "status"], "--backend xpk needs --cluster"),
        (["quickstart", *XPK, "--action", "stop"], "xpk has no stop"),
        (["quickstart", "--backend", "skypilot", *TPU[2:], "--slices", "2"], "no slices"),
    ],
)
def test_refused_with_one_line(argv, match, capsys, tmp_path):
    assert cli.main(["launch", *argv, "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dreamer4: ") and err.count("\n") == 1
    assert re.search(match, err), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [0, 1, 42, 137])
def test_the_exit_code_is_the_run_s(code, monkeypatch):
    seen = []
    monkeypatch.setattr(local, "run", lambda spec: seen.append(spec) or code)
    words = ["quickstart", "--smoke", "--seed", "3", "--retries", "2", "train.dynamics.steps=5", "data.workers=1"]
    assert cli.main(["launch", *words]) == code
    (spec,) = seen
    assert spec.command() == [
        *("dreamer4", "run", "quickstart", "--smoke", "--run", f"runs/{spec.name}", "--resume"),
        *("--seed", "3", "train.dynamics.steps=5", "data.workers=1"),
    ]


@pytest.mark.parametrize(
    "argv, shown",
    [
        (
            ["--backend", "tpu", "--action", "delete", "--zone", "z"],
            "gcloud compute tpus queued-resources delete a --force",
        ),
        (["--backend", "tpu", "--action", "status"], "gcloud compute tpus queued-resources describe a --format=json"),
        (["--backend", "jobset", "--action", "status"], "kubectl get pods"),
        (["--backend", "jobset", "--action", "logs"], "kubectl logs --follow"),
        (["--backend", "jobset", "--action", "stop"], "kubectl patch jobset a --type=merge"),
        (["--backend", "jobset", "--action", "delete"], "kubectl delete jobset a"),
        (
            ["--backend", "xpk", "--cluster", "c", "--action", "status"],
            "xpk workload list '--filter-by-job=^a$' --cluster=c",
        ),
        (["--backend", "xpk", "--cluster", "c", "--action", "logs"], "kubectl logs --follow"),
        (["--backend", "xpk", "--cluster", "c", "--action", "delete"], "xpk workload delete --workload=a --cluster=c"),
        (["--backend", "skypilot", "--action", "status"], "sky jobs queue"),
        (["--backend", "skypilot", "--action", "logs"], "sky jobs logs --name a"),
        (["--backend", "skypilot", "--action", "stop"], "sky jobs cancel --yes --name a"),
        (["--backend", "skypilot", "--action", "delete"], "sky jobs cancel --yes --name a"),
    ],
)
def test_actions_need_no_more_than_the_name(argv, shown, capsys):
    assert cli.main(["launch", "quickstart", "--name", "a", *argv, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(shown)


def test_a_missing_tool_ends_with_one_line(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert cli.main(["launch", "quickstart", "--backend", "jobset", "--action", "status"]) == 2
    assert capsys.readouterr().err == (
        "dreamer4: kubectl: not found; install it with 'gcloud components install kubectl', or see --dry-run\n"
    )


def test_no_environment_is_printed(capsys, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "do-not-print")
    for argv in (TPU, JOBSET, XPK, ["--processes", "2"]):
        assert cli.main(["launch", "quickstart", *argv, "--dry-run"]) == 0
    assert "do-not-print" not in "".join(capsys.readouterr())


def test_help_is_light(monkeypatch):
    monkeypatch.undo()
    heavy = "{'jax', 'yaml', 'numpy'}"
    code = f"import sys; from dreamer4_jax.cli import parser; parser(); print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_retryable():
    assert [code for code in (0, 1, 2, 42, 43, 127, 134, 137, 143, 255, -9) if retryable(code)] == [
        42,
        134,
        137,
        143,
        255,
        -9,
    ]
    assert RunSpec("a", output="gs://b/r/").directory == "gs://b/r/a"
