"""The modules that phases 2 and 3 train, and the policy that plays with them in a real environment."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from dreamer4_jax.agent.heads import ContinueHead, PolicyHead, RewardHead, ValueHead
from dreamer4_jax.config import Config
from dreamer4_jax.nn import cache as ring
from dreamer4_jax.world.dynamics import Actions, Dynamics
from dreamer4_jax.world.oracle import OracleState
from dreamer4_jax.world.shortcut import observe
from dreamer4_jax.world.tokenizer import Tokenizer, TokenizerCache, reset_streams


def readout_width(cfg: Config) -> int:
    """Width of the agent read-out h."""
    return cfg.dynamics.transformer.width * cfg.dynamics.agent_tokens


class Agent(nnx.Module):
    """Phase 2: the world model with its policy, reward and continue heads."""

    def __init__(self, cfg: Config, dynamics: Dynamics, key: Array):
        policy, reward, cont = jax.random.split(key, 3)
        width = readout_width(cfg)
        self.dynamics = dynamics
        self.policy = PolicyHead(width, cfg.agent, cfg.actions, policy)
        self.reward = RewardHead(width, cfg.agent, reward)
        self.cont = ContinueHead(width, cfg.agent, cont)


class ActorCritic(nnx.Module):
    """Phase 3: the policy, started from behavioural cloning, and a new value head."""

    def __init__(self, cfg: Config, policy: PolicyHead, key: Array):
        self.policy = policy
        self.value = ValueHead(readout_width(cfg), cfg.agent, key)


@partial(jax.tree_util.register_dataclass, data_fields=["tokenizer", "dynamics", "actions"], meta_fields=[])
@dataclass(frozen=True)
class Memory:
    """What an acting policy remembers of its E streams; `actions` are the last ones, [E, ...]."""

    tokenizer: TokenizerCache
    dynamics: ring.Cache
    actions: dict[str, Array]


def see(
    tokenizer: Tokenizer,
    dynamics: Dynamics,
    memory: Memory,
    images: Array,
    tasks: Int[Array, "B words"],
    starting: Bool[Array, " B"],
    key: Array,
) -> tuple[OracleState, TokenizerCache]:
    """The oracle's state after the frames uint8 [B, H, W, 3]; streams that are `starting` forget what was before."""
    z, seen = tokenizer.encode_stream(images[:, None], reset_streams(memory.tokenizer, starting))
    led = Actions(
        {name: value[:, None] for name, value in memory.actions.items()},
        {name: ~starting[:, None] for name in memory.actions},
    )
    cache = ring.reset(memory.dynamics, starting)
    cache, h = observe(dynamics, cache, z, led, key, task=tasks[:, None])
    assert h is not None
    return OracleState(cache, z[:, 0].astype(jnp.float32), h[:, 0], tasks), seen


def empty_memory(tokenizer: Tokenizer, dynamics: Dynamics, streams: int) -> Memory:
    """What is remembered of `streams` streams before their first frame."""
    actions = {}
    for part in dynamics.cfg.actions:
        # The types that the policy's distributions draw, or the second decision would compile again.
        dtype = {"binary": jnp.uint8, "continuous": jnp.float32}.get(part.kind, jnp.int32)
        single = part.kind in ("categorical", "mouse")
        actions[part.name] = jnp.zeros((streams,) if single else (streams, part.size), dtype)
    return Memory(tokenizer.init_cache(streams), dynamics.init_cache(streams), actions)


def decide(
    tokenizer: Tokenizer,
    dynamics: Dynamics,
    policy: PolicyHead,
    memory: Memory,
    images: Array,
    tasks: Int[Array, "B words"],
    starting: Bool[Array, " B"],
    key: Array,
    *,
    greedy: bool,
) -> tuple[dict[str, Array], Memory]:
    """The next actions of streams that see `images`; those that are `starting` have forgotten what they saw before."""
    noise, draw = jax.random.split(key)
    state, seen = see(tokenizer, dynamics, memory, images, tasks, starting, noise)
    chosen = policy.next(state.h)
    actions = chosen.mode() if greedy else chosen.sample(draw)
    return actions, Memory(seen, state.cache, actions)


_act = jax.jit(decide, static_argnames="greedy", donate_argnums=3)


class WorldModelPolicy:
    """Plays in E environments at once from pixels and task words; a decision costs the same at any age of a stream."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        dynamics: Dynamics,
        policy: PolicyHead,
        *,
        seed: int = 0,
        greedy: bool = False,
        name: str = "agent",
    ):
        self.name = name
        self._models = (tokenizer, dynamics, policy)
        self._greedy = greedy
        self.reseed(seed)
        self._memory: Memory | None = None
        self._starting: np.ndarray | None = None

    def reseed(self, seed: int) -> None:
        """Draws begin anew, as in a policy that is made with `seed`."""
        self._key, self._step = jax.random.key(seed), 0

    def reset(self, starting: np.ndarray) -> None:
        """Streams that begin a new episode with the next `act`."""
        if self._memory is None:
            tokenizer, dynamics, _ = self._models
            memory = empty_memory(tokenizer, dynamics, len(starting))
            # Bound to a device as what `_act` returns is, or the second decision would compile again.
            self._memory = jax.device_put(memory, jax.local_devices()[0])
        before = np.zeros_like(starting) if self._starting is None else self._starting
        self._starting = before | np.asarray(starting, bool)

    def act(self, images: np.ndarray, tasks: np.ndarray) -> dict[str, np.ndarray]:
        """Actions for frames uint8 [E, H, W, 3] and task words int32 [E, words]."""
        if self._memory is None:
            self.reset(np.ones(len(images), bool))
        starting = np.zeros(len(images), bool) if self._starting is None else self._starting
        actions = self._decide(images, tasks, starting, jax.random.fold_in(self._key, self._step))
        self._step, self._starting = self._step + 1, None
        return {name: np.asarray(value) for name, value in actions.items()}

    def _decide(self, images: np.ndarray, tasks: np.ndarray, starting: np.ndarray, key: Array) -> dict[str, Array]:
        actions, self._memory = _act(*self._models, self._memory, images, tasks, starting, key, greedy=self._greedy)
        return actions
