"""Does it matter how the two branches of shortcut forcing share a batch, and whose weights teach?

    python -m experiments.bootstrap_mix                  # two hours on a core, beside other work
    python -m experiments.bootstrap_mix --size smoke     # under a minute
    python -m experiments.bootstrap_mix --size tpu       # seven times the steps, eight times the rows

The paper draws (tau, d) for every frame (Eq 4) and writes the network itself, with a stop-gradient, as the teacher of
the bootstrap term. This library splits by rows (a quarter of them bootstraps, so the teacher computes a quarter of the
batch) and lets the moving average teach. All four combinations, on the tokens of runs/quickstart-seed<N> (made if it is
not there) and for the same number of steps: imagined clips at K = 1, 4 and k_max, and what a step costs.
"""

from functools import partial
from itertools import product
from typing import Any

import numpy as np

from dreamer4_jax.config import override
from dreamer4_jax.evaluation import plots
from dreamer4_jax.evaluation.metrics import bootstrap_difference_ci
from dreamer4_jax.evaluation.rollouts import imagine_clips
from dreamer4_jax.evaluation.study import Call, Study, entry
from dreamer4_jax.evaluation.worldmodel import as_dict
from dreamer4_jax.training.metrics import read_ledger
from experiments import base

STUDY = Study(
    "bootstrap_mix",
    question="Does it matter whether rows or single frames bootstrap, and whose weights teach?",
    claim="The paper draws d for each frame (Eq 4) and teaches with the online weights; it reports no alternative.",
    seeds=(0, 1, 2),
)
SIZES: dict[str, dict[str, Any]] = {
    "smoke": dict(steps=8, batch=4, clips=4),
    "laptop": dict(steps=900, batch=4, clips=128),  # the training of the quickstart
    "tpu": dict(steps=6000, batch=32, clips=512),
}
MIXES = {"rows": "a quarter of the rows", "frames": "single frames (Eq 4)"}
TEACHERS = {"ema": "average", "online": "online"}


def measure(call: Call, seed: int) -> list[dict[str, Any]]:
    """Rows of one seed: each combination at each K, with the clips' accuracies of tiles that change."""
    size = SIZES[call.size]
    run = base.trained(call, seed, "tokenizer")
    held, tokenizer = base.held_out(run, size["clips"]), run.model("tokenizer")
    k_max, warmup = run.config.dynamics.k_max, min(run.config.train.dynamics.warmup, size["steps"])
    trained = {"steps": size["steps"], "batch": size["batch"], "warmup": warmup}
    shared = {f"train.dynamics.{name}": value for name, value in trained.items()}

    def of_model(mix: str, teacher: str) -> list[dict[str, Any]]:
        name, out = f"mix-{mix}-{teacher}", []
        fields = {"dynamics.mix": mix, "dynamics.teacher": teacher, **shared}
        model = run.variant(name, fields)
        flops = base.step_flops(run, override(run.config, fields))
        seconds = read_ledger(run.dir)[name]["train"] / (size["steps"] - 1)  # the first one compiles
        for k in sorted({1, min(4, k_max), k_max}):
            scores = held.score(imagine_clips(model, tokenizer, held, k, seed))
            top, bottom = scores.parts()["changed_accuracy"]
            out.append(
                {
                    "seed": seed,
                    "mix": mix,
                    "teacher": teacher,
                    "steps": k,
                    "seconds_per_step": seconds,
                    "gflop_per_step": flops / 1e9,
                    **{name: scores.summary(())["average"][name] for name in ("symbol_accuracy", "changed_accuracy")},
                    "clips": [round(float(x), 4) for x in top.sum(1) / np.maximum(bottom.sum(1), 1)],
                }
            )
        return out

    cells = call.track(list(product(MIXES, TEACHERS)), f"seed {seed}")
    return [row for cell in cells for row in call.kept(f"seed{seed}-{'-'.join(cell)}", partial(of_model, *cell))]


