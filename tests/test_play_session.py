"""Sessions on the engine's thread: pace, back-pressure, time travel, pilots, films, and who disturbs whom."""

import math
import time
from typing import Any

import numpy as np
import pytest

from dreamer4_jax.data.store import open_dataset
from dreamer4_jax.play import protocol as p
from dreamer4_jax.play import recording
from dreamer4_jax.play.engine import GATHER, Engine, Full
from dreamer4_jax.play.session import IDLE, IN_FLIGHT, STALL, TOLERANCE, Session
from tests.play_fake import Clock, FakeSink, FakeWorld, make_engine
from tests.toy_env import frame_action, frame_step, write_toy_dataset


class Player:
    """A client that acknowledges every frame unless told otherwise."""

    def __init__(self, engine: Engine, clock: Clock):
        self.engine, self.clock, self.sink = engine, clock, FakeSink()
        self.session: Session = engine.admit(self.sink)
        self.acks = True
        self.round()

    def send(self, *messages: p.Message) -> None:
        for message in messages:
            assert self.engine.post(self.session, message)
        self.round()

    def round(self, seconds: float = 0.0) -> None:
        """Lets time pass in small steps, with the engine at work."""
        steps = max(1, round(seconds / 0.01))
        for _ in range(steps):
            self.clock.now += seconds / steps
            self.engine.receive()
            self.engine.tick()
            if self.acks and self.sink.frames() and self.sink.closed is None:
                self.engine.post(self.session, p.Ack(self.sink.frames()[-1]["n"]))
        self.engine.receive()

    @property
    def last(self) -> dict[str, Any]:
        return self.sink.frames()[-1]

    @property
    def age(self) -> int:
        return self.last["age"]

    def picture(self, part: int = 0) -> np.ndarray:
        import io

        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(self.sink.parts[-1][part])).convert("RGB"))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def engine(clock):
    return make_engine(clock=clock)


@pytest.fixture
def player(engine, clock):
    return Player(engine, clock)


def key(player: Player, label: str) -> int:
    return [b.label for b in player.engine.controls.bindings].index(label)


def tap(player: Player, label: str) -> None:
    player.send(p.Hold((key(player, label),)), p.Hold(()))


def test_a_session_begins_with_a_greeting_and_the_first_frame_of_a_fresh_episode(player):
    hello = player.sink.sent[0]
    assert hello["t"] == "hello" and hello["ladder"] == [1, 2, 4, 8, 0] and hello["policy"] is True
    assert player.age == 0 and player.last["real"] == {
        "psnr": 60.0,
        "right": 1.0,
        "wrong": [],
        "reward": 0.0,
        "ended": "",
    }


def test_a_tap_makes_one_frame_with_its_action_in_dream_and_reality(player):
    player.round(1.0)
    assert player.age == 0  # nothing is held, and it does not run
    tap(player, "move 3")
    player.round(1.0)
    assert player.age == 1 and player.last["action"] == "move 3" and player.last["who"] == "you"
    for part in (0, 1):
        assert frame_action(player.picture(part)) == 3 and frame_step(player.picture(part)) == 1
    assert player.last["real"]["right"] == 1.0


def test_taps_that_come_while_a_frame_is_made_are_not_lost_and_come_in_order(player):
    for label in ("move 1", "move 3", "move 0"):
        player.engine.post(player.session, p.Hold((key(player, label),)))
        player.engine.post(player.session, p.Hold(()))
    player.round(0.5)
    assert [f["action"] for f in player.sink.frames()[1:]] == ["move 1", "move 3", "move 0"]


def test_a_held_key_repeats_when_the_page_says_so_and_stops_when_it_is_let_go(player):
    player.send(p.Rate(10.0), p.Hold((key(player, "move 1"),)))
    player.round(5.0)  # its release may be on its way for long
    assert player.age == 1
    player.send(p.Repeat())
    player.round(1.0)
    assert 10 <= player.age <= 12
    player.send(p.Hold((key(player, "move 1"), key(player, "move 2"))))
    age = player.age
    player.round(1.0)
    assert player.age == age + 1  # another press is one frame again, until it is held for long
    player.send(p.Repeat(), p.Hold((key(player, "move 2"),)))
    player.round(1.0)
    assert player.age >= age + 10
    player.send(p.Hold(()), p.Repeat())
    age = player.age
    player.round(1.0)
    assert player.age == age
    tap(player, "move 3")
    player.round(1.0)
    assert player.age == age + 1


