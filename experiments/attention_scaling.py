"""Factorised attention: how FLOPs, memory and time grow with frames T and tokens N, and what it costs in quality.

    python -m experiments.attention_scaling                  # 15 minutes on 2 cores, most of it trainings
    python -m experiments.attention_scaling --scaling-only   # 4 minutes: no trainings
    python -m experiments.attention_scaling --size smoke     # under a minute

Three layouts of the same four layers: dense block-causal attention in each (the baseline of paper Table 2), space and
time by turns, and the paper's time layer every fourth. FLOPs and memory are those of the compiled gradient of one
sequence. Their exponents lie between those of attention and 1, that of projections and MLPs; so c + a T N + b pairs,
with the pairs of tokens that meet in theory, is fitted as well, and what it misses is given. Prediction quality is
compared after trainings of equal FLOPs, on the tokens of runs/quickstart-seed<N>, which is made if it is not there.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from dreamer4_jax.bench import time_jitted
from dreamer4_jax.config import TransformerConfig, override
from dreamer4_jax.evaluation import plots
from dreamer4_jax.evaluation.metrics import Interval
from dreamer4_jax.evaluation.rollouts import imagine_clips
from dreamer4_jax.evaluation.study import Call, Study, entry
from dreamer4_jax.nn import Mask, Transformer
from experiments import base

STUDY = Study(
    "attention_scaling",
    question="Does factorised attention grow as T N² + N T² instead of (T N)², and what does it cost in quality?",
    claim="exponents of 2 in T and in N for dense attention, below that for factorised; paper Table 2: 18.9 frames a "
    "second with dense attention every fourth layer, 30.1 factorised, at an FVD of 70 and 91",
)
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {"time_every": 1, "time_factorised": False},
    "space, time": {"time_every": 2},
    "time every 4th": {"time_every": 4},
}
# Frames T at `tokens`, tokens N at `frames`; time is measured where the temporary memory is below `limit` bytes.
# `trained`: the layouts whose quality is compared.
SIZES: dict[str, dict[str, Any]] = {
    "smoke": dict(T=(2,), N=(2,), tokens=4, frames=2, limit=1e9, repeats=1, dense_steps=2, clips=4,
                  trained=("dense", "time every 4th")),
    "laptop": dict(T=(4, 8, 16, 32, 64), N=(16, 32, 64, 128, 256), tokens=32, frames=8, limit=1.5e9, repeats=5,
                   dense_steps=120, clips=64, trained=tuple(LAYOUTS)),
    "tpu": dict(T=(16, 32, 64, 128, 256), N=(32, 64, 128, 256, 512), tokens=64, frames=32, limit=1e10, repeats=20,
                dense_steps=2000, clips=256, trained=tuple(LAYOUTS)),
}  # fmt: skip
NET = dict(layers=4, width=64, heads=4, kv_heads=4, head_dim=16, ffn=176, scan=False)  # unrolled: a loop counts once


@cache
def measure(layout: str, frames: int, tokens: int, limit: float, repeats: int) -> dict[str, Any]:
    """FLOPs, temporary memory and milliseconds of the gradient of one sequence, from the compiled program."""
    cfg = TransformerConfig(**{**NET, **LAYOUTS[layout], "window": frames})
    side = int(np.ceil(np.sqrt(tokens)))
    places = np.stack(np.divmod(np.arange(tokens), side), -1).astype(np.float32)

    def loss(net: Transformer, x: jax.Array) -> jax.Array:
        return jnp.mean(net(x, coordinates=places, space_mask=Mask())[0] ** 2)

    net = jax.eval_shape(lambda key: Transformer(key, cfg), jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, frames, tokens, cfg.width), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(net, x).compile()
    analysed, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert analysed is not None and cost is not None
    memory = analysed.temp_size_in_bytes
    milliseconds = None
    if memory <= limit:
        arrays = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), (net, x))
        milliseconds = 1000 * time_jitted(compiled, arrays, repeats=repeats).median
    return {
        "layout": layout,
        "T": frames,
        "N": tokens,
        "flops": float(cost["flops"]),
        "memory_bytes": int(memory),
        "milliseconds": milliseconds,
    }


def attention_pairs(layout: str, frames: int, tokens: int) -> float:
    """Theory: pairs of tokens that meet, over all layers."""
    t, n = float(frames), float(tokens)
    if layout == "dense":
        return NET["layers"] * (t * n) ** 2
    time = NET["layers"] // LAYOUTS[layout]["time_every"]
    return (NET["layers"] - time) * t * n**2 + time * n * t**2


def exponent(x: Sequence[float], y: Sequence[float]) -> Interval | None:
    """Slope of log y on log x, with its 95 % interval from the residuals; None for fewer than three points."""
    if len(x) < 3:
        return None
    fit = stats.linregress(np.log(x), np.log(y))
    half = float(stats.t.ppf(0.975, len(x) - 2) * fit.stderr)
    return Interval(float(fit.slope), float(fit.slope) - half, float(fit.slope) + half)


def exponents(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fits of every layout along T and along N."""
    found = []
    for layout in LAYOUTS:
        for axis in ("T", "N"):
            line = [r for r in rows if r["layout"] == layout and r["sweep"] == axis]
            x = [r[axis] for r in line]
            timed = [r for r in line if r["milliseconds"] is not None]
            found.append(
                {
                    "layout": layout,
                    "along": axis,
                    "theory_attention": exponent(x, [attention_pairs(layout, r["T"], r["N"]) for r in line]),
                    "flops": exponent(x, [r["flops"] for r in line]),
                    "memory": exponent(x, [r["memory_bytes"] for r in line]),
                    "time": exponent([r[axis] for r in timed], [r["milliseconds"] for r in timed]),
                }
            )
    return found


