"""What every experiment with a question must keep, whoever adds one: found by itself, and run at its smoke size."""

import importlib
import json
import subprocess
import sys

import pytest

from dreamer4_jax.evaluation.study import ROOT, SIZES, load, studies


def module(name):
    return importlib.import_module(f"experiments.{name}")


@pytest.mark.parametrize("name", studies())
def test_a_study_says_what_it_asks_and_how_it_is_run(name):
    study, doc = module(name).STUDY, module(name).__doc__
    assert study.name == name and study.question.endswith("?") and study.claim
    assert f"python -m experiments.{name}" in doc and "minute" in doc, "the docstring has the command and its duration"


@pytest.mark.parametrize("tree", load(), ids=lambda tree: tree["directory"].name)
def test_committed_results_are_of_a_study_that_asks_the_same(tree):
    study = module(tree["name"]).STUDY
    assert (tree["question"], tree["claim"]) == (study.question, study.claim)
    assert tree["size"] in SIZES and tree["rows"] and tree["finding"] and tree["seeds"]
    assert (tree["directory"] / tree["figure"]).exists()


def test_committed_text_and_figures_follow_from_the_committed_rows():
    """What the laptop size measures, and the smoke size leaves out, is still told and drawn as it is committed."""
    trees = {tree["name"]: tree for tree in load()}
    for name in ("cascade", "step_count"):
        rows = trees[name]["rows"]
        assert module(name).finding(rows) == trees[name]["finding"], name
        assert module(name).draw(rows).axes
    scaling, tree = module("attention_scaling"), trees["attention_scaling"]
    rows = [r for r in tree["rows"] if "sweep" in r]
    learned = [r for r in tree["rows"] if "training_gflop" in r]
    found = scaling.finding(scaling.exponents(rows), scaling.theory(rows), rows, learned)
    assert found == tree["finding"] and scaling.draw(rows, learned).axes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What the studies share: the smoke size's tokenizer, dynamics and agent are trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
@pytest.mark.parametrize("name", studies())
def test_the_smoke_size_runs(name, tmp_path, runs):
    where = ["--out", str(tmp_path / "out"), "--runs", str(runs)]
    subprocess.run([sys.executable, "-m", f"experiments.{name}", "--size", "smoke", *where], check=True, cwd=ROOT)
    tree = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert tree["rows"] and tree["finding"] and (tmp_path / "out" / tree["figure"]).exists()