def test_running_keeps_the_rate_and_rests_on_the_idle_action(player):
    player.send(p.Rate(20.0), p.Run(True))
    player.round(2.0)
    assert (
        38 <= player.age <= 42
        and player.last["action"] == "move 0"
        and player.last["fps"] == pytest.approx(20, abs=1.5)
    )
    player.send(p.Run(False))
    age = player.age
    player.round(1.0)
    assert player.age == age and player.sink.sent[-1]["t"] == "state" and not player.sink.sent[-1]["running"]


def test_a_page_that_acknowledges_nothing_gets_a_few_frames_and_then_none(player):
    player.acks = False
    player.send(p.Rate(20.0), p.Run(True))
    player.round(5.0)
    assert player.age == IN_FLIGHT - 1 + (player.session._acked > 0)
    sent = len(player.sink.frames())
    player.send(p.Ack(player.last["n"]))
    player.acks = True
    player.round(1.0)
    assert len(player.sink.frames()) > sent + 10


def test_a_page_that_never_acknowledges_is_dropped_and_its_place_is_free(engine, clock):
    slow, quick = Player(engine, clock), Player(engine, clock)
    slow.acks = False
    slow.send(p.Rate(20.0), p.Run(True))
    quick.send(p.Rate(20.0), p.Run(True))
    quick.round(STALL + 2.0)
    assert slow.sink.closed == "the page takes no frames" and engine.admitted == 1
    assert quick.sink.closed is None and quick.age > 19 * STALL
    assert set(engine.world.streams) == {quick.session.slot}


def test_a_page_that_takes_no_messages_is_dropped(engine, clock):
    deaf, quick = Player(engine, clock), Player(engine, clock)
    deaf.sink.deaf = True
    deaf.send(p.Step())
    assert deaf.sink.closed == "the page takes no messages"
    quick.send(p.Step())
    assert quick.sink.closed is None and quick.age == 1


def test_sessions_that_are_due_together_share_a_batch(engine, clock):
    a, b = Player(engine, clock), Player(engine, clock)
    for player in (a, b):
        engine.post(player.session, p.Step())
    a.round()
    assert [sorted(batch) for batch in engine.world.batches] == [[0, 1]]


def test_one_waits_a_moment_for_those_who_got_their_last_frame_with_it(engine, clock):
    a, b = Player(engine, clock), Player(engine, clock)
    for player in (a, b):
        engine.post(player.session, p.Step())
    engine.receive()
    engine.tick()
    engine._gather = (engine._gather[0], 0.0, 1.0)  # as if that batch had taken a second
    clock.now += 1.0
    engine.post(a.session, p.Ack(a.last["n"]))
    engine.post(a.session, p.Step())
    engine.receive()
    assert 0 < engine.tick() < 1.01 * GATHER and engine.batches == 1  # b has not acknowledged: it may ask at once
    engine.post(b.session, p.Ack(b.last["n"]))
    engine.post(b.session, p.Step())
    engine.receive()
    engine.tick()
    assert [sorted(batch) for batch in engine.world.batches] == [[0, 1], [0, 1]]
    clock.now += 1.0
    engine.post(a.session, p.Step())
    engine.receive()
    engine.tick()
    clock.now += 2 * GATHER
    engine.tick()
    assert sorted(engine.world.batches[-1]) == [0]  # nobody waits longer


def test_each_session_has_its_own_k(engine, clock):
    a, b = Player(engine, clock), Player(engine, clock)
    a.send(p.Steps(8), p.Step())
    b.send(p.Steps(1), p.Step())
    a.send(p.Steps(0), p.Step())
    a.round(0.5)
    moves = [next(iter(batch.values())) for batch in engine.world.batches]
    assert [(m.steps, m.tolerance) for m in moves] == [(8, math.inf), (1, math.inf), (1, TOLERANCE)]
    assert a.last["state"]["k"] == 0
    a.send(p.Steps(3))
    assert "power of two" in a.sink.closed and b.sink.closed is None


def test_the_policy_plays_and_a_hand_on_the_keys_takes_the_controls_back(player):
    player.send(p.Pilot(True), p.Run(True))
    player.round(1.0)
    assert player.last["who"] == "policy" and player.last["action"] == "move 2" and player.last["state"]["policy"]
    player.send(p.Hold((key(player, "move 1"),)))
    player.round(0.5)
    assert not player.session.policy and player.last["who"] == "you" and player.last["action"] == "move 1"


