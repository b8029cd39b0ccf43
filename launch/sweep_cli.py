"""`dreamer4 sweep`: its arguments, and what it does with them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.sweep_file import Sweep


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dreamer4 sweep`."""
    parser.add_argument(
        "file", help="a sweep file (see launch/sweep_file.py), or the name of one in experiments/sweeps/"
    )
    parser.add_argument("--out", metavar="DIR", help="sweep directory (runs/sweep-<file>); resumed if it is there")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="trials at once (as many as the cores allow)")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N trials")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="check every trial and print its command; start nothing")
    only.add_argument("--report", action="store_true", help="only write the report of what has ended so far")


def main(args: argparse.Namespace) -> None:
    """Runs, shows or reports a sweep."""
    from launch import sweep as sweeps
    from launch.sweep_file import load

    sweep = load(args.file)
    directory = Path(args.out or f"runs/sweep-{sweep.path.stem}")
    if args.dry_run:
        _show(sweep, directory, args.limit)
        return
    failed = 0
    if not args.report:
        records = sweeps.run(sweep, directory, jobs=args.jobs, limit=args.limit)
        failed = records.count("failed")
    from launch.sweep_report import write_report

    print(write_report(sweep, directory))
    if failed:
        raise sweeps.SweepFailed(
            f"{failed} trials failed; the page names them, their output is in {directory / 'logs'}"
        )


def _show(sweep: "Sweep", directory: Path, limit: int | None) -> None:
    import shlex

    from launch.sweep_file import expand

    for trial in expand(sweep, directory)[:limit]:
        print(shlex.join(trial.spec.command()))
    for field, distribution in sweep.space.items():
        print(field, distribution)
    if sweep.space:
        print(f"{min(sweep.trials, limit or sweep.trials)} trials, drawn as the study goes on")
