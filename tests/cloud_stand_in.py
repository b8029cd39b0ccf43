"""gcloud, kubectl, xpk and sky for tests: a cloud in a folder, where machines run `tests.fake_backend`.

`install` puts the four on PATH. Beside them lie `transcript`, one JSON list for each command; `bucket`, where ``gs://``
points to; and one folder for each name that was ever asked for: ``state`` (what gcloud or sky say of it), ``pid``,
``log`` and ``exit`` of its run, which belongs to the machine and not to the command that started it, and ``found`` if
somebody came to start it when it went on already.

A file ``broken`` beside them holds names of verbs that fail, each once. With a file ``slow`` machines that are asked
for (then there is a file ``asked``) come `SLOW` seconds later; with ``deaf`` runs don't hear that they should end.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOW = 1.0
TOOLS = ("gcloud", "kubectl", "xpk", "sky")


def install(folder: Path) -> None:
    """Makes the four tools in `folder`."""
    (folder / "bucket").mkdir(parents=True)
    for tool in TOOLS:
        path = folder / tool
        # -IS starts three times as fast, which adds up; it leaves out where packages are
        code = f"#!{sys.executable} -IS\nimport sys\nsys.path[:0] = {[str(ROOT), sysconfig.get_paths()['purelib']]}\n"
        path.write_text(f"{code}from tests.cloud_stand_in import main\nmain(sys.argv)\n")
        path.chmod(0o755)


def transcript(folder: Path) -> list[list[str]]:
    """All commands so far."""
    path = folder / "transcript"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def left(folder: Path) -> list[str]:
    """Names of what still costs money: machines, JobSets, and managed jobs that have not ended."""
    states = {path.parent.name: path.read_text() for path in folder.glob("*/state")}
    return sorted(name for name, state in states.items() if state in ("ACTIVE", "JOBSET", "RUNNING"))


def main(argv: list[str]) -> None:
    here = Path(argv[0]).parent
    tool, words = Path(argv[0]).name, argv[1:]
    with (here / "transcript").open("a") as file:
        file.write(json.dumps([tool, *words]) + "\n")
    place = {"gcloud": 1 if words[0] == "storage" else 3, "kubectl": 0, "xpk": 1, "sky": 1}[tool]
    verb = words[place]
    broken = here / "broken"
    if broken.exists() and verb in (verbs := broken.read_text().split()):
        verbs.remove(verb)
        broken.write_text(" ".join(verbs))
        sys.exit(f"ERROR: {verb}: the network was gone")
    {"gcloud": gcloud, "kubectl": kubectl, "xpk": xpk, "sky": sky}[tool](here, verb, words)


# ---------------------------------------------------------------------------------------------------------------------
# Machines


def start(here: Path, name: str, command: str) -> Path:
    """Starts a run unless it goes on; returns its folder."""
    room = here / name
    room.mkdir(exist_ok=True)
    if (room / "pid").exists() and not (room / "exit").exists():
        (room / "found").touch()
        return room
    (room / "exit").unlink(missing_ok=True)
    words = shlex.split(command)
    directory = Path(words[words.index("--run") + 1].replace("gs://", f"{here}/bucket/"))
    fields = [word for word in words if word.startswith("train.")]
    code = (
        "import os, sys\nfrom launch.spec import RunSpec\nfrom tests import fake_backend\n"
        f"spec = RunSpec({directory.name!r}, 'tiny', output={str(directory.parent)!r}, overrides={tuple(fields)!r})\n"
        "try:\n    code = fake_backend.run(spec)\n"
        "except SystemExit as end:\n    code = end.code\n"
        f"sys.stdout.flush()\nopen({str(room / 'exit.tmp')!r}, 'w').write(str(code))\n"
        f"os.rename({str(room / 'exit.tmp')!r}, {str(room / 'exit')!r})\n"
    )
    with (room / "log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (room / "pid").write_text(str(child.pid))
    return room


def exit_code(room: Path) -> int:
    """Waits for the run's end."""
    while not (room / "exit").exists():
        time.sleep(0.02)
    return int((room / "exit").read_text())


def end(room: Path, how: signal.Signals) -> None:
    """Ends the run if it goes on: SIGTERM lets it save, and waits."""
    if (room / "exit").exists() or not (room / "pid").exists():
        return
    os.killpg(int((room / "pid").read_text()), how)
    if how == signal.SIGTERM:
        exit_code(room)
    else:
        (room / "exit").write_text("137")


# ---------------------------------------------------------------------------------------------------------------------
# Tools