def test_a_run_without_a_policy_cannot_be_handed_over(clock):
    player = Player(make_engine(world=FakeWorld(has_policy=False), clock=clock), clock)
    player.send(p.Pilot(True), p.Step())
    assert player.last["who"] == "you" and player.last["plan"] is None and player.last["intent"] is None


def test_rewinding_takes_dream_and_reality_back_together(player):
    for label in ("move 1", "move 2", "move 3", "move 1"):
        tap(player, label)
        player.round(0.1)
    player.send(p.Rewind(2))
    assert player.age == 2 and player.last["who"] == "rewind" and player.last["action"] == "move 2"
    assert frame_step(player.picture(0)) == frame_step(player.picture(1)) == 2
    assert frame_action(player.picture(1)) == 2
    start = player.engine.world.starts[-1][1]
    np.testing.assert_array_equal(frame_step(start.frames), [0, 1, 2])  # what the stream begins from again
    np.testing.assert_array_equal(start.actions["move"][1:], [1, 2])
    np.testing.assert_array_equal(start.present["move"], [False, True, True])
    tap(player, "move 0")
    player.round(0.1)
    assert player.age == 3 and player.last["real"]["right"] == 1.0


def test_rewinding_reaches_as_far_as_the_context_and_no_further(player):
    player.send(p.Rate(60.0), p.Run(True))
    player.round(0.3)
    player.send(p.Run(False))
    age = player.age
    assert age > 8
    player.send(p.Rewind(1000))
    assert player.age == age - player.engine.catalogue.context


def test_reset_begins_the_same_start_again(player):
    player.send(p.StartFresh(0, 77))
    tap(player, "move 1")
    player.round(0.2)
    player.send(p.Reset())
    assert player.age == 0 and player.last["title"] == "toy, seed 77"
    assert [s.seed for _, s in player.engine.world.starts[-2:]] == [77, 77]


def test_the_real_episode_ends_and_its_last_frame_stays(player):
    tap(player, "move 4")  # the toy's end
    player.round(0.2)
    assert player.last["real"]["ended"] == "solved"
    tap(player, "move 1")
    player.round(0.2)
    assert player.last["real"]["ended"] == "solved" and frame_action(player.picture(1)) == 4
    assert frame_action(player.picture(0)) == 1 and player.last["real"]["right"] == 0.0
    player.send(p.Rewind(2))
    assert player.last["real"]["ended"] == ""


def test_doubt_names_the_tiles_on_which_two_seeds_disagree(player):
    player.send(p.Step())
    assert (
        player.last["doubt"]["tiles"] == [0] and player.last["doubt"]["seeds"] > 0 == player.last["doubt"]["residual"]
    )
    player.send(p.Doubt(False), p.Step())
    player.round(0.1)
    assert player.last["doubt"] is None and not player.engine.world.batches[-1][0].doubt


def test_numbers_that_are_none_reach_the_page_as_null(player):
    player.send(p.Step())
    assert player.last["value"] is None and player.last["reward"] == 0.5  # the fake's value is NaN


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write_toy_dataset(directory)
    return open_dataset(directory)


def test_a_recorded_start_gives_the_frames_up_to_it(recorded, clock):
    engine = make_engine(dataset=recorded, clock=clock, live=False)
    player = Player(engine, clock)
    hello = player.sink.sent[0]
    assert (
        hello["levels"] == [] and len(hello["episodes"]) > 5 and hello["episodes"][0]["mission"] == "show your action"
    )
    number = next(i for i, e in enumerate(hello["episodes"]) if e["frames"] > 6)
    player.send(p.StartRecorded(number, 5))
    start = engine.world.starts[-1][1]
    np.testing.assert_array_equal(frame_step(start.frames), [2, 3, 4, 5])  # four frames of context
    np.testing.assert_array_equal(start.actions["move"], frame_action(start.frames))
    assert player.last["real"] is None and player.last["age"] == 0
    player.send(p.Peek(number, 3))
    assert player.sink.sent[-1]["t"] == "peek" and frame_step(player.picture()) == 3


