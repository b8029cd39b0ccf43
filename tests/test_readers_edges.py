"""What people's recordings are like: clips cut without encoding, dropped frames, spreadsheets, odd files among many."""

import json
from fractions import Fraction

import numpy as np
import pytest

from dreamer4_jax.config import ActionComponent
from dreamer4_jax.data import readers
from dreamer4_jax.data.convert import convert
from dreamer4_jax.data.readers import frames, labels
from dreamer4_jax.data.readers.actions import infer, parse_components
from dreamer4_jax.data.readers.base import Options, Part, check_picture
from dreamer4_jax.data.schema import DataError
from tests.sources import check_aligned, play, shown, write_labelled_videos, write_lerobot, write_video

FPS = 20


def counting(count, size=16):
    """Frame t is grey of 40 times t mod 5."""
    return np.broadcast_to((40 * (np.arange(count) % 5)).astype(np.uint8)[:, None, None, None], (count, size, size, 3))


def counted(pictures):
    return np.round(pictures.mean((1, 2, 3)) / 40).astype(int)


def cut(source, dest, begin):
    """Leaves out the frames before `begin` without encoding anew: those since the keyframe are kept, and hidden."""
    import av

    with av.open(str(source)) as old, av.open(str(dest), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        shift = int(begin / FPS / stream.time_base)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                new.mux(packet)


def labelled(folder, text, count=12, name="clip.csv"):
    """What is read of one video beside a label file."""
    write_video(folder / "clip.mp4", counting(count))
    (folder / name).write_text(text, encoding="utf-8")
    reader = readers.open_source(folder)
    return reader.read("clip.mp4", Part()).validate(reader.space.components)


@pytest.mark.parametrize("hidden", [1, 2, 40])
def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path, monkeypatch, hidden):
    import av

    write_video(tmp_path / "whole/clip.mp4", counting(60))
    (tmp_path / "cut").mkdir()
    path = tmp_path / "cut/clip.mp4"
    cut(tmp_path / "whole/clip.mp4", path, hidden)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 60  # what the header says
    left = 60 - hidden
    path.with_suffix(".csv").write_text("action\n" + "".join(f"{(t + hidden) % 5}\n" for t in range(left)))
    reader = readers.open_source(path.parent, options=Options(alignment="led"))
    assert [e.frames for e in reader.entries()] == [left] and frames.count(path) == left
    for part in (Part(), Part(0, 8), Part(8, 16), Part(16, None)):
        episode = reader.read("clip.mp4", part)
        np.testing.assert_array_equal(episode.actions["action"][1:], counted(episode.frames)[1:])
    monkeypatch.setattr(frames, "_indexed", lambda container, stream: 0)  # as of a file without an index
    assert frames.count(path) == left


@pytest.mark.parametrize("said", [31, 35])
def test_what_a_decoder_leaves_out_does_not_shift_labels(tmp_path, monkeypatch, said):
    write_video(tmp_path / "clip.mp4", counting(30))
    (tmp_path / "clip.csv").write_text("action\n" + "".join(f"{t % 5}\n" for t in range(30)))
    monkeypatch.setattr(frames, "count", lambda path: said)
    episode = readers.open_source(tmp_path, options=Options(alignment="led")).read("clip.mp4", Part(0, 8))
    np.testing.assert_array_equal(episode.actions["action"][1:], counted(episode.frames)[1:])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_one_video_is_divided_in_time(tmp_path, suffix):
    """An .mkv does not say how many frames it has."""
    write_video(tmp_path / f"in/clip.{suffix}", counting(80))
    manifest = convert(tmp_path / "in", tmp_path / "out", size=None, chunk=8, workers=1, progress=False)
    assert manifest["statistics"]["frames"] == 80


