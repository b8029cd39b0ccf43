"""Search while acting against learning while training: what does a decision cost, and what is it worth?

    python -m experiments.search --run runs/quickstart-full-seed0  # two hours on a core; its phases 1 and 2 are there
    python -m experiments.search                  # from phase 2 of `make quickstart`, which knows less of rewards
    python -m experiments.search --size smoke     # under a minute: shows that it runs

One frozen world model. Its policies, after phase 2 and after phase 3 (amortised), act at once; best of N, the
cross-entropy method and Gumbel MuZero search it from the phase-2 policy as prior, with the value of that policy (phase
3 with objective "none") at the leaves. The same searches in copies of the real environment separate what the model gets
wrong from what the search does. All play the same episodes. Milliseconds are of one decision in one stream;
`break_even` is the number of decisions after which training phase 3 was cheaper than searching (whose value was trained
too: the `training_seconds` of its rows).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dreamer4_jax.agent.model import WorldModelPolicy
from dreamer4_jax.agent.planning import BestOfN, CrossEntropy, GumbelMuZero, Search, SearchPolicy
from dreamer4_jax.config import override
from dreamer4_jax.evaluation import EvalResult, bootstrap_ci, evaluate_policy, plots, wilson_ci
from dreamer4_jax.evaluation.simulator import EnvCopies
from dreamer4_jax.evaluation.study import Call, Study, entry
from dreamer4_jax.runner import Run
from dreamer4_jax.training.metrics import read_ledger
from dreamer4_jax.world.oracle import TransitionOracle
from experiments import base

STUDY = Study(
    "search",
    question="With one world model, is it better to learn in it beforehand or to search it at every decision?",
    claim="Hamrick et al. 2021: planning helps most while learning; acting by the learned policy is nearly as good, at "
    "a fraction of the cost",
    packages=("mctx",),
)
REAL_TIME = 50.0  # ms a decision at 20 decisions a second
SIZES: dict[str, dict[str, Any]] = {
    "smoke": dict(trees=(2,), rollouts=(2,), rounds=(), real=(2,), horizon=2, episodes=2, timed=2, streams=1),
    "laptop": dict(trees=(1, 4, 16, 64, 256), rollouts=(1, 4, 16, 64), rounds=(8, 32), real=(4, 16), horizon=8,
                   episodes=64, timed=30, streams=16),
    "tpu": dict(trees=(1, 4, 16, 64, 256), rollouts=(1, 4, 16, 64, 256), rounds=(8, 32, 128, 256), real=(4, 16, 64),
                horizon=8, episodes=400, timed=200, streams=64),
}  # fmt: skip


def searches(size: Mapping[str, Any], gamma: float) -> Iterator[tuple[str, Search, bool]]:
    """(name, search, whether in the real environment) of every cell."""
    h = size["horizon"]
    trees = lambda n: GumbelMuZero(n, depth=h, gamma=gamma)
    best = lambda n: BestOfN(n, horizon=h, gamma=gamma)
    yield from (("tree", trees(n), False) for n in size["trees"])
    yield from (("best of N", best(n), False) for n in size["rollouts"])
    yield from (("cross-entropy", CrossEntropy(n, horizon=h, gamma=gamma), False) for n in size["rounds"])
    yield from (("tree, real world", trees(n), True) for n in size["real"])
    yield from (("best of N, real world", best(n), True) for n in size["real"])


def milliseconds(policy: WorldModelPolicy, run: Run, decisions: int) -> dict[str, float]:
    """Median and 95th percentile of a decision in one stream; the two that compile are not counted."""
    env = run.make_env(run.config.env.levels[0])
    observation, _ = env.reset(seed=0)
    if isinstance(policy, SearchPolicy):
        policy.begin(0, env, 0)
    policy.reset(np.ones(1, bool))
    spent = []
    for _ in range(decisions + 2):
        began = time.perf_counter()
        policy.act(observation["image"][None], observation["task"][None])
        spent.append(1000 * (time.perf_counter() - began))
    p50, p95 = np.percentile(spent[2:], [50, 95])
    return {"p50": float(p50), "p95": float(p95)}


def play(policy: Any, run: Run, episodes: int, streams: int) -> EvalResult:
    levels, seed = run.config.env.levels, run.config.seed + 1_000_003
    return evaluate_policy(policy, run.make_env, levels, episodes=episodes, envs=streams, seed=seed)


def measure(
    run: Run,
    name: str,
    make: Any,
    size: Mapping[str, Any],
    search: Search | None,
    streams: int,
    train: float,
    *,
    real: bool = False,
) -> dict[str, Any]:
    """One cell. `make()` gives a fresh policy; `train`: seconds of phase 3 behind it; `real`: searched in copies of the
    environment."""
    # An imagined frame takes K passes and one that writes it; a real one is only written.
    each = 1 if real else run.config.agent.sample_steps + 1
    policy = make()
    result = play(policy, run, size["episodes"], streams)
    frames = search.frames if search else 0
    row = {
        "name": name,
        "budget": search.budget if search else 0,
        "success": wilson_ci(int(result.success.sum()), result.episodes),
        "return": bootstrap_ci(result.returns),
        "episodes": result.episodes,
        "milliseconds": milliseconds(make(), run, size["timed"]),
        # One more sees the frame that is decided on.
        "passes": 1 + frames * each,
        "dependent_passes": 1 + (search.dependent if search else 0) * each,
        "training_seconds": train,
    }
    if search:
        # Rewards come with the last step alone.
        earned = result.returns * run.config.agent.gamma ** (result.lengths - 1)
        row["imagined_minus_real"] = bootstrap_ci(np.asarray(policy.believed) - earned)
    return row


def seconds(where: Any) -> float:
    return float(sum(read_ledger(where)["imagination"].values()))


def cells(call: Call, run: Run, seed: int) -> Iterator[dict[str, Any]]:
    """Every row of a seed."""
    size, c = SIZES[call.size], run.config
    fields: dict[str, Any] = {"seed": seed, "name": f"search-{call.size}"}
    if call.size == "smoke":
        fields |= {"agent.horizon": 2, "train.imagination.batch": 4, "train.imagination.steps": 2}
    better, better_dir = base.train_imagination(call, run, override(c, fields | {"name": f"search-{call.size}-pmpo"}))
    valued, valued_dir = base.train_imagination(
        call, run, override(c, fields | {"name": f"search-{call.size}-value", "agent.objective": "none"})
    )
    cost, value_cost = seconds(better_dir), seconds(valued_dir)
    agent, tokenizer, steps = run.model("agent"), run.model("tokenizer"), c.agent.sample_steps
    oracle = TransitionOracle(tokenizer, agent.dynamics, agent.reward, agent.cont, steps=steps)
    amortised = []
    for name, head, greedy, train in (
        ("phase 2", agent.policy, False, 0.0),
        ("phase 2, greedy", agent.policy, True, 0.0),
        ("phase 3", better.policy, False, cost),
        ("phase 3, greedy", better.policy, True, cost),
    ):

        def act(head=head, greedy=greedy, name=name):
            return WorldModelPolicy(tokenizer, agent.dynamics, head, seed=seed, greedy=greedy, name=name)

        amortised.append(measure(run, name, act, size, None, size["streams"], train))
    yield from amortised
    for name, search, real in call.track(list(searches(size, c.agent.gamma)), f"searching, seed {seed}"):
        # One for all policies of a cell: each is a program of its own. Every decision restarts it.
        copies = EnvCopies(c.tokenizer.height, c.tokenizer.width, seed=seed) if real else None

        def think(search=search, copies=copies, name=name):
            return SearchPolicy(oracle, agent.policy, valued.value, search, seed=seed, name=name, real=copies)

        # A tree keeps `depth` frames' history in each node, a rollout a whole window: bound what is held at once.
        streams = max(1, min(size["streams"], 1024 // search.budget))
        row = measure(run, name, think, size, search, streams, value_cost, real=real)
        dearer = row["milliseconds"]["p50"] - amortised[2]["milliseconds"]["p50"]
        row["break_even"] = 1000 * cost / dearer if dearer > 0 else None
        yield row


def best(rows: Sequence[Mapping[str, Any]], limit: float = np.inf) -> Mapping[str, Any] | None:
    """The search in the world model with most success among those that decide in `limit` milliseconds, if any does."""
    found = [r for r in rows if r["budget"] and "real" not in r["name"] and r["milliseconds"]["p50"] <= limit]
    return max(found, key=lambda r: r["success"][0], default=None)


def totals(axes: Any, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    """Training and deciding together against decisions: where two lines cross, the dearer training has paid off."""
    shown = [next(r for r in rows if r["name"] == "phase 3"), best(rows, REAL_TIME), best(rows)]
    count, ends = np.logspace(2, 6, 50), []
    for row in {id(r): r for r in shown if r}.values():
        colour = colours[row["name"]]
        hours = (row["training_seconds"] + count * row["milliseconds"]["p50"] / 1000) / 3600
        axes.plot(count, hours, color=colour)
        name = f"{row['name']} of {row['budget']}" if row["budget"] else row["name"]
        ends.append((f"{name}: {100 * row['success'][0]:.0f} %", float(hours[-1]), colour))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("decisions of one stream")
    plots.label_ends(axes, ends)


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    figure, (clock, passes, gap, total) = plots.panels(
        [
            "Success (%) against time",
            "Success (%) against network passes",
            "Imagined minus real return",
            "Hours to train and decide",
        ],
        4.6,
        3.6,
    )
    names = list(dict.fromkeys(r["name"] for r in rows))
    colours = dict(zip(names, (*plots.PALETTE, "#555555"), strict=False))
    totals(total, rows, colours)
    for axes, x in ((clock, lambda r: r["milliseconds"]["p50"]), (passes, lambda r: r["passes"])):
        ends = []
        for name in names:
            found = [r for r in rows if r["name"] == name and not (axes is passes and "real" in name)]
            if not found:
                continue
            y = 100 * np.asarray([r["success"] for r in found])
            spread = np.maximum([y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]], 0)
            axes.errorbar([x(r) for r in found], y[:, 0], yerr=spread, marker="o", capsize=2, color=colours[name],
                          linestyle="--" if "real" in name else "-", linewidth=1.4)  # fmt: skip
            ends.append((name, float(y[-1, 0]), colours[name]))
        axes.set_xscale("log")
        plots.label_ends(axes, ends)
    clock.axvline(REAL_TIME, color=plots.INK, linewidth=0.8, linestyle=":")
    clock.set_xlabel("ms a decision (dotted: 20 decisions a second)")
    passes.set_xlabel("network passes a decision")
    ends = []
    for name in names:
        found = [r for r in rows if r["name"] == name and "imagined_minus_real" in r]
        if found:
            y = np.asarray([r["imagined_minus_real"] for r in found])
            spread = np.maximum([y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]], 0)
            gap.errorbar([r["budget"] for r in found], y[:, 0], yerr=spread, marker="o", capsize=2, color=colours[name])
            ends.append((name, float(y[-1, 0]), colours[name]))
    gap.axhline(0, color=plots.INK, linewidth=0.8)
    gap.set_xscale("log", base=2)
    gap.set_xlabel("budget (simulations or rollouts)")
    plots.label_ends(gap, ends)
    return figure


def describe(rows: Sequence[Mapping[str, Any]]) -> str:
    def text(r: Mapping[str, Any]) -> str:
        budget = f" of {r['budget']}" if r["budget"] else ""
        mean, low, high = (100 * x for x in r["success"])
        return f"{r['name']}{budget} {mean:.1f} % [{low:.1f}, {high:.1f}] at {r['milliseconds']['p50']:.3g} ms"

    fast, top = best(rows, REAL_TIME), best(rows)
    assert top is not None
    learned = next(r for r in rows if r["name"] == "phase 3")
    even = lambda r: f"{r['break_even']:,.0f}" if r["break_even"] else "no number of"
    return (
        f"Acting by what was learned: {text(learned)}. "
        + (f"Best search within {REAL_TIME:.0f} ms: {text(fast)}. " if fast else "No search decides within 50 ms. ")
        + f"Best search without a limit: {text(top)}. Phase 3 took {learned['training_seconds']:.0f} s to train, the "
        f"value that the searches use {top['training_seconds']:.0f} s; without the latter, training phase 3 costs what "
        f"{even(fast or top)} decisions of the first of them cost more, and {even(top)} of the second. All: "
        + "; ".join(map(text, rows))
        + "."
    )


def main(argv: list[str] | None = None) -> None:
    call = STUDY.call(__doc__, argv, add=lambda p: p.add_argument("--run", help="a run with phase 2 finished"))
    rows = []
    for seed in call.seeds:
        run = base.finished(call, seed)
        rows += [{"seed": seed, **row} for row in cells(call, run, seed)]
    first = [r for r in rows if r["seed"] == call.seeds[0]]
    call.write(rows, finding=describe(first), figure=draw(first), base=run.config.name)


if __name__ == "__main__":
    entry(main)
