"""The committed results of the experiments: pages and summaries say what the runs' own numbers say."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import base
from experiments.quickstart_seeds import SHOWN, summarize, tables

RESULTS = Path(__file__).parents[1] / "experiments" / "results"


@pytest.mark.parametrize("size", ["quickstart", "quickstart-full"])
def test_the_quickstarts_page_and_summary_follow_from_its_seeds(size):
    directory = RESULTS / size
    summary = json.loads((directory / "summary.json").read_text())
    kept = [json.loads((directory / f"seed{seed}.json").read_text()) for seed in summary["seeds"]]
    assert summarize(kept) == summary
    page = tables(kept, summary["targets_met"])
    assert page == (directory / "README.md").read_text()
    for k in kept:
        row = next(line for line in page[page.index("Success") :].splitlines() if line.startswith(f"| {k['seed']} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        rates = {p["policy"]: 100 * p["success"]["mean"] for p in k["policies"]}
        assert [cell.split()[0] for cell in cells[1:-1]] == [f"{rates[name]:.1f}" for name in SHOWN]


def test_phase_3_of_another_base_is_trained_anew(tmp_path, monkeypatch):
    """The heads of one world model mean nothing in another: what is kept is known by the weights it began with."""
    opened = []
    monkeypatch.setattr(base, "open_run", lambda path, config, resume: opened.append(path) or path)
    monkeypatch.setattr(base, "run_phase", lambda *_, **__: SimpleNamespace(ema=None))
    monkeypatch.setattr(base, "ImaginationPhase", lambda *_: None)
    monkeypatch.setattr(base.processes, "whole", lambda ema, mesh: ema)
    call, variant = SimpleNamespace(args=SimpleNamespace(runs=tmp_path)), SimpleNamespace(name="pmpo", seed=3)
    for weights in (0.0, 1.0, 0.0):
        run = SimpleNamespace(model=lambda phase, w=weights: np.full(3, w), tokens=lambda: None, mesh=None)
        base.train_imagination(call, run, variant)
    assert opened[0] == opened[2] != opened[1] and all(path.parent == tmp_path for path in opened)
