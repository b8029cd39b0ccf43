"""Readers of npz files, videos with labels, and live environments: alignment to the index, and what is damaged."""

import json

import gymnasium
import numpy as np
import pytest

from dreamer4_jax import data_cli
from dreamer4_jax.config import ActionComponent
from dreamer4_jax.data import readers
from dreamer4_jax.data.readers.actions import NO_ACTIONS, infer, parse_components
from dreamer4_jax.data.readers.base import Fit, Options, Part, as_rgb
from dreamer4_jax.data.schema import DataError
from dreamer4_jax.envs.recorder import RecordEpisodes
from tests.sources import check_aligned, play, shown, write_labelled_videos, write_npz, write_video
from tests.toy_env import ACTIONS, ShowAction, reward_of

MOVE = (ActionComponent("action", "categorical", ACTIONS),)


def read_all(source, format="", **options):
    reader = readers.open_source(source, format, Options(**options))
    return reader, [reader.read(e.key, Part()).validate(reader.space.components) for e in reader.entries()]


def test_npz_is_aligned(tmp_path):
    played = play()
    write_npz(tmp_path, played)
    reader, episodes = read_all(tmp_path)
    assert reader.format == "npz" and reader.space.components == MOVE
    assert [e.frames for e in reader.entries()] == [len(p.frames) for p in played]
    for episode, p in zip(episodes, played, strict=True):
        check_aligned(episode, p)
        np.testing.assert_array_equal(episode.frames, p.frames)


def test_npz_of_the_other_alignment(tmp_path):
    (p,) = play(1)
    np.savez(tmp_path / "taken.npz", frames=p.frames, action=np.append(p.actions, 0), reward=np.append(p.rewards, 0))
    _, (episode,) = read_all(tmp_path, alignment="taken")
    check_aligned(episode, p)
    (tmp_path / "taken.npz").unlink()
    np.savez(tmp_path / "between.npz", frames=p.frames, action=p.actions, reward=p.rewards)  # one fewer: no doubt
    check_aligned(read_all(tmp_path)[1][0], p)


def test_npz_damaged_and_pickled_are_named(tmp_path):
    write_npz(tmp_path, play())
    whole = (tmp_path / "ep0.npz").read_bytes()
    (tmp_path / "ep0.npz").write_bytes(whole[: len(whole) // 2])
    np.savez(tmp_path / "ep1.npz", frames=np.asarray([{"a": 1}], object), action=np.zeros(3, int))
    reader = readers.open_source(tmp_path)
    assert [e.key for e in reader.entries()] == ["ep0.npz", "ep1.npz", "ep2.npz"]  # a bad one stays on the list
    for key, message in (("ep0.npz", "ep0.npz: cannot be read"), ("ep1.npz", "ep1.npz: .*[Oo]bject")):
        with pytest.raises(DataError, match=message):
            reader.read(key, Part())
    reader.read("ep2.npz", Part())
    np.savez(tmp_path / "ep3.npz", picture=np.zeros(3))
    with pytest.raises(DataError, match="ep3.npz: has no frames: its arrays are picture"):
        readers.open_source(tmp_path).read("ep3.npz", Part())


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "npy"])
def test_videos_with_labels_are_aligned(tmp_path, suffix):
    played = play()
    write_labelled_videos(tmp_path, played, suffix)
    reader, episodes = read_all(tmp_path)
    assert reader.format == "video" and reader.fps == 20 and reader.space.components == MOVE
    for i, (episode, p) in enumerate(zip(episodes, played, strict=True)):
        if suffix == "npy":  # actions alone
            np.testing.assert_array_equal(episode.actions["action"][1:], shown(episode.frames)[1:])
        elif suffix == "csv":
            np.testing.assert_array_equal(episode.reward[1:], [reward_of(a) for a in shown(episode.frames)[1:]])
        else:
            check_aligned(episode, p)
            assert (episode.task == i + 1).all() and reader.tasks[i] == f"task {i}"


