"""Token datasets: every frame of a raw dataset encoded once by a trained tokenizer.

Same directory format, with "latents" float16 [T, N, C] in place of "frames". The identity of the tokenizer is part of
the dataset: latents of one tokenizer mean nothing to a model trained on another's, so opening with another is refused.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from dreamer4_jax.data import store, writer
from dreamer4_jax.data.schema import DataError

Encode = Callable[[np.ndarray, np.ndarray], Any]


def write_tokens(
    raw_dir: str | Path,
    out_dir: str | Path,
    encode: Encode,
    *,
    identity: str,
    batch_chunks: int = 8,
    progress: bool = False,
) -> dict[str, Any]:
    """Encodes the raw dataset in `raw_dir` into `out_dir`; returns the manifest.

    Args:
        encode: (frames uint8 [b, T, H, W, 3], is_first bool [b, T]) -> latents [b, T, N, C]; always called with
            b = `batch_chunks`, the last batch of a shard being filled up, so that it compiles once.
        identity: names the tokenizer's weights, such as a checksum; `store.open_dataset` compares it.
    """
    raw = store.open_dataset(raw_dir, cache_bytes=0)
    if raw.spec.kind != "frames":
        raise DataError(f"dataset {raw.directory} holds {raw.spec.kind}; tokens are written from frames")
    if batch_chunks < 1:
        raise DataError(f"batch_chunks = {batch_chunks}: must be at least 1")
    split = next(s for s in raw.splits if raw.chunks(s))
    tokens, channels = next(_encoded(raw, split, range(1), encode, batch_chunks))[0]["latents"].shape[1:]
    spec = store.DatasetSpec("latents", raw.spec.chunk, (tokens, channels), raw.spec.words, raw.spec.actions)
    sums = [e["sha256"] for shards in raw.manifest["splits"].values() for e in shards]
    source = hashlib.sha256("".join(sums).encode()).hexdigest()  # names the raw data
    directory = Path(out_dir)
    writer.write_request(directory, {"tokenizer": identity, "spec": spec.to_json(), "source": source})
    entries: dict[str, list[dict[str, Any]]] = {split: [] for split in raw.splits}
    todo = []
    for split in raw.splits:
        at = 0
        for shard in raw.manifest["splits"][split]:
            todo.append((split, shard["file"], range(at, at + shard["chunks"])))
            at += shard["chunks"]
    for split, file, indices in track(todo, "encoding", disable=not progress):
        path = directory / file
        entry = writer.finished_shard(path)
        if entry is None:
            entry = writer.write_shard(path, spec, _encoded(raw, split, indices, encode, batch_chunks))
        entries[split].append(entry)
    kept = {k: raw.manifest[k] for k in ("request", "statistics", "tasks", "ranges", "fps") if k in raw.manifest}
    return writer.finish(directory, spec, entries, tokenizer=identity, **kept)


def _encoded(
    raw: store.Dataset, split: str, indices: range, encode: Encode, size: int
) -> Iterator[tuple[store.Arrays, list[dict[str, Any]]]]:
    """Chunks of one stream with latents in place of frames."""
    for begin in range(0, len(indices), size):
        own = indices[begin : begin + size]
        parts = [raw.chunk(split, i) for i in own]
        filled = parts + [parts[-1]] * (size - len(parts))
        frames = np.stack([p["frames"] for p in filled])
        out = np.asarray(encode(frames, np.stack([p["is_first"] for p in filled])))
        if out.ndim != 4 or out.shape[:2] != frames.shape[:2]:
            raise DataError(f"encode returned {out.shape} for frames {frames.shape}: expected [b, T, tokens, channels]")
        if not np.isfinite(out).all():
            raise DataError(f"encode returned values that are not finite for chunk {own[0]} of split {split!r}")
        for i, part, latents in zip(own, parts, out, strict=False):
            del part["frames"]
            yield {**part, "latents": latents.astype(np.float16)}, raw.segments(split, i)
