"""Pictures of environments that draw with pygame, on machines with a screen or without."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


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
