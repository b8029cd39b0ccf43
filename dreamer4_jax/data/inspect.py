"""A look at a dataset: frames of it, actions, lengths of episodes, what is labelled, and what looks wrong."""

import io
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.markup import escape
from rich.table import Table

from dreamer4_jax.config import ActionComponent
from dreamer4_jax.data import statistics
from dreamer4_jax.data.schema import DataError
from dreamer4_jax.data.store import Dataset, open_dataset

READ = 512  # chunks that are read at most; a converted dataset was counted as a whole when it was made
SHEET = (4, 10)  # rows and columns of the contact sheet; a row is one chunk
SHOWN = 16  # up to so many classes or keys are numbered one by one in a chart
INK, FAINT, BAR = "#1b1f24", "#8a939e", "#1f6fc2"


@dataclass(frozen=True)
class Findings:
    """What `inspect` found."""

    dataset: Dataset
    stats: Mapping[str, Any]
    read: int  # chunks that were counted; 0: the manifest's own counts are used
    wrong: list[str]
    sheet: np.ndarray  # uint8 [rows, columns, H, W, 3]; None where there are no frames
    titles: list[str]  # of the sheet's rows


def inspect(directory: str | Path, *, seed: int = 0) -> Findings:
    """Counts a dataset, or takes the counts that were made with it, and draws frames for a contact sheet."""
    data = open_dataset(directory, cache_bytes=0)
    if data.spec.kind != "frames":
        raise DataError(f"dataset {directory} holds {data.spec.kind}: inspect the frames that they were made from")
    stats, read = data.manifest.get("statistics", {}), 0
    if "lengths" not in stats:
        stats, read = _count(data)
    wrong = statistics.suspicions(stats, data.spec.actions, data.spec.chunk) + _of_manifest(data)
    sheet, titles = _sheet(data, seed)
    return Findings(data, stats, read, wrong, sheet, titles)


