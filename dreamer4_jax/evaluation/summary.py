"""What a run showed: gathers its measurements, judges them against the targets, and writes the report."""

import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dreamer4_jax import __version__
from dreamer4_jax.config import Config, to_dict
from dreamer4_jax.evaluation import report
from dreamer4_jax.evaluation.closed_loop import EvalResult, compare
from dreamer4_jax.evaluation.rollouts import FINETUNED, REPEATED
from dreamer4_jax.presets import BASELINES
from dreamer4_jax.training.metrics import read_ledger

CLONED, IMAGINED = "phase 2 (cloning)", "phase 3 (imagination)"


def machine() -> dict[str, Any]:
    """What a result was measured on."""
    return {
        "device": str(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "dreamer4_jax": __version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _row(rows: Sequence[Mapping[str, Any]], steps: int) -> Mapping[str, Any]:
    return next(r for r in rows if r["steps"] == steps)


def _percent(interval: Mapping[str, float] | None) -> str:
    return f"{100 * interval['mean']:.2f} %" if interval else "not measured"


def _above(better: Mapping[str, float] | None, worse: Mapping[str, float] | None) -> bool:
    """Whether two intervals do not overlap; False where one could not be measured (no tile changed)."""
    return better is not None and worse is not None and better["low"] > worse["high"]


def world_model_targets(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The quickstart's targets of reconstruction, imagination and step count."""
    rec, k = measured["reconstruction"], measured["steps_shown"]
    models = {m["name"]: m["rows"] for m in measured["steps"]["models"]}
    rows = models["shortcut forcing"]
    at_k, at_max = _row(rows, k), rows[-1]
    shuffled = measured["conditions"][1]["average"]
    gap = 100 * (at_max["symbol_accuracy"]["mean"] - at_k["symbol_accuracy"]["mean"])
    out = [
        {
            "name": "held-out reconstruction, symbol accuracy",
            "target": "≥ 99 %",
            "value": _percent(rec["symbol_accuracy"]),
            "passed": rec["symbol_accuracy"]["mean"] >= 0.99,
        },
        {
            "name": "held-out reconstruction, PSNR",
            "target": "≥ 32 dB",
            "value": f"{rec['psnr']['mean']:.1f} dB",
            "passed": rec["psnr"]["mean"] >= 32,
        },
        {
            "name": f"imagined video at true actions, K = {k}: symbol accuracy of all tiles",
            "target": "≥ 95 %",
            "value": f"{_percent(at_k['symbol_accuracy'])} (repeating the last frame: "
            f"{_percent(at_k['repeat_accuracy'])})",
            "passed": at_k["symbol_accuracy"]["mean"] >= 0.95,
        },
        {
            "name": "tiles that change, against repeating the last frame",
            "target": "above, intervals apart",
            "value": f"{_percent(at_k['changed_accuracy'])} against {_percent(at_k['repeat_changed_accuracy'])}",
            "passed": _above(at_k["changed_accuracy"], at_k["repeat_changed_accuracy"]),
        },
        {
            "name": "shuffling the actions costs accuracy on the tiles that change",
            "target": "below, intervals apart",
            "value": f"{_percent(shuffled['changed_accuracy'])} against {_percent(at_k['changed_accuracy'])}",
            "passed": _above(at_k["changed_accuracy"], shuffled["changed_accuracy"]),
        },
        {
            "name": f"K = {k} against K = {at_max['steps']}",
            "target": "within 1 point of symbol accuracy",
            "value": f"{abs(gap):.2f} points {'lower' if gap >= 0 else 'higher'}",
            "passed": gap <= 1,
        },
    ]
    tuned = next((c["average"] for c in measured["conditions"] if c.get("name") == FINETUNED), None)
    if tuned:
        out.append(
            {
                "name": "phase 2 keeps the world model: tiles that change",
                "target": "not below phase 1 with intervals apart",
                "value": f"{_percent(tuned['changed_accuracy'])} against {_percent(at_k['changed_accuracy'])}",
                "passed": not _above(at_k["changed_accuracy"], tuned["changed_accuracy"]),
            }
        )
    for title in (other.title for other in BASELINES.values() if other.title in models):
        theirs = _row(models[title], k)
        out.append(
            {
                "name": f"{title} at K = {k}, same size, data and steps",
                "target": "below shortcut forcing",
                "value": f"{_percent(theirs['symbol_accuracy'])} against {_percent(at_k['symbol_accuracy'])}",
                "passed": theirs["symbol_accuracy"]["mean"] < at_k["symbol_accuracy"]["mean"],
            }
        )
    return out


def _decibels(interval: Mapping[str, float]) -> str:
    return f"{interval['mean']:.2f} dB"


def video_targets(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Targets of a world model whose frames have no symbols: PSNR of imagined frames against the simplest guesses."""
    k, rows = measured["steps_shown"], measured["steps"]["models"][0]["rows"]
    found = {c["name"]: c["average"]["psnr"] for c in measured["conditions"]}
    mine = next(iter(found.values()))
    at_k, at_max = _row(rows, k)["psnr"], rows[-1]["psnr"]
    out = [
        {
            "name": f"imagined video, K = {k}, against repeating the last frame: PSNR",
            "target": "above, intervals apart",
            "value": f"{_decibels(mine)} against {_decibels(found[REPEATED])}",
            "passed": _above(mine, found[REPEATED]),
        },
        {
            "name": f"K = {k} against K = {rows[-1]['steps']}",
            "target": "within 0.5 dB",
            "value": f"{at_k['mean'] - at_max['mean']:+.2f} dB",
            "passed": at_max["mean"] - at_k["mean"] <= 0.5,
        },
    ]
    wrong = next((v for name, v in found.items() if name.endswith("shuffled actions")), None)
    if wrong is not None:
        out.append(
            {
                "name": "shuffling the actions costs PSNR",
                "target": "below, intervals apart",
                "value": f"{_decibels(wrong)} against {_decibels(mine)}",
                "passed": _above(mine, wrong),
            }
        )
    return out


def _targets(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    symbols = "symbol_accuracy" in measured["reconstruction"]
    return world_model_targets(measured) if symbols else video_targets(measured)


def agent_targets(results: Sequence[EvalResult]) -> list[dict[str, Any]]:
    """Phase 3 above phase 2, both above blind and random: intervals that do not overlap. In success, or in return where
    success is not known."""
    summaries = {r.policy: r.summary() for r in results}
    measure = "success" if all(s["success"] for s in summaries.values()) else "return"
    text = _percent if measure == "success" else lambda interval: f"{interval['mean']:.2f}"
    found = {name: s[measure] for name, s in summaries.items()}
    out = []
    baselines = [(agent, other) for agent in (CLONED, IMAGINED) for other in ("blind", "random")]
    for better, worse in [(IMAGINED, CLONED), *baselines]:
        if better in found and worse in found:
            out.append(
                {
                    "name": f"{measure} of {better} above {worse}",
                    "target": "95 % intervals apart",
                    "value": f"{text(found[better])} against {text(found[worse])}",
                    "passed": _above(found[better], found[worse]),
                }
            )
    return out


def write_report(
    run_dir: str | Path,
    config: Config,
    *,
    world_model: Mapping[str, Any] | None,
    results: Sequence[EvalResult],
    costs: Mapping[str, float],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes report.html and results.json of a run, finished or not; returns the report's data."""
    played = {r.policy: r for r in results}
    about = f"Levels {', '.join(config.env.levels)}." if config.env.levels else f"Data: {config.data.source}."
    targets = (_targets(world_model) if world_model else []) + agent_targets(results)
    minutes, ledger = sum(costs.values()) / 60, read_ledger(run_dir)
    data: dict[str, Any] = {
        "title": f"dreamer4_jax: {config.name}, seed {config.seed}",
        "summary": [f"{about} All stages together took {minutes:.1f} minutes.", *notes],
        "targets": targets,
        "phases": [_cost(config, name, seconds, ledger.get(name)) for name, seconds in costs.items()],
        "config": to_dict(config),
        "machine": machine(),
        "extra": {"seed": config.seed, "seconds": dict(costs)},
    }
    if world_model:
        arrays = world_model["arrays"]
        data["reconstruction"] = {
            "real": arrays["reconstruction_real"],
            "reconstructed": arrays["reconstruction_reconstructed"],
            **world_model["reconstruction"],
        }
        context = arrays["clip_context"].shape[1]
        data["world_model"] = {
            "conditions": world_model["conditions"],
            "clips": [
                {
                    "panels": {"real": np.concatenate([before, real]), "imagined": np.concatenate([before, imagined])},
                    "context": context,
                }
                for before, real, imagined in zip(
                    arrays["clip_context"], arrays["clip_real"], arrays["clip_imagined"], strict=True
                )
            ],
            "steps": world_model["steps_shown"],
        }
        data["steps"] = world_model["steps"]
    if results:
        pairs = ((IMAGINED, CLONED), ("phase 3, greedy", "phase 2, greedy"), (IMAGINED, "blind"))
        data["closed_loop"] = {
            "results": list(results),
            "comparisons": [compare(played[a], played[b]) for a, b in pairs if a in played and b in played],
            "highlight": [IMAGINED],
        }
    report.write_report(run_dir, data)
    return data


def _cost(config: Config, name: str, seconds: float, ledger: Mapping[str, float] | None) -> dict[str, Any]:
    out: dict[str, Any] = {"name": name, "seconds": seconds}
    phase = getattr(config.train, "dynamics" if name in BASELINES else name, None)
    if phase is not None:
        out |= {"steps": phase.steps, "frames_per_second": phase.steps * phase.batch * phase.length / seconds}
    if ledger:
        rest = sorted(((s, activity) for activity, s in ledger.items() if activity != "train"), reverse=True)
        spent = ", ".join(f"{activity} {s:.0f} s" for s, activity in rest if s >= 0.5)
        goodput = ledger.get("train", 0.0) / max(sum(ledger.values()), 1e-9)
        out["note"] = f"goodput {100 * goodput:.0f} %" + (f" ({spent})" if spent else "")
    return out
