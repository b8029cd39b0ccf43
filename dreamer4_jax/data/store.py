"""Datasets on disk: a directory of ArrayRecord shards, readable by TFDS without TensorFlow, and one manifest.

One record is one chunk (see `schema.chunks`), stored as a TFDS example in an ArrayRecord file of group size 1, so that
any chunk can be read alone. ``dataset.json`` names every shard with its size, checksum and the frames that carry a
reward; it is written last, so a directory that has one is complete. Consecutive chunks of a shard are one stream:
a window of frames may begin anywhere in it.
"""

import base64
import dataclasses
import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from jaxtyping import Bool

from dreamer4_jax.config import ActionComponent, Config
from dreamer4_jax.data.schema import SCHEMA_VERSION, DataError, action_array, episode_key

MANIFEST = "dataset.json"
REQUEST = "request.json"  # what an unfinished directory was claimed for
NAME = "dreamer4"  # TFDS name of every dataset, part of the shards' file names
CACHE_BYTES = 2_000_000_000  # a dataset whose decoded arrays fit is kept in memory as it is read
VERIFY_BYTES = 1_000_000_000  # shards together no larger than this have their checksums verified on opening
SPLITS = ("train", "holdout")

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class DatasetSpec:
    """Shapes and types of a dataset's chunks. `size` is (height, width) of frames or (tokens, channels) of latents."""

    kind: Literal["frames", "latents"]
    chunk: int
    size: tuple[int, int]
    words: int
    actions: tuple[ActionComponent, ...]

    @classmethod
    def of(cls, config: Config) -> "DatasetSpec":
        """The raw dataset that `config` records."""
        t = config.tokenizer
        return cls("frames", config.data.chunk, (t.height, t.width), config.agent.task_words, config.actions)

    @property
    def example(self) -> Arrays:
        """An empty chunk: name -> zeros of the stored shape and type."""
        t = self.chunk
        shape = (t, *self.size, 3) if self.kind == "frames" else (t, *self.size)
        out: Arrays = {self.kind: np.zeros(shape, np.uint8 if self.kind == "frames" else np.float16)}
        out |= {"reward": np.zeros(t, np.float32), "task": np.zeros((t, self.words), np.int32)}
        out |= {name: np.zeros(t, np.bool_) for name in ("is_first", "is_last", "is_terminal")}
        for part in self.actions:
            out[f"actions/{part.name}"] = action_array(part, t)
            out[f"present/{part.name}"] = np.zeros(t, np.bool_)
        return out

    def features(self) -> tfds.features.FeaturesDict:
        """The TFDS features of one record. Tensors are stored as raw bytes, compressed by ArrayRecord."""
        tree: dict[str, Any] = {"segments": tfds.features.Text()}  # JSON: meta data of each segment of the chunk
        for name, value in self.example.items():
            feature = tfds.features.Tensor(
                shape=value.shape, dtype=value.dtype.type, encoding=tfds.features.Encoding.BYTES
            )
            group, _, leaf = name.partition("/")
            if leaf:
                tree.setdefault(group, {})[leaf] = feature
            else:
                tree[group] = feature
        return tfds.features.FeaturesDict(tree)

    def frame_bytes(self) -> int:
        return sum(v.nbytes for v in self.example.values()) // self.chunk

    def check(self, config: Config, path: Path) -> None:
        """Raises `DataError` unless a model of `config` can be trained on this dataset."""
        t = config.tokenizer
        if self.kind == "frames" and self.size != (t.height, t.width):
            raise DataError(
                f"dataset {path} holds frames of {self.size[0]} x {self.size[1]}, the config wants tokenizer.height x "
                f"tokenizer.width = {t.height} x {t.width}: record it again or change the config"
            )
        if self.kind == "latents" and self.size != (t.tokens, t.token_channels):
            raise DataError(
                f"dataset {path} holds {self.size[0]} tokens of {self.size[1]} channels a frame, the config's "
                f"tokenizer makes {t.tokens} of {t.token_channels}: write the tokens again or change the config"
            )
        if self.actions != config.actions:
            raise DataError(
                f"dataset {path} has the action space {_describe(self.actions)}, the config's `actions` are "
                f"{_describe(config.actions)}: record it again or change the config"
            )
        if self.words != config.agent.task_words:
            raise DataError(
                f"dataset {path} has tasks of {self.words} words, the config has agent.task_words = "
                f"{config.agent.task_words}: record it again or change the config"
            )

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "DatasetSpec":
        actions = tuple(ActionComponent(**part) for part in tree["actions"])
        return cls(tree["kind"], int(tree["chunk"]), tuple(tree["size"]), int(tree["words"]), actions)


