"""Real processes that train as one: joined over the loopback, stopped, killed, resumed on another number of them."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from dreamer4_jax.config import ConfigError
from dreamer4_jax.parallel import processes
from dreamer4_jax.training import Checkpointer, abstract_state, steps_path
from dreamer4_jax.training.optim import make_optimizer
from launch import local
from launch.spec import RunSpec
from tests.training_phases import TINY, Regression

ROOT = Path(__file__).parents[1]
several = pytest.mark.multiprocess


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def begin(command: list[str], count: int, devices: int = 1) -> list[subprocess.Popen]:
    """`count` processes of a command, each with `devices` devices and told its place."""
    place = {"DREAMER4_COORDINATOR": f"127.0.0.1:{free_port()}", "DREAMER4_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ
            | {"JAX_NUM_CPU_DEVICES": str(devices)}
            | (place | {"DREAMER4_PROCESS_ID": str(i)} if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def training(run: Path, steps: int = 12, sleep: float = 0.0, rows: int = 2) -> list[str]:
    options = f"--steps {steps} --sleep {sleep} --rows {rows}"
    return [sys.executable, "-m", "tests.training_phases", str(run), *options.split()]


def end(children: list[subprocess.Popen], code: int = 0) -> list[str]:
    """Waits for all, which must end with `code`; returns what they printed."""
    printed = [child.communicate(timeout=120) for child in children]
    for child, (_, err) in zip(children, printed, strict=True):
        assert child.returncode == code, err[-3000:]
    return [out + err for out, err in printed]


def last_state(run: Path) -> tuple[int, list[np.ndarray]]:
    """(step, arrays) of the newest checkpoint."""
    phase = Regression(TINY)
    abstract = abstract_state(phase, make_optimizer(TINY))
    with Checkpointer(steps_path(run, "dynamics"), read_only=True) as checkpoints:
        state, meta = checkpoints.restore(abstract)
    return meta["step"], [np.asarray(x) for x in jax.tree.leaves(state)]


def require_equal(a: Path, b: Path, rounding: float = 0.0) -> None:
    """The newest checkpoints are equal: bit for bit, or but for `rounding`, in units of each array's largest value."""
    (step_a, arrays_a), (step_b, arrays_b) = last_state(a), last_state(b)
    assert step_a == step_b
    for x, y in zip(arrays_a, arrays_b, strict=True):
        if rounding and np.issubdtype(x.dtype, np.floating):
            np.testing.assert_allclose(x, y, rtol=0, atol=rounding * np.abs(y).max())
        else:
            np.testing.assert_array_equal(x, y)


@several
def test_two_processes_train_bit_for_bit_as_one_with_two_devices(tmp_path):
    printed = end(begin(training(tmp_path / "two"), 2))
    for i, text in enumerate(printed):
        assert re.search(rf"process {i} of 2 on \S+: 1 of 2 cpu devices", text)
    end(begin(training(tmp_path / "one"), 1, devices=2))
    require_equal(tmp_path / "two", tmp_path / "one")
    lines = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("two", "one")]
    assert lines[0] == lines[1]  # written once


# Four processes add their gradients in another order than four devices of one, or of two: one step differs by rounding.
ROUNDING = 2e-6


