"""A run directory is trained in by one process at a time; a full disk, damage and forbidden places end in a message."""

import errno
import fcntl
import os

import pytest

from dreamer4_jax import config as configs
from dreamer4_jax.config import UserError
from dreamer4_jax.training import metrics, open_run, run_phase
from dreamer4_jax.training.exclusive import LOCK
from dreamer4_jax.training.metrics import read_ledger, read_metrics
from tests.training_phases import Regression

CONFIG = configs.preset("tiny")


def train(run_dir, **options):
    return run_phase(Regression(), config=CONFIG, run_dir=run_dir, seed=0, progress=False, **options)


def test_a_second_process_is_kept_out_and_may_read_what_is_finished(tmp_path):
    with (tmp_path / LOCK).open("a") as other:  # to flock, another opening is another process
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"run directory {tmp_path}: another process is training there"):
            train(tmp_path)
        assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "metrics.jsonl").exists()
    assert train(tmp_path).finished
    with (tmp_path / LOCK).open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert train(tmp_path, resume=True).finished


@pytest.mark.parametrize("where", ["events", "lines"])
def test_a_full_disk_ends_in_a_message_and_the_run_goes_on_when_there_is_room(tmp_path, monkeypatch, where):
    train(tmp_path, stop_after=4)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_, **__):
        raise full

    with monkeypatch.context() as patch:
        if where == "events":
            patch.setattr(metrics.EventsWriter, "flush", refuse)
        else:
            patch.setattr(metrics, "write_atomic", refuse)
        with pytest.raises(UserError, match="No space left on device; make room, and go on with --resume"):
            train(tmp_path, resume=True)
    assert train(tmp_path, resume=True).finished


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, which is always full")
def test_events_that_cannot_be_written_are_an_error(tmp_path, monkeypatch):
    """A writer with a thread of its own would fail unseen, and block the training when its queue is full."""
    (tmp_path / "tb" / "dynamics").mkdir(parents=True)
    writer = metrics.MetricsWriter(tmp_path, "dynamics")
    monkeypatch.setattr(writer._events._writer._py_recordio_writer, "_writer", open("/dev/full", "wb", buffering=0))
    with pytest.raises(OSError, match="No space left"):
        writer.write(1, {"loss": 1.0})


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run directory .*file/run: cannot be written \(Not a directory\)"):
        open_run(tmp_path / "file" / "run", CONFIG)


def test_a_draft_of_the_first_file_is_no_run(tmp_path):
    (tmp_path / "config.json.part").write_text('{"na')
    assert open_run(tmp_path, CONFIG, resume=True) == tmp_path and (tmp_path / "config.json").exists()


@pytest.mark.parametrize(("name", "read"), [("metrics.jsonl", read_metrics), ("ledger.json", read_ledger)])
def test_damaged_files_are_named(tmp_path, name, read):
    (tmp_path / name).write_bytes(b'{"phase": "dynam\n{"phase": "dynamics", "step": 1}\n')
    with pytest.raises(UserError, match=rf"{name}: damaged \(.*its numbers alone are lost"):
        read(tmp_path)
