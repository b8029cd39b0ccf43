"""Running sweeps: what is done stays done, whatever dies and when; and what is bad is stopped."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dreamer4_jax.cli import main
from dreamer4_jax.config import ConfigError, UserError
from launch.algebra import chain, product, values
from launch.metric import Metric, MetricError, below_median, smoothed
from launch.spec import RunSpec
from launch.study import Distribution, choice, integers, log_uniform, uniform
from launch.sweep import SweepInterrupted, run
from launch.sweep_file import Sweep, expand, load, trial_name
from launch.sweep_records import Records
from tests import fake_backend

LR = "train.dynamics.lr"
SCORE = Metric("models[name=ours].score", "max")
LOSS = Metric("dynamics:loss", "min")
FILE = f"""
from launch.algebra import values
from launch.metric import Metric
EXPERIMENT = "tiny"
SWEEP = values("{LR}", 0.1, 0.2)
METRIC = Metric("models[name=ours].score", "max")
"""


def grid(*rates: float, **fields) -> Sweep:
    return Sweep(Path("some.py"), "tiny", "quick", SCORE, grid=tuple(values(LR, *rates)), **fields)


def go(sweep: Sweep, directory: Path, **options) -> Records:
    return run(sweep, directory, backend=fake_backend.run, poll=0.02, **{"jobs": 1, **options})


def by_rate(directory: Path) -> dict[float, dict]:
    """The latest record of each learning rate."""
    return {record["overrides"][LR]: record for record in Records(directory).latest.values()}


def starts(directory: Path, rate: float) -> int:
    return len((directory / trial_name("tiny", {LR: rate}) / "starts").read_text())


def steps(directory: Path, rate: float) -> list[int]:
    path = directory / trial_name("tiny", {LR: rate}) / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def plan(directory: Path, **what) -> None:
    (directory.parent / "plan.json").write_text(json.dumps(what))


def until(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


@contextlib.contextmanager
def meanwhile(condition, act):
    """While the block runs: waits until something is so, and then does something."""

    def wait() -> None:
        until(condition)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


def interrupt() -> None:
    """What Ctrl-C and a scheduler do to a sweep that runs in this process."""
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def start_sweep(tmp_path: Path, call: str):
    """Runs a call of a test module's `go` in a process of its own, to be killed; it does not outlive the block."""
    module, _, call = call.partition(":")
    code = f"from pathlib import Path; from tests.{module} import go, grid\nif __name__ == '__main__': go({call})"
    (tmp_path / "script.py").write_text(code)
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, tmp_path / "script.py"], env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


# ---------------------------------------------------------------------------------------------------------------------
# Trials


def test_names_depend_on_the_overrides_alone():
    name = trial_name("tiny", {"a": 1, "b": 0.5})
    assert name == "tiny-" + name[-10:] == trial_name("tiny", {"b": 0.5, "a": 1})
    assert trial_name("tiny", {LR: 3e-3}) == "tiny-660e97ee73"  # forever: run directories are found by it
    assert len({trial_name("tiny", {"a": v}) for v in (1, 1.0, True, "x", [1])}) == 5
    assert RunSpec(trial_name("An_experiment with a very long name, longer than any", {})).name.startswith("an-exper")


def test_trials_of_the_same_config_are_one(tmp_path):
    both = replace(grid(), grid=tuple(chain([{}], values("dynamics.k_max", 16, 8))))  # 16 is what tiny has
    assert [t.overrides for t in expand(both, tmp_path)] == [{}, {"dynamics.k_max": 8}]


