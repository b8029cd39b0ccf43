"""Several processes that train as one: how they join, which of them writes files, and how they agree to stop.

The launcher tells a process its place in the environment (see `launch.local`); on a TPU pod the machines know it
themselves. All arrays of a run are global: each process holds the parts of its own devices.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dreamer4_jax.config import ConfigError, UserError
from dreamer4_jax.parallel.sharding import BATCH

COORDINATOR, PROCESS, PROCESSES = "DREAMER4_COORDINATOR", "DREAMER4_PROCESS_ID", "DREAMER4_PROCESSES"
JOIN_S = 300
POD_S = 1800  # the machines of a pod are set up at different speeds, and slower still after a pre-emption


def start(timeout_s: int = JOIN_S) -> None:
    """Makes the devices of this process and joins the others, if it has any; call it before anything computes.

    On a machine without an accelerator, one device for each core that this process may use: XLA keeps two cores about
    half busy with one small program, as many of its loops run on one. ``JAX_NUM_CPU_DEVICES`` in the environment takes
    precedence; other platforms ignore this.

    Raises:
        ConfigError: the environment describes no place among processes.
        UserError: not every process came within `timeout_s` seconds (`POD_S` on a TPU pod).
    """
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        with contextlib.suppress(RuntimeError):  # JAX has started already and keeps the devices it has
            jax.config.update("jax_num_cpu_devices", cores)
    choose_platform()
    if COORDINATOR not in os.environ:
        if _tpu_here() and "tpu" in os.environ.get("JAX_PLATFORMS", "tpu"):
            _join_pod(POD_S)
        return
    try:
        process, processes = int(os.environ[PROCESS]), int(os.environ[PROCESSES])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{COORDINATOR} is set, so {PROCESS} and {PROCESSES} must be numbers: {error}") from error
    address = os.environ[COORDINATOR]
    _muster(address, process, processes, timeout_s)
    jax.distributed.initialize(address, processes, process, initialization_timeout=timeout_s)
    _introduce()


def choose_platform() -> None:
    """CPU where there is nothing else, unless ``JAX_PLATFORMS`` says otherwise. `start` does it; so must every command
    that computes in one process."""
    if "JAX_PLATFORMS" not in os.environ and _cpu_alone():
        jax.config.update("jax_platforms", "cpu")


def _introduce() -> None:
    print(
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
        f"{jax.local_device_count()} of {jax.device_count()} {jax.devices()[0].device_kind} devices",
        file=sys.stderr,
    )


def _join_pod(timeout_s: int) -> None:
    """The hosts of a TPU slice know each other; a single one need not.

    JAX ends the process when the others do not come in time, naming the tasks that are missing.
    """
    if "," not in os.environ.get("TPU_WORKER_HOSTNAMES", ",") and "MEGASCALE_NUM_SLICES" not in os.environ:
        return  # a cluster that says so: one host
    print(f"joining the other hosts of the TPU, for at most {timeout_s} s", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(initialization_timeout=timeout_s)
    except ValueError as error:  # nothing around tells of other hosts
        print(f"no other hosts are known ({error}): this one is alone", file=sys.stderr)
        return
    _introduce()


def _cpu_alone() -> bool:
    """Whether the TPU compiler is installed but no TPU is here: JAX would ask the cloud for one, and complain."""
    gpus = any(find_spec(f"jax_{gpu}_plugin") for gpu in ("cuda12", "cuda13", "rocm7"))
    return find_spec("libtpu") is not None and not gpus and not _tpu_here()


def _tpu_here() -> bool:
    """Whether this machine has a TPU and the library for it."""
    devices = (*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*"))
    return find_spec("libtpu") is not None and bool(devices)


def _muster(address: str, process: int, processes: int, timeout_s: int) -> None:
    """Waits until all processes are there. JAX itself would end the whole process, without a word of which is missing.

    Process 0 listens where JAX's own service is to listen; the others come, give their number and wait for the word.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    missing = set(range(processes)) - {0}
    late = f"process {process} of {processes}: after {timeout_s} s"
    hint = f"Is every process running, with the same {COORDINATOR} = {address}, and is the port open?"
    if process == 0:
        with contextlib.ExitStack() as stack:
            # On all interfaces, as JAX: the address may be the machine's name for the others.
            server = stack.enter_context(socket.create_server(("", int(port))))
            came = []
            while missing:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    peer, _ = server.accept()
                    came.append(stack.enter_context(peer))
                    peer.settimeout(10)
                    said = peer.recv(16)
                    missing -= {int(said)} if said.isdigit() else set()  # whoever else knocks is not counted
                except TimeoutError:
                    raise UserError(f"{late} these had not come: {sorted(missing)}. {hint}") from None
            for peer in came:
                peer.sendall(b"go")
            for peer in came:
                peer.recv(1)  # the other side closes first, so that the port is free at once
        return
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, int(port)), timeout=max(deadline - time.monotonic(), 0.001)) as peer:
                peer.sendall(str(process).encode())
                if peer.recv(2) == b"go":
                    return
        except OSError:
            time.sleep(0.1)  # process 0 is not up yet
    raise UserError(f"{late} process 0 had not called all processes together. {hint}")


