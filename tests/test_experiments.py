"""The committed results of the experiments: pages and summaries say what the runs' own numbers say."""

import json
from pathlib import Path

import pytest

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
