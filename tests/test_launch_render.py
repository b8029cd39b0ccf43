"""Golden transcripts of every backend, and that any name or override arrives in the experiment as it was written.

To renew a transcript, run its command line with --dry-run into the file, and read the difference.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dreamer4_jax.cli import main
from dreamer4_jax.config import ConfigError
from dreamer4_jax.parallel.accelerators import ACCELERATORS, accelerator
from dreamer4_jax.parallel.bucket import MOUNTS
from launch import remote, render
from launch.cloud import shell_text
from launch.spec import RunSpec, retryable

GOLDEN = Path(__file__).parent / "golden" / "launch"
BUCKET = ["--output", "gs://bucket/runs"]
TRICKY = "env.level=a b'c\"d$(touch /tmp/e)`f`\\g;h"
TRANSCRIPTS = {
    "local": "quickstart --smoke --processes 2 --devices-per-process 4 --mesh data=4,ctx=2 train.dynamics.steps=20",
    "tpu": "quickstart --backend tpu --accelerator v5litepod-16 --spot --zone us-central1-a --project p"
    " --mesh data=4,ctx=4 --archive . --output gs://bucket/runs --label team=world",
    "tpu-slices": "quickstart --backend tpu --accelerator v6e-64 --slices 2 --zone us-east5-b --name two --seed 3"
    " --archive gs://bucket/code.tar.gz --output gs://bucket/runs --mesh replica=2,data=2,ctx=32",
    "tpu-stop": "quickstart --backend tpu --action stop --zone us-central1-a",
    "jobset": "quickstart --backend jobset --accelerator v5p-128 --slices 2 --spot --image registry/dreamer4:1"
    " --output gs://bucket/runs --label kueue.x-k8s.io/queue-name=multislice-queue --retries 50"
    " --mesh replica=2,data=2,ctx=32",
    "xpk": "quickstart --backend xpk --accelerator v5litepod-256 --slices 4 --cluster pods --image registry/dreamer4:1"
    " --zone us-west4-a --output gs://bucket/runs --mesh replica=4,ctx=256",
    "skypilot": "quickstart --backend skypilot --accelerator v6e-8 --spot --archive . --zone us-east5-b"
    " --output gs://bucket/runs --mesh data=4,ctx=2",
}


def spec(**fields: Any) -> RunSpec:
    given = {"accelerator": "v5litepod-16", "output": "gs://b/r", "archive": ".", "image": "i", "cluster": "c"}
    return RunSpec(**{"name": "a", **given, **fields})


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_dry_run_prints_exactly_the_golden_transcript(name, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert main(["launch", *TRANSCRIPTS[name].split(), "--dry-run"]) == 0
    assert capsys.readouterr().out == (GOLDEN / f"{name}.txt").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Quoting

WORDS = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=30)
OVERRIDES = st.lists(WORDS.map(lambda text: f"env.x={text}"), min_size=1, max_size=3).map(tuple)


def run_words(script: str) -> list[str]:
    """The words that the script of a TPU VM gives to the run."""
    inner = next(word for word in shlex.split(script, comments=False) if ".venv/bin/dreamer4" in word)
    assert inner.endswith(" &\necho $! > run.pid\nwait $!\necho $? > run.exit")
    return shlex.split(inner.removesuffix(" &\necho $! > run.pid\nwait $!\necho $? > run.exit"))


@given(OVERRIDES)
def test_overrides_survive_the_shells_on_the_way(overrides):
    it = spec(overrides=overrides)
    assert run_words(remote.run(it.command())) == [".venv/bin/dreamer4", *it.command()[1:]]
    # once more through the shell that a printed command is pasted into
    (script,) = [word for word in shlex.split(shell_text(render.run(it))) if word.startswith("--command=")]
    assert script == f"--command={remote.run(it.command())}"
    task = yaml.safe_load(render.to_yaml(render.skypilot(it)))
    assert shlex.split(task["run"]) == ["exec", "./.venv/bin/dreamer4", *it.command()[1:]]
    if not any("\n" in item for item in overrides):
        (word,) = [word for word in render.xpk("run", it) if word.startswith("--command=")]
        assert shlex.split(word.removeprefix("--command=")) == it.command()


@given(OVERRIDES)
def test_overrides_survive_yaml_and_kubernetes(overrides):
    it = spec(overrides=overrides)
    manifest = yaml.safe_load(render.to_yaml(render.jobset(it)))
    (job,) = manifest["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert [expanded(word) for word in container["command"]] == it.command()


def expanded(word: str) -> str:
    """What Kubernetes makes of a word of a command: $$ is $, $(NAME) a variable (here always an error)."""
    return re.sub(r"\$\$|\$\(\w+\)", lambda found: {"$$": "$"}[found.group()], word)


@settings(max_examples=10)
@given(OVERRIDES)
def test_a_real_shell_agrees(overrides):
    printed = f"{sys.executable} -Sc 'import json, sys; print(json.dumps(sys.argv[1:]))' {shlex.join(overrides)}"
    done = subprocess.run(["sh", "-c", printed], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == list(overrides)


def test_a_heredoc_is_not_ended_by_its_text():
    text = shell_text(["cat"], stdin="a\nEOF\n$(id)\n")
    assert subprocess.run(["sh", "-c", text], capture_output=True, text=True).stdout == "a\nEOF\n$(id)\n"


def test_xpk_refuses_what_it_would_break():
    with pytest.raises(ConfigError, match="line break"):
        render.xpk("run", spec(overrides=("a=b\nc",)))
    with pytest.raises(ConfigError, match="labels"):
        render.xpk("run", spec(labels={"a": "b"}))
    with pytest.raises(ConfigError, match="no stop"):
        render.xpk("stop", spec())


# ---------------------------------------------------------------------------------------------------------------------
# The JobSet, against the part of the upstream CRD that it uses. A dict is an object whose fields are all required but
# those that end in "?", and that has no others; a list is an array of such; a type or a value stands for itself.

JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": "Indexed",
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [
            {
                "action": str,
                "onPodConditions?": [{"type": str, "status": str}],
                "onExitCodes?": {"containerName": str, "operator": str, "values": [int]},
            }
        ]
    },
    "template": {
        "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
        "spec": {
            "serviceAccountName?": str,
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": int,
            "hostNetwork": bool,
            "dnsPolicy": "ClusterFirstWithHostNet",
            "nodeSelector": {
                "cloud.google.com/gke-tpu-accelerator": str,
                "cloud.google.com/gke-tpu-topology": str,
                "cloud.google.com/gke-spot?": "true",
            },
            "tolerations": [{"key": str, "operator": str, "value?": str, "effect?": str}],
            "containers": [
                {
                    "name": str,
                    "image": str,
                    "command": [str],
                    "resources": {"limits": {"google.com/tpu": int}},
                    "volumeMounts": [{"name": str, "mountPath": str}],
                }
            ],
            "volumes": [
                {
                    "name": str,
                    "emptyDir?": {"medium": "Memory"},
                    "csi?": {
                        "driver": "gcsfuse.csi.storage.gke.io",
                        # The last: pods of the host's network have no rights on the bucket without it.
                        "volumeAttributes": {"bucketName": str, "mountOptions": str, "hostNetworkPodKSA": "true"},
                    },
                }
            ],
        },
    },
}
JOBSET = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": str, "labels": {"app.kubernetes.io/name": "dreamer4"}, "annotations": dict},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def conforms(value: Any, schema: Any, path: str = "") -> None:
    if isinstance(schema, dict):
        allowed = {key.removesuffix("?"): part for key, part in schema.items()}
        assert not set(value) - set(allowed), f"{path}: unknown {set(value) - set(allowed)}"
        for key in schema:
            name = key.removesuffix("?")
            assert key.endswith("?") or name in value, f"{path}: lacks {name}"
            if name in value:
                conforms(value[name], allowed[name], f"{path}.{name}")
    elif isinstance(schema, list):
        assert type(value) is list and value, path
        for item in value:
            conforms(item, schema[0], f"{path}[]")
    elif isinstance(schema, type):
        assert type(value) is schema, f"{path}: {value!r}"
    else:
        assert value == schema, f"{path}: {value!r}"


@pytest.mark.parametrize("spot", [False, True])
@pytest.mark.parametrize("name", ["v4-8", "v5litepod-1", "v5litepod-16", "v5p-128", "v6e-256", "tpu7x-64"])
def test_jobset_conforms(name, spot):
    it = spec(accelerator=name, slices=3, spot=spot, retries=7)
    manifest = yaml.safe_load(render.to_yaml(render.jobset(it)))
    conforms(manifest, JOBSET)
    (job,) = manifest["spec"]["replicatedJobs"]
    batch, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    tpu = accelerator(name)
    assert job["replicas"] == 3 and manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert batch["parallelism"] == batch["completions"] == tpu.hosts
    assert batch["parallelism"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == tpu.chips
    assert pod["terminationGracePeriodSeconds"] >= 120
    # The bucket lies where the run looks for it.
    (bucket,) = (v["csi"]["volumeAttributes"]["bucketName"] for v in pod["volumes"] if "csi" in v)
    assert {m["mountPath"] for m in pod["containers"][0]["volumeMounts"]} == {"/dev/shm", f"{MOUNTS}/{bucket}"}
    assert it.output.startswith(f"gs://{bucket}/")
    assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == spot
    assert len(f"{it.name}-{job['name']}-{job['replicas']}-{tpu.hosts}") <= 63  # a pod's name is a DNS label


def test_the_machines_act_for_the_service_account():
    """Its rights on the bucket are what mounting and writing it need."""
    (job,) = render.jobset(spec(service_account="writer"))["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["template"]["spec"]["serviceAccountName"] == "writer"
    assert "--service-account=writer@my-project.iam" in render.create(spec(service_account="writer@my-project.iam"))
    assert not any("--service-account" in word for word in render.create(spec()))


def test_jobset_restarts_what_is_retryable_and_nothing_else():
    (job,) = render.jobset(spec())["spec"]["replicatedJobs"]
    disrupted, mistake = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert mistake["action"] == "FailJob" and mistake["onExitCodes"]["operator"] == "NotIn"
    restarted = mistake["onExitCodes"]["values"]
    assert restarted == sorted(restarted) and 42 in restarted
    assert restarted == [code for code in range(1, 256) if retryable(code)]


@pytest.mark.parametrize("mistake", ["paralelism", "two"])
def test_the_schema_finds_mistakes(mistake):
    manifest = render.jobset(spec())
    (job,) = manifest["spec"]["replicatedJobs"]
    if mistake == "two":
        job["replicas"] = "two"
    else:
        job["template"]["spec"][mistake] = 4
    with pytest.raises(AssertionError):
        conforms(manifest, JOBSET)


def test_the_job_is_a_valid_kubernetes_job():
    validate = pytest.importorskip("kubernetes_validate")
    (job,) = yaml.safe_load(render.to_yaml(render.jobset(spec(spot=True))))["spec"]["replicatedJobs"]
    manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": job["template"]["spec"]}
    validate.validate(manifest, "1.31", strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# xpk's and SkyPilot's own checks


def test_xpk_takes_the_command(tmp_path):
    pytest.importorskip("xpk")
    for name in (name for name in ACCELERATORS if name.endswith("-16")):  # one of each generation
        tpu, file = accelerator(name), tmp_path / f"{name}.yaml"
        it = spec(accelerator=name, slices=2, zone="us-central1-a", project="p", overrides=("a={'b': 1}", "env.x=it's"))
        offline = ["--dry-run", "--skip-validation", f"--output-manifest-file={file}"]
        subprocess.run([sys.executable, "-m", "xpk.main", *render.xpk("run", it)[1:], *offline], check=True, timeout=60)
        (job,) = yaml.safe_load(file.read_text())["spec"]["replicatedJobs"]
        pod = job["template"]["spec"]["template"]["spec"]
        assert job["replicas"] == 2 and job["template"]["spec"]["parallelism"] == tpu.hosts
        assert pod["terminationGracePeriodSeconds"] == render.GRACE_S
        assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == tpu.gke
        assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == tpu.topology
        assert f"({shlex.join(it.command())}) & PID" in pod["containers"][0]["command"][-1]


def test_skypilot_takes_the_task():
    sky = pytest.importorskip("sky")
    for name in (name for name in ACCELERATORS if ACCELERATORS[name].runtime):
        it = spec(accelerator=name, spot=True, zone="us-central2-b", overrides=(TRICKY,), labels={"team": "world"})
        task = sky.Task.from_yaml_config(yaml.safe_load(render.to_yaml(render.skypilot(it))))
        (resources,) = task.resources
        assert resources.accelerators == {f"tpu-{name}": 1} and resources.use_spot and resources.zone == "us-central2-b"


@pytest.mark.parametrize(
    "fields, match",
    [({"slices": 2}, "slices"), ({"accelerator": "tpu7x-8"}, "GKE"), ({"archive": "c.tar.gz"}, "checkout")],
)
def test_skypilot_refusals(fields, match):
    with pytest.raises(ConfigError, match=match):
        render.skypilot(spec(**fields))


# ---------------------------------------------------------------------------------------------------------------------
# Accelerators


@pytest.mark.parametrize(
    "name, topology, hosts, devices, aot",
    [
        ("v4-8", "2x2x1", 1, 4, "v4:2x2x1"),
        ("v5litepod-1", "1x1", 1, 1, "v5e:1x1"),
        ("v5e-16", "4x4", 4, 16, "v5e:4x4"),
        ("v5litepod-256", "16x16", 64, 256, "v5e:16x16"),
        ("v5p-16", "2x2x2", 2, 8, "v5p:2x2x2"),
        ("v6e-64", "8x8", 16, 64, "v6e:8x8"),
        ("tpu7x-8", "2x2x1", 1, 8, "tpu7x:2x2x1"),
    ],
)
def test_accelerators(name, topology, hosts, devices, aot):
    tpu = accelerator(name)
    assert (tpu.topology, tpu.hosts, tpu.devices, tpu.aot) == (topology, hosts, devices, aot)


def test_the_number_in_a_name_is_chips_or_cores():
    for name, tpu in ACCELERATORS.items():
        prefix, _, number = name.partition("-")
        assert int(number) == tpu.chips * (1 if prefix in ("v5litepod", "v6e") else 2), name


@pytest.mark.parametrize("name, close", [("v5e-15", "v5litepod-16"), ("v6-64", "v6e-64"), ("h100", "v5litepod-16")])
def test_unknown_accelerators_name_others(name, close):
    with pytest.raises(ConfigError, match=f"unknown accelerator '{name}'.*{close}"):
        accelerator(name)


def test_tpu_vm_refuses_a_gke_accelerator():
    with pytest.raises(ConfigError, match="GKE alone"):
        render.create(spec(accelerator="tpu7x-8"))
