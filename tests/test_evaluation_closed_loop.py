"""Closed-loop evaluation on a fake environment whose success rates are known."""

import json

import gymnasium
import numpy as np
import pytest

from dreamer4_jax.config import ActionComponent, UserError
from dreamer4_jax.evaluation.blind import HISTORY, BlindPolicy, examples, train_blind
from dreamer4_jax.evaluation.closed_loop import (
    EvalResult,
    RandomPolicy,
    ScriptedPolicy,
    compare,
    episode_seed,
    evaluate_policy,
)

MOVE = (ActionComponent("move", "categorical", 4),)


class Lights(gymnasium.Env):
    """Shows a colour 0..3; success is to answer it, for `rounds` rounds in a row. One wrong answer ends the episode.

    A random policy succeeds with probability 4^-rounds, and rounds are 1 on level "easy" and 3 on "long".
    """

    seeds: list[tuple[str, int]] = []

    def __init__(self, level: str):
        self.level, self.rounds = level, {"easy": 1, "long": 3}[level]
        self.closed = False

    def _observe(self):
        self.colour = int(self.np_random.integers(4))
        image = np.full((8, 8, 3), self.colour, np.uint8)
        return {"image": image, "task": np.asarray([1, self.rounds, 0], np.int32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        Lights.seeds.append((self.level, seed))
        self.left, self.over = self.rounds, False
        return self._observe(), {"mission": self.level}

    def step(self, action):
        assert not self.over, "stepped after the end"
        right = action == self.colour
        self.left -= 1
        self.over = not right or self.left == 0
        info = {"mission": self.level}
        if self.over:
            info["success"] = bool(right)
        return self._observe(), float(right and self.left == 0), self.over, False, info

    def close(self):
        self.closed = True


class Oracle:
    """Reads the answer from the pixels; checks the protocol on the way."""

    name = "oracle"

    def __init__(self):
        self.started, self.calls = 0, 0

    def reset(self, starting):
        assert starting.dtype == bool and starting.any()
        self.started += int(starting.sum())

    def act(self, images, tasks):
        assert self.started and images.dtype == np.uint8 and tasks.dtype == np.int32 and len(images) == len(tasks)
        self.calls += 1
        return {"move": images[:, 0, 0, 0].astype(np.int32)}


def play(policy, episodes=60, envs=7, seed=3, **kwargs):
    Lights.seeds = []
    made = []

    def make_env(level):
        made.append(Lights(level))
        return made[-1]

    result = evaluate_policy(policy, make_env, ("easy", "long"), episodes=episodes, envs=envs, seed=seed, **kwargs)
    assert all(env.closed for env in made)
    return result


def test_oracle_finishes_every_episode_of_the_list():
    oracle, seen = Oracle(), []
    result = play(oracle, progress=lambda done, total: seen.append((done, total)))
    assert oracle.started == 60 and seen == [(i, 60) for i in range(1, 61)]
    assert result.success.all() and (result.returns == 1).all()
    assert result.levels == ("easy", "long") * 30
    np.testing.assert_array_equal(result.lengths, [1, 3] * 30)
    summary = result.summary()
    assert summary["success"] == {"mean": 1.0, "low": 1.0, "high": 1.0} and summary["levels"]["long"]["episodes"] == 30
    again = EvalResult.from_json(json.loads(json.dumps(result.to_json())))
    assert again.summary() == summary and json.dumps(summary)


def test_random_policy_succeeds_as_often_as_chance():
    result = play(RandomPolicy(MOVE, seed=1), episodes=800, envs=16)
    levels = result.summary()["levels"]
    assert levels["easy"]["success"]["low"] <= 0.25 <= levels["easy"]["success"]["high"]
    assert levels["long"]["success"]["mean"] < 0.06  # 1/64
    # every episode counts once although failures are shorter: no bias towards them
    assert levels["easy"]["episodes"] == levels["long"]["episodes"] == 400


def test_every_policy_sees_the_same_episodes():
    scripted = ScriptedPolicy(lambda env, seed: lambda: env.colour, MOVE, name="script")
    results, seeds = [], []
    for policy, envs in ((Oracle(), 7), (RandomPolicy(MOVE), 7), (Oracle(), 60), (scripted, 1)):
        results.append(play(policy, envs=envs))
        seeds.append(sorted(Lights.seeds))
    assert all(s == seeds[0] for s in seeds) and len(set(seeds[0])) == 60
    for r in results[1:]:
        np.testing.assert_array_equal(r.seeds, results[0].seeds)
    assert results[3].success.all()
    np.testing.assert_array_equal(results[0].lengths, results[2].lengths)
    difference = compare(results[0], results[1])
    assert difference["success"]["low"] > 0.5 and (difference["first"], difference["second"]) == ("oracle", "random")
    assert (play(Oracle(), seed=4).seeds != results[0].seeds).all()
    with pytest.raises(UserError, match="same episodes"):
        compare(results[0], play(Oracle(), seed=4))


def test_episode_seeds_are_stable_and_below_those_of_recordings():
    many = [episode_seed(s, i, level, use) for s in (0, 1) for i in range(500) for level in "ab" for use in (0, 1)]
    assert len(set(many)) == len(many) and max(many) < 2**30
    assert episode_seed(0, 5, "a") == episode_seed(0, 5, "a")


def test_bad_arguments():
    with pytest.raises(UserError, match="levels"):
        evaluate_policy(Oracle(), Lights, (), episodes=1, envs=1, seed=0)
    with pytest.raises(UserError, match="at least 1"):
        evaluate_policy(Oracle(), Lights, ("easy",), episodes=0, envs=1, seed=0)


def test_an_environment_need_not_say_what_success_is():
    class Silent(Lights):
        def step(self, action):
            observation, reward, terminated, truncated, info = super().step(action)
            return observation, reward, terminated, truncated, {"mission": info["mission"]}

    first, second = (
        evaluate_policy(policy, Silent, ("easy", "long"), episodes=8, envs=2, seed=0)
        for policy in (Oracle(), RandomPolicy(MOVE))
    )
    assert np.isnan(first.success).all() and first.summary()["success"] is None
    assert first.summary()["return"]["mean"] == 1.0 and first.summary()["levels"]["easy"]["success"] is None
    assert compare(first, second)["success"] is None and compare(first, second)["return"]["mean"] > 0
    again = EvalResult.from_json(json.loads(json.dumps(first.to_json())))
    assert np.isnan(again.success).all() and again.summary() == first.summary()


# ---------------------------------------------------------------------------------------------------------------------
# The blind policy


def batch(is_first, moves, relevant=None, task=None):
    """A loader batch of [B, T] flags and moves."""
    first, move = np.asarray(is_first, bool), np.asarray(moves, np.int32)
    b, t = first.shape
    return {
        "actions": {"move": move},
        "present": {"move": ~first},
        "is_first": first,
        "relevant": np.ones(b, bool) if relevant is None else np.asarray(relevant, bool),
        "task": np.ones((b, t, 3), np.int32) if task is None else task,
    }


def test_examples_by_hand():
    """Frames 0-2 end an episode begun before the window, 3-6 are an episode of their own."""
    data = examples(batch([[0, 0, 0, 1, 0, 0, 0]], [[3, 2, 1, 0, 1, 2, 3]]), MOVE, "all")
    # frames 0 and 1 lack history, frame 2's next frame is another episode's, frame 6 has none
    np.testing.assert_array_equal(data["target"][0], [1, 2, 3])
    np.testing.assert_array_equal(data["clock"], [0, 1, 2])
    none = MOVE[0].size
    np.testing.assert_array_equal(
        data["history"][0], [[none] * 4, [1, none, none, none], [2, 1, none, none]]
    )  # newest first; the class after the last stands for no action
    late = examples(batch([[0, 0, 0, 0, 0, 0]], [[0, 1, 2, 3, 0, 1]]), MOVE, "all")
    np.testing.assert_array_equal(late["history"][0], [[3, 2, 1, 0], [0, 3, 2, 1]])  # HISTORY frames are visible
    np.testing.assert_array_equal(late["target"][0], [0, 1])
    assert HISTORY == 4
    only = examples(batch([[1, 0], [1, 0]], [[0, 1], [0, 2]], relevant=[False, True]), MOVE, "relevant")
    np.testing.assert_array_equal(only["target"][0], [2])


def test_blind_policy_learns_what_needs_no_eyes():
    """Task word 1 asks for the sequence 0 1 2 3 0 .., word 2 for 3 2 1 0 3 ..: clock and task decide."""
    t = 9
    first = np.zeros((8, t), bool)
    first[:, 0] = True
    task = np.zeros((8, t, 2), np.int32)
    task[:4, :, 0], task[4:, :, 0] = 1, 2
    moves = np.zeros((8, t), np.int32)
    moves[:4, 1:], moves[4:, 1:] = np.arange(t - 1) % 4, 3 - np.arange(t - 1) % 4
    model = train_blind([batch(first, moves, task=task)], MOVE, vocab=5, steps=300, batch=64)
    assert model.loss < 0.05 and model.clock_seen == t - 2
    policy = BlindPolicy(model, greedy=True)
    policy.reset(np.array([True, True]))
    out = []
    for i in range(6):
        if i == 4:
            policy.reset(np.array([False, True]))  # the second stream starts afresh
        out.append(policy.act(np.zeros((2, 8, 8, 3), np.uint8), np.array([[1, 0], [2, 0]], np.int32))["move"])
    np.testing.assert_array_equal(np.stack(out, 1), [[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]])
    sampled = BlindPolicy(model, seed=1)
    sampled.reset(np.array([True]))
    for _ in range(2 * t):  # beyond the last step of the training
        action = sampled.act(np.zeros((1, 8, 8, 3), np.uint8), np.array([[1, 0]], np.int32))["move"]
        assert 0 <= action[0] < 4


def test_blind_policy_is_blind():
    """On the lights it can do no better than chance."""
    moves = np.random.default_rng(0).integers(0, 4, (64, 4))
    first = np.tile(np.array([1, 0, 0, 0], bool), (64, 1))
    model = train_blind([batch(first, moves)], MOVE, vocab=5, steps=100)
    result = play(BlindPolicy(model), episodes=400, envs=50).summary()["levels"]["easy"]["success"]
    assert result["mean"] < 0.4


def test_blind_training_refuses_what_it_cannot_use():
    first, moves = [[1, 0, 0]], [[0, 1, 1]]
    with pytest.raises(UserError, match="no usable decision"):
        train_blind([batch(first, moves, relevant=[False])], MOVE, vocab=5)
    with pytest.raises(UserError, match="task_vocab = 1"):
        train_blind([batch(first, moves)], MOVE, vocab=1)


def test_blind_policy_of_several_kinds_learns_what_the_clock_tells():
    """Keys and a continuous value that are functions of the step number alone, beside a class."""
    parts = (*MOVE, ActionComponent("keys", "binary", 2), ActionComponent("arm", "continuous", 1))
    rows, t = 8, 7
    step = np.broadcast_to(np.arange(t), (rows, t))
    first = step == 0
    data = batch(first, step % 4)
    data["actions"] |= {
        "keys": np.stack([step % 2, 1 - step % 2], -1).astype(np.uint8),
        "arm": (step[..., None] / 6 - 0.5).astype(np.float32),
    }
    data["present"] |= {"keys": ~first, "arm": ~first}
    found = examples(data, parts, "all")
    none = found["history"][2][found["clock"] == 0]
    assert (none[..., :-1] == 0).all() and (none[..., -1] == 1).all()  # a start remembers nothing
    newest = found["history"][2][found["clock"] == 3][:, 0]
    np.testing.assert_allclose(newest, [[0.0, 0.0]] * rows, atol=1e-6)  # step 3's value, and that there was one
    model = train_blind([data], parts, vocab=5, steps=400, batch=48)
    policy = BlindPolicy(model, greedy=True)
    policy.reset(np.array([True]))
    for i in range(t - 1):
        action = policy.act(np.zeros((1, 8, 8, 3), np.uint8), np.ones((1, 3), np.int32))
        assert action["move"][0] == (i + 1) % 4 and action["keys"][0].tolist() == [(i + 1) % 2, i % 2]
        assert action["arm"].dtype == np.float32 and abs(action["arm"][0, 0] - ((i + 1) / 6 - 0.5)) < 0.1
    sampled = BlindPolicy(model, seed=1)
    sampled.reset(np.ones(400, bool))
    drawn = sampled.act(np.zeros((400, 8, 8, 3), np.uint8), np.ones((400, 3), np.int32))["arm"]
    assert 0.02 < drawn.std() < 0.2  # the floor of the deviation is 0.05