def _describe(actions: tuple[ActionComponent, ...]) -> str:
    return ", ".join(f"{part.name}: {part.kind}({part.size})" for part in actions)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(metas: list[dict[str, Any]], at: int) -> list[str]:
    """What a manifest says of the episodes that begin in the chunk at frame `at` of its shard: "FRAME KEY LEVEL"."""
    return [f"{at + m['start']} {episode_key(m)} {m.get('level', '')}" for m in metas if m["offset"] == 0]


@dataclass(frozen=True)
class Listed:
    """An episode, or a piece of one: where it begins in its split, its `schema.episode_key`, its level or ""."""

    start: int
    key: str
    level: str


class Shard:
    """One shard, opened when first read. Errors name the file."""

    def __init__(self, path: Path, entry: dict[str, Any]):
        self.path, self.chunks = path, int(entry["chunks"])
        self._lock = threading.Lock()
        self._reader: Any = None

    def read(self, index: int) -> bytes:
        """The bytes of one record."""
        try:
            with self._lock:
                if self._reader is None:
                    # No read-ahead: chunks are read in random order.
                    options = "readahead_buffer_size:0,max_parallelism:0"
                    self._reader = array_record_module.ArrayRecordReader(str(self.path), options)
                return self._reader.read([index])[0]
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise DataError(f"shard {self.path}: chunk {index} cannot be read ({error}); the file is damaged") from None


class Dataset:
    """A complete dataset, opened with `open_dataset`. Frames of a split are numbered through its shards in order."""

    def __init__(self, directory: Path, manifest: dict[str, Any], *, cache_bytes: int = CACHE_BYTES):
        self.directory, self.manifest = directory, manifest
        self.spec = DatasetSpec.from_json(manifest["spec"])
        self._features = self.spec.features()
        self._like = self.spec.example
        self._names = tuple(self._like)
        self._shards = {s: [Shard(directory / e["file"], e) for e in es] for s, es in manifest["splits"].items()}
        self._place = {s: [(shard, i) for shard in shards for i in range(shard.chunks)]
                       for s, shards in self._shards.items()}  # fmt: skip
        total = sum(self.frames(s) for s in self.splits)
        self._cached = total * self.spec.frame_bytes() <= cache_bytes
        self._memory: dict[str, Arrays] = {}
        self._loaded = {s: np.zeros(len(place), np.bool_) for s, place in self._place.items()}
        self._lock = threading.Lock()

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._shards)

    def _split(self, split: str) -> str:
        if split not in self._shards:
            raise DataError(f"dataset {self.directory} has no split {split!r}; it has {', '.join(self.splits)}")
        return split

    def chunks(self, split: str) -> int:
        return len(self._place[self._split(split)])

    def frames(self, split: str) -> int:
        """Number of frames of a split."""
        return self.chunks(split) * self.spec.chunk

    def streams(self, split: str) -> list[int]:
        """Frames of each stream (shard) of a split; a window never crosses from one stream into the next."""
        return [shard.chunks * self.spec.chunk for shard in self._shards[self._split(split)]]

    def rewarded(self, split: str) -> Bool[np.ndarray, " frames"]:
        """Frames of a split with a positive reward, from the manifest: no shard is read.

        Where no frame of the whole dataset has one, rewards are costs, and those with a negative one are given.
        """
        shards = [entry for entries in self.manifest["splits"].values() for entry in entries]
        costs = not any(base64.b64decode(entry["rewarded"]).strip(b"\0") for entry in shards)
        out = []
        for entry in self.manifest["splits"][self._split(split)]:
            text = entry.get("costly", entry["rewarded"]) if costs else entry["rewarded"]
            bits = np.frombuffer(base64.b64decode(text), np.uint8)
            out.append(np.unpackbits(bits, count=entry["chunks"] * self.spec.chunk).astype(np.bool_))
        return np.concatenate(out) if out else np.zeros(0, np.bool_)

    def episodes(self, split: str) -> list[Listed]:
        """The episodes of a split in the order of their frames, from the manifest; each lasts until the next begins.

        Datasets that were written before manifests listed them are read through once.
        """
        out, chunk = [], 0
        for entry in self.manifest["splits"][self._split(split)]:
            at, t = chunk * self.spec.chunk, self.spec.chunk
            lines = entry.get("episodes")
            if lines is None:
                lines = [x for i in range(entry["chunks"]) for x in listed(self.segments(split, chunk + i), i * t)]
            for start, key, level in (line.split(" ", 2) for line in lines):
                out.append(Listed(at + int(start), key, level))
            chunk += entry["chunks"]
        return out

    def parts(self, split: str) -> list[tuple[float, int]]:
        """(weight, number of streams) of each dataset that this is a mixture of, in order; of a plain one (1, all)."""
        mixed = self.manifest.get("mixture")
        if mixed is None:
            return [(1.0, len(self._shards[self._split(split)]))]
        return list(zip(mixed["weights"], mixed["streams"][self._split(split)], strict=True))

    def _parse(self, split: str, index: int) -> dict[str, Any]:
        shard, position = self._place[split][index]
        record = shard.read(position)
        try:
            return self._features.deserialize_example_np(record)
        except Exception as error:  # whatever a parser makes of foreign bytes, the user needs the file's name
            raise DataError(f"shard {shard.path}: chunk {position} is not a record of this dataset ({error})") from None

    def chunk(self, split: str, index: int) -> Arrays:
        """One chunk: name -> [chunk, ...], with "actions/..." and "present/..." flat."""
        tree = self._parse(self._split(split), index)
        out: Arrays = {}
        for name in self._names:
            group, _, leaf = name.partition("/")
            out[name] = tree[group][leaf] if leaf else tree[group]
        return out

    def segments(self, split: str, index: int) -> list[dict[str, Any]]:
        """Meta data of each segment of a chunk: start in the chunk, offset in the episode, level, policy, mission..."""
        text = self._parse(self._split(split), index)["segments"]
        return json.loads(text)

    def _ensure(self, split: str, first: int, last: int) -> Arrays:
        memory, loaded = self._memory.get(split), self._loaded[split]
        if memory is not None and loaded[first : last + 1].all():
            return memory
        with self._lock:
            if split not in self._memory:
                n = self.frames(split)
                self._memory[split] = {k: np.empty((n, *v.shape[1:]), v.dtype) for k, v in self._like.items()}
            memory = self._memory[split]
            for index in range(first, last + 1):
                if not loaded[index]:
                    for name, value in self.chunk(split, index).items():
                        memory[name][index * self.spec.chunk : (index + 1) * self.spec.chunk] = value
                    loaded[index] = True
            return memory

    def window(self, split: str, start: int, length: int) -> Arrays:
        """Frames start .. start + length - 1 of a split, name -> [length, ...]; they must lie in one stream.

        The arrays may be views of the cache: copy before writing to them.
        """
        t = self.spec.chunk
        first, last = start // t, (start + length - 1) // t
        if not 0 <= start < start + length <= self.frames(split):
            raise DataError(f"dataset {self.directory}: no frames {start} .. {start + length - 1} in split {split!r}")
        if self._place[split][first][0] is not self._place[split][last][0]:
            raise DataError(f"dataset {self.directory}: frames {start} .. {start + length - 1} cross two streams")
        if self._cached:
            memory, at = self._ensure(split, first, last), start
        else:
            parts = [self.chunk(split, i) for i in range(first, last + 1)]
            memory = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]} if len(parts) > 1 else parts[0]
            at = start - first * t
        return {k: v[at : at + length] for k, v in memory.items()}


