"""`dreamer4 launch`: arguments to a RunSpec, checked before anything is started or paid for, then a backend."""

import argparse
import math
from pathlib import Path
from typing import Any

from dreamer4_jax.config import Config, ConfigError
from launch.spec import RunSpec

BACKENDS = {
    "local": "processes of this machine",
    "tpu": "Cloud TPU queued resources, by gcloud",
    "jobset": "a JobSet on GKE, by kubectl in its current context",
    "xpk": "a JobSet on GKE, by xpk",
    "skypilot": "a managed job of SkyPilot",
}
ACTIONS = ("run", "status", "logs", "stop", "delete")
EPILOG = """\
backends:
{backends}

To look after a run, repeat its command line and add --action:
  --action status   where it stands
  --action logs     the output of its first host
  --action stop     save and stop; the same command line without --action resumes it
  --action delete   give back the machines (tpu), or remove the job; what it has saved stays in the bucket

examples:
  dreamer4 launch quickstart --smoke --processes 2 --devices-per-process 4
  dreamer4 launch quickstart --backend tpu --accelerator v5litepod-16 --spot --zone us-central1-a \\
      --archive . --output gs://my-bucket/runs --mesh data=4,ctx=4 --dry-run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `RunSpec` needs beside experiment, size, seed and overrides."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG.format(backends="\n".join(f"  {name:9s} {text}" for name, text in BACKENDS.items()))
    parser.set_defaults(seed=None)  # to know whether it was given
    parser.add_argument("--backend", choices=BACKENDS, default="local", help="where to run (local)")
    parser.add_argument("--action", choices=ACTIONS, default="run", help="what to do (run)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")
    parser.add_argument(
        "--check", action="store_true", help="compile for the accelerator first, and refuse a config that doesn't fit"
    )
    parser.add_argument("--name", help="of the run and of what is created for it (<experiment>-seed<seed>)")
    parser.add_argument("--output", default="runs", metavar="DIR", help="holds the run directory: a path, or gs://...")
    add_cloud_arguments(parser)
    local = parser.add_argument_group("local")
    local.add_argument("--processes", type=int, default=1, help="processes, joined like the hosts of a pod (1)")
    local.add_argument("--devices-per-process", type=int, default=1, help="CPU devices of each (1)")


def add_cloud_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says where in the cloud, for a run as for a sweep; `cloud_fields` reads it."""
    parser.add_argument("--mesh", default="", metavar="SIZES", help="mesh over all devices, e.g. data=16,ctx=4")
    parser.add_argument("--retries", type=int, default=10, help="restarts after interruptions (10; skypilot: any)")
    cloud = parser.add_argument_group("cloud")
    cloud.add_argument("--accelerator", default="", help="TPU type, e.g. v5litepod-16, v5p-128, v6e-64")
    cloud.add_argument("--slices", type=int, default=1, help="TPU slices, joined by the mesh axis 'replica' (1)")
    cloud.add_argument("--spot", action="store_true", help="machines that may be taken away, for less money")
    cloud.add_argument("--project", default="", help="as gcloud is configured, if left out; so is the zone")
    cloud.add_argument("--zone", default="", help="e.g. us-central1-a")
    cloud.add_argument(
        "--service-account",
        default="",
        metavar="NAME",
        help="with rights on the bucket (tpu: address; jobset: in Kubernetes)",
    )
    cloud.add_argument("--cluster", default="", help="GKE cluster (xpk)")
    cloud.add_argument("--image", default="", help="container image with dreamer4_jax installed (jobset, xpk)")
    cloud.add_argument("--archive", default="", help="the code: a checkout or gs://.../code.tar.gz (tpu, skypilot)")
    cloud.add_argument(
        "--label", action="append", default=[], metavar="KEY=VALUE", help="on what is created (may be repeated)"
    )


