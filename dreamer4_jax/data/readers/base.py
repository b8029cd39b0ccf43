"""What all readers share: their interface, the fit of frames to one size, and names for what cannot be read."""

import abc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dreamer4_jax.config import ActionComponent
from dreamer4_jax.data.readers.actions import ActionSpace
from dreamer4_jax.data.schema import DataError, Episode

T = TypeVar("T")


@dataclass(frozen=True)
class Fit:
    """Brings frames to one size. None keeps their own.

    Attributes:
        how: "stretch" to the whole size, "crop" the middle of the same shape, or "pad" with black at bottom and right.
    """

    size: tuple[int, int] | None = None  # height, width
    how: Literal["stretch", "crop", "pad"] = "stretch"

    def __call__(self, frame: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
        frame = as_rgb(frame)
        if self.size is None or frame.shape[:2] == self.size:
            return frame
        height, width = self.size
        h, w = frame.shape[:2]
        if self.how == "crop":
            scale = min(h / height, w / width)
            ch, cw = min(h, round(height * scale)), min(w, round(width * scale))
            top, left = (h - ch) // 2, (w - cw) // 2
            return _resize(frame[top : top + ch, left : left + cw], height, width)
        if self.how == "pad":
            scale = min(height / h, width / w)
            inner = _resize(frame, max(1, min(height, round(h * scale))), max(1, min(width, round(w * scale))))
            out = np.zeros((height, width, 3), np.uint8)
            out[: inner.shape[0], : inner.shape[1]] = inner
            return out
        return _resize(frame, height, width)


def _resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Averages over areas when it shrinks; pixels stay squares when it grows by whole factors."""
    h, w = frame.shape[:2]
    if (h, w) == (height, width):
        return frame
    if height <= h and width <= w:
        method = Image.Resampling.BOX
    else:
        whole = height % h == 0 and width % w == 0
        method = Image.Resampling.NEAREST if whole else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize((width, height), method))


def as_rgb(frame: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    """One frame as RGB bytes: grey is tripled, alpha dropped, [3, H, W] turned, floats in [0, 1] rounded."""
    x = np.asarray(frame)
    if x.ndim == 2:
        x = x[..., None]
    if x.ndim == 3 and x.shape[-1] not in (1, 3, 4) and x.shape[0] in (1, 3, 4):
        x = np.moveaxis(x, 0, -1)
    if x.ndim != 3 or x.shape[-1] not in (1, 3, 4) or 0 in x.shape:
        raise DataError(f"a frame has shape {[*np.shape(frame)]}: expected [H, W, 3], [H, W, 1] or [3, H, W]")
    if np.issubdtype(x.dtype, np.floating):
        if not np.isfinite(x).all() or x.min() < -1e-3 or x.max() > 1 + 1e-3:
            raise DataError(f"a frame of {x.dtype} holds {x.min():.3g} .. {x.max():.3g}: floats must be in [0, 1]")
        x = np.round(x * 255).clip(0, 255).astype(np.uint8)
    if x.dtype == np.bool_:
        x = x.astype(np.uint8) * 255
    if x.dtype != np.uint8:
        raise DataError(f"a frame is of type {x.dtype}: expected uint8, or floats in [0, 1]")
    return x[..., :3] if x.shape[-1] >= 3 else np.repeat(x, 3, axis=-1)


@dataclass(frozen=True)
class Part:
    """What is wanted of an episode: frames start .. stop - 1 of it (None: to the end), fitted."""

    start: int = 0
    stop: int | None = None
    fit: Fit = field(default_factory=Fit)


@dataclass(frozen=True)
class Entry:
    """One episode of a source. `frames` is what its header says, 0 where that is not known before it is read."""

    key: str
    frames: int


@dataclass(frozen=True)
class Options:
    """What a source cannot say of itself; each reader takes what concerns it."""

    alignment: Literal["", "taken", "led"] = ""  # a row's action was taken at its frame, or led to it; "": the usual
    actions: tuple[ActionComponent, ...] = ()  # instead of the components that are inferred
    camera: str = ""  # which image, where there are several
    episodes: int = 100  # live environments: how many
    steps: int = 1000  # live environments: the longest episode
    seed: int = 0  # live environments


class Reader(abc.ABC):
    """A source that was opened. Pickle the arguments, not the reader: workers open it anew."""

    format: ClassVar[str]
    decided: ClassVar[bool] = False  # the format itself says what its actions are, and which frame each belongs to
    tasks: tuple[str, ...] = ()  # texts or names; an episode's task is the index plus one, 0 is none
    fps: float | None = None
    space: ActionSpace

    def __init__(self, source: str, options: Options, space: ActionSpace | None = None):
        self.source, self.path, self.options = source, Path(source), options
        for name in ("actions", "alignment"):
            if self.decided and getattr(options, name):
                raise DataError(
                    f"--{name} is not for {source}: {self.format} itself says what its actions are, and which frame "
                    "each belongs to: leave it out"
                )

    @classmethod
    @abc.abstractmethod
    def claims(cls, source: str) -> bool:
        """Whether a source looks like this format."""

    @abc.abstractmethod
    def entries(self) -> list[Entry]:
        """All episodes, in a fixed order. One whose header cannot be read is among them, and fails when it is read."""

    def files(self) -> list[Path]:
        """The files that are read, by default all that are not hidden; none where the source is no place of files."""
        if not self.path.is_dir():
            return [self.path] if self.path.is_file() else []
        shown = lambda p: not any(part.startswith(".") for part in p.relative_to(self.path).parts)
        return sorted(p for p in self.path.rglob("*") if p.is_file() and shown(p))

    @abc.abstractmethod
    def read(self, key: str, part: Part) -> Episode:
        """Reads an episode, or raises `DataError`."""

    def task(self, text: str | None) -> np.ndarray:
        """The id of a task's text as int32 [1]."""
        return np.asarray([self.tasks.index(text) + 1 if text in self.tasks else 0], np.int32)


@contextmanager
def reading(name: str | os.PathLike[str]) -> Iterator[None]:
    """Names what was being read in whatever goes wrong: foreign files make foreign libraries fail in every way."""
    try:
        yield
    except MemoryError:
        raise
    except DataError as error:
        if str(error).startswith(f"{name}: "):  # by a part of it that is also read alone
            raise
        raise DataError(f"{name}: {error}") from error
    except Exception as error:
        text = str(error).splitlines()[0][:200] if str(error) else ""
        raise DataError(f"{name}: cannot be read ({type(error).__name__}: {text})") from error


def stack(frames: Iterator[np.ndarray]) -> UInt8[np.ndarray, "T H W 3"]:
    """Frames of one episode; they must be of one size."""
    out: list[np.ndarray] = []
    for frame in frames:
        if out and frame.shape != out[0].shape:
            raise DataError(
                f"frame {len(out)} is {frame.shape[0]} x {frame.shape[1]}, the ones before are {out[0].shape[0]} x "
                f"{out[0].shape[1]}: give a size to fit all frames to"
            )
        out.append(frame)
    if not out:
        raise DataError("has no frames")
    return np.stack(out)


def check_picture(values: np.ndarray, high: float) -> None:
    """Refuses codes that are stored like pictures, such as MiniGrid's 7 x 7 x 3 kinds, colours and states.

    Args:
        values: uint8 [..., H, W, C], all that is known of it.
        high: what its space says that it can be at most.
    """
    side, most = min(values.shape[-3:-1]), int(values.max(initial=0))
    # Grids are small and have few codes. A picture of less than 32 pixels may still be one, if it is not all but black.
    if high < 128 or side < 16 or (side < 32 and most < 16):
        raise DataError(
            f"its observations are {values.shape[-3]} x {values.shape[-2]}, up to {most} of at most {high:g}: codes, "
            "not a picture: record pictures, by a wrapper such as minigrid's RGBImgObsWrapper or what render() returns"
        )


def shifted(values: np.ndarray, frames: int, alignment: str, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows as recorded -> rows that led to each of `frames` frames, and which of these there are.

    One row fewer than frames are the actions between them. As many rows as frames are those taken at each frame
    ("taken": they lead to the next, the last one to a frame that was not kept) or those that led to it ("led").
    """
    n = len(values)
    if n not in (frames, frames - 1):
        raise DataError(f"has {n} rows of {what} for {frames} frames: expected {frames}, or {frames - 1}")
    present = np.ones(frames, np.bool_)
    present[:1] = False
    if n == frames and alignment == "led":
        return values, present
    out = np.zeros((frames, *values.shape[1:]), values.dtype)
    out[1:] = values[: frames - 1]
    return out, present


def assemble(
    frames: np.ndarray,
    space: ActionSpace,
    columns: dict[str, np.ndarray],
    *,
    alignment: str,
    total: int,
    part: Part,
    rewards: np.ndarray | None = None,
    is_terminal: bool = False,
    task: np.ndarray | None = None,
    meta: dict[str, Any] | None = None,
) -> Episode:
    """An episode out of what most formats hold: columns of recorded values beside frames.

    Args:
        frames: the frames of `part`, fitted.
        columns: as `ActionSpace.encode` wants them, for the whole episode; a component without one is missing.
        total: frames of the whole episode.
        rewards: given after the action of each row ("taken"), or with each frame ("led").
        is_terminal: whether the whole episode's last frame ended it.
        task: int32 [words] or [total, words].
    """
    coded = space.encode(columns)
    actions, present = {}, {}
    for component in space.components:
        values, given = coded[component.name]
        if values is None or given is None:
            values, there = space.zeros(component.name, total), np.zeros(total, np.bool_)
        else:
            values, shown = shifted(values, total, alignment, f"action {component.name!r}")
            there = shown & shifted(given, total, alignment, "presence")[0]
        actions[component.name], present[component.name] = values, there
    reward = np.zeros(total, np.float32)
    if rewards is not None:
        given = np.asarray(rewards, np.float32).reshape(-1)
        reward = shifted(given, total, alignment, "reward")[0].copy()
        if alignment == "taken" and len(given) == total:
            # What the last row earned came with a frame that was not kept. Most robot sets reward success there alone.
            reward[-1] += given[-1]
        if not np.isfinite(reward).all():
            raise DataError("holds rewards that are not finite")
        reward[:1] = 0.0
    cut = slice(part.start, part.start + len(frames))
    whole = Episode(
        frames=np.broadcast_to(frames[:1], (total, *frames.shape[1:])),  # stands in: `part` takes none of it
        actions=actions,
        present=present,
        reward=reward,
        is_terminal=is_terminal,
        task=np.zeros(1, np.int32) if task is None else task,
        meta=meta or {},
    )
    piece = whole.part(cut.start, cut.stop)
    return Episode(frames, piece.actions, piece.present, piece.reward, piece.is_terminal, piece.task, piece.meta)


def readable(keys: Iterable[str], load: Callable[[str], T]) -> Iterator[T]:
    """`load` of every key that can be read. The others fail again when they are read, and are counted there."""
    for key in keys:
        try:
            yield load(key)
        except DataError:
            continue


def files(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files with one of the suffixes, a single one or all below a folder, in a fixed order."""
    if path.is_file():
        return [path] if path.suffix.lower() in suffixes else []
    found = (p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    return sorted(p for p in found if not p.name.startswith("."))
