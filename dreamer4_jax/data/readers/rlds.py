"""RLDS datasets as TFDS stores them (Open X-Embodiment and others), ArrayRecord or TFRecord, without TensorFlow.

A step holds an observation, the action taken at it, and the reward that followed. Records are parsed as the examples
they are; what each feature is stands in the dataset's features.json. A TFRecord's checksums are not compared: damage is
found where a record, or a picture in it, does not parse.
"""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dreamer4_jax.data.readers import frames
from dreamer4_jax.data.readers.actions import ActionSpace, component_names, infer
from dreamer4_jax.data.readers.base import Entry, Options, Part, Reader, assemble, readable, reading, stack
from dreamer4_jax.data.schema import DataError, Episode

TEXTS = ("language_instruction", "natural_language_instruction", "instruction", "task")


class _Records:
    """Records of one file by number."""

    def __init__(self, path: Path):
        self.path = path
        self._offsets: list[tuple[int, int]] | None = None
        self._reader: Any = None

    def __getitem__(self, index: int) -> bytes:
        if "tfrecord" not in self.path.name:
            if self._reader is None:
                from array_record.python import array_record_module

                self._reader = array_record_module.ArrayRecordReader(str(self.path))
            return self._reader.read([index])[0]
        if self._offsets is None:
            self._offsets = self._index()
        if index >= len(self._offsets):
            raise DataError(f"{self.path.name} has {len(self._offsets)} whole records: it is truncated")
        start, length = self._offsets[index]
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(length)

    def _index(self) -> list[tuple[int, int]]:
        """A record is its length (8 bytes), a checksum (4), its bytes, a checksum (4)."""
        out, size = [], self.path.stat().st_size
        with self.path.open("rb") as file:
            while len(head := file.read(12)) == 12:
                (length,) = struct.unpack("<Q", head[:8])
                start = file.tell()
                if start + length + 4 > size:
                    break
                out.append((start, length))
                file.seek(length + 4, io.SEEK_CUR)
        return out


class RldsReader(Reader):
    format = "rlds"

    def __init__(self, source: str, options: Options, space: ActionSpace | None = None):
        super().__init__(source, options, space)
        import tensorflow_datasets as tfds

        with reading(source):
            info = tfds.builder_from_directory(str(self.path)).info
            if "steps" not in info.features:
                raise DataError(f"is no RLDS dataset: its features are {', '.join(info.features)}, not steps")
            self._features = _leaves(info.features["steps"].feature)
            self._places: dict[str, tuple[_Records, int]] = {}
            for name, split in info.splits.items():
                at = 0
                for file, count in zip(split.filepaths, split.shard_lengths, strict=True):
                    records = _Records(Path(file))
                    self._places |= {f"{name}/{at + i}": (records, i) for i in range(count)}
                    at += count
        cameras = [n for n, f in self._features.items() if n.startswith("observation/") and _is_picture(f)]
        wanted = f"observation/{options.camera}" if options.camera else next(iter(sorted(cameras, key=_rank)), "")
        if wanted not in cameras:
            raise DataError(
                f"{source}: camera {options.camera or '(none given)'!r}: the pictures of an observation are "
                f"{', '.join(c.removeprefix('observation/') for c in cameras) or '(none)'}"
            )
        self.camera = wanted
        actions = [n for n in self._features if _is_action(n)]
        self._columns = dict(zip(actions, component_names(n.removeprefix("action/") for n in actions), strict=True))
        self._text = next((n for t in TEXTS for n in self._features if n.rsplit("/", 1)[-1] == t), None)
        found = readable(self._places, self._scan)
        tables = list(found) if space is None or self._text else []
        self.tasks = tuple(sorted({text for _, text in tables if text}))
        self.space = space or infer((columns for columns, _ in tables), given=options.actions)

    @classmethod
    def claims(cls, source: str) -> bool:
        path = Path(source)
        return (path / "features.json").is_file() and (path / "dataset_info.json").is_file()

    def entries(self) -> list[Entry]:
        return [Entry(key, 0) for key in self._places]

    def _steps(self, key: str) -> "_Steps":
        from tensorflow_datasets.proto import tf_example_generated_pb2

        records, index = self._places[key]
        example = tf_example_generated_pb2.Example.FromString(records[index])
        return _Steps(example.features.feature, self._features)

    def _scan(self, key: str) -> tuple[dict[str, np.ndarray], str]:
        with reading(f"episode {key}"):
            steps = self._steps(key)
            return self._actions(steps), self._instruction(steps)

    def _actions(self, steps: "_Steps") -> dict[str, np.ndarray]:
        return {component: steps.numbers(name) for name, component in self._columns.items()}

    def _instruction(self, steps: "_Steps") -> str:
        return steps.bytes(self._text)[0].decode(errors="replace") if self._text else ""

    def read(self, key: str, part: Part) -> Episode:
        with reading(f"episode {key}"):
            steps, text = self._steps(key), ""
            images = steps.bytes(self.camera)
            text = self._instruction(steps)
            sizes: list[int] = []

            def picture(data: bytes) -> np.ndarray:
                image = frames.decode_image(data)
                sizes[:] = image.shape[:2]
                return part.fit(image)

            return assemble(
                stack(picture(x) for x in images[part.start : part.stop]),
                self.space,
                self._actions(steps),
                alignment=self.options.alignment or "taken",
                total=len(images),
                part=part,
                rewards=steps.numbers("reward") if "reward" in self._features else None,
                is_terminal=bool(steps.numbers("is_terminal")[-1]) if "is_terminal" in self._features else False,
                task=self.task(text),
                meta={"source": f"episode {key}", "task": text, "size": sizes},
            )


