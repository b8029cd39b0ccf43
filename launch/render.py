"""What a RunSpec is in the language of each tool: gcloud, kubectl, xpk and SkyPilot. Pure; nothing is run here.

Every command is a list of words. Where a tool wants shell text, it is made by shlex from such a list, so that any name
or override arrives as it was written.
"""

import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from dreamer4_jax.config import ConfigError
from dreamer4_jax.parallel.accelerators import accelerator
from dreamer4_jax.parallel.bucket import MOUNTS
from launch import remote
from launch.spec import INTERRUPTED, RunSpec

Argv = list[str]

GRACE_S = 180  # from SIGTERM to SIGKILL: the running step, then a checkpoint
CONTAINER = "dreamer4"
# Cloud Storage FUSE, as `dreamer4_jax.parallel.bucket.OPTIONS` in the notation of its driver.
FUSE = ",".join(
    (
        "implicit-dirs",
        "file-system:rename-dir-limit:1000000",
        "metadata-cache:ttl-secs:0",
        "metadata-cache:negative-ttl-secs:0",
    )
)
SCRATCH = "build/launch"  # of the working directory: what is made to be sent


# ---------------------------------------------------------------------------------------------------------------------
# Cloud TPU queued resources


def _where(spec: RunSpec) -> Argv:
    return [f"--{name}={value}" for name, value in (("zone", spec.zone), ("project", spec.project)) if value]


def _queued(verb: str, spec: RunSpec, *words: str) -> Argv:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, *words, *_where(spec)]


def create(spec: RunSpec) -> Argv:
    """Asks for the machines: one node for each slice."""
    tpu = accelerator(spec.accelerator)
    if not tpu.runtime:
        raise ConfigError(f"accelerator {tpu.name}: is offered on GKE alone; use --backend jobset or xpk")
    nodes = [f"--node-count={spec.slices}", f"--node-prefix={spec.name}"]
    labels = ",".join(f"{key}={value}" for key, value in spec.labels.items())
    return _queued(
        "create",
        spec,
        spec.name,
        *(nodes if spec.slices > 1 else [f"--node-id={spec.name}"]),
        f"--accelerator-type={tpu.name}",
        f"--runtime-version={tpu.runtime}",
        *(["--spot"] if spec.spot else []),
        *([f"--labels={labels}"] if labels else []),
        *([f"--service-account={spec.service_account}"] if spec.service_account else []),
    )


def describe(spec: RunSpec) -> Argv:
    """What became of the request, as JSON."""
    return _queued("describe", spec, spec.name, "--format=json")


def delete(spec: RunSpec) -> Argv:
    """Gives the machines back, running or not."""
    return _queued("delete", spec, spec.name, "--force", "--quiet")


def ssh(spec: RunSpec, command: str, *, everywhere: bool = True, batch: str = "all") -> Argv:
    """Shell text on every worker of every slice, or on the first worker of the first.

    gcloud works through the workers `batch` at a time, by default 64: a run of more would wait for itself for ever.
    """
    workers = ["--worker=all", "--node=all", f"--batch-size={batch}"] if everywhere else ["--worker=0", "--node=0"]
    # A machine that was taken away never answers; without this ssh would wait for it for hours.
    flags = ("--quiet", "--ssh-flag=-o ServerAliveInterval=30")  # quiet: no questions, of a passphrase say
    return _queued("ssh", spec, spec.name, *workers, *flags, f"--command={command}")


def warm_up(spec: RunSpec) -> Argv:
    """The first connection to each worker, one after another: it makes and spreads the ssh key, which can't be done by
    many at once."""
    return ssh(spec, "true", batch="1")


def pack(spec: RunSpec) -> list[Argv]:
    """Commands that make the code archive of a local checkout: what the package needs, with uncommitted changes."""
    archive = local_archive(spec)
    if not archive or archive == spec.archive:
        return []
    parts = ["pyproject.toml", "constraints.txt", "LICENSE", "README.md", "dreamer4_jax", "experiments", "launch"]
    tar = ["tar", "-czf", archive, "-C", spec.archive, "--exclude=__pycache__", "--exclude=experiments/results", *parts]
    return [["mkdir", "-p", SCRATCH], tar]


def local_archive(spec: RunSpec) -> str:
    """The archive on this machine that is copied to the workers; empty where they fetch it from a bucket."""
    if spec.archive.startswith("gs://"):
        return ""
    if spec.archive.endswith((".tar.gz", ".tgz")):
        return spec.archive
    return f"{SCRATCH}/{spec.name}.tar.gz"


