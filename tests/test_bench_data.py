"""What `dreamer4 bench data` measures on: made-up datasets that every phase can be read from; its table and errors."""

import json

import numpy as np
import pytest

from dreamer4_jax import bench_data, cli
from dreamer4_jax.config import preset
from dreamer4_jax.data.store import open_dataset
from tests.test_runner import micro


def test_made_up_frames_are_a_dataset_of_the_config(tmp_path):
    wide = preset("tiny", **{"tokenizer.height": 24, "tokenizer.width": 40, "tokenizer.patch": 8,
                             "tokenizer.latents": 15, "tokenizer.pack": 1, "data.chunk": 32})  # fmt: skip
    bench_data.made_up(wide, tmp_path / "frames")
    data = open_dataset(tmp_path / "frames", wide)
    assert data.frames("train") == 2 * data.frames("holdout") and data.rewarded("train").any()
    frames = data.window("train", 0, 64)["frames"]
    changed = (frames[1:] != frames[:-1]).any((1, 2, 3))
    assert changed.mean() > 0.3 and (frames[1:] == frames[:-1]).mean() > 0.8, "something moves, most of it stays"
    packed = sum(e["bytes"] for e in data.manifest["splits"]["train"])
    assert packed < 0.5 * data.frames("train") * data.spec.frame_bytes()


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(bench_data, "machine", lambda: {"device": "cpu", "devices": 1, "matmul_gflops": 1.0})
    monkeypatch.setattr(bench_data, "STEPS", 1)
    monkeypatch.setattr(bench_data, "CHUNKS", 12)


def test_each_source_is_read_with_each_number_of_readers(brief, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_data, "consumed", lambda phase: 100.0)  # to compile a step takes long
    bench_data.main(micro(), phases="tokenizer,dynamics", readers="1,2", seconds=0.05, out=str(tmp_path / "out.json"))
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(r["phase"], r["reads"], r["from"], r["readers"]) for r in rows] == [
        (phase, reads, source, n)
        for phase, reads in (("tokenizer", "frames"), ("dynamics", "tokens"))
        for source in ("memory", "disk")
        for n in (1, 2)
    ]
    for row in rows:
        assert row["delivered_frames_per_s"] > 0 and row["taken_frames_per_s"] == 100
        np.testing.assert_allclose(row["ratio"], row["delivered_frames_per_s"] / 100, atol=0.01)
    shown = capsys.readouterr().out
    assert "micro on 1 x cpu" in shown and shown.count("disk") == shown.count("memory") == 4


@pytest.mark.slow
def test_the_step_of_every_phase_is_timed(brief, tmp_path):
    rows = bench_data.bench(micro(), tmp_path, phases=bench_data.PHASES, readers=(1,), seconds=0.05, progress=False)
    assert [r["phase"] for r in rows[::2]] == list(bench_data.PHASES)
    assert all(r["taken_frames_per_s"] > 0 for r in rows)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--phases", "tokeniser"], "--phases tokeniser: choose of tokenizer, dynamics"),
        (["--readers", "1,none"], "--readers 1,none: must be numbers of at least 1"),
        (["--seconds", "0"], "--seconds 0.0: must be above 0"),
        (["--experiment", "quick"], "unknown experiment or preset 'quick'"),
    ],
)
def test_mistakes_end_in_one_line(words, text, capsys):
    assert cli.main(["bench", "data", *words]) == 2
    assert text in capsys.readouterr().err
