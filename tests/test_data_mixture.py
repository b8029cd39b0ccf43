"""Several datasets in one pipeline: whose turn it is, exact shares, each dataset's windows once an epoch."""

from collections import Counter

import grain
import numpy as np
import pytest

from dreamer4_jax.config import ConfigError, override
from dreamer4_jax.data.convert import convert
from dreamer4_jax.data.mixture import mix
from dreamer4_jax.data.pipeline import Blend, Loader
from dreamer4_jax.data.schema import DataError
from dreamer4_jax.data.source import adopt
from dreamer4_jax.data.store import open_dataset
from dreamer4_jax.runner import Run
from dreamer4_jax.world.tokenizer import Tokenizer
from tests import small
from tests.test_runner import FLAT
from tests.toy_env import toy_config, write_toy_dataset


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two datasets, of 2 and 1 training shards."""
    out = []
    for name, shards, episodes in (("a", 2, 12), ("b", 1, 8)):
        path = tmp_path_factory.mktemp(name) / name
        write_toy_dataset(path, chunk=8, episodes=episodes, shards=shards)
        out.append(open_dataset(path))
    return out


@pytest.mark.parametrize(
    ("weights", "counts"), [((1, 1), (1, 1)), ((0.7, 0.3), (7, 3)), ((1, 2, 5), (1250, 2500, 6250))]
)
def test_every_block_has_each_part_s_share(weights, counts):
    blend, size = Blend(weights, seed=0), sum(counts)
    rows = [blend(n) for n in range(3 * size)]
    for block in range(3):
        shares = Counter(part for part, _ in rows[block * size : (block + 1) * size])
        assert tuple(shares[p] for p in range(len(counts))) == counts
    for part in range(len(counts)):
        assert [k for p, k in rows if p == part] == list(range(3 * counts[part]))
    if size > 2:
        assert rows[:size] != [(p, k - counts[p]) for p, k in rows[size : 2 * size]], "no block is like another"
    assert rows != [Blend(weights, seed=1)(n) for n in range(3 * size)]
    assert blend(10**9)[1] > 0  # any row at once


def test_a_mixture_holds_its_parts_one_after_another(pair):
    both = mix(pair, (3, 1))
    for split in ("train", "holdout"):
        assert both.streams(split) == [n for d in pair for n in d.streams(split)]
        np.testing.assert_array_equal(both.rewarded(split), np.concatenate([d.rewarded(split) for d in pair]))
        at = pair[0].frames(split)
        ours, theirs = both.window(split, at, 16), pair[1].window(split, 0, 16)
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])
        assert [e.start for e in both.episodes(split)] == [
            e.start + before for d, before in zip(pair, (0, at), strict=True) for e in d.episodes(split)
        ]


def test_a_weighted_loader_draws_exact_shares_and_each_part_by_epochs(pair):
    both, length = mix(pair, (3, 1)), 6
    loader = Loader(both, batch=8, length=length, seed=0)
    border = pair[0].frames("train")
    drawn = []
    for step in range(200):
        rows = [start for start, _ in loader.rows(step)]
        assert sum(start >= border for start in rows) == 2  # of 8 rows, two blocks of four
        drawn += rows
    for data, own in zip(
        pair, ([s for s in drawn if s < border], [s - border for s in drawn if s >= border]), strict=True
    ):
        starts, at = [], 0
        for frames in data.streams("train"):
            starts += range(at, at + frames - length + 1)
            at += frames
        n = len(starts)
        assert len(own) > n and sorted(own[:n]) == starts, "every window of a part once in an epoch of its own"


def test_a_mixture_resumes_and_divides_over_processes(pair):
    settings = {"batch": 8, "length": 4, "seed": 1, "long_length": 8, "relevant_fraction": 0.5}
    both = mix(pair, (2, 3))
    whole = Loader(both, **settings)
    rows = [whole.rows(step) for step in range(12)]
    assert [Loader(both, **settings).rows(step) for step in reversed(range(12))] == rows[::-1]
    parts = [Loader(both, **settings, process_index=i, process_count=2) for i in range(2)]
    assert [[row for p in parts for row in p.rows(step)] for step in range(12)] == rows
    border = pair[0].frames("train")
    relevant = [start for r in rows for start, drawn in r if drawn]
    assert abs(sum(start >= border for start in relevant) - 0.6 * len(relevant)) <= 3


def test_without_weights_every_window_comes_once_an_epoch(pair):
    both = mix(pair)
    n = sum(frames - 5 for frames in both.streams("train"))
    drawn = [start for step in range(n // 4 + 1) for start, _ in Loader(both, batch=4, length=6, seed=0).rows(step)]
    assert len(set(drawn[:n])) == n


def test_one_dataset_is_read_in_the_order_it_always_was(pair):
    """Runs that were begun before there were mixtures go on exactly."""
    data, length = pair[0], 6
    starts, at = [], 0
    for frames in data.streams("train"):
        starts += range(at, at + frames - length + 1)
        at += frames
    order = grain.MapDataset.range(len(starts)).seed(5).shuffle().repeat()
    drawn = [s for step in range(30) for s, _ in Loader(data, batch=4, length=length, seed=5).rows(step)]
    assert drawn == [starts[int(order[k])] for k in range(120)]


def test_threads_change_nothing(pair):
    one, three = (Loader(pair[0], batch=4, length=6, seed=0, threads=n).iterate(2) for n in (1, 3))
    for _, a, b in zip(range(20), one, three, strict=False):
        np.testing.assert_array_equal(a["id"], b["id"])
        np.testing.assert_array_equal(a["frames"], b["frames"])


def test_what_cannot_be_mixed_is_named(pair, tmp_path):
    write_toy_dataset(tmp_path / "other", chunk=16)
    with pytest.raises(DataError, match="cannot be mixed: chunk is 8 and 16; convert them"):
        mix([pair[0], open_dataset(tmp_path / "other")])
    with pytest.raises(DataError, match="expected one above 0 for each"):
        mix(pair, (1, 0))
    named = [type(d)(d.directory, {**d.manifest, "tasks": [t]}) for d, t in zip(pair, "xy", strict=True)]
    with pytest.raises(DataError, match="would mean two things"):
        mix(named)
    for weights in ("1", "1,2,3", "1,-1"):
        with pytest.raises(ConfigError, match="data.weights = .* must be 2 numbers above 0"):
            override(toy_config(), {"data.also": "b", "data.weights": weights})
    with pytest.raises(DataError, match="data.also: .*nothing is no dataset"):
        adopt(toy_config(**{"data.also": [str(tmp_path / "nothing")]}))


def test_a_run_mixes_frames_and_their_tokens(pair, tmp_path):
    config = adopt(
        toy_config(
            **{
                "data.source": str(pair[0].directory),
                "data.also": [str(pair[1].directory)],
                "data.weights": "1,3",
                "data.labelled": 0.5,
                "data.chunk": 24,  # of windows; datasets keep their own
                "tokenizer.encoder": FLAT,
                "tokenizer.decoder": FLAT,
                "tokenizer.channels": 2,
                "tokenizer.pack": 1,
            }
        )
    )
    run = Run(config, tmp_path / "run", progress=False)
    run._models["tokenizer"] = small.drawn(lambda key: Tokenizer(config.tokenizer, key))
    frames, tokens = run.collect(), run.tokens()
    assert frames.frames("train") == tokens.frames("train") == sum(d.frames("train") for d in pair)
    assert frames.parts("train") == tokens.parts("train") == [(1.0, 2), (3.0, 1)]
    at = pair[0].frames("train") + 3
    np.testing.assert_array_equal(
        tokens.window("train", at, 5)["actions/move"], pair[1].window("train", 3, 5)["actions/move"]
    )
    assert (run.dir / "data" / "tokens-1" / "dataset.json").exists()
    half = frames.frames("train") // 2
    assert any(f"50 % of the training frames ({half} of {2 * half})" in note for note in run._notes())
    for share, reason in ((0.5, ""), (0.0, "data.labelled = 0: no actions are known")):
        fields = {"data.labelled": share, "evaluate.clips": 1, "evaluate.context": 1, "evaluate.frames": 1}
        other = override(config, fields)
        assert Run(other, tmp_path / f"run-{share}", progress=False).obstacle() == reason


def arm_dataset(tmp_path, name, top, like=None):
    """Four episodes whose continuous action goes to `top`, and holds 1.5 at every second step."""
    (tmp_path / name).mkdir()
    arm = np.where(np.arange(20) % 2, 1.5, top).astype(np.float32)
    arm[3] = -top
    for i in range(4):
        np.savez(tmp_path / name / f"{i}.npz", frames=np.zeros((20, 16, 16, 3), np.uint8), **{"actions/arm": arm})
    quick = {"size": (16, 16), "chunk": 8, "workers": 1, "progress": False}
    convert(tmp_path / name, tmp_path / f"{name}-data", like=like, **quick)
    return open_dataset(tmp_path / f"{name}-data")


def test_the_same_action_has_the_same_code_in_all_of_a_mixture(tmp_path):
    near, far = arm_dataset(tmp_path, "near", 2.0), arm_dataset(tmp_path, "far", 8.0)
    with pytest.raises(DataError, match="-1 .. 1 of action 'arm' is .-2.0. .. .2.0. in one and .-8.0. .. .8.0."):
        mix([near, far])
    alike = arm_dataset(tmp_path, "alike", 8.0, like=near.directory)
    mix([near, alike])
    code = lambda data: data.chunk("train", 0)["actions/arm"][:, 0]
    assert code(near)[1] == code(alike)[1] == 0.75 and code(alike)[2] == 1.0  # 8 is beyond, and clipped