def set_up(spec: RunSpec) -> list[Argv]:
    """Commands that bring the code to every worker and install it."""
    archive = local_archive(spec)
    if not archive:
        return [ssh(spec, remote.setup(spec.archive))]
    workers = ("--worker=all", "--node=all", "--batch-size=all")
    copy = _queued("scp", spec, archive, f"{spec.name}:{remote.CODE}", *workers, "--quiet")
    return [*pack(spec), copy, ssh(spec, remote.setup())]


def run(spec: RunSpec) -> Argv:
    """Starts the run on every worker, or follows the one that goes on."""
    return ssh(spec, remote.run(spec.command()))


# ---------------------------------------------------------------------------------------------------------------------
# GKE: a JobSet, by kubectl or by xpk


def jobset(spec: RunSpec) -> dict[str, Any]:
    """The JobSet: a job for each slice, a pod for each host. A slice that fails restarts all, up to `retries` times."""
    tpu, bucket = accelerator(spec.accelerator), spec.output.removeprefix("gs://").partition("/")[0]
    spot = "cloud.google.com/gke-spot"
    # Kubernetes replaces $(NAME) in commands, but takes $$ for a plain $.
    command = [word.replace("$", "$$") for word in spec.command()]
    pod = {
        **({"serviceAccountName": spec.service_account} if spec.service_account else {}),
        "restartPolicy": "Never",  # one pod alone can't rejoin the others: the JobSet restarts all of them
        "terminationGracePeriodSeconds": GRACE_S,
        "hostNetwork": True,  # slices talk over it at full speed
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": tpu.gke,
            "cloud.google.com/gke-tpu-topology": tpu.topology,
            **({spot: "true"} if spec.spot else {}),
        },
        "tolerations": [
            {"key": "google.com/tpu", "operator": "Exists"},
            *([{"key": spot, "operator": "Equal", "value": "true", "effect": "NoSchedule"}] if spec.spot else []),
        ],
        "containers": [
            {
                "name": CONTAINER,
                "image": spec.image,
                "command": command,
                "resources": {"limits": {"google.com/tpu": tpu.chips_per_host}},
                "volumeMounts": [
                    {"name": "shm", "mountPath": "/dev/shm"},
                    {"name": "bucket", "mountPath": f"{MOUNTS}/{bucket}"},
                ],
            }
        ],
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # data workers; the default is 64 MB
            {
                "name": "bucket",
                "csi": {
                    "driver": "gcsfuse.csi.storage.gke.io",
                    "volumeAttributes": {
                        "bucketName": bucket,
                        "mountOptions": FUSE,
                        "hostNetworkPodKSA": "true",  # on the host's network it is not told the pod's service account
                    },
                },
            },
        ],
    }
    job = {
        "parallelism": tpu.hosts,
        "completions": tpu.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                # A pod on a node that is taken away counts as interrupted, whatever its exit code: the job fails, and
                # the JobSet restarts.
                {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                # Any code but those of `retryable` is a mistake: no restart.
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": CONTAINER,
                        "operator": "NotIn",
                        "values": [INTERRUPTED, *range(128, 256)],
                    },
                },
            ]
        },
        "template": {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": spec.name,
            "labels": {"app.kubernetes.io/name": "dreamer4", **spec.labels},
            # All hosts of a job on the nodes of one slice, and no two jobs on one slice.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": spec.retries,
                "rules": [{"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "slice", "replicas": spec.slices, "template": {"spec": job}}],
        },
    }


def kubectl(action: str, spec: RunSpec) -> Argv:
    """kubectl for an action on the JobSet. `run` reads the manifest from standard input.

    `describe` prints it as JSON, or nothing; `output` the end of the first pod's output.
    """
    pods = f"jobset.sigs.k8s.io/jobset-name={spec.name}"
    first = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    return {
        "run": ["kubectl", "create", "-f", "-"],
        "status": ["kubectl", "get", "pods", f"--selector={pods}", "--output=wide"],
        "describe": ["kubectl", "get", "jobset", spec.name, "--ignore-not-found", "--output=json"],
        "logs": ["kubectl", "logs", "--follow", "--tail=100", f"--selector={pods},{first}"],
        "output": ["kubectl", "logs", "--tail=100", f"--selector={pods},{first}"],
        # The pods get SIGTERM and save. Undone by the same patch with false.
        "stop": ["kubectl", "patch", "jobset", spec.name, "--type=merge", '--patch={"spec": {"suspend": true}}'],
        # Foreground: it returns when the pods have saved and ended.
        "delete": ["kubectl", "delete", "jobset", spec.name, "--cascade=foreground"],
    }[action]


def xpk(action: str, spec: RunSpec) -> Argv:
    """xpk for an action; its workloads are JobSets, so their logs are kubectl's."""
    if action == "logs":
        return kubectl("logs", spec)
    if action == "stop":
        raise ConfigError("xpk has no stop: --action delete ends the run, which saves first")
    if action == "status":
        words = ["list", f"--filter-by-job=^{spec.name}$"]
    elif action == "delete":
        words = ["delete", f"--workload={spec.name}"]
    else:
        command = shlex.join(spec.command())
        if "\n" in command:  # it is pasted into a block of the manifest, where a new line would end it
            raise ConfigError("xpk takes a command of one line, but an override has a line break; use --backend jobset")
        if spec.labels:
            raise ConfigError("xpk sets its own labels; use --backend jobset")
        words = [
            *("create", f"--workload={spec.name}", f"--tpu-type={accelerator(spec.accelerator).name}"),
            *(f"--num-slices={spec.slices}", f"--docker-image={spec.image}", f"--max-restarts={spec.retries}"),
            f"--termination-grace-period-seconds={GRACE_S}",
            *(["--spot"] if spec.spot else []),
            f"--command={command}",
        ]
    return ["xpk", "workload", *words, f"--cluster={spec.cluster}", *_where(spec)]


# ---------------------------------------------------------------------------------------------------------------------
# SkyPilot


def skypilot(spec: RunSpec) -> dict[str, Any]:
    """The task of a managed job: SkyPilot finds a zone, and recovers the job when the machines are taken away."""
    tpu = accelerator(spec.accelerator)
    if not tpu.runtime:
        raise ConfigError(f"accelerator {tpu.name}: is offered on GKE alone; use --backend jobset or xpk")
    if spec.slices > 1:
        raise ConfigError("SkyPilot knows no slices that are joined; use --backend tpu, jobset or xpk")
    local = not spec.archive.startswith("gs://")
    if local and local_archive(spec) == spec.archive:
        raise ConfigError(f"archive {spec.archive}: SkyPilot copies a checkout, or fetches gs://.../code.tar.gz")
    fetch = [] if local else remote.fetch(spec.archive)
    command = ["./.venv/bin/dreamer4", *spec.command()[1:]]
    return {
        "name": spec.name,
        "resources": {
            "infra": f"gcp/*/{spec.zone}" if spec.zone else "gcp",
            "accelerators": f"tpu-{tpu.name}:1",
            "accelerator_args": {"tpu_vm": True, "runtime_version": tpu.runtime},
            "use_spot": spec.spot,
            # Not max_restarts_on_errors, which repeats mistakes too. Restarts of these codes are not counted, so it is
            # the one code of a run that has saved; lost machines SkyPilot recovers by itself.
            "job_recovery": {"recover_on_exit_codes": [INTERRUPTED]},
            **({"labels": dict(spec.labels)} if spec.labels else {}),
        },
        **({"workdir": spec.archive} if local else {}),
        "setup": "\n".join(["set -e", *fetch, *remote.install()]) + "\n",
        "run": f"exec {shlex.join(command)}\n",
    }


def task_file(spec: RunSpec) -> str:
    """Where the task is written for sky to read."""
    return f"{SCRATCH}/{spec.name}.yaml"


def sky(action: str, spec: RunSpec, job: int | None = None) -> Argv:
    """sky for an action on the managed job. `run` reads `task_file`.

    `describe` prints all jobs as JSON; `output` the output of the job of this number, which may have ended.
    """
    return {
        "run": ["sky", "jobs", "launch", "--yes", "--detach-run", task_file(spec)],
        "status": ["sky", "jobs", "queue"],
        "describe": ["sky", "jobs", "queue", "--all", "--output=json"],
        "logs": ["sky", "jobs", "logs", "--name", spec.name],
        "output": ["sky", "jobs", "logs", "--no-follow", str(job)],
        # A cancelled job gives its machines back; the run is resumed by launching it again.
        "stop": ["sky", "jobs", "cancel", "--yes", "--name", spec.name],
        "delete": ["sky", "jobs", "cancel", "--yes", "--name", spec.name],
    }[action]


def to_yaml(tree: dict[str, Any]) -> str:
    """A manifest as text, keys in their order, several lines of shell as such."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=10_000)


class _Dumper(yaml.SafeDumper):
    """Lists of numbers on one line, text of several lines as a block."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


def _list(dumper: yaml.SafeDumper, items: Sequence[Any]) -> yaml.Node:
    numbers = all(isinstance(item, int) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=numbers)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)
