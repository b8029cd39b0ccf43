"""Episodes as .npz files, one a file: DreamerV1 to V3 and Crafter's recorder, and what `envs.recorder` writes.

Frames are the first of `FRAMES`, uint8 [T, H, W, 3]; actions ``action``, or ``actions/NAME`` for several components;
``reward``; ``is_terminal`` (or ``terminal``, ``done``, ``discount``); ``task`` and ``level`` texts. By default row t
holds the action that led to frame t, as these recorders write it; `--alignment taken` says otherwise. Pickles are
refused.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from dreamer4_jax.data.readers.actions import ActionSpace, component_names, infer
from dreamer4_jax.data.readers.base import Entry, Options, Part, Reader, assemble, files, readable, reading, stack
from dreamer4_jax.data.schema import DataError, Episode

FRAMES = ("frames", "image", "images", "observation", "observations", "obs", "pixels", "rgb")
REWARD = ("reward", "rewards")
TERMINAL = ("is_terminal", "terminal", "terminated", "done")


def _frames_key(names: list[str]) -> str:
    for name in FRAMES:
        if name in names:
            return name
    raise DataError(
        f"has no frames: its arrays are {', '.join(names) or 'none'}, frames are one of {', '.join(FRAMES)}"
    )


def _columns(file: Any) -> dict[str, np.ndarray]:
    """Action columns, masked where ``present/NAME`` says that there is none."""
    parts = [(key, *key.replace(".", "/").partition("/")) for key in file.files]
    leaves = {key: leaf or "action" for key, head, _, leaf in parts if head in ("action", "actions")}
    for key, leaf in leaves.items():
        if (twin := next(k for k, other in leaves.items() if other == leaf)) != key:
            raise DataError(f"has both {twin!r} and {key!r}, which are one action: keep one")
    out: dict[str, np.ndarray] = {}
    for (key, leaf), name in zip(leaves.items(), component_names(leaves.values()), strict=True):
        out[name] = values = np.asarray(file[key])
        if (presence := f"present/{leaf}") in file.files:
            absent = ~np.asarray(file[presence], bool)
            absent = absent.reshape(-1, *(1,) * (values.ndim - 1))
            out[name] = np.ma.masked_array(values, np.broadcast_to(absent, values.shape))
    return out


def _length(path: Path) -> int:
    """Frames of a file, from the header of its array: nothing is decompressed."""
    with zipfile.ZipFile(path) as archive:
        key = _frames_key([n.removesuffix(".npy") for n in archive.namelist()])
        with archive.open(f"{key}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
            return int(read(stream)[0][0])


def _text(file: Any, *names: str) -> str:
    """The first of some arrays that is a text, or ""."""
    name = next((n for n in names if n in file.files and file[n].dtype.kind in "US"), None)
    return str(file[name].reshape(-1)[0]) if name else ""


class NpzReader(Reader):
    format = "npz"

    def __init__(self, source: str, options: Options, space: ActionSpace | None = None):
        super().__init__(source, options, space)
        self._files = {self._key(p): p for p in files(self.path, (".npz",))}
        if not self._files:
            raise DataError(f"{source}: holds no .npz files")
        self.tasks = tuple(sorted({t for t in readable(self._files, self._task) if t}))
        self.space = space or infer(readable(self._files, self._table), given=options.actions)

    def _key(self, path: Path) -> str:
        return path.name if self.path.is_file() else str(path.relative_to(self.path))

    @classmethod
    def claims(cls, source: str) -> bool:
        return bool(files(Path(source), (".npz",)))

    def _table(self, key: str) -> dict[str, np.ndarray]:
        with reading(key), np.load(self._files[key], allow_pickle=False) as file:
            return _columns(file)

    def _task(self, key: str) -> str:
        with reading(key), np.load(self._files[key], allow_pickle=False) as file:
            return _text(file, "task", "mission")

    def files(self) -> list[Path]:
        return list(self._files.values())

    def entries(self) -> list[Entry]:
        return [Entry(key, next(readable([key], self._length), 0)) for key in self._files]

    def _length(self, key: str) -> int:
        with reading(key):
            return _length(self._files[key])

    def read(self, key: str, part: Part) -> Episode:
        with reading(key), np.load(self._files[key], allow_pickle=False) as file:
            raw = file[_frames_key(file.files)]
            if raw.ndim < 3:
                raise DataError(f"frames have shape {[*raw.shape]}: expected [T, H, W, 3]")
            reward = next((file[n] for n in REWARD if n in file.files), None)
            ends = next((bool(np.reshape(file[n], -1)[-1]) for n in TERMINAL if n in file.files), False)
            if "discount" in file.files:
                ends = ends or float(np.reshape(file["discount"], -1)[-1]) == 0.0
            columns = _columns(file)
            task = self._task(key)
            return assemble(
                stack(part.fit(x) for x in raw[part.start : part.stop]),
                self.space,
                columns,
                alignment=self.options.alignment or "led",
                total=len(raw),
                part=part,
                rewards=reward,
                is_terminal=ends,
                task=self.task(task),
                meta={"source": key, "task": task, "size": [*raw.shape[1:3]]}
                | ({"level": level} if (level := _text(file, "level")) else {}),
            )


READER = NpzReader
