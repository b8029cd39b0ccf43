"""Heads on the agent tokens: policy, reward and continue with multi-token prediction, value; and their loss (Eq 9).

A head reads ``h`` [..., D], D = model width x agent tokens (the agent tokens of a frame side by side), and predicts
M = mtp + 1 offsets n = 0 .. mtp at once. With the package's alignment (index t holds the action that led to frame t and
the reward that came with it), seen from frame t:

* policy offset n is the action stored at ``t + 1 + n``; n = 0 is the action to take now, which frame t has not seen;
* reward offset n is the reward stored at ``t + n``; n = 0 came with frame t, for the action that led to it;
* continue offset n is ``not is_terminal[t + n]``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from dreamer4_jax.agent.actions import ActionDistribution, distribution, logits_size
from dreamer4_jax.agent.objectives import masked_mean
from dreamer4_jax.config import ActionComponent, AgentConfig, ConfigError
from dreamer4_jax.nn.layers import Linear, RMSNorm, fan_in, zeros

BIN_LIMIT = 20.0  # bins span symexp(+-20)

# ---------------------------------------------------------------------------------------------------------------------
# Symexp two-hot


def symexp_bins(n: int) -> np.ndarray:
    """`n` (odd) bins, float32: symexp of an even grid of [-20, 20], exactly symmetric about an exact 0."""
    if n < 3 or n % 2 == 0:
        raise ConfigError(f"agent.bins = {n}: must be odd and at least 3, so that one bin stands at zero")
    upper = np.expm1(np.linspace(0.0, BIN_LIMIT, n // 2 + 1)[1:])
    return np.concatenate([-upper[::-1], [0.0], upper]).astype(np.float32)


def symexp_twohot(x: Float[Array, "..."], bins: Float[Array, " S"] | np.ndarray) -> Float[Array, "... S"]:
    """Spreads each number over its two neighbouring bins, linearly in raw space, so that the mean is the number.

    Numbers beyond the bins go to the outermost bin.
    """
    bins = jnp.asarray(bins, jnp.float32)
    x = jnp.clip(x.astype(jnp.float32), bins[0], bins[-1])
    last = bins.shape[0] - 2
    low = jnp.clip(jnp.sum(bins <= x[..., None], axis=-1) - 1, 0, last)
    below, above = bins[low], bins[low + 1]
    # Both weights from distances: "1 - the other" would round the small one to 0 between a huge bin and a tiny number.
    lower, upper = (above - x) / (above - below), (x - below) / (above - below)
    offset = jnp.arange(bins.shape[0]) - low[..., None]
    return jnp.where(offset == 0, lower[..., None], 0.0) + jnp.where(offset == 1, upper[..., None], 0.0)


def twohot_mean(logits: Float[Array, "... S"], bins: Float[Array, " S"] | np.ndarray) -> Float[Array, "..."]:
    """Mean of a categorical over symmetric bins; exactly 0 for equal logits.

    The outer bins are near 5e8, where a plain sum of 255 products loses all digits; paired bins cancel first.
    """
    bins = jnp.asarray(bins, jnp.float32)
    half = bins.shape[0] // 2
    probs = jax.nn.softmax(logits.astype(jnp.float32))
    return jnp.sum((probs[..., half + 1 :] - probs[..., :half][..., ::-1]) * bins[half + 1 :], axis=-1)


def twohot_loss(
    logits: Float[Array, "... S"], target: Float[Array, "..."], bins: Float[Array, " S"] | np.ndarray
) -> Float[Array, "..."]:
    """Cross-entropy to the two-hot of `target` (held constant), in nats."""
    weights = jax.lax.stop_gradient(symexp_twohot(target, bins))
    return -jnp.sum(weights * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Modules


class MLP(nnx.Module):
    """RMSNorm, `layers` SiLU layers, and M linear output layers stacked in one parameter [M, hidden, out].

    Hidden layers compute in the dtype of the input, the output layers in float32.
    """

    def __init__(
        self, key: Array, width: int, hidden: int, layers: int, out: int, offsets: int = 1, output_scale: float = 0.01
    ):
        keys = jax.random.split(key, layers + 1)
        self.norm = RMSNorm(width)
        sizes = [width] + [hidden] * layers
        self.hidden = nnx.List(
            [Linear(k, (i, o), ("embed", "ffn")) for k, i, o in zip(keys[:-1], sizes[:-1], sizes[1:], strict=True)]
        )
        # Small, not zero, where the gradient must reach the trunk from the first step; zero where the output is a
        # quantity whose natural first guess is 0 (reward, value).
        shape, axes = (offsets, sizes[-1], out), (None, "embed", None)
        if output_scale:
            value = fan_in(keys[-1], (sizes[-1], offsets, out), axes, scale=output_scale)[...]
            self.out = nnx.Param(jnp.swapaxes(value, 0, 1), axes=axes)
        else:
            self.out = zeros(shape, axes)
        self.bias = zeros((offsets, out), (None, None))

    def features(self, h: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """The last hidden layer, which all offsets share."""
        x = self.norm(h)
        for layer in self.hidden:
            x = jax.nn.silu(layer(x))
        return x.astype(jnp.float32)

    def __call__(self, h: Float[Array, "... D"]) -> Float[Array, "... M O"]:
        with jax.named_scope("head"):
            return jnp.einsum("...f,mfo->...mo", self.features(h), self.out[...]) + self.bias[...]

    def next(self, h: Float[Array, "... D"]) -> Float[Array, "... O"]:
        """Offset n = 0 alone."""
        with jax.named_scope("head"):
            return self.features(h) @ self.out[0] + self.bias[0]


class PolicyHead(nnx.Module):
    """Distribution of the next actions. A frozen copy of this module is the behavioural prior of paper Eq 11."""

    def __init__(self, width: int, cfg: AgentConfig, components: Sequence[ActionComponent], key: Array):
        self.components = tuple(components)
        self.mlp = MLP(key, width, cfg.hidden, cfg.head_layers, logits_size(components), cfg.mtp + 1)

    def __call__(self, h: Float[Array, "... D"]) -> ActionDistribution:
        """Actions of all offsets: a distribution with leading axes [..., M]."""
        return distribution(self.mlp(h), self.components)

    def next(self, h: Float[Array, "... D"]) -> ActionDistribution:
        """The action to take now (offset n = 0): a distribution with leading axes [...]."""
        return distribution(self.mlp.next(h), self.components)


class RewardHead(nnx.Module):
    """Symexp two-hot distribution of rewards."""

    def __init__(self, width: int, cfg: AgentConfig, key: Array):
        self.bins = cfg.bins
        self.mlp = MLP(key, width, cfg.hidden, cfg.head_layers, cfg.bins, cfg.mtp + 1, output_scale=0.0)

    def logits(self, h: Float[Array, "... D"]) -> Float[Array, "... M S"]:
        return self.mlp(h)

    def mean(self, h: Float[Array, "... D"]) -> Float[Array, "..."]:
        """Expected reward that came with this frame (offset n = 0)."""
        return twohot_mean(self.mlp.next(h), symexp_bins(self.bins))


class ContinueHead(nnx.Module):
    """Bernoulli: the episode has not terminated."""

    def __init__(self, width: int, cfg: AgentConfig, key: Array):
        self.mlp = MLP(key, width, cfg.hidden, cfg.head_layers, 1, cfg.mtp + 1)

    def logits(self, h: Float[Array, "... D"]) -> Float[Array, "... M"]:
        return self.mlp(h)[..., 0]

    def prob(self, h: Float[Array, "... D"]) -> Float[Array, "..."]:
        """Probability that this frame is not terminal (offset n = 0)."""
        return jax.nn.sigmoid(self.mlp.next(h)[..., 0])


class ValueHead(nnx.Module):
    """Symexp two-hot distribution of the return from this frame on."""

    def __init__(self, width: int, cfg: AgentConfig, key: Array):
        self.bins = cfg.bins
        self.mlp = MLP(key, width, cfg.hidden, cfg.head_layers, cfg.bins, output_scale=0.0)

    def logits(self, h: Float[Array, "... D"]) -> Float[Array, "... S"]:
        return self.mlp.next(h)

    def mean(self, h: Float[Array, "... D"]) -> Float[Array, "..."]:
        return twohot_mean(self.logits(h), symexp_bins(self.bins))

    def loss(self, h: Float[Array, "... D"], returns: Float[Array, "..."]) -> Float[Array, "..."]:
        """``-ln p(returns | h)`` of paper Eq 10, per state; the returns are held constant."""
        return twohot_loss(self.logits(h), returns, symexp_bins(self.bins))


# ---------------------------------------------------------------------------------------------------------------------
# Multi-token prediction


def future(x: Array, first: int, count: int) -> Array:
    """[B, T, ...] -> [B, T, M, ...] with entry (t, n) = ``x[:, t + first + n]``, n < `count`; zeros past the end."""
    frames = x.shape[1]
    padded = jnp.pad(x, [(0, 0), (0, first + count - 1)] + [(0, 0)] * (x.ndim - 2))
    return jnp.stack([padded[:, first + n : first + n + frames] for n in range(count)], axis=2)


def same_episode(is_first: Bool[Array, "B T"], first: int, count: int) -> Bool[Array, "B T M"]:
    """True where ``t + first + n`` lies inside the window and in the episode of t."""
    segment = jnp.cumsum(is_first.astype(jnp.int32), axis=1) + 1  # from 1: the padding of `future` is 0
    return future(segment, first, count) == segment[:, :, None]


def agent_losses(
    policy: PolicyHead,
    reward: RewardHead,
    cont: ContinueHead,
    h: Float[Array, "B T D"],
    batch: Mapping[str, Any],
    *,
    event_weight: float = 1.0,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Multi-token behaviour cloning, reward and continue losses (paper Eq 9), in nats per counted target.

    A target counts if it lies in the window and in the episode of its frame; an action must also be present, and its
    row relevant. An action of several components counts if one is present; the missing ones add 0. Eq 9 sums over n;
    these are means over all counted (t, n), which differs by a factor that the loss normaliser takes out.

    Args:
        batch: actions and present (dicts of [B, T, ...]), reward, is_first, is_terminal [B, T], relevant [B].
        event_weight: weight of targets that are a reward (bins other than 0) or an end, in the means of these two
            losses. Rare events are learned sooner; the probabilities that the heads learn do not depend on it.

    Returns:
        Scalars "policy", "reward", "continue"; and metrics, all at offset n = 0.
    """
    is_first = jnp.asarray(batch["is_first"])
    components, count = policy.components, policy.mlp.out.shape[0]

    # Policy: the actions after the frame.
    inside = same_episode(is_first, 1, count) & jnp.asarray(batch["relevant"])[:, None, None]
    values = {c.name: future(jnp.asarray(batch["actions"][c.name]), 1, count) for c in components}
    present = {c.name: inside & future(jnp.asarray(batch["present"][c.name]), 1, count) for c in components}
    actions = policy(h)
    counted = jnp.any(jnp.stack(list(present.values())), axis=0)
    policy_loss = masked_mean(-actions.log_prob(values, present), counted)

    # Reward and continue: from the frame itself on. Logits shifted by the weight's logarithm: what weighting adds to
    # the odds of an event is then in the shift, and the heads themselves predict how often it happens.
    inside, shift = same_episode(is_first, 0, count), jnp.log(event_weight)
    rewards = future(jnp.asarray(batch["reward"], jnp.float32), 0, count)
    bins = symexp_bins(reward.bins)
    reward_logits = reward.logits(h)
    # The weight is of bins: a small reward is partly in the bin at zero, and that part is no event.
    mass = symexp_twohot(rewards, bins) * jnp.where(bins == 0, 1.0, event_weight)
    reward_nll = -jnp.sum(mass * jax.nn.log_softmax(reward_logits - shift * (bins == 0)), axis=-1)
    counts = jnp.sum(mass, axis=-1)
    reward_loss = masked_mean(reward_nll / counts, inside * counts)

    alive = ~future(jnp.asarray(batch["is_terminal"]).astype(bool), 0, count)
    cont_logits = cont.logits(h)
    cont_nll = -jax.nn.log_sigmoid(jnp.where(alive, 1.0, -1.0) * (cont_logits - shift))
    cont_loss = masked_mean(cont_nll, inside * jnp.where(alive, 1.0, event_weight))

    agreement = {name: a[:, :, 0] for name, a in actions.agreement(values).items()}
    error = jnp.abs(twohot_mean(reward_logits[:, :, 0], bins) - rewards[:, :, 0])
    correct = (cont_logits[:, :, 0] > 0) == alive[:, :, 0]
    metrics = {
        "policy_targets": jnp.mean(counted[:, :, 0].astype(jnp.float32)),
        "reward_error": masked_mean(error, inside[:, :, 0]),
        "reward_error_rewarded": masked_mean(error, inside[:, :, 0] & (rewards[:, :, 0] != 0)),
        "continue_accuracy": masked_mean(correct.astype(jnp.float32), inside[:, :, 0]),
        "continue_accuracy_terminal": masked_mean(correct.astype(jnp.float32), inside[:, :, 0] & ~alive[:, :, 0]),
    }
    for name, value in agreement.items():
        metrics[f"policy_accuracy/{name}"] = masked_mean(value, present[name][:, :, 0])
    return {"policy": policy_loss, "reward": reward_loss, "continue": cont_loss}, metrics
