"""Is the world model a transition graph? FrozenLake, learned from random play and compared edge by edge with its table.

    python -m experiments.transition_graph                 # about 15 minutes on 2 cores
    python -m experiments.transition_graph --size smoke    # under a minute: shows that it runs

Gymnasium's slippery 4 x 4 lake: 13 states that look different (the four holes look, and are, the same), 4 actions, each
of which goes where it should or to either side with probability 1/3. The world model sees 64 x 64 pictures of random
play. Then the oracle is asked for what follows every state and action, with K steps a frame, its frames are read back
to states, and the table of their frequencies is set beside the true one: edges, total variation (beside what sampling
alone makes of it), rewards. Value iteration solves the learned table; its policy is valued in the true one. A table of
the frequencies in the same random play is the control: it is what can be known from that play.

A world whose future has several outcomes is also where few sampling steps are hard: plain diffusion forcing of the same
size, data and number of steps is asked the same, with K = 1, 2, 4, .., k_max.
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dreamer4_jax.config import Config, override, preset
from dreamer4_jax.envs import frozenlake
from dreamer4_jax.evaluation import bootstrap_ci, plots
from dreamer4_jax.evaluation.graph import (
    Mdp,
    edges,
    from_samples,
    from_table,
    precision_recall,
    return_within,
    sampling_floor,
    total_variation,
    value_iteration,
    widen,
)
from dreamer4_jax.evaluation.study import Study, entry
from dreamer4_jax.evaluation.transitions import Play, ask
from dreamer4_jax.world.oracle import TransitionOracle
from experiments import base
from experiments.quickstart import QUICK

STUDY = Study(
    "transition_graph",
    question="Does the world model learn the graph of a stochastic world: its edges, probabilities and rewards?",
    claim="Sampled often enough, a good world model gives every edge with its probability, and planning in it is "
    "planning in the world.",
)
LEVEL, GAMMA, EDGE = "FrozenLake-v1", 0.99, 0.05
LAKE: dict[str, Any] = {
    **QUICK,
    "name": "frozenlake",
    "env.kind": "frozenlake",
    "env.levels": LEVEL,
    "env.max_steps": 50,
    "actions": [{"name": "move", "kind": "categorical", "size": 4}],
    "agent.task_words": 1,
    "data.frames": 60_000,
    "data.bot": 0.0,
    "data.noisy_bot": 0.0,
    "tokenizer.patch": 16,  # a token for each tile
    "tokenizer.latents": 16,
    "train.dynamics.steps": 1500,
    "train.dynamics.batch": 8,
    "train.agent.steps": 900,
    # The dynamics is what is asked here; the heads have one event to learn.
    "agent.dynamics_weight": 1.0,
    "agent.relevant_fraction": 0.25,
}
SMOKE: dict[str, Any] = {
    "name": "frozenlake-smoke",
    "data.frames": 1000,
    "data.chunks_per_shard": 4,
    "data.workers": 1,
    "dynamics.k_max": 2,
    "dynamics.transformer.layers": 2,
    "dynamics.transformer.width": 32,
    "dynamics.transformer.head_dim": 8,
    "dynamics.transformer.ffn": 48,
    "train.tokenizer.steps": 4,
    "train.tokenizer.batch": 2,
    "train.dynamics.batch": 2,
    "train.dynamics.steps": 4,
    "train.dynamics.length": 4,
    "train.agent.steps": 2,
    "train.agent.batch": 4,
    "train.agent.length": 4,
}
# Samples of each state and action; the oracle's K. Random play reaches the goal in 1 of 70 episodes.
SIZES: dict[str, tuple[dict[str, Any], int, tuple[int, ...]]] = {
    "smoke": (SMOKE, 8, (1,)),
    "laptop": ({}, 256, (1, 2, 4, 8, 16)),
    "tpu": (
        {"name": "frozenlake-long", "data.frames": 600_000, "train.dynamics.steps": 20_000},
        4096,
        (1, 2, 4, 8, 16),
    ),
}
WORLD, SHORTCUT, DIFFUSION = "world model, after phase 2", "shortcut forcing", "diffusion forcing"


def settings(size: str, seed: int) -> Config:
    """The training of a size."""
    return override(preset("tiny"), {**LAKE, **SIZES[size][0], "seed": seed})


def frames_score(learned: Mdp, count: np.ndarray, true: Mdp) -> dict[str, Any]:
    """What a learned table says of frames, against the true one, over the states that an episode goes on in."""
    inner = ~true.terminal
    asked = inner & (count.sum(1) > 0)
    distance = total_variation(learned.transition, true.transition)[asked]
    floor = sampling_floor(true.transition[asked], count[asked]).mean((1, 2))
    lost = learned.transition[asked][..., -1]  # the class of frames that show no state
    return {
        **precision_recall(edges(true, 0)[inner], edges(learned, EDGE)[inner]),
        "states_asked": int(asked.sum()),
        "samples": int(np.median(count[asked])),
        "unrecognised": float(lost.mean()),
        "total_variation": bootstrap_ci(distance.reshape(-1)),
        "sampling_alone": {"mean": floor.mean(), "low": np.quantile(floor, 0.025), "high": np.quantile(floor, 0.975)},
    }


def score(learned: Mdp, count: np.ndarray, true: Mdp, limit: int) -> dict[str, Any]:
    """`frames_score`, rewards, and what planning in the learned table earns in the true one."""
    asked = ~true.terminal & (count.sum(1) > 0)
    _, policy = value_iteration(learned, GAMMA)
    _, best = value_iteration(true, GAMMA)
    return {
        **frames_score(learned, count, true),
        "reward_error": bootstrap_ci(np.abs(learned.reward - true.reward)[asked].reshape(-1)),
        "return": float(return_within(true, policy, limit)[0]),
        "optimal_return": float(return_within(true, best, limit)[0]),
        "policy": policy,
        "transition": np.round(learned.transition, 4),
    }


def graph(axes: Axes, mdp: Mdp, true: Mdp, places: np.ndarray) -> None:
    """Edges at their mean probability over the four actions; the greedy action of value iteration in each state."""
    value, policy = value_iteration(mdp, GAMMA)
    mean, real = mdp.transition.mean(1), np.any(edges(true, 0), axis=1)
    found = np.any(edges(mdp, EDGE), axis=1)
    names = frozenlake.ACTIONS
    for s in range(len(places)):
        if true.terminal[s]:
            continue
        for t in np.flatnonzero(found[s] | real[s]):
            colour = plots.PALETTE[0] if real[s, t] and found[s, t] else plots.PALETTE[1] if found[s, t] else "#bbbbbb"
            if t == s or t >= len(places):
                continue  # what stays is written into the node; frames that show no state have no place
            (x, y), (u, v) = places[s], min(true_places(int(t), places), key=lambda p: np.hypot(*(p - places[s])))
            style = dict(arrowstyle="-|>", color=colour, lw=0.6 + 5 * mean[s, t], shrinkA=13, shrinkB=13)
            style |= dict(connectionstyle="arc3,rad=0.15", linestyle="-" if found[s, t] else ":")
            axes.annotate("", (u, v), (x, y), arrowprops=style)
    for s in range(len(places)):
        for x, y in true_places(s, places):
            hole, goal = true.terminal[s] and s != len(places) - 1, s == len(places) - 1
            face = "#c9d3dd" if hole else "#ffe6a0" if goal else "white"
            axes.scatter([x], [y], s=620, color=face, edgecolor=plots.INK, zorder=3)
            text = "hole" if hole else "goal" if goal else f"{names[policy[s]]}\n{value[s]:.2f}"
            axes.annotate(text, (x, y), ha="center", va="center", fontsize=6.5, color=plots.INK, zorder=4)
    axes.set_xlim(-0.5, 3.5), axes.set_ylim(3.5, -0.5), axes.axis("off")


def true_places(state: int, places: np.ndarray) -> list[np.ndarray]:
    """Where a class is drawn: a hole at each of its tiles."""
    group = frozenlake.classes(LEVEL, 64, 64)
    return [np.asarray([s % 4, s // 4], float) for s in np.flatnonzero(group == state)]


def draw(row: dict[str, Any], learned: Mdp, true: Mdp, rows: list[dict[str, Any]]) -> Figure:
    """The true graph, the learned one, all probabilities against each other, and their distance at each K."""
    titles = ["The lake", f"Learned from random play (K = {row['steps']})", "Transition probabilities"]
    figure, (left, middle, right, few) = plots.panels([*titles, "Total variation against sampling steps"], 4.4, 4.2)
    group = frozenlake.classes(LEVEL, 64, 64)
    places = np.stack([true_places(c, np.zeros(0))[0] for c in range(group.max() + 1)])
    graph(left, true, true, places)
    graph(middle, learned, true, places)
    inner = ~true.terminal
    x, y = true.transition[inner].reshape(-1), learned.transition[inner].reshape(-1)
    jitter = np.random.default_rng(0).uniform(-0.012, 0.012, x.shape)
    shown = (x > 0) | (y > 0)
    right.plot([0, 1], [0, 1], color=plots.INK, linewidth=0.7, alpha=0.5)
    colours = np.where(x > 0, plots.PALETTE[0], plots.PALETTE[1])
    right.scatter((x + jitter)[shown], y[shown], s=9, c=colours[shown], alpha=0.7)
    right.set_xlabel("true probability (1/3, 2/3 or 1; orange: no such edge)")
    right.set_ylabel(f"share of {row['samples']} samples")
    ends = []
    for name, colour in ((DIFFUSION, plots.PALETTE[1]), (SHORTCUT, plots.PALETTE[0])):
        for seed in dict.fromkeys(r["seed"] for r in rows):
            found = [r for r in rows if r["model"] == name and r["seed"] == seed]
            x = [r["steps"] for r in found]
            y = np.asarray([[base.value(r["total_variation"], k) for k in ("mean", "low", "high")] for r in found])
            spread = [y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]]
            few.errorbar(x, y[:, 0], yerr=spread, marker="o", capsize=2.5, color=colour)
        ends.append((name, float(y[-1, 0]), colour))
    floor = base.value(row["sampling_alone"])
    few.axhline(floor, color=plots.INK, linewidth=0.8, linestyle=":")
    ends.append(("sampling alone", floor, plots.INK))
    few.set_xscale("log", base=2)
    few.set_xticks(x, [str(k) for k in x])
    few.set_ylim(bottom=0)
    few.set_xlabel("sampling steps K of a frame (95 % over states and actions)")
    plots.label_ends(few, ends)
    for axes, text in (
        (left, "blue: an edge, as wide as its mean probability over the actions\nin a state: best action, its value"),
        (
            middle,
            f"orange: invented ({row['invented']}); dotted: missed ({row['missed']}); its own best actions, values",
        ),
    ):
        axes.annotate(text, (0, -0.02), xycoords="axes fraction", va="top", fontsize=7.5, color=plots.INK)
    return figure


def main(argv: list[str] | None = None) -> None:
    call = STUDY.call(__doc__, argv)
    _, samples, ladder = SIZES[call.size]
    rows, drawn = [], {}
    for seed in call.seeds:
        config = settings(call.size, seed)
        run = call.run(config, "tokenizer", "dynamics", "diffusion", "agent")
        decoder = frozenlake.StateDecoder(LEVEL, config.tokenizer.height, config.tokenizer.width)
        states = len(decoder.names) + 1  # and the frames that show none
        group = frozenlake.classes(LEVEL, config.tokenizer.height, config.tokenizer.width)
        true = widen(from_table(frozenlake.table(LEVEL), group), 1)
        play = Play.read(run.collect(), run.tokens(), decoder)
        table, count = from_samples(**play.steps(), states=states, actions=4)
        visits = np.bincount(play.state.reshape(-1), minlength=states)
        rows.append({"seed": seed, "model": "table of the same play", "steps": 0, **score(table, count, true, 100)})
        agent, tokenizer = run.model("agent"), run.model("tokenizer")
        models = {SHORTCUT: run.model("dynamics"), DIFFUSION: run.model("diffusion"), WORLD: agent.dynamics}
        for k, name in call.track([(k, name) for name in models for k in ladder], "asking the oracle"):
            # The heads belong to the model of phase 2: of the two others only frames count.
            oracle = TransitionOracle(tokenizer, models[name], agent.reward, agent.cont, steps=k)
            asked = ask(oracle, play, decoder, actions=4, samples=samples, frames=config.agent.context, seed=seed)
            learned, count = from_samples(**asked, states=states, actions=4)
            found = score(learned, count, true, 100) if name == WORLD else frames_score(learned, count, true)
            rows.append({"seed": seed, "model": name, "steps": k, **found})
            if name == WORLD:
                drawn[seed, k] = rows[-1], learned, true
    shown = drawn[call.seeds[0], 4 if 4 in ladder else ladder[0]]
    call.write(rows, finding=describe(rows), figure=draw(*shown, rows), visits=visits, states=decoder.names)


def describe(rows: list[dict[str, Any]]) -> str:
    """The rows of the first seed in words."""
    parts = []
    for r in (r for r in rows if r["seed"] == rows[0]["seed"]):
        name = f"{r['model']}, K = {r['steps']}" if r["steps"] else r["model"]
        tv, floor, gap = r["total_variation"], r["sampling_alone"], r.get("reward_error")
        parts.append(
            f"{name}: {r['found']} edges found, {r['invented']} invented, {r['missed']} missed (precision "
            f"{r['precision']:.2f}, recall {r['recall']:.2f}); total variation {tv.mean:.3f} [{tv.low:.3f}, "
            f"{tv.high:.3f}], {floor['mean']:.3f} by sampling alone"
            + (
                f"; reward error {gap.mean:.3f}; its best policy reaches the goal with probability {r['return']:.3f} "
                f"in the true lake (optimal {r['optimal_return']:.3f})"
                if gap
                else ""
            )
        )
    return ". ".join(parts) + "."


if __name__ == "__main__":
    entry(main)
