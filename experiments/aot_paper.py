"""The paper's model compiled for TPU pods that are not here: does it fit, and what would a step cost?

    python -m experiments.aot_paper              # an hour on 2 cores; rows that are there already are kept
    python -m experiments.aot_paper --list       # only names them

Writes experiments/results/aot/paper.json and the table docs/aot.md. How the times are estimated stands in
`dreamer4_jax.parallel.aot`; they come from the compiler, and nothing was run on a TPU.
"""

import argparse
import json
from dataclasses import dataclass, fields
from pathlib import Path

from dreamer4_jax.aot_cli import details, markdown
from dreamer4_jax.config import Config, override, preset
from dreamer4_jax.parallel.aot import AotReport, aot_compile, prepare
from dreamer4_jax.parallel.mesh import MeshSpec
from dreamer4_jax.training.metrics import write_atomic


@dataclass(frozen=True)
class Row:
    """One compilation. `rows`: sequences of a batch; 0: the config's."""

    program: str
    accelerator: str
    mesh: str
    rows: int
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join((self.program, self.accelerator, self.mesh, str(self.rows), *self.overrides))

    def resolved(self) -> Config:
        return override(preset("paper"), dict(item.split("=", 1) for item in self.overrides))


# A sequence for each device of v5p-128, for each group of four of the smaller chips. Over ctx the frames of a sequence
# are split, so that each group of devices that shares sequences has four, and with them a bootstrap row of its own.
ROWS = (
    Row("generate", "v6e-1", "data=1", 1),
    Row("generate", "v6e-1", "data=1", 1, ("dynamics.transformer.scan=false",)),
    Row("generate", "v5p-8", "data=4", 1),
    Row("dynamics", "v5p-128", "data=16,ctx=4", 64),
    Row("dynamics", "v6e-64", "data=4,ctx=16", 16),
    Row("dynamics", "v5e-256", "data=16,ctx=16", 64),
    Row("tokenizer", "v5p-128", "data=64", 64),
    Row("imagination", "v5p-128", "data=64", 64),
    Row("agent", "v5p-128", "data=16,ctx=4", 64),
)


def load(path: Path) -> dict[str, list[AotReport]]:
    """The reports that an earlier call has kept, by the name of their row."""
    if not path.exists():
        return {}
    names = {f.name for f in fields(AotReport)}
    kept = json.loads(path.read_text())["rows"]
    return {name: [AotReport(**{k: v for k, v in r.items() if k in names}) for r in rs] for name, rs in kept.items()}


def page(reports: list[AotReport]) -> str:
    """The table and where each program's memory and time go, as Markdown."""
    return (
        "# The paper's model on TPU pods, compiled ahead of time\n\n"
        "Made by `python -m experiments.aot_paper` with the TPU compiler, on a machine without a TPU: sizes are what\n"
        "it allocates, times are estimates from its own cycle counts (`dreamer4_jax/parallel/aot.py` says how), and\n"
        "nothing here was timed. `paper` is the 400M tokenizer and the 1.6B dynamics at 384 x 640 (360 x 640 padded),\n"
        "with 256 + 32 tokens a frame and a window of 192 frames.\n\n"
        + markdown(reports)
        + "\nHBM is what is in use on a device at the fullest moment, of what it has; what is set aside for\n"
        "activations (below) can be more. The bound is the roofline's time: model FLOPs at peak rate, or every\n"
        "argument read once a pass. MFU counts no recomputation.\n\n"
        "Give each group of devices that shares sequences (the mesh without ctx) a multiple of four: otherwise the\n"
        "bootstrap rows, a quarter of all, cannot be divided, and the teacher computes more rows than are needed, so\n"
        "that each group has rows of its own. Imagination gathers its frozen weights once, in front of the rollout:\n"
        "each device then holds them whole, in the compute dtype.\n\n"
        "Aim and estimate: 55 % MFU was aimed at for T = 64 on v5p. Recomputing every block in the backward pass\n"
        "(`remat=full`) makes a third more products than MFU counts, which leaves 75 % at most. Of the rest,\n"
        "attention takes the largest part: 45 % of the kernels' time, two to three times what its products need, in\n"
        "reading and writing logits. A fused attention kernel with a gradient of its own would close most of it, but\n"
        "for such a kernel the compiler makes no estimate, so it waits for a TPU to be timed on. Saving products\n"
        "instead of recomputing them (`remat=dots`) was no faster by the same estimate: residuals that the scan over\n"
        "layers stacks cost what they save.\n\n## Details\n\n"
        "```\n" + "\n".join(map(details, reports)) + "\n```\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the rows and compile nothing")
    parser.add_argument("--only", help="rows whose name holds this text")
    parser.add_argument("--results", type=Path, default=Path("experiments/results/aot/paper.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/aot.md"))
    parser.add_argument("--keep-text", metavar="DIR", help="keep the compiled programs' text")
    args = parser.parse_args()
    if args.list:
        print("\n".join(row.name for row in ROWS))
        return
    prepare()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    for row in ROWS:
        if row.name in load(args.results) or (args.only and args.only not in row.name):
            continue
        print(row.name, flush=True)
        found = aot_compile(
            row.resolved(),
            row.accelerator,
            mesh=MeshSpec.parse(row.mesh),
            programs=(row.program,),
            rows=row.rows or None,
            variant=" ".join(row.overrides),
            keep_text=args.keep_text,
        )
        kept = load(args.results) | {row.name: found}
        ordered = [r.name for r in ROWS if r.name in kept]
        tree = {
            "command": "python -m experiments.aot_paper",
            "rows": {n: [r.to_dict() for r in kept[n]] for n in ordered},
        }
        write_atomic(args.results, json.dumps(tree, indent=1) + "\n")
        print("\n".join(map(details, found)), flush=True)
    args.page.write_text(page([r for reports in load(args.results).values() for r in reports]))


if __name__ == "__main__":
    main()
