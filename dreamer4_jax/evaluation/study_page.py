"""One page with the results of all experiments: of each its question, figure, finding and command."""

import base64
import html
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamer4_jax.config import UserError
from dreamer4_jax.evaluation.page import STYLE
from dreamer4_jax.evaluation.study import RESULTS, load, studies
from dreamer4_jax.training.metrics import write_atomic

OWN_STYLE = """
section { min-height:88vh; } .claim { color:var(--soft); max-width:46rem; margin:.2rem 0 1rem; }
.finding { max-width:46rem; } .made { color:var(--soft); font-size:.82rem; }
figure img { background:#fff; padding:.4rem; max-height:62vh; width:auto; }
"""


def write_page(results: str | Path = RESULTS) -> Path:
    """Writes ``index.html`` into `results` and returns its path."""
    found = load(results)
    if not found:
        raise UserError(f"{results}: holds no results of experiments; run one: {', '.join(studies())}")
    links = "".join(f"<a href='#{_id(tree)}'>{_text(_title(tree))}</a>" for tree in found)
    body = "".join(map(_section, found)) + _missing(found)
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        "<meta name=color-scheme content='light dark'>"
        f"<title>Experiments</title><style>{STYLE}{OWN_STYLE}</style></head><body>"
        f"<header><h1>What Dreamer 4 claims, measured</h1><nav>{links}</nav></header><main>{body}</main></body></html>"
    )
    path = Path(results) / "index.html"
    write_atomic(path, page)
    return path


def _text(value: Any) -> str:
    return html.escape(str(value))


def _id(tree: Mapping[str, Any]) -> str:
    return _text(tree["directory"].name)


def _title(tree: Mapping[str, Any]) -> str:
    return tree["name"].replace("_", " ") + ("" if tree["size"] == "laptop" else f" ({tree['size']})")


def _section(tree: Mapping[str, Any]) -> str:
    machine = ", ".join(f"{k} {v}" for k, v in tree["machine"].items())
    seeds = f"seed{'s' if len(tree['seeds']) > 1 else ''} {', '.join(map(str, tree['seeds']))}"
    picture = base64.b64encode((tree["directory"] / tree["figure"]).read_bytes()).decode()
    return (
        f"<section id='{_id(tree)}'><h2>{_text(tree['question'])}</h2>"
        f"<p class=claim>Expected: {_text(tree['claim'])}</p>"
        f"<figure><img alt='{_text(_title(tree))}' src='data:image/png;base64,{picture}'></figure>"
        f"<p class=finding>{_text(tree['finding'])}</p>"
        f"<pre>{_text(tree['command'])}</pre>"
        f"<p class=made>{_text(seeds)}; {tree['seconds'] / 60:.1f} minutes; {_text(machine)}; "
        f"commit {_text(tree['commit'])}</p>"
        f"{_numbers(tree['rows'])}</section>"
    )


def _numbers(rows: list[Mapping[str, Any]]) -> str:
    """The rows as tables, folded away: one for each set of columns, nested figures left to the JSON."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        shown = tuple(k for k, v in row.items() if _cell(v) is not None)
        groups.setdefault(shown, []).append(row)
    parts = []
    for columns, members in groups.items():
        head = "".join(f"<th scope=col>{_text(c.replace('_', ' '))}</th>" for c in columns)
        lines = "".join("<tr>" + "".join(f"<td>{_cell(m[c])}</td>" for c in columns) + "</tr>" for m in members)
        parts.append(f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>")
    return f"<details><summary>Numbers, with 95 % intervals</summary>{''.join(parts)}</details>"


def _cell(value: Any) -> str | None:
    """A value of a table, None for what is no single figure."""
    if isinstance(value, Mapping):
        if set(value) != {"mean", "low", "high"}:
            return None
        return f"{value['mean']:.4g}<small>{value['low']:.4g} … {value['high']:.4g}</small>"
    if isinstance(value, float):
        return f"{value:.4g}"
    return None if isinstance(value, list) else "–" if value is None else _text(value)


def _missing(found: list[dict[str, Any]]) -> str:
    """The questions that have no results yet."""
    measured = {tree["name"] for tree in found}
    rest = [importlib.import_module(f"experiments.{name}").STUDY for name in studies() if name not in measured]
    if not rest:
        return ""
    items = "".join(f"<li>{_text(s.question)} <code>python -m experiments.{s.name}</code></li>" for s in rest)
    return f"<h2>Not measured yet</h2><ul>{items}</ul>"
