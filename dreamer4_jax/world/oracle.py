"""The transition oracle: the world model as a pure step function ``(state, action, key) -> (state, transition)``.

Everything is batched over streams and free of side effects, so it runs under jit, scan and vmap: imagination, search
and imagined environments are loops over `TransitionOracle.step`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dreamer4_jax.nn.cache import Cache
from dreamer4_jax.world.dynamics import Actions, Dynamics
from dreamer4_jax.world.shortcut import denoise, observe
from dreamer4_jax.world.tokenizer import Tokenizer


class RewardLike(Protocol):
    def mean(self, h: Array) -> Array: ...


class ContinueLike(Protocol):
    def prob(self, h: Array) -> Array: ...


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "z", "h", "task"], meta_fields=[])
@dataclass(frozen=True)
class OracleState:
    """Attributes:
    cache: the dynamics' history, context frames noised to the context level.
    z: [B, N, C], tokens of the last frame.
    h: [B, D], agent read-out of the last frame.
    task: int32 [B, words].
    """

    cache: Cache
    z: Float[Array, "B N C"]
    h: Float[Array, "B D"]
    task: Int[Array, "B words"]


@partial(jax.tree_util.register_dataclass, data_fields=["z", "h", "reward", "cont"], meta_fields=[])
@dataclass(frozen=True)
class Transition:
    """What a step produced. reward and cont (probability that the episode goes on) came with the new frame."""

    z: Float[Array, "B N C"]
    h: Float[Array, "B D"]
    reward: Float[Array, " B"]
    cont: Float[Array, " B"]


def one_frame(values: dict[str, Array]) -> Actions:
    """Actions [B, ...] of one step, all present, with a time axis of one."""
    wide = {name: value[:, None] for name, value in values.items()}
    return Actions(wide, {name: jnp.ones(value.shape[:2], bool) for name, value in wide.items()})


@partial(
    jax.tree_util.register_dataclass, data_fields=["tokenizer", "dynamics", "reward", "cont"], meta_fields=["steps"]
)
@dataclass(frozen=True)
class TransitionOracle:
    """World model with its heads. `steps` is the K of its sampler."""

    tokenizer: Tokenizer | None
    dynamics: Dynamics
    reward: RewardLike
    cont: ContinueLike
    steps: int = 4

    def reset(
        self,
        context: Float[Array, "B T N C"],
        actions: Actions,
        task: Int[Array, "B words"],
        key: Array,
        *,
        segments: Int[Array, "B T"] | None = None,
    ) -> OracleState:
        """State after the given context frames (clean tokens)."""
        cache = self.dynamics.init_cache(context.shape[0])
        wide = jnp.broadcast_to(task[:, None], (*context.shape[:2], task.shape[-1]))
        cache, h = observe(self.dynamics, cache, context, actions, key, task=wide, segments=segments)
        assert h is not None
        return OracleState(cache, context[:, -1].astype(jnp.float32), h[:, -1], task)

    def step(self, state: OracleState, action: dict[str, Array], key: Array) -> tuple[OracleState, Transition]:
        """Samples the next frame for `action` [B, ...] and writes it to the history."""
        noise, write = jax.random.split(key)
        led = one_frame(action)
        z = denoise(self.dynamics, state.cache, led, noise, steps=self.steps)
        cache, h = observe(self.dynamics, state.cache, z, led, write, task=state.task[:, None])
        assert h is not None
        after = OracleState(cache, z[:, 0], h[:, 0], state.task)
        return after, Transition(z[:, 0], h[:, 0], self.reward.mean(h[:, 0]), self.cont.prob(h[:, 0]))

    def decode(self, z: Float[Array, "B T N C"]) -> Any:
        """Frames in [0, 1] of a sequence of tokens."""
        if self.tokenizer is None:
            raise ValueError("this oracle was made without a tokenizer; frames cannot be decoded")
        return self.tokenizer.decode(z)
