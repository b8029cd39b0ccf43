"""The report of a run: one self-contained HTML page, and the same numbers as results.json.

`write_report(run_dir, data)` takes a dictionary of plain values and arrays. Every key is optional: a section without
data says so in one line, so a run that was interrupted gets a report as well. An *interval* is
``{"mean": float, "low": float, "high": float}`` (or an `Interval`), None where nothing could be measured.

::

    title          str
    summary        str or [str]: what was shown, in sentences
    numbers        [{"label": str, "value": str, "note": str}]      large figures at the top; note is optional
    targets        [{"name": str, "target": str, "value": str or float, "passed": bool or None}]   None: not measured
    phases         [{"name": str, "steps": int, "seconds": float, "parameters": int, "frames_per_second": float,
                     "note": str}]                                  what each phase cost; any key but name may be absent
    metrics        {phase: [{"step": int, "loss/...": float, ...}]} loss curves; default: run_dir/metrics.jsonl
    reconstruction {"real": frames [n,H,W,3], "reconstructed": frames [n,H,W,3],
                    "psnr", "ssim", "symbol_accuracy": interval, "frames": int,
                    "perceptual": {network: interval}}              optional
    world_model    {"conditions": [{"name": str, **worldmodel.evaluate_clips(...)}],     e.g. true and shuffled actions
                    "clips": [{"panels": {"real": frames [T,H,W,3], "imagined": ...}, "context": int, "caption": str,
                               "wrong": {panel: bool [T,rows,columns]}}],                wrong: optional outlines
                    "steps": int}                                   K of the clips
    steps          {"models": [{"name": str, "rows": worldmodel.step_table(...)}], "device": str}
    closed_loop    {"results": [EvalResult or its summary()], "comparisons": [closed_loop.compare(...)],
                    "highlight": [policy names]}
    config         dict (config.to_dict)
    machine        {str: value}: device, versions, date, ...
    extra          any JSON value: goes to results.json only

results.json holds all of it without frames, clips and loss curves; NaN and infinities become null.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dreamer4_jax.config import UserError
from dreamer4_jax.evaluation import media, plots, tags
from dreamer4_jax.evaluation.closed_loop import EvalResult
from dreamer4_jax.evaluation.page import STYLE
from dreamer4_jax.training.metrics import read_metrics

KEYS = frozenset(
    "title summary numbers targets phases metrics reconstruction world_model steps closed_loop config machine "
    "extra".split()
)


# ---------------------------------------------------------------------------------------------------------------------
# Sections: each returns HTML, or None when its data is missing


def _headline(data: Mapping[str, Any]) -> str | None:
    summary = data.get("summary") or []
    parts = [f"<p class=lead>{tags.text(s)}</p>" for s in ([summary] if isinstance(summary, str) else summary)]
    numbers = data.get("numbers") or []
    if numbers:
        cards = "".join(
            f"<div class=card><div class=label>{tags.text(n['label'])}</div>"
            f"<div class=value>{tags.number(n['value'])}</div>"
            f"<div class=note>{tags.text(n.get('note', ''))}</div></div>"
            for n in numbers
        )
        parts.append(f"<div class=cards>{cards}</div>")
    targets = data.get("targets") or []
    if targets:
        marks = {
            True: "<b class=pass>✓ met</b>",
            False: "<b class=fail>✗ missed</b>",
            None: "<b class=open>open</b>",
        }
        rows = [
            (marks[_flag(t.get("passed"))], tags.text(t["name"]), tags.text(t["target"]), tags.number(t.get("value")))
            for t in targets
        ]
        met = sum(_flag(t.get("passed")) is True for t in targets)
        parts.append(f"<h3>Targets: {met} of {len(targets)} met</h3>")
        parts.append(tags.table(("Result", "Target", "Wanted", "Measured"), rows, words=True))
    return "".join(parts) or None


def _flag(value: Any) -> bool | None:
    return None if value is None else bool(value)


def _phases(data: Mapping[str, Any]) -> str | None:
    phases = data.get("phases")
    if not phases:
        return None
    columns = (
        ("steps", "Steps", tags.number),
        ("seconds", "Time", tags.duration),
        ("parameters", "Parameters", tags.number),
        ("frames_per_second", "Frames/s", tags.number),
        ("note", "", lambda v: tags.text(v or "")),
    )
    shown = [c for c in columns if any(p.get(c[0]) is not None for p in phases)]
    rows = [[tags.text(p["name"]), *(form(p.get(key)) for key, _, form in shown)] for p in phases]
    seconds = [p["seconds"] for p in phases if p.get("seconds") is not None]
    if len(seconds) > 1:
        rows.append(
            ["<b>all</b>", *(f"<b>{tags.duration(sum(seconds))}</b>" if k == "seconds" else "" for k, *_ in shown)]
        )
    return tags.table(["Phase", *(title for _, title, _ in shown)], rows)


def _losses(data: Mapping[str, Any], metrics: Mapping[str, Any]) -> str | None:
    charts = [tags.chart(plots.loss_figure(name, records), f"losses of {name}") for name, records in metrics.items()]
    return f"<div class=charts>{''.join(charts)}</div>" if any(charts) else None


def _reconstruction(data: Mapping[str, Any]) -> str | None:
    r = data.get("reconstruction")
    if not r:
        return None
    parts = []
    rows = [
        (title, tags.interval(r[key], scale, digits))
        for key, title, scale, digits in (
            ("symbol_accuracy", "Symbol accuracy, %", 100, 2),
            ("psnr", "PSNR, dB", 1, 2),
            ("ssim", "SSIM", 1, 4),
        )
        if r.get(key) is not None
    ]
    rows += [(f"{tags.text(name)} distance", tags.interval(v, 1, 4)) for name, v in (r.get("perceptual") or {}).items()]
    if rows:
        frames = f"{tags.number(r['frames'])} held-out frames; " if r.get("frames") is not None else ""
        distances = (
            " Distances in the features of the named networks, on a part of the frames: they compare with each other "
            "alone."
            if r.get("perceptual")
            else " No perceptual distance: pip install 'dreamer4_jax[metrics]'."
        )
        parts.append(
            tags.table(("Metric", "Mean and 95 % interval"), rows, f"{frames}95 % bootstrap intervals.{distances}")
        )
    if r.get("real") is not None and r.get("reconstructed") is not None:
        picture = media.grid({"real": r["real"], "reconstructed": r["reconstructed"]})
        parts.append(
            f"<figure class=wide>{tags.image(picture, 'png', 'real frames above their reconstructions')}</figure>"
        )
    return "".join(parts) or None


def _world_model(data: Mapping[str, Any]) -> str | None:
    w = data.get("world_model")
    if not w:
        return None
    parts = []
    conditions = w.get("conditions") or []
    if conditions:
        columns: tuple[tuple[str, str, float, int], ...] = (
            ("Symbols %", "symbol_accuracy", 100, 2),
            ("Repeat %", "repeat_accuracy", 100, 2),
            ("Changed %", "changed_accuracy", 100, 1),
            ("Repeat, changed %", "repeat_changed_accuracy", 100, 1),
            ("PSNR dB", "psnr", 1, 2),
            ("SSIM", "ssim", 1, 3),
        )
        symbols = "symbol_accuracy" in conditions[0]["average"]
        columns = columns if symbols else columns[4:]
        rows = []
        for c in conditions:
            frames = [("all", c["average"]), *((str(h["horizon"]), h) for h in c["horizons"])]
            for i, (name, m) in enumerate(frames):
                cells = (tags.interval(m.get(key), scale, digits) for _, key, scale, digits in columns)
                rows.append((f"<b>{tags.text(c['name'])}</b>" if i == 0 else "", name, *cells))
        head = ("Actions", "Frame", *(title for title, *_ in columns))
        tiles = (
            " Repeat: the last context frame, on the same tiles. Changed: tiles that differ from the last context "
            "frame or from the frame before."
        )
        note = (
            f"{conditions[0]['clips']} held-out clips.{tiles if symbols else ''} 95 % bootstrap intervals over their "
            "episodes."
        )
        parts.append(tags.chart(plots.horizon_figure(conditions), "symbol accuracy on changed tiles by imagined frame"))
        parts.append(tags.table(head, rows, note))
    clips = w.get("clips") or []
    if clips:
        steps = f", K = {w['steps']}" if w.get("steps") is not None else ""
        parts.append(f"<h3>Real and imagined{steps}</h3><div class=clips>")
        for clip in clips:
            caption = tags.text(clip.get("caption", ""))
            movie = media.video(clip["panels"], context=int(clip.get("context", 0)), wrong=clip.get("wrong"))
            alt = " | ".join(clip["panels"])
            parts.append(f"<figure>{tags.image(movie, 'webp', alt)}<figcaption>{caption}</figcaption></figure>")
        parts.append("</div>")
        first = clips[0]
        names = list(first["panels"])
        if len(names) >= 2 and int(first.get("context", 0)) > 0:
            strip = media.filmstrip(first["panels"][names[0]], first["panels"][names[1]], context=int(first["context"]))
            parts.append(f"<figure class=wide>{tags.image(strip, 'png', 'filmstrip of the first clip')}</figure>")
    return "".join(parts) or None


def _steps(data: Mapping[str, Any]) -> str | None:
    s = data.get("steps")
    if not s or not s.get("models"):
        return None
    models = s["models"]
    symbols = any(r.get("symbol_accuracy") is not None for m in models for r in m["rows"])
    metric, title = ("symbol_accuracy", "Symbol accuracy (%)") if symbols else ("psnr", "PSNR (dB)")
    charts = [
        tags.chart(plots.steps_figure(models, metric, title), f"{title} against sampling steps"),
        tags.chart(plots.latency_figure(models), "time per frame against sampling steps"),
    ]
    scale, unit = (100, "points") if symbols else (1, "dB")
    tiles = {"Symbols %": ("symbol_accuracy", 2), "Changed %": ("changed_accuracy", 1)} if symbols else {}
    rows = []
    for m in models:
        for i, r in enumerate(m["rows"]):
            rows.append(
                (
                    f"<b>{tags.text(m['name'])}</b>" if i == 0 else "",
                    tags.number(r["steps"]),
                    *(tags.interval(r.get(name), 100, digits) for name, digits in tiles.values()),
                    tags.interval(r.get("psnr")),
                    tags.interval(r.get("ssim"), 1, 3),
                    tags.number(r.get("milliseconds")),
                    tags.interval(r.get("minus_largest"), scale, 2, signed=True),
                )
            )
    head = ("Model", "K", *tiles, "PSNR dB", "SSIM", "ms/frame", f"vs largest K, {unit}")
    device = f"Time on {tags.text(s['device'])}. " if s.get("device") else ""
    note = f"{device}Averages over the imagined frames; 95 % bootstrap intervals over episodes, the last column paired."
    return f"<div class=charts>{''.join(charts)}</div>" + tags.table(head, rows, note)


def _closed_loop(data: Mapping[str, Any]) -> str | None:
    c = data.get("closed_loop")
    if not c or not c.get("results"):
        return None
    results = [r.summary() if isinstance(r, EvalResult) else r for r in c["results"]]
    highlight = c.get("highlight") or ()
    # An environment need not say what success is: then there are returns alone, of whatever size its rewards are.
    known = all(r["success"] for r in results)
    digits = 3 if max(abs(r["return"][end]) for r in results for end in ("low", "high")) < 10 else 1
    if known:
        parts = [tags.chart(plots.success_figure(results, highlight), "success rate of each policy")]
    else:
        parts = [tags.chart(plots.return_figure(results, highlight), "return of each policy")]
    rows = [
        (
            tags.text(r["policy"]),
            *([tags.interval(r["success"], 100, 1)] if known else []),
            tags.interval(r["return"], 1, digits),
            tags.interval(r["length"], 1, 1),
            tags.number(r["episodes"]),
        )
        for r in results
    ]
    parts.append(
        tags.table(
            ("Policy", *(["Success %"] if known else []), "Return", "Length", "Episodes"),
            rows,
            "The same seeded episodes for every policy; 95 % bootstrap intervals, stratified by level.",
        )
    )
    comparisons = c.get("comparisons") or []
    if comparisons:
        differences = [
            (
                f"{tags.text(d['first'])} − {tags.text(d['second'])}",
                *([tags.interval(d["success"], 100, 1, signed=True)] if known else []),
                tags.interval(d["return"], 1, digits, signed=True),
            )
            for d in comparisons
        ]
        head = ("Paired difference", *(["Success, points"] if known else []), "Return")
        parts.append(tags.table(head, differences))
    levels = list(dict.fromkeys(name for r in results for name in r.get("levels", {})))
    if levels:
        measure, title, form = ("success", "Success by level, %", (100, 1)) if known else (
            "return", "Return by level", (1, digits)
        )  # fmt: skip
        by_level = [
            (tags.text(r["policy"]), *(tags.interval(r["levels"].get(n, {}).get(measure), *form) for n in levels))
            for r in results
        ]
        parts.append(f"<h3>{title}</h3>" + tags.table(("Policy", *map(_short_level, levels)), by_level))
    return "".join(parts)


def _short_level(name: str) -> str:
    return name.removeprefix("BabyAI-").removesuffix("-v0")


def _config(data: Mapping[str, Any]) -> str | None:
    parts = []
    if data.get("machine"):
        parts.append(tags.table(("Machine", ""), [(tags.text(k), tags.number(v)) for k, v in data["machine"].items()]))
    if data.get("config"):
        text = tags.text(json.dumps(plain(data["config"]), indent=2))
        parts.append(f"<details><summary>Show the whole configuration</summary><pre>{text}</pre></details>")
    return "".join(parts) or None


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _metrics(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of the run's metrics.jsonl by phase, in order."""
    try:
        records = read_metrics(run_dir)
    except json.JSONDecodeError as error:
        raise UserError(f"{run_dir / 'metrics.jsonl'} is damaged: {error}; mend or remove it") from None
    out: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        out.setdefault(record["phase"], []).append(record)
    return out


