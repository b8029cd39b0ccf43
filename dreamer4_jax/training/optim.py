"""Optimisers, the learning-rate schedule and the loss normaliser.

The paper names no optimiser, schedule, clipping or weight decay; these are this project's choices. Which parameters
are matrices is read from the `axes` of each `nnx.Param`, because stacking layers for `lax.scan` adds a leading axis
to every array, so that the number of dimensions alone does not tell a matrix from a stack of scales.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from dreamer4_jax.config import PhaseConfig

B1, B2 = 0.9, 0.99  # of AdamW and LaProp
ADAM_EPS, LAPROP_EPS = 1e-8, 1e-20
MUON_RMS = 0.2  # the size of AdamW's updates, so that one learning rate serves both
NORM_DECAY, NORM_FLOOR = 0.99, 1e-6

# Matrices inside the transformers. Embedding tables and read-outs have other axes and are left to AdamW by Muon,
# whose orthogonalised updates suit maps between hidden states.
_HIDDEN = frozenset({"embed", "heads", "kv_heads", "head_dim", "ffn"})


def wsd_schedule(cfg: PhaseConfig) -> optax.Schedule:
    """Warm-up, stable, decay: the rate of the update that takes step s to s + 1.

    It rises linearly to `lr` over the first `warmup` steps, and falls linearly over the last ``decay * steps``, so
    that it would reach 0 at s = `steps`. Neither end is 0, so no step is wasted.
    """
    falling = cfg.decay * cfg.steps

    def schedule(step: Any) -> Float[Array, ""]:
        s = jnp.asarray(step, jnp.float32)
        up = (s + 1.0) / cfg.warmup if cfg.warmup > 0 else jnp.ones_like(s)
        down = (cfg.steps - s) / falling if falling > 0 else jnp.ones_like(s)
        return cfg.lr * jnp.clip(jnp.minimum(up, down), 0.0, 1.0)

    return schedule


# ---------------------------------------------------------------------------------------------------------------------
# Which parameters are matrices


def _map_parameters(fn: Callable[[Any, tuple | None], Any], params: Any) -> Any:
    """`fn(leaf, axes)` for every leaf; `axes` is None where a leaf carries none. Leaves that optax masked stay."""

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def visit(node: Any) -> Any:
        if masked(node):
            return node
        if isinstance(node, nnx.Variable):
            axes = node.get_metadata().get("axes")
            return jax.tree.map(lambda leaf: leaf if masked(leaf) else fn(leaf, axes), node, is_leaf=masked)
        return fn(node, None)

    return jax.tree.map(visit, params, is_leaf=lambda node: masked(node) or isinstance(node, nnx.Variable))


def _layer_axes(leaf: Any, axes: tuple | None) -> list[int]:
    """Positions of the axes that one layer has: not those of stacking, named "layers" or in front without a name."""
    if axes is None:
        return list(range(leaf.ndim))
    stacked = leaf.ndim - len(axes)
    return [stacked + i for i, name in enumerate(axes) if name != "layers"]


def is_matrix(params: Any) -> Any:
    """The tree of `params` with True at every parameter that has at least two axes within one layer.

    Weight decay applies to these alone, never to scales, biases and single learned tokens.
    """
    return _map_parameters(lambda leaf, axes: len(_layer_axes(leaf, axes)) >= 2, params)


def _muon_axes(leaf: Any, axes: tuple | None) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes are the inputs and the outputs of a hidden matrix; None for what Muon leaves to AdamW."""
    at = _layer_axes(leaf, axes)
    names = [name for name in axes or () if name != "layers"]
    if len(at) < 2 or any(name not in _HIDDEN for name in names):
        return None
    # The attention output (heads, head_dim, embed) contracts all but its last axis; every other matrix its first.
    inputs = len(at) - 1 if names and names[-1] == "embed" else 1
    return optax.contrib.MuonDimensionNumbers(tuple(at[:inputs]), tuple(at[inputs:]))


