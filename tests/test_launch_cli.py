"""`dreamer4 launch` refuses what can't work before anything is started, and hands the rest to a backend."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dreamer4_jax import cli
from dreamer4_jax.parallel import bucket
from launch import local, sweep_cli
from launch.cli import EPILOG
from launch.spec import RunSpec, retryable
from tests.toy_env import write_toy_dataset

ROOT = Path(__file__).parents[1]

MESH = ["--mesh", "data=4,ctx=4"]
TPU = ["--backend", "tpu", "--accelerator", "v5e-16", "--archive", "gs://b/c.tar.gz", "--output", "gs://b/runs", *MESH]
JOBSET = ["--backend", "jobset", "--accelerator", "v5e-16", "--image", "i", "--output", "gs://b/runs", *MESH]
XPK = ["--backend", "xpk", "--cluster", "c", *JOBSET[2:]]


def examples() -> list[str]:
    """Commands that are shown to be copied: in the help of launch and sweep, and in the README."""
    texts = [EPILOG, sweep_cli.EPILOG, (ROOT / "README.md").read_text()]
    found = re.findall(r"^ *(dreamer4 (?:launch|sweep) (?:.*\\\n)*.*)$", "\n".join(texts), re.MULTILINE)
    return list(dict.fromkeys(command.replace("\\\n", "") for command in found))


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
        (["quickstart", *TPU, "--accelerator", "tpu7x-8", "--mesh", "data=4,ctx=2"], "GKE alone"),
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
        (
            ["quickstart", "--backend", "skypilot", *TPU[2:], "--slices", "2", "--mesh", "replica=2,data=2,ctx=8"],
            "no slices",
        ),
        # Batches of quickstart have 8, 4, 12 and 32 rows.
        (
            ["quickstart", *TPU, "--mesh", "data=16"],
            r"train.tokenizer: a batch of 8 rows cannot be divided among 16 devices \(--mesh data=16\); use --mesh"
            " data=4,ctx=4, or batches of a multiple of 16 rows",
        ),
        (
            ["quickstart", *without(TPU, "--mesh"), "train.tokenizer.batch=16"],
            r"train.dynamics: a batch of 4 rows .* among 16 devices \(without --mesh, data=16\)",
        ),
        (["quickstart", *without(JOBSET, "--mesh")], "among 16 devices"),
        (["quickstart", *TPU, "--slices", "2", "--mesh", "ctx=32"], "crosses the 2 slices: .*replica=2,data=2,ctx=8"),
        (
            ["quickstart", *TPU, "--slices", "8", "--mesh", "replica=8,ctx=16"],
            "devices .*; use batches of a multiple of 8",
        ),
        (["quickstart", "--processes", "3"], "among 3 devices .*--mesh data=1,ctx=3"),
        (["quickstart", "--devices-per-process", "16", "--mesh", "data=16"], "among 16 devices"),
        (["quickstart", "--seed", "0", "seed=3"], "--seed 0 and seed=3: give one of them"),
        (
            ["quickstart", *JOBSET, "data.source=gs://b/x"],
            "gs://b: is mounted by Cloud Storage FUSE, but there is no gcs",
        ),
        (["quickstart", *XPK, "tokenizer.perceptual=v.npz"], "perceptual = v.npz: lies on this machine alone.*gs://b"),
    ],
)
def test_refused_with_one_line(argv, match, capsys, tmp_path):
    assert cli.main(["launch", *argv, "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dreamer4: ") and err.count("\n") == 1
    assert re.search(match, err), err
    assert not list(tmp_path.iterdir())


def test_data_lie_in_the_bucket(tmp_path, monkeypatch, capsys):
    """What is in the mount of --output's bucket, here and on the machines, passes; a folder of this machine doesn't."""
    monkeypatch.setattr(bucket, "MOUNTS", tmp_path / "mounts")
    held, here = tmp_path / "mounts" / "b" / "set", tmp_path / "here"
    for folder in (held, here):
        write_toy_dataset(folder, shards=1, episodes=2)
    for fields in (f"data.source={held}", f'data.also=["{held}"]', f"tokenizer.perceptual={held}/vgg.npz"):
        assert cli.main(["launch", "quickstart", *JOBSET, fields, "--dry-run"]) == 0
        assert cli.main(["launch", "quickstart", *TPU, fields, "--dry-run"]) == 0
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "mounts" / "b")
    capsys.readouterr()
    assert cli.main(["launch", "quickstart", *TPU, "data.source=gs://b/set", "--dry-run"]) == 0
    assert "data.source=gs://b/set" in capsys.readouterr().out  # the machine mounts it
    other = tmp_path / "mounts" / "other" / "set"
    write_toy_dataset(other, shards=1, episodes=2)
    assert cli.main(["launch", "quickstart", *TPU, f"data.source={other}", "--dry-run"]) == 0
    assert cli.main(["launch", "quickstart", f"data.source={here}", "--dry-run"]) == 0  # this machine has it
    capsys.readouterr()
    for argv, match in (
        ([*JOBSET, f"data.source={here}"], f"data.source = {here}: lies on this machine alone"),
        ([*XPK, f'data.also=["{here}"]'], f"data.also = {here}: lies on this machine alone"),
        ([*JOBSET, f"data.source={other}"], f"data.source = {other}: lies on this machine alone"),
        ([*TPU, f"data.source={here}"], "copy it into gs://b, and write gs://b/..."),
    ):
        assert cli.main(["launch", "quickstart", *argv, "--dry-run"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and match in err, err


def test_phases_that_are_not_trained_need_not_be_divided(capsys):
    command = ["launch", "quickstart", "--devices-per-process", "4", "--mesh", "data=4", "train.imagination.batch=6"]
    assert cli.main([*command, "--dry-run"]) == 2
    assert "train.imagination: a batch of 6 rows" in capsys.readouterr().err
    assert cli.main([*command, "data.labelled=0", "--dry-run"]) == 0


@pytest.mark.parametrize("words", [["seed=3"], ["--seed", "3"], ["--seed", "3", "seed=3"]])
def test_a_run_is_named_by_its_seed(words, capsys):
    assert cli.main(["launch", "quickstart", *words, "--dry-run"]) == 0
    assert "--run runs/quickstart-seed3 --resume --seed 3" in capsys.readouterr().out


@pytest.mark.parametrize("command", examples())
def test_the_examples_pass_every_check(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    # --check asks the compiler, for minutes.
    words = [word for word in shlex.split(command, comments=True)[1:] if word != "--check"]
    assert cli.main([*words, "--dry-run"] if "--dry-run" not in words else words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


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
