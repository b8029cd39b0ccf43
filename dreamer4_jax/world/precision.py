"""Models made ready for inference: matrices in the compute dtype, cast once instead of in every pass."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from dreamer4_jax.config import ConfigError, override
from dreamer4_jax.world.dynamics import Dynamics
from dreamer4_jax.world.tokenizer import Tokenizer

Model = TypeVar("Model", Dynamics, Tokenizer)
DTYPES = ("float32", "bfloat16")
# Parameters of a transformer's layers that are cast to the compute dtype wherever they are used.
_MATRICES = {"qkv", "o", "gate", "up", "down"}


def _matrix(path: Any) -> bool:
    names = set(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))
    return "periods" in names and bool(names & _MATRICES)


def in_dtype(model: Model, dtype: str) -> Model:
    """The same weights in a model that computes in `dtype`, "float32" or "bfloat16"."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")
    key = jax.eval_shape(lambda: jax.random.key(0))
    if isinstance(model, Dynamics):
        cfg = override(model.cfg, {"dynamics.transformer.dtype": dtype})
        like: Any = jax.eval_shape(lambda k: Dynamics(cfg, k), key)
    else:
        halves = {name: dataclasses.replace(getattr(model.cfg, name), dtype=dtype) for name in ("encoder", "decoder")}
        cfg_t = dataclasses.replace(model.cfg, **halves)
        like = jax.eval_shape(lambda k: Tokenizer(cfg_t, k), key)
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(model))


def cast_once(model: Model, dtype: str | None = None) -> Model:
    """`model` with the matrices of its layers in the dtype that they are multiplied in (`dtype` if given).

    Gives exactly the numbers that the model gives that casts in every pass; norms, embeddings and outputs, which
    compute in float32, keep their float32 parameters.
    """
    if dtype is not None:
        model = in_dtype(model, dtype)

    def stack(transformer: Any) -> Any:
        to = jnp.dtype(transformer.cfg.dtype)
        return jax.tree_util.tree_map_with_path(lambda p, x: x.astype(to) if _matrix(p) else x, transformer)

    if isinstance(model, Dynamics):
        return _with(model, transformer=stack(model.transformer))
    return _with(model, encoder=stack(model.encoder), decoder=stack(model.decoder))


def _with(model: Model, **parts: Any) -> Model:
    """A copy of a module with some of its parts replaced; the model itself is left as it is."""
    copy = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))
    for name, part in parts.items():
        setattr(copy, name, part)
    return copy
