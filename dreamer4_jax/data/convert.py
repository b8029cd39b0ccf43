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
from dreamer4_jax.data.readers.actions import NO_ACTIONS, ActionSpace
from dreamer4_jax.data.readers.base import Entry, Fit, Options, Part, Reader
from dreamer4_jax.data.schema import DataError, Episode, chunks
from dreamer4_jax.data.store import MANIFEST, SPLITS, DatasetSpec, open_dataset

# Of raw frames: a shard is made in memory, piece by piece, and is what a worker makes at once.
SHARD_BYTES = 200_000_000


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
    files: str  # names what the source holds (see `identity`)
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
    key = json.dumps([job.source, job.files, job.format, asdict(job.options), asdict(job.space)], sort_keys=True)
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


def _cut(key: str, start: int, stop: int, shard: int, every: int, *, to_end: bool = True) -> list[Sized]:
    """Frames start .. stop - 1 of an episode in pieces of at most `shard` frames, the last one up to its end.

    A piece begins with the last frame that the one before keeps: nothing leads to the first frame of a piece, and what
    led to the second, and was earned there, would be lost otherwise.
    """
    step = max(every, shard - every)
    starts = [start, *range(start + step, stop - every, step)]
    out = [(Piece(key, at, min(at + shard - every + 1, stop)), min(shard, stop - at)) for at in starts]
    if to_end:  # headers may be off by a frame
        out[-1] = (Piece(key, starts[-1], None), out[-1][1])
    return out


def _pieces(entries: list[Entry], shard: int, every: int, typical: int) -> list[Sized]:
    """All of every episode; of those whose header does not say how long they are, `typical` frames are expected."""
    known = lambda e: _cut(e.key, 0, e.frames, shard, every)
    return [p for e in entries for p in (known(e) if e.frames else [(Piece(e.key), typical)])]


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
    # Where some headers say how many frames there are, those that do not are damaged.
    chunk, known = spec.chunk * every, any(e.frames for e in entries)
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
            "train": _fill(_cut(only.key, 0, cut, shard, every, to_end=False), shard),
            "holdout": _fill(_cut(only.key, cut, only.frames, shard, every), shard),
        }
    entries = [entries[i] for i in np.random.default_rng(seed).permutation(len(entries))]
    # Held out are the first of them, and those that are much longer than that part should be if nothing else will do.
    whole = sorted(e.frames for e in entries if e.frames) or [0]
    usual = max(holdout * total, whole[(len(whole) - 1) // 2])
    long = lambda e: known and e.frames > 2 * usual
    held: list[Entry] = []
    lengths: list[int] = []
    seen, reason = 0, ""
    for entry in sorted(entries, key=lambda e: e.frames if long(e) else 0)[:-1]:
        # By frames where the headers say how many there are, else by episodes.
        enough = seen >= holdout * total if known else len(held) >= holdout * len(entries)
        if seen >= chunk and (enough or long(entry)):
            break
        held.append(entry)
        if entry.frames and seen:
            seen += entry.frames
            continue
        try:
            lengths.append(every * len(_read(reader, Piece(entry.key), fit, every, spec)))
            seen += lengths[-1]
        except DataError as error:
            reason = reason or str(error)
    if seen < chunk:
        why = f"; first: {reason}" if reason else ""
        raise DataError(
            f"{reader.source}: too few of its {len(entries)} episodes can be used for a training and a held-out chunk "
            f"of {spec.chunk} frames{why}"
        )
    typical = round(float(np.mean(lengths)))
    out = set(held)
    split = {"train": [e for e in entries if e not in out], "holdout": held}
    return {name: _fill(_pieces(part, shard, every, typical), shard) for name, part in split.items()}


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
    like: str | Path | None = None,
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
        like: a dataset whose action components and ranges this one gets, to mix the two; values beyond are clipped.
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
    if like is not None:
        reader = _alike(reader, like, options)
    entries = reader.entries()
    if not entries:
        raise DataError(f"{source}: holds no episodes")
    fit = Fit(size, how)  # type: ignore[arg-type]  # the command line offers only what there is
    spec = DatasetSpec("frames", chunk, size or _native(reader, entries), 1, reader.space.components)
    most = max(1, SHARD_BYTES // (spec.frame_bytes() * chunk))
    shard = max(1, shard_frames // chunk if shard_frames else min(64, most)) * chunk * every
    files = identity(reader)
    listing = hashlib.sha256(json.dumps([asdict(e) for e in entries]).encode()).hexdigest()
    request = {
        "source": {
            "format": reader.format,
            "files": files,
            "episodes": len(entries),
            "listing": listing,
            "options": asdict(options),
        },
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
                    str(source), files, reader.format, options, reader.space, spec, fit, every,
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
            writer.abandon(dest)  # with other options it can go into the same directory
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


def _alike(reader: Reader, like: str | Path, options: Options) -> Reader:
    """The source opened with the actions of a dataset. It may lack some of them, and has no others."""
    space = _space(like)
    if options.actions:
        raise DataError("--like and --actions both say what the actions are: give one of them")
    names = [c.name for c in space.components]
    others = [c.name for c in reader.space.components if c.name not in names and c not in NO_ACTIONS]
    if others:
        raise DataError(f"--like {like}: has the actions {', '.join(names)}; {reader.source} has {', '.join(others)}")
    return readers.open_source(reader.source, reader.format, options, space)


def _space(like: str | Path) -> ActionSpace:
    """The actions of a dataset."""
    data = open_dataset(like, verify=False)
    ranges = data.manifest.get("ranges", {})
    end = lambda c, name, usual: tuple(ranges[c.name][name] if c.name in ranges else [usual] * c.size)
    parts = [c for c in data.spec.actions if c.kind == "continuous"]
    low, high = ({c.name: end(c, name, usual) for c in parts} for name, usual in (("low", -1.0), ("high", 1.0)))
    return ActionSpace(data.spec.actions, low, high)


def identity(reader: Reader) -> str:
    """Names what a source holds: its files by name, size and time of change, or what is no place of files by itself."""
    found = reader.files()
    if not found:
        return reader.source
    top = reader.path if reader.path.is_dir() else reader.path.parent
    stats = [(str(p.relative_to(top)), s.st_size, s.st_mtime_ns) for p in found for s in [p.stat()]]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]


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