def test_frames_dropped_from_a_lerobot_video_are_noticed(tmp_path):
    import av

    played = play(4)
    write_lerobot(tmp_path, played, "v3.0")
    pictures = np.concatenate([p.frames for p in played])
    gap = len(played[0].frames) + 4
    with av.open(str(tmp_path / "videos/observation.images.top/chunk-000/file-000.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "8", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv444p"
        for t, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = t, Fraction(1, FPS)
            if t != gap:
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    reader = readers.open_source(tmp_path)
    with pytest.raises(DataError, match=r"episode 1: file-000.mp4: frame 4 from .* s on is at .* s, expected at .* s"):
        reader.read("1", Part())
    for i in (0, 2, 3):  # those behind it are where they were
        check_aligned(reader.read(str(i), Part()), played[i])
    np.testing.assert_array_equal(shown(reader.read("1", Part(0, 4)).frames), shown(played[1].frames[:4]))


def test_spaces_and_the_mark_of_a_spreadsheet(tmp_path):
    lines = "".join(f'{t}, {t % 3}, {int(t == 9)}, "open, then shut" \n' for t in range(12))
    episode = labelled(tmp_path, "\ufeffframe, action, reward, task\n" + lines)
    assert list(episode.actions) == ["action"] and list(np.nonzero(episode.reward)[0]) == [10]
    assert readers.open_source(tmp_path).tasks == ("open, then shut",)
    (tmp_path / "clip.csv").unlink()
    rows = "".join(json.dumps({"action": t % 3, "task": "öffnen"}, ensure_ascii=False) + "\n" for t in range(12))
    labelled(tmp_path, "\ufeff" + rows, name="clip.jsonl")
    assert readers.open_source(tmp_path).tasks == ("öffnen",)


@pytest.mark.parametrize("name", ["clip.CSV", "clip.Csv"])
def test_suffixes_of_labels_in_capitals(tmp_path, name):
    assert labelled(tmp_path, "action\n" + "1\n0\n" * 6, name=name).present["action"][1:].all()
    (tmp_path / "clip.jsonl").write_text("1\n" * 12)
    with pytest.raises(DataError, match="^clip.mp4: has several label files: clip.(CSV|Csv), clip.jsonl"):
        readers.open_source(tmp_path).read("clip.mp4", Part())


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("左,右", "1,0", "actions '左' and '右' would both be called 'action'"),
        ("arm l,arm-l", "1,0", "actions 'arm l' and 'arm-l' would both be called 'arm_l'"),
        ("action,action", "1,0", "has several columns 'action'"),
    ],
)
def test_columns_of_one_name_are_refused(tmp_path, header, row, message):
    with pytest.raises(DataError, match=f"clip.csv: {message}"):
        labelled(tmp_path, f"{header}\n" + f"{row}\n" * 12)


def test_actions_of_one_name_in_npz_are_refused(tmp_path):
    np.savez(tmp_path / "e.npz", frames=counting(4), **{"actions/左": np.zeros(4, int), "actions/右": np.zeros(4, int)})
    with pytest.raises(DataError, match="e.npz: actions '左' and '右'"):
        readers.open_source(tmp_path).read("e.npz", Part())


@pytest.mark.parametrize(
    ("last", "terminal"),
    [
        ({"terminated": True}, True),
        ({"terminated": False, "truncated": True, "done": True}, False),
        ({"truncated": True}, False),
        ({"done": True, "truncated": True}, False),
        ({"done": True, "truncated": False}, True),
        ({"discount": 0.0, "is_first": False, "is_last": True}, True),
        ({"discount": 1.0, "is_last": True}, False),
    ],
)
def test_how_episodes_end(tmp_path, last, terminal):
    rows = [{"action": t % 3, **{n: n == "discount" for n in last}} for t in range(12)]
    rows[-1] |= last
    episode = labelled(tmp_path, "".join(json.dumps(r) + "\n" for r in rows), name="clip.jsonl")
    assert list(episode.actions) == ["action"] and episode.is_terminal == terminal


@pytest.mark.parametrize("name", ["frame", "frame_index", "index"])
def test_rows_out_of_order_are_refused(tmp_path, name):
    text = f"{name},action\n" + "".join(f"{t},{t % 3}\n" for t in sorted(range(12), key=str))  # 0, 1, 10, 11, 2, ...
    with pytest.raises(DataError, match=f"clip.csv: line 4: {name} = 10 follows 1: rows are taken in order"):
        labelled(tmp_path, text)
    assert labelled(tmp_path, f"{name},action\n" + "".join(f"{t + 7},{t % 3}\n" for t in range(12)))  # any first one
    assert labelled(tmp_path, f"{name},action\n" + "".join(f"{t / 2},{t % 3}\n" for t in range(12)))  # no number


def test_times_are_no_classes(tmp_path):
    text = "timestamp_ms,action\n" + "".join(f"{1_700_000_000_000 + 50 * t},{t % 3}\n" for t in range(12))
    with pytest.raises(DataError, match="'timestamp_ms' holds whole numbers up to 1700000000550: .* a time or an id"):
        labelled(tmp_path, text)
    assert list(labelled(tmp_path, text.replace("timestamp_ms", "timestamp")).actions) == ["action"]
    assert infer([{"id": np.asarray([0, 99_999])}]).components[0].size == 100_000
    with pytest.raises(DataError, match="clip.csv: 'id' holds 99999999999999999999"):
        labels.read(_write(tmp_path / "clip.csv", "id\n1\n99999999999999999999\n"))


def _write(path, text):
    path.write_text(text)
    return path


def test_nan_among_whole_numbers_is_missing(tmp_path):
    episode = labelled(tmp_path, "action\n" + "".join("nan\n" if t == 5 else f"{t % 3}\n" for t in range(12)))
    assert episode.actions["action"].dtype == np.int32  # classes still
    np.testing.assert_array_equal(np.nonzero(~episode.present["action"])[0], [0, 6])


