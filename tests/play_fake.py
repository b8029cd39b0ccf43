"""A world without a model for tests of the browser demo: its frames show the action that led to them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dreamer4_jax.play import protocol
from dreamer4_jax.play.catalogue import Catalogue, Start
from dreamer4_jax.play.controls import Controls, controls
from dreamer4_jax.play.engine import Engine
from dreamer4_jax.play.view import Move, View
from tests.toy_env import ACTIONS, ShowAction, toy_config

LEVEL = "toy"


class FakeWorld:
    """Imagines what `toy_env.ShowAction` shows; its policy always takes action 2 next."""

    def __init__(self, slots: int = 2, k_max: int = 8, has_policy: bool = True):
        self.slots, self.k_max, self.has_policy = slots, k_max, has_policy
        self.streams: dict[int, int] = {}  # slot -> frames since the start
        self.batches: list[dict[int, Move]] = []
        self.starts: list[tuple[int, Start]] = []

    def start(self, slot: int, start: Start) -> View:
        self.streams[slot] = int(start.frames[-1, 0, 0, 1])
        self.starts.append((slot, start))
        return self._view(start.frames[-1])

    def step(self, moves: Mapping[int, Move]) -> dict[int, View]:
        self.batches.append(dict(moves))
        out = {}
        for slot, move in moves.items():
            self.streams[slot] += 1
            frame = np.full((16, 16, 3), (40 * (int(move.action["move"]) + 1), self.streams[slot], 0), np.uint8)
            out[slot] = self._view(frame, move.doubt)
        return out

    def leave(self, slot: int) -> None:
        del self.streams[slot]

    def _view(self, frame: np.ndarray, doubt: bool = False) -> View:
        plan = np.zeros((2, ACTIONS), np.float32)
        plan[:, 2] = 1.0
        other = frame.copy()
        other[:8, :8] += 100  # the first tile differs
        return View(
            frame,
            reward=0.5,
            cont=0.9,
            value=float("nan"),
            plan={"move": plan} if self.has_policy else None,
            choice={"move": np.int32(2)} if self.has_policy else None,
            other=other if doubt else None,
            again=frame if doubt else None,
        )


class FakeSink:
    """Keeps what a session sends. `deaf`: takes nothing."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.parts: list[list[bytes]] = []
        self.closed: str | None = None
        self.deaf = False

    def send(self, payload: str | bytes) -> bool:
        if self.deaf:
            return False
        if isinstance(payload, str):
            self.sent.append(protocol.json.loads(payload))
        else:
            header, parts = protocol.unpack(payload)
            self.sent.append(header)
            self.parts.append(parts)
        return True

    def close(self, reason: str) -> None:
        if self.closed is None:
            self.closed = reason

    def frames(self) -> list[dict[str, Any]]:
        return [m for m in self.sent if m["t"] == "frame"]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def compare(dream: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    """Whether action and step are the same."""
    same = bool((dream[0, 0, :2] == real[0, 0, :2]).all())
    return {"psnr": 60.0 if same else 10.0, "right": float(same), "wrong": [] if same else [0]}


def make_engine(
    *,
    world: Any = None,
    dataset: Any = None,
    waiting: int = 1,
    live: bool = True,
    clock: Callable[[], float] | None = None,
) -> Engine:
    """An engine over the fake world and the toy environment."""
    config = toy_config(**{"env.levels": LEVEL})
    catalogue = Catalogue(config, dataset, (lambda level: ShowAction()) if live else None, context=4)
    about = {"title": "fake", "device": "none", "size": [16, 16], "tile": 8, "mtp": 1}
    return Engine(
        world or FakeWorld(),
        catalogue,
        toy_controls(),
        compare,
        about=about,
        waiting=waiting,
        **({} if clock is None else {"clock": clock}),
    )


def toy_controls() -> Controls:
    return controls(toy_config())
