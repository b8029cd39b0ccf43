"""The life of a run on Cloud TPU queued resources: ask for machines, wait, set up, run; again when they are taken away.

The run itself lives on the machines (`launch.remote`). Ending this process leaves it alone, and the same command line
finds it again, in whatever state it is.
"""

import json
import sys
import time

from dreamer4_jax.config import UserError
from launch import remote, render
from launch.cloud import Cloud, CommandFailed
from launch.spec import INTERRUPTED, RunSpec, retryable

SSH_TRIES = 10  # a machine is ACTIVE some time before it lets anybody in


class _TakenAway(Exception):
    """The machines were pre-empted before the run could start."""


def say(message: object) -> None:
    """A line of the launcher among those of the tools."""
    print(f"dreamer4: {message}", file=sys.stderr, flush=True)


def plan(spec: RunSpec) -> list[render.Argv]:
    """The commands of a life without incident, in their order; `describe` stands for the wait until ACTIVE."""
    return [
        render.describe(spec),
        render.create(spec),
        render.describe(spec),
        render.warm_up(spec),
        *render.set_up(spec),
        render.run(spec),
        render.delete(spec),
    ]


def launch(spec: RunSpec, cloud: Cloud, *, poll_s: float = 30.0) -> int:
    """Runs to the end and returns the run's exit code; restarts it up to `spec.retries` times.

    Machines are given back after success. After a failure they are kept, since the next attempt might queue for hours,
    and a message says how to end that.
    """
    commands = plan(spec)  # a spec that can't be rendered is refused before anything is asked for
    if cloud.dry_run:
        for argv in commands:
            cloud.output(argv)
        return 0
    try:
        code, what = run_to_end(spec, cloud, poll_s)
    except KeyboardInterrupt:
        say("left alone; the same command line comes back to it, --action stop and --action delete end it")
        return 130
    if code:
        say(f"{what}; the machines are kept and cost money: --action delete gives them back")
    else:
        say(f"{what}; the machines are given back")
        cloud.output(render.delete(spec))
    return code


def run_to_end(spec: RunSpec, cloud: Cloud, poll_s: float) -> tuple[int, str]:
    """Finds or asks for machines, runs, and restarts after interruptions, up to `spec.retries` times.

    Returns:
        The run's exit code, and how it ended, in words. The machines are still there.
    """
    for attempt in range(spec.retries + 1):
        if attempt:
            say(f"restart {attempt} of {spec.retries}: the run resumes from its last checkpoint")
        try:
            _acquire(spec, cloud, poll_s)
            _set_up(spec, cloud, poll_s)
        except _TakenAway:
            continue
        code = cloud.show(render.run(spec))
        if code == 0:
            return 0, "finished"
        if code == remote.STOPPED:
            return INTERRUPTED, "stopped on request"
        now = state(spec, cloud)
        if now == "ACTIVE" and not retryable(code):
            return code, f"failed with exit code {code}"
        say(f"interrupted (exit code {code}, {now or 'deleted'})")
    return INTERRUPTED, f"interrupted more often than --retries {spec.retries} allows"


def state(spec: RunSpec, cloud: Cloud) -> str | None:
    """State of the request, such as "ACTIVE"; None if there is none of this name."""
    return _state(_describe(spec, cloud))


def _describe(spec: RunSpec, cloud: Cloud) -> dict | None:
    try:
        return json.loads(cloud.output(render.describe(spec)))
    except CommandFailed as error:
        if "NOT_FOUND" in error.stderr:
            return None
        raise


def _state(found: dict | None) -> str | None:
    return found.get("state", {}).get("state", "unknown") if found else None


def _acquire(spec: RunSpec, cloud: Cloud, poll_s: float) -> None:
    """Waits for the machines; asks for them if nobody has, or if those of before were taken away.

    Raises:
        UserError: the request failed, or somebody deleted it.
        _TakenAway: they were granted and taken away again.
    """
    asked, said = False, ""
    while True:
        found = _describe(spec, cloud)
        now = _state(found)
        if now == "ACTIVE":
            return
        if now in (None, "FAILED", "SUSPENDED"):
            if asked and now == "SUSPENDED":
                raise _TakenAway
            if asked:
                raise UserError(f"{spec.name}: {_reason(found)}")
            if now:
                say(f"{now}: the machines of before are deleted")
                cloud.output(render.delete(spec))
            say(f"asking for {spec.slices} x {spec.accelerator}{' (spot)' if spec.spot else ''}")
            cloud.output(render.create(spec))
            asked = True
            continue
        if now != said:  # WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, ...
            say(f"{now}; this command may be ended and repeated meanwhile")
            said = now or ""
        time.sleep(poll_s)


def _reason(found: dict | None) -> str:
    if found is None:
        return "the request was deleted by somebody else"
    error = found.get("state", {}).get("failedData", {}).get("error", {}).get("message")
    return f"the request FAILED: {error or 'see gcloud compute tpus queued-resources describe'}"


def _set_up(spec: RunSpec, cloud: Cloud, poll_s: float) -> None:
    """Connects to all workers and installs the code.

    Raises:
        CommandFailed: that doesn't work although the machines are there.
        _TakenAway: they are not.
    """
    try:
        for tries in range(1, SSH_TRIES + 1):
            try:
                cloud.output(render.warm_up(spec))
                break
            except CommandFailed:
                if tries == SSH_TRIES or state(spec, cloud) != "ACTIVE":
                    raise
                time.sleep(poll_s)
        for argv in render.set_up(spec):
            cloud.check(argv)
    except CommandFailed as error:
        if state(spec, cloud) == "ACTIVE":
            raise
        say("the machines were taken away during set-up")
        raise _TakenAway from error


def act(action: str, spec: RunSpec, cloud: Cloud) -> int:
    """`status`, `logs`, `stop` or `delete`; returns the exit code of the last command."""
    if action == "delete":
        return cloud.show(render.delete(spec))
    command = {"status": remote.status(), "logs": remote.logs(), "stop": remote.stop()}[action]
    argv = render.ssh(spec, command, everywhere=action == "stop")
    if cloud.dry_run:
        cloud.output(render.describe(spec))
        return cloud.show(argv)
    now = state(spec, cloud)
    print(f"{spec.name}: {now or 'there is no such request'}", flush=True)
    return cloud.show(argv) if now == "ACTIVE" else 0
