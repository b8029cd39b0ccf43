"""Search in copies of the real environment: the true frames, rewards and ends in place of the world model's.

Beside search in the world model it separates what the model gets wrong from what the search does. Policy and value
still read the world model's read-out, of true frames.
"""

import copy
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array

from dreamer4_jax.config import UserError
from dreamer4_jax.envs.kinds import KINDS
from dreamer4_jax.envs.spaces import to_env
from dreamer4_jax.world.oracle import OracleState, Transition, TransitionOracle, one_frame
from dreamer4_jax.world.shortcut import observe


class EnvCopies:
    """Copies of E real environments as nodes of a search; given as `real` to `agent.planning.SearchPolicy`.

    Node i < E is the environment of stream i itself, which is only ever copied; each step makes a node. A copy gets a
    random generator of its own: with the environment's it would know the future. After an end nothing follows.
    Environments have image observations, copy with `copy.deepcopy`, and hold shared parts in `shared` attributes.

    Attributes:
      roots: stream -> environment; `SearchPolicy` keeps it.
    """

    def __init__(self, height: int, width: int, *, seed: int = 0):
        self._shape = (height, width, 3)
        self._rng = np.random.default_rng(seed)
        self.roots: dict[int, gymnasium.Env] = {}
        self._nodes: list[tuple[Any, np.ndarray | None]] = []  # environment, and its last frame once it has ended

    def restart(self) -> None:
        """Forgets all nodes but the roots."""
        self._nodes = [(self.roots[i], None) for i in range(len(self.roots))]

    def _step(self, node: np.ndarray, action: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        count = len(node)
        images = np.zeros((count, *self._shape), np.uint8)
        reward, cont, child = np.zeros(count, np.float32), np.ones(count, np.float32), np.zeros(count, np.int32)
        action = {name: np.asarray(value) for name, value in action.items()}
        for i, at in enumerate(np.asarray(node)):
            env, ended = self._nodes[int(at)]
            if ended is not None:
                images[i], cont[i], child[i] = ended, 0.0, at
                continue
            branch = clone(env, int(self._rng.integers(2**31)))
            observation, given, terminated, truncated, _ = branch.step(to_env(action, i))
            images[i], reward[i], cont[i] = observation["image"], given, not terminated
            self._nodes.append((branch, images[i] if terminated or truncated else None))
            child[i] = len(self._nodes) - 1
        return images, reward, cont, child

    def step(
        self, oracle: TransitionOracle, state: OracleState, node: Array, action: dict[str, Array], key: Array
    ) -> tuple[OracleState, Transition, Array]:
        """One real step from each node, seen by the world model."""
        assert oracle.tokenizer is not None
        if oracle.tokenizer.cfg.encoder.time_layers:
            raise UserError("tokenizer.encoder.time_every must be 0: a branch keeps no history of the tokenizer")
        count = node.shape[0]
        like = tuple(
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (
                ((count, *self._shape), jnp.uint8),
                ((count,), jnp.float32),
                ((count,), jnp.float32),
                ((count,), jnp.int32),
            )
        )
        # Calls follow each other by their data: a node comes from the call before.
        images, reward, cont, child = io_callback(self._step, like, node, action)
        z = oracle.tokenizer.encode(images[:, None])
        cache, h = observe(oracle.dynamics, state.cache, z, one_frame(action), key, task=state.task[:, None])
        assert h is not None
        z, h = z[:, 0].astype(jnp.float32), h[:, 0]
        return OracleState(cache, z, h, state.task), Transition(z, h, reward, cont), child


def clone(env: gymnasium.Env, seed: int) -> gymnasium.Env:
    """An independent copy of an environment in its present state, with a generator of its own.

    Raises:
      UserError: it cannot be copied, as those that are simulated in C.
    """
    shared = [getattr(env, name) for name in getattr(env, "shared", ())]
    try:
        other = copy.deepcopy(env, {id(part): part for part in shared})
    except TypeError as error:
        level = getattr(env, "level", "")
        kind = next((k.name for k in KINDS.values() if level.startswith(k.prefixes)), type(env).__name__)
        raise UserError(
            f"{kind} {level}".rstrip()
            + f": cannot be copied in the middle of an episode ({error}); search in the world model instead"
        ) from error
    other.unwrapped.np_random = np.random.default_rng(seed)
    if other.has_wrapper_attr("reseed"):
        other.get_wrapper_attr("reseed")(seed)
    return other
