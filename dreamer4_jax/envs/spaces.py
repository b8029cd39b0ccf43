"""Action components as gymnasium spaces, and actions in the two forms that they have.

Inside the package an action is a dictionary from component to array. An environment takes what its `action_space` says:
the value alone where there is one component (an int of a categorical one or a mouse), a dictionary of several. Real
environments and the world model's take the same.

Nothing here imports JAX.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from dreamer4_jax.config import ActionComponent, UserError
from dreamer4_jax.data.schema import action_array


def component_space(part: ActionComponent) -> gymnasium.Space:
    """The gymnasium space of one action component."""
    if part.kind in ("categorical", "mouse"):
        return gymnasium.spaces.Discrete(part.size)
    if part.kind == "binary":
        return gymnasium.spaces.MultiBinary(part.size)
    return gymnasium.spaces.Box(-1.0, 1.0, (part.size,), np.float32)


def action_space(components: Sequence[ActionComponent]) -> gymnasium.Space:
    """The space of actions: that of the only component, or a Dict of several."""
    spaces = {part.name: component_space(part) for part in components}
    return next(iter(spaces.values())) if len(spaces) == 1 else gymnasium.spaces.Dict(spaces)


def to_env(action: Mapping[str, np.ndarray], stream: int | None = None) -> Any:
    """An action by component, of one step or of a batch (or of one `stream` of it), as environments take it."""
    values = {name: np.asarray(v if stream is None else v[stream]) for name, v in action.items()}
    if len(values) > 1:
        return values
    only = next(iter(values.values()))
    return int(only) if only.ndim == 0 else only


def from_env(action: Any, components: Sequence[ActionComponent]) -> dict[str, np.ndarray]:
    """What an environment takes in one step, by component, in the types of `data.schema`."""
    given = {components[0].name: action} if len(components) == 1 else action
    out = {}
    for part in components:
        like = action_array(part, 1)[0]
        value = np.asarray(given[part.name])
        if value.shape != like.shape:
            raise UserError(
                f"action {part.name!r} has shape {[*value.shape]}: a {part.kind} component of size {part.size} takes "
                f"{[*like.shape]}"
            )
        out[part.name] = value.astype(like.dtype)
    return out


def clipped(action: Mapping[str, np.ndarray], components: Sequence[ActionComponent]) -> dict[str, np.ndarray]:
    """An action by component, its continuous values in [-1, 1]: a trained policy draws beyond."""
    return {p.name: np.clip(action[p.name], -1, 1) if p.kind == "continuous" else action[p.name] for p in components}


def nothing(components: Sequence[ActionComponent], batch: int) -> dict[str, np.ndarray]:
    """Zeros for `batch` actions: class 0, keys released, continuous values in the middle."""
    return {part.name: action_array(part, batch) for part in components}


def uniform(components: Sequence[ActionComponent], rng: np.random.Generator, batch: int) -> dict[str, np.ndarray]:
    """`batch` random actions: uniform classes and values in [-1, 1], keys pressed with probability one half."""
    out = {}
    for part in components:
        if part.kind in ("categorical", "mouse"):
            out[part.name] = rng.integers(0, part.size, batch, dtype=np.int32)
        elif part.kind == "binary":
            out[part.name] = rng.integers(0, 2, (batch, part.size), dtype=np.uint8)
        else:
            out[part.name] = rng.uniform(-1, 1, (batch, part.size)).astype(np.float32)
    return out


def describe(components: Sequence[ActionComponent]) -> str:
    """The components in words, for errors."""
    number = {1: "one", 2: "two", 3: "three"}.get(len(components), str(len(components)))
    if len(components) == 1:
        return f"{number} {components[0].kind} component of size {components[0].size}"
    parts = ", ".join(f"{part.name!r} ({part.kind}, size {part.size})" for part in components)
    return f"{number} components: {parts}"


def same(given: Sequence[ActionComponent], wanted: Sequence[ActionComponent]) -> bool:
    """Whether a config's components are an environment's; the name of a single one is free."""
    if len(given) == len(wanted) == 1:
        return (given[0].kind, given[0].size) == (wanted[0].kind, wanted[0].size)
    return {(p.name, p.kind, p.size) for p in given} == {(p.name, p.kind, p.size) for p in wanted}
