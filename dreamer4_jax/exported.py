"""Runs an exported world model and its policy. Needs this folder, JAX, flatbuffers and NumPy; not the code that
made it.

`dreamer4 export` copies this file beside what it exports:

    policy = Policy(folder)                 policy.reset(); action = policy.act(image, task)
    world = World(folder)                   shown = world.start(frames, actions, task); shown = world.step(action)

Actions are dictionaries from component to array; manifest.json says which there are, and every shape.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np


class _Folder:
    """What the two classes share: the manifest, the weights on the device, the programs."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text())
        with np.load(self.folder / "weights.npz", allow_pickle=False) as file:
            stored = [file[f"{i}"] for i in range(len(file.files))]
        dtypes = self.manifest["weights"]
        self._weights = [jax.device_put(x.view(jax.numpy.dtype(d))) for x, d in zip(stored, dtypes, strict=True)]

    def _program(self, name: str) -> Any:
        exported = jax.export.deserialize(bytearray((self.folder / f"{name}.jaxexport").read_bytes()))
        return jax.jit(exported.call)

    def _zeros(self, shapes: list[list[Any]]) -> list[np.ndarray]:
        return [np.zeros(shape, dtype) for shape, dtype in shapes]


class Policy(_Folder):
    """Acts in one environment. A decision costs the same at any age of an episode."""

    def __init__(self, folder: str | Path, *, seed: int = 0):
        super().__init__(folder)
        self._act = self._program("policy")
        self._memory: Any = self._zeros(self.manifest["memory"])
        self._key, self._step, self._starting = jax.random.key(seed), 0, True

    def reset(self) -> None:
        """A new episode begins with the next `act`."""
        self._starting = True

    def act(self, image: np.ndarray, task: np.ndarray) -> dict[str, np.ndarray]:
        """The next action for a frame uint8 [H, W, 3] and task words int32 [words]."""
        key = jax.random.key_data(jax.random.fold_in(self._key, self._step))
        task = np.asarray(task, np.int32)
        actions, self._memory = self._act(self._weights, self._memory, image, task, np.bool_(self._starting), key)
        self._step, self._starting = self._step + 1, False
        return {name: np.asarray(value) for name, value in actions.items()}


class World(_Folder):
    """One imagined stream. What is shown: frame uint8 [H, W, 3], reward, cont (probability that the episode goes on),
    value, action (drawn by the policy), greedy, intention (its probabilities for the next steps)."""

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        self._start, self._step = self._program("start"), self._program("step")
        self._state: Any = None

    def start(
        self, frames: np.ndarray, actions: Mapping[str, np.ndarray], task: np.ndarray, *, seed: int = 0
    ) -> dict[str, Any]:
        """Begins behind context frames uint8 [T, H, W, 3]; actions [T, ...] led to them, none to the first. Of more
        frames than manifest["context"] the last count."""
        total = self.manifest["context"]
        count = min(len(frames), total)

        def fixed(x: np.ndarray) -> np.ndarray:
            out = np.zeros((total, *x.shape[1:]), x.dtype)
            out[total - count :] = x[len(x) - count :]
            return out

        led = {name: fixed(np.asarray(actions[name], dtype)) for name, (_, dtype) in self._components()}
        present = fixed(np.arange(len(frames)) > 0)
        self._state, shown = self._start(
            self._weights, fixed(np.asarray(frames)), led, present, np.int32(count), np.asarray(task, np.int32),
            np.uint32(seed),
        )  # fmt: skip
        return jax.tree.map(np.asarray, shown)

    def step(self, actions: Mapping[str, np.ndarray], *, steps: int = 4) -> dict[str, Any]:
        """The next frame, for one action, in `steps` sampling steps: a power of two up to manifest["k_max"]."""
        given = {name: np.asarray(actions[name], dtype) for name, (_, dtype) in self._components()}
        self._state, shown = self._step(self._weights, self._state, given, np.int32(steps))
        return jax.tree.map(np.asarray, shown)

    def _components(self) -> list[tuple[str, tuple[list[int], str]]]:
        return list(self.manifest["actions"].items())
