"""Minari datasets (HDF5 or Arrow), read with `minari` itself: T + 1 observations, an action and a reward between two.

Minari stores pictures as JPEG unless it was told otherwise, so frames may be a little off what was recorded. Spaces
must be in the meta data: a dataset that has only the specification of an environment is refused, since making that
would run whatever it names.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dreamer4_jax.data.readers.actions import ActionSpace, component_name
from dreamer4_jax.data.readers.base import Entry, Options, Part, Reader, assemble, check_picture, reading, stack
from dreamer4_jax.data.readers.frames import needs
from dreamer4_jax.data.readers.gymnasium import space_of
from dreamer4_jax.data.schema import DataError, Episode

IMAGES = ("image", "pixels", "rgb", "pov")


def _metadata(path: Path) -> Path:
    return (path if path.name == "data" else path / "data") / "metadata.json"


def _columns(space: Any, actions: Any, name: str = "action") -> dict[str, np.ndarray]:
    """Stacked actions of a gymnasium space as columns, named as in `space_of`."""
    import gymnasium.spaces as s

    match space:
        case s.Dict():
            return {k: v for n, sub in space.spaces.items() for k, v in _columns(sub, actions[n], n).items()}
        case s.Tuple():
            pairs = enumerate(zip(space.spaces, actions, strict=True))
            return {k: v for i, (sub, a) in pairs for k, v in _columns(sub, a, f"{name}_{i}").items()}
        case s.MultiDiscrete():
            values = np.asarray(actions).reshape(len(actions), -1) - np.asarray(space.start).reshape(-1)
            return {component_name(f"{name}_{i}"): values[:, i] for i in range(values.shape[1])}
        case s.Discrete():
            return {component_name(name): np.asarray(actions).reshape(-1) - int(space.start)}
    values = np.asarray(actions)
    return {component_name(name): values.reshape(len(values), -1)}


class MinariReader(Reader):
    format = "minari"
    decided = True

    def __init__(self, source: str, options: Options, space: ActionSpace | None = None):
        super().__init__(source, options, space)
        needs("minari", "reading a Minari dataset")
        import minari

        file = _metadata(self.path)
        with reading(file):
            metadata = json.loads(file.read_text())
            if not {"observation_space", "action_space"} <= set(metadata):
                raise DataError("names no spaces, only an environment: write the dataset again with a newer Minari")
            self._data = minari.MinariDataset(file.parent)
            self._total = int(metadata["total_episodes"])
        self._hdf5 = file.parent / "main_data.hdf5"
        self.space = space or space_of(self._data.action_space)
        self.tasks = tuple(sorted({t for t in map(self._mission, range(self._total)) if t}))

    @classmethod
    def claims(cls, source: str) -> bool:
        file = _metadata(Path(source))
        return file.is_file() and '"data_format"' in file.read_text(errors="replace")

    def _mission(self, episode: int) -> str:
        """The text of a Minigrid episode's mission, where there is one."""
        if "mission" not in getattr(self._data.observation_space, "spaces", {}) or not self._hdf5.exists():
            return ""
        import h5py

        with h5py.File(self._hdf5, "r") as file:
            found = file.get(f"episode_{episode}/observations/mission")
            return found[0].decode() if isinstance(found, h5py.Dataset) and len(found) else ""

    def entries(self) -> list[Entry]:
        # Minari keeps no lengths apart from the episodes.
        return [Entry(str(i), 0) for i in range(self._total)]

    def _images(self, observations: Any) -> np.ndarray:
        space = self._data.observation_space
        if isinstance(observations, dict):
            wanted = [self.options.camera] if self.options.camera else list(IMAGES)
            name = next((n for n in wanted if n in observations), None)
            if name is None:
                raise DataError(f"no picture among its observations {', '.join(observations)}: name one with --camera")
            observations, space = observations[name], space[name]
        values = np.asarray(observations)
        if values.dtype != np.uint8 or values.ndim != 4:
            raise DataError(f"its observations are {values.dtype} {[*values.shape]}, no pictures")
        check_picture(values, float(np.max(space.high)))
        return values

    def read(self, key: str, part: Part) -> Episode:
        with reading(f"episode {key}"):
            (episode,) = self._data.iterate_episodes([int(key)])
            images, text = self._images(episode.observations), self._mission(int(key))
            return assemble(
                stack(part.fit(x) for x in images[part.start : part.stop]),
                self.space,
                _columns(self._data.action_space, episode.actions),
                alignment="taken",
                total=len(images),
                part=part,
                rewards=np.asarray(episode.rewards, np.float32),
                is_terminal=bool(np.asarray(episode.terminations)[-1]),
                task=self.task(text),
                meta={"source": f"episode {key}", "task": text, "size": [*images.shape[1:3]]},
            )


READER = MinariReader
