"""Pieces of HTML that the report is made of: numbers for people, tables, pictures."""

import base64
import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dreamer4_jax.evaluation import plots


def text(value: Any) -> str:
    return html.escape(str(value))


def number(value: Any, digits: int = 3) -> str:
    """A number for people: thousands separated, floats to `digits` significant digits, a dash for None and NaN."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:.{digits}g}"
    return text(value)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def interval(value: Any, scale: float = 1.0, digits: int = 2, signed: bool = False) -> str:
    """``mean`` with ``low – high`` in smaller type; `scale` 100 shows per cent."""
    if value is None:
        return "–"
    found = value._asdict() if hasattr(value, "_asdict") else value
    mean, low, high = (scale * float(found[k]) for k in ("mean", "low", "high"))
    sign = "+" if signed else ""
    middle, ends = f"{mean:{sign}.{digits}f}", f"{low:{sign}.{digits}f} … {high:{sign}.{digits}f}"
    return f"{middle} <small>{ends}</small>".replace("-", "−")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", words: bool = False) -> str:
    """An HTML table; cells are HTML already. The first column is text, the others are numbers unless `words`."""
    top = "".join(f"<th scope=col>{text(h)}</th>" for h in head)
    body = "".join(
        f"<tr><th scope=row>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    note = f"<p class=remark>{caption}</p>" if caption else ""  # outside: it must not scroll with a wide table
    kind = " class=words" if words else ""
    return f"<div class=scroll><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>{note}"


def image(data: bytes, kind: str, alt: str, width: str = "") -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    style = f' style="width:{width}"' if width else ""
    return f'<img alt="{text(alt)}" src="{source}"{style}>'


def chart(figure: Any, label: str) -> str:
    return "" if figure is None else f"<figure class=chart>{plots.to_svg(figure, label)}</figure>"
