"""A run in the cloud from beginning to end, with nothing left behind: what a sweep does for each of its trials.

`dreamer4 launch` leaves a run to whoever started it: after a failure machines are kept, and Ctrl-C goes away. A sweep
looks after its own. It waits for the end, copies what its report needs out of the bucket, and gives the machines back
however the trial ended. If it is told to end, the run is told to save, and the same sweep command resumes it.

Everything here may be repeated: a trial whose sweep was killed is found where it is and followed on.
"""

import contextlib
import hashlib
import io
import json
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from dreamer4_jax.config import UserError
from launch import queued, render
from launch.cloud import Cloud, CommandFailed
from launch.process import Terminated, Termination
from launch.queued import say
from launch.spec import INTERRUPTED, RunSpec

T = TypeVar("T")

TRIES = 5  # of what a network may lose, one poll apart


def submit(backend: str, spec: RunSpec, cloud: Cloud) -> int:
    """Hands a run to GKE or SkyPilot, which from then on look after it; returns the tool's exit code."""
    if backend == "jobset":
        print(cloud.output(render.kubectl("run", spec), stdin=render.to_yaml(render.jobset(spec))), end="")
        return 0
    if backend == "xpk":
        return cloud.show(render.xpk("run", spec))
    task = render.to_yaml(render.skypilot(spec))  # it may be refused: before anything is done
    cloud.output(["mkdir", "-p", render.SCRATCH])
    cloud.output(["tee", render.task_file(spec)], stdin=task)
    return cloud.show(render.sky("run", spec))


@dataclass(frozen=True)
class _Cloud(Cloud):
    """Ends every short command: of one that was cut off nobody knows whether it has asked for machines."""

    termination: Termination = field(default_factory=Termination)

    def output(self, argv: Sequence[str], *, stdin: str = "") -> str:
        with self.termination.shield():
            return super().output(argv, stdin=stdin)


# ---------------------------------------------------------------------------------------------------------------------
# The life of a run in each backend. Every method may be called again after it failed.


@dataclass(frozen=True)
class _Life(ABC):
    spec: RunSpec
    cloud: _Cloud
    poll_s: float

    @abstractmethod
    def run(self) -> int:
        """Starts the run, or finds it, and waits for its end; returns its exit code."""

    def stop(self) -> None:
        """Asks it to save and end, and waits until it has; nothing to do where `release` does that."""
        return

    @abstractmethod
    def release(self) -> None:
        """Gives back what is left of it."""

    @abstractmethod
    def show(self) -> None:
        """With a cloud that prints: the commands of a life without incident, in their order."""


class _Queued(_Life):
    """Queued resources, which `launch.queued` looks after."""

    def run(self) -> int:
        code, what = queued.run_to_end(self.spec, self.cloud, self.poll_s)
        if code == INTERRUPTED:  # after a mistake the run's own last line says more
            say(what)
        return code

    def stop(self) -> None:
        queued.act("stop", self.spec, self.cloud)

    def release(self) -> None:
        if queued.state(self.spec, self.cloud) is not None:
            self.cloud.output(render.delete(self.spec))

    def show(self) -> None:
        queued.launch(self.spec, self.cloud)


class _JobSet(_Life):
    """A JobSet on GKE. When it is removed its pods get SIGTERM, and the time to save."""

    backend = "jobset"

    def run(self) -> int:
        now = self._state()
        if now == "Failed":  # left by a sweep that was killed before it could remove it
            self.release()
        if now in (None, "Failed"):
            with self.cloud.termination.shield():
                code = submit(self.backend, self.spec, self.cloud)
            if code:
                return code
        while (now := self._state()) == "":
            time.sleep(self.poll_s)
        if now is None:
            raise UserError(f"{self.spec.name}: the JobSet was removed by somebody else")
        self.cloud.show(render.kubectl("output", self.spec))
        return 0 if now == "Completed" else 1

    def _state(self) -> str | None:
        """How it ended, "Completed" or "Failed"; "" if it goes on, None if there is none of this name."""
        text = self.cloud.output(render.kubectl("describe", self.spec))
        if not text.strip():
            return None
        true = [c["type"] for c in json.loads(text).get("status", {}).get("conditions", ()) if c["status"] == "True"]
        return next((kind for kind in ("Completed", "Failed") if kind in true), "")

    def release(self) -> None:
        if self._state() is not None:
            self.cloud.output(render.kubectl("delete", self.spec))

    def show(self) -> None:
        submit(self.backend, self.spec, self.cloud)
        for action in ("describe", "output", "delete"):
            self.cloud.output(render.kubectl(action, self.spec))


