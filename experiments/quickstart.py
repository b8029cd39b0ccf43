"""Quickstart: recorded BabyAI play -> tokenizer -> world model -> agent -> reinforcement learning in imagination.

    dreamer4 run quickstart                    # under 15 minutes on 2 cores
    dreamer4 run quickstart --smoke            # the same stages, under 3 minutes, for CI
    dreamer4 run quickstart --full             # about 50 minutes: two to four times as long, and diffusion forcing

The data is mediocre on purpose: a scripted expert that breaks off into bursts of random actions, and aimless walks.
Episodes end after 24 steps, rewards come once at success. The page <run>/report.html shows what came of it.
"""

from typing import Any

from dreamer4_jax.config import Config, override, preset

# Two or three objects: among the eight of GoToLocal alone, the heads find what a mission means too late. With few
# objects alone the tokenizer sees too little of them: after a thousand steps it reconstructed 97.9 % of the tiles.
LEVELS = "BabyAI-GoToObj-v0,BabyAI-GoToLocalS8N2-v0,BabyAI-GoToLocalS8N3-v0,BabyAI-GoToLocal-v0"

QUICK: dict[str, Any] = {
    "name": "quickstart",
    "env.levels": LEVELS,
    "env.max_steps": 24,
    "data.frames": 80_000,
    "data.bot": 0.25,
    "data.noisy_bot": 0.45,
    "data.burst": 0.15,
    # One token for each tile: what an action does is the same function of a tile and its neighbours everywhere.
    "tokenizer.channels": 16,
    "tokenizer.pack": 1,
    "dynamics.transformer.width": 64,
    "dynamics.transformer.head_dim": 16,
    "dynamics.transformer.ffn": 176,
    "dynamics.transformer.time_every": 2,
    # Attention starts like a convolution: at the four neighbours of a tile, and at the frame before.
    "dynamics.transformer.local_space": 2.5,
    "dynamics.transformer.local_time": 3.0,
    "dynamics.transformer.local_shift": 1,
    "dynamics.transformer.scan": False,
    "dynamics.registers": 2,
    "dynamics.agent_tokens": 4,
    "dynamics.condition_spatial": True,
    # By far the largest gain: without it the noise of a frame at signal level 0 drowns what comes from the past.
    "dynamics.input_floor": 0.1,
    "agent.horizon": 12,
    "agent.sample_steps": 1,
    # At 0.02 the heads learned no sooner and the world model lost the agent in most frames, at 1 they learned later.
    "agent.dynamics_weight": 0.25,
    "agent.mtp": 2,
    # One frame in fifteen holds a reward: counted once, the read-out stays at "never" for most of the budget.
    "agent.event_weight": 10.0,
    "train.tokenizer.steps": 1000,
    "train.tokenizer.batch": 8,
    "train.tokenizer.length": 1,
    "train.tokenizer.lr": 3e-3,
    "train.dynamics.steps": 900,
    "train.dynamics.batch": 4,
    "train.dynamics.lr": 6e-3,
    "train.dynamics.optimizer": "muon",
    "train.dynamics.warmup": 20,
    "train.dynamics.ema": 0.99,
    "train.dynamics.decay": 0.3,
    "train.dynamics.image_fraction": 0.1,
    "train.agent.steps": 600,
    "train.agent.batch": 12,
    "train.agent.length": 12,
    "train.agent.optimizer": "muon",
    "train.agent.lr": 6e-3,
    "train.agent.warmup": 20,
    "train.agent.decay": 0.3,
    "train.agent.ema": 0.99,
    "train.imagination.steps": 80,
    "train.imagination.batch": 32,
    "train.imagination.lr": 2e-3,
    "train.imagination.warmup": 10,
    "train.imagination.ema": 0.98,
    "evaluate.episodes": 200,
    "evaluate.clips": 64,
}
SMOKE: dict[str, Any] = {
    **QUICK,
    "name": "quickstart-smoke",
    "data.frames": 6000,
    "data.chunks_per_shard": 8,
    "train.tokenizer.steps": 60,
    "train.dynamics.steps": 40,
    "train.dynamics.batch": 8,  # every batch of this size can be divided among 8 devices
    "train.agent.steps": 20,
    "train.agent.batch": 8,
    "train.imagination.steps": 5,
    "train.imagination.batch": 8,
    "dynamics.k_max": 4,
    "evaluate.episodes": 16,
    "evaluate.envs": 16,
    "evaluate.clips": 8,
}
FULL: dict[str, Any] = {
    **QUICK,
    "name": "quickstart-full",
    "data.frames": 120_000,
    "train.tokenizer.steps": 1500,
    "train.dynamics.steps": 2000,
    "train.agent.steps": 2700,
    "train.agent.decay": 0.4,
    "train.imagination.steps": 300,
    "evaluate.episodes": 800,
    "evaluate.diffusion_baseline": True,
}


def config(size: str = "quick", seed: int = 0) -> Config:
    """The config of a size: "smoke", "quick" or "full"."""
    return override(preset("tiny"), {**{"smoke": SMOKE, "quick": QUICK, "full": FULL}[size], "seed": seed})
