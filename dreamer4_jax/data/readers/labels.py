"""Per-frame labels beside a video: .jsonl, .csv or .npy, one row a frame.

Every column is an action component, save `RESERVED`: ``reward``, ``task`` (a text), ``done`` (the last row ended the
episode), and frame numbers and times, which are ignored. Empty cells, null and NaN are missing actions.
"""

import csv
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dreamer4_jax.data.readers.actions import component_name
from dreamer4_jax.data.readers.base import reading
from dreamer4_jax.data.schema import DataError

SUFFIXES = (".jsonl", ".csv", ".npy")
IGNORED = ("frame", "frame_index", "index", "t", "time", "timestamp", "step")
ENDS = ("done", "terminal", "terminated", "is_terminal")
RESERVED = ("reward", "task", *ENDS, *IGNORED)


@dataclass(frozen=True)
class Labels:
    """Rows of one file."""

    rows: int
    columns: dict[str, np.ndarray]
    reward: np.ndarray | None = None
    tasks: tuple[str, ...] = ()  # one a row, or none
    is_terminal: bool = False
    file: str = field(default="", compare=False)


def find(video: Path) -> Path | None:
    """The label file beside a video, of the same name."""
    found = [video.with_suffix(s) for s in SUFFIXES if video.with_suffix(s).exists()]
    if len(found) > 1:
        raise DataError(f"{video.name} has several label files: {', '.join(p.name for p in found)}; keep one")
    return found[0] if found else None


def read(path: Path) -> Labels:
    """Reads a label file; `DataError` names it, and the row where there is one."""
    with reading(path.name):
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
            if values.ndim not in (1, 2):
                raise DataError(f"has shape {[*values.shape]}: expected [T] or [T, A]")
            return Labels(len(values), {"action": values}, file=path.name)
        rows = _jsonl(path) if path.suffix == ".jsonl" else _csv(path)
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = {n: [row.get(n) for row in rows] for n in names}
        ends = next((columns[n] for n in ENDS if n in columns), [None])
        tasks = tuple(str(t or "") for t in columns.get("task", ()))
        return Labels(
            rows=len(rows),
            columns={component_name(n): _column(n, v) for n, v in columns.items() if n not in RESERVED},
            reward=_rewards(columns["reward"]) if "reward" in columns else None,
            tasks=tasks,
            is_terminal=bool(ends[-1]) if ends else False,
            file=path.name,
        )


def _jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"line {number} is no JSON ({error})") from None
        row = row if isinstance(row, dict) else {"action": row}
        inner = row.pop("action", None) if isinstance(row.get("action"), dict) else None
        rows.append({**row, **(inner or {})})
    return rows


def _csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    rows = []
    for number, cells in enumerate(table, 2):
        if None in cells or None in cells.values():
            raise DataError(f"line {number} has another number of cells than the header")
        row: dict[str, Any] = {}
        for name, cell in cells.items():
            value = cell if name == "task" else _cell(cell, name, number)
            if parts := re.fullmatch(r"(.+?)(?:\.(\d+)|\[(\d+)\])", name):  # arm.0, arm.1, or arm[0], arm[1]
                vector = row.setdefault(parts[1], [])
                if int(parts[2] or parts[3]) != len(vector):
                    raise DataError(f"column {name!r}: expected {parts[1]}.{len(vector)} at this place")
                vector.append(value)
            else:
                row[name] = value
        rows.append({n: None if isinstance(v, list) and None in v else v for n, v in row.items()})
    return rows


def _cell(text: str, name: str, line: int) -> Any:
    text = text.strip()
    if not text:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise DataError(f"line {line}: {name} = {text!r} is no number")


def _rewards(values: list[Any]) -> np.ndarray:
    return np.asarray([0.0 if v is None else float(v) for v in values], np.float32)


def _column(name: str, values: list[Any]) -> np.ndarray:
    """Values of one component, masked where there is none."""
    present = [v for v in values if v is not None]
    if not present:
        return np.ma.masked_all(len(values), np.int64)
    array = np.asarray(present)
    if array.dtype.kind not in "biuf":
        example = next(v for v in present if not isinstance(v, int | float | bool))
        raise DataError(f"{name!r} holds {example!r}: expected numbers, booleans, or lists of one length")
    out = np.ma.masked_all((len(values), *array.shape[1:]), array.dtype)
    out[[i for i, v in enumerate(values) if v is not None]] = array
    return out
