"""The loader: a pure function of the step, every window once an epoch, whatever the number of processes."""

import itertools

import numpy as np
import pytest

from dreamer4_jax.data.pipeline import Loader
from dreamer4_jax.data.schema import DataError, segments
from dreamer4_jax.data.store import open_dataset
from tests.toy_env import frame_action, frame_step, reward_of, write_toy_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "toy"
    write_toy_dataset(path, chunk=8, episodes=12)
    return open_dataset(path)


def equal(a, b):
    assert set(a) == set(b)
    for name in a:
        if isinstance(a[name], dict):
            equal(a[name], b[name])
        else:
            np.testing.assert_array_equal(a[name], b[name])


def test_batch_layout_and_alignment(data):
    loader = Loader(data, batch=6, length=10, seed=0)
    for step in range(5):
        b = loader.batch(step)
        assert b["frames"].shape == (6, 10, 16, 16, 3) and b["frames"].dtype == np.uint8
        assert b["actions"]["move"].shape == (6, 10) and b["present"]["move"].dtype == np.bool_
        assert b["task"].shape == (6, 10, 3) and b["relevant"].shape == b["id"].shape == (6,)
        # Peer mistakes 11 and 17: the action at index t is the one that led to frame t, the reward is its reward.
        shown, present = frame_action(b["frames"]), b["present"]["move"]
        np.testing.assert_array_equal(present, ~b["is_first"])
        np.testing.assert_array_equal(shown[present], b["actions"]["move"][present])
        assert (shown[~present] == -1).all()
        np.testing.assert_array_equal(b["reward"], np.vectorize(reward_of)(shown))
        # Within a segment steps count up by one.
        steps, parts = frame_step(b["frames"]), segments(b["is_first"])
        same = parts[:, 1:] == parts[:, :-1]
        np.testing.assert_array_equal((steps[:, 1:] - steps[:, :-1])[same], 1)
        assert (steps[:, 1:][~same] == 0).all()


@pytest.mark.parametrize("settings", [{}, {"long_length": 12, "relevant_fraction": 0.5}])
def test_resumes_by_step(data, settings):
    make = lambda: Loader(data, batch=4, length=6, seed=3, **settings)
    straight = list(itertools.islice(make().iterate(), 12))
    resumed = list(itertools.islice(make().iterate(5), 7))
    for step, batch in enumerate(straight):
        equal(batch, make().batch(step))
        if step >= 5:
            equal(batch, resumed[step - 5])
    other = Loader(data, batch=4, length=6, seed=4, **settings).batch(0)
    assert (other["id"] != straight[0]["id"]).any()


@pytest.mark.parametrize("batch", [4, 7])
def test_every_window_once_an_epoch(data, batch):
    length = 6
    loader = Loader(data, batch=batch, length=length, seed=0)
    starts, at = [], 0
    for frames in data.streams("train"):
        starts += range(at, at + frames - length + 1)
        at += frames
    n = len(starts)
    drawn = [start for step in range(2 * n // batch + 1) for start, _ in loader.rows(step)]
    assert sorted(drawn[:n]) == starts and sorted(drawn[n : 2 * n]) == starts
    assert drawn[:n] != drawn[n : 2 * n]


def test_processes_share_a_batch(data):
    settings = {"batch": 8, "length": 4, "seed": 1, "long_length": 8, "relevant_fraction": 0.5}
    whole = Loader(data, **settings)
    for count in (2, 4):
        parts = [Loader(data, **settings, process_index=i, process_count=count) for i in range(count)]
        for step in range(9):
            joined = [row for part in parts for row in part.rows(step)]
            assert joined == whole.rows(step)
    np.testing.assert_array_equal(parts[1].batch(0)["id"], whole.batch(0)["id"][2:4])
    with pytest.raises(DataError, match="8 rows .* does not divide over 3 processes"):
        Loader(data, batch=8, length=4, seed=1, process_count=3)


def test_ids_across_a_change_of_process_count(data):
    """Peer mistake 20: kill after 5 steps on one process, go on with two: none twice, none skipped."""
    before = [start for s in range(5) for start, _ in Loader(data, batch=4, length=4, seed=0).rows(s)]
    pair = [Loader(data, batch=4, length=4, seed=0, process_index=i, process_count=2) for i in range(2)]
    after = [start for s in range(5, 10) for loader in pair for start, _ in loader.rows(s)]
    straight = [start for s in range(10) for start, _ in Loader(data, batch=4, length=4, seed=0).rows(s)]
    assert before + after == straight and len(set(straight)) == 40


def test_relevant_rows_show_how_a_reward_was_earned(data):
    loader = Loader(data, batch=6, length=3, seed=0, relevant_fraction=0.5)
    count = 0
    for step in range(30):
        b = loader.batch(step)
        count += b["relevant"].sum()
        earned = (b["reward"] > 0) & ~b["is_first"]
        assert earned[b["relevant"], 1:].any(1).all()
        assert b["relevant"].sum() == 3
    # The uniform half is the same epoch of all windows as ever.
    plain = [s for step in range(30) for s, drawn in loader.rows(step) if not drawn]
    assert len(set(plain)) == len(plain) == 90 and count == 90
    all_relevant = Loader(data, batch=6, length=3, seed=0, relevant_fraction=1.0)
    starts = [s for step in range(40) for s, _ in all_relevant.rows(step)]
    n = len(all_relevant._short.pools[0].relevant)
    assert len(set(starts[:n])) == min(n, 240)


def test_alternating_lengths(data):
    loader = Loader(data, batch=6, length=4, seed=0, long_length=12, long_every=3)
    shapes = [loader.batch(s)["reward"].shape for s in range(6)]
    assert shapes == [(6, 4), (6, 4), (2, 12)] * 2
    assert Loader(data, batch=1, length=4, seed=0, long_length=12, long_every=1).batch(0)["reward"].shape == (1, 12)
    # The short and the long batches each go through all their windows.
    for length in (4, 12):
        n = sum(frames - length + 1 for frames in data.streams("train"))
        drawn = [s for step in range(150) if loader.length(step) == length for s, _ in loader.rows(step)]
        assert len(set(drawn[:n])) == n <= len(drawn)


def test_bad_settings_are_named(data):
    with pytest.raises(DataError, match="no stream has 1000 frames"):
        Loader(data, batch=2, length=1000, seed=0)
    with pytest.raises(DataError, match="relevant_fraction = 2"):
        Loader(data, batch=2, length=4, seed=0, relevant_fraction=2)
    with pytest.raises(DataError, match="no window of 1 frames earns a reward"):
        Loader(data, batch=2, length=1, seed=0, relevant_fraction=0.5)