def _leaves(features: Any, at: str = "") -> dict[str, Any]:
    """name/of/leaf -> TFDS feature."""
    if not hasattr(features, "keys"):
        return {at: features}
    return {k: v for n in features for k, v in _leaves(features[n], f"{at}/{n}" if at else n).items()}


def _is_action(name: str) -> bool:
    return name == "action" or name.startswith("action/")


def _is_picture(feature: Any) -> bool:
    shape = feature.shape or ()
    return [*shape[2:]] in ([1], [3], [4]) and type(feature).__name__ == "Image"


def _rank(name: str) -> tuple[bool, str]:
    """The camera that is called `image` first, wrist cameras last."""
    leaf = name.rsplit("/", 1)[-1]
    return leaf != "image", f"{'wrist' in leaf}{leaf}"


class _Steps:
    """The steps of one parsed example, by the name of their feature."""

    def __init__(self, features: Any, kinds: dict[str, Any]):
        self._features, self._kinds = features, kinds

    def _of(self, name: str) -> Any:
        if f"steps/{name}" not in self._features:
            raise DataError(f"has no steps/{name}")
        return self._features[f"steps/{name}"]

    def bytes(self, name: str) -> list[bytes]:
        return list(self._of(name).bytes_list.value)

    def numbers(self, name: str) -> np.ndarray:
        """Values [T, ...] of a numeric feature, with inner axes made one; scalars are [T]."""
        kind, feature = self._kinds[name], self._of(name)
        dtype, size = np.dtype(kind.np_dtype), int(np.prod(kind.shape or ()))
        flat: Any
        if feature.bytes_list.value:  # tensors stored as bytes, with or without zlib
            parts = [
                np.frombuffer(b if len(b) == size * dtype.itemsize else zlib.decompress(b), dtype)
                for b in feature.bytes_list.value
            ]
            flat = np.concatenate(parts)
        else:
            flat = np.asarray(feature.float_list.value or feature.int64_list.value).astype(dtype)
        return flat.reshape(-1, size) if kind.shape else flat


READER = RldsReader
