"""Charts of a run as matplotlib figures (Agg, no global state), readable on light and dark pages and on a phone.

`to_svg` gives an inline SVG whose text and axes take the page's text colour (`currentColor`); `to_png` gives a PNG on
white for places without CSS. Lines carry their names at their ends; there are no legends.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from dreamer4_jax.config import UserError

INK = "#1f2328"  # text and axes; `to_svg` turns it into currentColor
PALETTE = ("#2f7fd1", "#e07020", "#1f9d6c", "#d1476f", "#8b63d6", "#b08900", "#1798a6", "#8a9099")  # on white and black
_STYLE: Any = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def panels(titles: Sequence[str], width: float = 4.2, height: float = 2.8) -> tuple[Figure, list[Axes]]:
    """A figure with titled axes side by side; `width` and `height` in inches are those of one of them."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width * len(titles), height), layout="constrained")
        FigureCanvasAgg(figure)
        row = [figure.add_subplot(1, len(titles), i + 1) for i in range(len(titles))]
        for axes, title in zip(row, titles, strict=True):
            axes.set_title(title, color=INK)
            axes.grid(axis="y", color=INK, alpha=0.14, linewidth=0.7)
            axes.set_axisbelow(True)
    return figure, row


def _figure(title: str, width: float = 4.2, height: float = 2.8) -> tuple[Figure, Axes]:
    figure, (axes,) = panels([title], width, height)
    return figure, axes


def to_png(figure: Figure, dpi: int = 144) -> bytes:
    """The figure as PNG bytes on white."""
    out = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(out, format="png", dpi=dpi, facecolor="white")
    return out.getvalue()