def test_every_trial_is_checked_before_any_starts(tmp_path):
    bad = replace(grid(), grid=({LR: 0.1}, {LR: -1.0}))
    with pytest.raises(ConfigError, match=r"trial train\.dynamics\.lr=-1\.0: .*must be above 0"):
        go(bad, tmp_path / "sweep")
    wrong = replace(grid(), grid=(), space={"dynamics.k_max": choice(4, 5)}, trials=3)
    with pytest.raises(ConfigError, match="dynamics.k_max = 5"):
        go(wrong, tmp_path / "sweep")
    with pytest.raises(ConfigError, match="'agents' is no phase"):
        go(grid(0.1, prune=Metric("agents:loss", "min")), tmp_path / "sweep")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_a_metric_is_found_in_results_and_in_metrics(tmp_path):
    results = {
        "a": [{"name": "x.y", "k": 1}, {"name": "z", "k": {"mean": 3, "low": 2, "high": 4}}],
        "word": "no",
        "nan": {"mean": None},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert Metric("a[name=x.y].k", "max").value(tmp_path) == (1.0, None, None)
    assert Metric("a[1].k", "max").value(tmp_path) == (3, 2, 4)
    for path, message in {
        "b": "'b'; choose from a, word, nan",
        "a[name=q].k": "choose from x.y, z",
        "a[7]": "2 entries",
        "word": "no number",
        "nan": "is null and no number",
        "a[0].k.m": "it is 1",
    }.items():
        with pytest.raises(MetricError, match=re.escape(message)):
            Metric(path, "max").value(tmp_path)
    lines = [
        {"phase": p, "step": s, "loss": v} for p, s, v in (("x", 1, 9), ("x", 95, 2), ("x", 100, None), ("y", 7, 1))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    assert Metric("x:loss", "min").curve(tmp_path) == [(1, 9), (95, 2)]
    assert Metric("x:loss", "min").value(tmp_path).mean == 2
    with pytest.raises(MetricError, match="z:loss"):
        Metric("z:loss", "min").value(tmp_path)
    for path in ("", "a..b", "a[b", "a["):
        with pytest.raises(ConfigError):
            Metric(path, "max")
    with pytest.raises(ConfigError, match="'min' or 'max'"):
        Metric("a", "most")


def test_the_median_rule():
    assert smoothed([(50, 9.0), (91, 1.0), (100, 3.0)], 100) == 2.0 and smoothed([(5, 7.0), (100, 1.0)], 50) == 7.0

    def curve(level, last=100):
        return [(s, level) for s in range(10, last + 1, 10)]

    others = [curve(v) for v in (1.0, 2.0, 3.0, 4.0)]
    assert below_median(curve(2.6, 40), others, LOSS, 100) and not below_median(curve(2.4, 40), others, LOSS, 100)
    assert not below_median(curve(2.5, 40), others, LOSS, 100)  # as good as the median
    assert below_median(curve(2.4, 40), others, Metric("x:y", "max"), 100)
    assert not below_median(curve(9.0, 30), others, LOSS, 100)  # too early
    assert not below_median(curve(9.0, 40), others[1:], LOSS, 100)  # too few to compare with
    assert not below_median(curve(9.0, 40), [curve(1.0, 30), *others[1:]], LOSS, 100)  # one of them ended before
    assert not below_median([], others, LOSS, 100)


# ---------------------------------------------------------------------------------------------------------------------
# Going on


def test_what_is_done_is_never_done_again(tmp_path):
    sweep, directory = grid(0.1, 0.2, 0.3), tmp_path / "sweep"
    go(sweep, directory, limit=2)
    assert set(by_rate(directory)) == {0.1, 0.2}
    go(sweep, directory, jobs=3)
    with (directory / "trials.jsonl").open("a") as file:
        file.write('{"name": "cut off')  # by a kill
    assert set(by_rate(directory)) == {0.1, 0.2, 0.3}  # reading mends nothing: a sweep may be writing just now
    assert (directory / "trials.jsonl").read_text().endswith("cut off")
    records = go(grid(0.1, 0.2, 0.3, 0.4), directory)  # a grid may grow
    assert records.count("finished") == 4 and [starts(directory, r) for r in (0.1, 0.2, 0.3, 0.4)] == [1] * 4
    assert len((directory / "trials.jsonl").read_text().splitlines()) == 4
    assert {record["code"] for record in by_rate(directory).values()} == {0}
    with pytest.raises(UserError, match="another sweep: experiment is 'tiny' there and 'small' here"):
        go(replace(sweep, experiment="small"), directory)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        go(sweep, tmp_path / "other")


def test_a_failed_trial_is_recorded_and_tried_again(tmp_path):
    directory = tmp_path / "sweep"
    plan(directory, fail=[0.2], refuse=[0.3])
    records = go(grid(0.1, 0.2, 0.3, 0.4), directory, jobs=2)
    found = by_rate(directory)
    assert {rate: record["state"] for rate, record in found.items()} == {
        0.1: "finished",
        0.2: "failed",
        0.3: "failed",
        0.4: "finished",
    }
    assert found[0.2]["code"] == 3 and found[0.2]["log"] == ["starting", "loss is not finite at 0.2"]
    assert found[0.3]["code"] == 2 and found[0.3]["log"] == ["dreamer4: no such data"] and records.count("failed") == 2
    plan(directory)
    assert go(grid(0.1, 0.2, 0.3, 0.4), directory).count("finished") == 4
    assert [starts(directory, r) for r in (0.1, 0.2, 0.3, 0.4)] == [1, 2, 2, 1]
    assert steps(directory, 0.2) == list(range(1, fake_backend.STEPS + 1))


def test_an_interrupted_sweep_goes_on(tmp_path):
    directory = tmp_path / "sweep"
    plan(directory, wait={"0.2": 4})

    with (
        meanwhile(lambda: steps(directory, 0.2)[-1:] == [4], interrupt),
        pytest.raises(SweepInterrupted, match="1 of 3"),
    ):
        go(grid(0.1, 0.2, 0.3), directory)
    assert by_rate(directory)[0.2] | {"name": ""} == {
        "name": "",
        "state": "interrupted",
        "overrides": {LR: 0.2},
        "code": 42,
    }
    (tmp_path / "go").touch()
    assert go(grid(0.1, 0.2, 0.3), directory).count("finished") == 3
    assert [starts(directory, r) for r in (0.1, 0.2, 0.3)] == [1, 2, 1]
    assert steps(directory, 0.2) == list(range(1, fake_backend.STEPS + 1))


def test_trials_that_were_interrupted_by_themselves_are_said_and_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("sweep.py").write_text(FILE)
    from launch import sweep as sweeps

    monkeypatch.setattr(sweeps, "run", lambda sweep, directory, **options: go(sweep, directory, **options))
    directory = Path("runs/sweep-sweep")
    directory.parent.mkdir()
    plan(directory, interrupt=[0.2])
    assert main(["sweep", "sweep.py", "--jobs", "1"]) == 42
    assert "1 trials were interrupted; the same command goes on with runs/sweep-sweep" in capsys.readouterr().err
    assert {rate: r["state"] for rate, r in by_rate(directory).items()} == {0.1: "finished", 0.2: "interrupted"}
    assert main(["sweep", "sweep.py", "--limit", "1"]) == 0  # that one is none of the first trial's sweep
    assert main(["sweep", "sweep.py", "--jobs", "1"]) == 0
    assert [starts(directory, r) for r in (0.1, 0.2)] == [1, 2]
    assert steps(directory, 0.2) == list(range(1, fake_backend.STEPS + 1))


def test_a_killed_sweep_goes_on(tmp_path):
    """kill -9 in the middle of a trial: the trial notices, saves and ends; the next sweep waits for it and resumes."""
    directory = tmp_path / "sweep"
    plan(directory, wait={"0.2": 4})
    with start_sweep(tmp_path, f"test_sweep_run:grid(0.1, 0.2, 0.3), Path({str(directory)!r})"):
        until(lambda: steps(directory, 0.2)[-1:] == [4])
        with pytest.raises(UserError, match="another process"):
            go(grid(0.1, 0.2, 0.3), directory)
    assert set(by_rate(directory)) == {0.1}
    plan(directory)
    assert go(grid(0.1, 0.2, 0.3), directory).count("finished") == 3
    assert [starts(directory, r) for r in (0.1, 0.2, 0.3)] == [1, 2, 1]
    assert steps(directory, 0.2) == list(range(1, fake_backend.STEPS + 1))


def test_a_bad_trial_is_stopped_and_stays_so(tmp_path):
    directory, rates = tmp_path / "sweep", (0.1, 0.2, 0.3, 0.4, 0.9, 0.05)
    # Trials that wait, so that they are looked at in time; 0.05 goes on by itself once 0.9 has been stopped.
    plan(directory, wait={"0.9": 9})
    sweep = grid(*rates, prune=LOSS)
    sweep = replace(sweep, grid=tuple(product(list(sweep.grid), values("train.dynamics.steps", fake_backend.STEPS))))
    go(sweep, directory)
    states = {rate: record["state"] for rate, record in by_rate(directory).items()}
    assert states == dict.fromkeys(rates, "finished") | {0.9: "pruned"}
    (tmp_path / "go").touch()
    go(sweep, directory)
    name = next(r["name"] for r in Records(directory).latest.values() if r["overrides"][LR] == 0.9)
    assert (directory / name / "starts").read_text() == "x" and not (directory / name / "results.json").exists()


def test_a_metric_that_is_not_there_is_said(tmp_path, capsys):
    go(replace(grid(0.1), metric=Metric("models[name=theirs].score", "max")), tmp_path / "sweep")
    assert "choose from ours" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Search


def search(**space: Distribution) -> Sweep:
    space = {f"train.dynamics.{name}": spec for name, spec in space.items()}
    return Sweep(Path("some.py"), "tiny", "quick", SCORE, space=space, trials=4)


def test_distributions_are_checked():
    for wrong in (
        lambda: uniform(2, 1),
        lambda: log_uniform(0, 1),
        lambda: choice(),
    ):
        with pytest.raises(ConfigError):
            wrong()
    assert integers(1, 3).corners == (1, 3) and choice(4, 8, 16).corners == (4, 8, 16)


def test_a_search_is_the_same_whether_interrupted_or_not(tmp_path):
    pytest.importorskip("optuna")
    sweep = search(lr=log_uniform(1e-3, 1), batch=choice(4, 8))
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole, parts = tmp_path / "whole" / "sweep", tmp_path / "parts" / "sweep"
    go(sweep, whole)
    go(sweep, parts, limit=2)
    third = list(by_rate(whole))[2]
    plan(parts, wait={str(third): 4})

    def waits() -> bool:
        return any(steps_of(p)[-1:] == [4] for p in parts.glob("*/metrics.jsonl"))

    with meanwhile(waits, interrupt), pytest.raises(SweepInterrupted):
        go(sweep, parts)
    plan(parts)
    go(sweep, parts)
    assert list(Records(parts).latest) == list(Records(whole).latest)
    assert Records(parts).count("finished") == 4 == len(Records(parts).latest)
    resumed = next(name for name, r in Records(parts).latest.items() if r["overrides"][LR] == third)
    assert {p.parent.name: p.read_text() for p in parts.glob("*/starts")} == {
        name: "xx" if name == resumed else "x" for name in Records(whole).latest
    }


def test_a_search_goes_on_with_what_was_interrupted_by_itself(tmp_path):
    pytest.importorskip("optuna")
    directory = tmp_path / "sweep"
    sweep = search(lr=choice(0.1, 0.2))
    plan(directory, interrupt=[0.2])
    with pytest.raises(SweepInterrupted, match="1 trials were interrupted"):
        go(sweep, directory)
    assert go(sweep, directory).count("finished") == 2
    assert starts(directory, 0.1) == 1 and starts(directory, 0.2) == 2


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_search_learns_of_failures_and_does_not_repeat_them(tmp_path):
    pytest.importorskip("optuna")
    directory = tmp_path / "sweep"
    # Two configs in all, one of which fails: the numbers of the study share their runs.
    sweep = search(lr=choice(0.1, 0.2))
    plan(directory, fail=[0.2])
    go(sweep, directory, jobs=2)
    plan(directory)
    go(sweep, directory)
    assert {rate: record["state"] for rate, record in by_rate(directory).items()} == {0.1: "finished", 0.2: "failed"}
    assert starts(directory, 0.1) == starts(directory, 0.2) == 1


def test_a_search_goes_past_configs_that_cannot_work(tmp_path):
    pytest.importorskip("optuna")
    # tiny's data come in chunks of 64 frames, and k_max alone may be 2 or 16; sample_steps only up to k_max.
    space = {LR: uniform(0.1, 0.2), "dynamics.k_max": choice(4, 16), "agent.sample_steps": choice(4, 16)}
    sweep = replace(search(), space=space, trials=6)
    records = go(sweep, tmp_path / "sweep")
    bad = [
        r for r in records.latest.values() if r["overrides"]["agent.sample_steps"] > r["overrides"]["dynamics.k_max"]
    ]
    assert bad and all(r["state"] == "failed" and "power of two up to" in r["log"][0] for r in bad)
    assert records.count("finished") == 6 - len(bad)
    from launch.sweep_report import collect

    assert [row.state for row in collect(sweep, tmp_path / "sweep")].count("failed") == len(bad)


def test_optunas_pruner_stops_a_trial(tmp_path):
    pytest.importorskip("optuna")
    from launch.study import Study

    # The series and the metric go opposite ways.
    score = Metric("score", "max")
    study = Study({LR: uniform(0, 1)}, score, LOSS, 30, tmp_path / "study.db", seed=0)
    for level in (1.0, 2.0, 3.0, 4.0):
        number, _ = study.ask()
        assert not study.prune(number, [(s, level) for s in (5, 15, 25)])
        study.tell(number, "finished", level)
    number, overrides = study.ask()
    # As after a restart: the trial is known by its number alone, and its first steps were reported before.
    assert not study.prune(number, [(5, 9.0)])
    study = Study({LR: uniform(0, 1)}, score, LOSS, 30, tmp_path / "study.db", seed=0)
    assert study.running() == {number: overrides} and len(study) == 5
    assert study.prune(number, [(5, 9.0), (15, 9.0)])
    study.tell(number, "pruned")
    assert study.running() == {}
    number, _ = study.ask()
    assert not study.prune(number, [(5, 1.5), (15, 1.5)])


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'dreamer4_jax\[sweep\]'"):
        go(search(lr=uniform(0.1, 0.2)), tmp_path / "sweep")


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("EXPERIMENT = 'tiny'", "either SWEEP"),
        (FILE.replace("EXPERIMENT", "EXPERIMENTS"), "has no EXPERIMENT"),
        (FILE + "SWEEP = 3", "SWEEP = 3: must be a list"),
        (FILE + "SWEEP = []", "at least one trial"),
        (FILE + "SIZE = 'huge'", "sizes belong to experiments"),
        (FILE + "PRUNE = METRIC", "must be a series"),
        (FILE + "COST = 'money'", "'seconds' or 'steps'"),
        (FILE.replace("'", '"').replace(LR, "train.dynamics.speed"), "unknown config field"),
        (FILE + "x = value(1)", "sweep.py:7: NameError"),
        (FILE + "x = = 1", "sweep.py:7: SyntaxError"),
        (FILE + "SWEEP = values('a', None)", "no value of a config field"),
        (FILE.replace("tiny", "nothing"), "unknown experiment or preset"),
    ],
)
def test_a_bad_file_ends_with_one_line_and_2(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    Path("sweep.py").write_text(text)
    assert main(["sweep", "sweep.py"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dreamer4: ") and error.count("\n") == 1 and message in error
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.py"]


def test_bad_arguments_exit_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("sweep.py").write_text(FILE)
    for argv in (["nowhere"], ["nowhere.py"], ["sweep.py", "--report"]):
        assert main(["sweep", *argv]) == 2
    assert "shortcut_steps" in capsys.readouterr().err
    for argv in (["sweep.py", "--jobs", "0"], ["sweep.py", "--limit", "-1"], ["sweep.py", "--dry-run", "--report"]):
        with pytest.raises(SystemExit) as end:
            main(["sweep", *argv])
        assert end.value.code == 2


def test_a_dry_run_prints_commands_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "shortcut_steps", "--dry-run", "--limit", "2", "--out", "here"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(
        re.match(r"dreamer4 run quickstart --smoke --run here/quick.* --resume ", x) for x in lines
    )
    assert list(tmp_path.iterdir()) == [] and len(expand(load("shortcut_steps"), tmp_path)) == 9


def test_the_command_runs_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("sweep.py").write_text(FILE)
    from launch import sweep as sweeps

    monkeypatch.setattr(sweeps, "run", lambda sweep, directory, **options: go(sweep, directory, **options))
    Path("runs").mkdir()
    plan(Path("runs/sweep-sweep"), fail=[0.2])
    assert main(["sweep", "sweep.py", "--jobs", "2"]) == 1
    out, err = capsys.readouterr()
    assert out.strip() == "runs/sweep-sweep/sweep.html" and "1 trials failed" in err
    plan(Path("runs/sweep-sweep"))
    assert main(["sweep", "sweep.py"]) == 0 and main(["sweep", "sweep.py", "--report"]) == 0
    assert sorted(p.name for p in Path("runs/sweep-sweep").iterdir() if p.is_file()) == [
        *("lock", "pareto.png", "results.csv", "sweep.html", "sweep.json", "trials.jsonl"),
    ]