def _muon_size(update: Array, axes: tuple | None) -> Array:
    """An orthogonal matrix scaled to the root mean square `MUON_RMS`, whatever its shape (Liu et al. 2025)."""
    dims = _muon_axes(update, axes)
    inputs, outputs = (math.prod(update.shape[i] for i in side) for side in dims or ((), ()))
    return update * (MUON_RMS * max(inputs, outputs) ** 0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Optimisers


class LaPropState(NamedTuple):
    updates: Array
    mu: Any
    nu: Any


def scale_by_laprop(b1: float = B1, b2: float = B2, eps: float = LAPROP_EPS) -> optax.GradientTransformation:
    """LaProp (Ziyin, Wang, Ueda 2020): Adam with the momentum taken of the normalised gradient.

    ``v = b2 v + (1 - b2) g^2``; ``m = b1 m + (1 - b1) g / (sqrt(v / (1 - b2^t)) + eps)``; update ``m / (1 - b1^t)``.
    A large gradient is divided by an estimate that already holds it, so an update stays bounded whatever b1 and b2.
    """

    def init(params: Any) -> LaPropState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return LaPropState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads: Any, state: LaPropState, params: Any = None) -> tuple[Any, LaPropState]:
        count = state.updates + 1
        c1, c2 = 1.0 - b1**count, 1.0 - b2**count
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        mu = jax.tree.map(lambda m, g, v: b1 * m + (1 - b1) * g / (jnp.sqrt(v / c2) + eps), state.mu, grads, nu)
        return jax.tree.map(lambda m: m / c1, mu), LaPropState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def make_optimizer(cfg: PhaseConfig) -> optax.GradientTransformation:
    """Global-norm clipping, then the optimiser with decoupled weight decay (of matrices), at the WSD rate."""
    clip = [optax.clip_by_global_norm(cfg.clip)] if cfg.clip > 0 else []
    decay = [optax.add_decayed_weights(cfg.weight_decay, is_matrix)] if cfg.weight_decay > 0 else []
    return optax.chain(*clip, _direction(cfg.optimizer), *decay, optax.scale_by_learning_rate(wsd_schedule(cfg)))


def _direction(name: str) -> optax.GradientTransformation:
    """The update of each optimiser before weight decay and learning rate."""
    if name == "adamw":
        return optax.scale_by_adam(B1, B2, ADAM_EPS)
    if name == "laprop":
        return scale_by_laprop()
    orthogonal = optax.contrib.scale_by_muon(weight_dimension_numbers=lambda tree: _map_parameters(_muon_axes, tree))
    muon = optax.chain(orthogonal, optax.stateless(lambda updates, _: _map_parameters(_muon_size, updates)))

    def labels(params: Any) -> Any:
        return _map_parameters(lambda leaf, axes: "muon" if _muon_axes(leaf, axes) else "adamw", params)

    return optax.partition({"muon": muon, "adamw": optax.scale_by_adam(B1, B2, ADAM_EPS)}, labels)


# ---------------------------------------------------------------------------------------------------------------------
# Loss normaliser


def init_norms(terms: Iterable[str]) -> dict[str, Any]:
    """The state of the loss normaliser: steps seen, and the running mean square of each term."""
    return {"count": jnp.zeros((), jnp.int32), "mean_square": {t: jnp.zeros((), jnp.float32) for t in terms}}


def normalize(norms: dict[str, Any], terms: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Divides each loss term by the running estimate of its root mean square (paper 3.1, 3.2).

    ``s = decay s + (1 - decay) term^2``, corrected by ``1 - decay^t`` as Adam does, so that the first step divides a
    term by its own magnitude; the root is at least the floor. No gradient flows through the estimate.

    Returns:
      The normalised terms and the new state.
    """
    count = norms["count"] + 1
    correction = 1.0 - NORM_DECAY ** count.astype(jnp.float32)
    mean_square = {
        t: NORM_DECAY * norms["mean_square"][t] + (1 - NORM_DECAY) * jax.lax.stop_gradient(v) ** 2
        for t, v in terms.items()
    }
    scaled = {t: v / jnp.maximum(jnp.sqrt(mean_square[t] / correction), NORM_FLOOR) for t, v in terms.items()}
    return scaled, {"count": count, "mean_square": mean_square}
