"""Writing datasets: shards that are whole or absent, resumed where an interrupted run left them.

A directory is claimed with `write_request`, filled shard by shard with `write_shard`, and completed with `finish`,
which registers it with TFDS and writes the manifest last (see `store`).
"""

import base64
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from dreamer4_jax.data.schema import SCHEMA_VERSION, DataError, Episode, chunks
from dreamer4_jax.data.store import MANIFEST, NAME, REQUEST, Arrays, DatasetSpec, checksum, listed


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that either has all of `text` or does not exist."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def shard_file(split: str, index: int, count: int) -> str:
    """File name of a shard, as TFDS wants it."""
    return f"{NAME}-{split}.array_record-{index:05d}-of-{count:05d}"


def _note(path: Path) -> Path:
    """The file beside an unfinished dataset's shard that says the shard is whole."""
    return path.with_name(f".{path.name}.json")


def write_shard(
    path: Path,
    spec: DatasetSpec,
    chunks: Iterable[tuple[Arrays, list[dict[str, Any]]]],
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes one shard under a temporary name, then renames it; returns (and notes beside it) its manifest entry.

    Args:
        chunks: (arrays, segment meta data) pairs, consecutive in one stream.
        extra: JSON values kept in the entry; read after the last chunk, so that a generator may fill it.
    """
    features, like = spec.features(), spec.example
    serializer = ExampleSerializer(features.get_serialized_info())
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    rewarded: list[np.ndarray] = []
    costly: list[np.ndarray] = []
    episodes: list[Any] = []
    count = 0
    try:
        for arrays, metas in chunks:
            tree: dict[str, Any] = {"segments": json.dumps(metas)}
            for name, zero in like.items():
                value = np.ascontiguousarray(arrays[name])
                if value.shape != zero.shape or value.dtype != zero.dtype:
                    raise DataError(
                        f"shard {path.name}: chunk {count} has {name} {value.dtype} {[*value.shape]}, "
                        f"expected {zero.dtype} {[*zero.shape]}"
                    )
                group, _, leaf = name.partition("/")
                if leaf:
                    tree.setdefault(group, {})[leaf] = value
                else:
                    tree[group] = value
            # Deterministic: protobuf orders a map's keys differently in each process, and shards have checksums.
            record = serializer.get_tf_example(features.encode_example(tree))
            writer.write(record.SerializeToString(deterministic=True))
            rewarded.append((arrays["reward"] > 0) & ~arrays["is_first"])
            costly.append((arrays["reward"] < 0) & ~arrays["is_first"])
            episodes += listed(metas, count * spec.chunk)
            count += 1
        writer.close()
    except BaseException:
        if writer.is_open():
            writer.close()
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    flags = {"rewarded": _bits(rewarded)}
    if not np.any(rewarded) and np.any(costly):
        flags["costly"] = _bits(costly)
    entry = {
        "file": path.name,
        "chunks": count,
        "bytes": path.stat().st_size,
        "sha256": checksum(path),
        **flags,
        "episodes": episodes,
        **(extra or {}),
    }
    write_atomically(_note(path), json.dumps(entry))
    return entry


def _bits(flags: list[np.ndarray]) -> str:
    packed = np.packbits(np.concatenate(flags)) if flags else np.zeros(0, np.uint8)
    return base64.b64encode(packed.tobytes()).decode()


def finished_shard(path: Path) -> dict[str, Any] | None:
    """The entry of a shard that an earlier, interrupted or finished, run wrote whole; None: it must be written."""
    note = _note(path)
    if not (path.exists() and note.exists()):
        return None
    try:
        entry = json.loads(note.read_text())
    except ValueError:
        return None
    whole = entry.get("bytes") == path.stat().st_size and entry.get("sha256") == checksum(path)
    return entry if whole else None


def write_request(directory: Path, request: dict[str, Any]) -> None:
    """Claims a directory for the dataset that `request` describes.

    An interrupted recording may be continued with the same request; with another one, or over files that are not a
    dataset's, it is refused, so that nothing is overwritten or mixed. What an earlier version noted nothing of is not
    compared once the dataset is complete; an unfinished one may have been planned otherwise.
    """
    path = directory / REQUEST
    if path.is_file():
        try:
            old = json.loads(path.read_text())
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}): remove {directory} and record it again") from None
        if found := _differences(old, json.loads(json.dumps(request)), known=(directory / MANIFEST).exists()):
            shown = "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
            raise DataError(
                f"{directory} holds a dataset of another config ({shown}): choose another directory, or remove it"
            )
        return
    if directory.exists() and not directory.is_dir():
        raise DataError(f"{directory} is a file: choose a directory that is empty or not there yet")
    if directory.exists() and any(directory.iterdir()):
        raise DataError(f"{directory} is not empty and holds no dataset of ours: choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(request, indent=1))


def _differences(old: Any, new: Any, at: str = "", *, known: bool) -> list[str]:
    """Fields at which two requests differ; `known`: of those that the old one has."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old if known else {*old, *new})
        return [d for n in names for d in _differences(old.get(n), new.get(n), f"{at}.{n}".lstrip("."), known=known)]
    old, new = json.loads(json.dumps([old, new]))
    return [] if old == new else [f"{at} is {old!r} there, {new!r} here"]


def abandon(directory: Path) -> None:
    """Takes back `write_request`, and removes what was written for it."""
    for pattern in (f"{NAME}-*.array_record-*", f".{NAME}-*", REQUEST):
        for path in directory.glob(pattern):
            path.unlink(missing_ok=True)


def finish(
    directory: Path, spec: DatasetSpec, entries: dict[str, list[dict[str, Any]]], **manifest: Any
) -> dict[str, Any]:
    """Registers the shards with TFDS and writes the manifest, which makes the dataset complete.

    Args:
        entries: split -> manifest entries of its shards, in order.
        manifest: further JSON values to keep, such as the request and collection statistics.
    """
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[e["chunks"] for e in shards],
            num_bytes=sum(e["bytes"] for e in shards),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=directory, dataset_name=NAME, split=split, filetype_suffix="array_record"
            ),
        )
        for split, shards in entries.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=str(directory),
        features=spec.features(),
        split_infos=infos,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        check_data=False,
        description="Chunks of consecutive episodes: index t holds frame t, the action that led to it, its reward.",
    )
    for stale in directory.glob(".*.tmp"):  # of a run that was killed
        stale.unlink(missing_ok=True)
    tree = {"schema": SCHEMA_VERSION, "spec": spec.to_json(), **manifest, "splits": entries}
    write_atomically(directory / MANIFEST, json.dumps(tree, indent=1))
    return tree


def write_dataset(
    directory: str | Path,
    spec: DatasetSpec,
    shards: dict[str, list[Iterable[Episode]]],
    *,
    request: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes episodes as a complete dataset; returns the manifest.

    Args:
        shards: split -> its shards, each a stream of episodes. Frames after a stream's last whole chunk are dropped.
        request: what the directory is claimed for (see `write_request`).
    """
    directory = Path(directory)
    write_request(directory, {**(request or {}), "spec": spec.to_json()})
    entries: dict[str, list[dict[str, Any]]] = {}
    for split, streams in shards.items():
        entries[split] = []
        for index, stream in enumerate(streams):
            path = directory / shard_file(split, index, len(streams))
            valid = (episode.validate(spec.actions) for episode in stream)
            entries[split].append(finished_shard(path) or write_shard(path, spec, chunks(valid, spec.chunk)))
    return finish(directory, spec, entries)
