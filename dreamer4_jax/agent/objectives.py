"""Returns and policy objectives: lambda-returns (paper Eq 10), PMPO (paper Eq 11) and what PMPO is compared with.

Every policy objective takes, per state and in any common shape: the log-probability of the taken action under the
policy being trained, the KL of that policy to the frozen behavioural prior, and the advantage (held constant; filtered
cloning takes whether the rollout won). `weight` is nonnegative, one per state; imagined states after a predicted end of
episode have weight 0 and count nothing. `agent.objective` chooses (`agent.imagination.imagination_losses`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def lambda_returns(
    reward: Float[Array, "T ..."],
    value: Float[Array, "T+1 ..."],
    cont: Float[Array, "T ..."],
    gamma: float,
    lam: float,
) -> Float[Array, "T ..."]:
    """Returns R[0 .. T-1] of paper Eq 10, time on axis 0.

    ``reward[t]`` and ``cont[t]`` belong to the step t -> t+1 (cont 0: it ended the episode), ``value[t]`` to state t:
    ``R[t] = reward[t] + gamma cont[t] ((1 - lam) value[t+1] + lam R[t+1])``, ``R[T] = value[T]``.
    """
    if value.shape[0] != reward.shape[0] + 1:
        raise ValueError(f"value has {value.shape[0]} states; {reward.shape[0]} rewards need one more than that")

    def step(following: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        r, c, v = inputs
        returns = r + gamma * c * ((1.0 - lam) * v + lam * following)
        return returns, returns

    # Half-precision rewards would lose the small differences that decide the sign of an advantage.
    reward, value, cont = (x.astype(jnp.float32) for x in (reward, value, cont))
    _, returns = jax.lax.scan(step, value[-1], (reward, cont, value[1:]), reverse=True)
    return returns


def masked_mean(x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, ""]:
    """Mean of `x` under nonnegative weights; 0 (and gradient 0) if they are all 0. Entries of weight 0 are not read."""
    weight = jnp.broadcast_to(weight, x.shape).astype(jnp.float32)
    total = jnp.sum(weight)
    kept = jnp.where(weight > 0, x, 0.0) * weight
    return jnp.sum(kept) / jnp.where(total > 0, total, 1.0)


def _weights(weight: Array | None, like: Array) -> Array:
    if weight is None:
        return jnp.ones(like.shape, jnp.float32)
    return jax.lax.stop_gradient(jnp.broadcast_to(weight, like.shape).astype(jnp.float32))


def pmpo_loss(
    logp: Float[Array, "..."],
    kl_to_prior: Float[Array, "..."],
    advantage: Float[Array, "..."],
    *,
    alpha: float = 0.5,
    beta: float = 0.3,
    weight: Float[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """PMPO (paper Eq 11): only the sign of the advantage is used, and D+ (A >= 0) and D- (A < 0) are averaged apart.

    ``(1 - alpha) mean_{D-} logp - alpha mean_{D+} logp + beta mean KL(policy || prior)``; an empty set adds 0.
    """
    w = _weights(weight, logp)
    good = jax.lax.stop_gradient(advantage) >= 0
    push = masked_mean(logp, w * ~good)
    pull = masked_mean(logp, w * good)
    return (1.0 - alpha) * push - alpha * pull + beta * masked_mean(kl_to_prior, w)


def reinforce_loss(
    logp: Float[Array, "..."],
    kl_to_prior: Float[Array, "..."],
    advantage: Float[Array, "..."],
    *,
    beta: float = 0.3,
    weight: Float[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """REINFORCE, a policy gradient with the value as baseline: ``-mean(A logp) + beta mean KL``."""
    w = _weights(weight, logp)
    return -masked_mean(jax.lax.stop_gradient(advantage) * logp, w) + beta * masked_mean(kl_to_prior, w)


def ppo_loss(
    logp: Float[Array, "..."],
    kl_to_prior: Float[Array, "..."],
    advantage: Float[Array, "..."],
    *,
    old_logp: Float[Array, "..."],
    clip: float = 0.2,
    beta: float = 0.3,
    weight: Float[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """Clipped surrogate: ``-mean min(ratio A, clip(ratio) A) + beta mean KL``, ratio = exp(logp - old_logp).

    Args:
      old_logp: log-probability of the taken actions under the policy of the rollouts. If that is the trained policy
        itself, every ratio is 1, nothing is clipped and the gradient is that of REINFORCE.
    """
    w = _weights(weight, logp)
    advantage = jax.lax.stop_gradient(advantage)
    ratio = jnp.exp(logp - jax.lax.stop_gradient(old_logp))
    surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1.0 - clip, 1.0 + clip) * advantage)
    return -masked_mean(surrogate, w) + beta * masked_mean(kl_to_prior, w)


def awr_loss(
    logp: Float[Array, "..."],
    kl_to_prior: Float[Array, "..."],
    advantage: Float[Array, "..."],
    *,
    temperature: float = 1.0,
    max_weight: float = 20.0,
    beta: float = 0.3,
    weight: Float[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """Advantage-weighted regression: ``-mean(min(exp(A / temperature), max_weight) logp) + beta mean KL``."""
    w = _weights(weight, logp)
    preference = jnp.minimum(jnp.exp(jax.lax.stop_gradient(advantage) / temperature), max_weight)
    return -masked_mean(preference * logp, w) + beta * masked_mean(kl_to_prior, w)


def filtered_bc_loss(
    logp: Float[Array, "..."],
    kl_to_prior: Float[Array, "..."],
    won: Bool[Array, "..."],
    *,
    beta: float = 0.3,
    weight: Float[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """Imitates every action of the winning rollouts and no other: ``-mean_{won} logp + beta mean KL``.

    What reinforcement learning by supervision (RvS) makes of imagination: copy the best imagined paths. An action's
    own advantage plays no part, so what a winner did by mistake is imitated too.
    """
    w = _weights(weight, logp)
    return -masked_mean(logp, w * jnp.broadcast_to(won, logp.shape)) + beta * masked_mean(kl_to_prior, w)


def winners(total: Float[Array, " B"], alive: Float[Array, " B"], share: float) -> Bool[Array, " B"]:
    """The best `share` of the rollouts with ``alive > 0``: those that fewer than ``share n`` others beat (ties win)."""
    inside = alive > 0
    beaten_by = jnp.sum(inside[None, :] & (total[None, :] > total[:, None]), axis=1)
    return inside & (beaten_by < share * jnp.sum(inside))


def normalize(advantage: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """Advantages over their weighted root mean square. No mean is taken off: the value is the baseline, and signs stay.

    All zero stays zero.
    """
    square = masked_mean(advantage**2, weight)
    return advantage * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))
