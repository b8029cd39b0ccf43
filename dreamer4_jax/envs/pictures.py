"""Pictures of environments that draw with pygame, on machines with a screen or without."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import UInt8
from PIL import Image


@contextmanager
def headless() -> Iterator[None]:
    """pygame without a screen, unless the environment names a driver: nothing is shown, and there need not be one."""
    driver = os.environ.get("SDL_VIDEODRIVER")
    os.environ["SDL_VIDEODRIVER"] = driver or "dummy"
    try:
        yield
    finally:
        if driver is None:
            del os.environ["SDL_VIDEODRIVER"]


def resized(frame: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
    """A picture of another size: where it is smaller, each pixel is the mean of the area that it covers."""
    if frame.shape[:2] == (height, width):
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX))
