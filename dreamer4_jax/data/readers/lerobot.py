"""LeRobot datasets v2.0, v2.1 and v3.0, read with pyarrow and PyAV: the package itself wants PyTorch.

Version 2 has one parquet and one video file for each episode, version 3 many episodes in a file. A row is an
observation, the action then taken, and ``next.reward`` and ``next.done``. One camera is read, `--camera` names it.
Timestamps are taken at their word here: the format is built on them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dreamer4_jax.data.readers import frames
from dreamer4_jax.data.readers.actions import ActionSpace, component_names, infer
from dreamer4_jax.data.readers.base import Entry, Options, Part, Reader, assemble, readable, reading, stack
from dreamer4_jax.data.schema import DataError, Episode

INFO = "meta/info.json"


def _parquet(path: Path, **arguments: Any) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(path, **arguments)


class LeRobotReader(Reader):
    format = "lerobot"

    def __init__(self, source: str, options: Options, space: ActionSpace | None = None):
        super().__init__(source, options, space)
        with reading(f"{source}/{INFO}"):
            self._info = json.loads((self.path / INFO).read_text())
            self.version = int(str(self._info["codebase_version"]).removeprefix("v").split(".")[0])
            self.fps = float(self._info["fps"])
            features: dict[str, dict[str, Any]] = self._info["features"]
        if self._info.get("storage_format", "parquet") != "parquet":
            raise DataError(f"{source}: storage_format {self._info['storage_format']!r} is not read: use parquet")
        if self.version not in (2, 3):
            raise DataError(f"{source}: codebase_version {self._info['codebase_version']!r}: 2 and 3 are read")
        cameras = [n for n, f in features.items() if f["dtype"] in ("video", "image")]
        if not cameras:
            raise DataError(f"{source}: has no camera, only {', '.join(features)}")
        self.camera = options.camera or cameras[0]
        if self.camera not in cameras:
            raise DataError(f"--camera {options.camera!r}: choose one of {', '.join(cameras)}")
        self._video = features[self.camera]["dtype"] == "video"
        self._size = features[self.camera].get("shape")
        actions = [n for n in features if n.split(".")[0] == "action"]
        self._columns = dict(zip(actions, component_names(n.replace("action.", "") for n in actions), strict=True))
        self._has = [n for n in ("next.reward", "next.done", "task_index") if n in features]
        with reading(f"{source}/meta"):
            self._tasks = self._read_tasks()
            self._episodes = self._read_episodes()
        self.tasks = tuple(sorted(set(self._tasks.values())))
        self.space = space or infer(readable(self._episodes, self._actions), given=options.actions)

    @classmethod
    def claims(cls, source: str) -> bool:
        return (Path(source) / INFO).is_file()

    def _read_tasks(self) -> dict[int, str]:
        lines = self.path / "meta/tasks.jsonl"
        if lines.exists():
            rows = [json.loads(line) for line in lines.read_text().splitlines() if line.strip()]
            return {int(r["task_index"]): str(r["task"]) for r in rows}
        table = self.path / "meta/tasks.parquet"
        if not table.exists():
            return {}
        found = _parquet(table).to_pydict()
        # Written by pandas: the texts are the index.
        texts = found.get("task") or found.get("__index_level_0__")
        return {int(i): str(t) for i, t in zip(found["task_index"], texts, strict=True)}

    def _read_episodes(self) -> dict[str, dict[str, Any]]:
        if self.version == 2:
            lines = (self.path / "meta/episodes.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines if line.strip()]
        else:
            tables = sorted((self.path / "meta/episodes").rglob("*.parquet"))
            rows = [r for t in tables for r in _parquet(t).drop_columns(self._statistics(t)).to_pylist()]
        if not rows:
            raise DataError("names no episodes")
        return {str(int(r["episode_index"])): r for r in sorted(rows, key=lambda r: int(r["episode_index"]))}

    @staticmethod
    def _statistics(path: Path) -> list[str]:
        import pyarrow.parquet as pq

        return [n for n in pq.read_schema(path).names if n.startswith("stats/")]

    def entries(self) -> list[Entry]:
        return [Entry(key, int(row["length"])) for key, row in self._episodes.items()]

    def _chunk(self, index: int) -> int:
        return index // int(self._info.get("chunks_size", 1000))

    def _rows(self, key: str, columns: list[str]) -> dict[str, Any]:
        """Columns of an episode's rows, in their order."""
        index, row = int(key), self._episodes[key]
        if self.version == 2:
            name = self._info["data_path"].format(episode_chunk=self._chunk(index), episode_index=index)
            found = _parquet(self.path / name, columns=columns)
        else:
            name = self._info["data_path"].format(
                chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
            )
            found = _parquet(
                self.path / name,
                columns=[*columns, "episode_index", "frame_index"],
                filters=[("episode_index", "==", index)],
            ).sort_by("frame_index")
        if found.num_rows != int(row["length"]):
            raise DataError(f"has {found.num_rows} rows, its meta data say {row['length']}")
        return found.to_pydict()

    def _actions(self, key: str) -> dict[str, np.ndarray]:
        with reading(f"episode {key}"):
            found = self._rows(key, list(self._columns))
            return {name: np.asarray(found[column]) for column, name in self._columns.items()}

    def _pictures(self, key: str, part: Part, count: int, rows: dict[str, Any]) -> Iterator[np.ndarray]:
        if not self._video:
            for cell in rows[self.camera][part.start : part.stop]:
                data = cell["bytes"] or (self.path / cell["path"]).read_bytes()
                yield part.fit(frames.decode_image(data))
            return
        index, row = int(key), self._episodes[key]
        stop = count if part.stop is None else min(part.stop, count)
        if self.version == 2:
            name = self._info["video_path"].format(
                episode_chunk=self._chunk(index), episode_index=index, video_key=self.camera
            )
            begin = 0.0
        else:
            at = f"videos/{self.camera}"
            name = self._info["video_path"].format(
                video_key=self.camera, chunk_index=row[f"{at}/chunk_index"], file_index=row[f"{at}/file_index"]
            )
            begin = float(row[f"{at}/from_timestamp"])
        assert self.fps is not None
        yield from frames.span(self.path / name, part.fit, begin + part.start / self.fps, stop - part.start, self.fps)

    def read(self, key: str, part: Part) -> Episode:
        with reading(f"episode {key}"):
            wanted = [*self._columns, *self._has, *([] if self._video else [self.camera])]
            rows, count = self._rows(key, wanted), int(self._episodes[key]["length"])
            done = rows.get("next.done")
            named = {self._tasks.get(int(i), "") for i in rows.get("task_index", ())}
            text = named.pop() if len(named) == 1 else (self._episodes[key].get("tasks") or [""])[0]
            return assemble(
                stack(self._pictures(key, part, count, rows)),
                self.space,
                {name: np.asarray(rows[column]) for column, name in self._columns.items()},
                alignment=self.options.alignment or "taken",
                total=count,
                part=part,
                rewards=np.asarray(rows["next.reward"], np.float32).reshape(-1) if "next.reward" in rows else None,
                is_terminal=bool(np.reshape(done[-1], -1)[0]) if done else False,
                task=self.task(text),
                meta={"source": f"episode {key}", "task": text, "size": self._size[:2] if self._size else None},
            )


READER = LeRobotReader
