"""One table from the names of array axes to mesh axes, from which the sharding of everything is derived."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from dreamer4_jax.config import ConfigError

BATCH = ("replica", "data")
# Activations, by the names of their axes. A layer's frames or its tokens are over ctx, never both.
ACTIVATIONS: Mapping[str, tuple[str, ...]] = {"batch": BATCH, "sharded": ("ctx",), "heads": ("model",)}


def _spec(shape: tuple[int, ...], names: tuple[str | None, ...], table: Mapping[str, tuple[str, ...]], mesh: Any):
    """The partition of an array; an axis that its mesh axes do not divide stays whole."""
    entries: list[Any] = []
    for size, name in zip(shape, names, strict=True):
        axes = tuple(axis for axis in table.get(name or "", ()) if mesh.shape[axis] > 1)
        entries.append(axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None)
    return PartitionSpec(*entries)


@dataclass(frozen=True)
class Rules:
    """How parameters are split: fully sharded over data and ctx by their embed axis, over model by heads and features.

    Attributes:
      parameters: name of a parameter's axis -> mesh axes.
      min_size: a parameter with fewer elements is held whole by every device: gathering it would cost more time than
        it saves memory.
    """

    parameters: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "embed": ("data", "ctx"),
            "heads": ("model",),
            "kv_heads": ("model",),
            "ffn": ("model",),
        }
    )
    min_size: int = 2**18

    def shardings(self, tree: Any, mesh: Mesh | AbstractMesh) -> Any:
        """The tree of shardings of a model, or of anything that holds its parameters: optimiser state, EMA, gradients.

        Leaves that are no parameter (counters, keys) are held by every device.
        """

        def visit(node: Any) -> Any:
            axes = node.get_metadata().get("axes") if isinstance(node, nnx.Variable) else None
            return jax.tree.map(lambda leaf: NamedSharding(mesh, self._parameter(leaf, axes, mesh)), node)

        return jax.tree.map(visit, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))

    def _parameter(self, leaf: Any, axes: tuple[str | None, ...] | None, mesh: Any) -> PartitionSpec:
        if axes is None or leaf.ndim < len(axes) or math.prod(leaf.shape) < self.min_size:
            return PartitionSpec()
        stacked: tuple[str | None, ...] = (None,) * (leaf.ndim - len(axes))  # layers, in front and without a name
        return _spec(leaf.shape, (*stacked, *axes), self.parameters, mesh)


def batch_shardings(batch: Any, mesh: Mesh, parts: int = 1) -> Any:
    """Shardings of a batch: rows, axis 0 of every leaf, over replica and data. Scalars are held by every device.

    `batch` is one of `parts` parts of the rows.
    """

    def rows(x: Any) -> NamedSharding:
        shape = np.shape(x)
        shape = (shape[0] * parts, *shape[1:]) if shape else ()
        names = ("batch", *(None for _ in shape[1:])) if shape else ()
        return NamedSharding(mesh, _spec(shape, names, ACTIVATIONS, mesh))

    return jax.tree.map(rows, batch)


# Keys and values of the ring caches, [layers, B, N, G, W, K]: tokens over ctx, as in the time layers that read them.
CACHE = (None, "batch", "sharded", "heads", None, None)


def cache_shardings(cache: Any, mesh: Mesh) -> Any:
    """Shardings of a ring cache of streams, or of a tree of them."""

    def one(x: Any) -> NamedSharding:
        names = CACHE if x.ndim == len(CACHE) else ("batch", *(None for _ in x.shape[1:]))
        return NamedSharding(mesh, _spec(x.shape, names, ACTIVATIONS, mesh))

    return jax.tree.map(one, cache)


def batch_groups(mesh: Any = None) -> int:
    """Groups of devices among which the rows of a batch are divided, on `mesh` or the one that is set; 1 without."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH)


def check_rows(rows: int, mesh: Mesh, name: str) -> None:
    """Raises `ConfigError` if a batch of `rows` cannot be divided among the devices of `mesh`."""
    parts = batch_groups(mesh)
    if rows % parts:
        raise ConfigError(f"{name} = {rows}: cannot be divided among {parts} devices (mesh axes {' x '.join(BATCH)})")


def platform() -> str:
    """What is compiled for, "cpu", "gpu" or "tpu": the devices of the mesh that is set, else this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def gathered(model: Any) -> Any:
    """A model whose parameters every device holds whole, but for what is over the model axis; as it is without a mesh.

    For a loop over frozen weights: they are gathered once in front of it instead of in every pass.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return model
    table = Rules().parameters
    kept = Rules({name: tuple(axis for axis in axes if axis == "model") for name, axes in table.items()})
    specs = jax.tree.map(lambda s: s.spec, kept.shardings(model, mesh))
    return jax.tree.map(jax.lax.with_sharding_constraint, model, specs)


def constrain(x: Array, *names: str | None) -> Array:
    """`x` with its axes, called "batch", "sharded", "heads" or None, split over the mesh that is set; else `x` itself.

    "sharded" is the frames of a video where each frame is computed on its own, and its tokens where each token is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(x.shape, names, ACTIVATIONS, mesh))
