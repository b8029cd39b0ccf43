"""From recorded values to action components: what kind they are, and how they are stored.

Integers in one column are classes, booleans and tables of zeros and ones are keys, floating values are continuous and
are scaled to [-1, 1], as the policy's distributions want them. A NaN, or a masked integer, is a missing action. Where
the episodes of a source disagree on a column's width, most of them decide: the others fail when they are read.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dreamer4_jax.config import ActionComponent
from dreamer4_jax.data.schema import DataError, action_array

Columns = Mapping[str, np.ndarray]  # name -> [n] or [n, k], masked where missing
CLASSES = 100_000  # more than these are no choices, but times or ids
NO_ACTIONS = (ActionComponent("none", "categorical", 1),)  # a model needs a component; this one is never present


def component_name(text: str) -> str:
    """A name that is safe in a record's feature names."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", text).strip("_") or "action"


def component_names(texts: Iterable[str]) -> tuple[str, ...]:
    """`component_name` of each, which must differ."""
    taken: dict[str, str] = {}
    for text in texts:
        if (name := component_name(text)) in taken:
            raise DataError(
                f"actions {taken[name]!r} and {text!r} would both be called {name!r}: give them names that differ in "
                "Latin letters or digits"
            )
        taken[name] = text
    return tuple(taken)


@dataclass(frozen=True)
class ActionSpace:
    """Components, and the range of each continuous one that is mapped to [-1, 1]."""

    components: tuple[ActionComponent, ...] = NO_ACTIONS
    low: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    high: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def zeros(self, name: str, frames: int) -> np.ndarray:
        return action_array(next(c for c in self.components if c.name == name), frames)

    def to_json(self) -> dict[str, Any]:
        """The ranges, for the manifest: value = low + (stored + 1) / 2 * (high - low)."""
        return {name: {"low": list(self.low[name]), "high": list(self.high[name])} for name in self.low}

    def encode(self, columns: Columns) -> dict[str, tuple[np.ndarray | None, np.ndarray | None]]:
        """Recorded columns -> component -> (stored values, which rows are given); (None, None) without a column."""
        for name, column in columns.items():
            _unmask(name, column)  # one that no other episode has is of no component, but must not go unnoticed
        return {c.name: self._encode(c, columns.get(c.name)) for c in self.components}

    def _encode(self, c: ActionComponent, column: Any) -> tuple[np.ndarray | None, np.ndarray | None]:
        if column is None:
            return None, None
        values, given = _unmask(c.name, column)
        out = action_array(c, len(values))
        if c.kind in ("categorical", "mouse") and values.ndim == 2 and values.shape[1] == c.size > 1:
            if not _hot(values[given]):
                raise DataError(
                    f"action {c.name!r} has {c.size} values a row: {c.kind}({c.size}) takes one class a row, or rows "
                    "with a single 1 among zeros"
                )
            given = given & (values.max(1) > 0)  # a one-hot row of zeros stands in for no action
            values = values.argmax(1)
        values = values.reshape(values.shape[0], -1) if out.ndim == 2 else values
        if values.shape != out.shape:
            raise DataError(
                f"action {c.name!r} has shape {[*np.shape(column)]}: {c.kind}({c.size}) wants {[*out.shape]}"
            )
        values = np.where(given.reshape(-1, *(1,) * (values.ndim - 1)), values, 0)
        if c.kind == "continuous":
            low, high = (np.asarray(x[c.name], np.float64) for x in (self.low, self.high))
            given_rows = (2.0 * (values - low) / (high - low) - 1.0).clip(-1.0, 1.0)
            out[:] = np.where(given[:, None], given_rows, 0.0)
        else:
            top = 2 if c.kind == "binary" else c.size
            if (values != np.round(values)).any() or (len(values) and (values.min() < 0 or values.max() >= top)):
                raise DataError(
                    f"action {c.name!r} holds {values.min():g} .. {values.max():g}: {c.kind}({c.size}) takes whole "
                    f"numbers in [0, {top})"
                )
            out[:] = values
        return out, given


def _hot(values: np.ndarray) -> bool:
    """Whether every row of [n, k] has a single 1 among zeros, or none."""
    return bool(np.isin(values, (0, 1)).all() and (values.sum(1) <= 1).all())