@several
@pytest.mark.parametrize("hosts", [1, 2])
def test_four_processes_take_the_step_of_fewer_with_as_many_devices(tmp_path, hosts):
    end(begin(training(tmp_path / "four", steps=1, rows=4), 4))
    end(begin(training(tmp_path / "fewer", steps=1, rows=4), hosts, devices=4 // hosts))
    require_equal(tmp_path / "four", tmp_path / "fewer", ROUNDING)


def interrupt(run: Path, count: int, told: int) -> int:
    """Trains in `count` processes until one is told to stop, and all have; returns their step."""
    children = begin(training(run, sleep=0.2, rows=count), count)
    log, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 3:
        assert all(child.poll() is None for child in children) and time.monotonic() < deadline
        time.sleep(0.01)
    children[told].send_signal(signal.SIGTERM)
    printed = end(children, code=42)
    step, _ = last_state(run)
    assert 3 <= step < 12
    assert all(f"interrupted after step {step}" in text for text in printed)
    return step


@several
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_any_process_stops_all_at_one_step_and_one_process_resumes(tmp_path, told):
    interrupt(tmp_path / "stopped", 2, told)
    end(begin(training(tmp_path / "stopped"), 1, devices=2))
    end(begin(training(tmp_path / "whole"), 1, devices=2))
    require_equal(tmp_path / "stopped", tmp_path / "whole")


@several
def test_four_processes_go_on_where_sigterm_stopped_them(tmp_path):
    interrupt(tmp_path / "stopped", 4, told=2)
    end(begin(training(tmp_path / "stopped", rows=4), 4))
    end(begin(training(tmp_path / "whole", rows=4), 4))
    require_equal(tmp_path / "stopped", tmp_path / "whole")


@several
def test_two_processes_go_on_from_what_four_have_saved(tmp_path):
    step = interrupt(tmp_path / "four", 4, told=3)
    shutil.copytree(tmp_path / "four", tmp_path / "two")
    end(begin(training(tmp_path / "four", steps=step + 1, rows=4), 4))
    end(begin(training(tmp_path / "two", steps=step + 1, rows=4), 2, devices=2))
    require_equal(tmp_path / "two", tmp_path / "four", ROUNDING)


@several
@pytest.mark.parametrize("seed", range(3))
def test_the_launcher_survives_kill_9_of_any_process_at_any_time(tmp_path, monkeypatch, seed):
    """The other process waits for the dead one in vain and is ended; both start again from the last checkpoint."""
    rng = random.Random(seed)
    monkeypatch.setattr(local, "GRACE_S", 1.0)
    monkeypatch.setattr(local, "KILL_S", 1.0)
    command = [*training(tmp_path / "killed", sleep=0.1), "--save-every", "2"]
    monkeypatch.setattr(RunSpec, "command", lambda spec: command)
    spec = RunSpec("killed", output=str(tmp_path), processes=2, retries=3)
    log, killed = tmp_path / "killed" / "metrics.jsonl", []

    def kill():
        for _ in range(2):
            at = (log.read_text().count("\n") if log.exists() else 0) + rng.randint(1, 3)
            while not log.exists() or log.read_text().count("\n") < at:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
            victim = rng.choice(local_children())
            victim.kill()
            killed.append(victim.pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    assert local.run(spec, log_to_terminal=False) == 0
    assert len(killed) == 2
    end(begin(training(tmp_path / "whole"), 1, devices=2))
    require_equal(tmp_path / "killed", tmp_path / "whole")


def local_children() -> list[subprocess.Popen]:
    """The processes of the launcher that runs in this one."""
    return [child for child in STARTED if child.poll() is None]


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def note_what_is_started(monkeypatch):
    class Noted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            STARTED.append(self)

    STARTED.clear()
    monkeypatch.setattr(local.subprocess, "Popen", Noted)


WHOLE = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from dreamer4_jax.parallel import make_mesh, processes, start
start()
mesh = make_mesh()
loaded = {"w": jax.device_put(np.arange(4.0), jax.local_devices()[-1])}  # as a finished phase is read again
spread = processes.spread(loaded, {"w": NamedSharding(mesh, PartitionSpec("data"))})
for tree in (loaded, spread):
    whole = processes.whole(tree, mesh)["w"]
    assert whole.devices() == {jax.local_devices()[0]} and np.array_equal(whole, np.arange(4.0))
"""


def test_a_model_is_whole_again_wherever_it_was():
    """Also that of a phase which an earlier run has finished: it lies on one device, whatever the mesh."""
    end(begin([sys.executable, "-c", WHOLE], 1, devices=2))


@several
def test_a_model_is_whole_again_in_every_process():
    end(begin([sys.executable, "-c", WHOLE], 2))


@several
def test_a_missing_process_ends_in_a_message(tmp_path):
    code = """
from dreamer4_jax.config import UserError
from dreamer4_jax.parallel import start
try:
    start(timeout_s=5)
except UserError as error:
    print(error)
    raise SystemExit(2)
"""
    children = begin([sys.executable, "-c", code], 2)
    children[1].kill()
    children[1].communicate()
    out, err = children[0].communicate(timeout=120)
    assert children[0].returncode == 2, err[-2000:]
    assert "process 0 of 2: after 5 s these had not come: [1]" in out


def test_a_place_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("DREAMER4_COORDINATOR", "127.0.0.1:1")
    monkeypatch.delenv("DREAMER4_PROCESS_ID", raising=False)
    with pytest.raises(ConfigError, match="DREAMER4_PROCESS_ID and DREAMER4_PROCESSES must be numbers"):
        processes.start()


@pytest.mark.parametrize(
    "packages, tpu, alone",
    [
        ({"libtpu"}, False, True),  # the compiler alone
        ({"libtpu"}, True, False),
        ({"libtpu", "jax_cuda13_plugin"}, False, False),
        (set(), False, False),
    ],
)
def test_a_machine_with_the_tpu_compiler_but_no_tpu_computes_on_its_cpu(monkeypatch, packages, tpu, alone):
    monkeypatch.setattr(processes, "find_spec", lambda name: name if name in packages else None)
    monkeypatch.setattr(processes, "_tpu_here", lambda: tpu)
    assert processes._cpu_alone() == alone


@pytest.fixture
def joined(monkeypatch):
    """A machine with a TPU, as far as `start` can see; what it tells `jax.distributed.initialize`."""
    calls = []
    monkeypatch.delenv("DREAMER4_COORDINATOR", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(processes, "_tpu_here", lambda: True)
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **words: calls.append(words))
    return calls


@pytest.mark.parametrize(
    "environment, joins",
    [
        ({}, True),  # a TPU VM: it asks the cloud
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_the_hosts_of_a_tpu_join_by_themselves(monkeypatch, capsys, joined, environment, joins):
    for name in ("TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.start()
    assert joined == ([{"initialization_timeout": processes.POD_S}] if joins else [])
    assert ("process 0 of 1 on" in capsys.readouterr().err) == joins


def test_a_tpu_without_other_hosts_is_alone(monkeypatch, capsys, joined):
    def alone(**_):
        raise ValueError("coordinator_address should be defined")

    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    monkeypatch.setattr(processes.jax.distributed, "initialize", alone)
    processes.start()
    assert "this one is alone" in capsys.readouterr().err


class Device:
    def __init__(self, process_index: int):
        self.process_index = process_index


class FakeMesh:
    """What `part` reads of a mesh, with devices of other processes."""

    def __init__(self, owners, **sizes):
        self.shape = dict(replica=1, data=1, ctx=1, model=1) | sizes
        self.devices = np.array([Device(i) for i in owners]).reshape(tuple(self.shape.values()))


@pytest.mark.parametrize(
    "owners, sizes, expected",
    [
        ([0, 0, 1, 1], dict(data=4), (0, 2)),
        ([1, 1, 0, 0], dict(data=4), (1, 2)),
        ([0, 1], dict(ctx=2), (0, 1)),  # both need all rows
        ([1, 1, 0, 0, 2, 2, 3, 3], dict(replica=2, data=2, ctx=2), (1, 4)),
        ([1, 2, 0, 3], dict(data=2, ctx=2), (1, 2)),
    ],
)
def test_the_rows_that_a_process_needs(owners, sizes, expected):
    assert processes.part(FakeMesh(owners, **sizes)) == expected


def test_rows_that_are_no_block_are_refused():
    with pytest.raises(ConfigError, match=r"would need the parts \[0, 2\] of 4"):
        processes.part(FakeMesh([0, 1, 0, 1], data=4))
