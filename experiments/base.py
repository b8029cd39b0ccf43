"""What the experiments on world models measure: the quickstart's models, at three sizes, trained once and shared.

A run lies where `dreamer4 run quickstart` puts it (runs/quickstart-seed<N>): what that command has trained is taken as
it is, and what is missing is trained. The tpu size is that of ``--full``.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from dreamer4_jax.agent.model import ActorCritic
from dreamer4_jax.bench import matmul_flops
from dreamer4_jax.config import Config, override
from dreamer4_jax.evaluation.rollouts import HeldOut
from dreamer4_jax.evaluation.study import Call
from dreamer4_jax.parallel import processes
from dreamer4_jax.parallel.programs import programs
from dreamer4_jax.runner import Run
from dreamer4_jax.training.checkpoint import checksum
from dreamer4_jax.training.loop import open_run, run_phase
from dreamer4_jax.training.phases import ImaginationPhase
from dreamer4_jax.world import Actions
from experiments import quickstart

QUICKSTART = {"smoke": "smoke", "laptop": "quick", "tpu": "full"}
# Enough to go through every line; nothing is learned.
SMOKE: dict[str, Any] = {
    "name": "experiments-smoke",
    "data.frames": 500,
    "data.chunks_per_shard": 2,
    "data.workers": 1,
    "train.tokenizer.steps": 4,
    "train.dynamics.steps": 4,
    "train.agent.steps": 2,
    "evaluate.clips": 4,
    "evaluate.frames": 4,
    "evaluate.episodes": 4,
    "evaluate.envs": 4,
    "dynamics.k_max": 4,
    "dynamics.transformer.layers": 2,
    "dynamics.transformer.width": 32,
    "dynamics.transformer.head_dim": 8,
    "dynamics.transformer.ffn": 48,
    "train.dynamics.optimizer": "adamw",  # compiles faster than muon
    "train.dynamics.batch": 2,
    "train.dynamics.length": 4,
    "train.agent.optimizer": "adamw",
    "train.agent.batch": 4,
    "train.agent.length": 4,
}


def settings(call: Call, seed: int) -> Config:
    """The quickstart's config at the call's size."""
    found = quickstart.config(QUICKSTART[call.size], seed)
    return override(found, SMOKE) if call.size == "smoke" else found


def trained(call: Call, seed: int, *phases: str) -> Run:
    """The run of a seed with `phases` trained."""
    return call.run(settings(call, seed), *phases)


def held_out(run: Run, clips: int) -> HeldOut:
    """`clips` clips of a run's held-out episodes."""
    wanted = override(run.config, {"evaluate.clips": clips})
    return HeldOut.sample(wanted, run.collect(), run.tokens(), seed=run.config.seed)


def step_flops(run: Run, config: Config) -> float:
    """FLOPs of the matrix products of a training step of the dynamics: short and long batches by their shares."""
    return _step_flops(config, run.mesh)


@cache
def _step_flops(config: Config, mesh: Mesh) -> float:
    costs = [matmul_flops(p.function, *p.arguments) for p in programs(config, ("dynamics",), mesh=mesh)]
    every = config.train.dynamics.long_every
    return costs[0] if len(costs) == 1 else costs[0] * (1 - 1 / every) + costs[1] / every


def first_frames(run: Run, count: int) -> tuple[Array, Actions, Array, None]:
    """Contexts for `agent.imagine` of one frame: those with which up to `count` held-out episodes begin."""
    tokens, at, found = run.tokens(), 0, []
    for length in tokens.streams("holdout"):
        stream = tokens.window("holdout", at, length)
        found += [{k: v[i] for k, v in stream.items()} for i in np.flatnonzero(stream["is_first"])]
        at += length
    found = found[:count]
    take = lambda name: jnp.asarray(np.stack([f[name] for f in found]))
    names = [part.name for part in run.config.actions]
    actions = {n: take(f"actions/{n}")[:, None] for n in names}
    present = {n: take(f"present/{n}")[:, None] for n in names}
    return take("latents")[:, None].astype(jnp.float32), Actions(actions, present), take("task"), None


def part(held: HeldOut, rows: slice) -> HeldOut:
    """Some of the clips."""
    cut = lambda tree: {name: x[rows] for name, x in tree.items()}
    return replace(
        held,
        frames=held.frames[rows],
        latents=held.latents[rows],
        actions=cut(held.actions),
        present=cut(held.present),
        episodes=None if held.episodes is None else held.episodes[rows],
    )


def value(interval: Any, key: str = "mean") -> float:
    """An end or the middle of an interval, which rows hold as either."""
    return interval[key] if isinstance(interval, dict) else getattr(interval, key)


def finished(call: Call, seed: int) -> Run:
    """The run named by --run, or that of the call's size: phases 1 and 2 done."""
    return Run.reopen(call.args.run) if call.args.run else trained(call, seed, "tokenizer", "dynamics", "agent")


def train_imagination(call: Call, base: Run, variant: Config) -> tuple[ActorCritic, Path]:
    """Phase 3 of a variant from phase 2 of `base`, kept under --runs by the variant's name and the weights that it
    begins with. Its EMA weights and run directory."""
    agent = base.model("agent")
    where = call.args.runs / f"{variant.name}-from-{checksum(agent)[:8]}-seed{variant.seed}"
    where = open_run(where, variant, resume=True)
    found = run_phase(
        ImaginationPhase(variant, base.tokens(), agent),
        config=variant,
        run_dir=where,
        seed=variant.seed,
        resume=True,
        mesh=base.mesh,
    )
    return processes.whole(found.ema, base.mesh), where
