"""What a sweep found: results.csv, the picture pareto.png, and sweep.html, one page that compares the trials."""

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from dreamer4_jax.config import ConfigError, UserError
from dreamer4_jax.evaluation.page import STYLE
from dreamer4_jax.evaluation.plots import PALETTE, _figure, to_png, to_svg
from dreamer4_jax.training.metrics import write_atomic
from launch.algebra import plain
from launch.metric import Metric, MetricError, Value, cost
from launch.sweep import failure
from launch.sweep_file import Sweep, make_trial
from launch.sweep_records import Records

BEST, OTHER = PALETTE[1], PALETTE[-1]
NAMED = 6  # trials of the front that get their name into the picture


@dataclass(frozen=True)
class Row:
    """One trial in the results."""

    name: str
    state: str
    value: Value | None
    seconds: float
    steps: int
    fields: dict[str, Any]  # every field that any trial of the sweep sets, as this trial has it
    note: str = ""

    def cost(self, kind: str) -> float:
        return self.seconds if kind == "seconds" else self.steps


def collect(sweep: Sweep, directory: Path) -> list[Row]:
    """The trials of a sweep directory that ended, as their run directories show them; best first, then the others."""
    records = list(Records(directory).latest.values())
    names = list(dict.fromkeys(name for record in records for name in record["overrides"]))
    rows = []
    for record in records:
        run_dir, value, note = directory / record["name"], None, ""
        if record["state"] == "finished":
            try:
                value = sweep.metric.value(run_dir)
            except MetricError as error:
                note = str(error)
        elif record["state"] == "failed":
            note = failure(record)
        try:
            config = make_trial(sweep, record["overrides"], directory).config
            chosen = {name: _field(config, name) for name in names}
        except ConfigError:  # what a study drew and could not run, as its note says
            chosen = {name: record["overrides"].get(name) for name in names}
        spent = cost(run_dir)
        rows.append(Row(record["name"], record["state"], value, spent.seconds, spent.steps, chosen, note))
    sign = 1 if sweep.metric.goal == "min" else -1
    return sorted(rows, key=lambda r: (r.value is None, sign * r.value.mean if r.value else 0.0))


def _field(config: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        config = getattr(config, name)
    return plain(config)


def front(points: Sequence[tuple[float, float]], goal: Literal["min", "max"]) -> list[int]:
    """The points (cost, metric) that no other one beats: none is as good in both and better in one. By cost."""
    sign = 1 if goal == "min" else -1
    order = sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1]))
    out: list[int] = []
    for i in order:
        # Sorted by cost, so only those already taken can beat a point; equal points are both kept.
        if not out or sign * points[i][1] < sign * points[out[-1]][1] or points[i] == points[out[-1]]:
            out.append(i)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def _short(names: Sequence[str]) -> dict[str, str]:
    """Each dotted field by as many of its last parts as tell it from the others."""
    out = {}
    for name in names:
        parts = name.split(".")
        tails = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        out[name] = next(t for t in tails if sum(other == t or other.endswith("." + t) for other in names) == 1)
    return out


def _words(row: Row, names: Sequence[str]) -> str:
    short = _short(names)
    return ", ".join(f"{short[name]} {_text(row.fields[name])}" for name in names)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _title(metric: Metric) -> str:
    """A metric's name for people: the end of its path, with what was chosen from lists."""
    return metric.path.replace("[", " [").replace(".", " · ").replace(" · mean", "").replace(":", " · ")


def _units(kind: str, costs: Sequence[float]) -> tuple[float, str]:
    if kind == "steps":
        return 1, "steps"
    scale, unit = next(((s, u) for s, u in ((3600, "hours"), (60, "minutes")) if max(costs) > 3 * s), (1, "seconds"))
    return scale, unit


def _wide(numbers: Sequence[float]) -> bool:
    """Whether numbers are better shown on a logarithmic axis."""
    return min(numbers) > 0 and max(numbers) > 8 * min(numbers)


def _log_x(axes: Axes, ticks: Sequence[float] | None = None) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    if ticks:
        axes.set_xticks(sorted(set(ticks)))


def _points(axes: Axes, x: Sequence[float], rows: Sequence[Row], colour: str, **style: Any) -> None:
    means = [r.value.mean for r in rows if r.value]
    low = [r.value.mean - r.value.low if r.value and r.value.low is not None else 0.0 for r in rows]
    high = [r.value.high - r.value.mean if r.value and r.value.high is not None else 0.0 for r in rows]
    bars = [[max(v, 0.0) for v in low], [max(v, 0.0) for v in high]]
    axes.errorbar(x, means, yerr=bars, linestyle="none", marker="o", color=colour, elinewidth=0.8, **style)