def _count(data: Dataset) -> tuple[dict[str, Any], int]:
    """Counts the first chunks of every shard, so many that about `READ` are read."""
    places = [(split, n // data.spec.chunk) for split in data.splits for n in data.streams(split)]
    per_shard, tallies, read = max(1, READ // len(places)), [], 0
    at = dict.fromkeys(data.splits, 0)
    for split, chunks in places:
        tally = statistics.Tally(data.spec.actions)
        for i in range(min(per_shard, chunks)):
            tally.add(data.chunk(split, at[split] + i))
            read += 1
        at[split] += chunks
        tallies.append(tally.to_json())
    return statistics.merge(tallies), read


def _of_manifest(data: Dataset) -> list[str]:
    m, out = data.manifest, []
    bad, sizes, dropped = m.get("skipped", ()), m.get("sizes", {}), m.get("dropped_frames", 0)
    if bad:
        out.append(f"{len(bad)} episodes could not be read; first: {bad[0]['reason']}")
    if len(sizes) > 1:
        found = ", ".join(f"{name} ({n})" for name, n in sorted(sizes.items(), key=lambda x: -x[1])[:4])
        out.append(f"frames came in {len(sizes)} sizes, height x width: {found}")
    if shapes := {round(float(w) / float(h), 2) for h, w in (name.split("x") for name in sizes)}:
        if len(shapes) > 1 and m.get("request", {}).get("fit") == "stretch":
            out.append(f"they have {len(shapes)} shapes and were stretched to one: --fit crop or pad keeps proportions")
    total = sum(data.frames(s) for s in data.splits)
    if dropped > 0.05 * total:
        out.append(f"{dropped} frames were left over behind the last chunks of shards: a smaller --chunk keeps more")
    held = data.frames("holdout") if "holdout" in data.splits else 0
    if held < 4 * data.spec.chunk:
        out.append(f"only {held} frames are held out: measurements on them will be noisy")
    return out


def _sheet(data: Dataset, seed: int) -> tuple[np.ndarray, list[str]]:
    rng, (rows, columns) = np.random.default_rng(seed), SHEET
    total, (h, w) = data.chunks("train"), data.spec.size
    chosen = np.sort(rng.choice(total, min(rows, total), replace=False))
    sheet, titles = np.zeros((len(chosen), columns, h, w, 3), np.uint8), []
    for row, index in enumerate(chosen.tolist()):
        frames = data.chunk("train", index)["frames"]
        sheet[row] = frames[np.linspace(0, len(frames) - 1, columns).astype(int)]
        meta = data.segments("train", index)[0]
        titles.append(str(meta.get("source") or meta.get("level") or f"chunk {index}"))
    return sheet, titles


def table(found: Findings) -> Table:
    """The numbers, for a terminal."""
    data, stats = found.dataset, found.stats
    out = Table(title=escape(str(data.directory)), show_header=False)
    lengths = np.asarray(stats["lengths"])
    steps = max(1, stats["frames"] - stats["episodes"])
    fps = data.manifest.get("fps")

    def row(name: str, value: str) -> None:
        out.add_row(name, escape(value))

    row("frames", f"{sum(data.frames(s) for s in data.splits):,} of {data.spec.size[0]} x {data.spec.size[1]}"
        + (f", {fps:g} a second" if fps else ""))  # fmt: skip
    row("splits", ", ".join(f"{s}: {data.frames(s):,} in {len(data.streams(s))} shards" for s in data.splits))
    row("chunks", f"{data.spec.chunk} frames each")
    if found.read:
        row("counted below", f"{found.read} chunks, {stats['frames']:,} frames")
    row("episodes", f"{stats['episodes']:,} begin, {stats['whole']:,} end, {stats['terminal']:,} of them in a terminal "
        "state")  # fmt: skip
    if len(lengths):
        row("whole episodes", f"{lengths.min():,} to {lengths.max():,} frames, median {int(np.median(lengths)):,}")
    row("rewards", f"{stats['rewarded']:,} frames above 0 ({100 * stats['rewarded'] / max(1, stats['frames']):.2f} %), "
        f"sum {stats['reward']:,.6g}")  # fmt: skip
    for c in data.spec.actions:
        share = 100 * stats["present"][c.name] / steps
        row(_named(c), f"{c.kind} ({c.size}), given for {share:.1f} % of the steps{_most(c, stats)}")
    names = data.manifest.get("tasks", ())
    if names:
        told = sum(n for i, n in stats["tasks"].items() if int(i) > 0)
        row("tasks", f"{len(names)}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}; "
            f"{100 * told / max(1, stats['frames']):.1f} % of the frames have one")  # fmt: skip
    row("what looks wrong", "\n".join(f"- {line}" for line in found.wrong) or "nothing")
    return out


def _named(c: ActionComponent) -> str:
    return c.name if c.name == "action" else f"action {c.name}"


def _most(c: ActionComponent, stats: Mapping[str, Any]) -> str:
    counts = np.asarray(stats["actions"][c.name])
    if not counts.sum() or c.kind == "continuous":
        return ""
    top = np.argsort(-counts, kind="stable")[:4]
    shares = 100 * counts[top] / max(1, stats["present"][c.name])
    return "; most: " + ", ".join(f"{i} {s:.0f} %" for i, s in zip(top.tolist(), shares, strict=True) if s > 0)


def picture(found: Findings) -> bytes:
    """All of it as one PNG."""
    rows, columns = found.sheet.shape[:2]
    stats, components = found.stats, found.dataset.spec.actions[:6]
    charts = 2 + len(components)
    per_line = 4
    lines = -(-charts // per_line)
    text = [line for w in found.wrong or ["nothing"] for line in textwrap.wrap(f"• {w}", 130, subsequent_indent="   ")]
    tile = 1.15
    h, w = found.dataset.spec.size
    heights = [rows * (tile * h / w + 0.28), *[2.3] * lines, 0.5 + 0.21 * len(text)]
    figure = Figure(figsize=(columns * tile + 0.4, sum(heights) + 0.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{found.dataset.directory.name}: {sum(map(found.dataset.frames, found.dataset.splits)):,} frames",
                    fontsize=13, color=INK, parse_math=False)  # fmt: skip
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    cells = np.reshape(parts[0].subplots(rows, columns, squeeze=False), (rows, columns))
    for r in range(rows):
        for c in range(columns):
            cells[r, c].imshow(found.sheet[r, c], interpolation="nearest")
            cells[r, c].set_axis_off()
        cells[r, 0].set_title(found.titles[r][:60], loc="left", fontsize=8, color=INK, parse_math=False)
    drawn = [("lengths", None), ("labels", None), *(("action", c) for c in components)]
    for line in range(lines):
        axes = np.ravel(parts[1 + line].subplots(1, per_line, squeeze=False))
        for i, ax in enumerate(axes):
            at = line * per_line + i
            if at >= charts:
                ax.set_axis_off()
                continue
            kind, component = drawn[at]
            ax.tick_params(labelsize=7, colors=INK)
            for side in ("top", "right"):
                ax.spines[side].set_visible(False)
            if kind == "lengths":
                ax.set_title("frames of whole episodes", fontsize=9, color=INK)
                if stats["lengths"]:
                    ax.hist(stats["lengths"], bins=20, color=BAR)
                    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
                    ax.set_ylabel("episodes", fontsize=7)
                else:
                    _empty(ax, "none is whole")
            elif kind == "labels":
                _labels(ax, found)
            elif component is not None:
                _actions(ax, component, np.asarray(stats["actions"][component.name]), stats["present"][component.name])
    told = "\n".join(["What looks wrong", *text])
    parts[-1].text(0.01, 0.97, told, va="top", fontsize=9, color=INK, parse_math=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return out.getvalue()


def _empty(ax: Any, text: str) -> None:
    ax.text(0.5, 0.5, text, ha="center", va="center", color=FAINT, transform=ax.transAxes)
    ax.set_axis_off()


def _labels(ax: Any, found: Findings) -> None:
    """Shares of the frames that have an action, a reward, a task."""
    stats = found.stats
    frames, steps = max(1, stats["frames"]), max(1, stats["frames"] - stats["episodes"])
    shares = {_named(c)[:18]: stats["present"][c.name] / steps for c in found.dataset.spec.actions[:5]}
    shares |= {
        "reward above 0": stats["rewarded"] / frames,
        "a task": sum(n for i, n in stats["tasks"].items() if int(i) > 0) / frames,
    }
    names, values = list(shares), [100 * v for v in shares.values()]
    ax.barh(names, values, color=BAR)
    for i, v in enumerate(values):
        ax.text(min(v, 78) + 2, i, f"{v:.1f} %", va="center", fontsize=7, color="white" if v > 78 else INK)
    ax.set_xlim(0, 100)
    ax.invert_yaxis()
    ax.set_title("frames with a label, %", fontsize=9, color=INK)


def _actions(ax: Any, c: ActionComponent, counts: np.ndarray, present: int) -> None:
    ax.set_title(f"{c.name}: {c.kind} ({c.size})", fontsize=9, color=INK)
    if not present:
        _empty(ax, "never given")
        return
    if c.kind == "continuous":
        x = np.linspace(-1, 1, counts.shape[1])
        for row in counts[:8]:
            ax.step(x, 100 * row / present, where="mid", linewidth=1)
        ax.set_ylim(0)
        ax.set_ylabel("%", fontsize=7)
        return
    if c.kind == "mouse":  # 11 x 11 bins; the middle one, no movement, would outshine all
        square = 100 * counts.reshape(11, 11) / present
        middle = square[5, 5]
        square[5, 5] = 0
        ax.imshow(square, cmap="Blues")
        ax.set_xticks([0, 5, 10])
        ax.set_yticks([0, 5, 10])
        ax.set_xlabel(f"bin of dx; no movement {middle:.0f} %", fontsize=7)
        ax.set_ylabel("bin of dy", fontsize=7)
        return
    ax.bar(np.arange(c.size), 100 * counts / present, color=BAR)
    if c.size <= SHOWN:
        ax.set_xticks(np.arange(c.size))
    ax.set_ylabel("%", fontsize=7)