def is_main() -> bool:
    """Whether this is the process that writes logs, reports and whatever else is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """The main process goes through the block before the others do, who then find what it has made."""
    if not is_main():
        barrier(name)
    try:
        yield
    finally:
        if is_main():
            barrier(name)


def part(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which block of a batch's rows this process needs, of how many.

    Raises:
        ConfigError: the rows that its devices hold are no block, so that nobody could read them in one piece.
    """
    rows = mesh.devices.reshape(int(np.prod([mesh.shape[axis] for axis in BATCH])), -1)
    mine = [i for i, row in enumerate(rows) if any(d.process_index == jax.process_index() for d in row)]
    size = len(mine)
    if not mine or mine != list(range(mine[0], mine[0] + size)) or mine[0] % size or len(rows) % size:
        raise ConfigError(
            f"mesh {dict(mesh.shape)}: process {jax.process_index()} would need the parts {mine} of {len(rows)} of a "
            "batch; choose sizes of data and replica that are a multiple or a divisor of the number of processes"
        )
    return mine[0] // size, len(rows) // size


def place(batch: Any, shardings: Any) -> Any:
    """Global arrays of a batch of which every process has read its own rows."""
    if jax.process_count() == 1:
        return jax.device_put(batch, shardings)
    return jax.tree.map(lambda x, s: jax.make_array_from_process_local_data(s, np.asarray(x)), batch, shardings)


def spread(tree: Any, shardings: Any) -> Any:
    """Global arrays of what every process holds whole."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(x: Any, sharding: NamedSharding) -> Any:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.jit(jax.random.wrap_key_data)(one(jax.random.key_data(x), sharding))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)


def whole(tree: Any, mesh: Mesh) -> Any:
    """The arrays of `tree`, wherever their parts are, as a whole on this process's first device.

    Every process must call it with its parts, or every one with the whole on a device of its own, as a finished phase
    is loaded.
    """
    here = jax.local_devices()[0]
    if all(x.is_fully_addressable and len(x.devices()) == 1 for x in jax.tree.leaves(tree)):
        return jax.device_put(tree, here)
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)
    copied = jax.jit(lambda t: t, out_shardings=everywhere)(tree)
    return jax.tree.map(lambda x: jax.device_put(x.addressable_data(0), here), copied)


class Agreement:
    """Whether any process wishes something, known to all of them at the same step. Every process must ask as often."""

    def __init__(self, mesh: Mesh):
        flat = Mesh(mesh.devices.reshape(-1), ("all",))
        self._parts = NamedSharding(flat, PartitionSpec("all"))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(flat, PartitionSpec()))
        self._asked: Any = False

    def soon(self, wish: bool) -> bool:
        """The answer to the last question; this one goes to the devices behind the update of its step, and nobody waits
        for it. A process that is alone gets its own answer at once."""
        answer, self._asked = self._asked, self._ask(wish)
        return wish if jax.process_count() == 1 else bool(answer)

    def now(self, wish: bool) -> bool:
        """The answer, waited for."""
        return bool(self._ask(wish))

    def _ask(self, wish: bool) -> Any:
        if jax.process_count() == 1:
            return wish
        mine = np.full(jax.local_device_count(), wish, np.int32)
        return self._any(jax.make_array_from_process_local_data(self._parts, mine))
