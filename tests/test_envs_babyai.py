"""The BabyAI adapter: gymnasium's checks, pixels bit-equal to minigrid's, tasks, time limit, bad input."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from dreamer4_jax.config import EnvConfig, UserError
from dreamer4_jax.envs import babyai

SIZE = {"height": 64, "width": 64, "words": 12}


def make(level: str = "BabyAI-GoToLocal-v0", **config) -> babyai.BabyAIEnv:
    return babyai.make(EnvConfig(**config), level, **SIZE)


@pytest.mark.parametrize("view", ["full", "agent"])
def test_gymnasium_checker(view):
    with warnings.catch_warnings():
        # The checker would rather be given the bare simulator; the adapter is what is meant.
        warnings.filterwarnings("ignore", message=".*different from the unwrapped version.*")
        check_env(make(view=view), skip_render_check=True)


@pytest.mark.parametrize("view", ["full", "agent"])
@pytest.mark.parametrize("level", ["BabyAI-PutNextLocal-v0", "BabyAI-GoToObjMazeS4R2-v0", "BabyAI-GoToLocalS5N2-v0"])
def test_frames_are_bit_equal_to_minigrid(level, view):
    env, rng = make(level, view=view), np.random.default_rng(0)
    for seed in range(4):
        observation, _ = env.reset(seed=seed)
        for _ in range(25):
            want = env.unwrapped.get_frame(highlight=False, tile_size=8, agent_pov=view == "agent")
            h, w = want.shape[:2]
            np.testing.assert_array_equal(observation["image"][:h, :w], want)
            assert not observation["image"][h:].any() and not observation["image"][:, w:].any()
            observation, _, terminated, truncated, _ = env.step(rng.integers(7))
            if terminated or truncated:
                break


def test_time_limit_and_reward_use_max_steps():
    env = make(max_steps=5)
    env.reset(seed=0)
    for _ in range(4):
        assert env.step(6)[2:4] == (False, False)  # "done" does nothing
    _, reward, terminated, truncated, info = env.step(6)
    assert truncated and not terminated and reward == 0 and info["success"] is False
    # Any success at step t pays 1 - 0.9 t / max_steps, with our max_steps.
    env, paid = make(max_steps=20), 0
    rng = np.random.default_rng(1)
    for seed in range(40):
        env.reset(seed=seed)
        for t in range(1, 21):
            _, reward, terminated, truncated, info = env.step(rng.integers(3))
            if terminated:
                assert reward == pytest.approx(1 - 0.9 * t / 20) and info["success"] is True
                paid += 1
            if terminated or truncated:
                break
    assert paid > 0


def test_reset_is_deterministic_and_silent(capsys):
    a, b = make("BabyAI-PutNextLocal-v0"), make("BabyAI-PutNextLocal-v0")
    b.reset(seed=99)  # what was played before does not matter
    for seed in range(10):
        (x, i), (y, j) = a.reset(seed=seed), b.reset(seed=seed)
        np.testing.assert_array_equal(x["image"], y["image"])
        np.testing.assert_array_equal(x["task"], y["task"])
        assert i["mission"] == j["mission"] == i["mission"].strip()
    assert capsys.readouterr().out == ""


def test_every_babyai_word_is_known():
    assert babyai.VOCABULARY <= 64 and len(set(babyai.WORDS)) == len(babyai.WORDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for level in ("BabyAI-BossLevel-v0", "BabyAI-GoToSeqS5R2-v0", "BabyAI-MiniBossLevel-v0", "BabyAI-PickupLoc-v0"):
            env = babyai.make(EnvConfig(), level, height=256, width=256, words=48)
            for seed in range(10):
                observation, info = env.reset(seed=seed)
                assert babyai.UNKNOWN not in observation["task"], info["mission"]
                assert babyai.decode_task(observation["task"]) == info["mission"].replace(",", "")


def test_encode_task():
    ids = babyai.encode_task("Go to the red, teapot", 6)
    assert ids.dtype == np.int32 and list(ids[4:]) == [babyai.UNKNOWN, babyai.PADDING]
    assert babyai.decode_task(ids) == "go to the red ?"
    with pytest.raises(UserError, match="5 words.*agent.task_words = 4.*at least 5"):
        babyai.encode_task("go to the red ball", 4)


def test_bad_input_is_named():
    with pytest.raises(UserError, match="unknown level 'BabyAI-GotoLocal'.*BabyAI-GoToLocal"):
        make("BabyAI-GotoLocal")
    with pytest.raises(UserError, match="BabyAI-Unlock-v0 renders 176 x 176.*env.tile = 8.*64 x 64.*at least 176"):
        make("BabyAI-Unlock-v0")
    with pytest.raises(UserError, match="env.max_steps = 0"):
        make(max_steps=0)


def test_observation_space_holds_every_observation():
    env = make()
    assert isinstance(env.action_space, gymnasium.spaces.Discrete) and env.action_space.n == 7
    observation, _ = env.reset(seed=3)
    assert env.observation_space.contains(observation)
