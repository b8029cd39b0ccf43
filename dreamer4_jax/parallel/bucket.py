"""Runs and data in a bucket: ``gs://bucket/path`` is a folder of this machine, mounted by Cloud Storage FUSE.

Files then behave as on a disk that all hosts share: logs grow, checkpoints are committed by renaming a folder. The
bucket needs a hierarchical namespace, where that renaming is one step; on a flat one a folder is copied file by file,
and a machine that is taken away meanwhile would leave half a checkpoint under its final name.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from dreamer4_jax.config import UserError

MOUNTS = Path("/tmp/dreamer4-buckets")  # a cluster that mounts buckets itself (GKE) does it here
OPTIONS = (
    "--implicit-dirs",
    "--rename-dir-limit=1000000",
    # Another host's new file must be seen at once: all processes wait for the main one and then look.
    "--metadata-cache-ttl-secs=0",
    "--metadata-cache-negative-ttl-secs=0",
)


def on_disk(path: str | Path) -> Path:
    """Where `path` lies on this machine: itself, or, for ``gs://bucket/...``, inside the bucket's mount.

    Mounts the bucket if it is not mounted yet, and makes sure that it can be written to.

    Raises:
        UserError: no such bucket, no permission, or no Cloud Storage FUSE on this machine.
    """
    if not str(path).startswith("gs://"):
        return Path(path)
    bucket, inside = _mounted(str(path))
    _require_writable(bucket, MOUNTS / bucket)
    return inside


def readable(path: str | Path) -> Path:
    """Where data at `path` lie on this machine, as in `on_disk`: they need not be writable, and a path inside a mount
    stands for the bucket, so that a config that was made where it is mounted works where it is not yet."""
    place = Path(path)
    if place.is_relative_to(MOUNTS) and not place.exists():
        path = f"gs://{place.relative_to(MOUNTS)}"
    return _mounted(str(path))[1] if str(path).startswith("gs://") else place


def _mounted(text: str) -> tuple[str, Path]:
    """(bucket, path on this machine) of ``gs://bucket/...``, whose bucket is mounted if it is not yet."""
    bucket, _, inside = text.removeprefix("gs://").partition("/")
    if not bucket or not inside.strip("/"):
        raise UserError(f"{text}: name a folder in a bucket, e.g. gs://my-bucket/runs/mine")
    mount = MOUNTS / bucket
    if not os.path.ismount(mount):
        _mount(bucket, mount)
    return bucket, mount / inside.strip("/")


def _mount(bucket: str, mount: Path) -> None:
    tool = shutil.which("gcsfuse")
    if tool is None:
        raise UserError(
            f"gs://{bucket}: is mounted by Cloud Storage FUSE, but there is no gcsfuse on this machine; install it, or "
            f"mount the bucket at {mount} by other means"
        )
    mount.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([tool, *OPTIONS, bucket, str(mount)], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise UserError(
            f"gs://{bucket}: cannot be mounted: {last[0]}. Does the bucket exist, and may this machine's service"
            " account read and write its objects (roles/storage.objectUser)?"
        )


def _require_writable(bucket: str, mount: Path) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=mount, prefix=".dreamer4-") as probe:
            probe.write(b"probe")
    except OSError as error:
        raise UserError(
            f"gs://{bucket}: is not writable: {error}. Give this machine's service account roles/storage.objectUser"
        ) from error
