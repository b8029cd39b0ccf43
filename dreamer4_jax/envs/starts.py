"""Contexts from which imagined episodes start: drawn from a recorded dataset, or read from an npz file."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Bool, Int, UInt8

from dreamer4_jax.config import Config, UserError
from dreamer4_jax.data.schema import action_array
from dreamer4_jax.data.store import Dataset


@dataclass(frozen=True)
class Starts:
    """n contexts of T frames, of which the last `count` belong to the episode that goes on.

    Attributes:
      actions, present: component -> [n, T, ...], the actions that led to the frames and whether there was one.
    """

    frames: UInt8[np.ndarray, "n T H W 3"]
    actions: dict[str, np.ndarray]
    present: dict[str, Bool[np.ndarray, "n T"]]
    count: Int[np.ndarray, " n"]
    task: Int[np.ndarray, "n words"]

    def __len__(self) -> int:
        return len(self.frames)

    @classmethod
    def draw(cls, config: Config, data: Dataset, *, number: int, split: str = "train", seed: int = 0) -> Self:
        """`number` distinct contexts of agent.context frames that end anywhere in episodes, not at their last frame.

        Fewer if the split has fewer. A context that reaches back beyond its episode's first frame is cut there.
        """
        length, at, ends = config.agent.context, 0, []
        for stream in data.streams(split):
            if stream >= length:
                last = data.window(split, at, stream)["is_last"]
                ends.append(at + length - 1 + np.flatnonzero(~last[length - 1 :]))
            at += stream
        found = np.concatenate(ends) if ends else np.zeros(0, int)
        if not len(found):
            raise UserError(
                f"{data.directory}: split {split!r} has no stream of agent.context = {length} frames to start from"
            )
        chosen = np.sort(np.random.default_rng(seed).choice(found, min(number, len(found)), replace=False))
        windows = [data.window(split, int(end) - length + 1, length) for end in chosen]
        first = np.stack([w["is_first"] for w in windows])
        since = np.where(first.any(1), np.argmax(first[:, ::-1], axis=1) + 1, length)
        names = [part.name for part in config.actions]
        return cls(
            frames=np.stack([w["frames"] for w in windows]),
            actions={n: np.stack([w[f"actions/{n}"] for w in windows]) for n in names},
            present={n: np.stack([w[f"present/{n}"] for w in windows]) for n in names},
            count=since.astype(np.int32),
            task=np.stack([w["task"][-1] for w in windows]),
        )

    def save(self, path: str | Path) -> None:
        """Writes an npz file: frames, count, task, actions/<name>, present/<name>."""
        arrays = {"frames": self.frames, "count": self.count, "task": self.task}
        for group in ("actions", "present"):
            arrays |= {f"{group}/{name}": value for name, value in getattr(self, group).items()}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        draft = Path(path).with_suffix(".part")
        draft.write_bytes(buffer.getvalue())
        os.replace(draft, path)

    @classmethod
    def load(cls, path: str | Path, config: Config) -> Self:
        """Reads what `save` wrote, or another program: `count` (all frames) and `present` (all but the first) may be
        left out. Arrays alone are read.

        Raises:
          UserError: no such file, or an array that is missing or does not fit the config; it is named.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as an npz file of arrays ({error})") from error
        t, names = config.tokenizer, [part.name for part in config.actions]
        for name in ("frames", "task", *(f"actions/{n}" for n in names)):
            if name not in arrays:
                raise UserError(f"{path}: array {name!r} is missing; it has {', '.join(sorted(arrays))}")
        n, length = arrays["frames"].shape[:2]
        like = {
            "frames": np.zeros((n, length, t.height, t.width, 3), np.uint8),
            "task": np.zeros((n, config.agent.task_words), np.int32),
            "count": np.full(n, length, np.int32),
        }
        for part in config.actions:
            like[f"actions/{part.name}"] = np.stack([action_array(part, length)] * n)
            like[f"present/{part.name}"] = np.broadcast_to(np.arange(length) > 0, (n, length))
        for name, wanted in like.items():
            value = arrays.setdefault(name, wanted)
            if value.shape != wanted.shape or value.dtype.kind not in (wanted.dtype.kind, "u"):
                want = f"{wanted.dtype} {[*wanted.shape]}"
                raise UserError(f"{path}: array {name!r} is {value.dtype} {[*value.shape]}: must be {want}")
        if not n or arrays["count"].min() < 1 or arrays["count"].max() > length:
            raise UserError(f"{path}: needs at least one context, and each count must be from 1 to {length}")
        return cls(
            frames=arrays["frames"],
            actions={name: arrays[f"actions/{name}"] for name in names},
            present={name: arrays[f"present/{name}"].astype(bool) for name in names},
            count=arrays["count"].astype(np.int32),
            task=arrays["task"].astype(np.int32),
        )
