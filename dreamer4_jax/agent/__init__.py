"""The agent: action distributions, heads on the agent tokens, and the objectives they are trained with."""

from dreamer4_jax.agent.actions import ActionDistribution, distribution, logits_size, mu_law_mouse
from dreamer4_jax.agent.heads import (
    ContinueHead,
    PolicyHead,
    RewardHead,
    ValueHead,
    agent_losses,
    symexp_bins,
    symexp_twohot,
)
from dreamer4_jax.agent.imagination import imagine
from dreamer4_jax.agent.objectives import (
    awr_loss,
    filtered_bc_loss,
    lambda_returns,
    normalize,
    pmpo_loss,
    ppo_loss,
    reinforce_loss,
    winners,
)

__all__ = [
    "ActionDistribution",
    "ContinueHead",
    "PolicyHead",
    "RewardHead",
    "ValueHead",
    "agent_losses",
    "awr_loss",
    "distribution",
    "filtered_bc_loss",
    "imagine",
    "lambda_returns",
    "logits_size",
    "mu_law_mouse",
    "normalize",
    "pmpo_loss",
    "ppo_loss",
    "reinforce_loss",
    "symexp_bins",
    "symexp_twohot",
    "winners",
]