def open_dataset(
    directory: str | Path,
    config: Config | None = None,
    *,
    identity: str | None = None,
    verify: bool | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Dataset:
    """Opens a complete dataset; anything wrong with it is a `DataError` that names the file.

    Args:
        config: if given, resolution, action space and task length must fit it.
        identity: if given, the identity of the tokenizer that must have written a token dataset.
        verify: compute every shard's checksum; by default only where the shards are small enough to do so quickly.
            Presence and size of every shard are always checked.
        cache_bytes: keep decoded arrays in memory if all of them fit in this many bytes.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.exists():
        state = "no dataset: record one with `dreamer4 collect`"
        if (directory / REQUEST).exists():
            state = "an unfinished recording: run the same command again"
        raise DataError(f"{path} does not exist; {directory} holds {state}")
    try:
        manifest = json.loads(path.read_text())
        if manifest["schema"] != SCHEMA_VERSION:
            raise DataError(f"{path} has schema version {manifest['schema']}, this version reads {SCHEMA_VERSION}")
        dataset = Dataset(directory, manifest, cache_bytes=cache_bytes)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    entries = [entry for shards in manifest["splits"].values() for entry in shards]
    if verify is None:
        verify = sum(entry["bytes"] for entry in entries) <= VERIFY_BYTES
    for entry in entries:
        file = directory / entry["file"]
        if not file.exists():
            raise DataError(f"shard {file} is missing: copy it again, or record the dataset again")
        size = file.stat().st_size
        if size != entry["bytes"]:
            what = "truncated" if size < entry["bytes"] else "damaged"
            raise DataError(f"shard {file} is {what}: it has {size} bytes, {path.name} says {entry['bytes']}")
        if verify and checksum(file) != entry["sha256"]:
            raise DataError(f"shard {file} is damaged: its SHA-256 is not the one in {path.name}")
    if config is not None:
        dataset.spec.check(config, directory)
    if identity is not None:
        found = manifest.get("tokenizer")
        if found is None:
            raise DataError(f"dataset {directory} holds {dataset.spec.kind}, not tokens of a tokenizer")
        if found != identity:
            raise DataError(
                f"dataset {directory} was written by tokenizer {found!r}, this is {identity!r}: write the tokens again"
            )
    return dataset