def test_a_part_of_a_video_is_an_episode_of_its_own(tmp_path):
    (p,) = play(1)
    write_labelled_videos(tmp_path, [p], "jsonl")
    reader = readers.open_source(tmp_path)
    whole = reader.read("clip0.mp4", Part())
    part = reader.read("clip0.mp4", Part(3, 7)).validate(reader.space.components)
    np.testing.assert_array_equal(part.frames, whole.frames[3:7])
    np.testing.assert_array_equal(part.actions["action"][1:], whole.actions["action"][4:7])
    np.testing.assert_array_equal(part.reward[1:], whole.reward[4:7])
    assert not part.present["action"][0] and part.reward[0] == 0 and not part.is_terminal
    assert reader.read("clip0.mp4", Part(5, None)).is_terminal == p.terminal


def test_missing_labels_are_missing(tmp_path):
    played = play(2)
    write_video(tmp_path / "plain.mp4", played[0].frames)
    reader, (episode,) = read_all(tmp_path)
    assert reader.space.components == NO_ACTIONS and not episode.present["none"].any()
    # A labelled one beside it, with holes.
    write_video(tmp_path / "holes.mp4", played[1].frames)
    rows = [{"action": int(a) if t % 2 else None} for t, a in enumerate(played[1].actions)]
    (tmp_path / "holes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reader, (holes, plain) = read_all(tmp_path)
    assert reader.space.components[0].kind == "categorical" and not plain.present["action"].any()
    want = np.asarray([False, *[t % 2 == 1 for t in range(len(rows))]])
    np.testing.assert_array_equal(holes.present["action"], want)
    np.testing.assert_array_equal(holes.actions["action"][want], shown(holes.frames)[want])


def test_damaged_and_mislabelled_videos_are_named(tmp_path):
    (p,) = play(1)
    long = np.repeat(p.frames, 12, axis=0) ^ np.random.default_rng(0).integers(0, 32, (120, 16, 16, 3), np.uint8)
    for name in ("cut", "garbage", "few"):
        write_video(tmp_path / f"{name}.mp4", long, faststart=name == "cut")
    whole = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "garbage.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "few.csv").write_text("action\n" + "1\n" * 7)
    (tmp_path / "text.mp4").write_bytes(whole)
    (tmp_path / "text.csv").write_text("action\nleft\n")
    reader = readers.open_source(tmp_path)
    for key, message in (
        ("cut.mp4", "cut.mp4: (ends after|frame .* is damaged|cannot be read)"),
        ("garbage.mp4", "garbage.mp4: cannot be read"),
        ("few.mp4", "few.mp4: has 7 rows of action 'action' for 120 frames"),
        ("text.mp4", r"text.csv: line 2: action = 'left' is no number"),
    ):
        with pytest.raises(DataError, match=message):
            reader.read(key, Part())


def test_live_recording_is_aligned(tmp_path):
    gymnasium.register("ShowAction-v0", lambda render_mode=None: ShowAction(16))
    try:
        reader, episodes = read_all("gym:ShowAction-v0", episodes=4)
        again = [reader.read(e.key, Part()) for e in reader.entries()]
    finally:
        del gymnasium.registry["ShowAction-v0"]
    assert reader.space.components == MOVE and len(episodes) == 4
    for episode, other in zip(episodes, again, strict=True):
        np.testing.assert_array_equal(episode.actions["action"][1:], shown(episode.frames)[1:])
        np.testing.assert_array_equal(episode.reward[1:], [reward_of(a) for a in shown(episode.frames)[1:]])
        np.testing.assert_array_equal(episode.frames, other.frames)  # a function of the seed
    with pytest.raises(DataError, match="gym:Nowhere-v0: cannot be made"):
        readers.open_source("gym:Nowhere-v0")


def test_a_policy_of_ones_own_is_recorded(tmp_path):
    played = play()
    env = RecordEpisodes(ShowAction(16), tmp_path, task="show")
    for i, p in enumerate(played):
        env.reset(seed=i)
        for action in p.actions:
            env.step(int(action))
    env.close()
    reader, episodes = read_all(tmp_path)
    assert reader.tasks == ("show",) and all(e.task == 1 for e in episodes)
    for episode, p in zip(episodes, played, strict=True):
        check_aligned(episode, p)


def test_the_command_line_offers_every_format():
    """It lists them itself: importing the readers takes longer than its help should."""
    assert set(data_cli.FORMATS) == set(readers.FORMATS)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        readers.open_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is empty"):
        readers.open_source(tmp_path)
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="no format was recognised .*it holds thesis.txt"):
        readers.open_source(tmp_path)
    with pytest.raises(DataError, match="unknown format 'vdieo'; did you mean 'video'"):
        readers.open_source(tmp_path, "vdieo")


