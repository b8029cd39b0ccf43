"""What `data inspect` counts and what it finds wrong."""

import io
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dreamer4_jax import cli
from dreamer4_jax.config import ActionComponent
from dreamer4_jax.data.convert import convert
from dreamer4_jax.data.inspect import inspect, picture, table
from dreamer4_jax.data.schema import chunks
from dreamer4_jax.data.statistics import Tally, merge, suspicions
from tests.sources import play, write_labelled_videos, write_npz
from tests.toy_env import COMPONENT, toy_episodes, write_toy_dataset


def test_counts_are_those_of_the_episodes():
    episodes = toy_episodes(30)
    tally = Tally((COMPONENT,))
    for arrays, _ in chunks(episodes, 16):
        tally.add(arrays)
    stats = tally.to_json()
    kept = stats["frames"]
    reward = np.concatenate([e.reward for e in episodes])[:kept]
    present = np.concatenate([e.present["move"] for e in episodes])[:kept]
    actions = np.concatenate([e.actions["move"] for e in episodes])[:kept][present]
    assert kept == sum(map(len, episodes)) // 16 * 16
    assert stats["rewarded"] == (reward > 0).sum() and stats["present"] == {"move": present.sum()}
    np.testing.assert_array_equal(stats["actions"]["move"], np.bincount(actions, minlength=5))
    ends = np.cumsum([len(e) for e in episodes])
    assert stats["lengths"] == [len(e) for e, end in zip(episodes, ends, strict=True) if end <= kept]
    twice = merge([stats, stats])
    assert twice["frames"] == 2 * kept and twice["lengths"] == stats["lengths"] * 2
    assert twice["actions"]["move"] == (2 * np.asarray(stats["actions"]["move"])).tolist()


def stats_of(**changes):
    counts = {"frames": 1000, "episodes": 10, "whole": 9, "terminal": 0, "rewarded": 20, "reward": 20.0, "still": 0,
              "flat": 0, "lengths": [100] * 9, "tasks": {"0": 1000}, "present": {"a": 990},
              "actions": {"a": [400, 300, 290]}}  # fmt: skip
    return {**counts, **changes}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("categorical", {}, None),
        ("categorical", {"flat": 100}, "10.0 % of the frames show one colour"),
        ("categorical", {"still": 900}, "90 % of the frames equal the one before"),
        ("categorical", {"lengths": [2] * 9}, "9 of 9 whole episodes have fewer than 8 frames"),
        ("categorical", {"present": {"a": 0}}, "'a' is never given"),
        ("categorical", {"present": {"a": 495}}, "'a' is given for 50.0 % of the steps"),
        ("categorical", {"actions": {"a": [985, 5, 0]}}, "'a' is 0 in 99 % of the steps"),
        ("categorical", {"actions": {"a": [500, 490, 0]}}, "1 of 3 classes never occur"),
        ("binary", {"actions": {"a": [10, 0, 0]}}, "keys 1, 2 are never pressed"),
        ("continuous", {"actions": {"a": [[0] * 10 + [990] + [0] * 10] * 3}}, r"'a'\[0\] never changes"),
        ("continuous", {"actions": {"a": [[495] + [0] * 19 + [495]] * 3}}, r"at an end of its range in 100 %"),
        ("categorical", {"rewarded": 0}, "no frame has a reward above 0"),
        ("categorical", {"rewarded": 900}, "90 % of the frames have a reward"),
    ],
)
def test_what_looks_wrong(kind, changes, message):
    found = suspicions(stats_of(**changes), (ActionComponent("a", kind, 3),), 64)
    if message is None:
        assert found == []
    else:
        assert any(re.search(message, line) for line in found), found


def shown(found) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(table(found))
    return out.getvalue()


def test_a_converted_dataset_is_shown(tmp_path, capsys):
    write_labelled_videos(tmp_path / "source", play(8), "jsonl")
    (tmp_path / "source/clip3.mp4").write_bytes(b"garbage")
    convert(tmp_path / "source", tmp_path / "data", size=(16, 16), chunk=8, holdout=0.2, workers=1, progress=False)
    found = inspect(tmp_path / "data")
    text = shown(found)
    assert found.read == 0 and "1 episodes could not be read; first: clip3.mp4" in text
    assert "categorical (5), given for 100.0 % of the steps" in text and "task 0, task 1" in text
    assert cli.main(["data", "inspect", str(tmp_path / "data")]) == 0
    image = np.asarray(Image.open(tmp_path / "data/inspect.png").convert("RGB"))
    assert min(image.shape[:2]) > 500
    # The frames of the sheet are in it: their colours, enlarged.
    colours = {tuple(c) for c in found.sheet.reshape(-1, 3).tolist()}
    assert len(colours & {tuple(c) for c in image.reshape(-1, 3)[::7].tolist()}) >= 3
    assert "what looks wrong" in capsys.readouterr().out


def test_a_recorded_dataset_is_counted(tmp_path):
    write_toy_dataset(tmp_path / "toy")
    found = inspect(tmp_path / "toy")
    assert found.read == sum(found.dataset.chunks(s) for s in found.dataset.splits)
    assert found.stats["frames"] == sum(found.dataset.frames(s) for s in found.dataset.splits)
    assert "counted below" in shown(found) and picture(found)[:4] == b"\x89PNG"


def test_mixed_shapes_are_found(tmp_path):
    write_npz(tmp_path / "source", play(6))
    (p,) = play(1)
    np.savez(tmp_path / "source/wide.npz", image=np.repeat(p.frames, 2, axis=2), action=np.append(0, p.actions))
    convert(tmp_path / "source", tmp_path / "data", size=(16, 16), chunk=8, holdout=0.2, workers=1, progress=False)
    wrong = " ".join(inspect(tmp_path / "data").wrong)
    assert (
        "frames came in 2 sizes, height x width: 16x16 (6), 16x32 (1)" in wrong
        and "2 shapes and were stretched" in wrong
    )


def test_names_are_text_and_no_markup(tmp_path):
    """Files, tasks and reasons may hold what a terminal's markup or a formula is written with."""
    write_npz(tmp_path / "source", play(4))
    for i, file in enumerate(sorted((tmp_path / "source").glob("*.npz"))):
        held = dict(np.load(file)) | {"task": np.asarray("[/INST] $x$")}
        np.savez(file.with_name(f"a$\\x{i}$.npz"), **held)
        file.unlink()
    (tmp_path / "source/[bold]$\\y$.npz").write_bytes(b"damaged")
    convert(tmp_path / "source", tmp_path / "da$\\z$ta", size=(16, 16), chunk=8, workers=1, progress=False)
    found = inspect(tmp_path / "da$\\z$ta")
    console = Console(file=io.StringIO(), width=300)
    console.print(table(found))
    assert "[/INST] $x$" in console.file.getvalue() and "[bold]" in console.file.getvalue()
    assert picture(found)
