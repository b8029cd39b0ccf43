"""Is the world model a transition graph? BabyAI rooms, asked for every move from every state that they can be in.

    python -m experiments.room_graph                 # about 10 minutes on 2 cores, after `make quickstart`
    python -m experiments.room_graph --run DIR       # another run with phase 2
    python -m experiments.room_graph --size smoke    # under a minute: shows that it runs

A room has some hundred states: where the agent stands and looks. Their frames decode to them exactly, and where a move
leads is found in copies of the environment. The model of runs/quickstart-seed<N>, which was never trained on these
rooms, sees one frame of a state and is asked for what follows each move, with K sampling steps. Value iteration on the
graph that it answers gives a plan for the mission, which is carried out in the true graph.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dreamer4_jax.config import UserError
from dreamer4_jax.envs.symbols import SymbolDecoder
from dreamer4_jax.evaluation import bootstrap_ci, plots
from dreamer4_jax.evaluation.graph import (
    Mdp,
    edges,
    from_samples,
    precision_recall,
    return_within,
    total_variation,
    value_iteration,
    widen,
)
from dreamer4_jax.evaluation.rooms import KINDS, Room, ask, explore
from dreamer4_jax.evaluation.study import Study, entry
from dreamer4_jax.runner import Run
from dreamer4_jax.world.oracle import TransitionOracle
from experiments import base

STUDY = Study(
    "room_graph",
    question="Does the world model know where every move leads, from every state of a room it has never seen?",
    claim="A good world model is the graph: every edge is found, none is invented, and its paths are true.",
)
GAMMA, EDGE, REWARD = 0.95, 0.5, 0.5  # an edge: at least half of the samples; of a reward of about 1, at least half
SIZES: dict[str, dict[str, Any]] = {
    "smoke": dict(rooms=1, samples=1, ladder=(1,)),
    "laptop": dict(rooms=4, samples=4, ladder=(1, 4, 16)),
    "tpu": dict(rooms=64, samples=16, ladder=(1, 2, 4, 8, 16)),
}


def score(room: Room, learned: Mdp, steps: int) -> dict[str, Any]:
    """A learned graph against the true one; states in which the episode has ended are not asked."""
    true, kinds = widen(room.true, 1), room.kinds
    inner = ~true.terminal
    right = (total_variation(learned.transition, true.transition) < EDGE)[: room.states]
    arrive = kinds == KINDS.index("arrive")
    told = (learned.reward[: room.states] >= REWARD) & (kinds >= 0)
    _, policy = value_iteration(learned, GAMMA)
    _, best = value_iteration(true, GAMMA)
    return {
        **precision_recall(edges(true, 0)[inner], edges(learned, EDGE)[inner]),
        "unrecognised": float(learned.transition[inner][..., -1].mean()),
        "right": {name: float(right[kinds == i].mean()) for i, name in enumerate(KINDS) if (kinds == i).any()},
        "rewards_found": int((arrive & told).sum()),
        "rewards_invented": int((~arrive & told).sum()),
        "rewards_missed": int((arrive & ~told).sum()),
        "plan": float(return_within(true, policy, steps)[inner].mean()),
        "best": float(return_within(true, best, steps)[inner].mean()),
    }


def measure(run: Run, size: Mapping[str, Any], track: Any) -> tuple[list[dict[str, Any]], tuple[Room, Mdp]]:
    """A row for each room and K, and one room with its learned graph to draw."""
    c = run.config
    if c.env.kind != "babyai" or c.env.view != "full":
        raise UserError(f"env.kind = {c.env.kind!r}, env.view = {c.env.view!r}: rooms are BabyAI levels, seen in full")
    decoder = SymbolDecoder(c.env.tile, c.env.view)
    rooms = [
        explore(run.make_env(level), level, c.seed + 3_000_017 + i, decoder)
        for level in c.env.levels
        for i in range(size["rooms"])
    ]
    agent, rows, shown = run.model("agent"), [], None
    for k, (i, room) in track([(k, room) for k in size["ladder"] for room in enumerate(rooms)], "asking the oracle"):
        oracle = TransitionOracle(run.model("tokenizer"), agent.dynamics, agent.reward, agent.cont, steps=k)
        found = ask(oracle, room, decoder, samples=size["samples"], seed=c.seed)
        learned, _ = from_samples(**found, states=room.states + 1, actions=3)
        about = {"seed": c.seed, "level": room.level, "room": i, "mission": room.mission, "states": room.states}
        rows.append({**about, "K": k, **score(room, learned, c.env.max_steps)})
        if shown is None or (k == min(4, size["ladder"][-1]) and i == len(rooms) - 1):
            shown = room, learned
    assert shown is not None
    return rows, shown


def over_rooms(rows: Sequence[Mapping[str, Any]], pick: Any) -> Any:
    """Mean with its 95 % interval over rooms."""
    return bootstrap_ci(np.asarray([pick(r) for r in rows], float))


def graph(axes: Axes, room: Room, mdp: Mdp) -> None:
    """Nodes: places, moved to where the agent looks, coloured by value. Edges: grey true, orange invented, dotted
    missed."""
    value, _ = value_iteration(mdp, GAMMA)
    look = np.asarray([(0.26, 0), (0, 0.26), (-0.26, 0), (0, -0.26)])
    at = room.place[:, :2] + look[room.place[:, 2]]
    real, found = (np.asarray(edges(m, EDGE).any(1)) for m in (room.true, mdp))
    for s in np.flatnonzero(~room.true.terminal):
        for t in np.flatnonzero(real[s] | found[s, : room.states]):
            if s != t:
                is_real, is_found = real[s, t], found[s, t]
                colour = "#9aa4ae" if is_real else plots.PALETTE[1]
                style: dict[str, Any] = dict(arrowstyle="-|>", color=colour, lw=0.9 if is_real else 1.6)
                style |= dict(shrinkA=3, shrinkB=3, mutation_scale=6, linestyle="-" if is_found else ":")
                axes.annotate("", at[t], at[s], arrowprops=style)
    lost, ended = found[: room.states, -1], room.true.terminal
    x, y = at.T
    shown = axes.scatter(x[~ended], y[~ended], c=value[: room.states][~ended], s=26, vmin=0, vmax=1, zorder=3)
    axes.scatter(x[ended], y[ended], marker="*", s=60, color=plots.PALETTE[3], zorder=3)
    axes.scatter(x[lost & ~ended], y[lost & ~ended], marker="x", s=30, color=plots.PALETTE[1], zorder=4)
    axes.figure.colorbar(shown, ax=axes, shrink=0.7, label="value")
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.axis("off")


def draw(rows: Sequence[Mapping[str, Any]], room: Room, learned: Mdp) -> Figure:
    """A room's true and learned graph, edges that are right by kind, and what a plan in the learned graph is worth."""
    figure, (left, middle, right, plan) = plots.panels(
        [
            "A room it never saw",
            "The same, as the model tells it",
            "Edges that are right (%)",
            "Plans that succeed (%)",
        ],
        4.0,
        3.8,
    )
    graph(left, room, widen(room.true, 1))
    graph(middle, room, learned)
    left.annotate(f"“{room.mission}”; star: done", (0, -0.02), xycoords="axes fraction", va="top", fontsize=7.5)
    text = "orange: invented (cross: leads to no state); dotted: missed"
    middle.annotate(text, (0, -0.02), xycoords="axes fraction", va="top", fontsize=7.5)
    ladder = sorted({r["K"] for r in rows})
    for i, k in enumerate(ladder):
        mine = [r for r in rows if r["K"] == k]
        for j, kind in enumerate(KINDS):
            found = over_rooms([r for r in mine if kind in r["right"]], lambda r, kind=kind: 100 * r["right"][kind])
            place = j + 0.22 * (i - (len(ladder) - 1) / 2)
            spread = [[found.mean - found.low], [found.high - found.mean]]
            right.errorbar(place, found.mean, yerr=spread, fmt="o", capsize=2.5, color=plots.PALETTE[i],
                           label=f"K = {k}" if not j else None)  # fmt: skip
        for j, name in enumerate(("plan", "best")):
            found = over_rooms(mine, lambda r, name=name: 100 * r[name])
            spread = [[found.mean - found.low], [found.high - found.mean]]
            plan.errorbar(i + 0.1 * j, found.mean, yerr=spread, fmt="o", capsize=2.5, color=plots.PALETTE[3 * j],
                          label=(("in the learned graph", "in the true graph")[j] if not i else None))  # fmt: skip
    right.set_xticks(range(len(KINDS)), KINDS)
    right.set_xlabel("kind of move; 95 % over rooms")
    right.set_ylim(0, 105)
    right.legend(frameon=False, loc="lower left", ncols=len(ladder), columnspacing=0.8, handletextpad=0.2)
    plan.set_xticks(range(len(ladder)), [f"K = {k}" for k in ladder])
    plan.set_ylim(0, 105)
    plan.set_xlabel("from every state, within an episode's steps")
    plan.legend(frameon=False, loc="center left", bbox_to_anchor=(0, 0.75))  # between plans and their bound
    return figure


