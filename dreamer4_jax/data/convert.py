"""Any source that a reader knows, as a dataset to train on: parallel, resumable, every shard whole or absent.

Episodes are shuffled, divided into a training and a held-out part, and packed into shards; long ones are cut. Which
episode goes where depends on the source and the options alone, not on the number of workers. An episode that cannot be
read is left out, and named in the manifest.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreamer4_jax.data import readers, statistics, writer
from dreamer4_jax.data.jobs import make_shards
from dreamer4_jax.data.readers.actions import ActionSpace
from dreamer4_jax.data.readers.base import Entry, Fit, Options, Part, Reader
from dreamer4_jax.data.schema import DataError, Episode, chunks
from dreamer4_jax.data.store import MANIFEST, SPLITS, DatasetSpec, open_dataset

UNKNOWN = 256  # frames that an episode is thought to have, where its header does not say
SHARD_BYTES = (
    200_000_000  # of raw frames: a shard is made in memory, piece by piece, and is what a worker makes at once
)


@dataclass(frozen=True)
class Piece:
    """Frames start .. stop - 1 of an episode of the source."""

    key: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Job:
    """What a worker needs to make one shard."""

    source: str
    format: str
    options: Options
    space: ActionSpace
    spec: DatasetSpec
    fit: Fit
    every: int
    pieces: tuple[Piece, ...]
    frames: int
    path: str


_opened: dict[str, Reader] = {}  # a worker opens its source once


def _open(job: Job) -> Reader:
    key = json.dumps([job.source, job.format, asdict(job.options), asdict(job.space)], sort_keys=True)
    if key not in _opened:
        _opened.clear()
        _opened[key] = readers.open_source(job.source, job.format, job.options, job.space)
    return _opened[key]


def _read(reader: Reader, piece: Piece, fit: Fit, every: int, spec: DatasetSpec) -> Episode:
    """One piece, validated, at the size and rate of the dataset."""
    episode = reader.read(piece.key, Part(piece.start, piece.stop, fit))
    if episode.frames.shape[1:3] != spec.size:
        h, w = episode.frames.shape[1:3]
        raise DataError(
            f"{piece.key}: frames are {h} x {w}, the dataset's {spec.size[0]} x {spec.size[1]}: give a size that all "
            "are fitted to"
        )
    return episode.every(every, spec.actions).validate(spec.actions)


def make_shard(job: Job) -> dict[str, Any]:
    """Worker: writes one shard."""
    reader, tally = _open(job), statistics.Tally(job.spec.actions)
    skipped: list[dict[str, str]] = []
    sizes: dict[str, int] = {}
    extra: dict[str, Any] = {"skipped": skipped, "sizes": sizes, "dropped_frames": 0}

    def episodes() -> Iterator[Episode]:
        for piece in job.pieces:
            try:
                episode = _read(reader, piece, job.fit, job.every, job.spec)
            except DataError as error:
                skipped.append({"episode": piece.key, "reason": str(error)})
                continue
            if size := episode.meta.get("size"):
                name = "x".join(map(str, size))
                sizes[name] = sizes.get(name, 0) + 1
            extra["dropped_frames"] += len(episode)
            yield episode

    def counted() -> Iterator[tuple[dict[str, np.ndarray], list[dict[str, Any]]]]:
        for arrays, metas in chunks(episodes(), job.spec.chunk):
            tally.add(arrays)
            yield arrays, metas
        extra["statistics"] = tally.to_json()
        extra["dropped_frames"] -= extra["statistics"]["frames"]  # read, and left over behind the last chunk

    return writer.write_shard(Path(job.path), job.spec, counted(), extra)


Sized = tuple[Piece, int]  # with the frames that it is thought to have


def _cut(key: str, start: int, stop: int, shard: int, *, to_end: bool = True) -> list[Sized]:
    """Frames start .. stop - 1 of an episode in pieces of at most `shard` frames, the last one up to its end."""
    starts = list(range(start, stop, shard))
    out = [(Piece(key, at, min(at + shard, stop)), min(shard, stop - at)) for at in starts]
    if to_end:  # headers may be off by a frame
        out[-1] = (Piece(key, starts[-1], None), out[-1][1])
    return out


def _pieces(entries: list[Entry], shard: int) -> list[Sized]:
    return [p for e in entries for p in (_cut(e.key, 0, e.frames, shard) if e.frames else [(Piece(e.key), UNKNOWN)])]


def divide(
    entries: list[Entry],
    reader: Reader,
    fit: Fit,
    spec: DatasetSpec,
    *,
    every: int,
    holdout: float,
    shard: int,
    seed: int,
) -> dict[str, list[list[Sized]]]:
    """split -> its shards -> pieces. No episode is in both splits, unless there is only one.

    Enough held-out episodes are read here: where that fails, it is said before anything is written.
    """
    chunk, known = spec.chunk * every, all(e.frames for e in entries)
    total = sum(e.frames for e in entries)
    if known and total < 2 * chunk:
        raise DataError(
            f"{reader.source}: has {total // every} frames, too few for a training and a held-out chunk of "
            f"{spec.chunk}: give more, or a smaller --chunk"
        )
    if len(entries) == 1:
        (only,) = entries
        _read(reader, Piece(only.key, 0, 1), fit, every, spec)
        if not known:
            raise DataError(f"{reader.source}: one episode of unknown length cannot be divided: give two or more")
        cut = only.frames - max(chunk, round(holdout * only.frames))
        return {
            "train": _fill(_cut(only.key, 0, cut, shard, to_end=False), shard),
            "holdout": _fill(_cut(only.key, cut, only.frames, shard), shard),
        }
    entries = [entries[i] for i in np.random.default_rng(seed).permutation(len(entries))]
    held, seen, reason = 0, 0, ""
    # By frames where the headers say how many there are, else by episodes.
    while seen < chunk or (seen < holdout * total if known else held < holdout * len(entries)):
        if held == len(entries) - 1:
            break
        entry = entries[held]
        held += 1
        if entry.frames and seen:
            seen += entry.frames
            continue
        try:
            seen += every * len(_read(reader, Piece(entry.key), fit, every, spec))
        except DataError as error:
            reason = reason or str(error)
    if seen < chunk:
        why = f"; first: {reason}" if reason else ""
        raise DataError(
            f"{reader.source}: too few of its {len(entries)} episodes can be used for a training and a held-out chunk "
            f"of {spec.chunk} frames{why}"
        )
    return {
        "train": _fill(_pieces(entries[held:], shard), shard),
        "holdout": _fill(_pieces(entries[:held], shard), shard),
    }


def _fill(pieces: list[Sized], shard: int) -> list[list[Sized]]:
    """Pieces in order, packed into shards of at least `shard` frames: of each, what is left over behind the last whole
    chunk is lost."""
    out: list[list[Sized]] = [[]]
    filled = 0
    for piece, frames in pieces:
        if filled >= shard:
            out.append([])
            filled = 0
        out[-1].append((piece, frames))
        filled += frames
    return out


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    format: str = "",
    options: Options | None = None,
    size: tuple[int, int] | None = (64, 64),
    how: str = "stretch",
    chunk: int = 64,
    every: int = 1,
    holdout: float = 0.05,
    shard_frames: int = 0,
    seed: int = 0,
    workers: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the source as a dataset into `dest`; returns the manifest.

    Shards that an interrupted run left whole are kept; a complete dataset of the same source and options is only
    checked. A directory that holds anything else is refused.

    Args:
        format: see `readers.FORMATS`; detected if empty.
        size: (height, width) that frames are fitted to, `how` as in `Fit`; None: their own, which must all be equal.
        chunk: frames of one record: the least that is read for a window.
        every: take every n-th frame (see `Episode.every`).
        holdout: share of the frames in episodes that are never trained on.
        shard_frames: frames of a shard; by default 64 chunks, fewer where they are large.
    """
    options, dest = options or Options(), Path(dest)
    for name, value in (("chunk", chunk), ("every", every), ("workers", workers)):
        if value < 1:
            raise DataError(f"--{name} {value}: must be at least 1")
    if not 0 < holdout < 1:
        raise DataError(f"--holdout {holdout}: must be between 0 and 1")
    if size is not None and min(size) < 1:
        raise DataError(f"--size {size[0]}x{size[1]}: must be positive")
    reader = readers.open_source(source, format, options)
    entries = reader.entries()
    if not entries:
        raise DataError(f"{source}: holds no episodes")
    fit = Fit(size, how)  # type: ignore[arg-type]  # the command line offers only what there is
    spec = DatasetSpec("frames", chunk, size or _native(reader, entries), 1, reader.space.components)
    most = max(1, SHARD_BYTES // (spec.frame_bytes() * chunk))
    shard = max(1, shard_frames // chunk if shard_frames else min(64, most)) * chunk * every
    listing = hashlib.sha256(json.dumps([asdict(e) for e in entries]).encode()).hexdigest()
    request = {
        "source": {"format": reader.format, "episodes": len(entries), "listing": listing, "options": asdict(options)},
        "fit": how,
        "every": every,
        "holdout": holdout,
        "shard": shard,
        "seed": seed,
        "spec": spec.to_json(),
        "ranges": reader.space.to_json(),
    }
    if (dest / MANIFEST).exists():
        writer.write_request(dest, request)  # refuses what is of another request
        return open_dataset(dest, verify=True).manifest
    plan = divide(entries, reader, fit, spec, every=every, holdout=holdout, shard=shard, seed=seed)
    writer.write_request(dest, request)
    jobs, place = [], []
    for split in SPLITS:
        for index, pieces in enumerate(plan[split]):
            path = dest / writer.shard_file(split, index, len(plan[split]))
            jobs.append(
                Job(
                    str(source), reader.format, options, reader.space, spec, fit, every,
                    tuple(p for p, _ in pieces), sum(n for _, n in pieces), str(path),
                )
            )  # fmt: skip
            place.append((split, index))
    made: dict[str, list[dict[str, Any]]] = {split: [{}] * len(plan[split]) for split in SPLITS}
    for number, entry in make_shards(jobs, make_shard, workers=workers, progress=progress, what="converting"):
        split, index = place[number]
        made[split][index] = entry
    everything = [e for split in SPLITS for e in made[split]]
    skipped = [bad for e in everything for bad in e["skipped"]]
    for split in SPLITS:
        if not any(e["chunks"] for e in made[split]):
            why = f"; {len(skipped)} could not be read, first: {skipped[0]['reason']}" if skipped else ""
            raise DataError(
                f"{source}: the {split} part has no {chunk} consecutive frames{why}; give more, or a smaller --chunk"
            )
    return writer.finish(
        dest,
        spec,
        made,
        request=request,
        source=str(source),
        fps=reader.fps / every if reader.fps else None,
        tasks=list(reader.tasks),
        ranges=reader.space.to_json(),
        statistics=statistics.merge(e["statistics"] for e in everything),
        sizes=statistics.merge(e["sizes"] for e in everything),
        dropped_frames=sum(e["dropped_frames"] for e in everything),
        skipped=skipped,
    )


def _native(reader: Reader, entries: list[Entry]) -> tuple[int, int]:
    """The size of the first frame that can be read."""
    error: DataError | None = None
    for entry in entries:
        try:
            h, w = reader.read(entry.key, Part(0, 1)).frames.shape[1:3]
            return h, w
        except DataError as found:
            error = error or found
    raise DataError(f"{reader.source}: none of its {len(entries)} episodes can be read; first: {error}")
