"""DeepMind Control's ball in cup, from pixels and recorded play alone: two forces, and a reward while the ball is in.

    pip install "dreamer4_jax[control]"
    dreamer4 run ball_in_cup                   # 90 minutes on one core, beside other work
    dreamer4 run ball_in_cup --smoke           # the same stages at toy size

The data is mediocre: an expert that tries random movements in a copy of the simulator in a fifth of the episodes, the
same broken by bursts in half of them, random forces in the rest. A decision holds a force for 4 steps of the simulator,
as PlaNet does, so an episode has 250, and a return is at most 1000. Success: the ball was in the cup at least once.

Beside it, published elsewhere: an independent PyTorch reproduction of Dreamer 4, offline on other data of mixed
quality, reports catch rates of 0.10 (random), 0.32 (cloning) and 0.38 (imagination) over 50 seeds.
"""

from typing import Any

from dreamer4_jax.config import Config, override, preset
from experiments.pendulum import QUICK as PENDULUM

QUICK: dict[str, Any] = {
    **PENDULUM,
    "name": "ball_in_cup",
    "env.levels": "ball_in_cup-catch",
    "env.max_steps": 250,
    "actions": [{"name": "force", "kind": "continuous", "size": 2}],
    "data.frames": 40_000,
    "data.chunk": 64,
    "data.bot": 0.2,
    "data.noisy_bot": 0.5,
    "data.burst": 0.1,
    "agent.gamma": 0.99,
    "train.tokenizer.steps": 3000,  # the ball covers a hundredth of the picture
    "train.dynamics.steps": 5000,
    "train.imagination.steps": 300,
    "evaluate.episodes": 50,
    "evaluate.envs": 10,  # each has an OpenGL context of its own
}
SMOKE: dict[str, Any] = {
    **QUICK,
    "name": "ball_in_cup-smoke",
    "env.max_steps": 60,
    "data.frames": 1000,
    "data.chunks_per_shard": 8,
    "train.tokenizer.steps": 20,
    "train.dynamics.steps": 10,
    "train.dynamics.batch": 8,
    "train.agent.steps": 5,
    "train.agent.batch": 8,
    "train.imagination.steps": 2,
    "train.imagination.batch": 8,
    "dynamics.k_max": 4,
    "evaluate.episodes": 4,
    "evaluate.envs": 4,
    "evaluate.clips": 4,
}
FULL: dict[str, Any] = {
    **QUICK,
    "name": "ball_in_cup-full",
    "data.frames": 100_000,
    "train.tokenizer.steps": 4000,
    "train.dynamics.steps": 20_000,
    "train.agent.steps": 5000,
    "train.imagination.steps": 3000,
    "evaluate.episodes": 100,
}


def config(size: str = "quick", seed: int = 0) -> Config:
    """The config of a size: "smoke", "quick" or "full"."""
    return override(preset("tiny"), {**{"smoke": SMOKE, "quick": QUICK, "full": FULL}[size], "seed": seed})
