"""What passes between world model, session and page: what a stream shows, its next move, frames of the past."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8

from dreamer4_jax.play.controls import Action


@dataclass(frozen=True)
class View:
    """What the model shows of one stream after a frame, in NumPy.

    Attributes:
      frame: the decoded frame.
      reward, cont, value: predicted with this frame; None where the run has no such head.
      plan: component -> probabilities of the actions at offsets n = 0 .. mtp (categorical), empty without a policy.
      choice: an action drawn from the policy for this state.
      other: the same frame from another noise seed, if it was asked for.
      again: the frame through the tokenizer and back, if doubt was asked for.
      passes: sampling steps that it took; None if it was not sampled.
    """

    frame: UInt8[np.ndarray, "H W 3"]
    reward: float | None = None
    cont: float | None = None
    value: float | None = None
    plan: Mapping[str, Float[np.ndarray, "M A"]] | None = None
    choice: Action | None = None
    other: UInt8[np.ndarray, "H W 3"] | None = None
    again: UInt8[np.ndarray, "H W 3"] | None = None
    passes: int | None = None


@dataclass(frozen=True)
class Move:
    """What one stream does next: its action, its K, whether the frame is sampled twice, and from which difference on
    steps are halved (`world.adaptive`)."""

    action: Action
    steps: int
    doubt: bool = False
    tolerance: float = math.inf


class Sink(Protocol):
    """Where a session's messages go. Both are called from the engine's thread, and return at once."""

    def send(self, payload: str | bytes) -> bool:
        """False if the client does not take what it was sent."""

    def close(self, reason: str) -> None: ...


@dataclass(frozen=True)
class Shot:
    """One frame of the past: what led to it, and what it showed."""

    action: Action | None
    frame: np.ndarray
    real_steps: int  # the real environment's age
    who: str


def number(x: float | None, digits: int = 4) -> float | None:
    """For JSON: rounded, and None where it is no number."""
    return None if x is None or not math.isfinite(x) else round(float(x), digits)


def tile_difference(a: np.ndarray, b: np.ndarray, tile: int) -> np.ndarray:
    """Mean absolute difference of two frames in each tile, in [0, 1]: [rows, columns]."""
    d = np.abs(a.astype(np.float32) - b.astype(np.float32)).mean(-1) / 255
    rows, columns = d.shape[0] // tile, d.shape[1] // tile
    return d[: rows * tile, : columns * tile].reshape(rows, tile, columns, tile).mean((1, 3))
