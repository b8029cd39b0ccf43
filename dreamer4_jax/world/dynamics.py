"""Interactive dynamics transformer: tokens of a frame, action encoder, flow head, agent tokens (paper 3.2).

A frame's block is [action, (tau, d), spatial tokens, registers, agent tokens]. World tokens see each other; agent
tokens see everything and are seen by nothing. Without a task they are there all the same, and read by nobody: a frame
has a multiple of eight tokens, which a TPU's tiles want, and one cache fits every pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from dreamer4_jax.config import ActionComponent, Config
from dreamer4_jax.nn import cache as ring
from dreamer4_jax.nn import layers
from dreamer4_jax.nn.attention import Mask
from dreamer4_jax.nn.transformer import Transformer
from dreamer4_jax.world.tokenizer import token_coordinates

WORLD, AGENT = 0, 1
RULES = ((True, False), (True, True))  # nothing but agent tokens attends to agent tokens


@partial(jax.tree_util.register_dataclass, data_fields=["values", "present"], meta_fields=[])
@dataclass(frozen=True)
class Actions:
    """The actions that led to each frame, by component.

    Attributes:
      values: int32 [B, T] (categorical, mouse), or [B, T, A] (binary keys as 0/1, continuous in [-1, 1]).
      present: bool [B, T]. False (unlabelled video, first frames) leaves only the base embedding.
    """

    values: Mapping[str, Array]
    present: Mapping[str, Bool[Array, "B T"]]


@partial(jax.tree_util.register_dataclass, data_fields=["z1", "h", "cache"], meta_fields=[])
@dataclass(frozen=True)
class DynamicsOutput:
    """Attributes:
    z1: float32 [B, T, N, C], predicted clean tokens.
    h: float32 [B, T, agent_tokens * D], read-out of the agent tokens, or None without a task.
    cache: the cache with the T frames written, or None.
    """

    z1: Float[Array, "B T N C"]
    h: Float[Array, "B T D"] | None
    cache: ring.Cache | None


class ActionEncoder(nnx.Module):
    """Sums the embeddings of all present components and a learned base embedding into one token."""

    def __init__(self, key: Array, components: tuple[ActionComponent, ...], width: int):
        self.components = components
        base, *keys = jax.random.split(key, len(components) + 1)
        self.base = layers.normal(base, (width,), ("embed",))
        tables = {}
        for k, part in zip(keys, components, strict=True):
            match part.kind:
                case "categorical" | "mouse":
                    tables[part.name] = layers.normal(k, (part.size, width), ("action", "embed"), std=1.0)
                case "binary":
                    tables[part.name] = layers.normal(k, (part.size, 2, width), ("action", None, "embed"), std=1.0)
                case "continuous":
                    tables[part.name] = layers.fan_in(k, (part.size, width), ("action", "embed"))
        self.tables = nnx.Dict(tables)

    def __call__(self, actions: Actions) -> Float[Array, "B T D"]:
        total = self.base[...]
        for part in self.components:
            value, table = actions.values[part.name], self.tables[part.name][...]
            present = actions.present[part.name][..., None]
            match part.kind:
                case "categorical" | "mouse":
                    # A one-hot product: its gradient is a matrix product too, where a gather's is a slow scatter.
                    code = jax.nn.one_hot(value, part.size) @ table
                case "binary":
                    both = jnp.stack([1.0 - value, value * 1.0], axis=-1)
                    code = jnp.einsum("btac,acd->btd", both, table)
                case "continuous":
                    # Masked here already: a NaN in unlabelled data would pass through the gradient of the product.
                    # Clipped as environments clip: beyond what it was trained on, a policy could have its way with it.
                    code = jnp.clip(jnp.where(present, value.astype(jnp.float32), 0.0), -1.0, 1.0) @ table
            total = total + jnp.where(present, code, 0.0)
        return total


class TaskEncoder(nnx.Module):
    """Sum over the words of a task text of one embedding per (place, word); word 0 is padding."""

    def __init__(self, key: Array, words: int, vocab: int, width: int):
        self.table = layers.normal(key, (words, vocab, width), (None, "vocab", "embed"), std=0.3)

    def __call__(self, task: Int[Array, "B T words"]) -> Float[Array, "B T D"]:
        hot = jax.nn.one_hot(task, self.table.shape[1]) * (task > 0)[..., None]
        return jnp.einsum("btwv,wvd->btd", hot, self.table[...])


def context_level(context_signal: float, k_max: int) -> float:
    """Signal level of finished frames: `context_signal` rounded down to the training grid of 1/k_max."""
    return np.floor(context_signal * k_max + 1e-6) / k_max


def input_gain(tau: Float[Array, "..."], floor: float) -> Float[Array, "..."]:
    """Factor on noisy tokens at the network's input: ``floor + (1 - floor) tau / (tau^2 + (1 - tau)^2)``.

    The fraction is the least-squares coefficient of z1 on z~ for latents of unit variance: what a noisy token tells
    about the clean one. Without it the noise of a frame at tau = 0 drowns what attention fetches from the past. The
    floor keeps the noise visible, from which a sample of several possible futures is drawn. floor = 1: factor 1.
    """
    return floor + (1.0 - floor) * tau / (tau**2 + (1.0 - tau) ** 2)


class Dynamics(nnx.Module):
    """Predicts clean tokens from noisy ones: ``f(z, tau, d, a) -> z1`` for every frame at once."""

    def __init__(self, cfg: Config, key: Array):
        d, width = cfg.dynamics, cfg.dynamics.transformer.width
        self.cfg = cfg
        self.k_max = d.k_max
        self.context_level = context_level(d.context_signal, d.k_max)
        keys = jax.random.split(key, 10)
        fixed = 2 + cfg.tokenizer.tokens + d.agent_tokens
        count = d.registers + (-(fixed + d.registers)) % 8
        self.actions = ActionEncoder(keys[0], cfg.actions, width)
        self.signal = layers.normal(keys[1], (d.k_max, width // 2), (None, "embed"), std=0.5)
        self.step = layers.normal(keys[2], (d.k_max.bit_length(), width // 2), (None, "embed"), std=0.5)
        self.embed = layers.Linear(keys[3], (cfg.tokenizer.token_channels, width), ("channel", "embed"))
        self.place = layers.normal(keys[4], (cfg.tokenizer.tokens, width), ("token", "embed"))
        self.registers = layers.normal(keys[5], (count, width), ("register", "embed"))
        # Apart from the start: they add the same task, and equal tokens would read the same thing.
        self.agent = layers.normal(keys[6], (d.agent_tokens, width), ("agent", "embed"), std=0.5)
        self.task = TaskEncoder(keys[7], cfg.agent.task_words, cfg.agent.task_vocab, width)
        self.transformer = Transformer(keys[8], d.transformer)
        self.flow = layers.Linear(keys[9], (width, cfg.tokenizer.token_channels), ("embed", "channel"))

    @property
    def tokens(self) -> int:
        """Tokens of a frame."""
        return 2 + self.cfg.tokenizer.tokens + self.registers.shape[0] + self.agent.shape[0]

    def _layout(self) -> tuple[np.ndarray, Mask]:
        """Coordinates [N, 2] and mask of a frame's tokens; tokens without a place stand in the middle."""
        places = token_coordinates(self.cfg.tokenizer)
        middle = places.mean(0, keepdims=True)
        after = np.repeat(middle, self.tokens - 2 - len(places), axis=0)
        types = [WORLD] * (self.tokens - self.agent.shape[0]) + [AGENT] * self.agent.shape[0]
        return np.concatenate([middle, middle, places, after]), Mask(types=tuple(types), rules=RULES)

    def _signal_token(self, tau: Float[Array, "B T"], d: Float[Array, "B T"]) -> Float[Array, "B T D"]:
        """One token: the table of tau on the grid of 1/k_max beside the table of d = 2^-i."""
        level = jnp.round(tau * self.k_max).astype(jnp.int32)
        stride = jnp.round(-jnp.log2(d)).astype(jnp.int32)
        return jnp.concatenate(
            [
                jax.nn.one_hot(level, self.signal.shape[0]) @ self.signal[...],
                jax.nn.one_hot(stride, self.step.shape[0]) @ self.step[...],
            ],
            axis=-1,
        )

    def init_cache(self, batch: int) -> ring.Cache:
        """History of `batch` fresh streams."""
        return ring.empty(self.cfg.dynamics.transformer, batch, self.tokens)

    def __call__(
        self,
        z: Float[Array, "B T N C"],
        tau: Float[Array, "B T"],
        d: Float[Array, "B T"],
        actions: Actions,
        *,
        task: Int[Array, "B T words"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        cache: ring.Cache | None = None,
        finished: int | None = None,
        streams: Bool[Array, " B"] | None = None,
    ) -> DynamicsOutput:
        """One pass over T frames.

        Args:
          z: tokens at signal level `tau`, a multiple of 1/k_max below 1; `d` is a power of two down to 1/k_max.
          actions: the action that led to each frame.
          task: word ids, added to the agent tokens, whose read-out is returned.
          segments: episode numbers; frames see only their own episode.
          finished: how many of the frames, from the first, are written to the cache (all by default).
          streams: whose frames are written to the cache (all by default).
          cache: history in front of the frames.
        """
        batch, frames = z.shape[:2]
        wide = (batch, frames)
        action, signal = self.actions(actions)[:, :, None], self._signal_token(tau, d)[:, :, None]
        gain = input_gain(tau, self.cfg.dynamics.input_floor)[..., None, None]
        spatial = self.embed(gain * z.astype(jnp.float32)) + self.place[...]
        if self.cfg.dynamics.condition_spatial:
            # Two tokens among many get little attention at first; added to all, they are there from the first step.
            spatial = spatial + action + signal
        parts = [
            action,
            signal,
            spatial,
            jnp.broadcast_to(self.registers[...], (*wide, *self.registers.shape)),
        ]
        agent = self.agent[...] if task is None else self.agent[...] + self.task(task)[:, :, None]
        parts.append(jnp.broadcast_to(agent, (*wide, *self.agent.shape)))
        coordinates, mask = self._layout()
        y, kv = self.transformer(
            jnp.concatenate(parts, axis=2),
            coordinates=coordinates,
            space_mask=mask,
            placed=np.isin(np.arange(self.tokens), 2 + np.arange(self.cfg.tokenizer.tokens)),
            segments=segments,
            cache=cache,
        )
        y = y.astype(jnp.float32)
        n = self.cfg.tokenizer.tokens
        with jax.named_scope("flow"):
            z1 = self.flow(y[:, :, 2 : 2 + n])
            if self.cfg.dynamics.prediction == "v":  # on the straight line of Eq 6 the velocity z1 - z0 leads there
                z1 = z + (1.0 - tau)[..., None, None] * z1
        h = None if task is None else y[:, :, -self.agent.shape[0] :].reshape(*wide, -1)
        # Under jit a cache that nobody reads costs nothing: denoising passes drop it.
        after = None
        if cache is not None and kv is not None:
            k, v = (x[..., :finished, :] for x in kv)
            after = ring.write(cache, k, v, None if segments is None else segments[:, :finished], streams)
        return DynamicsOutput(z1, h, after)
