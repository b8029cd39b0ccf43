"""One thread that owns the device: the streams of all sessions in one batch, and each session's own state.

The web server only passes messages: `Engine.admit`, `post` and `leave` may be called from any thread, everything else
happens in the engine's. A session's frame is made when it is due (a key pressed, or the rate asks for it) and fewer
than `IN_FLIGHT` of its frames are unacknowledged, so a slow page slows itself and nobody else.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np

from dreamer4_jax.config import UserError
from dreamer4_jax.play import protocol
from dreamer4_jax.play.catalogue import Catalogue
from dreamer4_jax.play.controls import Controls
from dreamer4_jax.play.protocol import Message, ProtocolError
from dreamer4_jax.play.session import Session
from dreamer4_jax.play.view import Move, Sink, View

log = logging.getLogger("dreamer4.play")
WAITING = 8  # clients that may wait for a slot
INBOX = 4096  # messages of all clients together that may wait for the engine
TOGETHER = 0.004  # seconds: sessions due within this time share a batch
# A batch costs the same for one as for all. Those who got a frame together ask for the next within milliseconds of each
# other: the first waits for the others, for this share of what a batch takes and no longer than this many seconds.
GATHER_SHARE, GATHER = 0.1, 0.01


class World(Protocol):
    """Batched streams of a world model. Every call is on the engine's thread."""

    slots: int
    k_max: int
    has_policy: bool

    def start(self, slot: int, start: Any) -> View:
        """Begins a stream at context frames (`catalogue.Start`), whatever the slot held before."""

    def step(self, moves: Mapping[int, Move]) -> dict[int, View]:
        """The next frame of the given slots; the others are untouched."""

    def leave(self, slot: int) -> None:
        """Frees a slot."""


class Full(Exception):
    """No slot, and no place in the queue."""


