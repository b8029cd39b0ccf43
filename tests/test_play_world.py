"""The model behind the sessions: `Streams` as the engine uses it, the second opinion, and runs on disk."""

import jax
import numpy as np
import pytest

from dreamer4_jax import cli
from dreamer4_jax.agent.model import ActorCritic, Agent
from dreamer4_jax.config import UserError
from dreamer4_jax.play import command
from dreamer4_jax.play import protocol as p
from dreamer4_jax.play import world as play_world
from dreamer4_jax.play.catalogue import Start
from dreamer4_jax.play.view import Move
from dreamer4_jax.play.world import PlayWorld, compare_frames
from dreamer4_jax.world import Dynamics, Tokenizer
from dreamer4_jax.world import streams as world_streams
from dreamer4_jax.world.slots import Heads
from tests.play_fake import FakeSink
from tests.small import config, drawn

CONFIG = config()


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Compiled without optimisation: nothing here is about speed."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    with pytest.MonkeyPatch.context() as patch:
        for module, name, fixed in (
            (world_streams, "_join", {"donate_argnums": 1}),
            (world_streams, "_step", {"donate_argnums": 1}),
            (world_streams, "_leave", {"donate_argnums": 0}),
            (play_world, "_second", {}),
            (play_world, "_again", {}),
        ):
            plain = getattr(module, name).__wrapped__
            patch.setattr(module, name, jax.jit(plain, compiler_options=options, **fixed))
        yield


def make(heads: bool = True, value: bool = True, slots: int = 3) -> PlayWorld:
    tokenizer = drawn(lambda key: Tokenizer(CONFIG.tokenizer, key), 0)
    agent = drawn(lambda key: Agent(CONFIG, Dynamics(CONFIG, key), key), 1)
    critic = drawn(lambda key: ActorCritic(CONFIG, agent.policy, key), 2)
    parts = Heads(agent.reward, agent.cont, critic.policy, critic.value if value else None) if heads else None
    return PlayWorld(tokenizer, agent.dynamics, parts, slots=slots, context=3)


def start(seed: int, frames: int = 2) -> Start:
    rng = np.random.default_rng(seed)
    return Start(
        rng.integers(0, 256, (frames, 16, 16, 3), np.uint8),
        {"move": np.zeros(frames, np.int32)},
        {"move": np.arange(frames) > 0},
        np.array([1, 2], np.int32),
        "",
        "",
        seed,
    )


def move(action: int, steps: int = 2, doubt: bool = False, tolerance: float = np.inf) -> Move:
    return Move({"move": np.asarray(action, np.int32)}, steps, doubt, tolerance)


@pytest.fixture(scope="module")
def world():
    w = make()
    w.warm_up()
    return w


def programs() -> list[int]:
    return [f._cache_size() for f in (world_streams._join, world_streams._step, world_streams._leave)] + [
        f._cache_size() for f in (play_world._second, play_world._again)
    ]


def test_after_the_warm_up_nothing_is_compiled_whatever_is_played(world):
    before = programs()
    world.start(0, start(1, frames=1))
    world.start(2, start(2, frames=3))
    for i in range(4):
        world.step({0: move(i % 3, 1), 2: move(2, 8, doubt=True)} if i % 2 else {2: move(0, 4)})
    world.start(0, start(3, frames=5))  # more frames than there is context
    world.step({0: move(1, doubt=True)})
    views = world.step({0: move(1, 1, doubt=True, tolerance=0.0), 2: move(1, 4)})
    assert views[0].passes > CONFIG.dynamics.k_max and views[2].passes == 4  # adaptive beside fixed steps
    for slot in (0, 2):
        world.leave(slot)
    assert programs() == before


def test_a_view_holds_the_slot_s_own_numbers(world):
    world.start(0, start(1))
    alone = [world.step({0: move(a)})[0] for a in (0, 1)]
    world.start(1, start(2))
    world.start(0, start(1))
    views = [world.step({0: move(a), 1: move(2)}) for a in (0, 1)]
    for before, after in zip(alone, views, strict=True):
        np.testing.assert_array_equal(before.frame, after[0].frame)
        assert before.reward == after[0].reward and before.choice == after[0].choice
    assert not np.array_equal(views[1][0].frame, views[1][1].frame)
    view = views[1][0]
    assert view.frame.dtype == np.uint8 and view.frame.base is None
    assert view.plan["move"].shape == (CONFIG.agent.mtp + 1, 3)
    np.testing.assert_allclose(view.plan["move"].sum(-1), 1, rtol=1e-5)
    assert 0 <= int(view.choice["move"]) < 3 and 0 < view.cont < 1 and np.isfinite([view.reward, view.value]).all()
    for slot in (0, 1):
        world.leave(slot)


def test_doubt_looks_at_the_same_frame_twice_and_changes_nothing(world):
    def play(doubt):
        world.start(1, start(5))
        views = [world.step({1: move(a, doubt=doubt)})[1] for a in (0, 1, 2)]
        world.leave(1)
        return views

    plain, doubted = play(False), play(True)
    for a, b in zip(plain, doubted, strict=True):
        np.testing.assert_array_equal(a.frame, b.frame)
        assert a.other is None and a.again is None
        assert not np.array_equal(b.frame, b.other)  # another seed; these weights are noise themselves
        assert b.again.shape == b.frame.shape
    np.testing.assert_array_equal(doubted[2].other, play(True)[2].other)


