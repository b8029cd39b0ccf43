"""Rollouts inside the world model as one scanned loop, and the losses of imagination training (paper Eq 10, 11)."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dreamer4_jax.agent.heads import PolicyHead, ValueHead
from dreamer4_jax.agent.objectives import (
    awr_loss,
    filtered_bc_loss,
    lambda_returns,
    masked_mean,
    normalize,
    pmpo_loss,
    ppo_loss,
    reinforce_loss,
    winners,
)
from dreamer4_jax.config import AgentConfig
from dreamer4_jax.world.dynamics import Actions
from dreamer4_jax.world.oracle import TransitionOracle


@partial(jax.tree_util.register_dataclass, data_fields=["h", "actions", "reward", "cont", "z"], meta_fields=[])
@dataclass(frozen=True)
class Trajectory:
    """An imagined rollout, time first.

    Attributes:
      h: [T + 1, B, D], agent read-outs; h[0] belongs to the last context frame.
      actions: component -> [T, B, ...], drawn by the policy at h[t].
      reward, cont: [T, B], of the step t -> t + 1.
      z: [T, B, N, C], the imagined frames.
    """

    h: Float[Array, "T+1 B D"]
    actions: dict[str, Array]
    reward: Float[Array, "T B"]
    cont: Float[Array, "T B"]
    z: Float[Array, "T B N C"]


def imagine(
    oracle: TransitionOracle,
    policy: PolicyHead,
    context: tuple[Array, Actions, Int[Array, "B words"], Int[Array, "B T"] | None],
    key: Array,
    *,
    horizon: int,
) -> Trajectory:
    """Rolls `policy` out for `horizon` frames from dataset contexts: one rollout per context, one `lax.scan`.

    Args:
      context: clean tokens [B, T, N, C], the actions that led to them, the task, and segments or None.
    """
    z, actions, task, segments = context
    start, rest = jax.random.split(key)
    state = oracle.reset(z, actions, task, start, segments=segments)

    def step(state, k):
        act, world = jax.random.split(k)
        action = policy.next(state.h).sample(act)
        after, seen = oracle.step(state, action, world)
        return after, (state.h, action, seen.reward, seen.cont, seen.z)

    state, (h, taken, reward, cont, imagined) = jax.lax.scan(step, state, jax.random.split(rest, horizon))
    return Trajectory(jnp.concatenate([h, state.h[None]]), taken, reward, cont, imagined)


def imagination_losses(
    policy: PolicyHead,
    value: ValueHead,
    prior: PolicyHead,
    rollout: Trajectory,
    cfg: AgentConfig,
    *,
    alive: Float[Array, " B"],
    behaviour: PolicyHead | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Value loss on lambda-returns (Eq 10) and PMPO with the frozen behavioural prior (Eq 11), or `agent.objective`.

    States after the imagined end of an episode count as much as the episode is likely to have lasted until them.

    Args:
      prior: the policy after behavioural cloning; nothing trains it.
      alive: 1 where the rollout's context is inside an episode, 0 where it had ended.
      behaviour: the policy that acted in the rollout, if it isn't `policy`; PPO's ratios are to it.
    """
    h = jax.lax.stop_gradient(rollout.h)
    values = value.mean(h)
    reward = cfg.reward_scale * rollout.reward
    returns = jax.lax.stop_gradient(lambda_returns(reward, values, rollout.cont, cfg.gamma, cfg.lam))
    alive = jax.lax.stop_gradient(jnp.cumprod(jnp.concatenate([alive[None], rollout.cont[:-1]]), axis=0))
    count = jnp.maximum(jnp.sum(alive), 1e-6)
    advantage = returns - jax.lax.stop_gradient(values[:-1])
    now = policy.next(h[:-1])
    kl = now.kl(prior.next(h[:-1]))
    logp = now.log_prob(rollout.actions)
    used = normalize(advantage, alive) if cfg.normalize_advantage else advantage
    metrics = {}
    match cfg.objective:
        case "pmpo":
            loss = pmpo_loss(logp, kl, used, alpha=cfg.alpha, beta=cfg.beta, weight=alive)
        case "reinforce":
            loss = reinforce_loss(logp, kl, used, beta=cfg.beta, weight=alive)
        case "ppo":
            old = (behaviour or policy).next(h[:-1]).log_prob(rollout.actions)
            loss = ppo_loss(logp, kl, used, old_logp=old, clip=cfg.ppo_clip, beta=cfg.beta, weight=alive)
            outside = jnp.abs(jnp.exp(logp - old) - 1.0) > cfg.ppo_clip
            metrics["ratio_outside_clip"] = masked_mean(outside.astype(jnp.float32), alive)
        case "awr":
            loss = awr_loss(logp, kl, used, temperature=cfg.awr_temperature, beta=cfg.beta, weight=alive)
        case "filtered_bc":
            won = winners(jnp.sum(alive * rollout.reward, axis=0), alive[0], cfg.bc_share)
            loss = filtered_bc_loss(logp, kl, won, beta=cfg.beta, weight=alive)
            metrics["winning_reward"] = masked_mean(jnp.sum(alive * rollout.reward, axis=0), won)
        case "none":
            loss = jnp.float32(0.0)
    losses = {"policy": loss, "value": jnp.sum(alive * value.loss(h[:-1], returns)) / count}
    metrics |= {
        "imagined_return": jnp.sum(alive[0] * returns[0]) / jnp.maximum(jnp.sum(alive[0]), 1e-6),
        "imagined_reward": jnp.sum(alive * reward) / reward.shape[1],
        "value_mean": jnp.sum(alive * values[:-1]) / count,
        "advantage_positive": jnp.sum(alive * (advantage >= 0)) / count,
        "kl_to_prior": jnp.sum(alive * kl) / count,
        "entropy": jnp.sum(alive * now.entropy()) / count,
        "alive_at_end": jnp.mean(alive[-1]),
    }
    return losses, metrics
