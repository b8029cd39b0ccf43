"""Continuous actions from pixels: Pendulum-v1, from recorded play alone, through all three phases.

    dreamer4 run pendulum                      # an hour on one core, beside other work
    dreamer4 run pendulum --smoke              # the same stages at toy size

A frame shows the angle and not the speed; a decision holds a torque for 4 of gymnasium's steps, so an episode has 50.
The data is mediocre: an energy controller (-140 on its own) in a tenth of the episodes, the same broken by bursts of
random torques in half of them, random torques held for some steps in the rest. No step is ever taken to learn in the
environment itself: the report's returns are gymnasium's, of 200 steps, and every policy plays the same seeds.

Published beside it, of agents that see angle and speed and learn online (RL Baselines3 Zoo, one run each, mean and
standard deviation over 750 episodes): TD3 -152 (90), SAC -157 (89), PPO -172 (104).
"""

from typing import Any

from dreamer4_jax.config import Config, override, preset

QUICK: dict[str, Any] = {
    "name": "pendulum",
    "env.kind": "control",
    "env.levels": "Pendulum-v1",
    "env.max_steps": 50,
    "actions": [{"name": "torque", "kind": "continuous", "size": 1}],
    "agent.task_words": 1,
    "agent.task_vocab": 8,
    "data.frames": 30_000,
    "data.chunk": 51,  # an episode
    "data.bot": 0.1,
    "data.noisy_bot": 0.5,
    "data.burst": 0.25,
    "data.burst_length": 5,
    # A quarter of the picture in one token: what moves is one rod, and only thousands of steps teach its motion.
    "tokenizer.channels": 4,
    "tokenizer.pack": 16,
    "dynamics.transformer.width": 96,
    "dynamics.transformer.head_dim": 24,
    "dynamics.transformer.ffn": 256,
    "dynamics.transformer.time_every": 2,
    "dynamics.transformer.scan": False,
    "dynamics.registers": 2,
    "dynamics.agent_tokens": 2,
    "dynamics.condition_spatial": True,
    "dynamics.input_floor": 0.1,
    "agent.mtp": 2,
    "agent.horizon": 15,
    "agent.sample_steps": 2,
    "agent.gamma": 0.97,
    "agent.dynamics_weight": 0.5,
    "train.tokenizer.steps": 1500,
    "train.tokenizer.batch": 16,
    "train.tokenizer.length": 1,
    "train.tokenizer.lr": 1e-3,
    "train.dynamics.steps": 6000,
    "train.dynamics.batch": 16,
    "train.dynamics.lr": 3e-3,
    "train.dynamics.optimizer": "muon",
    "train.dynamics.warmup": 20,
    "train.dynamics.ema": 0.99,
    "train.dynamics.decay": 0.3,
    "train.agent.steps": 1500,
    "train.agent.batch": 16,
    "train.agent.length": 16,
    "train.agent.optimizer": "muon",
    "train.agent.lr": 3e-3,
    "train.agent.warmup": 20,
    "train.agent.decay": 0.3,
    "train.agent.ema": 0.99,
    "train.imagination.steps": 1000,
    "train.imagination.batch": 32,
    "train.imagination.lr": 2e-3,
    "train.imagination.warmup": 10,
    "train.imagination.ema": 0.98,
    "evaluate.episodes": 100,
    "evaluate.envs": 50,
    "evaluate.clips": 64,
}
SMOKE: dict[str, Any] = {
    **QUICK,
    "name": "pendulum-smoke",
    "data.frames": 2000,
    "data.chunks_per_shard": 8,
    "train.tokenizer.steps": 40,
    "train.dynamics.steps": 20,
    "train.agent.steps": 10,
    "train.agent.batch": 8,
    "train.imagination.steps": 4,
    "train.imagination.batch": 8,
    "dynamics.k_max": 4,
    "evaluate.episodes": 8,
    "evaluate.envs": 8,
    "evaluate.clips": 8,
}
FULL: dict[str, Any] = {
    **QUICK,
    "name": "pendulum-full",
    "data.frames": 60_000,
    "train.tokenizer.steps": 3000,
    "train.dynamics.steps": 20_000,
    "train.agent.steps": 5000,
    "train.imagination.steps": 3000,
    "evaluate.episodes": 300,
}


def config(size: str = "quick", seed: int = 0) -> Config:
    """The config of a size: "smoke", "quick" or "full"."""
    return override(preset("tiny"), {**{"smoke": SMOKE, "quick": QUICK, "full": FULL}[size], "seed": seed})
