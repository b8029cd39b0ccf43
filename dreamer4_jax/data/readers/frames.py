"""Decoding of video files and encoded images. PyAV and h5py come with the extra `data`."""

import importlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamer4_jax.data.readers.base import as_rgb
from dreamer4_jax.data.schema import DataError

VIDEO = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")


def needs(package: str, what: str) -> Any:
    """Imports a package of the extra `data`, or says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise DataError(f"{what} needs the package {package!r}: pip install 'dreamer4_jax[data]'") from None


def rate(path: Path) -> float | None:
    """Frames a second of a video, where its header says so."""
    av = needs("av", "reading video")
    with av.open(str(path)) as container:
        average = _stream(container).average_rate
        return float(average) if average else None


def count(path: Path) -> int:
    """How many frames a video shows, without decoding one."""
    av = needs("av", "reading video")
    with av.open(str(path)) as container:
        stream = _stream(container)
        return _indexed(container, stream) or sum(p.size > 0 and not p.is_discard for p in container.demux(stream))


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise DataError("has no video stream")
    return container.streams.video[0]


def _indexed(container: Any, stream: Any) -> int:
    """Frames that the index of an MP4 or QuickTime file shows; 0: there is none that is known to be whole.

    The header's count is of frames that are stored: where a clip was cut without encoding it anew, an edit list hides
    some of them.
    """
    if not stream.frames or "mov" not in container.format.name.split(","):
        return 0
    return sum(not entry.is_discard for entry in stream.index_entries)


def decode(
    path: Path, fit: Callable[[np.ndarray], np.ndarray], start: int = 0, stop: int | None = None
) -> Iterator[np.ndarray]:
    """Frames start .. stop - 1, counted from the first one: timestamps of recordings are not to be trusted.

    A file that ends early, or whose packets are damaged, raises `DataError` instead of yielding repaired pictures.
    """
    av = needs("av", "reading video")
    with av.open(str(path)) as container:
        stream = _stream(container)
        stream.thread_type = "AUTO"
        said = _indexed(container, stream) or int(stream.frames)
        index = -1
        for index, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise DataError(f"frame {index} is damaged")
            if index >= start:
                yield fit(frame.to_ndarray(format="rgb24"))
            if stop is not None and index == stop - 1:
                return
        decoded = index + 1
        # Frames that lean on others which were cut away are not shown, and some headers count what was dropped.
        if decoded < said - max(2, said // 100) or (stop is not None and decoded < stop):
            raise DataError(f"ends after {decoded} of {max(said, stop or 0)} frames: the file is truncated")


def decode_image(data: bytes) -> np.ndarray:
    """An encoded picture (PNG, JPEG, ...) as RGB."""
    with Image.open(io.BytesIO(data)) as image:
        return as_rgb(np.asarray(image.convert("RGB") if image.mode not in ("L", "RGB", "RGBA") else image))


def span(
    path: Path, fit: Callable[[np.ndarray], np.ndarray], begin: float, count: int, fps: float
) -> Iterator[np.ndarray]:
    """`count` frames from the one at `begin` seconds on, for files with sound timestamps: each must be where its number
    says, give or take half a frame, or what follows a dropped one would be shown a frame early. LeRobot asks for frames
    by these times, and is stricter."""
    slack = 0.5 / fps
    av = needs("av", "reading video")
    with av.open(str(path)) as container:
        stream = _stream(container)
        stream.thread_type = "AUTO"
        if begin > slack:
            container.seek(int((begin - slack) / float(stream.time_base)), stream=stream)  # the keyframe in front
        done = 0
        for frame in container.decode(stream):
            if frame.time is None or frame.time < begin - slack:
                continue
            if frame.is_corrupt:
                raise DataError(f"{path.name}: the frame at {frame.time:.3f} s is damaged")
            wanted = begin + done / fps
            if abs(frame.time - wanted) > slack:
                raise DataError(
                    f"{path.name}: frame {done} from {begin:.3f} s on is at {frame.time:.3f} s, expected at "
                    f"{wanted:.3f} s: frames are missing, or they are not {fps:g} a second"
                )
            yield fit(frame.to_ndarray(format="rgb24"))
            done += 1
            if done == count:
                return
        raise DataError(f"{path.name} ends {count - done} frames short of {count} from {begin:.3f} s on")
