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


def header(path: Path) -> tuple[int, float | None]:
    """(frames, or 0 where the file does not say, frames a second) of a video."""
    av = needs("av", "reading video")
    with av.open(str(path)) as container:
        stream = _stream(container)
        return int(stream.frames), float(stream.average_rate) if stream.average_rate else None


def _stream(container: Any) -> Any:
    if not container.streams.video:
        raise DataError("has no video stream")
    return container.streams.video[0]


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
        index = -1
        for index, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise DataError(f"frame {index} is damaged")
            if index >= start:
                yield fit(frame.to_ndarray(format="rgb24"))
            if stop is not None and index == stop - 1:
                return
        decoded, said = index + 1, int(stream.frames)
        # Editing lists make some files say a frame or two more than they show.
        if decoded < said - max(2, said // 100) or (stop is not None and decoded < stop):
            raise DataError(f"ends after {decoded} of {max(said, stop or 0)} frames: the file is truncated")


def decode_image(data: bytes) -> np.ndarray:
    """An encoded picture (PNG, JPEG, ...) as RGB."""
    with Image.open(io.BytesIO(data)) as image:
        return as_rgb(np.asarray(image.convert("RGB") if image.mode not in ("L", "RGB", "RGBA") else image))


def span(
    path: Path, fit: Callable[[np.ndarray], np.ndarray], begin: float, count: int, slack: float
) -> Iterator[np.ndarray]:
    """`count` frames from the one at `begin` seconds (give or take `slack`) on; for files with sound timestamps."""
    av = needs("av", "reading video")
    with av.open(str(path)) as container:
        stream = _stream(container)
        stream.thread_type = "AUTO"
        if begin > slack:
            container.seek(int((begin - slack) / float(stream.time_base)), stream=stream)  # the keyframe in front
        left = count
        for frame in container.decode(stream):
            if frame.time is None or frame.time < begin - slack:
                continue
            if frame.is_corrupt:
                raise DataError(f"{path.name}: the frame at {frame.time:.3f} s is damaged")
            yield fit(frame.to_ndarray(format="rgb24"))
            left -= 1
            if left == 0:
                return
        raise DataError(f"{path.name} ends {left} frames short of {count} from {begin:.3f} s on")