def test_inferred_action_spaces():
    tables = [
        {"pick": np.asarray([0, 3]), "keys": np.eye(2, dtype=bool), "arm": np.asarray([[0.1, 40.0]]),
         "hot": np.eye(3, dtype=np.float32)[[0, 2]], "soft": np.asarray([0.5, np.nan])},
        {"pick": np.asarray([1, 1]), "arm": np.asarray([[-0.5, -20.0]])},
    ]  # fmt: skip
    space = infer(tables)
    kinds = {c.name: (c.kind, c.size) for c in space.components}
    assert kinds == {"pick": ("categorical", 4), "keys": ("binary", 2), "arm": ("continuous", 2),
                     "hot": ("categorical", 3), "soft": ("continuous", 1)}  # fmt: skip
    assert space.to_json()["arm"] == {"low": [-1.0, -20.0], "high": [1.0, 40.0]}
    coded = space.encode({**tables[0], "arm": np.asarray([[0.1, 10.0], [np.nan, 1.0]])})
    np.testing.assert_allclose(coded["arm"][0], [[0.1, 0.0], [0.0, 0.0]], atol=1e-6)
    np.testing.assert_array_equal(coded["arm"][1], [True, False])
    np.testing.assert_array_equal(coded["hot"][0], [0, 2])
    np.testing.assert_array_equal(coded["soft"][1], [True, False])
    with pytest.raises(DataError, match=r"'pick' holds 0 .. 9: categorical\(4\) takes whole numbers in \[0, 4\)"):
        space.encode({"pick": np.asarray([0, 9])})
    with pytest.raises(DataError, match="holds -1: classes count from 0"):
        infer([{"pick": np.asarray([-1, 2])}])
    assert parse_components("a:categorical:3,b:binary:2") == (
        ActionComponent("a", "categorical", 3), ActionComponent("b", "binary", 2))  # fmt: skip
    with pytest.raises(DataError, match="--actions a:vector:3"):
        parse_components("a:vector:3")


def test_fitting_frames():
    image = np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3)
    np.testing.assert_array_equal(Fit()(image), image)
    np.testing.assert_allclose(Fit((4, 8))(image)[0, 0], image[:2, :2].mean((0, 1)), atol=0.5)  # mean over an area
    np.testing.assert_array_equal(Fit((16, 32))(image)[::2, ::2], image)  # squares
    np.testing.assert_array_equal(Fit((8, 8), "crop")(image), image[:, 4:12])
    padded = Fit((16, 16), "pad")(image)
    np.testing.assert_array_equal(padded[:8], image)
    assert not padded[8:].any()
    grey = np.full((4, 4), 0.5)
    np.testing.assert_array_equal(as_rgb(grey), np.full((4, 4, 3), 128, np.uint8))
    np.testing.assert_array_equal(as_rgb(np.moveaxis(image, -1, 0)), image)
    with pytest.raises(DataError, match="floats must be in"):
        as_rgb(grey * 300)