@pytest.mark.parametrize(
    "message",
    [p.StartRecorded(9999, 0), p.StartRecorded(0, 9999), p.StartFresh(7, 0), p.Peek(9999, 0), p.Hold((99,)), p.Ack(77)],
)
def test_numbers_beyond_what_is_listed_end_the_session_that_sent_them_alone(recorded, clock, message):
    engine = make_engine(dataset=recorded, clock=clock)
    bad, good = Player(engine, clock), Player(engine, clock)
    bad.send(message)
    assert bad.sink.closed
    good.send(p.Step())
    assert good.sink.closed is None and good.age == 1 and engine.admitted == 1


def test_a_fault_in_one_session_leaves_the_others_alone(engine, clock, monkeypatch, caplog):
    bad, good = Player(engine, clock), Player(engine, clock)
    monkeypatch.setattr(bad.session._live, "step", lambda action: 1 / 0)
    for player in (bad, good):
        engine.post(player.session, p.Step())
    good.round()
    assert "went wrong" in bad.sink.closed and "ZeroDivisionError" in caplog.text
    assert good.age == 1 and good.sink.closed is None


def test_slots_are_given_in_turn_and_the_queue_is_bounded(engine, clock):
    first, second, third = (Player(engine, clock) for _ in range(3))
    assert third.sink.sent == [{"t": "waiting", "place": 1}]
    with pytest.raises(Full):
        engine.admit(FakeSink())
    third.engine.leave(first.session)
    third.round()
    assert third.sink.sent[1]["t"] == "hello" and third.session.slot == first.session.slot
    Player(engine, clock)  # again one place in the queue
    for player in (second, third):
        engine.leave(player.session)
        engine.leave(player.session)  # twice is once
    third.round()
    assert engine.admitted == 1 and len(engine.world.streams) == 1


def test_an_idle_place_goes_to_one_who_waits_and_is_kept_while_nobody_does(engine, clock):
    idle, busy = Player(engine, clock), Player(engine, clock)
    clock.now += 2 * IDLE
    busy.send(p.Step())
    assert idle.sink.closed is None
    third = Player(engine, clock)
    assert "somebody waits" in idle.sink.closed and busy.sink.closed is None
    third.round()
    assert third.sink.frames()


def test_a_message_of_one_who_waits_ends_the_wait(engine, clock):
    Player(engine, clock), Player(engine, clock)
    third = Player(engine, clock)
    third.send(p.Step())
    assert "before the greeting" in third.sink.closed and engine.admitted == 2


def test_a_recording_becomes_a_film_of_dream_and_reality(player):
    av = pytest.importorskip("av")
    import io

    player.send(p.Record(True))
    for label in ("move 1", "move 2", "move 3"):
        tap(player, label)
        player.round(0.2)
    assert player.last["state"]["recording"]
    player.send(p.Record(False))
    until = time.monotonic() + 30
    while player.sink.sent[-1]["t"] != "film" and time.monotonic() < until:
        time.sleep(0.01)
    assert player.sink.sent[-1]["frames"] == 4  # the frame at its beginning, and three
    with av.open(io.BytesIO(player.sink.parts[-1][0])) as film:
        pictures = [f.to_ndarray(format="rgb24") for f in film.decode(video=0)]
    assert len(pictures) == 4
    for picture, action in zip(pictures, (-1, 1, 2, 3), strict=True):
        height, width = picture.shape[0], picture.shape[1]
        for x in (width // 4, 3 * width // 4):  # the middles of both panels
            assert abs(int(picture[height // 2, x, 0]) - 40 * (action + 1)) < 12


def test_a_recording_that_is_full_is_written_by_itself(player, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.setattr(recording, "MAX_BYTES", 5 * 2 * 16 * 16 * 3)
    player.send(p.Record(True), p.Rate(60.0), p.Run(True))
    player.round(0.3)
    assert not player.last["state"]["recording"]
    assert any(m["t"] == "note" and "full" in m["text"] for m in player.sink.sent)


def test_the_engine_says_what_ended_it(clock):
    class Broken(FakeWorld):
        def step(self, moves):
            raise RuntimeError("the device is gone")

    engine = make_engine(world=Broken())
    sink = FakeSink()
    engine.post(engine.admit(sink), p.Step())
    engine.run()
    assert isinstance(engine.error, RuntimeError) and sink.closed == "the server has stopped"
    with pytest.raises(Full):
        engine.admit(FakeSink())
