"""Conversion: every source becomes the same kind of dataset, aligned, whole or absent, and bad episodes are named."""

import json

import numpy as np
import pytest

from dreamer4_jax.config import ActionComponent
from dreamer4_jax.data import convert as module
from dreamer4_jax.data.convert import convert
from dreamer4_jax.data.pipeline import Loader
from dreamer4_jax.data.readers.base import Options
from dreamer4_jax.data.schema import DataError
from dreamer4_jax.data.store import open_dataset
from tests.sources import (
    play,
    shown,
    write_labelled_videos,
    write_lerobot,
    write_minari,
    write_npz,
    write_rlds,
    write_video,
)
from tests.toy_env import ACTIONS, reward_of

QUICK = {"size": (16, 16), "chunk": 8, "workers": 1, "progress": False}
EPISODES = 8


def source(tmp_path, kind, monkeypatch):
    played, path = play(EPISODES), tmp_path / "source"
    match kind:
        case "npz":
            write_npz(path, played)
        case "video":
            write_labelled_videos(path, played, "jsonl")
        case "lerobot":
            write_lerobot(path, played, "v3.0")
        case "rlds":
            write_rlds(path, played, "tfrecord")
        case "minari":
            path = write_minari(path, played, "hdf5", monkeypatch)
    return path


def check_batches(directory):
    """What training reads: each frame with the action that it shows."""
    data = open_dataset(directory)
    for split in data.splits:
        loader = Loader(data, batch=4, length=6, seed=0, split=split)
        for step in range(4):
            b = loader.batch(step)
            there, action = b["present"]["action"], b["actions"]["action"]
            np.testing.assert_array_equal(there, ~b["is_first"])
            np.testing.assert_array_equal(action[there], shown(b["frames"])[there])
            np.testing.assert_array_equal(b["reward"], np.vectorize(reward_of)(shown(b["frames"])))
    return data


@pytest.mark.parametrize("kind", ["npz", "video", "lerobot", "rlds", "minari"])
def test_every_format_becomes_a_dataset(tmp_path, kind, monkeypatch):
    manifest = convert(source(tmp_path, kind, monkeypatch), tmp_path / "data", holdout=0.2, **QUICK)
    data = check_batches(tmp_path / "data")
    assert data.spec.actions == (ActionComponent("action", "categorical", ACTIONS),) and data.spec.words == 1
    stats = manifest["statistics"]
    assert stats["frames"] == data.frames("train") + data.frames("holdout") and not manifest["skipped"]
    assert stats["frames"] + manifest["dropped_frames"] == sum(len(p.frames) for p in play(EPISODES))
    actions = np.concatenate([data.chunk(s, i)["actions/action"][data.chunk(s, i)["present/action"]]
                              for s in data.splits for i in range(data.chunks(s))])  # fmt: skip
    np.testing.assert_array_equal(stats["actions"]["action"], np.bincount(actions, minlength=ACTIONS))
    assert manifest["fps"] == (20 if kind in ("video", "lerobot") else None)
    # No episode in both splits.
    held, train = (
        {m["source"] for i in range(data.chunks(s)) for m in data.segments(s, i)} for s in ("holdout", "train")
    )
    assert held and train and not held & train