class Engine:
    """The sessions and their world.

    Args:
      about: what the page says of the run; becomes part of the greeting.
      clock: seconds; tests give their own.
    """

    def __init__(
        self,
        world: World,
        catalogue: Catalogue,
        controls: Controls,
        compare: Callable[[np.ndarray, np.ndarray], dict[str, Any]],
        *,
        about: Mapping[str, Any],
        waiting: int = WAITING,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.world, self.catalogue, self.controls, self.compare = world, catalogue, controls, compare
        self.about, self.clock = about, clock
        self.frames = 0  # made since the start, of all sessions
        self.batches = 0
        self.error: BaseException | None = None
        self._capacity = world.slots + waiting
        self._admitted, self._lock = 0, threading.Lock()
        self._inbox: queue.Queue[tuple[Session, Message | str]] = queue.Queue()
        self._free = list(range(world.slots))
        self._waiting: deque[Session] = deque()
        self._sessions: dict[int, Session] = {}
        self._stop = threading.Event()
        self._gather: tuple[frozenset[Session], float, float] = (
            frozenset(),
            0.0,
            0.0,
        )  # last batch: who, till, seconds
        self._films = ThreadPoolExecutor(1, thread_name_prefix="film")  # encoding holds nobody up

    # -----------------------------------------------------------------------------------------------------------------
    # Called from any thread

    def admit(self, sink: Sink) -> Session:
        """A new session, which waits for a slot if none is free. Raises `Full` beyond the queue."""
        with self._lock:
            if self._admitted >= self._capacity or self._stop.is_set():
                raise Full
            self._admitted += 1
        session = Session(self, sink)
        self._inbox.put((session, "open"))
        return session

    def post(self, session: Session, message: Message) -> bool:
        """Hands over a message; False if too many wait already."""
        if self._inbox.qsize() >= INBOX:  # comings and goings always find a place
            return False
        self._inbox.put((session, message))
        return True

    def leave(self, session: Session) -> None:
        """The client is gone."""
        self._inbox.put((session, "leave"))

    @property
    def admitted(self) -> int:
        """Sessions that play or wait."""
        with self._lock:
            return self._admitted

    def stop(self) -> None:
        """Ends `run` after its current batch."""
        self._stop.set()

    # -----------------------------------------------------------------------------------------------------------------
    # The engine's thread

    def run(self) -> None:
        """Serves until `stop`. What goes wrong with the device ends every session, and is left in `error`."""
        wait = 0.0
        try:
            while not self._stop.is_set():
                self.receive(wait)
                wait = self.tick()
        except BaseException as error:
            self.error = error
            log.exception("the engine failed")
        finally:
            self._stop.set()
            for session in [*self._sessions.values(), *self._waiting]:
                session.sink.close("the server has stopped")
            self._films.shutdown(wait=False, cancel_futures=True)

    def receive(self, wait: float = 0.0) -> None:
        """Takes what has come in; waits up to `wait` seconds for the first message."""
        try:
            item = self._inbox.get(timeout=wait) if wait > 0 else self._inbox.get_nowait()
            while True:
                self._handle(*item)
                item = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def tick(self) -> float:
        """Makes the frames that are due; returns for how many seconds nothing is."""
        now = self.clock()
        for session in list(self._sessions.values()):
            if session.stalled(now):
                self._drop(session, "the page takes no frames")
            elif self._waiting and session.idle(now):
                self._drop(session, "nothing was done for a while, and somebody waits for the place")
        at = {session: session.due() for session in self._sessions.values()}
        ready = [s for s, when in at.items() if when is not None and when <= now + TOGETHER]
        if ready and (rest := self._others(ready, now)) > 0:
            return rest
        if ready:
            begun = time.perf_counter()
            moves = {s.slot: s.move() for s in ready}
            views = self.world.step(moves)
            spent = time.perf_counter() - begun
            self.frames += len(ready)
            self.batches += 1
            self._gather = (frozenset(ready), 0.0, spent)
            for s in ready:
                self._guard(s, partial(s.shown, views[s.slot], moves[s.slot], 1000 * spent))
        for session in list(self._sessions.values()):
            session.tell()
            if session.lost:
                self._drop(session, "the page takes no messages")
        upcoming = [when for s in self._sessions.values() if (when := s.due()) is not None]
        # Half a second at most: clients that stall are noticed, and `stop` is.
        return min(0.5, max(0.0, min(upcoming, default=now + 0.5) - self.clock()))

    def _others(self, ready: list[Session], now: float) -> float:
        """Seconds for which those who are ready wait for others of the last batch who are about to be."""
        batch, till, spent = self._gather
        if not any(s.expected() for s in batch if s not in ready):
            return 0.0
        if not till:
            till = now + min(GATHER, GATHER_SHARE * spent)
            self._gather = (batch, till, spent)
        return max(0.0, till - now)

    def _handle(self, session: Session, message: Message | str) -> None:
        if not isinstance(message, str):
            if not session.over:
                self._guard(session, partial(session.handle, message))
        elif message == "open":
            self._waiting.append(session)
            self._seat()
        else:
            self._drop(session, "")

    def _guard(self, session: Session, act: Callable[[], None]) -> None:
        """What goes wrong in one session ends that one alone."""
        try:
            act()
        except ProtocolError as error:
            self._drop(session, str(error))
        except UserError as error:  # a damaged record, say: the person can choose another
            session.note(str(error))
        except Exception:
            log.exception("a session failed")
            self._drop(session, "something went wrong in this session; the server's log says what")

    def _seat(self) -> None:
        """Gives free slots to those who wait, and tells the rest their place."""
        while self._free and self._waiting:
            session = self._waiting.popleft()
            session.slot = self._free.pop(0)
            self._sessions[session.slot] = session
            self._guard(session, session.greet)
        for place, session in enumerate(self._waiting, 1):
            session.send({"t": "waiting", "place": place})

    def _drop(self, session: Session, reason: str) -> None:
        if session.over:
            return
        session.over = True
        session.finish()
        session.sink.close(reason)
        with self._lock:
            self._admitted -= 1
        if session in self._waiting:
            self._waiting.remove(session)
        elif self._sessions.get(session.slot) is session:
            del self._sessions[session.slot]
            self.world.leave(session.slot)
            self._free.append(session.slot)
            self._seat()

    def film(self, session: Session, film: Any) -> None:
        """Encodes a recording beside the engine and sends it."""

        def encode() -> None:
            try:
                data = film.mp4()
            except Exception:
                log.exception("a film could not be written")
                session.send({"t": "note", "text": "The film could not be written; the server's log says why."})
                return
            session.send_bytes(protocol.pack({"t": "film", "frames": len(film)}, [data]))

        self._films.submit(encode)
