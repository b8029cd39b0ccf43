"""`dreamer4 sweep`: its arguments, and what it does with them."""

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dreamer4_jax.config import ConfigError
from launch.cli import BACKENDS, add_cloud_arguments, check, check_config, check_fits, cloud_fields
from launch.spec import RunSpec

if TYPE_CHECKING:
    from launch.backends import Remote
    from launch.sweep_file import Sweep

EPILOG = """\
Here, trials are processes, as many at once as the cores allow. In the cloud each gets machines of its own, and what the
report needs is copied from the bucket into the sweep directory. Ctrl-C lets the trials that are under way save (with
skypilot they end at their last checkpoint), and nothing goes on that costs money; the same command line resumes them.
Failed and pruned trials give their machines back too. Exit code 42: trials were interrupted, and the same line goes on.

example:
  dreamer4 sweep shortcut_steps --backend tpu --accelerator v5litepod-4 --spot --zone us-central1-a --archive . \\
      --bucket gs://my-bucket/sweeps --mesh data=4 --jobs 3 --dry-run
"""


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dreamer4 sweep`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "file", help="a sweep file (see launch/sweep_file.py), or the name of one in experiments/sweeps/"
    )
    parser.add_argument("--out", metavar="DIR", help="sweep directory (runs/sweep-<file>); resumed if it is there")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="trials at once (cores; in the cloud 1)")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N trials")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="check every trial and print what it runs; start nothing")
    only.add_argument("--report", action="store_true", help="only write the report of what has ended so far")
    parser.add_argument("--backend", choices=BACKENDS, default="local", help="where trials run (local)")
    parser.add_argument("--bucket", default="", metavar="gs://...", help="holds the run directories of the cloud")
    parser.add_argument(
        "--check", action="store_true", help="compile every trial for the accelerator first, and refuse what won't fit"
    )
    add_cloud_arguments(parser)


def main(args: argparse.Namespace) -> None:
    """Runs, shows or reports a sweep."""
    from launch import sweep as sweeps
    from launch.sweep_file import load

    sweep = load(args.file)
    directory = Path(args.out or f"runs/sweep-{sweep.path.stem}")
    remote = _remote(args, sweep, directory)
    if args.check:
        _check_fits(remote, sweep, directory, args.limit)
    if args.dry_run:
        _show(sweep, directory, args.limit, remote)
        return
    from launch.sweep_report import write_report

    failed = 0
    if not args.report:
        try:
            if remote:
                remote.require_tools()
                records = sweeps.run(sweep, directory, jobs=args.jobs or 1, limit=args.limit, backend=remote)
            else:
                records = sweeps.run(sweep, directory, jobs=args.jobs, limit=args.limit)
        except sweeps.SweepInterrupted as interrupted:
            if not interrupted.asked:
                print(write_report(sweep, directory))
            raise
        failed = records.count("failed")
    print(write_report(sweep, directory))
    if failed:
        raise sweeps.SweepFailed(
            f"{failed} trials failed; the page names them, their output is in {directory / 'logs'}"
        )


def _remote(args: argparse.Namespace, sweep: "Sweep", directory: Path) -> "Remote | None":
    """The backend of the command line, able to run every trial; None for this machine."""
    from launch.backends import Remote
    from launch.sweep_file import expand, make_trial

    where = RunSpec("sweep", **cloud_fields(args))
    if args.backend == "local":
        if args.bucket or where != RunSpec("sweep"):
            raise ConfigError(
                "--backend local: trials run on this machine, in --out, on as many cores as the sweep file says; choose"
                " another backend, or leave out --bucket, --mesh, --retries and what stands under 'cloud' in --help"
            )
        return None
    if not args.bucket.startswith("gs://"):
        raise ConfigError(
            f"--backend {args.backend} needs --bucket, where the run directories are to be, e.g. gs://my-bucket/sweeps;"
            f" it is {args.bucket!r}"
        )
    where = replace(where, output=f"{args.bucket.rstrip('/')}/{directory.resolve().name}")
    check(where, args.backend)
    remote = Remote(args.backend, where, follow=sweep.prune is not None)
    trials = expand(sweep, directory)[: args.limit]
    for name, distribution in sweep.space.items():
        trials += [make_trial(sweep, {name: end}, directory) for end in distribution.corners]
    for trial in trials:
        remote.refuse(trial.spec)
        check_config(where, args.backend, trial.config)
    return remote


def _check_fits(remote: "Remote | None", sweep: "Sweep", directory: Path, limit: int | None) -> None:
    """Compiles the trials of a grid for their accelerator; of a study, what it starts from."""
    from dreamer4_jax.cli import resolve
    from launch.sweep_file import expand

    if remote is None:
        raise ConfigError("--check compiles for a TPU: name one with --backend and --accelerator")
    if sweep.space:
        check_fits(remote.where, resolve(sweep.experiment, sweep.size, 0, ()))
    for trial in expand(sweep, directory)[:limit]:
        print(f"# {' '.join(trial.spec.overrides)}")
        check_fits(remote.where, trial.config)


def _show(sweep: "Sweep", directory: Path, limit: int | None, remote: "Remote | None") -> None:
    from launch.sweep_file import expand

    for trial in expand(sweep, directory)[:limit]:
        if remote:
            remote.show(trial.spec)
        else:
            print(shlex.join(trial.spec.command()))
    for name, distribution in sweep.space.items():
        print(name, distribution)
    if sweep.space:
        print(f"{min(sweep.trials, limit or sweep.trials)} trials, drawn as the study goes on")
