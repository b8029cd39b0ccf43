"""The quickstart on several run seeds: does imagination beat cloning in the real environment, and how often?

    python -m experiments.quickstart_seeds --seeds 0 1 2 3 4                 # 5 x 15 minutes on 2 cores
    python -m experiments.quickstart_seeds --seeds 0 --size smoke --out DIR   # shows that it runs, 3 minutes

Every seed is a run of its own (data, initialisation, training and evaluation episodes), kept in runs/ and resumed if it
is there. The figures of a seed whose run is elsewhere, but whose seed<N>.json is there, are taken as they are.
Writes into --out (experiments/results/quickstart, or quickstart-full): seed<N>.json with the numbers of the run's
report, seed<N>.png and .webp with imagined clips, summary.json, success.png with the success rates of all policies on
all seeds, and README.md with the same as tables.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from dreamer4_jax.evaluation.rollouts import FINETUNED
from dreamer4_jax.evaluation.summary import CLONED, IMAGINED
from dreamer4_jax.parallel import start
from dreamer4_jax.runner import Run
from dreamer4_jax.training.metrics import write_atomic
from experiments.quickstart import config

SHOWN = ("random", "blind", "data", CLONED, "phase 2, greedy", IMAGINED, "phase 3, greedy")


def run_seed(size: str, seed: int, runs: Path, out: Path) -> dict[str, Any]:
    """One run, finished or resumed; returns and writes its numbers."""
    c, written = config(size, seed), out / f"seed{seed}.json"
    if written.exists() and not (runs / f"{c.name}-seed{seed}").exists():
        print(f"seed {seed}: taken from {written}; remove that file to run it again")
        return json.loads(written.read_text())
    run = Run(c, runs / f"{c.name}-seed{seed}", resume=True)
    run.all()
    return run.keep(out, f"python -m experiments.quickstart_seeds --size {size} --seeds {seed}")


def summarize(kept: list[dict[str, Any]]) -> dict[str, Any]:
    """Seeds on which each target was met, and success of every policy on every seed."""
    names = list(dict.fromkeys(t["name"] for k in kept for t in k["targets"]))  # an older seed may have others
    met = {n: [bool(t["passed"]) for k in kept for t in k["targets"] if t["name"] == n] for n in names}
    success = {name: [next(p["success"] for p in k["policies"] if p["policy"] == name) for k in kept] for name in SHOWN}
    return {
        "seeds": [k["seed"] for k in kept],
        "minutes": [round(k["minutes"], 1) for k in kept],
        "targets_met": {n: f"{sum(v)} of {len(v)}" for n, v in met.items()},
        "success": success,
    }


def tables(kept: list[dict[str, Any]], met: dict[str, str]) -> str:
    """The figures of all seeds as Markdown."""

    def percent(interval: dict[str, float] | None) -> str:
        if interval is None:
            return ""
        return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * interval[k] for k in ("mean", "low", "high")))

    def table(head: list[str], rows: list[list[str]]) -> str:
        return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows]) + "\n"

    def condition(k: dict[str, Any], name: str, field: str) -> str:
        return percent(next((c["average"][field] for c in k["conditions"] if c["name"] == name), None))

    world, success = [], []
    for k in kept:
        rows = k["steps"]["models"][0]["rows"]
        true = "shortcut forcing, true actions"
        world.append(
            [
                str(k["seed"]),
                percent(k["reconstruction"]["symbol_accuracy"]),
                f"{k['reconstruction']['psnr']['mean']:.1f}",
                condition(k, true, "symbol_accuracy"),
                condition(k, true, "repeat_accuracy"),
                *(percent(row["symbol_accuracy"]) for row in (rows[0], rows[-1])),
                condition(k, true, "changed_accuracy"),
                condition(k, true, "repeat_changed_accuracy"),
                condition(k, "shortcut forcing, shuffled actions", "changed_accuracy"),
                condition(k, FINETUNED, "changed_accuracy"),
            ]
        )
        of = {p["policy"]: percent(p["success"]) for p in k["policies"]}
        success.append([str(k["seed"]), *(of[name] for name in SHOWN), f"{k['minutes']:.1f}"])
    first = kept[0]
    last = first["steps"]["models"][0]["rows"][-1]["steps"]
    head = ["seed", "reconstruction", "dB", "K = 4", "repeat", "K = 1", f"K = {last}"]
    head += ["changed: K = 4", "repeat", "shuffled", "after phase 2"]
    machine = ", ".join(f"{name} {value}" for name, value in first["machine"].items() if name != "date")
    episodes = first["policies"][0]["episodes"]
    return (
        f"Made by `{first['command'].split(' --seeds')[0]}`; machine of the first seed: {machine}. In brackets 95 %\n"
        "bootstrap intervals over the clips or episodes of one run; they say nothing about other seeds.\n\n"
        "Tiles that are right, in per cent, on held-out frames and over the imagined frames of held-out clips at the\n"
        "true actions; of all tiles, and of those that change:\n\n"
        + table(head, world)
        + f"\nSuccess in the real environment, in per cent of {episodes} episodes, and minutes of the whole run:\n\n"
        + table(["seed", *SHOWN, "minutes"], success)
        + "\nTargets met, of the seeds above:\n\n"
        + table(["target", "seeds"], [[name, count] for name, count in met.items()])
    )


def draw(summary: dict[str, Any], path: Path) -> None:
    """Success with 95 % intervals: one group of points for each policy, one point for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    count = len(summary["seeds"])
    for i, name in enumerate(SHOWN):
        for j, interval in enumerate(summary["success"][name]):
            x = i + (j - (count - 1) / 2) * 0.6 / max(count, 2)
            mean, low, high = (100 * interval[k] for k in ("mean", "low", "high"))
            colour = "#1f77b4" if name.startswith("phase 3") else "#888888" if i < 3 else "#d08000"
            axes.errorbar(x, mean, [[mean - low], [high - mean]], fmt="o", ms=4, capsize=2, color=colour)
    axes.set_xticks(range(len(SHOWN)), [n.replace(" (", "\n(").replace(", ", ",\n") for n in SHOWN])
    axes.set_xlim(-0.5, len(SHOWN) - 0.5)  # room for the last name
    axes.set_ylabel("success in the real environment (%)")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"Quickstart, seeds {', '.join(map(str, summary['seeds']))}: 95 % bootstrap intervals over episodes")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--size", choices=("smoke", "quick", "full"), default="quick")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, help="directory of the results (experiments/results/<experiment and size>)")
    args = parser.parse_args()
    start()
    out = args.out or Path("experiments/results") / config(args.size).name
    out.mkdir(parents=True, exist_ok=True)
    kept = [run_seed(args.size, seed, args.runs, out) for seed in args.seeds]
    summary = summarize(kept)
    write_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    (out / "README.md").write_text(tables(kept, summary["targets_met"]))
    draw(summary, out / "success.png")
    print(json.dumps(summary["targets_met"], indent=1))


if __name__ == "__main__":
    main()
