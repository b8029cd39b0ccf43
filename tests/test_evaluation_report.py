"""The report: complete, partial and damaged runs; charts and videos."""

import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from dreamer4_jax import config
from dreamer4_jax.config import UserError
from dreamer4_jax.evaluation import media, plots
from dreamer4_jax.evaluation.closed_loop import EvalResult, compare
from dreamer4_jax.evaluation.metrics import bootstrap_ci
from dreamer4_jax.evaluation.report import write_report
from dreamer4_jax.evaluation.summary import _cost
from dreamer4_jax.evaluation.worldmodel import score_clips, step_table

SECTIONS = (
    "What was shown",
    "Cost of each phase",
    "Loss curves",
    "Reconstructions",
    "Imagined video",
    "Accuracy against step count",
    "Closed loop",
    "Configuration",
)


def result(name: str, rate: float) -> EvalResult:
    won = np.random.default_rng(0).random(40) < rate
    levels = ("BabyAI-GoToLocal-v0", "BabyAI-OpenDoor-v0") * 20
    return EvalResult(name, levels, won * 0.9, won, np.full(40, 5), np.arange(40), 1.0)


def full_data() -> dict:
    rng = np.random.default_rng(0)
    n, context, t = 3, 2, 5
    symbols = rng.integers(0, 3, (n, context + t, 2, 2))
    frames = np.repeat(np.repeat(symbols[..., None] * np.array([60, 90, 120]), 8, 2), 8, 3).astype(np.uint8)
    score = {
        k: score_clips(
            frames[:, context:],
            np.roll(frames[:, context:], 1, 0),
            real_symbols=symbols[:, context:],
            imagined_symbols=np.roll(symbols[:, context:], 1, 0),
            last_symbols=symbols[:, context - 1],
        )
        for k in (1, 2, 4)
    }
    clip = {"panels": {"real": frames[0], "imagined": frames[1]}, "context": context, "caption": "go <there> & back"}
    return {
        "title": "A run & its <report>",
        "summary": ["It was shown."],
        "numbers": [{"label": "Success", "value": "90 %"}],
        "targets": [
            {"name": "first", "target": "≥ 1", "value": 2.0, "passed": True},
            {"name": "second", "target": "≥ 1", "value": 0.5, "passed": np.bool_(False)},
            {"name": "third", "target": "≥ 1", "passed": None},
        ],
        "phases": [{"name": "tokenizer", "steps": 100, "seconds": 75.0, "parameters": 1234567}],
        "metrics": {"tokenizer": [{"step": i, "loss/mse": 1.0 / (1 + i), "time/step": 3.0} for i in range(50)]},
        "reconstruction": {
            "real": frames[0],
            "reconstructed": frames[1] / 255.0,
            "psnr": bootstrap_ci(rng.normal(40, 1, 20)),
            "symbol_accuracy": {"mean": 0.995, "low": 0.99, "high": 1.0},
        },
        "world_model": {"conditions": [{"name": "true", **score[4].summary()}], "clips": [clip], "steps": 4},
        "steps": {"models": [{"name": "shortcut", "rows": step_table(score, {1: 1.0, 2: 2.0, 4: 4.0})}]},
        "closed_loop": {
            "results": [result("cloned", 0.5), result("imagination", 0.9)],
            "comparisons": [compare(result("imagination", 0.9), result("cloned", 0.5))],
        },
        "config": config.to_dict(config.preset("tiny")),
        "machine": {"device": "cpu"},
        "extra": {"nan": float("nan"), "array": np.arange(2)},
    }


class Checker(html.parser.HTMLParser):
    """Counts elements and checks that those we open are closed in order."""

    VOID = {"meta", "img", "br", "path", "use", "rect"}

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag

    def handle_startendtag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1


def check(page: str) -> dict[str, int]:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker.count


def test_full_report(tmp_path):
    path = write_report(tmp_path / "run", full_data())
    page = path.read_text()
    for name in SECTIONS:
        assert f"<h2>{name}</h2>" in page
    assert "Not in this run" not in page
    assert "1 of 3 met" in page and "1,234,567" in page and "1 min 15 s" in page
    assert "go &lt;there&gt; &amp; back" in page and "<title>A run &amp; its &lt;report&gt;</title>" in page
    count = check(page)
    assert count["img"] == 3 and count["svg"] == 5 and "script" not in count and "link" not in count
    # self-contained: nothing is fetched and no other place is named
    assert not re.search(r"https?:|//[a-z]|@import", re.sub(r'base64,[^"]*', "", page))
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    numbers = json.loads((tmp_path / "run" / "results.json").read_text())
    assert numbers["closed_loop"]["results"][1]["policy"] == "imagination"
    assert numbers["extra"] == {"nan": None, "array": [0, 1]}
    assert (
        "real" not in numbers["reconstruction"] and "clips" not in numbers["world_model"] and "metrics" not in numbers
    )
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["report.html", "results.json"]