def cloud_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `RunSpec` that `add_cloud_arguments` asks for.

    Raises:
        ConfigError: a label that is none.
    """
    labels = dict(item.partition("=")[::2] for item in args.label)
    if "" in labels or any("=" not in item for item in args.label):
        raise ConfigError(f"--label {' '.join(args.label)}: write it as key=value")
    names = ("mesh", "retries", "accelerator", "slices", "spot", "project", "zone", "service_account")
    return {name: getattr(args, name) for name in (*names, "cluster", "image", "archive")} | {"labels": labels}


def main(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    config = _config(args)
    spec = make_spec(args, config)
    check(spec, args.backend, args.action)
    if args.action == "run":
        check_config(spec, args.backend, config)
    if args.check:
        check_fits(spec, config)
    if args.backend == "local":
        return _local(spec, args)
    from launch import backends, queued, render
    from launch.cloud import Cloud

    cloud = Cloud(dry_run=args.dry_run)
    if args.backend == "tpu":
        return queued.launch(spec, cloud) if args.action == "run" else queued.act(args.action, spec, cloud)
    if args.action == "run":
        return backends.submit(args.backend, spec, cloud)
    return cloud.show(
        {"jobset": render.kubectl, "xpk": render.xpk, "skypilot": render.sky}[args.backend](args.action, spec)
    )


def _local(spec: RunSpec, args: argparse.Namespace) -> int:
    from launch import local

    if args.action != "run":
        raise ConfigError(
            f"--action {args.action}: a local run is in the foreground, where Ctrl-C stops it;"
            f" its output is in {spec.directory}/logs"
        )
    if args.dry_run:
        print("\n".join(local.commands(spec)))
        return 0
    return local.run(spec)


def check_fits(spec: RunSpec, config: Config) -> None:
    """Compiles a run's programs for its accelerator, and prints what they take there.

    Raises:
        UserError: it does not fit, or there is no accelerator to compile for.
    """
    from dreamer4_jax.aot_cli import check_fits

    if not spec.accelerator:
        raise ConfigError("--check compiles for a TPU: name one with --accelerator, e.g. v5litepod-16")
    for report in check_fits(config, spec.accelerator, slices=spec.slices, mesh=spec.mesh):
        print(f"# {report.program}: {report.peak / 2**30:.2f} of {report.limit / 2**30:.2f} GiB on each device")


def _config(args: argparse.Namespace) -> Config:
    """The config of the command line.

    Raises:
        ConfigError: unknown experiment or field, a value that the config refuses, or two seeds.
    """
    from dreamer4_jax.cli import resolve

    config = resolve(args.experiment, args.size, args.seed or 0, args.overrides)
    if args.seed not in (None, config.seed):
        raise ConfigError(f"--seed {args.seed} and seed={config.seed}: give one of them")
    return config


def make_spec(args: argparse.Namespace, config: Config) -> RunSpec:
    """The RunSpec of the command line and its config."""
    return RunSpec(
        name=args.name or f"{config.name}-seed{config.seed}".lower().replace("_", "-"),
        experiment=args.experiment,
        size=args.size,
        seed=config.seed,
        overrides=tuple(args.overrides),
        output=args.output,
        processes=args.processes,
        devices_per_process=args.devices_per_process,
        **cloud_fields(args),
    )


def check(spec: RunSpec, backend: str, action: str = "run") -> None:
    """Refuses what the backend can't do for lack of an argument.

    Raises:
        ConfigError: naming the argument and what it could be.
    """
    from dreamer4_jax.parallel.accelerators import accelerator

    if backend == "xpk" and not spec.cluster:
        raise ConfigError("--backend xpk needs --cluster, the name of the GKE cluster")
    if action != "run":
        return
    if backend == "local":
        _check_mesh(spec, spec.processes * spec.devices_per_process)
        return
    if not spec.accelerator:
        raise ConfigError(f"--backend {backend} needs --accelerator, e.g. v5litepod-16")
    tpu = accelerator(spec.accelerator)
    bucket = spec.output.removeprefix("gs://").partition("/")[0]
    if not spec.output.startswith("gs://") or not bucket:
        raise ConfigError(
            f"--output {spec.output}: hosts share no disk and are taken away; --backend {backend} needs a bucket,"
            " e.g. gs://my-bucket/runs"
        )
    if spec.service_account and backend in ("xpk", "skypilot"):
        raise ConfigError(f"--service-account: {backend} has its own; use --backend tpu or jobset, or leave it out")
    if backend in ("jobset", "xpk") and not spec.image:
        raise ConfigError(f"--backend {backend} needs --image, a container image with dreamer4_jax installed")
    if backend in ("tpu", "skypilot") and not spec.archive:
        raise ConfigError(f"--backend {backend} needs --archive, the code: '.' or gs://my-bucket/code.tar.gz")
    _check_archive(spec.archive)
    _check_mesh(spec, spec.slices * tpu.devices)


def _check_archive(archive: str) -> None:
    path = Path(archive)
    if not archive or archive.startswith("gs://"):
        return
    if archive.endswith((".tar.gz", ".tgz")):
        if not path.is_file():
            raise ConfigError(f"--archive {archive}: there is no such file")
    elif not (path / "dreamer4_jax").is_dir():
        raise ConfigError(f"--archive {archive}: is no checkout of this project (it has no dreamer4_jax)")


def _check_mesh(spec: RunSpec, devices: int) -> None:
    if not spec.mesh:
        return
    from dreamer4_jax.parallel import MeshSpec

    sizes = MeshSpec.parse(spec.mesh).sizes
    fixed = math.prod(size for size in sizes if size != -1)
    if devices % fixed or (-1 not in sizes and fixed != devices):
        raise ConfigError(f"--mesh {spec.mesh}: its sizes multiply to {fixed}, but there are {devices} devices")


def check_config(spec: RunSpec, backend: str, config: Config) -> None:
    """Refuses a config that the machines of a spec could not train.

    Raises:
        ConfigError: a batch that cannot be divided among the devices, or a file that is on this machine alone.
    """
    from dreamer4_jax.parallel.accelerators import accelerator

    if backend == "local":
        devices, hosts, slices = spec.processes * spec.devices_per_process, spec.processes, 1
    else:
        tpu = accelerator(spec.accelerator)
        devices, hosts, slices = (spec.slices * n for n in (tpu.devices, tpu.hosts, 1))
        _check_files(spec, backend, config)
    if spec.mesh or hosts > 1:  # a host that is alone takes as many of its devices as every batch can be divided among
        _check_rows(spec, config, devices, slices)


def _check_rows(spec: RunSpec, config: Config, devices: int, slices: int) -> None:
    """Batches are divided over replica and data; without --mesh several hosts have all their devices in data."""
    from dreamer4_jax.cli import PHASES
    from dreamer4_jax.parallel import MeshSpec

    mesh = MeshSpec.parse(spec.mesh)
    rest = devices // math.prod(size for size in mesh.sizes if size != -1)
    replica, data = (rest if size == -1 else size for size in (mesh.replica, mesh.data))
    trained = PHASES[:2] if config.data.labelled == 0 else PHASES  # as `Run.obstacle` says
    batches = [(name, rows) for name in trained for rows in getattr(config.train, name).rows]
    common = math.gcd(*(rows for _, rows in batches))
    most = max((n for n in range(slices, common + 1, slices) if common % n == devices % n == 0), default=0)
    sizes = {"replica": slices, "data": most // slices, "ctx": devices // most} if most else {}
    works = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1 or axis == "data")
    given = f"--mesh {spec.mesh}" if spec.mesh else f"without --mesh, data={data}"
    if replica % slices:
        raise ConfigError(
            f"{given}: replica={replica}, but it alone crosses the {slices} slices: make it a multiple of {slices}"
            + (f", e.g. --mesh {works}" if works else "")
        )
    for name, rows in batches:
        if rows % (replica * data):
            raise ConfigError(
                f"train.{name}: a batch of {rows} rows cannot be divided among {replica * data} devices ({given}); "
                + (f"use --mesh {works}, or " if works else "use ")
                + f"batches of a multiple of {replica * data} rows in every phase"
            )


def _check_files(spec: RunSpec, backend: str, config: Config) -> None:
    """Machines in the cloud have no file of this one. GKE mounts the bucket of --output, others what a run asks for."""
    from dreamer4_jax.parallel.bucket import MOUNTS
    from dreamer4_jax.validation import PERCEPTUAL_FILES

    bucket = spec.output.removeprefix("gs://").partition("/")[0]
    mount = MOUNTS / bucket
    source, network = config.data.source, config.tokenizer.perceptual
    data = [("data.source", source)] if source and not source.startswith("gym:") else []
    data += [("data.also", also) for also in config.data.also]
    for name, file in data:
        if not Path(file).is_relative_to(MOUNTS if backend in ("tpu", "skypilot") else mount):
            raise ConfigError(
                f"{name} = {file}: lies on this machine alone; copy it into gs://{bucket}, and write gs://{bucket}/..."
            )
    if network.endswith(PERCEPTUAL_FILES) and not Path(network).is_relative_to(mount):
        raise ConfigError(
            f"tokenizer.perceptual = {network}: lies on this machine alone; copy it into gs://{bucket}, which is "
            f"mounted there at {mount}, and write {mount}/..."
        )
