"""What the page and the server say to each other.

The page sends small JSON objects, one per message, of the kinds below and no other: every field is checked for type and
range before anything acts on it, and numbers alone name episodes, levels and keys. The server answers with JSON, and
with binary messages: the length of a JSON header (four bytes, big endian), the header, and the images it announces.
"""

import dataclasses
import json
import math
import struct
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

MAX_MESSAGE = 2048  # bytes of one message from the page
MAX_KEYS = 8  # bindings held down together
LARGEST = 2**31 - 1


class ProtocolError(Exception):
    """A message that no page sends. The connection is closed with this text."""


@dataclass(frozen=True)
class Range:
    """Inclusive bounds of a number."""

    low: float
    high: float


Index = Annotated[int, Range(0, LARGEST)]


@dataclass(frozen=True)
class StartRecorded:
    """Begin at a frame of a held-out episode, both by number."""

    episode: Index
    frame: Index


@dataclass(frozen=True)
class StartFresh:
    """Begin at the first frame of a new episode of the environment."""

    level: Index
    seed: Annotated[int, Range(0, 2**30 - 1)]


@dataclass(frozen=True)
class Reset:
    """Begin again where this stream began."""


@dataclass(frozen=True)
class Hold:
    """The bindings that are held down from now on; one that was not held before counts as a press."""

    keys: tuple[int, ...]


@dataclass(frozen=True)
class Repeat:
    """The last pressed binding has been down for long enough to go on: frames follow while any is held. The page says
    so, and not the clock of the server: on a slow line a short press would be taken for a long one."""


@dataclass(frozen=True)
class Run:
    """Frames follow each other at the chosen rate, or only when a key is pressed."""

    on: bool


@dataclass(frozen=True)
class Step:
    """One frame, with the keys held now or by the policy."""


@dataclass(frozen=True)
class Rewind:
    """Back by this many frames, as far as the context reaches."""

    frames: Annotated[int, Range(1, 10_000)]


@dataclass(frozen=True)
class Steps:
    """K, the sampling steps of a frame; 0: as many as each frame needs."""

    k: Annotated[int, Range(0, 4096)]


@dataclass(frozen=True)
class Rate:
    """Frames a second while running."""

    fps: Annotated[float, Range(0.5, 60.0)]


@dataclass(frozen=True)
class Pilot:
    """Who chooses the actions."""

    policy: bool


@dataclass(frozen=True)
class Doubt:
    """Whether every frame is sampled a second time, to see how far two noise seeds disagree."""

    on: bool


@dataclass(frozen=True)
class Record:
    """Begin a recording, or end it and send the film."""

    on: bool


@dataclass(frozen=True)
class Peek:
    """Send a small picture of a frame of a held-out episode."""

    episode: Index
    frame: Index


@dataclass(frozen=True)
class Ack:
    """Frame `n` has been drawn."""

    n: Index


Message = (
    StartRecorded
    | StartFresh
    | Reset
    | Hold
    | Repeat
    | Run
    | Step
    | Rewind
    | Steps
    | Rate
    | Pilot
    | Doubt
    | Record
    | Peek
    | Ack
)

KINDS: dict[str, type] = {
    "start_recorded": StartRecorded,
    "start_fresh": StartFresh,
    "reset": Reset,
    "hold": Hold,
    "repeat": Repeat,
    "run": Run,
    "step": Step,
    "rewind": Rewind,
    "steps": Steps,
    "rate": Rate,
    "pilot": Pilot,
    "doubt": Doubt,
    "record": Record,
    "peek": Peek,
    "ack": Ack,
}
_HINTS = {kind: typing.get_type_hints(kind, include_extras=True) for kind in KINDS.values()}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _field(name: str, value: Any, hint: Any) -> Any:
    """The value of one field, or `ProtocolError`."""
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise ProtocolError(f"{name} must be true or false")
    if hint == tuple[int, ...]:
        if not isinstance(value, list) or len(value) > MAX_KEYS or not all(_whole(v) and 0 <= v < 1024 for v in value):
            raise ProtocolError(f"{name} must be a list of at most {MAX_KEYS} numbers")
        return tuple(value)
    kind, bounds = typing.get_args(hint)
    number = _whole(value) or (kind is float and isinstance(value, float) and math.isfinite(value))
    if not number or not bounds.low <= value <= bounds.high:
        raise ProtocolError(f"{name} must be a number from {bounds.low} to {bounds.high}")
    return kind(value)


def parse(text: str) -> Message:
    """The message in `text`; anything else than exactly one of the kinds above is a `ProtocolError`."""
    if len(text) > MAX_MESSAGE:
        raise ProtocolError(f"a message of {len(text)} characters; {MAX_MESSAGE} are allowed")
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError("a message that is no JSON") from None
    if not isinstance(tree, dict):
        raise ProtocolError("a message that is no JSON object")
    name = tree.pop("t", None)
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ProtocolError("a message of an unknown kind")
    fields = [f.name for f in dataclasses.fields(kind)]
    if set(tree) != set(fields):
        raise ProtocolError(f"{name} must have the fields {fields}")
    return kind(**{f: _field(f"{name}.{f}", tree[f], _HINTS[kind][f]) for f in fields})


def pack(header: dict[str, Any], parts: Sequence[bytes] = ()) -> bytes:
    """A binary message; the page finds the parts by their lengths in ``header["parts"]``."""
    text = json.dumps({**header, "parts": [len(p) for p in parts]}, allow_nan=False, separators=(",", ":")).encode()
    return b"".join((struct.pack(">I", len(text)), text, *parts))


def unpack(message: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Header and parts of a binary message."""
    (length,) = struct.unpack_from(">I", message)
    header = json.loads(message[4 : 4 + length])
    parts, at = [], 4 + length
    for size in header["parts"]:
        parts.append(message[at : at + size])
        at += size
    return header, parts