class _Xpk(_JobSet):
    """xpk makes a JobSet, and from then on it is one."""

    backend = "xpk"


class _SkyPilot(_Life):
    """A managed job. A cancelled one is not told before its machines are taken: it goes on from its last checkpoint."""

    def run(self) -> int:
        before, status = self._latest()
        if status and not _ended(status):
            before = None  # it goes on
        else:
            with self.cloud.termination.shield():
                code = submit("skypilot", self.spec, self.cloud)
            if code:
                return code
        while True:
            job, status = self._latest(refresh=True)
            if job is not None and job != before and _ended(status):
                break
            time.sleep(self.poll_s)
        if status != "SUCCEEDED":
            self.cloud.show(render.sky("output", self.spec, job))
        return {"SUCCEEDED": 0, "CANCELLED": INTERRUPTED, "CANCELLING": INTERRUPTED}.get(status, 1)

    def _latest(self, refresh: bool = False) -> tuple[int | None, str]:
        """Number and status of the newest job of this name; (None, "") if there is none.

        The controller of the jobs ends some time after the last of them. Then `refresh` starts it; otherwise none is
        in progress, which is all that is asked.
        """
        try:
            text = self.cloud.output(render.sky("describe", self.spec) + ["--refresh"] * refresh)
        except CommandFailed as error:
            if not refresh and "No in-progress managed jobs" in error.stderr:
                return None, ""
            raise
        start = re.search(r"^\[", text, re.MULTILINE)  # what it says before may be coloured, by brackets too
        if start is None:
            raise UserError(f"{' '.join(render.sky('describe', self.spec))}: printed no list of jobs")
        jobs = json.loads(text[start.start() :])
        mine = [(job["job_id"], job["status"]) for job in jobs if job["job_name"] == self.spec.name]
        return max(mine, default=(None, ""))

    def release(self) -> None:
        _, status = self._latest()
        if status and not _ended(status):
            self.cloud.output(render.sky("delete", self.spec))

    def show(self) -> None:
        submit("skypilot", self.spec, self.cloud)
        self.cloud.output(render.sky("describe", self.spec))


def _ended(status: str) -> bool:
    """Whether a managed job of this status has given its machines back, or is about to."""
    return status in ("SUCCEEDED", "CANCELLED", "CANCELLING") or status.startswith("FAILED")


LIVES: dict[str, type[_Life]] = {"tpu": _Queued, "jobset": _JobSet, "xpk": _Xpk, "skypilot": _SkyPilot}


# ---------------------------------------------------------------------------------------------------------------------
# The backend of a sweep


