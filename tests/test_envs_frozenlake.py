"""FrozenLake: its pictures show its states, and it is recorded as it plays."""

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from dreamer4_jax.config import UserError, preset
from dreamer4_jax.data.store import open_dataset
from dreamer4_jax.envs import collect, frozenlake, kinds

LEVEL = "FrozenLake-v1"


def config(**changes):
    return preset(
        "tiny",
        **{
            "env.kind": "frozenlake",
            "env.levels": LEVEL,
            "env.max_steps": 20,
            "actions": [{"name": "move", "kind": "categorical", "size": 4}],
            "agent.task_words": 2,
            "data": {"frames": 256, "chunk": 32, "chunks_per_shard": 4, "workers": 1, "bot": 0.0, "noisy_bot": 0.0},
            "train.tokenizer.length": 16,
            **changes,
        },
    )


def lake():
    return kinds.make(config().env, LEVEL, height=64, width=64, words=2)


def test_holes_look_alike_and_every_other_state_like_itself_alone():
    group = frozenlake.classes(LEVEL, 64, 64)
    holes = [5, 7, 11, 12]
    assert len(set(group[holes])) == 1 and len(set(group)) == 13
    others = [s for s in range(16) if s not in holes]
    assert len(set(group[others])) == 12
    decoder = kinds.decoder(config())
    np.testing.assert_array_equal(decoder.decode(frozenlake.pictures(LEVEL, 64, 64))[:, 0, 0], group)
    rng = np.random.default_rng(0)
    noisy = frozenlake.pictures(LEVEL, 64, 64) + rng.normal(0, 20, (16, 64, 64, 3))
    np.testing.assert_array_equal(decoder.decode(noisy.clip(0, 255).astype(np.uint8))[:, 0, 0], group)


def test_pictures_are_gymnasiums_averaged_down():
    env = frozenlake._lake(LEVEL, "rgb_array")
    env.reset(seed=0)
    env.s = 9
    large = env.render().astype(float)
    env.close()
    shown = frozenlake.pictures(LEVEL, 64, 64)[9]
    assert shown[10, 20].tolist() == np.round(large[40:44, 80:84].mean((0, 1))).astype(int).tolist()
    with pytest.raises(UserError, match="48 x 64"):
        frozenlake.pictures(LEVEL, 48, 64)


def test_it_passes_gymnasiums_check_and_steps_follow_the_table():
    env = lake()
    check_env(env, skip_render_check=True)
    table, counts = frozenlake.table(LEVEL), {}
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(3000):
        before, action = env.state, int(rng.integers(4))
        observation, reward, terminated, truncated, info = env.step(action)
        known = {to: (r, end) for _, to, r, end in table[before][action]}
        assert known[env.state] == (reward, terminated)
        np.testing.assert_array_equal(observation["image"], frozenlake.pictures(LEVEL, 64, 64)[env.state])
        counts.setdefault((before, action), []).append(env.state)
        assert ("success" in info) == (terminated or truncated)
        if terminated or truncated:
            assert info["success"] == (reward == 1)
            env.reset()
    # From the start, "left" stays with probability 2/3 and goes down with 1/3.
    stayed = np.mean(np.asarray(counts[0, 0]) == 0)
    assert abs(stayed - 2 / 3) < 4 * np.sqrt(2 / 9 / len(counts[0, 0]))


def test_episodes_end_after_the_limit():
    env = lake()
    env.reset(seed=0)
    for step in range(1, 21):
        env.unwrapped.s = 0  # never into a hole
        *_, terminated, truncated, info = env.step(3)
        assert not terminated and truncated == (step == 20)
    assert info["success"] is False


def test_random_play_is_recorded_and_the_expert_refused(tmp_path):
    manifest = collect.collect(config(), tmp_path / "lake", seed=3, progress=False)
    data = open_dataset(tmp_path / "lake", config())
    group, decoder = frozenlake.classes(LEVEL, 64, 64), kinds.decoder(config())
    chunk = data.chunk("train", 0)
    symbols = decoder.decode(chunk["frames"])[:, 0, 0]
    assert set(chunk["actions/move"]) == {0, 1, 2, 3} and set(symbols) <= set(group)
    assert (symbols[chunk["is_first"]] == 0).all()
    hole, goal = group[5], group[15]
    np.testing.assert_array_equal(chunk["is_terminal"], np.isin(symbols, [hole, goal]))
    np.testing.assert_array_equal(chunk["reward"], symbols == goal)
    assert manifest["statistics"]["all levels"]["aimless"]["episodes"] > 10
    with pytest.raises(UserError, match="no scripted expert for FrozenLake"):
        collect.check_config(config(**{"data.bot": 0.5}))
    with pytest.raises(UserError, match="FrozenLake takes one categorical component of size 4"):
        collect.check_config(config(actions=[{"name": "move", "kind": "categorical", "size": 7}]))
    with pytest.raises(UserError, match="FrozenLake-v2"):
        collect.check_config(config(**{"env.levels": "FrozenLake-v2"}))