def test_partial_report_says_what_is_missing(tmp_path):
    page = write_report(tmp_path, {}).read_text()
    check(page)
    assert page.count("Not in this run") == len(SECTIONS) and all(f"<h2>{n}</h2>" in page for n in SECTIONS)
    data = full_data()
    for key in data:  # each part alone is enough
        page = write_report(tmp_path, {key: data[key]}).read_text()
        check(page)
        assert page.count("Not in this run") >= len(SECTIONS) - 1


def test_loss_curves_come_from_the_run_directory(tmp_path):
    lines = [{"phase": p, "step": i, "loss/mse": 0.5 / (i + 1)} for p in ("tokenizer", "dynamics") for i in range(5)]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"phase": "dyn')  # killed while writing
    page = write_report(tmp_path, {}).read_text()
    assert 'aria-label="losses of tokenizer"' in page and 'aria-label="losses of dynamics"' in page
    log.write_text('{"broken\n{"phase": "tokenizer", "step": 1}\n')
    with pytest.raises(UserError, match="damaged"):
        write_report(tmp_path, {})


def test_unknown_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="'closedloop'"):
        write_report(tmp_path, {"closedloop": {}})
    with pytest.raises(UserError, match="object"):
        write_report(tmp_path, {"extra": object()})


def test_loss_series_choice():
    records = [{"phase": "x", "step": i, "loss": 2.0, "loss/a": 1.0, "eval/psnr": 3.0, "rms": None} for i in range(3)]
    assert list(plots.loss_series(records)) == ["loss/a"]
    assert list(plots.loss_series([{"step": 0, "loss": 1.0, "grad_norm": 2.0}])) == ["loss"]
    assert list(plots.loss_series([{"step": 0, "return": 1.0, "time/s": 2.0}])) == ["return"]
    assert plots.loss_figure("x", [{"step": 0, "loss": float("nan")}]) is None


def test_labels_keep_their_distance():
    out = plots._spread([0.5, 0.5, 0.51, 0.98, 0.99], 0.1, 0.0, 1.0)
    assert np.diff(np.sort(out)).min() > 0.0999 and max(out) <= 1.0 and out[0] < out[1] < out[2]


def test_png_charts():
    figure = plots.success_figure([result("a", 0.5).summary()])
    image = Image.open(io.BytesIO(plots.to_png(figure)))
    assert image.format == "PNG" and image.getpixel((0, 0))[:3] == (255, 255, 255)


@pytest.mark.parametrize("form", ["webp", "gif"])
def test_video(form):
    frames = np.zeros((5, 16, 16, 3), np.uint8)
    frames[:, :, :, 0] = np.arange(5)[:, None, None] * 50
    wrong = np.zeros((5, 2, 2), bool)
    wrong[4, 1, 1] = True
    data = media.video({"real": frames, "imagined": frames}, context=2, scale=4, wrong={"imagined": wrong}, form=form)
    movie = Image.open(io.BytesIO(data))
    assert movie.n_frames == 5 and movie.size == (2 * 64 + media.GAP, 64 + 28)
    movie.seek(4)
    last = np.asarray(movie.convert("RGB")).astype(int)
    tolerance = 0 if form == "webp" else 12  # gif has a palette
    assert abs(last[28 + 8, 8] - [200, 0, 0]).max() <= tolerance
    assert abs(last[-1, -1] - media.WRONG).max() <= tolerance


def test_grids():
    frames = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), np.uint8)
    strip = Image.open(io.BytesIO(media.filmstrip(frames, frames / 255.0, context=2, columns=4)))
    assert strip.width == 4 * (32 + media.GAP) - media.GAP
    pixels = np.asarray(strip)
    np.testing.assert_array_equal(pixels[48:80:2, 0:32:2], frames[1])  # the last context frame stands first
    np.testing.assert_array_equal(pixels[-32::2, -32::2], frames[5])  # and the last imagined frame last
    with pytest.raises(UserError, match="equal shapes"):
        media.grid({"a": frames, "b": frames[:2]})
    with pytest.raises(UserError, match="context = 0"):
        media.filmstrip(frames, frames, context=0)


def test_the_cost_of_a_phase_tells_its_goodput():
    cfg = config.preset("tiny", **{"train.dynamics.steps": 10, "train.dynamics.batch": 4, "train.dynamics.length": 8})
    ledger = {"train": 60.0, "compile": 20.0, "lost": 16.0, "data": 3.8, "save": 0.2}
    cost = _cost(cfg, "dynamics", 100.0, ledger)
    assert cost["note"] == "goodput 60 % (compile 20 s, lost 16 s, data 4 s)"
    assert cost["frames_per_second"] == 10 * 4 * 8 / 100
    assert _cost(cfg, "collect", 5.0, None) == {"name": "collect", "seconds": 5.0}
