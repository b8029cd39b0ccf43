"""The recorder of procgen games on a game whose frame shows the last action: alignment, seeds, resumption.

procgen itself has an environment of its own (launch/record_procgen.sh), so a stand-in with its interface plays here.
"""

import json
import sys
import types

import numpy as np
import pytest

from dreamer4_jax.data.convert import convert
from dreamer4_jax.data.readers import Options, Part, open_source
from dreamer4_jax.data.readers.actions import parse_components
from dreamer4_jax.data.store import open_dataset
from launch import record_procgen as rp


class Game:
    """gym3's interface of procgen: a step behind the end already shows the next level."""

    made = []

    def __init__(self, num, env_name, start_level, num_levels, rand_seed, num_threads, distribution_mode, **look):
        assert (num, num_levels) == (1, 1)
        Game.made.append((start_level, look))
        self.level, self.last, self.step, self.won = start_level, -1, 0, False
        self.end = 5 + start_level % 30  # some are cut off before

    def observe(self):
        frame = np.full((1, 64, 64, 3), (20 * (self.last + 1), self.step, self.level % 256), np.uint8)
        return np.asarray([10.0 * self.won]), {"rgb": frame}, np.asarray([self.step == 0])

    def act(self, action):
        self.last, self.step = int(action[0]), self.step + 1
        self.won = self.step == self.end
        if self.won:
            self.last, self.step = -1, 0

    def close(self):
        pass


@pytest.fixture(autouse=True)
def procgen(monkeypatch):
    monkeypatch.setitem(sys.modules, "procgen", types.SimpleNamespace(ProcgenGym3Env=Game))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    Game.made.clear()


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["record", *map(str, words), "--workers", "1"])
    rp.main()


def test_an_episode_pairs_frames_with_the_actions_that_led_to_them(monkeypatch, tmp_path):
    run(monkeypatch, "coinrun", tmp_path / "a", "--episodes", 12, "--steps", 20, "--look", "bare")
    notes = json.loads((tmp_path / "a" / "procgen.json").read_text())
    assert notes["complete"] and len({e["level_seed"] for e in notes["episodes"]}) == 12
    assert all(look == rp.LOOKS["bare"] for _, look in Game.made)
    reader = open_source(tmp_path / "a", options=Options(actions=parse_components("move:categorical:9")))
    ends = set()
    for entry, noted in zip(reader.entries(), notes["episodes"], strict=True):
        e = reader.read(entry.key, Part()).validate(reader.space.components)
        shown = e.frames[:, 0, 0, 0].astype(int) // 20 - 1
        there = e.present["move"]
        assert there.tolist() == [False] + [True] * (len(e) - 1)
        np.testing.assert_array_equal(shown[there], e.actions["move"][there])
        assert (e.frames[:, 0, 0, 1] == np.arange(len(e))).all(), "no frame of the next level"
        assert e.is_terminal == (e.reward[-1] == 10) == (noted["return"] > 0) and e.meta["level"] == "coinrun-bare"
        assert len(e) == noted["frames"] <= 21
        ends.add(e.is_terminal)
    assert ends == {True, False}


def test_files_are_the_same_whoever_makes_them_and_when(monkeypatch, tmp_path):
    words = ("coinrun", tmp_path / "a", "--episodes", 6, "--steps", 9)
    run(monkeypatch, *words)
    first = json.loads((tmp_path / "a" / "procgen.json").read_text())
    kept = tmp_path / "a" / first["episodes"][3]["file"]
    (tmp_path / "a" / first["episodes"][2]["file"]).unlink()
    stamp = kept.stat().st_mtime_ns
    Game.made.clear()
    run(monkeypatch, *words)
    assert len(Game.made) == 1 and kept.stat().st_mtime_ns == stamp, "only what was missing is made"
    assert json.loads((tmp_path / "a" / "procgen.json").read_text()) == first
    run(monkeypatch, "coinrun", tmp_path / "b", *words[2:], "--seed", 1)
    other = json.loads((tmp_path / "b" / "procgen.json").read_text())
    assert {e["sha256"] for e in other["episodes"]}.isdisjoint(e["sha256"] for e in first["episodes"])
    assert not list(tmp_path.rglob(".*"))


def test_directories_of_something_else_are_refused(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "coinrun", tmp_path / "a", "--episodes", 2, "--steps", 9)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("")
    for words, text in (
        (("coinrun", tmp_path / "a", "--episodes", 3, "--steps", 9), "episodes is 2 there, 3 here"),
        (("coinrun", tmp_path / "b"), "is not empty and holds no recording"),
        (("coinrun", tmp_path / "c", "--episodes", 0), "--episodes 0: must be at least 1"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *words)
        assert stop.value.code == 2 and text in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_levels_reach_the_dataset(monkeypatch, tmp_path):
    for i, look in enumerate(("bare", "blocks")):
        run(monkeypatch, "coinrun", tmp_path / "all" / look, "--episodes", 8, "--steps", 20, "--look", look,
            "--first", 8 * i)  # fmt: skip
    convert(tmp_path / "all", tmp_path / "data", chunk=8, holdout=0.2, workers=1, progress=False)
    found = open_dataset(tmp_path / "data").episodes("train")
    assert {e.level for e in found} == {"coinrun-bare", "coinrun-blocks"}


def test_forward_players_come_forward():
    request = rp.Request("coinrun", "classic", "easy", 1, 0, 9, 0, "")
    players = [rp.Player(request, np.random.default_rng(i)) for i in range(40)]
    forward = [p for p in players if p.name == "forward"]
    assert 0 < len(forward) < 40
    drawn = [forward[0]() for _ in range(4000)]
    right, left = (sum(a in moves for a in drawn) for moves in ((6, 7, 8), (0, 1, 2)))
    assert right > 2 * left > 0
    runs = np.diff(np.flatnonzero(np.diff(drawn)))
    assert runs.min() >= 1 and runs.mean() > 3, "actions are held"
    other = rp.Player(rp.Request("starpilot", "classic", "easy", 1, 0, 9, 0, ""), np.random.default_rng(0))
    assert {other() for _ in range(4000)} == set(range(15))
