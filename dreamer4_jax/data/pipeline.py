"""Batches of windows in a deterministic, resumable global order.

The batch of step s is a pure function of (dataset, seed, settings, s): rows are counted through all steps, and row
number g is the g-th element of a grain `MapDataset` that shuffles all windows anew in each epoch. Of a mixture each
dataset has such an order of its own, and a schedule says whose turn it is. Nothing but the step number has to be saved
to resume, on any number of processes; each process reads its own rows only.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import grain
import numpy as np

from dreamer4_jax.data.labels import Labels
from dreamer4_jax.data.schema import DataError
from dreamer4_jax.data.store import Dataset

_SHARE = 10_000  # shares are rounded to this many parts, so that rows are counted in whole numbers
_STEPS = 2**40  # as good as endless


@lru_cache(maxsize=16)
def _block(counts: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Whose turn each row of a block is, and how many rows of the same part come before it in the block."""
    turns = np.random.default_rng([seed, block]).permutation(np.repeat(np.arange(len(counts)), counts))
    rank = np.empty_like(turns)
    for part, count in enumerate(counts):
        rank[turns == part] = np.arange(count)
    return turns, rank


class Blend:
    """Shares rows among parts: every block of rows holds exactly each part's share, in a random order of its own.

    Args:
        weights: up to a common factor; rounded to ten-thousandths of their sum, and at least one of these.
    """

    def __init__(self, weights: Sequence[float], seed: int):
        counts = [max(1, round(w / sum(weights) * _SHARE)) for w in weights]
        self._counts = tuple(n // math.gcd(*counts) for n in counts)
        self._seed = seed

    def __call__(self, n: int) -> tuple[int, int]:
        """Row n -> (its part, how many rows of this part come before it)."""
        block, at = divmod(n, sum(self._counts))
        turns, rank = _block(self._counts, self._seed, block)
        part = int(turns[at])
        return part, block * self._counts[part] + int(rank[at])


@dataclass(frozen=True)
class _Pool:
    """All windows of one length of one dataset, and of them those that show how a reward was earned."""

    starts: np.ndarray  # first start of each stream
    ends: np.ndarray  # cumulative number of windows
    relevant: np.ndarray  # starts of the relevant windows
    order: Any  # grain: k -> number of a window
    relevant_order: Any  # grain: k -> index into `relevant`

    def start(self, k: int) -> int:
        """First frame of the k-th window that is drawn, counted through the split."""
        window = int(self.order[k])
        stream = int(np.searchsorted(self.ends, window, side="right"))
        return int(self.starts[stream]) + window - (int(self.ends[stream - 1]) if stream else 0)

    def earned(self, k: int) -> int:
        """The same of the relevant windows."""
        return int(self.relevant[self.relevant_order[k]])


@dataclass(frozen=True)
class _Windows:
    """The windows of batches of one length."""

    length: int
    rows: int
    pools: tuple[_Pool, ...]
    blend: Blend
    relevant_pools: tuple[_Pool, ...]  # those that have relevant windows
    relevant_blend: Blend


def _pool(starts: np.ndarray, usable: np.ndarray, length: int, before: np.ndarray | None, seed: int) -> _Pool | None:
    """The windows of some streams, of which `usable` numbers begin at `starts`; None if there are none."""
    if usable.sum() == 0:
        return None
    relevant = np.zeros(0, np.int64)
    if before is not None:
        # A window is relevant if a rewarded frame stands in it, not at its very beginning: a window from s counts
        # frames s + 1 .. s + length - 1.
        every = np.concatenate([s + np.arange(n) for s, n in zip(starts, usable, strict=True)])
        relevant = every[before[every + length] > before[every + 1]]
    order = grain.MapDataset.range(int(usable.sum())).seed(seed).shuffle().repeat()
    # The same shuffle must not couple the two orders.
    relevant_order = grain.MapDataset.range(max(1, len(relevant))).seed(seed + 0x5EED).shuffle().repeat()
    return _Pool(starts, np.cumsum(usable), relevant, order, relevant_order)


class Loader:
    """Windows of a dataset as batches (see `batch`).

    Args:
        batch: rows of a short batch, over all processes.
        length: frames of a short batch (paper 3.2: T1).
        seed: fixes the order.
        long_length: frames of a long batch (T2); 0: none. Every `long_every`-th step is long, with
            ``max(1, batch * length // long_length)`` rows, so that a step costs about the same number of frames.
        relevant_fraction: share of rows drawn from windows that hold a rewarded frame of an episode together with
            frames that led to it (paper 3.3); the others are drawn uniformly from all windows, and come first.
        labels: which frames keep their actions; None: all.
        threads: that read batches ahead in `iterate`.
        process_index, process_count: this process gets the rows of its contiguous block of every batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch: int,
        length: int,
        seed: int,
        split: str = "train",
        long_length: int = 0,
        long_every: int = 4,
        relevant_fraction: float = 0.0,
        labels: Labels | None = None,
        threads: int = 1,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch < 1 or length < 1 or long_length < 0 or long_every < 1:
            raise DataError(
                f"batch = {batch}, length = {length}, long_length = {long_length}, long_every = {long_every}: "
                "must be positive (long_length 0: no long batches)"
            )
        if not 0 <= relevant_fraction <= 1:
            raise DataError(f"relevant_fraction = {relevant_fraction}: must be in [0, 1]")
        if not 0 <= process_index < process_count:
            raise DataError(f"process_index = {process_index}: must be in [0, process_count = {process_count})")
        self.dataset, self.split, self.labels, self.threads = dataset, split, labels, threads
        self._part = process_index, process_count
        self._share = round(relevant_fraction * _SHARE)
        self._every = long_every if long_length else 0
        self._short = self._windows(length, batch, seed)
        self._long = None
        if long_length:
            self._long = self._windows(long_length, max(1, batch * length // long_length), seed + 1)
        self._like = dataset.spec.example

    def _windows(self, length: int, rows: int, seed: int) -> _Windows:
        data, split, count = self.dataset, self.split, self._part[1]
        if rows % count:
            raise DataError(f"a batch of {rows} rows (length {length}) does not divide over {count} processes")
        streams = np.asarray(data.streams(split), np.int64)
        usable = np.maximum(streams - length + 1, 0)
        if usable.sum() == 0:
            raise DataError(
                f"dataset {data.directory}, split {split!r}: no stream has {length} frames "
                f"(the longest has {streams.max(initial=0)}); use shorter windows or larger shards"
            )
        starts = np.concatenate([[0], np.cumsum(streams)[:-1]])
        # `before[i]` counts rewarded frames in front of frame i.
        before = np.concatenate([[0], np.cumsum(data.rewarded(split))]) if self._share else None
        pools, weights, at = [], [], 0
        for number, (weight, count) in enumerate(data.parts(split)):
            own = slice(at, at + count)
            pool = _pool(starts[own], usable[own], length, before, seed + 1_000_003 * number)
            if pool is None:
                raise DataError(
                    f"dataset {data.directory}, split {split!r}: no stream of part {number} of the mixture has "
                    f"{length} frames; use shorter windows or larger shards"
                )
            pools.append(pool)
            weights.append(weight)
            at += count
        relevant = [(p, w) for p, w in zip(pools, weights, strict=True) if len(p.relevant)]
        if self._share and not relevant:
            raise DataError(
                f"dataset {data.directory}, split {split!r}: no window of {length} frames earns a reward, so "
                "relevant_fraction must be 0; record more successes (data.bot, env.max_steps)"
            )
        return _Windows(
            length,
            rows,
            tuple(pools),
            Blend(weights, seed),
            tuple(p for p, _ in relevant),
            Blend([w for _, w in relevant] or [1.0], seed + 0x5EED),
        )

    def _kind(self, step: int) -> tuple[_Windows, int]:
        """Windows of a step, and how many steps of the same kind came before it."""
        if self._long is None:
            return self._short, step
        longs = step // self._every  # steps every - 1, 2 every - 1, ... are long
        if step % self._every == self._every - 1:
            return self._long, longs
        return self._short, step - longs

    def rows(self, step: int) -> list[tuple[int, bool]]:
        """(first frame, drawn as relevant) of this process's rows of a step."""
        windows, before = self._kind(step)
        index, count = self._part
        out = []
        for g in range(before * windows.rows, (before + 1) * windows.rows):
            # Relevant rows are spread evenly: `drawn` of the rows in front of row g were relevant.
            drawn = g * self._share // _SHARE
            if (g + 1) * self._share // _SHARE > drawn:
                part, k = windows.relevant_blend(drawn)
                out.append((windows.relevant_pools[part].earned(k), True))
            else:
                part, k = windows.blend(g - drawn)
                out.append((windows.pools[part].start(k), False))
        # Of the whole batch, before it is divided: the agent's losses tell the two kinds by their position.
        out.sort(key=lambda row: row[1])
        own = windows.rows // count
        return out[index * own : (index + 1) * own]

    def length(self, step: int) -> int:
        """Frames of a row of this step."""
        return self._kind(step)[0].length

    def batch(self, step: int) -> dict[str, Any]:
        """The batch of a step, as numpy arrays with leading axes [B, T].

        Keys: "frames" or "latents", "actions" and "present" (by component), "reward", "is_first", "is_last",
        "is_terminal", "task" [B, T, words]; and of whole rows, [B]: "relevant" (drawn from the relevant windows) and
        "id" (the window's first frame, counted through the split).
        """
        rows, length = self.rows(step), self.length(step)
        flat = {k: np.empty((len(rows), length, *v.shape[1:]), v.dtype) for k, v in self._like.items()}
        for i, (start, _) in enumerate(rows):
            for name, value in self.dataset.window(self.split, start, length).items():
                flat[name][i] = value
            if self.labels is not None:
                self.labels.apply({name: value[i] for name, value in flat.items()}, start)
        out: dict[str, Any] = {}
        for name, value in flat.items():
            group, _, leaf = name.partition("/")
            if leaf:
                out.setdefault(group, {})[leaf] = value
            else:
                out[group] = value
        out["relevant"] = np.asarray([drawn for _, drawn in rows], np.bool_)
        out["id"] = np.asarray([start for start, _ in rows], np.int64)
        return out

    def iterate(self, start: int = 0, *, prefetch: int = 4) -> Iterator[dict[str, Any]]:
        """The batches of steps start, start + 1, ..., in this order, read ahead in `threads` threads."""
        steps = grain.MapDataset.range(start, _STEPS).map(self.batch)
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=max(prefetch, 2 * self.threads))
        return iter(steps.to_iter_dataset(options))
