"""PMPO against other objectives of imagined rollouts: the sign of the advantage, its size, or the best paths alone.

    python -m experiments.pmpo --run runs/quickstart-full-seed0  # 75 minutes on a core; its phases 1 and 2 are there
    python -m experiments.pmpo                      # from phase 2 of `make quickstart`, which knows less of rewards
    python -m experiments.pmpo --size smoke         # under a minute: shows that it runs

Takes one finished phase 2 (that of runs/quickstart-seed0, trained if it is not there, or another run's) and trains
phase 3 from it on each seed with each objective: the same frozen world model, contexts, number and length of rollouts,
prior, beta and optimiser.
Every policy plays the same episodes of the real environment. PPO acts with the EMA of its policy, to which its ratios
are: with one update a rollout they would all be 1 to the policy itself. Sweeps: alpha and beta of PMPO, and the scale
of the rewards, of which PMPO sees nothing but through the value's two-hot bins.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

from dreamer4_jax.agent.model import WorldModelPolicy
from dreamer4_jax.config import override
from dreamer4_jax.evaluation import EvalResult, Interval, evaluate_policy, plots, wilson_ci
from dreamer4_jax.evaluation.study import Call, Study, entry
from dreamer4_jax.runner import Run
from dreamer4_jax.training.metrics import read_metrics
from experiments import base

STUDY = Study(
    "pmpo",
    question="Does PMPO, which sees only the signs of advantages, learn better policies in imagination than others?",
    claim="paper 3.3: signs alone suffice, alpha = 0.5 and beta = 0.3 need no tuning, and no scale of rewards matters",
    seeds=(0, 1, 2, 3, 4),
    packages=("scipy",),
)
CLONED = "no RL"
OBJECTIVES: dict[str, dict[str, Any]] = {
    CLONED: {"agent.objective": "none"},
    "PMPO": {"agent.objective": "pmpo"},
    "REINFORCE": {"agent.objective": "reinforce"},
    "REINFORCE, normalised": {"agent.objective": "reinforce", "agent.normalize_advantage": True},
    "PPO clipping, normalised": {"agent.objective": "ppo", "agent.normalize_advantage": True},
    "AWR, normalised": {"agent.objective": "awr", "agent.normalize_advantage": True},
    "cloning of the best paths": {"agent.objective": "filtered_bc"},
}
# None: what the run's config says, or all; objectives: the first of the list above; swept: seeds of the sweeps.
SIZES: dict[str, dict[str, Any]] = {
    "smoke": dict(steps=2, batch=4, episodes=4, seeds=1, swept=1, objectives=3, alphas=(0.25,), betas=(), scales=()),
    "laptop": dict(steps=120, batch=16, episodes=400, seeds=None, swept=1, objectives=None,
                   alphas=(0.1, 0.9), betas=(0.03, 1.0), scales=(0.1, 10.0)),
    "tpu": dict(steps=2000, batch=None, episodes=None, seeds=None, swept=None, objectives=None,
                alphas=(0.1, 0.25, 0.75, 0.9), betas=(0.03, 0.1, 1.0), scales=(0.1, 10.0)),
}  # fmt: skip


def cells(size: Mapping[str, Any]) -> list[tuple[str, float, str, dict[str, Any]]]:
    """(group, place on its axis, objective, overrides) of every cell."""
    out = [("objective", float(i), name, changes) for i, (name, changes) in enumerate(OBJECTIVES.items())]
    out = out[: size["objectives"]]
    for group, values in (("alpha", size["alphas"]), ("beta", size["betas"])):
        out += [(group, v, "PMPO", {**OBJECTIVES["PMPO"], f"agent.{group}": v}) for v in values]
    for name in ("PMPO", "REINFORCE"):
        out += [("reward_scale", v, name, {**OBJECTIVES[name], "agent.reward_scale": v}) for v in size["scales"]]
    return out


def across(results: Sequence[EvalResult]) -> Interval:
    """Success: Student's interval over the seeds' rates, each with its own training; of one seed, Wilson's."""
    if len(results) == 1:
        return wilson_ci(int(results[0].success.sum()), results[0].episodes)
    return student_ci([r.success.mean() for r in results])


def student_ci(x: Sequence[float] | np.ndarray) -> Interval:
    """The mean of two or more numbers with Student's 95 % interval."""
    half = student.ppf(0.975, len(x) - 1) * np.std(x, ddof=1) / np.sqrt(len(x))
    return Interval(float(np.mean(x)), float(np.mean(x) - half), float(np.mean(x) + half))


def train_and_play(
    call: Call, run: Run, name: str, changes: Mapping[str, Any], seed: int
) -> tuple[EvalResult, list[tuple[int, float]]]:
    """What a cell's policy earns in the real environment, and the share of positive advantages by step.

    Without an objective the policy stays that of phase 2, so nothing is trained; the seed is then that of its draws.
    """
    size = SIZES[call.size]
    slug = "-".join(f"{k.rsplit('.', 1)[-1]}-{v}" for k, v in changes.items())
    fields: dict[str, Any] = {**changes, "seed": seed, "name": f"pmpo-{call.size}-{slug}"}
    fields |= {f"train.imagination.{k}": size[k] for k in ("steps", "batch") if size[k]}
    if call.size == "smoke":
        fields |= {"agent.horizon": 2, "train.imagination.log_every": 1}
    agent = run.model("agent")
    policy, curve = agent.policy, []
    if changes["agent.objective"] != "none":
        learned, where = base.train_imagination(call, run, override(run.config, fields))
        policy, curve = learned.policy, positive(where)
    e = run.config.evaluate
    result = evaluate_policy(
        WorldModelPolicy(run.model("tokenizer"), agent.dynamics, policy, seed=seed, name=name),
        run.make_env,
        run.config.env.levels,
        episodes=size["episodes"] or e.episodes,
        envs=e.envs,
        seed=run.config.seed + 1_000_003,
    )
    return result, curve


