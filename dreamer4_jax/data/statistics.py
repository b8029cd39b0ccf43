"""What a dataset holds, counted from its chunks: lengths, labels, actions, rewards, and pictures that look wrong."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dreamer4_jax.config import ActionComponent

BINS = 21  # of the histogram of a continuous action's values over [-1, 1]
FLAT = 2.0  # a frame whose pixels vary less than this shows nothing


def _size(c: ActionComponent) -> tuple[int, ...]:
    return (c.size, BINS) if c.kind == "continuous" else (c.size,)


class Tally:
    """Counts of consecutive chunks of one stream; `merge` adds up those of many."""

    def __init__(self, components: tuple[ActionComponent, ...]):
        self.components = components
        self.counts = {name: 0.0 for name in
                       ("frames", "episodes", "whole", "terminal", "rewarded", "reward", "still", "flat")}  # fmt: skip
        self.lengths: list[int] = []
        self.tasks: dict[int, int] = {}
        self.present = {c.name: 0 for c in components}
        self.actions = {c.name: np.zeros(_size(c), np.int64) for c in components}
        self._length = 0  # of the episode that is going on; 0: its beginning was not seen

    def add(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Counts one chunk, keyed as in storage."""
        first, last, reward = arrays["is_first"], arrays["is_last"], arrays["reward"]
        c = self.counts
        c["frames"] += len(first)
        c["episodes"] += int(first.sum())
        c["whole"] += int(last.sum())
        c["terminal"] += int(arrays["is_terminal"].sum())
        c["rewarded"] += int((reward > 0).sum())
        c["reward"] += float(reward.sum())
        self._count_lengths(first, last)
        ids, numbers = np.unique(arrays["task"][:, 0], return_counts=True)
        for i, n in zip(ids.tolist(), numbers.tolist(), strict=True):
            self.tasks[i] = self.tasks.get(i, 0) + n
        if "frames" in arrays:
            frames = arrays["frames"]
            same = (frames[1:] == frames[:-1]).all((1, 2, 3)) & ~first[1:]
            c["still"] += int(same.sum())
            c["flat"] += int((frames.reshape(len(frames), -1).std(1) < FLAT).sum())
        for part in self.components:
            there = arrays[f"present/{part.name}"]
            values, counts = arrays[f"actions/{part.name}"][there], self.actions[part.name]
            self.present[part.name] += int(there.sum())
            if part.kind == "binary":
                counts += values.astype(np.int64).sum(0)
            elif part.kind == "continuous":
                place = np.clip(((values + 1) / 2 * BINS).astype(int), 0, BINS - 1)
                for a in range(part.size):
                    counts[a] += np.bincount(place[:, a], minlength=BINS)
            else:
                counts += np.bincount(values, minlength=part.size)

    def _count_lengths(self, first: np.ndarray, last: np.ndarray) -> None:
        for begins, ends in zip(first.tolist(), last.tolist(), strict=True):
            self._length = 1 if begins else self._length + (self._length > 0)
            if ends and self._length:
                self.lengths.append(self._length)
                self._length = 0

    def to_json(self) -> dict[str, Any]:
        return {
            **{name: int(v) if float(v).is_integer() else round(v, 6) for name, v in self.counts.items()},
            "lengths": self.lengths,
            "tasks": {str(k): v for k, v in sorted(self.tasks.items())},
            "present": dict(self.present),
            "actions": {name: v.tolist() for name, v in self.actions.items()},
        }


def merge(tallies: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of what `Tally.to_json` returned for several streams."""
    out: dict[str, Any] = {}
    for tally in tallies:
        out = _add(out, tally) if out else dict(tally)
    return out


def _add(a: Any, b: Any, name: str = "") -> Any:
    if isinstance(a, Mapping):
        return {k: _add(a.get(k), b.get(k), k) for k in [*a, *(k for k in b if k not in a)]}
    if a is None or b is None:
        return b if a is None else a
    if name == "lengths":
        return [*a, *b]
    if isinstance(a, list):
        return (np.asarray(a) + np.asarray(b)).tolist()
    return a + b


def suspicions(stats: Mapping[str, Any], components: tuple[ActionComponent, ...], chunk: int) -> list[str]:
    """What looks wrong, in sentences; an empty list if nothing does."""
    out = []
    frames, lengths = max(1, stats["frames"]), stats["lengths"]
    if stats.get("flat", 0) > 0.02 * frames:
        out.append(f"{100 * stats['flat'] / frames:.1f} % of the frames show one colour")
    if stats.get("still", 0) > 0.5 * frames:
        out.append(f"{100 * stats['still'] / frames:.0f} % of the frames equal the one before: is the video frozen?")
    short = sum(n < 8 for n in lengths)
    if lengths and short > 0.2 * len(lengths):
        out.append(f"{short} of {len(lengths)} whole episodes have fewer than 8 frames")
    for c in components:
        n, counts = stats["present"][c.name], np.asarray(stats["actions"][c.name])
        steps = max(1, frames - stats["episodes"])
        if n == 0:
            if c.size > 1:
                out.append(f"action {c.name!r} is never given")
            continue
        if n < 0.99 * steps:
            out.append(f"action {c.name!r} is given for {100 * n / steps:.1f} % of the steps")
        if c.kind in ("categorical", "mouse"):
            top = int(counts.argmax())
            if counts[top] > 0.95 * n and c.size > 1:
                out.append(f"action {c.name!r} is {top} in {100 * counts[top] / n:.0f} % of the steps")
            unused = int((counts == 0).sum())
            if unused and c.kind == "categorical":
                out.append(f"action {c.name!r}: {unused} of {c.size} classes never occur")
        elif c.kind == "binary":
            silent = [i for i in range(c.size) if counts[i] == 0]
            if silent:
                out.append(f"action {c.name!r}: keys {', '.join(map(str, silent))} are never pressed")
        else:
            for a in range(c.size):
                edges = (counts[a][0] + counts[a][-1]) / n
                if counts[a].max() == n:
                    out.append(f"action {c.name!r}[{a}] never changes")
                elif edges > 0.5:
                    out.append(f"action {c.name!r}[{a}] is at an end of its range in {100 * edges:.0f} % of the steps")
    if stats["rewarded"] == 0 and stats["reward"] >= 0:  # below: they are costs
        out.append("no frame has a reward above 0: phases 2 and 3 need some")
    elif stats["rewarded"] > 0.5 * frames:
        out.append(f"{100 * stats['rewarded'] / frames:.0f} % of the frames have a reward: relevant rows mean little")
    return out
