"""The world model as a tree of states: what a search keeps of every node that it has imagined."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dreamer4_jax.config import UserError
from dreamer4_jax.nn.cache import Cache
from dreamer4_jax.world.oracle import OracleState, TransitionOracle


@partial(
    jax.tree_util.register_dataclass, data_fields=["k", "v", "length", "root", "node", "z", "h", "task"], meta_fields=[]
)
@dataclass(frozen=True)
class Branch:
    """A state below a root, streams first.

    Attributes:
      k, v: [B, layers, N, G, depth, K], keys and values of the frames since the root.
      length: int32 [B], how many these are.
      root: int32 [B], the root's stream.
      node: int32 [B], the copy of a real environment, where one is searched in (`evaluation.simulator`).
      z, h, task: as in `OracleState`.
    """

    k: Float[Array, "B layers N G depth K"]
    v: Float[Array, "B layers N G depth K"]
    length: Int[Array, " B"]
    root: Int[Array, " B"]
    node: Int[Array, " B"]
    z: Float[Array, "B N C"]
    h: Float[Array, "B D"]
    task: Int[Array, "B words"]


class Real(Protocol):
    """Real environments in place of the world model's frames: like `TransitionOracle.step`, with a node for a state."""

    def step(
        self, oracle: TransitionOracle, state: OracleState, node: Array, action: dict[str, Array], key: Array
    ) -> tuple[OracleState, Any, Array]: ...


class BranchingOracle:
    """The transition oracle below given roots, at most `depth` frames deep.

    A state of the oracle holds the history of a whole window: in the quickstart (2 time layers, 72 tokens, 4 x 16
    values, float32) 74 kB a frame and 1.2 MB at 16 frames, and a tree of 256 simulations would copy it 256 times. Here
    the root's history is kept once, and a node holds the frames since the root: `depth` slots, so ``depth / window`` of
    that memory, whatever the window (192 frames in `paper`). A step puts both together in a ring, exactly as if the
    frames had been written one by one.
    """

    def __init__(self, oracle: TransitionOracle, roots: OracleState, depth: int, real: Real | None = None):
        window = roots.cache.pos.shape[1]
        if not 1 <= depth <= window:
            raise UserError(f"search depth = {depth}: must be from 1 to dynamics.transformer.window = {window} frames")
        self._oracle, self._roots, self._depth, self._real = oracle, roots, depth, real

    def start(self) -> Branch:
        cache = self._roots.cache
        layers, batch, tokens, groups, _, dim = cache.k.shape
        path = jnp.zeros((batch, layers, tokens, groups, self._depth, dim), cache.k.dtype)
        each = jnp.arange(batch, dtype=jnp.int32)
        none = jnp.zeros_like(each)
        return Branch(path, path, none, each, each, self._roots.z, self._roots.h, self._roots.task)

    def state(self, branch: Branch) -> OracleState:
        """The oracle's own state of a branch: the root's history, and the branch's frames in it."""
        root = self._roots.cache
        offset = jnp.arange(self._depth, dtype=jnp.int32)

        def place(ring: Array, path: Array, start: Array, length: Array, axis: int) -> Array:
            slots = (start + offset) % root.pos.shape[1]
            shape = [self._depth if i == axis else 1 for i in range(ring.ndim)]
            live = (offset < length).reshape(shape)
            at = (slice(None),) * axis + (slots,)
            return ring.at[at].set(jnp.where(live, path, ring[at]), unique_indices=True)

        begun = root.next[branch.root]
        put = jax.vmap(partial(place, axis=3), in_axes=(1, 0, 0, 0), out_axes=1)
        k, v = (
            put(jnp.take(ring, branch.root, axis=1), path, begun, branch.length)
            for ring, path in ((root.k, branch.k), (root.v, branch.v))
        )
        index = begun[:, None] + offset
        pos = jax.vmap(partial(place, axis=0))(root.pos[branch.root], index, begun, branch.length)
        return OracleState(Cache(k, v, pos, begun + branch.length), branch.z, branch.h, branch.task)

    def step(self, branch: Branch, action: dict[str, Array], key: Array) -> tuple[Branch, Any]:
        state, node = self.state(branch), branch.node
        if self._real is None:
            after, seen = self._oracle.step(state, action, key)
        else:
            after, seen, node = self._real.step(self._oracle, state, node, action, key)
        slot = state.cache.next % state.cache.pos.shape[1]
        take = jax.vmap(lambda ring, i: ring[:, :, :, i], in_axes=(1, 0))
        keep = jax.vmap(lambda path, new, i: path.at[:, :, :, i].set(new))
        k, v = (
            keep(path, take(ring, slot), branch.length)
            for path, ring in ((branch.k, after.cache.k), (branch.v, after.cache.v))
        )
        return Branch(k, v, branch.length + 1, branch.root, node, after.z, after.h, after.task), seen
