"""Conversion: every source becomes the same kind of dataset, aligned, whole or absent, and bad episodes are named."""

import json

import numpy as np
import pytest

from dreamer4_jax.config import ActionComponent
from dreamer4_jax.data import convert as module
from dreamer4_jax.data.convert import convert
from dreamer4_jax.data.pipeline import Loader
from dreamer4_jax.data.readers.base import Options
from dreamer4_jax.data.schema import DataError, Episode
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
    # No actions: missing everywhere. A shard begins with the last frame of the one before.
    assert data.spec.actions[0].name == "none"
    values = [data.chunk(s, i)["frames"][:, 8, 8, 0] for s in ("train", "holdout") for i in range(data.chunks(s))]
    there = [*range(64), *range(63, 127), *range(126, 158), *range(160, 200)]
    np.testing.assert_allclose(np.concatenate(values), there, atol=3)
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


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_nothing_that_was_earned_is_lost(tmp_path, every):
    """Success comes with the last frame alone, and in one long episode with frames at which shards are cut."""
    (tmp_path / "source").mkdir()
    for i in range(24):
        reward = np.zeros(20, np.float32)
        reward[-1] = 1
        np.savez(tmp_path / f"source/{i}.npz", frames=np.full((20, 16, 16, 3), i, np.uint8), reward=reward,
                 is_terminal=np.bool_(True), action=np.arange(20) % 4)  # fmt: skip
    manifest = convert(tmp_path / "source", tmp_path / "data", **QUICK | {"chunk": 4}, every=every, shard_frames=10_000)
    # What is left over behind the last chunk of a split is the end of one episode at most.
    assert manifest["statistics"]["terminal"] == manifest["statistics"]["rewarded"] >= 24 - 2

    (tmp_path / "long").mkdir()
    t = np.arange(400)
    frames = np.zeros((400, 16, 16, 3), np.uint8)
    frames[..., 0], frames[..., 1] = (t % 256)[:, None, None], (t // 256)[:, None, None]
    for i in range(2):
        np.savez(tmp_path / f"long/{i}.npz", frames=frames, reward=t.astype(np.float32), action=t % 4)
    convert(tmp_path / "long", tmp_path / "cut", **QUICK | {"chunk": 4}, every=every, shard_frames=32)
    data = open_dataset(tmp_path / "cut")
    assert len(data.streams("train")) > 2
    for split in data.splits:
        chunks = [data.chunk(split, i) for i in range(data.chunks(split))]
        join = lambda name, chunks=chunks: np.concatenate([c[name] for c in chunks])
        shown, there = join("frames")[:, 0, 0, :2].astype(int) @ [1, 256], join("present/action")
        np.testing.assert_array_equal(there, ~join("is_first"))
        np.testing.assert_array_equal(join("actions/action")[there], (shown % 4)[there])
        assert join("reward").sum() == t[: shown[-1] + 1].sum()


def test_the_task_of_a_frame_is_the_one_that_was_rewarded():
    task = np.asarray([1, 1, 1, 2, 2, 2, 2], np.int32)[:, None]
    reward = np.asarray([0, 0, 1, 0, 0, 0, 1], np.float32)
    none = {"action": np.zeros(7, np.int32)}
    episode = Episode(np.zeros((7, 4, 4, 3), np.uint8), none, {"action": np.arange(7) > 0}, reward, False, task)
    every = episode.every(3, (ActionComponent("action", "categorical", 4),))
    np.testing.assert_array_equal(every.reward, [0, 1, 1])
    np.testing.assert_array_equal(every.task[:, 0], [1, 1, 2])


def test_a_source_that_has_changed_is_not_taken_for_the_same(tmp_path):
    write_labelled_videos(tmp_path / "source", play(EPISODES), "jsonl")
    convert(tmp_path / "source", tmp_path / "data", **QUICK)
    label = tmp_path / "source/clip0.jsonl"
    label.write_text(label.read_text().replace("0", "1"))
    with pytest.raises(DataError, match="another config .*source.files is"):
        convert(tmp_path / "source", tmp_path / "data", **QUICK)
    few = {**QUICK, "options": Options(episodes=4, steps=30)}  # two environments with the same spaces
    convert("gym:Acrobot-v1", tmp_path / "gym", **few)
    with pytest.raises(DataError, match="source.files is 'gym:Acrobot-v1' there, 'gym:MountainCar-v0' here"):
        convert("gym:MountainCar-v0", tmp_path / "gym", **few)


@pytest.mark.parametrize("kind", ["npz", "video"])
def test_what_no_reader_reads_is_not_of_the_source(tmp_path, kind):
    """A dataset, a run and notes may lie inside it."""
    write_npz(tmp_path, play(4)) if kind == "npz" else write_labelled_videos(tmp_path, play(4), "csv")
    first = convert(tmp_path, tmp_path / "data", **QUICK)
    (tmp_path / "notes.txt").write_text("of mine")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/state").write_text("")
    assert convert(tmp_path, tmp_path / "data", **QUICK)["splits"] == first["splits"]


def test_labels_of_a_single_video_are_of_the_source(tmp_path):
    write_labelled_videos(tmp_path, [p for p in play(EPISODES) if len(p.frames) > 15][:1] or play(1), "csv")
    one = {**QUICK, "chunk": 4}
    convert(tmp_path / "clip0.mp4", tmp_path / "data", **one)
    label = tmp_path / "clip0.csv"
    label.write_text(label.read_text().replace("1", "0"))
    with pytest.raises(DataError, match="source.files is"):
        convert(tmp_path / "clip0.mp4", tmp_path / "data", **one)


def test_what_an_earlier_version_did_not_note_is_not_asked(tmp_path):
    write_npz(tmp_path / "source", play(4))
    first = convert(tmp_path / "source", tmp_path / "data", **QUICK)
    request = json.loads((tmp_path / "data/request.json").read_text())
    del request["source"]["files"]
    (tmp_path / "data/request.json").write_text(json.dumps(request))
    assert convert(tmp_path / "source", tmp_path / "data", **QUICK)["splits"] == first["splits"]
    with pytest.raises(DataError, match="every is 1 there, 2 here"):
        convert(tmp_path / "source", tmp_path / "data", **QUICK, every=2)
    (tmp_path / "data/dataset.json").unlink()  # unfinished: the rest would be cut otherwise than what is there
    with pytest.raises(DataError, match="source.files is None there"):
        convert(tmp_path / "source", tmp_path / "data", **QUICK)


def test_like_takes_no_other_actions(tmp_path):
    write_npz(tmp_path / "source", play(4))
    convert(tmp_path / "source", tmp_path / "data", **QUICK)
    for file in (tmp_path / "source").glob("*.npz"):
        held = dict(np.load(file))
        np.savez(file, **{k.replace("action", "actions/move"): v for k, v in held.items()})
    with pytest.raises(DataError, match="--like .*data: has the actions action; .*source has move"):
        convert(tmp_path / "source", tmp_path / "other", like=tmp_path / "data", **QUICK)
    move = Options(actions=(ActionComponent("move", "categorical", ACTIONS),))
    write_video(tmp_path / "unlabelled/a.mp4", np.zeros((40, 16, 16, 3), np.uint8))
    found = convert(tmp_path / "unlabelled", tmp_path / "missing", like=tmp_path / "data", **QUICK)
    assert found["spec"]["actions"][0]["name"] == "action" and found["statistics"]["present"] == {"action": 0}
    with pytest.raises(DataError, match="--like and --actions both say"):
        convert(tmp_path / "source", tmp_path / "other", like=tmp_path / "data", options=move, **QUICK)


def test_one_long_episode_is_not_most_of_what_is_held_out(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/damaged.npz").write_bytes(b"no archive")  # whose length nobody knows
    for i, length in enumerate((600, 20, 30)):
        frames = np.zeros((length, 16, 16, 3), np.uint8)
        np.savez(tmp_path / f"source/{i}.npz", frames=frames, action=np.arange(length) % 4)
    for seed in range(3):
        manifest = convert(tmp_path / "source", tmp_path / f"data{seed}", **QUICK, seed=seed)
        assert 16 <= sum(8 * e["chunks"] for e in manifest["splits"]["holdout"]) <= 48


def test_short_episodes_of_unknown_length_fill_their_shards(tmp_path):
    """RLDS does not say how long episodes are; shards of a few chunks must not be planned for longer ones."""
    write_rlds(tmp_path / "source", play(24), "tfrecord")
    manifest = convert(tmp_path / "source", tmp_path / "data", **QUICK, shard_frames=16)
    assert manifest["dropped_frames"] < 0.4 * sum(len(p.frames) for p in play(24))


def test_a_conversion_that_fails_leaves_its_place_free(tmp_path):
    """All that can be read is held out, which is known only when the rest has been tried."""
    (tmp_path / "source").mkdir()
    good = np.random.default_rng(0).permutation(4)[0]
    for i in range(4):
        reward = np.full(9, 0.0 if i == good else np.nan, np.float32)
        np.savez(tmp_path / f"source/{i}.npz", frames=np.zeros((9, 16, 16, 3), np.uint8), reward=reward)
    with pytest.raises(DataError, match="the train part has no 8 consecutive frames; 3 could not be read"):
        convert(tmp_path / "source", tmp_path / "data", **QUICK)
    assert not list((tmp_path / "data").iterdir())
    write_npz(tmp_path / "other", play(4))
    convert(tmp_path / "other", tmp_path / "data", **QUICK)


def test_the_destination_is_a_directory(tmp_path):
    write_npz(tmp_path / "source", play(4))
    (tmp_path / "data").write_text("a file")
    with pytest.raises(DataError, match="data is a file: choose a directory"):
        convert(tmp_path / "source", tmp_path / "data", **QUICK)


def test_given_components_hold_unlabelled_video(tmp_path):
    write_video(tmp_path / "source/a.mp4", np.zeros((40, 16, 16, 3), np.uint8))
    move = ActionComponent("move", "categorical", 5)
    manifest = convert(tmp_path / "source", tmp_path / "data", **QUICK, options=Options(actions=(move,)))
    assert open_dataset(tmp_path / "data").spec.actions == (move,)
    assert manifest["statistics"]["present"] == {"move": 0}
    assert json.loads((tmp_path / "data/dataset.json").read_text())["statistics"] == manifest["statistics"]
