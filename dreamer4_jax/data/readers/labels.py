"""Per-frame labels beside a video: .jsonl, .csv or .npy, one row a frame, in the order of the frames.

Every column is an action component, save `RESERVED`:

- ``reward``, and ``task`` (a text);
- ``is_terminal``, ``terminated``, ``terminal`` or ``done``, the first of these that there is, or a ``discount`` of 0:
  the last row ended the episode. ``truncated`` marks no such end, also where ``done`` is true with it;
- ``frame``, ``frame_index`` and ``index``, which must rise by one a row, and ``is_first``, ``is_last`` and times, which
  are ignored.

Empty cells, null and NaN are missing actions.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dreamer4_jax.data.readers.actions import component_names
from dreamer4_jax.data.readers.base import reading
from dreamer4_jax.data.schema import DataError

SUFFIXES = (".jsonl", ".csv", ".npy")
NUMBERS = ("frame", "frame_index", "index")
IGNORED = ("t", "time", "timestamp", "step", "is_first", "is_last")
ENDS = ("is_terminal", "terminated", "terminal", "done")
RESERVED = ("reward", "task", *ENDS, "discount", "truncated", *NUMBERS, *IGNORED)

Row = dict[str, Any]


@dataclass(frozen=True)
class Labels:
    """Rows of one file."""

    rows: int
    columns: dict[str, np.ndarray]
    reward: np.ndarray | None = None
    tasks: tuple[str, ...] = ()  # one a row, or none
    is_terminal: bool = False
    file: str = field(default="", compare=False)


def find(videos: Iterable[Path]) -> dict[Path, list[Path]]:
    """The label files beside videos, by their path without its suffix, which may be written in capitals."""
    out: dict[Path, list[Path]] = {}
    for folder in sorted({video.parent for video in videos}):
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in SUFFIXES:
                out.setdefault(path.with_suffix(""), []).append(path)
    return out


def read(path: Path) -> Labels:
    """Reads a label file; `DataError` names it, and the row where there is one."""
    with reading(path.name):
        kind = path.suffix.lower()
        if kind == ".npy":
            values = np.load(path, allow_pickle=False)
            if values.ndim not in (1, 2):
                raise DataError(f"has shape {[*values.shape]}: expected [T] or [T, A]")
            return Labels(len(values), {"action": values}, file=path.name)
        lines, rows = [], []
        for line, row in _jsonl(path) if kind == ".jsonl" else _csv(path):
            lines.append(line)
            rows.append(row)
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = {n: [row.get(n) for row in rows] for n in names}
        for name in NUMBERS:
            _check_order(name, columns.get(name, []), lines)
        actions = [n for n in names if n not in RESERVED]
        return Labels(
            rows=len(rows),
            columns={c: _column(n, columns[n]) for n, c in zip(actions, component_names(actions), strict=True)},
            reward=_rewards(columns["reward"]) if "reward" in columns else None,
            tasks=tuple(str(t or "") for t in columns.get("task", ())),
            is_terminal=bool(rows) and _ended({n: values[-1] for n, values in columns.items()}),
            file=path.name,
        )


def _ended(last: Row) -> bool:
    """Whether a file's last row ended the episode."""
    name = next((n for n in ENDS if n in last), "")
    cut_off = name == "done" and last.get("truncated")  # what ends an episode in any way also counts as done
    return bool(name and last[name] and not cut_off) or last.get("discount") == 0


def _check_order(name: str, values: list[Any], lines: list[int]) -> None:
    """Frame numbers must be those of the rows, from any first one on; what holds anything else is no frame number."""
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and v == v // 1 for v in values):
        return
    for before, value, line in zip(values, values[1:], lines[1:], strict=False):
        if value != before + 1:
            raise DataError(
                f"line {line}: {name} = {value:.0f} follows {before:.0f}: rows are taken in order, one a frame, so it "
                "must rise by 1: sort the rows and fill the gaps (an empty cell is a missing action)"
            )


def _jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """(line, row) of each line that is not empty."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"line {number} is no JSON ({error})") from None
        row = row if isinstance(row, dict) else {"action": row}
        inner = row.pop("action", None) if isinstance(row.get("action"), dict) else None
        yield number, {**row, **(inner or {})}


def _csv(path: Path) -> Iterator[tuple[int, Row]]:
    """(line, row) of each line below the header. Spaces around names and values are none of theirs."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.reader(file, skipinitialspace=True)
        names = [name.strip() for name in next(table, [])]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise DataError(f"has several columns {twice[0]!r}: name each differently")
        for cells in table:
            number = table.line_num
            if not cells:
                continue
            if len(cells) != len(names):
                raise DataError(f"line {number} has another number of cells than the header")
            row: Row = {}
            for name, cell in zip(names, cells, strict=True):
                value = cell.strip() if name == "task" else _cell(cell, name, number)
                if parts := re.fullmatch(r"(.+?)(?:\.(\d+)|\[(\d+)\])", name):  # arm.0, arm.1, or arm[0], arm[1]
                    vector = row.setdefault(parts[1], [])
                    if int(parts[2] or parts[3]) != len(vector):
                        raise DataError(f"column {name!r}: expected {parts[1]}.{len(vector)} at this place")
                    vector.append(value)
                else:
                    row[name] = value
            yield number, {n: None if isinstance(v, list) and None in v else v for n, v in row.items()}


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
    """Values of one component, masked where there is none: a NaN among whole numbers makes no fractions of them."""
    there = [i for i, v in enumerate(values) if v is not None and not (isinstance(v, float) and np.isnan(v))]
    if not there:
        return np.ma.masked_all(len(values), np.int64)
    present = [values[i] for i in there]
    array = np.asarray(present)
    if array.dtype.kind not in "biuf":
        example = next((v for v in present if not isinstance(v, int | float) or abs(v) >= 2**63), present[0])
        raise DataError(f"{name!r} holds {example!r}: expected numbers, booleans, or lists of one length")
    out = np.ma.masked_all((len(values), *array.shape[1:]), array.dtype)
    out[there] = array
    return out