def to_svg(figure: Figure, label: str = "") -> str:
    """The figure as an ``<svg>`` element for use inside HTML: no prolog, no namespaces, no metadata, no address.

    `label` becomes its accessible name. Identifiers are made deterministic and, by the label, unique to the figure.
    """
    out = io.BytesIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": label or "figure"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    # width and height would fix the size in points; the viewBox alone lets the page scale it
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = text.replace(INK, "currentColor")
    name = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def _log_y(axes: Axes, span: tuple[float, float]) -> None:
    """Logarithmic y with plain numbers: 1, 2, 5 of each decade, or the decades alone over a wide span."""
    subs = (1.0, 2.0, 5.0) if span[1] < 300 * span[0] else (1.0,)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves label positions apart to at least `gap`, keeping their order, within [low, high] where they fit."""
    order = np.argsort(wanted, kind="stable")
    placed = np.asarray([wanted[i] for i in order], float)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    if len(placed) and placed[-1] > high:
        placed[-1] = max(high, low)
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = min(placed[i], placed[i + 1] - gap)
    out = [0.0] * len(placed)
    for position, i in zip(placed, order, strict=True):
        out[i] = float(position)
    return out


def label_ends(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Writes (name, y, colour) at the right edge, in the colour of its line and without overlaps."""
    to_axes = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[0]
    wanted = [float(to_axes.transform((x, y))[1]) for _, y, _ in ends]
    for (name, _, colour), y in zip(ends, _spread(wanted, 0.075, 0.0, 1.0), strict=True):
        axes.annotate(
            name,
            (1.0, y),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
            fontweight="bold",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Training


def loss_series(records: Sequence[Mapping[str, Any]], limit: int = 6) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The losses in the records of one phase: name -> (steps, values).

    Takes the terms ``loss/...``, else ``loss``, else every number but those of ``time/`` and ``eval/``. Values that are
    missing or not finite are left out; at most `limit` series, in order of appearance.
    """
    numeric: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
                numeric.setdefault(name, []).append((float(record["step"]), float(value)))
    terms = [n for n in numeric if n.startswith("loss/")]
    rest = [n for n in numeric if n != "step" and not n.startswith(("time/", "eval/"))]
    chosen = terms or [n for n in rest if n == "loss"] or rest
    out = {}
    for name in chosen[:limit]:
        points = np.asarray(numeric[name])
        out[name] = (points[:, 0], points[:, 1])
    return out


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the curve, with shrinking windows at the ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def loss_figure(phase: str, records: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Losses of one phase against steps, smoothed over the raw curve; a log axis where all are positive and they span
    more than a factor of five. None if the records hold no number."""
    series = loss_series(records)
    if not series:
        return None
    figure, axes = _figure(phase)
    everything = np.concatenate([v for _, v in series.values()])
    if everything.min() > 0 and everything.max() > 5 * everything.min():
        _log_y(axes, (float(everything.min()), float(everything.max())))
    ends = []
    for (name, (steps, values)), colour in zip(series.items(), PALETTE, strict=False):
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        smooth = _smooth(values)
        axes.plot(steps, smooth, color=colour)
        ends.append((name.removeprefix("loss/"), float(smooth[-1]), colour))
    axes.set_xlabel("step")
    axes.margins(x=0.01)
    label_ends(axes, ends)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Steps against accuracy


def _power_axis(axes: Axes, steps: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(steps)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("sampling steps per frame, K")


def steps_figure(
    models: Sequence[Mapping[str, Any]], metric: str = "symbol_accuracy", title: str = "Symbol accuracy (%)"
) -> Figure:
    """A metric of `worldmodel.step_table` rows against K with 95 % intervals, one line a model.

    Args:
        models: ``[{"name": str, "rows": step_table(...)}, ...]``.
        metric: a key of the rows that holds an interval; accuracies are shown in per cent.
    """
    if not models:
        raise UserError("steps_figure: no models given")
    figure, axes = _figure(title)
    scale = 100.0 if metric.endswith("accuracy") else 1.0
    ends = []
    for model, colour in zip(models, PALETTE, strict=False):
        rows = [r for r in model["rows"] if r.get(metric) is not None]
        if not rows:
            continue
        steps = [r["steps"] for r in rows]
        mean, low, high = (scale * np.asarray([r[metric][k] for r in rows]) for k in ("mean", "low", "high"))
        axes.errorbar(steps, mean, yerr=np.maximum([mean - low, high - mean], 0), color=colour, capsize=2.5, marker="o")
        ends.append((model["name"], float(mean[-1]), colour))
    _power_axis(axes, [r["steps"] for m in models for r in m["rows"]])
    label_ends(axes, ends)
    return figure


def latency_figure(models: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Milliseconds per frame against K, both logarithmic; None if no row was timed."""
    timed = [(m, [r for r in m["rows"] if r.get("milliseconds") is not None]) for m in models]
    timed = [(m, rows) for m, rows in timed if rows]
    if not timed:
        return None
    figure, axes = _figure("Time per frame (ms)")
    costs = [r["milliseconds"] for _, rows in timed for r in rows]
    _log_y(axes, (min(costs), max(costs)))
    ends = []
    for i, ((model, rows), colour) in enumerate(zip(timed, PALETTE, strict=False)):
        steps, cost = [r["steps"] for r in rows], [r["milliseconds"] for r in rows]
        # models often cost the same: dashes let the line below show through
        axes.plot(steps, cost, color=colour, marker="o", linestyle="-" if i == 0 else "--")
        if len(timed) == 1:
            for x, y in zip(steps, cost, strict=True):
                axes.annotate(f"{y:.3g}", (x, y), xytext=(0, 6), textcoords="offset points", ha="center", color=INK)
        ends.append((model["name"], float(cost[-1]), colour))
    axes.margins(y=0.15)
    _power_axis(axes, [r["steps"] for _, rows in timed for r in rows])
    label_ends(axes, ends)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# World model and agents


def horizon_figure(conditions: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Symbol accuracy on changed tiles against the horizon: each condition, and repeating the last context frame.

    Args:
        conditions: ``[{"name": str, **evaluate_clips(...)}, ...]``; None if no symbols were decoded.
    """
    lines = []
    for c in conditions:
        lines.append((c["name"], [(h["horizon"], h.get("changed_accuracy")) for h in c["horizons"]]))
    if conditions:
        repeat = [(h["horizon"], h.get("repeat_changed_accuracy")) for h in conditions[0]["horizons"]]
        lines.append(("last frame repeated", repeat))
    lines = [(name, [(h, v) for h, v in points if v is not None]) for name, points in lines]
    lines = [(name, points) for name, points in lines if points]
    if not lines:
        return None
    figure, axes = _figure("Symbol accuracy on changed tiles (%)")
    ends = []
    for (name, points), colour in zip(lines, PALETTE, strict=False):
        x = [h for h, _ in points]
        mean, low, high = (100 * np.asarray([v[k] for _, v in points]) for k in ("mean", "low", "high"))
        axes.errorbar(x, mean, yerr=np.maximum([mean - low, high - mean], 0), color=colour, capsize=2.5, marker="o")
        ends.append((name, float(mean[-1]), colour))
    axes.set_xticks(sorted({h for _, points in lines for h, _ in points}))
    axes.set_xlabel("imagined frame")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 105)
    label_ends(axes, ends)
    return figure


def success_figure(results: Sequence[Mapping[str, Any]], highlight: Sequence[str] = ()) -> Figure:
    """Horizontal bars of the success rate with 95 % intervals, one a policy.

    Args:
        results: summaries of `closed_loop.EvalResult`, in the order to show.
        highlight: policies drawn in the accent colour (all, if empty).
    """
    figure, axes = _bars("Success rate (%), real environment", results, "success", 100, highlight)
    axes.set_xlim(0, 112)
    axes.set_xticks([0, 25, 50, 75, 100])
    return figure


def return_figure(results: Sequence[Mapping[str, Any]], highlight: Sequence[str] = ()) -> Figure:
    """As `success_figure`, of the return: for environments that do not say what success is."""
    figure, axes = _bars("Return, real environment", results, "return", 1, highlight)
    axes.margins(x=0.25)  # for the numbers at the ends
    axes.axvline(0, color=INK, linewidth=0.8)
    return figure


def _bars(
    title: str, results: Sequence[Mapping[str, Any]], measure: str, scale: float, highlight: Sequence[str]
) -> tuple[Figure, Axes]:
    if not results:
        raise UserError(f"a figure of {measure}: no results given")
    figure, axes = _figure(title, height=0.9 + 0.36 * len(results))
    axes.grid(visible=False)
    axes.grid(axis="x", color=INK, alpha=0.14, linewidth=0.7)
    for i, r in enumerate(results):
        mean, low, high = (scale * r[measure][k] for k in ("mean", "low", "high"))
        colour = PALETTE[0] if not highlight or r["policy"] in highlight else PALETTE[-1]
        axes.barh(i, mean, color=colour, height=0.62, alpha=0.9)
        axes.errorbar(mean, i, xerr=[[max(mean - low, 0)], [max(high - mean, 0)]], color=INK, capsize=3, linewidth=1.3)
        tip, away, side = (max(high, mean), 6, "left") if mean >= 0 else (min(low, mean), -6, "right")
        axes.annotate(
            f"{mean:.1f}", (tip, i), xytext=(away, 0), textcoords="offset points", va="center", ha=side, color=INK
        )
    axes.set_yticks(range(len(results)), [r["policy"] for r in results])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    return figure, axes