def positive(where: Path) -> list[tuple[int, float]]:
    """(step, share of advantages >= 0) of a run's phase 3."""
    records = [r for r in read_metrics(where) if "advantage_positive" in r]
    return [(int(r["step"]), float(r["advantage_positive"])) for r in records]


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure, (bars, alpha, scale, share) = plots.panels(
        ["Success in the real world (%)", "PMPO: alpha, beta", "Scale of rewards", "Advantages >= 0 (%)"], 4.2, 3.4
    )
    percent = lambda row: 100 * np.asarray(row["success"])
    cloned = next(r for r in rows if r["objective"] == CLONED)
    named = [r for r in rows if r["group"] == "objective"]
    ends = []
    for i, (row, colour) in enumerate(zip(named, plots.PALETTE, strict=False)):
        mean, low, high = percent(row)
        bars.errorbar(mean, i, xerr=[[max(0, mean - low)], [max(0, high - mean)]], fmt="o", color=colour, capsize=3)
        bars.scatter([100 * r for r in row["rates"]], [i + 0.22] * len(row["rates"]), s=8, color=colour, alpha=0.5)
        curve = np.asarray(row["positive"])
        if row["objective"] != CLONED and len(curve):
            share.plot(curve[:, 0], 100 * curve[:, 1], color=colour)
            ends.append((row["objective"], 100 * curve[-1, 1], colour))
    bars.set_yticks(range(len(named)), [r["objective"] for r in named])
    bars.invert_yaxis()
    bars.set_xlabel("mean of the seeds (small: each seed)")
    share.set_xlabel("step of phase 3, mean of the seeds")
    plots.label_ends(share, ends)
    named_ends: dict[Any, list[tuple[str, float, str]]] = {alpha: [], scale: []}
    swept = next((len(r["rates"]) for r in rows if r["group"] != "objective"), 0)
    at = {"alpha": 0.5, "beta": 0.3, "reward_scale": 1.0}
    for axes, group, name, colour in (
        (alpha, "alpha", "PMPO", plots.PALETTE[1]),
        (alpha, "beta", "PMPO", plots.PALETTE[4]),
        (scale, "reward_scale", "PMPO", plots.PALETTE[1]),
        (scale, "reward_scale", "REINFORCE", plots.PALETTE[2]),
    ):
        middle = {**next(r for r in named if r["objective"] == name), "value": at[group]}
        found = [*(r for r in rows if r["group"] == group and r["objective"] == name), middle]
        found.sort(key=lambda r: r["value"])
        x, y = [r["value"] for r in found], np.asarray([percent(r) for r in found])
        spread = np.maximum([y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]], 0)
        axes.errorbar(x, y[:, 0], yerr=spread, marker="o", capsize=2.5, color=colour)
        named_ends[axes].append((group if axes is alpha else name, y[-1, 0], colour))
    for axes in (alpha, scale):
        axes.set_xscale("log")
        plots.label_ends(axes, named_ends[axes])
        axes.axhline(percent(cloned)[0], color=plots.PALETTE[0], linewidth=1, linestyle="--")
        axes.set_xlabel(f"value (dashed: no RL); seeds: {swept}, in the middle {len(cloned['rates'])}")
    return figure


def describe(rows: Sequence[Mapping[str, Any]]) -> str:
    text = lambda r: "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * np.asarray(r["success"])))
    named = [r for r in rows if r["group"] == "objective"]
    ours: list[float] = next((r["rates"] for r in named if r["objective"] == "PMPO"), [])
    less = []
    for r in named if len(ours) > 1 else []:
        if r["objective"] != "PMPO":
            d = student_ci(100 * (np.asarray(r["rates"]) - ours))
            less.append(f"{r['objective']} {d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}]")
    swept = [f"{r['objective']} at {r['group']} {r['value']:g} {text(r)}" for r in rows if r["group"] != "objective"]
    return (
        f"Success over {len(named[0]['rates'])} seeds of phase 3 (of the sweeps {len(rows[-1]['rates'])}): "
        + "; ".join(f"{r['objective']} {text(r)}" for r in named)
        + (f". Points more than PMPO, paired by seed: {'; '.join(less)}" if less else "")
        + ". Sweeps: "
        + "; ".join(swept)
        + "."
    )


def main(argv: list[str] | None = None) -> None:
    call = STUDY.call(__doc__, argv, add=lambda p: p.add_argument("--run", help="a run with phase 2 finished"))
    size = SIZES[call.size]
    run = base.finished(call, 0)
    rows = []
    for group, value, name, changes in call.track(cells(size)):
        seeds = call.seeds[: size["seeds" if group == "objective" else "swept"]]
        found = [train_and_play(call, run, name, changes, seed) for seed in seeds]
        curves = np.asarray([curve for _, curve in found])  # [seeds, records, 2]
        rows.append(
            {
                "group": group,
                "value": value,
                "objective": name,
                "success": across([r for r, _ in found]),
                "rates": [float(r.success.mean()) for r, _ in found],
                "positive": curves.mean(0),
                "episodes": found[0][0].episodes,
                "seeds": seeds,
            }
        )
    call.write(rows, finding=describe(rows), figure=draw(rows), base=run.config.name, base_seed=run.config.seed)


if __name__ == "__main__":
    entry(main)
