"""How far Crafter's planner gets: the share of episodes that reach each milestone, and the diamond.

    python -m experiments.crafter_planner                        # 40 episodes, seeds 0 to 39
    python -m experiments.crafter_planner --level Crafter --first 0 --episodes 20

The planner was tuned on seeds 5000 to 5019; those measured here were not looked at before. Episodes end with the
diamond on level CrafterDiamond, and go on on level Crafter; both are cut after --max-steps. One world in ten or so has
no diamond. No accelerator is used.
"""

import argparse
import json
import multiprocessing
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy import stats

from dreamer4_jax.config import EnvConfig
from dreamer4_jax.envs import kinds
from dreamer4_jax.training.metrics import write_atomic

RESULT = Path(__file__).parent / "results" / "crafter_planner.json"


def play(job: tuple[str, int, int]) -> dict[str, Any]:
    """One episode: seed, diamonds of the world, steps, return, how it ended and at what, step of each achievement."""
    level, seed, max_steps = job
    cfg = EnvConfig("crafter", (level,), max_steps=max_steps)
    env = kinds.make(cfg, level, height=64, width=64, words=1)
    env.reset(seed=seed)
    diamonds = int(env.get_wrapper_attr("game")._world.count("diamond"))
    planner = env.get_wrapper_attr("expert")(np.random.default_rng(seed))
    events: dict[str, int] = {}
    info: dict[str, Any] = {}
    steps, total, terminated, truncated = 0, 0.0, False, False
    while not (terminated or truncated):
        _, reward, terminated, truncated, info = env.step(planner.act(None))
        steps, total = steps + 1, total + float(reward)
        events |= {name: steps for name in info["events"]}
    end = "diamond" if info["success"] else "death" if terminated else "limit"
    return {"seed": seed, "diamonds": diamonds, "steps": steps, "return": round(total, 3), "end": end,
            "last": planner.subgoal, "events": events}  # fmt: skip


def interval(count: int, n: int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % interval of a share."""
    found = stats.binomtest(count, n).proportion_ci(0.95, method="exact")
    return round(float(found.low), 3), round(float(found.high), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--level", default="CrafterDiamond", choices=("Crafter", "CrafterDiamond"))
    parser.add_argument("--first", type=int, default=0, help="first seed (0)")
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    from dreamer4_jax.envs.crafter import MILESTONES

    jobs = [(args.level, seed, args.max_steps) for seed in range(args.first, args.first + args.episodes)]
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        rows = list(track(pool.imap(play, jobs), "playing", len(jobs), console=Console(stderr=True)))
    n, reached = len(rows), {}
    for name in MILESTONES:
        count = sum(name in row["events"] for row in rows)
        reached[name] = {"episodes": count, "share": round(count / n, 3), "interval": interval(count, n)}
        print(f"{name:20s} {count:4d} of {n}   95 % {reached[name]['interval']}")
    possible = [row for row in rows if row["diamonds"]]
    count = sum("collect_diamond" in row["events"] for row in possible)
    where = {"episodes": count, "of": len(possible), "interval": interval(count, len(possible)) if possible else None}
    print(f"of the worlds that have a diamond {count} of {len(possible)}   95 % {where['interval']}")
    found = [row["events"]["collect_diamond"] for row in rows if "collect_diamond" in row["events"]]
    result = {
        "command": f"python -m experiments.crafter_planner --level {args.level} --first {args.first} "
        f"--episodes {args.episodes} --max-steps {args.max_steps}",
        "machine": f"{platform.machine()}, one process for each of {args.workers} workers",
        "reached": reached,
        "diamond_where_there_is_one": where,
        "steps_to_diamond": {
            q: float(np.quantile(found, p)) for q, p in (("10 %", 0.1), ("median", 0.5), ("90 %", 0.9))
        }
        if found
        else None,
        "mean_return": round(float(np.mean([row["return"] for row in rows])), 3),
        "steps_per_second": round(sum(row["steps"] for row in rows) / (time.perf_counter() - began), 1),
        "episodes": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, json.dumps(result, indent=1))
    print(f"steps to the diamond {result['steps_to_diamond']}; {args.out}")


if __name__ == "__main__":
    main()
