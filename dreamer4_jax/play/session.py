"""One person's session: controls, pace, the real environment beside the dream, what is shown and recorded."""

import json
import math
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamer4_jax.play import protocol
from dreamer4_jax.play.catalogue import LiveEnv, Start, encode_image
from dreamer4_jax.play.controls import Action
from dreamer4_jax.play.protocol import ProtocolError
from dreamer4_jax.play.recording import Film
from dreamer4_jax.play.view import Move, Shot, Sink, View, number, tile_difference

if TYPE_CHECKING:
    from dreamer4_jax.play.engine import Engine

IN_FLIGHT = 3  # frames that a page may leave unacknowledged
STALL = 20.0  # seconds without an acknowledgement after which a client is dropped
IDLE = 180.0  # seconds without a word of the person after which somebody who waits gets the place
FASTEST = 1 / 60  # seconds between two frames at least
TAPS = 4  # key presses that are kept while frames are made
FPS = 8.0
TOLERANCE = 0.1  # of adaptive sampling: RMS difference of the worst token between one step and two
DOUBTFUL = 0.06  # mean difference of a tile, in [0, 1], from which it is marked


class Session:
    """The state of one client. All methods run on the engine's thread."""

    def __init__(self, engine: "Engine", sink: Sink):
        self.engine, self.sink = engine, sink
        self.slot = -1
        self.over = self.lost = False
        self.running = self.policy = False
        self.doubt = True
        self.k = min(4, engine.world.k_max)
        self.fps = FPS
        self._held: tuple[int, ...] = ()
        self._repeats = False  # the keys have been held long enough to go on
        self._taps: deque[tuple[int, ...]] = deque(maxlen=TAPS)
        self._asked = 0  # single steps
        self._next = 0.0
        self._sent = self._acked = 0
        self._heard = self._touched = engine.clock()
        self._start: Start | None = None
        self._begin: protocol.StartFresh | protocol.StartRecorded | None = None
        self._live: LiveEnv | None = None
        self._shots: deque[Shot] = deque(maxlen=2 * engine.catalogue.context)
        self._view: View | None = None
        self._age = 0
        self._film: Film | None = None
        self._times: deque[float] = deque(maxlen=12)
        self._changed = False

    # -----------------------------------------------------------------------------------------------------------------
    # To the page

    def send(self, tree: dict[str, Any]) -> None:
        self.lost |= not self.sink.send(json.dumps(tree, allow_nan=False))

    def send_bytes(self, payload: bytes) -> None:
        self.lost |= not self.sink.send(payload)

    def note(self, text: str) -> None:
        """Something that the person should read."""
        self.send({"t": "note", "text": text})

    def greet(self) -> None:
        """The client has a slot: what the page needs to know, and a first dream."""
        e = self.engine
        self._touched = e.clock()
        ladder = [*(2**i for i in range(e.world.k_max.bit_length())), 0]  # 0: adaptive
        self.send(
            {
                "t": "hello",
                **e.about,
                **e.catalogue.to_json(),
                "controls": e.controls.to_json(),
                "ladder": ladder,
                "context": e.catalogue.context,
                "policy": e.world.has_policy,
                "state": self._state(),
            }
        )
        if e.catalogue.levels:
            self._open(
                protocol.StartFresh(self.slot % len(e.catalogue.levels), int(np.random.default_rng().integers(2**20)))
            )
        elif e.catalogue.episodes:
            self._open(protocol.StartRecorded(0, 0))

    def _state(self) -> dict[str, Any]:
        return {
            "running": self.running,
            "policy": self.policy,
            "k": self.k,
            "fps": self.fps,
            "doubt": self.doubt,
            "recording": self._film is not None,
            "rewindable": max(0, min(self.engine.catalogue.context, len(self._shots) - 1)),
        }

    def tell(self) -> None:
        """Tells the page of a change of state."""
        if self._changed and not self.over:
            self._changed = False
            self.send({"t": "state", **self._state()})

    # -----------------------------------------------------------------------------------------------------------------
    # From the page

    def handle(self, message: protocol.Message) -> None:
        """Acts on a message. `ProtocolError`: one that no page sends in this state."""
        p, now = protocol, self.engine.clock()
        if self.slot < 0:
            raise ProtocolError("a message before the greeting")
        if not isinstance(message, p.Ack):
            self._touched = now
        if not isinstance(message, p.Ack | p.Peek):
            self._changed = True
        match message:
            case p.Ack(n):
                if not self._acked <= n <= self._sent:
                    raise ProtocolError(f"frame {n} was never sent")
                self._acked, self._heard = n, now
            case p.Hold(keys):
                if any(k >= len(self.engine.controls.bindings) for k in keys):
                    raise ProtocolError(f"keys {keys}: there are {len(self.engine.controls.bindings)} bindings")
                if new := [k for k in keys if k not in self._held]:
                    self.policy = False  # a hand on the controls takes them back
                    self._taps.append((*(k for k in keys if k not in new), *new))
                    self._repeats = False
                self._held = keys
            case p.Repeat():
                self._repeats = True
            case p.StartFresh() | p.StartRecorded():
                self._open(message)
            case p.Reset():
                if self._begin is not None:
                    self._open(self._begin)
            case p.Run(on):
                self.running, self._next = on, now
            case p.Step():
                self._asked = min(TAPS, self._asked + 1)
            case p.Rewind(frames):
                self._rewind(frames)
            case p.Steps(k):
                if k > self.engine.world.k_max or k & (k - 1):
                    raise ProtocolError(f"K = {k}: must be 0 or a power of two up to {self.engine.world.k_max}")
                self.k = k
            case p.Rate(fps):
                self.fps, self._next = fps, now
            case p.Pilot(policy):
                self.policy = policy and self.engine.world.has_policy
                self._taps.clear()
            case p.Doubt(on):
                self.doubt = on
            case p.Record(on):
                self._record(on)
            case p.Peek(episode, frame):
                image = self.engine.catalogue.thumbnail(episode, frame)
                self.send_bytes(protocol.pack({"t": "peek", "episode": episode, "frame": frame}, [image]))

    def _open(self, begin: protocol.StartFresh | protocol.StartRecorded) -> None:
        """Begins a dream, beside its real environment if there is one."""
        live: LiveEnv | None
        match begin:
            case protocol.StartFresh(level, seed):
                start, live = self.engine.catalogue.fresh(level, seed)
            case protocol.StartRecorded(episode, frame):
                start, live = self.engine.catalogue.recorded(episode, frame)
        self._close_live()
        self._begin, self._start, self._live = begin, start, live
        self.running = False
        self._taps.clear()
        self._asked, self._age = 0, 0
        self._shots.clear()
        self._times.clear()
        for t, frame in enumerate(start.frames):
            led = {n: v[t] for n, v in start.actions.items()} if all(v[t] for v in start.present.values()) else None
            age = 0 if live is None else live.age - (len(start.frames) - 1 - t)
            self._shots.append(Shot(led, frame, age, "context"))
        self._show(self.engine.world.start(self.slot, start), None, "start", None)
        self._changed = True

    def _rewind(self, frames: int) -> None:
        """Back by up to `frames`: the stream begins again from the frames that it had shown until then."""
        count = min(frames, len(self._shots) - 1, self.engine.catalogue.context)
        if self._start is None or count < 1:
            return
        for _ in range(count):
            self._shots.pop()
        kept = list(self._shots)[-self.engine.catalogue.context :]
        none = {n: np.zeros_like(v[0]) for n, v in self._start.actions.items()}
        led = [none if s.action is None else s.action for s in kept]
        start = Start(
            np.stack([s.frame for s in kept]),
            {n: np.stack([a[n] for a in led]).astype(self._start.actions[n].dtype) for n in none},
            {n: np.asarray([s.action is not None for s in kept]) for n in none},
            self._start.task,
            self._start.title,
            self._start.mission,
            self._start.seed + self._sent,  # another future than before
        )
        if self._live is not None:
            self._live.rewind(kept[-1].real_steps)
        self.running, self._age = False, max(0, self._age - count)
        self._taps.clear()
        self._show(self.engine.world.start(self.slot, start), kept[-1].action, "rewind", None)

    def _record(self, on: bool) -> None:
        if on and self._film is None:
            self._film = Film(self._start.title if self._start else "", self.fps)
            self._filmed()
        elif not on and self._film is not None:
            film, self._film = self._film, None
            if len(film):
                self.engine.film(self, film)

    def finish(self) -> None:
        """Lets go of everything the session held."""
        self._close_live()
        self._film = None
        self._shots.clear()

    def _close_live(self) -> None:
        if self._live is not None:
            self._live.close()
            self._live = None

    # -----------------------------------------------------------------------------------------------------------------
    # Frames

    def stalled(self, now: float) -> bool:
        """Whether the page has left a frame unacknowledged for too long."""
        return self._acked < self._sent and now - self._heard > STALL

    def expected(self) -> bool:
        """Whether the page is about to ask for a frame: it has one that it has not acknowledged yet."""
        return not self.over and self._acked < self._sent

    def idle(self, now: float) -> bool:
        """Whether nobody seems to be there."""
        return now - self._touched > IDLE

    def due(self) -> float | None:
        """When the next frame is to be made; None while nothing asks for one, or the page is behind."""
        if self._start is None or self._sent - self._acked >= IN_FLIGHT:
            return None
        last = self._times[-1] if self._times else -math.inf
        if self._taps or self._asked:
            return last + FASTEST
        if self.running:
            return self._next
        if self._held and self._repeats and not self.policy:
            return last + 1 / self.fps
        return None

    def move(self) -> Move:
        """What the stream does next, taken from taps, keys or the policy."""
        if self.policy and self._view is not None and self._view.choice is not None:
            action = self._view.choice
        elif self._taps:
            action = self.engine.controls.compose(self._taps.popleft())
        else:
            action = self.engine.controls.compose(self._held)
        self._asked = max(0, self._asked - 1)
        now = self.engine.clock()
        # On the beat while the engine keeps up, without catching up on what was missed.
        self._next = max(self._next + 1 / self.fps, now)
        self._times.append(now)
        if self.k == 0:
            return Move(action, 1, self.doubt, TOLERANCE)
        return Move(action, self.k, self.doubt)

    def shown(self, view: View, move: Move, milliseconds: float) -> None:
        """A frame has been made: the real environment follows, and the page gets both."""
        if self._live is not None:
            self._live.step(move.action)
        self._age += 1
        who = "policy" if self.policy else "you"
        steps = 0 if self._live is None else self._live.age
        self._shots.append(Shot(move.action, view.frame, steps, who))
        self._show(view, move.action, who, milliseconds)

    def _show(self, view: View, action: Action | None, who: str, milliseconds: float | None) -> None:
        assert self._start is not None
        self._view = view
        e, live = self.engine, self._live
        parts = [encode_image(view.frame)]
        real: dict[str, Any] | None = None
        if live is not None:
            parts.append(encode_image(live.frame))
            real = {**e.compare(view.frame, live.frame), "reward": number(live.reward), "ended": live.ended}
        if self._acked == self._sent:
            self._heard = e.clock()
        self._sent += 1
        header = {
            "t": "frame",
            "n": self._sent,
            "age": self._age,
            "title": self._start.title,
            "mission": self._start.mission,
            "who": who,
            "action": None if action is None else e.controls.describe(action),
            "ms": number(milliseconds, 1),
            "passes": view.passes,
            "fps": number(self._rate(), 1),
            "reward": number(view.reward),
            "cont": number(view.cont),
            "value": number(view.value),
            "plan": None if view.plan is None else {n: np.round(p, 4).tolist() for n, p in view.plan.items()},
            "intent": None if view.choice is None else e.controls.describe(view.choice),
            "real": real,
            "doubt": self._doubt(view),
            "state": self._state(),
        }
        self._changed = False
        self.send_bytes(protocol.pack(header, parts))
        self._filmed()

    def _doubt(self, view: View) -> dict[str, Any] | None:
        """How far two noise seeds disagree, and what the tokenizer changes about the frame, tile by tile."""
        if view.other is None or view.again is None:
            return None
        tile = self.engine.about["tile"]
        seeds = tile_difference(view.frame, view.other, tile)
        again = tile_difference(view.frame, view.again, tile)
        return {
            "seeds": number(float(seeds.mean())),
            "residual": number(float(again.mean())),
            "tiles": np.flatnonzero(seeds.reshape(-1) > DOUBTFUL).tolist(),
        }

    def _rate(self) -> float | None:
        if len(self._times) < 2 or self._times[-1] == self._times[0]:
            return None
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])

    def _filmed(self) -> None:
        if self._film is None or self._view is None:
            return
        shot = self._shots[-1]
        words = "" if shot.action is None else f"{shot.who}: {self.engine.controls.describe(shot.action)}"
        self._film.add(self._view.frame, None if self._live is None else self._live.frame, words)
        if self._film.full:
            self._record(False)
            self.note("The film was full; it has been written.")
