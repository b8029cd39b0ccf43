"""Readers of LeRobot, Minari and RLDS datasets in their true layout: alignment to the index, and what is damaged."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dreamer4_jax.config import ActionComponent
from dreamer4_jax.data import readers
from dreamer4_jax.data.readers.base import Options, Part
from dreamer4_jax.data.schema import DataError
from tests.sources import check_aligned, play, write_lerobot, write_minari, write_rlds
from tests.toy_env import ACTIONS, frame_action

MOVE = (ActionComponent("action", "categorical", ACTIONS),)


def check(source, played, name):
    reader = readers.open_source(source)
    assert reader.format == name and reader.space.components == MOVE
    for entry, p in zip(reader.entries(), played, strict=True):
        check_aligned(reader.read(entry.key, Part()).validate(MOVE), p)
    return reader


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_lerobot_is_aligned(tmp_path, version):
    played = play()
    write_lerobot(tmp_path / "set", played, version)
    reader = check(tmp_path / "set", played, "lerobot")
    assert reader.fps == 20 and reader.tasks == ("task 0", "task 1")
    assert [int(reader.read(e.key, Part()).task[0]) for e in reader.entries()] == [1, 2, 1]
    part = reader.read("1", Part(2, 6))
    np.testing.assert_array_equal(part.frames, reader.read("1", Part()).frames[2:6])
    with pytest.raises(DataError, match="choose one of observation.images.top"):
        readers.open_source(tmp_path / "set", options=Options(camera="wrist"))


def test_damaged_lerobot_is_named(tmp_path):
    played = play()
    write_lerobot(tmp_path / "set", played, "v2.1")
    (tmp_path / "set/videos/chunk-000/observation.images.top/episode_000000.mp4").unlink()
    file = tmp_path / "set/data/chunk-000/episode_000001.parquet"
    file.write_bytes(file.read_bytes()[:200])
    reader = readers.open_source(tmp_path / "set")
    for key in "01":
        with pytest.raises(DataError, match=f"episode {key}: cannot be read"):
            reader.read(key, Part())
    check_aligned(reader.read("2", Part()), played[2])
    info = tmp_path / "set/meta/info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "codebase_version": "v1.6"}))
    with pytest.raises(DataError, match="'v1.6': 2 and 3 are read"):
        readers.open_source(tmp_path / "set")


def test_lerobot_v3_of_the_wrong_length_is_named(tmp_path):
    import pyarrow.parquet as pq

    write_lerobot(tmp_path / "set", play(), "v3.0")
    file = tmp_path / "set/data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    pq.write_table(table.slice(2), file)
    with pytest.raises(DataError, match="episode 0: has .* rows, its meta data say"):
        readers.open_source(tmp_path / "set").read("0", Part())


@pytest.mark.parametrize("form", ["hdf5", "arrow"])
def test_minari_is_aligned(tmp_path, form, monkeypatch):
    played = play()
    reader = check(write_minari(tmp_path, played, form, monkeypatch), played, "minari")
    for entry, p in zip(reader.entries(), played, strict=True):
        np.testing.assert_array_equal(frame_action(reader.read(entry.key, Part()).frames), frame_action(p.frames))


def test_damaged_minari_is_named(tmp_path, monkeypatch):
    import h5py

    path = write_minari(tmp_path, play(), "hdf5", monkeypatch)
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        del file["episode_1/actions"]
    reader = readers.open_source(path)
    reader.read("0", Part())
    with pytest.raises(DataError, match="episode 1: cannot be read"):
        reader.read("1", Part())
    metadata = path / "data/metadata.json"
    tree = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({k: v for k, v in tree.items() if k != "action_space"}))
    with pytest.raises(DataError, match="names no spaces, only an environment"):
        readers.open_source(path)


@pytest.mark.parametrize("form", ["array_record", "tfrecord"])
def test_rlds_is_aligned(tmp_path, form):
    played = play()
    path = write_rlds(tmp_path / "toy", played, form)
    reader = check(path, played, "rlds")
    assert reader.tasks == ("task 0", "task 1")


def test_rlds_needs_no_tensorflow(tmp_path):
    path = write_rlds(tmp_path / "toy", play(1), "tfrecord")
    code = (
        "import sys\nfrom dreamer4_jax.data import readers\nfrom dreamer4_jax.data.readers.base import Part\n"
        f"r = readers.open_source({str(path)!r})\nprint(len(r.read('train/0', Part())))\n"
        "print(any(m in sys.modules for m in ('tensorflow', 'torch', 'jax')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split()[-2:] == ["10", "False"]


def test_damaged_rlds_is_named(tmp_path):
    played = play()
    path = write_rlds(tmp_path / "toy", played, "tfrecord")
    (file,) = path.glob("*.tfrecord-*")
    content = file.read_bytes()
    file.write_bytes(content[:-30])
    reader = readers.open_source(path)
    assert len(reader.entries()) == 3
    check_aligned(reader.read("train/0", Part()), played[0])
    with pytest.raises(DataError, match="train/2: .*has 2 whole records: it is truncated"):
        reader.read("train/2", Part())
    spoiled = bytearray(content)
    spoiled[40:400] = bytes(360)
    file.write_bytes(spoiled)
    with pytest.raises(DataError, match="episode train/0"):
        readers.open_source(path).read("train/0", Part())