def describe(rows: Sequence[Mapping[str, Any]]) -> str:
    """Edges, rewards and plans in words, for each K."""
    parts = []
    for k in sorted({r["K"] for r in rows}):
        mine = [r for r in rows if r["K"] == k]
        total = {name: sum(r[name] for r in mine) for name in ("found", "invented", "missed")}
        rewards = {name: sum(r[f"rewards_{name}"] for r in mine) for name in ("found", "invented", "missed")}
        plan, best = (over_rooms(mine, lambda r, name=name: 100 * r[name]) for name in ("plan", "best"))
        parts.append(
            f"K = {k}: of {total['found'] + total['missed']} edges in {len(mine)} rooms {total['found']} are found and "
            f"{total['missed']} missed, {total['invented']} invented; {rewards['found']} of "
            f"{rewards['found'] + rewards['missed']} rewards are foretold, {rewards['invented']} where none is; "
            f"a plan made in the learned graph succeeds from {plan.mean:.1f} % [{plan.low:.1f}, {plan.high:.1f}] of "
            f"the states, one made in the true graph from {best.mean:.1f} %"
        )
    return ". ".join(parts) + "."


def main(argv: list[str] | None = None) -> None:
    call = STUDY.call(__doc__, argv, add=lambda p: p.add_argument("--run", help="a run with phase 2 finished"))
    rows, shown = [], None
    for seed in call.seeds:
        run = base.finished(call, seed)
        found, drawn = measure(run, SIZES[call.size], call.track)
        rows += found
        shown = shown or drawn
    assert shown is not None
    call.write(rows, finding=describe(rows), figure=draw(rows, *shown), base=run.config.name)


if __name__ == "__main__":
    entry(main)