def pareto_figure(rows: Sequence[Row], sweep: Sweep) -> Figure | None:
    """The metric against the cost; those that no other trial beats stand out and say their fields."""
    done = [r for r in rows if r.value]
    if not done:
        return None
    goal, axis = sweep.metric.goal, "more is better ↑" if sweep.metric.goal == "max" else "less is better ↓"
    scale, unit = _units(sweep.cost, [r.cost(sweep.cost) for r in done])
    x = [r.cost(sweep.cost) / scale for r in done]
    best = front([(c, r.value.mean) for c, r in zip(x, done, strict=True) if r.value], goal)
    title = f"{_title(sweep.metric)}\nOrange: none of the {len(done)} trials is both better and cheaper"
    figure, axes = _figure(title, 7.0, 4.6)
    rest = [i for i in range(len(done)) if i not in best]
    _points(axes, [x[i] for i in rest], [done[i] for i in rest], OTHER, alpha=0.65, markersize=4.5)
    if _wide(x):
        _log_x(axes)
    y = [r.value.mean for r in done if r.value]
    axes.plot([x[i] for i in best], [y[i] for i in best], color=BEST, drawstyle="steps-post", linewidth=1.2, alpha=0.6)
    _points(axes, [x[i] for i in best], [done[i] for i in best], BEST, markersize=7)
    # Of a long front, its two ends and some between. What they are stands below: beside the points it would collide.
    shown = best if len(best) <= NAMED else [best[round(k * (len(best) - 1) / (NAMED - 1))] for k in range(NAMED)]
    varied = [n for n in done[0].fields if len({_text(r.fields[n]) for r in done}) > 1]
    lines = [f"← less is better: {unit} of the whole run", ""]
    for number, i in enumerate(shown, start=1):
        axes.annotate(
            str(number),
            (x[i], y[i]),
            xytext=(-5, 3 if goal == "max" else -3),  # that side is empty: whoever were there would be on the front
            textcoords="offset points",
            ha="right",
            va="bottom" if goal == "max" else "top",
            color=BEST,
            fontweight="bold",
        )
        lines.append(f"{number}   {y[i]:.4g} at {x[i]:.4g} {unit}:  {_words(done[i], varied)}")
    axes.margins(x=0.06, y=0.08)
    axes.set_xlabel("\n".join(lines), loc="left", multialignment="left")
    axes.set_ylabel(axis)
    return figure


def field_figure(rows: Sequence[Row], name: str, label: str, sweep: Sweep) -> Figure | None:
    """The metric against one field: a dot for each trial, the best one in orange. None if the field never varies."""
    done = [r for r in rows if r.value]
    found = [r.fields[name] for r in done]
    if len({_text(v) for v in found}) < 2:
        return None
    figure, axes = _figure(label, 3.4, 2.4)
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in found)
    kinds = sorted(set(found)) if numeric else sorted({_text(v) for v in found})
    x: list[float] = [float(v) for v in found] if numeric else [float(kinds.index(_text(v))) for v in found]
    if not numeric:
        axes.set_xticks(range(len(kinds)), kinds)
        axes.margins(x=0.25)
    elif _wide(x):
        _log_x(axes, x if len(kinds) <= 6 else None)
    elif len(kinds) <= 6:
        axes.set_xticks(kinds)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    top = done[0]  # best first
    _points(axes, x, done, PALETTE[0], alpha=0.7, markersize=4.5)
    _points(axes, x[:1], [top], BEST, markersize=7)
    axes.set_ylabel(f"metric, {'more' if sweep.metric.goal == 'max' else 'less'} is better")
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Files

# Sorts a table by the column whose head is clicked: numbers as numbers, gaps last, a second click the other way.
_SCRIPT = """
for (const head of document.querySelectorAll('table.sortable th[scope=col]')) head.onclick = () => {
  const table = head.closest('table'), body = table.tBodies[0], column = head.cellIndex;
  const up = head.getAttribute('aria-sort') !== 'ascending';
  for (const other of table.querySelectorAll('th[aria-sort]')) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent;
  const compare = (a, b) => {
    const [p, q] = [key(a), key(b)];
    if (p === '' || q === '') return (p === '') - (q === '');
    const order = isNaN(p) || isNaN(q) ? p.localeCompare(q) : p - q;
    return up ? order : -order;
  };
  body.append(...[...body.rows].sort(compare));
};
"""
_STYLE = """
table.sortable th[scope=col] { cursor:pointer; }
table.sortable th[aria-sort=ascending]::after { content:" ▲"; }
table.sortable th[aria-sort=descending]::after { content:" ▼"; }
tr.best th { font-weight:650; border-left:3px solid #e07020; padding-left:.4rem; }
td.note { white-space:normal; text-align:left; min-width:14rem; }
.pareto { max-width:46rem; } .pareto svg { display:block; width:100%; height:auto; }
"""


