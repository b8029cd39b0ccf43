"""Models of a few thousand parameters, and what tests of them share."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dreamer4_jax.config import Config, TransformerConfig, preset
from dreamer4_jax.world import Actions

MOVES = 3


def transformer_config(**fields: Any) -> TransformerConfig:
    """Width 32, grouped heads, four layers, a window of three frames."""
    small: dict[str, Any] = dict(layers=4, width=32, heads=4, kv_heads=2, head_dim=8, ffn=48, window=3)
    return TransformerConfig(**{**small, **fields})


def config(**overrides: Any) -> Config:
    """A world of 16 x 16 pixels: 4 patches, 4 tokens of 4 channels, 8 tokens per frame, agent token included."""
    transformer = dict(layers=4, width=32, heads=4, kv_heads=2, head_dim=8, ffn=48, window=3)
    tokenizer = dict(transformer, local_space=2.0, local_time=1.0)
    return preset(
        "tiny",
        **{
            "actions": [{"name": "move", "kind": "categorical", "size": MOVES}],
            "tokenizer": {
                "height": 16,
                "width": 16,
                "patch": 8,
                "latents": 4,
                "channels": 4,
                "pack": 1,
                "encoder": tokenizer,
                "decoder": tokenizer,
            },
            "dynamics": {"transformer": transformer, "registers": 1, "k_max": 8},
            "agent.task_words": 2,
            "agent.task_vocab": 6,
            **overrides,
        },
    )


def drawn(make: Callable[[Array], Any], seed: int = 0) -> Any:
    """The module that `make(key)` builds, with parameters drawn in NumPy: to compile an initialisation takes seconds.

    None is left at a unit scale or a zero bias, which would hide mistakes.
    """
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> Array:
        x = 0.2 * rng.standard_normal(leaf.shape)
        return jnp.asarray(x + 1.0 if "scale" in jax.tree_util.keystr(path) else x, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(make, jax.random.key(0)))


def moves(batch: int, frames: int, seed: int = 0) -> Actions:
    """Random moves; the first frame has none."""
    value = np.random.default_rng(seed).integers(0, MOVES, (batch, frames)).astype(np.int32)
    present = np.ones((batch, frames), bool)
    present[:, 0] = False
    return Actions({"move": jnp.asarray(value)}, {"move": jnp.asarray(present)})


def latents(batch: int, frames: int, seed: int = 0, tokens: int = 4, channels: int = 4) -> Array:
    """Clean tokens in (-1, 1)."""
    x = np.random.default_rng(seed).uniform(-1, 1, (batch, frames, tokens, channels))
    return jnp.asarray(x, jnp.float32)


@cache
def _pullback(f: Callable[..., Array]) -> Callable[..., Array]:
    # One output at a time: vmapped over all of them it compiles for much longer.
    return jax.jit(lambda weight, x, *rest: jax.vjp(lambda x: f(x, *rest), x)[1](weight)[0])


def dependencies(f: Callable[..., Array], x: Array, *rest: Any) -> np.ndarray:
    """Which outputs of f(x, *rest) depend on which inputs: gradients that are or are not exactly zero.

    x [..., D] and the output [..., E]: bool [outputs, inputs], both counted over the leading axes. An output is a
    random projection of its channels. The same function `f` compiles once.
    """
    shape = jax.eval_shape(f, x, *rest).shape
    mix = np.random.default_rng(0).standard_normal(shape[-1]).astype(np.float32)
    rows = []
    for index in np.ndindex(*shape[:-1]):
        weight = np.zeros(shape, np.float32)
        weight[index] = mix
        rows.append((np.asarray(_pullback(f)(weight, x, *rest)) != 0).any(-1).reshape(-1))
    return np.stack(rows)


def nonzero(tree: Any) -> bool:
    """Whether any leaf has an entry that is not exactly zero."""
    return any(bool(np.any(np.asarray(leaf) != 0)) for leaf in jax.tree.leaves(tree))
