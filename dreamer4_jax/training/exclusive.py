"""One training at a time in a run directory, and what a full disk means for it."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dreamer4_jax.config import UserError

LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT)
UNKNOWN = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems that have no locks


@contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Keeps a second process from training in the directory; the lock goes with the process, however it ends.

    Raises:
      UserError: another process trains there, or the disk is full; what was saved is intact.
    """
    try:
        with (run_dir / LOCK).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"run directory {run_dir}: another process is training there; wait for it, or choose another"
                ) from None
            except OSError as error:
                if error.errno not in UNKNOWN:
                    raise
            yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"run directory {run_dir}: {error.strerror}; make room, and go on with --resume") from error