def results_csv(rows: Sequence[Row]) -> str:
    """The results as CSV: one line for each trial that ended, empty where there is nothing."""
    names = list(rows[0].fields) if rows else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", "state", "metric", "low", "high", "seconds", "steps", *names, "note"])
    for r in rows:
        value = r.value or Value(None, None, None)  # type: ignore[arg-type]
        writer.writerow([r.name, r.state, *value, r.seconds, r.steps, *(r.fields[n] for n in names), r.note])
    return out.getvalue()


def _cell(value: Any, key: Any = None) -> str:
    shown = "–" if value is None else html.escape(_text(value))
    key = html.escape(str("" if value is None else value if key is None else key))
    return f'<td data-key="{key}">{shown}</td>'


def _table(rows: Sequence[Row], best: set[str]) -> str:
    names = list(rows[0].fields)
    short = _short(names)
    noted = any(r.note for r in rows)
    heads = ["Trial", "State", "Metric", "Time, s", "Steps", *(short[n] for n in names), *(["Note"] if noted else [])]
    top = "".join(f"<th scope=col>{html.escape(h)}</th>" for h in heads)
    body = []
    for r in rows:
        value = _cell(r.value.mean if r.value else None)
        if r.value and r.value.low is not None and r.value.high is not None:
            span = f"<small>{r.value.low:.4g} … {r.value.high:.4g}</small></td>"
            value = value.replace("</td>", span)
        cells = _cell(r.state) + value + _cell(round(r.seconds, 1)) + _cell(r.steps)
        cells += "".join(_cell(r.fields[n]) for n in names)
        cells += f"<td class=note>{html.escape(r.note)}</td>" if noted else ""
        mark = " class=best" if r.name in best else ""
        body.append(f"<tr{mark}><th scope=row><a href='{r.name}/report.html'>{r.name}</a></th>{cells}</tr>")
    return (
        f"<div class=scroll><table class=sortable><thead><tr>{top}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def page(rows: Sequence[Row], sweep: Sweep) -> str:
    """The page that compares the trials; it needs no other file, and its links lead to the trials' own reports."""
    title = html.escape(f"Sweep {sweep.path.stem}: {sweep.experiment}, {sweep.size}")
    done = [r for r in rows if r.value]
    count = {state: sum(r.state == state for r in rows) for state in ("finished", "pruned", "failed", "interrupted")}
    told = ", ".join(f"{n} {state}" for state, n in count.items() if n) or "none"
    way = "largest" if sweep.metric.goal == "max" else "smallest"
    lead = [f"Trials: {told}. Wanted: the {way} <b>{html.escape(_title(sweep.metric))}</b>."]
    chosen: set[str] = set()
    if done:
        points = [(r.cost(sweep.cost), r.value.mean) for r in done if r.value]
        chosen = {done[i].name for i in front(points, sweep.metric.goal)}
        top = done[0]
        lead.append(f"Best: {top.value.mean:.4g} with {html.escape(_words(top, list(top.fields)) or 'no overrides')}.")  # type: ignore[union-attr]
    parts = [f"<section>{''.join(f'<p class=lead>{text}</p>' for text in lead)}</section>"]
    if (picture := pareto_figure(rows, sweep)) is not None:
        label = f"{_title(sweep.metric)} against {sweep.cost}"
        parts.append(
            f"<section><h2>Metric against cost</h2><figure class=pareto>{to_svg(picture, label)}<figcaption>Orange: no "
            "other trial is as good in both and better in one. Bars: 95 % intervals, where the run measured them."
            "</figcaption></figure></section>"
        )
    if rows:
        names = list(rows[0].fields)
        charts = [
            f"<figure class=chart>{to_svg(figure, f'metric against {name}')}</figure>"
            for name in names
            if (figure := field_figure(rows, name, _short(names)[name], sweep)) is not None
        ]
        if charts:
            parts.append(
                f"<section><h2>Metric against each field</h2><div class=charts>{''.join(charts)}</div></section>"
            )
        remark = "<p class=remark>A click on a column's head sorts by it. Orange edge: on the front above.</p>"
        parts.append(f"<section><h2>All trials</h2>{_table(rows, chosen)}{remark}</section>")
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        "<meta name=color-scheme content='light dark'>"
        f"<title>{title}</title><style>{STYLE}{_STYLE}</style></head><body><header><h1>{title}</h1></header>"
        f"<main>{''.join(parts)}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def write_report(sweep: Sweep, directory: Path) -> Path:
    """Writes results.csv, pareto.png and sweep.html of a sweep, finished or not; returns the page's path."""
    if not (directory / "sweep.json").exists():
        raise UserError(f"{directory}: is no sweep directory (it has no sweep.json)")
    rows = collect(sweep, directory)
    write_atomic(directory / "results.csv", results_csv(rows))
    if (picture := pareto_figure(rows, sweep)) is not None:
        (directory / "pareto.png").write_bytes(to_png(picture))
    write_atomic(directory / "sweep.html", page(rows, sweep))
    return directory / "sweep.html"
