"""Episodes and chunks: the alignment of frames, actions and rewards, to the index."""

import dataclasses

import numpy as np
import pytest

from dreamer4_jax.config import ActionComponent
from dreamer4_jax.data.schema import DataError, Episode, chunks, segments
from tests.toy_env import COMPONENT, END, frame_action, frame_step, reward_of, toy_episodes


def test_recorded_episode_is_aligned():
    seen = {True: 0, False: 0}
    for episode in toy_episodes(20):
        episode.validate((COMPONENT,))
        actions, present = episode.actions["move"], episode.present["move"]
        # Frame t shows the action that led to it, the reward at t is that action's: peer mistakes 11, 17, 18.
        np.testing.assert_array_equal(frame_action(episode.frames)[1:], actions[1:])
        np.testing.assert_array_equal(frame_step(episode.frames), np.arange(len(episode)))
        np.testing.assert_array_equal(episode.reward[1:], [reward_of(a) for a in actions[1:]])
        assert not present[0] and present[1:].all() and episode.reward[0] == 0
        assert episode.is_terminal == (actions[-1] == END and len(episode) > 1)
        assert episode.meta["steps"] == len(episode) - 1
        seen[episode.is_terminal] += 1
    assert seen[True] and seen[False]


@pytest.mark.parametrize("length", [4, 7, 32])
def test_chunks_hold_the_stream_in_order(length):
    episodes = toy_episodes(25)
    made = list(chunks(episodes, length))
    total = sum(map(len, episodes))
    assert len(made) == total // length
    joined = {k: np.concatenate([arrays[k] for arrays, _ in made]) for k in made[0][0]}
    kept = len(made) * length
    np.testing.assert_array_equal(joined["frames"], np.concatenate([e.frames for e in episodes])[:kept])
    np.testing.assert_array_equal(joined["actions/move"], np.concatenate([e.actions["move"] for e in episodes])[:kept])
    np.testing.assert_array_equal(joined["reward"], np.concatenate([e.reward for e in episodes])[:kept])
    starts = np.cumsum([0, *map(len, episodes)])
    first, last = np.zeros(total, bool), np.zeros(total, bool)
    first[starts[:-1]], last[starts[1:] - 1] = True, True
    terminal = last.copy()
    terminal[starts[1:] - 1] = [e.is_terminal for e in episodes]
    for name, want in (("is_first", first), ("is_last", last), ("is_terminal", terminal)):
        np.testing.assert_array_equal(joined[name], want[:kept])
    np.testing.assert_array_equal(joined["present/move"], ~first[:kept])
    for arrays, metas in made:
        # Each segment's place in its chunk, and in its episode.
        for meta in metas:
            assert arrays["is_first"][meta["start"]] == (meta["offset"] == 0)
            assert frame_step(arrays["frames"][meta["start"]]) == meta["offset"]
        assert sum(m["offset"] == 0 for m in metas) == arrays["is_first"].sum()


def test_segments():
    np.testing.assert_array_equal(segments(np.array([[0, 0, 1, 0, 1], [1, 0, 0, 0, 0]], bool)),
                                  [[0, 0, 1, 1, 2], [1, 1, 1, 1, 1]])  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": np.ones(4, np.float32)}, "0 with the first frame"),
        ({"reward": np.zeros(3, np.float32)}, r"reward is float32 \[3\]: expected float32 \[4\]"),
        ({"present": {"move": np.ones(4, bool)}}, r"present\['move'\]\[0\] is True.*index t \+ 1"),
        ({"actions": {"move": np.full(4, 5, np.int32)}}, r"holds 5 .. 5: must be in \[0, 5\)"),
        ({"actions": {"jump": np.zeros(4, np.int32)}}, r"components \['jump'\], the config has \['move'\]"),
        ({"frames": np.zeros((4, 8, 8, 3), np.float32)}, "frames is float32"),
    ],
)
def test_invalid_episodes_are_refused(change, message):
    good = Episode(
        np.zeros((4, 8, 8, 3), np.uint8),
        {"move": np.zeros(4, np.int32)},
        {"move": np.array([False, True, True, True])},
        np.zeros(4, np.float32),
        False,
        np.zeros(2, np.int32),
    )
    assert good.validate((COMPONENT,)) is good
    with pytest.raises(DataError, match=message):
        dataclasses.replace(good, **change).validate((COMPONENT,))


def test_other_action_kinds():
    parts = (ActionComponent("keys", "binary", 3), ActionComponent("camera", "mouse", 121),
             ActionComponent("arm", "continuous", 2))  # fmt: skip
    shown = np.array([False, True])
    episode = Episode(
        np.zeros((2, 8, 8, 3), np.uint8),
        {"keys": np.ones((2, 3), np.uint8), "camera": np.array([0, 120], np.int32), "arm": np.ones((2, 2), np.float32)},
        {part.name: shown for part in parts},
        np.zeros(2, np.float32),
        True,
        np.zeros(2, np.int32),
    )
    episode.validate(parts)
    (arrays, _), *rest = chunks([episode, episode], 3)
    assert not rest and arrays["actions/keys"].shape == (3, 3) and arrays["actions/arm"].shape == (3, 2)