def _unmask(name: str, column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Plain values, [T] where a row has one, and which rows have all of theirs."""
    mask = np.ma.getmaskarray(column) if isinstance(column, np.ma.MaskedArray) else np.zeros(np.shape(column), bool)
    values = np.asarray(np.ma.getdata(column))
    if values.dtype.kind not in "biuf" or values.ndim not in (1, 2):
        raise DataError(f"action {name!r} is {values.dtype} {[*values.shape]}: expected numbers [T] or [T, A]")
    if values.dtype.kind == "f":
        mask = mask | ~np.isfinite(values)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    return values, ~(np.any(mask, axis=1) if mask.ndim == 2 else np.asarray(mask))


def infer(tables: Iterable[Columns], *, given: tuple[ActionComponent, ...] = ()) -> ActionSpace:
    """The action space of a source, from the columns of all its episodes.

    Args:
        given: components that the user names; then only the ranges of continuous ones are looked for.

    Raises:
        DataError: what a column holds is no action; or no episode has a given component, but others that are not given.
    """
    widths: dict[str, dict[int, _Seen]] = {}
    for table in tables:
        for name, column in table.items():
            found = widths.setdefault(name, {})
            try:
                values, there = _unmask(name, column)
            except DataError:
                continue  # the episode fails again when it is read, and is counted there
            if there.any():
                width = values.shape[1] if values.ndim == 2 else 0
                found.setdefault(width, _Seen(width)).add(values[there])
    wanted = {c.name: c.size for c in given}
    for c in given:
        if c.name not in widths and widths.keys() - wanted:
            raise DataError(
                f"--actions {c.name}:{c.kind}:{c.size}: no episode has {c.name!r}; they have {', '.join(widths)}"
                + "".join(f"; did you mean {n!r}?" for n in difflib.get_close_matches(c.name, widths, n=1))
            )
    seen = {n: _common(found, wanted.get(n)) for n, found in widths.items() if found}
    components = given or tuple(s.component(name) for name, s in seen.items())
    low: dict[str, tuple[float, ...]] = {}
    high: dict[str, tuple[float, ...]] = {}
    for c in components:
        if c.kind == "continuous":
            most = seen.get(c.name)
            if most is not None and len(most.low) != c.size:
                raise DataError(f"action {c.name!r} has {len(most.low)} values, continuous({c.size}) was asked for")
            low[c.name], high[c.name] = most.range() if most else ((-1.0,) * c.size, (1.0,) * c.size)
    return ActionSpace(components or NO_ACTIONS, low, high)


def _common(found: "dict[int, _Seen]", asked: int | None) -> "_Seen":
    """Of the widths of one column the one that was asked for, else that of most episodes, of equals the first."""
    return next((s for s in found.values() if len(s.low) == asked), max(found.values(), key=lambda s: s.episodes))


class _Seen:
    """What the values of one column look like over all episodes in which it has this width."""

    def __init__(self, width: int) -> None:
        self.kinds: set[str] = set()
        self.low, self.high = np.full(max(1, width), np.inf), np.full(max(1, width), -np.inf)
        self.width = width  # 0: one dimension
        self.hot = width > 1  # every row has one 1 and is 0 elsewhere
        self.episodes = 0

    def add(self, values: np.ndarray) -> None:
        flat = values.reshape(len(values), -1).astype(np.float64)
        self.low, self.high = np.minimum(self.low, flat.min(0)), np.maximum(self.high, flat.max(0))
        self.kinds.add({"b": "bool", "f": "float"}.get(values.dtype.kind, "int"))
        self.hot = self.hot and _hot(flat) and bool(flat.any())
        self.episodes += 1

    def component(self, name: str) -> ActionComponent:
        if self.hot and "bool" not in self.kinds:
            return ActionComponent(name, "categorical", self.width)
        if self.kinds == {"bool"}:
            return ActionComponent(name, "binary", max(1, self.width))
        if "float" in self.kinds:
            return ActionComponent(name, "continuous", max(1, self.width))
        if self.width:
            if self.low.min() >= 0 and self.high.max() <= 1:
                return ActionComponent(name, "binary", self.width)
            raise DataError(
                f"action {name!r} has {self.width} whole numbers a row from {self.low.min():g} to {self.high.max():g}: "
                "is each a class of its own (make them columns), or continuous? Say so with --actions"
            )
        if self.low[0] < 0:
            raise DataError(f"action {name!r} holds {self.low[0]:g}: classes count from 0; say what it is (--actions)")
        if self.high[0] >= CLASSES:
            raise DataError(
                f"action {name!r} holds whole numbers up to {self.high[0]:.0f}: expected at most {CLASSES} classes. If "
                "it is a time or an id, leave it out or call it as one of those that are ignored (timestamp, step: "
                f"see docs/data.md); if it is an action, say of what kind, as --actions {name}:continuous:1"
            )
        return ActionComponent(name, "categorical", int(self.high[0]) + 1)

    def range(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per dimension [-1, 1] where the values lie within, else their own range."""
        inside = (self.low >= -1) & (self.high <= 1)
        low, high = np.where(inside, -1.0, self.low), np.where(inside, 1.0, self.high)
        return tuple(low.tolist()), tuple(np.where(high > low, high, low + np.maximum(1, np.abs(low))).tolist())


def parse_components(text: str) -> tuple[ActionComponent, ...]:
    """``move:categorical:7,keys:binary:4`` or JSON -> components."""
    if not text:
        return ()
    try:
        if text.lstrip().startswith("["):
            rows = [(r["name"], r["kind"], int(r["size"])) for r in json.loads(text)]
        else:
            rows = [(n, k, int(size)) for n, k, size in (item.split(":") for item in text.split(","))]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"--actions {text!r}: expected name:kind:size,... or JSON ({error})") from None
    kinds = ("categorical", "binary", "continuous", "mouse")
    for name, kind, size in rows:
        if kind not in kinds or size < 1 or component_name(name) != name:
            raise DataError(f"--actions {name}:{kind}:{size}: kind is one of {', '.join(kinds)}, size at least 1")
    return tuple(ActionComponent(*row) for row in rows)
