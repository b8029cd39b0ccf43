"""Ahead-of-time compilation for TPUs that are not there: does a config fit, what do devices exchange, how fast is it?

The real TPU compiler runs on any CPU and knows every pod topology. `aot_compile` gives it the programs of a config and
reads its answer. Times are estimates, made like this:

* compute: the compiler's cycle estimates of all kernels, loops multiplied by their trips, over the chip's clock;
* communication: bytes over the links, by ring algorithms (`wire_seconds`), along one axis of the torus, or along all
  of them where a group is the whole slice; what runs beside other work costs only what exceeds it, the rest is added;
* roofline: the larger of model FLOPs over the peak rate and of the arguments' bytes, read once a pass, over the memory
  bandwidth: no program can be faster.

MFU is model FLOPs (products of the forward and backward pass, nothing recomputed) over the estimate at peak rate.
"""

import dataclasses
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dreamer4_jax.config import Config, ConfigError, override
from dreamer4_jax.parallel.accelerators import Accelerator, Chip, accelerator
from dreamer4_jax.parallel.hlo import Collective, Module, costs
from dreamer4_jax.parallel.mesh import AXES, MeshSpec, make_mesh

GIB = 2**30
# Stages of a program whose share of the cycles is reported, from the named scopes of the code.
SCOPES = ("student", "teacher", "denoise", "observe", "update", "space_attention", "time_attention", "mlp")
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",  # no cloud to ask what TPU this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no lock file: several compilations side by side
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any: it only silences warnings
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def prepare() -> None:
    """Settings that the TPU compiler needs on a machine without TPUs; call it before anything is computed."""
    import jax

    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")  # this machine's own; the TPU is only compiled for