def test_the_second_seed_takes_as_many_steps_as_the_first(world):
    """Refined to the end, an adaptive frame is that of k_max steps, and so is its second opinion."""

    def other(steps, tolerance=np.inf):
        world.start(1, start(5))
        view = world.step({1: move(0, steps, doubt=True, tolerance=tolerance)})[1]
        world.leave(1)
        return view.other.astype(int)

    finest = other(CONFIG.dynamics.k_max)
    np.testing.assert_allclose(other(1, tolerance=0.0), finest, atol=2)
    assert np.abs(other(1) - finest).max() > 10, "one step must not give the same"


def test_the_round_trip_is_the_tokenizer_s(world):
    tokenizer = world._models[0]
    frame = start(7).frames[-1]
    whole = tokenizer.decode(tokenizer.encode(frame[None, None]))[0, 0]
    again = np.asarray(play_world._again(tokenizer, np.stack([frame] * world.slots)))[0]
    np.testing.assert_allclose(again, np.round(255 * np.asarray(whole)), atol=1)


def test_a_world_model_without_an_agent_shows_frames_alone():
    w = make(heads=False)
    assert not w.has_policy
    view = w.start(0, start(1))
    assert view.reward is view.cont is view.value is view.plan is view.choice is None
    assert view.frame.shape == (16, 16, 3)


def test_an_agent_without_a_critic_has_no_value():
    assert make(value=False).start(0, start(1)).value is None


def test_frames_are_compared_by_symbols_and_by_pixels():
    from dreamer4_jax.config import preset
    from dreamer4_jax.envs.babyai import make as make_env

    cfg = preset("tiny")
    env = make_env(cfg.env, cfg.env.levels[0], height=64, width=64, words=cfg.agent.task_words)
    frame = env.reset(seed=0)[0]["image"]
    compare = compare_frames(cfg)
    assert compare(frame, frame) == {"psnr": 60.0, "right": 1.0, "wrong": []}
    dream = frame.copy()
    dream[8:16, 16:24] = 0  # black: padding
    apart = compare(dream, frame)
    assert apart["wrong"] == [10] and apart["right"] == round(63 / 64, 4) and apart["psnr"] < 45


# ---------------------------------------------------------------------------------------------------------------------
# From a run directory


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    pytest.importorskip("starlette", reason="the extra `play` is not installed")
    from tests.play_serving import tiny_run

    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny")


def test_an_engine_of_a_run_plays_recorded_and_fresh_episodes_beside_the_real_environment(run_dir):
    engine = command.make_engine(cli._reopen(str(run_dir)), slots=2)
    sink = FakeSink()
    session = engine.admit(sink)
    engine.receive()
    hello = sink.sent[0]
    assert hello["levels"] == ["BabyAI-GoToObj-v0", "BabyAI-GoToLocal-v0"] and hello["ladder"] == [1, 2, 4, 8, 0]
    number, length = max(enumerate(e["frames"] for e in hello["episodes"]), key=lambda x: x[1])
    for message in (p.StartRecorded(number, length - 2), p.Hold((1,)), p.Hold(())):
        engine.post(session, message)
    engine.receive()
    engine.tick()
    start, frame = sink.frames()[-2:]
    # Restored: the environment shows the recorded frame, which the untrained dream does not.
    assert start["real"] is not None and start["mission"].startswith("go to") and frame["action"] == "turn right"
    assert frame["doubt"]["seeds"] > 0 and len(frame["plan"]["move"]) == 3 and frame["ms"] > 0
    real = session._live.frame
    recorded = engine.catalogue.recorded(number, length - 2)[0].frames[-1]
    session._live.rewind(session._live.age - 1)
    np.testing.assert_array_equal(session._live.frame, recorded)
    assert real.shape == recorded.shape
    engine.leave(session)
    engine.receive()
    assert engine.admitted == 0


def test_a_run_without_its_recording_still_plays(run_dir, tmp_path, caplog):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("data"))
    engine = command.make_engine(cli._reopen(str(copy)), slots=1)
    assert engine.catalogue.episodes == [] and "no recorded episodes" in caplog.text
    sink = FakeSink()
    engine.admit(sink)
    engine.receive()
    assert sink.frames()[0]["real"] is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--slots", "0"], "--slots 0"),
        (["--host", "0.0.0.0"], "--remote"),
        (["--port", "99999"], "--port 99999"),
        ([], "is no run directory"),
    ],
)
def test_bad_arguments_end_with_one_line(tmp_path, capsys, arguments, words):
    pytest.importorskip("starlette", reason="the extra `play` is not installed")
    assert cli.main(["play", str(tmp_path), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_without_the_extra_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "starlette", None)
    for name in [m for m in sys.modules if m.startswith(("dreamer4_jax.play.server", "starlette."))]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["play", str(tmp_path)]) == 2
    assert "dreamer4_jax[play]" in capsys.readouterr().err


def test_an_unfinished_run_says_which_phase_is_missing(run_dir, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("data", "agent", "imagination", "dynamics"))
    with pytest.raises(UserError, match="dynamics"):
        command.make_engine(cli._reopen(str(copy)), slots=1)
