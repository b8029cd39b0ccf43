"""Run directories in a bucket: mounted once, checked for writing, refused with a reason."""

import os
from pathlib import Path

import pytest

from dreamer4_jax.config import UserError
from dreamer4_jax.parallel import bucket


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a stand-in gcsfuse, which notes its words; what it has mounted counts as a mount."""
    tools, mounts = tmp_path / "bin", tmp_path / "mounts"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setattr(bucket, "MOUNTS", mounts)
    monkeypatch.setattr(os.path, "ismount", lambda path: (Path(path) / ".mounted").exists())

    def gcsfuse(script: str) -> Path:
        tool = tools / "gcsfuse"
        tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/words\n{script}\n')
        tool.chmod(0o755)
        return tmp_path / "words"

    return gcsfuse


MOUNTS = 'for last; do :; done\ntouch "$last/.mounted"'


def test_a_path_is_itself(tmp_path):
    assert bucket.on_disk("runs/mine") == Path("runs/mine")
    assert bucket.on_disk(tmp_path) == tmp_path


def test_a_bucket_is_mounted_once(machine):
    words = machine(MOUNTS)
    run = bucket.on_disk("gs://mine/runs/one")
    assert run == bucket.MOUNTS / "mine" / "runs" / "one"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    assert bucket.on_disk("gs://mine/runs/one/") == run and bucket.on_disk("gs://mine/other") != run
    (line,) = words.read_text().splitlines()
    assert line.split()[-2:] == ["mine", str(bucket.MOUNTS / "mine")] and "--metadata-cache-ttl-secs=0" in line
    assert {p.name for p in (bucket.MOUNTS / "mine").iterdir()} == {".mounted", "runs"}  # no probe is left


def test_data_in_a_bucket_are_mounted_by_either_name_and_need_not_be_writable(machine, monkeypatch):
    words = machine(MOUNTS)
    monkeypatch.setattr(bucket, "_require_writable", lambda *_: pytest.fail("data are only read"))
    assert bucket.readable("runs/mine") == Path("runs/mine")
    place = bucket.MOUNTS / "mine" / "data" / "one"
    assert bucket.readable("gs://mine/data/one") == place and bucket.readable(place) == place
    assert bucket.readable(bucket.MOUNTS / "other" / "set") == bucket.MOUNTS / "other" / "set"
    assert [line.split()[-2] for line in words.read_text().splitlines()] == ["mine", "other"]
    (bucket.MOUNTS / "third" / "set").mkdir(parents=True)  # by whatever means it came there
    assert bucket.readable(bucket.MOUNTS / "third" / "set").exists() and len(words.read_text().splitlines()) == 2


def test_what_cannot_be_mounted_is_named(machine, monkeypatch):
    machine("echo 'bucket mine: storage: bucket doesn'\"'\"'t exist' >&2; exit 1")
    with pytest.raises(UserError, match="gs://mine: cannot be mounted: bucket mine: .*doesn't exist. Does the bucket"):
        bucket.on_disk("gs://mine/runs/one")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="there is no gcsfuse on this machine; install it, or mount the bucket at"):
        bucket.on_disk("gs://mine/runs/one")


def test_a_bucket_that_is_not_writable_is_refused(machine, monkeypatch):
    machine(MOUNTS)

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(bucket.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(UserError, match="gs://mine: is not writable: .*Permission denied.* roles/storage.objectUser"):
        bucket.on_disk("gs://mine/runs/one")


@pytest.mark.parametrize("path", ["gs://", "gs://mine", "gs://mine/"])
def test_a_bucket_alone_is_no_run_directory(path):
    with pytest.raises(UserError, match="name a folder in a bucket, e.g. gs://my-bucket/runs/mine"):
        bucket.on_disk(path)