def test_whole_floats_are_classes_where_one_says_so(tmp_path):
    values = (np.arange(12) % 4).astype(np.float64)
    values[7] = np.nan
    write_video(tmp_path / "clip.mp4", counting(12))
    np.save(tmp_path / "clip.npy", values)
    assert readers.open_source(tmp_path).space.components[0].kind == "continuous"
    for shape in ((12,), (12, 1)):
        np.save(tmp_path / "clip.npy", values.reshape(shape))
        reader = readers.open_source(tmp_path, options=Options(actions=parse_components("action:categorical:4")))
        episode = reader.read("clip.mp4", Part()).validate(reader.space.components)
        np.testing.assert_array_equal(np.nonzero(~episode.present["action"])[0], [0, 8])
        np.testing.assert_array_equal(episode.actions["action"], [0, 0, 1, 2, 3, 0, 1, 2, 0, 0, 1, 2])


@pytest.mark.parametrize("actions", ["", "action:categorical:4"])
def test_one_whole_number_a_row_in_a_list_is_a_class(tmp_path, actions):
    values = np.arange(12)[:, None] % 4
    np.savez(tmp_path / "e.npz", frames=counting(12), action=values)
    reader = readers.open_source(tmp_path, options=Options(actions=parse_components(actions)))
    assert reader.space.components == (ActionComponent("action", "categorical", 4),)
    episode = reader.read("e.npz", Part()).validate(reader.space.components)
    np.testing.assert_array_equal(episode.actions["action"][1:], values[1:, 0])