def plain(value: Any) -> Any:
    """`value` as JSON types: NumPy unpacked, NaN and infinities None, results as their summaries."""
    if isinstance(value, EvalResult):
        return plain(value.summary())
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise UserError(f"report data holds a {type(value).__name__}: use plain values, NumPy arrays or EvalResult")


def results_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a report's data: everything but frames, clips and loss curves."""
    out = {k: v for k, v in data.items() if k != "metrics"}
    if data.get("reconstruction"):
        out["reconstruction"] = {k: v for k, v in data["reconstruction"].items() if k not in ("real", "reconstructed")}
    if data.get("world_model"):
        out["world_model"] = {k: v for k, v in data["world_model"].items() if k != "clips"}
    return plain(out)


def _write(path: Path, text: str) -> None:
    """Replaces `path` in one step, so that a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_report(run_dir: str | os.PathLike[str], data: Mapping[str, Any]) -> Path:
    """Writes report.html and results.json into `run_dir` and returns the page's path. `data`: the module docstring."""
    unknown = sorted(set(data) - KEYS)
    if unknown:
        raise UserError(f"report data {unknown[0]!r}: unknown key; choose from {', '.join(sorted(KEYS))}")
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    given = data.get("metrics")
    metrics = _metrics(folder) if given is None else given
    sections = (
        ("What was shown", _headline(data), "no summary or targets were given"),
        ("Cost of each phase", _phases(data), "no phase has finished"),
        ("Loss curves", _losses(data, metrics), "no metrics were recorded"),
        ("Reconstructions", _reconstruction(data), "the tokenizer was not evaluated"),
        ("Imagined video", _world_model(data), "the world model was not evaluated"),
        ("Accuracy against step count", _steps(data), "step counts were not compared"),
        ("Closed loop", _closed_loop(data), "no policy was evaluated in the real environment"),
        ("Configuration", _config(data), "no configuration was given"),
    )
    title = tags.text(data.get("title") or folder.resolve().name)
    body, links = [], []
    for name, content, absent in sections:
        anchor = name.lower().replace(" ", "-")
        links.append(f"<a href='#{anchor}'>{name}</a>")
        inner = content or f"<p class=absent>Not in this run: {absent}.</p>"
        body.append(f"<section id='{anchor}'><h2>{name}</h2>{inner}</section>")
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        "<meta name=color-scheme content='light dark'>"
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{title}</h1><nav>{''.join(links)}</nav></header><main>{''.join(body)}</main></body></html>"
    )
    _write(folder / "results.json", json.dumps(results_json(data), indent=1) + "\n")
    _write(folder / "report.html", page)
    return folder / "report.html"
