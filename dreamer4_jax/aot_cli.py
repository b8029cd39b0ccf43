"""`dreamer4 aot`: does a config fit a TPU, and how fast might it be? As a table, as Markdown and as JSON."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dreamer4_jax.config import Config, ConfigError, override, parse_overrides

if TYPE_CHECKING:  # a mere --help imports no JAX
    from dreamer4_jax.parallel.aot import AotReport

GIB = 2**30

EPILOG = """\
examples:
  dreamer4 aot paper --accelerator v5p-128 --mesh data=16,ctx=4 --programs dynamics --rows 64
  dreamer4 aot paper --accelerator v6e-1 --programs generate --compare v5p-8
  dreamer4 aot small --accelerator v5e-8 --variant dynamics.transformer.remat=full

Exits with 1 if a program does not fit. Nothing is run, and no TPU is needed: the compiler is a package,
pip install 'dreamer4_jax[aot]'.
"""
HEADS = ("program", "TPU", "mesh", "rows", "fits", "HBM GiB", "of", "step ms", "bound", "MFU", "frames/s", "compile s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options beside experiment, size, seed and overrides."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("--accelerator", required=True, help="TPU type, e.g. v5p-128, v5e-256, v6e-1")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices, joined by the mesh axis 'replica' (1)")
    parser.add_argument("--mesh", default="", metavar="SIZES", help="e.g. data=16,ctx=4 (all devices over data)")
    parser.add_argument(
        "--programs", default="", help="of tokenizer,dynamics,agent,imagination,generate, by commas (all)"
    )
    parser.add_argument("--rows", type=int, help="sequences of a batch, instead of the config's")
    parser.add_argument("--steps", type=int, default=4, help="K of generate (4)")
    parser.add_argument(
        "--compare", action="append", default=[], metavar="TPU[:MESH]", help="also for this one (may be repeated)"
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="FIELD=VALUE[,...]",
        help="also with these overrides (may be repeated)",
    )
    parser.add_argument("--out", help="also write the reports to this JSON file")
    parser.add_argument("--keep-text", metavar="DIR", help="keep the compiled programs' text, to look for costs")


def main(args: argparse.Namespace, config: Config) -> int:
    """Runs the command; returns its exit code."""
    from rich.console import Console

    from dreamer4_jax.parallel.accelerators import accelerator
    from dreamer4_jax.parallel.aot import aot_compile, prepare
    from dreamer4_jax.parallel.mesh import MeshSpec
    from dreamer4_jax.training.metrics import write_atomic

    targets = [(args.accelerator, args.mesh), *(item.partition(":")[::2] for item in args.compare)]
    for name, _ in targets:
        accelerator(name)
    variants = [("", config)]
    for text in args.variant:
        variants.append((text, override(config, parse_overrides(text.split(",")))))
    prepare()
    reports: list[AotReport] = []
    with Console(stderr=True).status("") as status:
        for name, mesh in targets:
            for variant, changed in variants:
                status.update(f"compiling for {name} {variant}")
                reports += aot_compile(
                    changed,
                    name,
                    slices=args.slices,
                    mesh=MeshSpec.parse(mesh) if mesh else None,
                    programs=tuple(filter(None, args.programs.split(","))),
                    rows=args.rows,
                    steps=args.steps,
                    variant=variant,
                    keep_text=args.keep_text,
                )
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file or a pipe has no edge
    console.print(table(reports))
    for report in reports if len(reports) <= 4 else []:
        console.print(details(report), highlight=False)
    for report in reports:
        if not report.fits:
            console.print(f"{report.program} on {report.accelerator}: {report.error}", style="red", highlight=False)
    if args.out:
        write_atomic(Path(args.out), json.dumps([r.to_dict() for r in reports], indent=1) + "\n")
    return 0 if all(r.fits for r in reports) else 1


def row(report: "AotReport") -> list[str]:
    """The cells of one report, as `HEADS` names them."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1) or "one device"
    slices = f"{report.slices} x " if report.slices > 1 else ""
    name = f"{report.program} ({report.variant})" if report.variant else report.program
    cells = [name, slices + report.accelerator, mesh, str(report.rows), "yes" if report.fits else "NO"]
    cells += [f"{report.peak / GIB:.2f}", f"{report.limit / GIB:.2f}"]
    if not report.fits:
        return [*cells, "", "", "", "", f"{report.compile_s:.0f}"]
    return [
        *cells,
        f"{1e3 * report.step_s:.1f}",
        f"{1e3 * report.roofline_s:.1f}",
        f"{report.mfu:.0%}",
        f"{report.frames_per_s:.3g}",
        f"{report.compile_s:.0f}",
    ]


def table(reports: Sequence["AotReport"]):
    """All reports as one table for a terminal."""
    from rich.table import Table

    out = Table(title="compiled ahead of time; times are estimates, bound: the roofline's")
    for i, head in enumerate(HEADS):
        out.add_column(head, justify="right" if i > 4 else "left")
    for report in reports:
        out.add_row(*row(report))
    return out


def markdown(reports: Sequence["AotReport"]) -> str:
    """All reports as one Markdown table."""
    lines = [list(HEADS), ["---"] * len(HEADS), *(row(r) for r in reports)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def details(report: "AotReport") -> str:
    """Where the memory and the time of one program go."""
    hbm = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in report.hbm.items())
    lines = [f"{report.program} on {report.accelerator}: GiB of a device: {hbm}"]
    if not report.fits:
        return lines[0]
    lines.append(
        f"  {report.model_flops / 1e12:.1f} model TFLOP; kernels {1e3 * report.compute_s:.2f} ms, communication"
        f" {1e3 * report.exposed_s:.2f} ms waited for and {1e3 * report.hidden_s:.2f} ms beside them"
    )
    for at in report.collectives[:6]:
        where = "DCN" if at["slices"] else "ICI"
        lines.append(
            f"  {at['kind']} among {at['size']} over {where}{', hidden' if at['hidden'] else ''}: {at['count']:.0f} x,"
            f" {at['bytes'] / 2**20:.1f} MiB, {1e3 * at['seconds']:.2f} ms"
        )
    stages = ", ".join(f"{name} {share:.0%}" for name, share in list(report.scopes.items())[:8])
    return "\n".join([*lines, f"  share of the kernels: {stages}"])


def check_fits(config: Config, name: str, *, slices: int = 1, mesh: str = "") -> list["AotReport"]:
    """Compiles every phase of a config for a TPU.

    Raises:
        ConfigError: one of them does not fit; the message says by how much.
    """
    from dreamer4_jax.parallel.aot import aot_compile, prepare
    from dreamer4_jax.parallel.mesh import MeshSpec
    from dreamer4_jax.parallel.programs import PHASES

    prepare()
    reports = aot_compile(config, name, slices=slices, mesh=MeshSpec.parse(mesh) if mesh else None, programs=PHASES)
    for report in reports:
        if not report.fits:
            raise ConfigError(
                f"{report.program} does not fit on {name}: it needs {report.peak / GIB:.1f} GiB of"
                f" {report.limit / GIB:.2f} on each device; use more devices, a smaller train.*.batch,"
                " dynamics.transformer.remat=full, or a mesh with ctx"
            )
    return reports
