"""What every experiment with a question must keep, whoever adds one: found by itself, and run at its smoke size."""

import importlib
import json
import subprocess
import sys

import pytest

from dreamer4_jax.evaluation.metrics import Interval
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


def having(rows, key):
    return [row for row in rows if key in row]


def looks(rows):
    return list(dict.fromkeys(row["look"] for row in rows))


def first_seed(rows):
    return [row for row in rows if row["seed"] == rows[0]["seed"]]


def scaling_parts(m, rows):
    swept, learned = having(rows, "sweep"), having(rows, "training_gflop")
    return (m.exponents(swept), m.theory(swept), swept, learned), (swept, learned)


def jumping_parts(m, rows):
    parts = having(rows, "total"), having(rows, "growth"), having(rows, "program")
    return parts, parts


def label_parts(m, rows):
    found = m.summarise(rows, m.SIZES["laptop"]["shares"], looks(rows))
    return (found, rows, looks(rows)), (found,)


# Study -> name of what tells its rows, and its arguments and those of `draw`; no `draw` where it wants more than rows.
TOLD = {
    "attention_scaling": ("finding", scaling_parts),
    "bootstrap_mix": ("found", lambda m, rows: ((rows, m.compare(rows)), (rows,))),
    "cascade": ("finding", lambda m, rows: ((rows,), (rows,))),
    "label_efficiency": ("finding", label_parts),
    "perceptual": ("tell", lambda m, rows: ((rows, m.compare(rows)), (rows,))),
    "pmpo": ("describe", lambda m, rows: ((rows,), (rows,))),
    "pointer_jumping": ("finding", jumping_parts),
    "room_graph": ("describe", lambda m, rows: ((rows,), None)),
    "search": ("describe", lambda m, rows: ((first_seed(rows),), (first_seed(rows),))),
    "step_count": ("finding", lambda m, rows: ((rows,), (rows,))),
    "transition_graph": ("describe", lambda m, rows: ((rows,), None)),
}


class Read(Interval):
    """An interval that was read from JSON: with the names that it has there, too."""

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)


def intervals(tree):
    """JSON with its intervals as what they were when they were told."""
    if isinstance(tree, list):
        return [intervals(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return Read(**tree) if set(tree) == set(Interval._fields) else {k: intervals(v) for k, v in tree.items()}


@pytest.mark.parametrize("tree", load(), ids=lambda tree: tree["directory"].name)
def test_committed_text_and_figure_follow_from_the_committed_rows(tree):
    """What the laptop size measures, and the smoke size leaves out, is still told and drawn as it is committed."""
    study, rows = module(tree["name"]), intervals(tree["rows"])
    teller, parts = TOLD[tree["name"]]
    told, drawn = parts(study, rows)
    assert getattr(study, teller)(*told) == tree["finding"]
    if drawn:
        assert study.draw(*drawn).axes


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
