"""Continuous control from pixels: what an action does, what a return is, and that the experts deserve their name."""

import numpy as np
import pytest
from gymnasium.envs.classic_control.pendulum import PendulumEnv

from dreamer4_jax.config import EnvConfig, UserError, preset
from dreamer4_jax.envs import collect, control, kinds, spaces

PENDULUM = "Pendulum-v1"


def cfg(level=PENDULUM, **fields):
    return EnvConfig(kind="control", levels=(level,), max_steps=fields.pop("max_steps", 1000), **fields)


def make(level=PENDULUM, size=16, **fields):
    return kinds.make(cfg(level, **fields), level, height=size, width=size, words=2)


def play(env, act, seed=0):
    env.reset(seed=seed)
    total, taken, over = 0.0, None, False
    while not over:
        taken = act(taken)
        _, reward, terminated, truncated, info = env.step(taken)
        total, over = total + reward, terminated or truncated
    return total, info


def test_a_return_is_gymnasiums_own():
    """50 decisions of 4 steps with torques in [-1, 1] are 200 steps of Pendulum-v1 with the same torques in [-2, 2]."""
    env, own = make(), PendulumEnv()
    rng = np.random.default_rng(0)
    torques = rng.uniform(-1.5, 1.5, (50, 1)).astype(np.float32)  # some beyond the range: clipped
    own.reset(seed=3)
    wanted = sum(own.step(2.0 * np.clip(t, -1, 1))[1] for t in torques for _ in range(4))
    rest = iter(torques)
    total, info = play(env, lambda taken: next(rest), seed=3)
    assert total == pytest.approx(wanted, rel=1e-6) and "success" not in info
    assert next(rest, None) is None  # all were taken
    np.testing.assert_allclose(env.simulator.env.state, own.state, rtol=1e-6)


def test_a_picture_is_of_the_state_and_not_of_the_torque():
    env = make(size=64)
    first, _ = env.reset(seed=1)
    assert first["image"].shape == (64, 64, 3) and first["image"].dtype == np.uint8
    assert env.observation_space.contains(first) and first["task"].tolist() == [control.WORDS[PENDULUM], 0]
    sim = env.simulator
    for angle in (0.0, np.pi / 2, np.pi):
        sim.env.state = np.asarray([angle, 0.0])
        rows, columns = np.nonzero(sim.picture().min(-1) < 200)  # the rod on white
        height, side = 31.5 - rows.mean(), columns.mean() - 31.5
        np.testing.assert_allclose([height, side], [12.4 * np.cos(angle), -12.4 * np.sin(angle)], atol=2)
        assert 0 < rows.min() and rows.max() < 63 and 0 < columns.min() and columns.max() < 63, "all of it is seen"
    sim.env.state = np.asarray([1.0, 0.5])
    still = sim.picture()
    sim.env.last_u = 2.0
    np.testing.assert_array_equal(sim.picture(), still)


def test_episodes_follow_their_seed_and_limits():
    env = make(max_steps=3)
    frames = [env.reset(seed=s)[0]["image"] for s in (5, 6, 5)]
    assert (frames[0] == frames[2]).all() and (frames[0] != frames[1]).any()
    flags = [env.step(env.idle)[2:4] for _ in range(3)]
    assert flags == [(False, False), (False, False), (False, True)]
    assert env.action_space.contains(env.random_action(np.random.default_rng(0)))


def test_what_lies_beyond_the_range_is_clipped_before_the_simulator_sees_it(monkeypatch):
    env, seen = make(), []
    env.reset(seed=0)
    plain = env.simulator.step
    monkeypatch.setattr(
        env.simulator, "step", lambda action, last: seen.append(action["torque"]) or plain(action, last)
    )
    for torque in (3.0, -3.0, 0.5):
        env.step(np.asarray([torque], np.float32))
    np.testing.assert_array_equal(np.ravel(seen), np.repeat([1.0, -1.0, 0.5], env.simulator.repeat))


def test_closing_one_leaves_the_others_able_to_draw():
    one, other = make(), make()
    frame = other.reset(seed=0)[0]["image"]
    one.close()
    np.testing.assert_array_equal(other.simulator.picture(), frame)
    np.testing.assert_array_equal(make().reset(seed=0)[0]["image"], frame)


def test_aimless_play_holds_its_actions():
    env, rng = make(), np.random.default_rng(0)
    env.reset(seed=0)
    drawn = np.concatenate([env.random_action(rng) for _ in range(2000)])
    assert (drawn[1:] == drawn[:-1]).mean() == pytest.approx(1 - control.HOLD, abs=0.05)
    assert abs(drawn.mean()) < 0.15 and drawn.min() < -0.9 and drawn.max() > 0.9


def test_the_energy_controller_swings_up():
    env = make(size=16)
    env.simulator.picture = lambda: np.zeros((16, 16, 3), np.uint8)
    expert = [play(env, env.expert(np.random.default_rng(0)).act, seed=s)[0] for s in range(20)]
    aimless = [play(env, lambda _: env.random_action(np.random.default_rng(1)), seed=s)[0] for s in range(5)]
    assert np.mean(expert) > -250 and np.mean(aimless) < -800


