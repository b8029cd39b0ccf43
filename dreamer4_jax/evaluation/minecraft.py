"""The paper's Minecraft table: how many episodes come to hold each item, and how soon."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from dreamer4_jax.config import Config, UserError
from dreamer4_jax.data.readers.base import Fit
from dreamer4_jax.data.readers.vpt import COMPONENTS
from dreamer4_jax.data.store import open_dataset
from dreamer4_jax.envs.minerl import ITEMS, LEVEL, Game, MineRL, Tallied
from dreamer4_jax.evaluation.closed_loop import Policy, evaluate_policy
from dreamer4_jax.evaluation.metrics import wilson_ci

# Per cent of 1000 episodes of 60 minutes: Dreamer 4 in the paper's Table 7, in the order of ITEMS.
PAPER = (99.1, 98.9, 98.5, 98.7, 96.6, 95.9, 90.1, 66.7, 58.1, 39.5, 29.0, 0.7)


def recorded_fit(config: Config, data: Path) -> Fit:
    """How the frames of a run's dataset were brought to the tokenizer's size: the game's must be, too.

    Raises:
      UserError: the run was not trained on contractor recordings, or on every n-th of their frames.
    """
    if config.actions != COMPONENTS:
        names = ", ".join(f"{a.name} ({a.kind} {a.size})" for a in config.actions)
        raise UserError(
            f"--env minerl: the run's actions are {names}; Minecraft is played with keys (binary 23) and mouse "
            "(mouse 121), as in recordings converted by `dreamer4 data convert --format vpt`"
        )
    request = open_dataset(data, verify=False).manifest["request"]
    if request.get("every", 1) != 1:
        raise UserError(
            f"--env minerl: {data} holds every {request['every']}th frame; the game runs at all 20 a second"
        )
    return Fit((config.tokenizer.height, config.tokenizer.width), request.get("fit", "stretch"))


def evaluate_minecraft(
    policy: Policy,
    make_game: Callable[[], Game],
    fit: Fit,
    *,
    episodes: int,
    streams: int,
    minutes: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Plays seeded worlds, `streams` games side by side.

    Returns:
      {"policy", "episodes", "minutes", "seconds", "return": mean prompts' rewards, "items": {item: {"success": interval
      of the share of episodes that held it (Wilson), "minutes": mean over those, None if there are none}}}.
    """
    held: list[dict[str, float]] = []
    result = evaluate_policy(
        policy,
        lambda _: Tallied(MineRL(make_game(), fit, minutes=minutes), held.append),
        (LEVEL,),
        episodes=episodes,
        envs=streams,
        seed=seed,
        progress=progress,
    )
    items = {}
    for name in ITEMS:
        times = [found[name] for found in held if name in found]
        items[name] = {
            "success": wilson_ci(len(times), episodes)._asdict(),
            "minutes": float(np.mean(times)) if times else None,
        }
    return {
        "policy": policy.name,
        "episodes": episodes,
        "minutes": minutes,
        "seconds": result.seconds,
        "return": float(result.returns.mean()),
        "items": items,
    }


def table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Per cent of the episodes with its 95 % interval, and minutes, of each item; the paper's beside them."""
    first = results[0]
    out = Table(title=f"Minecraft: {first['episodes']} episodes of {first['minutes']:g} minutes")
    for head in ("item", *(r["policy"] for r in results), "paper, 1000 of 60"):
        out.add_column(head, justify="left" if head == "item" else "right")
    for name, paper in zip(ITEMS, PAPER, strict=True):
        cells = []
        for r in results:
            share, minutes = r["items"][name]["success"], r["items"][name]["minutes"]
            cells.append(
                f"{100 * share['mean']:.1f} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
                + ("" if minutes is None else f" after {minutes:.1f} min")
            )
        out.add_row(name.replace("_", " "), *cells, f"{paper}")
    return out


def to_text(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as JSON."""
    return json.dumps({"results": list(results), "paper": dict(zip(ITEMS, PAPER, strict=True))}, indent=1) + "\n"