def test_workers_change_nothing_and_interrupted_work_goes_on(tmp_path, monkeypatch):
    path = source(tmp_path, "npz", monkeypatch)
    many = QUICK | {"shard_frames": 16, "holdout": 0.2}
    one = convert(path, tmp_path / "one", **many)
    assert len(one["splits"]["train"]) > 2
    assert convert(path, tmp_path / "two", **many | {"workers": 2})["splits"] == one["splits"]
    make, calls = module.make_shard, []

    def failing(job):
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return make(job)

    monkeypatch.setattr(module, "make_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "cut", **many)
    with pytest.raises(DataError, match="unfinished"):
        open_dataset(tmp_path / "cut")
    assert convert(path, tmp_path / "cut", **many)["splits"] == one["splits"]
    assert (
        len(calls) == len([e for shards in one["splits"].values() for e in shards]) + 1
    )  # two were kept, one made again
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cut").iterdir()}
    convert(path, tmp_path / "cut", **many)  # complete: only checked
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cut").iterdir()}
    with pytest.raises(DataError, match="another config.*every is 1 there, 2 here"):
        convert(path, tmp_path / "cut", **many, every=2)


def test_bad_episodes_are_skipped_counted_and_named(tmp_path):
    write_labelled_videos(tmp_path / "source", play(EPISODES), "jsonl")
    for i, spoil in ((1, b"no video at all"), (4, None)):
        file = tmp_path / f"source/clip{i}.mp4"
        file.write_bytes(spoil) if spoil else file.with_suffix(".jsonl").write_text('{"action": 1}\n' * 3)
    manifest = convert(tmp_path / "source", tmp_path / "data", **QUICK)
    assert sorted(bad["episode"] for bad in manifest["skipped"]) == ["clip1.mp4", "clip4.mp4"]
    reasons = " ".join(bad["reason"] for bad in manifest["skipped"])
    assert "clip1.mp4: cannot be read" in reasons and "has 3 rows of action" in reasons
    check_batches(tmp_path / "data")


def test_nothing_usable_is_an_error_before_anything_is_written(tmp_path):
    source = tmp_path / "source"
    write_labelled_videos(source, play(3), "jsonl")
    for file in source.glob("*.mp4"):
        file.write_bytes(b"garbage")
    with pytest.raises(DataError, match="too few of its 3 episodes can be used .*; first: clip.*.mp4: cannot be read"):
        convert(source, tmp_path / "data", **QUICK)
    with pytest.raises(DataError, match="none of its 3 episodes can be read"):
        convert(source, tmp_path / "data", **QUICK | {"size": None})
    for file in source.iterdir():
        file.unlink()
    write_video(source / "short.mp4", play(1)[0].frames)
    with pytest.raises(DataError, match="has 10 frames, too few for a training and a held-out chunk of 8"):
        convert(source, tmp_path / "data", **QUICK)
    for name, value in (("chunk", 0), ("workers", 0), ("holdout", 1.0), ("size", (0, 3))):
        with pytest.raises(DataError, match=f"--{name}"):
            convert(source, tmp_path / "data", **QUICK | {name: value})
    assert not (tmp_path / "data").exists()


def test_mixed_resolutions_are_fitted_or_named(tmp_path):
    a, b = (np.random.default_rng(0).integers(0, 255, (40, s, 32, 3), np.uint8) for s in (16, 24))
    for i in range(4):
        write_video(tmp_path / f"source/{i}.mp4", b if i == 2 else a)
    fitted = convert(tmp_path / "source", tmp_path / "fitted", **QUICK)
    assert fitted["sizes"] == {"16x32": 3, "24x32": 1} and not fitted["skipped"]
    own = convert(tmp_path / "source", tmp_path / "own", **QUICK | {"size": None})
    assert own["spec"]["size"] == [16, 32]
    assert own["skipped"] == [{"episode": "2.mp4", "reason": "2.mp4: frames are 24 x 32, the dataset's 16 x 32: give a "
                               "size that all are fitted to"}]  # fmt: skip


def test_one_long_video_is_cut_in_time(tmp_path):
    frames = np.zeros((200, 16, 16, 3), np.uint8)
    frames[:] = np.arange(200)[:, None, None, None]
    write_video(tmp_path / "source/long.mp4", frames)
    manifest = convert(tmp_path / "source", tmp_path / "data", **QUICK, holdout=0.2, shard_frames=64)
    data = open_dataset(tmp_path / "data")
    assert [e["chunks"] for e in manifest["splits"]["train"]] == [8, 8, 4] and data.frames("holdout") == 40
    # No actions: missing everywhere, and every frame is there once.
    assert data.spec.actions[0].name == "none"
    values = [data.chunk(s, i)["frames"][:, 8, 8, 0] for s in ("train", "holdout") for i in range(data.chunks(s))]
    np.testing.assert_allclose(np.concatenate(values), np.arange(200), atol=3)
    assert not any(data.chunk("train", i)["present/none"].any() for i in range(20))


def test_every_nth_frame(tmp_path):
    rng, frames = np.random.default_rng(0), np.zeros((64, 16, 16, 3), np.uint8)
    keys, arm = rng.integers(0, 2, (64, 3)).astype(bool), rng.uniform(-1, 1, (64, 2)).astype(np.float32)
    reward = rng.normal(size=64).astype(np.float32) * (np.arange(64) > 0)
    pick = rng.integers(0, 4, 64)
    (tmp_path / "source").mkdir()
    for i in range(3):
        np.savez(tmp_path / f"source/{i}.npz", frames=frames, reward=reward,
                 **{"actions/keys": keys, "actions/arm": arm, "actions/pick": pick})  # fmt: skip
    convert(tmp_path / "source", tmp_path / "data", **QUICK, every=4)
    chunk = open_dataset(tmp_path / "data").chunk("train", 0)
    np.testing.assert_allclose(chunk["reward"][1:4], reward[1:13].reshape(3, 4).sum(1), rtol=1e-5)
    np.testing.assert_array_equal(chunk["actions/keys"][1:4], keys[1:13].reshape(3, 4, 3).max(1))
    np.testing.assert_allclose(chunk["actions/arm"][1:4], arm[[4, 8, 12]], atol=1e-6)
    np.testing.assert_array_equal(chunk["actions/pick"][1:4], pick[[4, 8, 12]])


def test_given_components_hold_unlabelled_video(tmp_path):
    write_video(tmp_path / "source/a.mp4", np.zeros((40, 16, 16, 3), np.uint8))
    move = ActionComponent("move", "categorical", 5)
    manifest = convert(tmp_path / "source", tmp_path / "data", **QUICK, options=Options(actions=(move,)))
    assert open_dataset(tmp_path / "data").spec.actions == (move,)
    assert manifest["statistics"]["present"] == {"move": 0}
    assert json.loads((tmp_path / "data/dataset.json").read_text())["statistics"] == manifest["statistics"]