def difference(rows: list[dict[str, Any]], k: int, field: str, a: str, b: str) -> dict[str, float] | None:
    """Changed-tile accuracy with `field` = a minus that with b, at K = k: paired by clip, over seeds and what else
    differs."""
    pick = lambda value: np.concatenate([r["clips"] for r in rows if r["steps"] == k and r[field] == value])
    return as_dict(bootstrap_difference_ci(pick(a), pick(b)))


def compare(rows: list[dict[str, Any]]) -> dict[str, dict[int, Any]]:
    """What each choice brings at each K; the teacher's for each mix by itself."""
    steps = sorted({row["steps"] for row in rows})
    out = {"Rows minus frames": {k: difference(rows, k, "mix", "rows", "frames") for k in steps}}
    for mix in MIXES:
        mine = [row for row in rows if row["mix"] == mix]
        out[f"Average minus online teacher with {mix}"] = {
            k: difference(mine, k, "teacher", "ema", "online") for k in steps
        }
    return out


def draw(rows: list[dict[str, Any]]):
    """Accuracy of each combination and seed at each K, and what a step multiplies."""
    steps = sorted({row["steps"] for row in rows})
    figure, axes = plots.panels(
        [*(f"K = {k}: tiles that change" for k in steps), "products of a training step"], 3.4, 3.2
    )
    order = list(product(MIXES, TEACHERS))
    labels = [f"{MIXES[m].replace(' (', chr(10) + '(')}\n{TEACHERS[t]} teacher" for m, t in order]
    for panel, k in zip(axes, [*steps, None], strict=True):
        for at, (mix, teacher) in enumerate(order):
            mine = [r for r in rows if (r["mix"], r["teacher"]) == (mix, teacher) and r["steps"] == (k or steps[0])]
            if k is None:
                panel.barh(at, mine[0]["gflop_per_step"], 0.5, color=plots.PALETTE[at])  # of every seed the same
                continue
            for r, shift in zip(mine, np.linspace(-0.15, 0.15, len(mine)) if len(mine) > 1 else [0.0], strict=True):
                mean, low, high = (100 * r["changed_accuracy"][name] for name in ("mean", "low", "high"))
                panel.errorbar(mean, at + shift, xerr=[[mean - low], [high - mean]], fmt="o", color=plots.PALETTE[at],
                               markersize=4)  # fmt: skip
        panel.set_yticks(range(len(order)), labels if panel is axes[0] else [""] * len(order))
        panel.set_ylim(len(order) - 0.5, -0.5)
        panel.set_xlabel("GFLOP, by the program" if k is None else "right (%), one point a seed, 95 % of clips")
        panel.grid(axis="x", alpha=0.14)
    return figure


def found(rows: list[dict[str, Any]], differences: dict[str, Any]) -> str:
    """The paragraph: differences in points with their intervals, and the costs."""
    parts = []
    for name, each in differences.items():
        told = [
            f"{100 * d['mean']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}] at K = {k}"
            for k, d in each.items()
        ]
        parts.append(f"{name}: {', '.join(told)}")
    cost = {m: next(r["gflop_per_step"] for r in rows if r["mix"] == m) for m in MIXES}
    k_max = max(r["steps"] for r in rows)
    levels = k_max.bit_length()
    return (
        f"Points of accuracy on tiles that change (95 % intervals over the clips of all seeds; other seeds may "
        f"differ by more). {'. '.join(parts)}. A step "
        f"multiplies {cost['rows']:.1f} GFLOP with rows and {cost['frames']:.1f} with frames "
        f"({cost['frames'] / cost['rows']:.2f} times), where the teacher computes the whole batch. "
        f"Rows give a quarter of a batch to the bootstrap term, Eq 4 with k_max = {k_max} gives {levels - 1} of "
        f"{levels} frames: in as many steps it sees less of the data itself."
    )


def main(argv=None) -> None:
    call = STUDY.call(__doc__, argv)
    rows = [row for seed in call.seeds for row in measure(call, seed)]
    differences = compare(rows)
    call.write(rows, finding=found(rows, differences), figure=draw(rows), differences=differences)


if __name__ == "__main__":
    entry(main)