def topology_devices(target: Accelerator, slices: int = 1) -> list[Any]:
    """The devices of a topology, to compile for and nothing else.

    Raises:
        ConfigError: the TPU compiler is not installed, or refuses the topology.
    """
    import importlib.util

    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("compiling for TPUs needs the TPU compiler: pip install 'dreamer4_jax[aot]'")
    prepare()
    extra: dict[str, Any] = {}
    if target.chips == 1:
        extra["chips_per_host_bounds"] = (1, 1, 1)
    if target.compiler == "v4":
        extra["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=target.aot, num_slices=slices, **extra)
    except Exception as error:
        raise ConfigError(f"topology {target.aot} x {slices} slices: the TPU compiler refuses it: {error}") from error
    return list(found.devices)


@dataclass(frozen=True)
class AotReport:
    """What the compiler makes of one program on one topology. Bytes and seconds are of one device and one call.

    Attributes:
      fits: whether the program fits into the device's memory; if not, `error` is what the compiler said.
      hbm: bytes by kind: parameters, optimiser, EMA, frozen models, cache, batch, activations (all that is computed
        and held for a while), program.
      peak: bytes in use at the fullest moment, as the compiler counts; what it sets aside, the sum of `hbm`, can be
        more.
      limit: bytes that it may use.
      model_flops: of all devices together.
      compute_s, exposed_s, hidden_s: kernels; communication that waits, and that which runs beside other work.
      roofline_s: below this no program can be.
      collectives: of one call.
      scopes: share of the cycles by stage.
    """

    program: str
    accelerator: str
    slices: int
    mesh: dict[str, int]
    rows: int
    frames: int
    fits: bool
    compile_s: float
    hbm: dict[str, int]
    peak: int
    limit: int
    model_flops: float
    compute_s: float = 0.0
    exposed_s: float = 0.0
    hidden_s: float = 0.0
    roofline_s: float = 0.0
    collectives: list[dict[str, Any]] = field(default_factory=list)
    scopes: dict[str, float] = field(default_factory=dict)
    variant: str = ""
    error: str = ""

    @property
    def devices(self) -> int:
        out = 1
        for size in self.mesh.values():
            out *= size
        return out

    @property
    def step_s(self) -> float:
        """Estimated seconds of one call."""
        return max(self.compute_s, self.hidden_s) + self.exposed_s

    @property
    def mfu(self) -> float:
        """Estimated model-FLOPs utilisation."""
        peak = accelerator(self.accelerator).chip.tflops * 1e12 * self.devices
        return self.model_flops / (self.step_s * peak) if self.step_s else 0.0

    @property
    def frames_per_s(self) -> float:
        """Estimated frames a second, of all devices together."""
        return self.frames / self.step_s if self.step_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON, the estimates included."""
        derived = {"step_s": self.step_s, "mfu": self.mfu, "frames_per_s": self.frames_per_s}
        return dataclasses.asdict(self) | derived


def wire_seconds(at: Collective, chip: Chip, axes: int = 1) -> float:
    """Seconds that a collective's bytes need on the links, by the ring algorithms of `axes` axes of the torus.

    With V the whole array, both directions at once: an all-gather or reduce-scatter moves ``V (n-1)/n``, an all-reduce
    twice that, an all-to-all a quarter (an element travels n/4 links of the ring, and only to one device); a
    permutation sends a device's own array over one link. Between slices each device sends its part over its share of
    the host's network.
    """
    if at.slices:
        return at.bytes / (chip.dcn_gbps * 1e9)
    n = max(at.size, 1)
    link = chip.ici_gbps * (1 if at.kind == "collective-permute" else axes)
    factor = {
        "all-gather": (n - 1) / n,
        "reduce-scatter": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        "all-to-all": (n - 1) / n / 4,
        "collective-permute": 2.0,
    }[at.kind]
    return at.bytes * factor / (link * 1e9)


def model_flops(config: Config, name: str, *, rows: int, frames: int, steps: int = 4) -> int:
    """Floating-point operations of the matrix products in one call: nothing is counted twice for rematerialisation.

    Attention counts with all its frames and tokens, masked ones included.
    """
    from dreamer4_jax.bench import matmul_flops
    from dreamer4_jax.parallel.programs import generated_frame, training_step

    stacks = ("tokenizer.encoder", "tokenizer.decoder", "dynamics.transformer")
    plain = override(config, {f"{stack}.remat": "none" for stack in stacks})
    if name == "generate":
        program = generated_frame(plain, rows=rows, steps=steps)
    else:
        program = training_step(plain, name, rows=rows, frames=frames)
    return matmul_flops(program.function, *program.arguments, trips=program.trips)


def scope_of(op_name: str) -> str:
    """The stages in a kernel's name, outermost first: "student/space_attention"."""
    return "/".join(part for part in re.split(r"[/()]", op_name) if part in SCOPES) or "other"


def aot_compile(
    config: Config,
    topology: str,
    *,
    slices: int = 1,
    mesh: MeshSpec | None = None,
    programs: Sequence[str] = (),
    rows: int | None = None,
    steps: int = 4,
    variant: str = "",
    keep_text: str | None = None,
) -> list[AotReport]:
    """Compiles programs of a config for a topology that need not be there.

    Args:
      topology: name of a TPU type, "v5p-128".
      programs: of "tokenizer", "dynamics", "agent", "imagination" (training steps at each length of their batches) and
        "generate"; all by default.
      rows: sequences of a batch, instead of the config's.
      steps: K of "generate".
      variant: a name for the config, put into the reports.
      keep_text: directory for the compiled programs' text.

    Raises:
        ConfigError: unknown topology or program, or a mesh or batch that does not divide.
    """
    from dreamer4_jax.parallel import programs as listed
    from dreamer4_jax.parallel.sharding import check_rows

    target = accelerator(topology)
    names = tuple(programs or listed.PROGRAMS)
    for name in names:
        if name not in listed.PROGRAMS:
            raise ConfigError(f"unknown program {name!r}: choose of {', '.join(listed.PROGRAMS)}")
    devices = topology_devices(target, slices)
    over = make_mesh(mesh, devices)
    out = []
    for name in names:
        here = over
        if name == "generate":  # one stream: nothing to divide
            here = make_mesh(MeshSpec(data=1), devices[:1])
        for program in listed.programs(config, (name,), mesh=here, rows=rows, steps=steps):
            check_rows(program.rows, here, f"rows of {program.name}")
            flops = model_flops(config, name, rows=program.rows, frames=program.frames // program.rows, steps=steps)
            out.append(_compile(program, target, slices, here, flops, variant, keep_text))
    return out


def _compile(program, target: Accelerator, slices: int, mesh, flops: int, variant: str, keep: str | None) -> AotReport:
    import jax

    began = time.perf_counter()
    fixed: dict[str, Any] = dict(
        program=program.name,
        accelerator=target.name,
        slices=slices,
        mesh={axis: mesh.shape[axis] for axis in AXES},
        rows=program.rows,
        frames=program.frames,
        limit=int(target.chip.hbm_gib * GIB),
        model_flops=float(flops),
        variant=variant,
    )
    by_kind = {kind: size for kind, size in program.bytes_by_kind().items() if size}
    with jax.set_mesh(mesh):
        lowered = program.function.lower(*program.arguments)
        try:
            compiled = lowered.compile()
        except Exception as error:  # XLA has one class for all its errors
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            seconds = time.perf_counter() - began
            text = " ".join(str(error).split())
            return AotReport(fits=False, compile_s=seconds, hbm=by_kind, peak=_needed(text), error=text[:400], **fixed)
    seconds = time.perf_counter() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if keep:
        from pathlib import Path

        path = Path(keep) / f"{target.name}-{program.name}-{variant}.hlo.txt".replace(" ", "_").replace("/", "_")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = costs(
        Module.parse(text),
        trips=program.trips,
        scope_of=scope_of,
    )
    dimensions = sum(n > 1 for n in map(int, target.topology.split("x")))
    wires = [
        (at, wire_seconds(at, target.chip, dimensions if at.size == mesh.size // slices > 1 else 1))
        for at in found.collectives.values()
    ]
    chip = target.chip
    return AotReport(
        fits=True,
        compile_s=seconds,
        hbm=by_kind | {"activations": memory.temp_size_in_bytes, "program": memory.generated_code_size_in_bytes},
        peak=memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes,
        compute_s=found.cycles / (chip.ghz * 1e9),
        exposed_s=sum(s for at, s in wires if not at.hidden),
        hidden_s=sum(s for at, s in wires if at.hidden),
        roofline_s=max(
            flops / mesh.size / (chip.tflops * 1e12), program.passes * sum(by_kind.values()) / (chip.hbm_gbps * 1e9)
        ),
        collectives=[dataclasses.asdict(at) | {"seconds": s} for at, s in sorted(wires, key=lambda w: -w[1])],
        scopes={k: v / found.cycles for k, v in sorted(found.scopes.items(), key=lambda kv: -kv[1])},
        **fixed,
    )


def _needed(text: str) -> int:
    """Bytes that the compiler says a program would need, 0 if it does not."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT])|\(([\d.]+)([KMGT])\) exceeds", text)
    if not found:
        return 0
    number, unit = (found.group(1) or found.group(3)), (found.group(2) or found.group(4))
    return int(float(number) * units[unit])