def test_lists_of_one_in_lerobot_are_classes(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    played = play()
    write_lerobot(tmp_path, played, "v2.1")
    for file in (tmp_path / "data").rglob("*.parquet"):
        table = pq.read_table(file)
        lists = pa.array([[x] for x in table["action"].to_pylist()], pa.list_(pa.int64()))
        pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", lists), file)
    reader = readers.open_source(tmp_path)
    for entry, p in zip(reader.entries(), played, strict=True):
        check_aligned(reader.read(entry.key, Part()).validate(reader.space.components), p)


@pytest.mark.parametrize(
    ("odd", "usual", "message"),
    [
        ((12, 7), (12, 6), r"action 'action' has shape \[12, 7\]: continuous\(6\) wants \[12, 6\]"),
        ((12, 2, 3), (12, 6), r"action 'action' is float64 \[12, 2, 3\]: expected numbers \[T\] or \[T, A\]"),
    ],
)
def test_one_file_of_another_width_is_left_out(tmp_path, odd, usual, message):
    rng = np.random.default_rng(0)
    for i in range(6):  # the odd one is met first
        np.savez(tmp_path / f"e{i}.npz", frames=counting(12), action=rng.random(odd if i == 0 else usual))
    manifest = convert(tmp_path, tmp_path / "out", size=None, chunk=4, workers=1, holdout=0.2, progress=False)
    assert manifest["statistics"]["frames"] > 40 and [c["size"] for c in manifest["spec"]["actions"]] == [6]
    with pytest.raises(DataError, match=f"e0.npz: {message}"):
        readers.open_source(tmp_path).read("e0.npz", Part())


def test_the_width_of_most_decides():
    wide, narrow = {"arm": np.full((3, 7), 0.5)}, {"arm": np.full((3, 6), 0.5)}
    assert infer([wide, narrow, narrow]).components[0].size == 6
    assert infer([wide, narrow]).components[0].size == 7
    given = parse_components("arm:continuous:6")
    assert infer([wide, wide, narrow], given=given).components == given
    with pytest.raises(DataError, match=r"'arm' has 7 values, continuous\(6\) was asked for"):
        infer([wide], given=given)
    classes = infer([{"arm": np.arange(7)}])
    with pytest.raises(DataError, match="'arm' has 7 values a row: categorical"):  # not one-hot rows
        classes.encode(wide)
    with pytest.raises(DataError, match=r"'odd' is float64 \[2, 2, 2\]"):  # of no component, and not overlooked
        classes.encode({"arm": np.arange(2), "odd": np.zeros((2, 2, 2))})


def test_a_constant_of_any_size_has_a_range():
    for value in (0.5, 7.0, -3e20, 1e20):
        table = {"arm": np.full(3, value)}
        assert np.isfinite(infer([table]).encode(table)["arm"][0]).all()


def test_a_rewarded_frame_has_the_task_that_earned_it(tmp_path):
    rows = [{"action": 0, "task": "A" if t <= 5 else "B", "reward": float(t == 5)} for t in range(12)]
    write_video(tmp_path / "clip.mp4", counting(12))
    for count, alignment, rewarded, want in (
        (12, "", 6, "AAAAAAABBBBB"), (11, "", 6, "AAAAAAABBBBB"), (11, "led", 6, "AAAAAAABBBBB"),
        (12, "led", 5, "AAAAAABBBBBB"),
    ):  # fmt: skip
        (tmp_path / "clip.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:count]))
        reader = readers.open_source(tmp_path, options=Options(alignment=alignment))
        episode = reader.read("clip.mp4", Part())
        assert list(np.nonzero(episode.reward)[0]) == [rewarded]
        assert "".join(reader.tasks[i - 1] for i in episode.task[:, 0]) == want


def test_components_that_no_episode_has(tmp_path):
    write_labelled_videos(tmp_path, play(2), "csv")
    with pytest.raises(
        DataError, match="--actions actoin:categorical:5: no episode has 'actoin'; they have action; did"
    ):
        readers.open_source(tmp_path, options=Options(actions=parse_components("actoin:categorical:5")))
    both = parse_components("action:categorical:5,keys:binary:2")  # all columns are named: the other is missing
    assert (
        not readers.open_source(tmp_path, options=Options(actions=both)).read("clip0.mp4", Part()).present["keys"].any()
    )
    for path in tmp_path.glob("*.csv"):
        path.unlink()
    assert readers.open_source(tmp_path, options=Options(actions=both)).space.components == both  # none has labels


@pytest.mark.parametrize(
    ("options", "name"),
    [(Options(alignment="led"), "alignment"), (Options(actions=parse_components("a:binary:1")), "actions")],
)
@pytest.mark.parametrize("format", ["gymnasium", "minari", "vpt"])
def test_options_that_a_format_has_no_use_for(tmp_path, format, options, name):
    source = "gym:CartPole-v1" if format == "gymnasium" else str(tmp_path)
    with pytest.raises(DataError, match=f"--{name} is not for {source}: {format} itself says what its actions are"):
        readers.open_source(source, format, options)


def test_codes_are_no_pictures(tmp_path, monkeypatch):
    import gymnasium
    import minari

    class Grid(gymnasium.Env):
        observation_space = gymnasium.spaces.Dict(image=gymnasium.spaces.Box(0, 255, (7, 7, 3), np.uint8))
        action_space = gymnasium.spaces.Discrete(3)

        def reset(self, *, seed=None, options=None):
            return {"image": np.full((7, 7, 3), 10, np.uint8)}, {}

        def step(self, action):
            return {"image": np.full((7, 7, 3), 10, np.uint8)}, 0.0, False, False, {}

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = minari.DataCollector(Grid())
    env.reset(seed=0)
    env.step(0)
    env.create_dataset("toy/grid-v0", algorithm_name="random", author="x", author_email="x@x.x", code_permalink="x")
    env.close()
    with pytest.raises(DataError, match="episode 0: its observations are 7 x 7, up to 10 .* codes, not a picture"):
        readers.open_source(tmp_path / "toy/grid-v0").read("0", Part())
    for shape, value, high in (((16, 16, 3), 10, 255), ((64, 64, 3), 1, 1)):
        with pytest.raises(DataError, match="codes, not a picture"):
            check_picture(np.full(shape, value, np.uint8), high)
    check_picture(np.full((16, 16, 3), 40, np.uint8), 255)
    check_picture(np.zeros((5, 64, 64, 1), np.uint8), 255)  # all black


def test_one_action_under_two_names_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", frames=counting(9), action=np.arange(9) % 3, actions=np.arange(9) % 3)
    with pytest.raises(DataError, match="has both 'action' and 'actions', which are one action: keep one"):
        readers.open_source(tmp_path).read("a.npz", Part())


@pytest.mark.parametrize(("fps", "late", "match"), [(29.97, 0.0, "frame 500 from 0.000 s"), (30, 0.4, "frame 0 from")])
def test_videos_that_drift_or_begin_late_are_not_what_their_times_say(tmp_path, fps, late, match):
    """To LeRobot a frame is the one at its time: by number it would be another."""
    import av

    rate, count = Fraction(fps).limit_denominator(1001), 900
    with av.open(str(tmp_path / "a.mp4"), "w") as new:
        stream = new.add_stream("libx264", rate=rate)
        stream.width = stream.height = 16
        for t in range(count):
            picture = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 40 * (t % 5), np.uint8), format="rgb24")
            picture.pts, picture.time_base = t + round(late * fps), 1 / rate
            new.mux(stream.encode(picture))
        new.mux(stream.encode())
    with pytest.raises(DataError, match=match):
        list(frames.span(tmp_path / "a.mp4", lambda x: x, 0.0, count, 30.0))
    shown = np.stack(list(frames.span(tmp_path / "a.mp4", lambda x: x, round(late * fps) / fps, 300, 30.0)))
    np.testing.assert_array_equal(counted(shown), np.arange(300) % 5)