def theory(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By how much ``c + a T N + b pairs`` misses the FLOPs and the memory of each layout, with its own pairs and with
    those of the other kind."""
    found = []
    for layout in LAYOUTS:
        line = [r for r in rows if r["layout"] == layout]
        entry: dict[str, Any] = {"layout": layout}
        for key in ("flops", "memory_bytes"):
            y = np.array([r[key] for r in line], float)
            for which, of in (("own", layout), ("other", "time every 4th" if layout == "dense" else "dense")):
                pairs = [attention_pairs(of, r["T"], r["N"]) for r in line]
                basis = np.stack([np.ones(len(line)), [r["T"] * r["N"] for r in line], pairs], -1)
                scaled = basis / y[:, None]  # relative errors count alike at both ends of a sweep
                solution = np.linalg.lstsq(scaled / scaled.max(0), np.ones(len(line)), rcond=None)[0] / scaled.max(0)
                entry[f"{key}_missed_with_{which}_pairs"] = float(np.abs(basis @ solution / y - 1).max())
        found.append(entry)
    return found


def quality(call: Call, seed: int, trained: Sequence[str], dense_steps: int, clips: int) -> list[dict[str, Any]]:
    """Each layout of `trained`, for the FLOPs of `dense_steps` steps of the dense one, and what it then imagines."""
    run = base.trained(call, seed, "tokenizer")
    held = base.held_out(run, clips)
    steps_shown = min(4, run.config.dynamics.k_max)
    layouts = {layout: {"layers": NET["layers"], **LAYOUTS[layout]} for layout in trained}
    changed = {k: {f"dynamics.transformer.{f}": v for f, v in fields.items()} for k, fields in layouts.items()}
    cost = {}
    for layout, fields in changed.items():
        cost[layout] = base.step_flops(run, override(run.config, fields))
    rows = []
    for layout, fields in changed.items():
        steps = max(1, round(dense_steps * cost["dense"] / cost[layout]))
        call.say(f"seed {seed}, {layout}: {steps} steps of {cost[layout] / 1e9:.1f} GFLOP")
        warmup = min(run.config.train.dynamics.warmup, steps)
        name = f"attention-{layout.replace(', ', '-').replace(' ', '-')}"
        model = run.variant(name, {**fields, "train.dynamics.steps": steps, "train.dynamics.warmup": warmup})
        video = imagine_clips(model, run.model("tokenizer"), held, steps_shown, seed)
        average = held.score(video).summary(())["average"]
        rows.append(
            {
                "layout": layout,
                "seed": seed,
                "steps": steps,
                "training_gflop": steps * cost[layout] / 1e9,
                **{k: average[k] for k in ("psnr", "symbol_accuracy", "changed_accuracy", "repeat_changed_accuracy")},
            }
        )
    return rows


def draw(rows: list[dict[str, Any]], learned: list[dict[str, Any]]) -> Figure:
    """FLOPs and time along T, memory along N, and quality at equal compute."""
    views = [
        ("GFLOP of a gradient step", "flops", 1e9, "T"),
        ("Temporary memory (MiB)", "memory_bytes", 2**20, "N"),
        ("Time of a gradient step (ms)", "milliseconds", 1.0, "T"),
    ]
    titles = [title for title, *_ in views] + ["Changed tiles right (%), equal FLOPs"] * bool(learned)
    figure, axes = plots.panels(titles, width=4.0)
    other = {"T": "N", "N": "T"}
    for at, (_, key, unit, axis) in zip(axes, views, strict=False):
        ends = []
        for layout, colour in zip(LAYOUTS, plots.PALETTE, strict=False):
            line = [r for r in rows if r["layout"] == layout and r["sweep"] == axis and r[key] is not None]
            at.plot([r[axis] for r in line], [r[key] / unit for r in line], color=colour, marker="o")
            ends.append((layout, line[-1][key] / unit, colour))
        fixed = next(r[other[axis]] for r in rows if r["sweep"] == axis)
        at.set_xlabel(f"{'frames T' if axis == 'T' else 'tokens per frame N'} ({other[axis]} = {fixed})")
        at.set_xscale("log", base=2)
        at.set_yscale("log")
        at.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
        plots.label_ends(at, ends)
    if not learned:
        return figure
    last = axes[-1]
    seeds = list(dict.fromkeys(row["seed"] for row in learned))
    for row in learned:
        mean, low, high = (100 * row["changed_accuracy"][k] for k in ("mean", "low", "high"))
        place = list(LAYOUTS).index(row["layout"])
        at_x, colour = place + 0.12 * seeds.index(row["seed"]), plots.PALETTE[place]
        last.errorbar(at_x, mean, [[mean - low], [high - mean]], fmt="o", capsize=3, color=colour)
        last.annotate(f"{row['steps']}\nsteps", (at_x, mean), (8, -3), textcoords="offset points", color=colour)
    floor = 100 * learned[0]["repeat_changed_accuracy"]["mean"]
    last.axhline(floor, color=plots.PALETTE[-1], linestyle="--")
    last.annotate("last frame repeated", (0.02, floor), (0, 4), xycoords=("axes fraction", "data"),
                  textcoords="offset points", color=plots.PALETTE[-1])  # fmt: skip
    last.set_xticks(range(len(LAYOUTS)), list(LAYOUTS))
    last.set_xlim(-0.4, len(LAYOUTS) - 0.3)
    return figure


def finding(
    fits: list[dict[str, Any]],
    polynomials: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    learned: list[dict[str, Any]],
) -> str:
    """What the numbers say."""

    def fit(layout: str, along: str, key: str) -> str:
        found = next(f for f in fits if f["layout"] == layout and f["along"] == along)[key]
        return "not fitted" if found is None else f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"

    def largest(layout: str, key: str) -> float:
        return max(r[key] for r in rows if r["layout"] == layout and r["sweep"] == "T")

    parts = [
        f"Along {axis} (attention in theory: {fit('dense', axis, 'theory_attention')} dense, "
        f"{fit('time every 4th', axis, 'theory_attention')} with a time layer every fourth) a compiled gradient step's "
        f"FLOPs grow with exponent {fit('dense', axis, 'flops')} where attention is dense and "
        f"{fit('time every 4th', axis, 'flops')} with time every fourth, temporary memory with "
        f"{fit('dense', axis, 'memory')} and {fit('time every 4th', axis, 'memory')}, time with "
        f"{fit('dense', axis, 'time')} and {fit('time every 4th', axis, 'time')}."
        for axis in ("T", "N")
    ]
    missed = {p["layout"]: [100 * v for k, v in p.items() if k != "layout"] for p in polynomials}
    parts.append(
        "Projections and MLPs, linear in T N, hold these below attention's own. The polynomial c + a T N + b pairs "
        "fits all FLOPs within "
        + ", ".join(f"{v[0]:.1f} % ({k}; with the other kind's pairs {v[1]:.0f} %)" for k, v in missed.items())
        + " and memory within "
        + ", ".join(f"{v[2]:.0f} % ({k}; {v[3]:.0f} %)" for k, v in missed.items())
        + "."
    )
    times = {k: largest("dense", k) / largest("time every 4th", k) for k in ("flops", "memory_bytes")}
    parts.append(
        f"At the longest T a dense gradient step takes {times['flops']:.1f} times the FLOPs and "
        f"{times['memory_bytes']:.1f} times the memory."
    )
    if not learned:
        return " ".join([*parts, "Prediction quality was left out of this call."])
    layouts = dict.fromkeys(r["layout"] for r in learned)
    best = {k: [r["changed_accuracy"] for r in learned if r["layout"] == k] for k in layouts}
    mean = {k: 100 * float(np.mean([v["mean"] for v in values])) for k, values in best.items()}
    cleared = (
        all(a["low"] > b["high"] for a, b in zip(best["time every 4th"], best["dense"], strict=True)),
        all(a["high"] < b["low"] for a, b in zip(best["time every 4th"], best["dense"], strict=True)),
    )
    verdict = {
        (True, False): "so at this budget factorising costs nothing in quality, it gains",
        (False, True): "so at this budget the factorised model is the worse one, against the claim",
        (False, False): "intervals overlap: no difference is shown at this budget",
    }[cleared]
    parts.append(
        "After trainings of equal FLOPs, changed tiles are right in "
        + ", ".join(f"{of:.1f} % ({k})" for k, of in mean.items())
        + f" of cases; {verdict}. Intervals are over clips of one training each, and the budget is short: it says "
        "which layout learns more per FLOP at first, not which is better when trained out, as paper Table 2 compares."
    )
    return " ".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    call = STUDY.call(
        __doc__, argv, add=lambda p: p.add_argument("--scaling-only", action="store_true", help="train nothing")
    )
    size = SIZES[call.size]
    limits = size["limit"], size["repeats"]
    points = [("T", t, size["tokens"]) for t in size["T"]] + [("N", size["frames"], n) for n in size["N"]]
    rows = [
        {"sweep": sweep, **measure(layout, frames, tokens, *limits)}
        for layout, (sweep, frames, tokens) in call.track([(k, p) for k in LAYOUTS for p in points], "compiling")
    ]
    fits, polynomials = exponents(rows), theory(rows)
    seeds = () if call.args.scaling_only else call.seeds
    budget = size["trained"], size["dense_steps"], size["clips"]
    learned = [row for seed in seeds for row in quality(call, seed, *budget)]
    figure = draw(rows, learned)
    call.write(
        [*fits, *polynomials, *learned, *rows],
        finding=finding(fits, polynomials, rows, learned),
        figure=figure,
        network=NET,
    )


if __name__ == "__main__":
    entry(main)