@dataclass(frozen=True)
class Remote:
    """Runs trials in the cloud; to be called in a process of its own for each trial, which SIGTERM ends in order.

    Attributes:
      name: of the backend, one of `LIVES`.
      where: what is the same for all trials: machines, code, and `output`, the sweep's folder in a bucket.
      follow: whether to copy the metrics of a run while it goes on, by which a sweep that prunes judges it.
      poll_s: seconds between two looks at its state.
    """

    name: str
    where: RunSpec
    follow: bool = False
    poll_s: float = 30.0

    def spec(self, trial: RunSpec) -> RunSpec:
        """The trial as a run in the cloud.

        Its name there tells the sweep's folder too: the same overrides in two sweeps must not share machines.
        """
        stem, _, digest = trial.name.rpartition("-")
        folder = hashlib.sha256(self.where.output.encode()).hexdigest()[:6]
        return replace(
            self.where,
            name=f"{stem[:22].rstrip('-')}-{digest}-{folder}",
            experiment=trial.experiment,
            size=trial.size,
            seed=trial.seed,
            overrides=trial.overrides,
        )

    def require_tools(self) -> None:
        """Raises `UserError` if a tool that trials will need is not installed."""
        Cloud.require(
            "gcloud", *{"jobset": ("kubectl",), "xpk": ("kubectl", "xpk"), "skypilot": ("sky",)}.get(self.name, ())
        )

    def refuse(self, trial: RunSpec) -> None:
        """Raises `ConfigError` if the backend cannot run such a trial."""
        with contextlib.redirect_stdout(io.StringIO()):
            self.show(trial)

    def show(self, trial: RunSpec) -> None:
        """Prints the commands of a trial without incident, in their order."""
        spec, cloud = self.spec(trial), _Cloud(dry_run=True)
        LIVES[self.name](spec, cloud, self.poll_s).show()
        cloud.output(_copy(spec, trial))

    def __call__(self, trial: RunSpec) -> int:
        """Runs it to the end, and leaves nothing but the run directory in the bucket and its copy here.

        Returns:
          The run's exit code; `INTERRUPTED` after SIGTERM.
        """
        spec = self.spec(trial)
        Path(trial.directory).mkdir(parents=True, exist_ok=True)
        with Termination() as termination:
            cloud = _Cloud(termination=termination)
            life = LIVES[self.name](spec, cloud, self.poll_s)
            try:
                with termination.heard(), _followed(spec, trial, self.poll_s if self.follow else None):
                    code = self._again(life.run)
            except Terminated:
                code = INTERRUPTED
                _stop(life, termination)
            except UserError as error:
                code = 2
                say(error)
            finally:
                try:
                    self._again(life.release)
                except UserError as error:
                    raise UserError(f"{spec.name} could not be given back, and may cost money: {error}") from error
            try:
                self._again(lambda: cloud.output(_copy(spec, trial)))
            except UserError as error:
                if code == 0:
                    raise UserError(f"{spec.directory} is complete but could not be copied: {error}") from error
                say(error)  # a run that ended early may have nothing
        return code

    def _again(self, what: Callable[[], T]) -> T:
        """Does something, again if a tool fails: a run of days must not end because a network was gone for a minute."""
        for tries in range(1, TRIES + 1):
            try:
                return what()
            except CommandFailed as error:
                if tries == TRIES:
                    raise
                say(f"{error}; once more in {self.poll_s:.0f} s")
                time.sleep(self.poll_s)
        raise AssertionError


def _stop(life: _Life, termination: Termination) -> None:
    """Lets a run save before it is removed; not if a second signal arrives, or a tool fails."""
    try:
        with termination.heard():
            life.stop()
    except Terminated:
        say("told to end a second time: it is removed without having saved")
    except UserError as error:
        say(error)


def _copy(spec: RunSpec, trial: RunSpec) -> list[str]:
    """The command that copies metrics, results and report of a run; folders, such as checkpoints, stay there."""
    return ["gcloud", "storage", "rsync", spec.directory, trial.directory]


@contextlib.contextmanager
def _followed(spec: RunSpec, trial: RunSpec, poll_s: float | None) -> Iterator[None]:
    """Copies a run's files every so many seconds while the block lasts; never if None."""
    ended = threading.Event()

    def copy() -> None:
        said = ""
        while not ended.wait(poll_s):
            try:
                Cloud().output(_copy(spec, trial))
            except CommandFailed as error:  # in the beginning there is nothing to be copied
                if str(error) != said:
                    say(error)
                said = str(error)

    thread = threading.Thread(target=copy, name="copy", daemon=True)
    if poll_s is not None:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if poll_s is not None:
            thread.join()