def recording(**changes):
    return preset(
        "tiny",
        **{
            "env": {"kind": "control", "levels": [PENDULUM], "max_steps": 8},
            "actions": [{"name": "torque", "kind": "continuous", "size": 1}],
            "tokenizer.height": 16,
            "tokenizer.width": 16,
            "tokenizer.latents": 4,
            "agent.task_words": 1,
            "data.frames": 64,
            "data.chunk": 16,
            "data.workers": 1,
            "evaluate.frames": 4,
            **changes,
        },
    )


def test_recorded_actions_led_to_their_frames():
    stream = collect.episodes(recording(), 0, 0)
    for _ in range(3):
        episode = next(stream).validate(recording().actions)
        env = make(size=16)
        env.reset(seed=episode.meta["seed"])
        for t, torque in enumerate(episode.actions["torque"][1:], 1):
            seen, reward, *_ = env.step(torque)
            np.testing.assert_array_equal(seen["image"], episode.frames[t])
            assert episode.reward[t] == np.float32(reward)
        assert len(episode) == 9 and not episode.is_terminal and "success" not in episode.meta


def test_rewards_that_are_costs_make_every_window_relevant(tmp_path):
    from dreamer4_jax.data.store import open_dataset

    manifest = collect.collect(recording(), tmp_path / "data", seed=0, progress=False)
    total = manifest["statistics"]["all levels"]["all"]
    assert "success_rate" not in total and total["mean_return"] < 0
    data = open_dataset(tmp_path / "data", recording())
    for split in data.splits:
        first = np.concatenate([data.chunk(split, i)["is_first"] for i in range(data.chunks(split))])
        np.testing.assert_array_equal(data.rewarded(split), ~first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": [{"name": "move"}]}, "Continuous control takes one continuous component of size 1"),
        ({"env.levels": ["Pendulum-v9"]}, "unknown level 'Pendulum-v9'; choose of Pendulum-v1, CarRacing-v3"),
        ({"env.levels": [PENDULUM, "CarRacing-v3"]}, "Pendulum-v1 and CarRacing-v3 have different actions"),
        ({"agent.task_vocab": 3}, "agent.task_vocab = 3"),
    ],
)
def test_bad_config_is_refused_before_writing(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        collect.collect(recording(**changes), tmp_path / "data", seed=0, progress=False)
    assert not (tmp_path / "data").exists()


def test_a_race_is_driven_by_both_action_spaces():
    pytest.importorskip("Box2D")
    totals = {}
    for level in ("CarRacing-v3", "CarRacing-v3-keys"):
        parts = kinds.KINDS["control"].actions(cfg(level))
        env = make(level, size=32, max_steps=12)
        assert env.action_space == spaces.action_space(parts)
        totals[level], info = play(env, env.expert(np.random.default_rng(0)).act)
        assert info["success"] is False  # no lap in 12 decisions
        seen, _ = env.reset(seed=1)
        before = seen["image"]
        for _ in range(3):
            seen, *_ = env.step(env.expert(np.random.default_rng(0)).act(None))
        assert (seen["image"] != before).any() and env.observation_space.contains(seen)
        env.close()
    assert min(totals.values()) > 10  # tiles of the track were visited: idling gives -0.1 a step


def test_the_pedal_is_gas_above_zero_and_brake_below():
    pytest.importorskip("Box2D")
    env = make("CarRacing-v3", size=32)
    env.reset(seed=0)
    speed = lambda: float(np.linalg.norm(np.asarray(env.simulator.env.car.hull.linearVelocity)))
    for _ in range(3):
        env.step(np.asarray([0.0, 0.0], np.float32))
    idle = speed()
    for _ in range(6):
        env.step(np.asarray([0.0, 1.0], np.float32))
    fast = speed()
    for _ in range(6):
        env.step(np.asarray([0.0, -1.0], np.float32))
    assert idle < 1 < fast and speed() < 0.5 * fast
    env.close()


def orange(ball, x: float, z: float) -> np.ndarray:
    """Mean row and column of the cup's and the ball's pixels in a picture with the ball at (x, z)."""
    with ball.physics.reset_context():
        ball.physics.named.data.qpos[["ball_x", "ball_z"]] = x, z
    picture = ball.picture().astype(int)
    return np.argwhere(picture[..., 0] > picture[..., 2] + 20).mean(0)


def test_the_ball_is_caught_by_search():
    pytest.importorskip("dm_control")
    try:
        env = make("ball_in_cup-catch", size=32)
    except UserError as error:
        pytest.skip(f"nothing to draw with: {error}")
    drawn = env.simulator.picture()
    assert drawn.shape == (32, 32, 3)
    middle, right, up = (orange(env.simulator, *at) for at in ((0.0, 0.2), (0.3, 0.2), (0.0, 0.5)))
    assert right[1] > middle[1] + 2 and abs(right[0] - middle[0]) < 2
    assert up[0] < middle[0] - 2 and abs(up[1] - middle[1]) < 2
    env.reset(seed=0)
    env.simulator.picture = lambda: drawn
    total, info = play(env, env.expert(np.random.default_rng(0)).act)
    assert total > 100 and info["success"] is True
    total, info = play(env, lambda taken: env.idle)
    assert info["success"] is (total > 0)
    a, b = (play(env, lambda taken: np.asarray([1.0, -0.3], np.float32), seed=4)[0] for _ in range(2))
    assert a == b
    env.close()
