"""A folder of videos, or a single one, with or without labels of each frame in a file of the same name (see `labels`).

By default row t of the labels holds the action that was taken at frame t, and the reward that it earned;
`--alignment led` says that row t led to frame t. A video without labels is an episode without actions.
"""

from pathlib import Path

import numpy as np

from dreamer4_jax.data.readers import frames, labels
from dreamer4_jax.data.readers.actions import ActionSpace, infer
from dreamer4_jax.data.readers.base import Entry, Options, Part, Reader, assemble, files, readable, reading, stack
from dreamer4_jax.data.schema import DataError, Episode


class VideoReader(Reader):
    format = "video"

    def __init__(self, source: str, options: Options, space: ActionSpace | None = None):
        super().__init__(source, options, space)
        self._files = {p.name if self.path.is_file() else str(p.relative_to(self.path)): p
                       for p in files(self.path, frames.VIDEO)}  # fmt: skip
        if not self._files:
            raise DataError(f"{source}: holds no videos ({', '.join(frames.VIDEO)})")
        frames.needs("av", "reading video")
        self._alignment = options.alignment or "taken"
        self._beside = labels.find(self._files.values())
        self._counts: dict[tuple[str, bool], int] = {}
        rates = sorted({round(rate, 3) for rate in readable(self._files, self._rate) if rate})
        self.fps = rates[0] if len(rates) == 1 else None
        tables = list(readable(self._files, self._labels))
        self.tasks = tuple(sorted({t for table in tables if table for t in table.tasks if t}))
        self.space = space or infer((t.columns for t in tables if t), given=options.actions)

    @classmethod
    def claims(cls, source: str) -> bool:
        return bool(files(Path(source), frames.VIDEO))

    def _rate(self, key: str) -> float | None:
        with reading(key):
            return frames.rate(self._files[key])

    def _count(self, key: str, *, exact: bool = False) -> int:
        """Frames of a video as its container says, or as they are decoded, which may be a few less."""
        if (key, exact) not in self._counts:
            with reading(key):
                path = self._files[key]
                count = sum(1 for _ in frames.decode(path, lambda x: x)) if exact else frames.count(path)
            self._counts[key, exact] = count
        return self._counts[key, exact]

    def _labels(self, key: str) -> labels.Labels | None:
        found = self._beside.get(self._files[key].with_suffix(""), [])
        if len(found) > 1:
            raise DataError(f"has several label files: {', '.join(p.name for p in found)}; keep one")
        return labels.read(found[0]) if found else None

    def _tasks(self, table: labels.Labels, total: int) -> np.ndarray | None:
        """Ids [total, 1]: each frame's is that of its row, but one that is rewarded has the task that earned it."""
        if not table.tasks:
            return None
        ids = np.concatenate([self.task(t) for t in table.tasks])
        if len(ids) not in (total, total - 1):
            raise DataError(f"{table.file} has {len(ids)} rows for {total} frames")
        out = np.concatenate([ids, ids[-1:]])[:total]
        if table.reward is not None and (len(ids) < total or self._alignment == "taken"):
            (earned,) = np.nonzero(table.reward[: total - 1])
            out[earned + 1] = ids[earned]
        return out[:, None]

    def files(self) -> list[Path]:
        beside = (self._beside.get(video.with_suffix(""), []) for video in self._files.values())
        return [*self._files.values(), *(path for found in beside for path in found)]

    def entries(self) -> list[Entry]:
        return [Entry(key, next(readable([key], self._count), 0)) for key in self._files]

    def read(self, key: str, part: Part) -> Episode:
        with reading(key):
            table = self._labels(key)
            sizes: list[int] = []

            def note(frame: np.ndarray) -> np.ndarray:
                sizes[:] = frame.shape[:2]
                return part.fit(frame)

            pictures = stack(frames.decode(self._files[key], note, part.start, part.stop))
            total = part.start + len(pictures)
            if part.stop is not None:
                total = max(total, self._count(key))
                if table and table.rows != total:
                    # Rows between the frames, or frames that the decoder leaves out? A shift by one hangs on it.
                    total = self._count(key, exact=True)
            return assemble(
                pictures,
                self.space,
                table.columns if table else {},
                alignment=self._alignment,
                total=total,
                part=part,
                rewards=table.reward if table else None,
                is_terminal=table.is_terminal if table else False,
                task=self._tasks(table, total) if table else None,
                meta={"source": key, "size": sizes},
            )


READER = VideoReader