def gcloud(here: Path, verb: str, words: list[str]) -> None:
    if verb == "rsync":
        source = Path(words[2].replace("gs://", f"{here}/bucket/"))
        if not source.is_dir():
            sys.exit(f"ERROR: {words[2]} did not match existing container")
        for path in source.iterdir():
            if path.is_file():
                shutil.copy2(path, words[3])
        return
    name = words[4]
    state = here / name / "state"
    if verb == "create":
        (here / name).mkdir(exist_ok=True)
        if state.exists():
            sys.exit("ERROR: ALREADY_EXISTS")
        if (here / "slow").exists():
            later = ["sh", "-c", f"sleep {SLOW}; printf ACTIVE > {shlex.quote(str(state))}"]
            request = subprocess.Popen(later, start_new_session=True)
            (here / "asked").touch()
            request.wait()
        state.write_text("ACTIVE")
    elif not state.exists():
        sys.exit("ERROR: NOT_FOUND: Resource was not found")
    elif verb == "describe":
        print(json.dumps({"state": {"state": state.read_text()}}))
    elif verb == "delete":
        end(state.parent, signal.SIGKILL)
        state.unlink()
    elif verb == "ssh":
        command = words[-1].removeprefix("--command=")
        if "nohup" in command:
            inner = re.search(r"\.venv/bin/dreamer4 .*", command)
            assert inner, command
            # the command stands inside a quoted word: quotes of its own would look different, and there are none
            room = start(here, name, inner[0].partition(" &")[0])
            code = exit_code(room)
            print((room / "log").read_text(), end="")
            sys.exit(code)
        if "kill -TERM" in command:
            while (here / "deaf").exists():
                time.sleep(0.02)
            end(state.parent, signal.SIGTERM)


def _jobset(here: Path, name: str, command: str) -> None:
    if (here / name / "state").exists():
        sys.exit(f"Error from server (AlreadyExists): jobsets {name!r} already exists")
    (start(here, name, command) / "state").write_text("JOBSET")


def kubectl(here: Path, verb: str, words: list[str]) -> None:
    import yaml

    if verb == "create":
        manifest = yaml.safe_load(sys.stdin)
        pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        _jobset(here, manifest["metadata"]["name"], shlex.join(pod["containers"][0]["command"]))
    elif verb == "logs":
        name = re.search(r"jobset-name=([^,]+)", words[-1])
        assert name
        print((here / name[1] / "log").read_text(), end="")
    else:
        room = here / words[2]
        if not (room / "state").exists():
            if "--ignore-not-found" in words:
                return
            sys.exit("Error from server (NotFound)")
        if verb == "get":
            code = (room / "exit").read_text() if (room / "exit").exists() else None
            ended = [] if code is None else [{"type": "Completed" if code == "0" else "Failed", "status": "True"}]
            print(json.dumps({"status": {"conditions": [{"type": "Suspended", "status": "False"}, *ended]}}))
        else:
            end(room, signal.SIGTERM)
            (room / "state").unlink()


def xpk(here: Path, verb: str, words: list[str]) -> None:
    option = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
    assert verb == "create"
    _jobset(here, option["--workload"], option["--command"])


def sky(here: Path, verb: str, words: list[str]) -> None:
    import yaml

    rooms = {path.parent: int(path.read_text()) for path in here.glob("*/job")}

    def status(room: Path) -> str:
        if (room / "state").read_text() == "RUNNING" and (room / "exit").exists():
            (room / "state").write_text("SUCCEEDED" if (room / "exit").read_text() == "0" else "FAILED")
        return (room / "state").read_text()

    if verb == "launch":
        task = yaml.safe_load(Path(words[-1]).read_text())
        room = start(here, task["name"], task["run"])
        (room / "state").write_text("RUNNING")
        (room / "job").write_text(str(1 + max(rooms.values(), default=0)))
    elif verb == "queue":
        if not rooms and "--refresh" not in words:
            sys.exit("sky.exceptions.ClusterNotUpError: No in-progress managed jobs.")
        print("\x1b[2mStarting a local server.\x1b[0m")
        print(json.dumps([{"job_id": n, "job_name": r.name, "status": status(r)} for r, n in rooms.items()], indent=2))
    elif verb == "cancel":
        room = here / words[-1]
        end(room, signal.SIGKILL)
        (room / "state").write_text("CANCELLED")
    elif verb == "logs":
        print((next(room for room, number in rooms.items() if str(number) == words[-1]) / "log").read_text(), end="")
