"""The results of a sweep: the table, the front, and a page that needs no other file."""

import csv
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamer4_jax.config import UserError
from launch.algebra import chain, product, values
from launch.metric import Metric, Value
from launch.sweep_file import Sweep, make_trial
from launch.sweep_records import Records
from launch.sweep_report import Row, collect, field_figure, front, page, pareto_figure, write_report

LR, K_MAX = "train.dynamics.lr", "dynamics.k_max"
SWEEP = Sweep(
    Path("some.py"),
    "tiny",
    "quick",
    Metric("score", "max"),
    grid=tuple(chain([{}], product(values(LR, 1e-3, 1e-2), values(K_MAX, 4, 8, 16)))),
)


@pytest.fixture
def directory(tmp_path):
    """A sweep of seven trials: one failed, one was stopped, one has no metric, and one is not there yet."""
    records = Records(tmp_path)
    states = ("finished", "failed", "pruned", "finished", "finished", "finished")
    for i, (overrides, state) in enumerate(zip(SWEEP.grid, states, strict=False)):
        trial = make_trial(SWEEP, overrides, tmp_path)
        run = tmp_path / trial.name
        run.mkdir()
        (run / "ledger.json").write_text(json.dumps({"dynamics": {"train": 60.0 * i, "save": 1.5}}))
        (run / "stages.json").write_text(json.dumps({"collect": 2.0}))
        lines = [{"phase": phase, "step": s} for phase, n in (("tokenizer", 5), ("dynamics", 10 + i)) for s in (1, n)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        score = {"mean": 0.5 + 0.1 * i, "low": 0.4, "high": 1.2}
        (run / "results.json").write_text(json.dumps({} if i == 5 else {"score": score}))
        log = {"log": ["what", "a <bad> end"]} if state == "failed" else {}
        records.add({"name": trial.name, "state": state, "overrides": overrides, "code": 0, **log})
    (tmp_path / "sweep.json").write_text("{}")
    return tmp_path


def test_the_table(directory):
    write_report(SWEEP, directory)
    rows = list(csv.DictReader((directory / "results.csv").open()))
    assert [r["metric"] for r in rows] == ["0.9", "0.8", "0.5", "", "", ""]  # best first
    assert [r["state"] for r in rows] == ["finished"] * 3 + ["failed", "pruned", "finished"]
    best = rows[0]
    assert best["name"] == make_trial(SWEEP, SWEEP.grid[4], directory).name
    assert (best["low"], best["high"], best["seconds"], best["steps"]) == ("0.4", "1.2", "243.5", "19")
    # Every field as the trial had it, set or not: the first one has tiny's own.
    assert [(r[LR], r[K_MAX]) for r in rows[:3]] == [("0.01", "4"), ("0.001", "16"), ("0.001", "16")]
    assert rows[3]["note"] == "a <bad> end" and "no 'score'" in rows[5]["note"]


def test_the_page_needs_no_other_file(directory):
    path = write_report(SWEEP, directory)
    text = path.read_text()
    assert text.count("<tr") == 7 and text.count("<svg") == 3 and "a &lt;bad&gt; end" in text
    assert not re.search(r"https?://|<link|<img|@import|url\((?!#)|\ssrc=", text)
    assert set(re.findall(r"href='([^']+)'", text)) == {f"{name}/report.html" for name in Records(directory).latest}
    assert "Best: 0.9 with lr 0.01, k_max 4." in text
    assert (directory / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_nothing(tmp_path):
    with pytest.raises(UserError, match="no sweep directory"):
        write_report(SWEEP, tmp_path)
    (tmp_path / "sweep.json").write_text("{}")
    assert "Trials: none" in write_report(SWEEP, tmp_path).read_text()
    assert (tmp_path / "results.csv").read_text().startswith("name,state,metric") and collect(SWEEP, tmp_path) == []


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12), st.sampled_from(["min", "max"]))
def test_the_front_against_every_pair(points, goal):
    def beats(a, b):
        better = a[1] >= b[1] if goal == "max" else a[1] <= b[1]
        return a[0] <= b[0] and better and a != b

    expected = {i for i, p in enumerate(points) if not any(beats(q, p) for q in points)}
    found = front(points, goal)
    assert set(found) == expected and len(found) == len(expected)
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


@pytest.mark.parametrize("goal", ["min", "max"])
def test_pictures_of_odd_sweeps(goal):
    sweep = Sweep(Path("x.py"), "tiny", "quick", Metric("dynamics:loss", goal), cost="steps")

    def row(i: int, value: Value | None, **fields) -> Row:
        return Row(f"tiny-{i}", "finished" if value else "failed", value, 10.0 * i, i, fields)

    nothing = [row(0, None, a=1)]
    assert pareto_figure(nothing, sweep) is None and field_figure(nothing, "a", "a", sweep) is None
    assert pareto_figure([row(0, Value(1.0), a=1)], sweep) is not None  # alone, for free
    many = [row(i, Value(float(i)), a=i, b=("x", "y")[i % 2], c=[i], d=True) for i in range(1, 30)]
    assert pareto_figure(many, sweep) is not None and "29 finished" in page(many, sweep)
    assert [field_figure(many, name, name, sweep) is None for name in "abcd"] == [False, False, False, True]
