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
        self._heads = {key: next(readable([key], self._header), (0, None)) for key in self._files}
        rates = sorted({round(rate, 3) for _, rate in self._heads.values() if rate})
        self.fps = rates[0] if len(rates) == 1 else None
        tables = list(readable(self._files, self._labels))
        self.tasks = tuple(sorted({t for table in tables if table for t in table.tasks if t}))
        self.space = space or infer((t.columns for t in tables if t), given=options.actions)

    @classmethod
    def claims(cls, source: str) -> bool:
        return bool(files(Path(source), frames.VIDEO))

    def _header(self, key: str) -> tuple[int, float | None]:
        with reading(key):
            return frames.header(self._files[key])

    def _labels(self, key: str) -> labels.Labels | None:
        path = labels.find(self._files[key])
        return None if path is None else labels.read(path)

    def entries(self) -> list[Entry]:
        return [Entry(key, self._heads[key][0]) for key in self._files]

    def read(self, key: str, part: Part) -> Episode:
        with reading(key):
            table = self._labels(key)
            sizes: list[int] = []

            def note(frame: np.ndarray) -> np.ndarray:
                sizes[:] = frame.shape[:2]
                return part.fit(frame)

            pictures = stack(frames.decode(self._files[key], note, part.start, part.stop))
            whole = part.start == 0 and part.stop is None
            total = len(pictures) if whole else max(self._heads[key][0], part.start + len(pictures))
            task = None
            if table and table.tasks:
                ids = np.concatenate([self.task(t) for t in table.tasks])
                if len(ids) not in (total, total - 1):
                    raise DataError(f"{table.file} has {len(ids)} rows for {total} frames")
                task = np.concatenate([ids, ids[-1:]])[:total, None]
            return assemble(
                pictures,
                self.space,
                table.columns if table else {},
                alignment=self.options.alignment or "taken",
                total=total,
                part=part,
                rewards=table.reward if table else None,
                is_terminal=table.is_terminal if table else False,
                task=task,
                meta={"source": key, "size": sizes},
            )


READER = VideoReader
