"""Readers: each turns a format that people have into the one episode schema (see docs/data.md for every format).

A reader lists its episodes and reads them one by one; a bad one raises `DataError` with its name, and the converter
goes on with the next. Nothing foreign is ever unpickled.
"""

import difflib
import importlib
from pathlib import Path

from dreamer4_jax.data.readers.actions import ActionSpace, component_name
from dreamer4_jax.data.readers.base import Entry, Fit, Options, Part, Reader
from dreamer4_jax.data.schema import DataError

# In the order in which they are asked whether a source is theirs: those with a signature of their own come first.
FORMATS = ("gymnasium", "lerobot", "minari", "rlds", "vpt", "npz", "video")


def _reader(name: str) -> type[Reader]:
    return importlib.import_module(f"dreamer4_jax.data.readers.{name}").READER


def detect(source: str) -> str:
    """The format of a source: a folder, a file, or ``gym:ID`` for a gymnasium environment."""
    path = Path(source)
    if not source.startswith("gym:") and not path.exists():
        raise DataError(f"{source}: does not exist")
    for name in FORMATS:
        if _reader(name).claims(source):
            return name
    inside = f"; it holds {', '.join(sorted(p.name for p in path.iterdir())[:5])}" if path.is_dir() else ""
    empty = path.is_dir() and not any(path.iterdir())
    raise DataError(
        f"{source}: is empty" if empty else f"{source}: no format was recognised (known: {', '.join(FORMATS)}){inside}"
    )


def open_source(
    source: str | Path, format: str = "", options: Options | None = None, space: ActionSpace | None = None
) -> Reader:
    """Opens a source.

    Args:
        format: one of `FORMATS`; detected if empty.
        space: the action space found by an earlier call; without it the reader looks through all actions.
    """
    source = str(source)
    if format and format not in FORMATS:
        close = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(f"unknown format {format!r}; {hint}choose one of {', '.join(FORMATS)}")
    name = format or detect(source)
    return _reader(name)(source, options or Options(), space)


__all__ = [
    "FORMATS",
    "ActionSpace",
    "Entry",
    "Fit",
    "Options",
    "Part",
    "Reader",
    "component_name",
    "detect",
    "open_source",
]
