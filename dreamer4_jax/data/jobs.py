"""Shards made by several processes: what an interrupted run left whole is kept, the rest is made."""

import concurrent.futures
import concurrent.futures.process
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dreamer4_jax.data import writer
from dreamer4_jax.data.schema import DataError


class Job(Protocol):
    """What a worker needs to make one shard; it is pickled."""

    @property
    def path(self) -> str: ...  # of the shard

    @property
    def frames(self) -> int: ...  # about how many, for the progress bar (or of what else its `unit` is)


J = TypeVar("J", bound=Job)


def follow_parent() -> None:
    """Ctrl-C is the parent's business: workers finish the shard they are writing. They end where it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with, daemon=True).start()


def make_shards(
    jobs: Sequence[J],
    make: Callable[[J], dict[str, Any]],
    *,
    workers: int,
    progress: bool,
    what: str,
    unit: str = "frames",
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Runs the jobs, in this process or in workers, and yields (number of the job, manifest entry) as they finish.

    Args:
        make: a module's function (it is pickled) that writes the job's shard and returns its entry.
        what: names the work in the progress bar, as "recording"; `unit` what is counted.
    """
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(f"{unit}  {{task.fields[rate]}}"),
               TimeRemainingColumn())  # fmt: skip
    begun, done = time.monotonic(), 0
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task(what, total=sum(job.frames for job in jobs), rate="")

        def advance(job: J) -> None:
            nonlocal done
            done += job.frames
            rate = done / (time.monotonic() - begun)
            bar.update(task, completed=done, rate=f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s")

        todo = []
        for number, job in enumerate(jobs):  # a dataset that is complete starts no process
            entry = writer.finished_shard(Path(job.path))
            if entry is None:
                todo.append((number, job))
            else:
                yield number, entry
                advance(job)
        workers = min(workers, len(todo))
        if workers <= 1:
            for number, job in todo:
                yield number, make(job)
                advance(job)
            return
        # Fork would copy the parent's threads' locks (JAX has threads); spawned workers import only what they need.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=follow_parent) as pool:
            futures = {pool.submit(make, job): (number, job) for number, job in todo}
            try:
                for future in concurrent.futures.as_completed(futures):
                    number, job = futures[future]
                    yield number, future.result()
                    advance(job)
            except concurrent.futures.process.BrokenProcessPool:
                raise DataError(
                    f"a process died while {what} (killed, or out of memory); run the same command again: whole "
                    "shards are kept, and fewer workers need less memory"
                ) from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
