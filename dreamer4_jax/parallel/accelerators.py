"""The TPU types: what each is called by gcloud, by GKE and by the TPU compiler, and how many chips and hosts it has.

The number in a name counts chips for v5e and v6e, but TensorCores, two on a chip, for v4, v5p and tpu7x.
"""

import difflib
import math
from dataclasses import dataclass

from dreamer4_jax.config import ConfigError


@dataclass(frozen=True)
class Chip:
    """Speeds and sizes of one JAX device (a chip; of tpu7x half of one), from Google's public specifications.

    Attributes:
      tflops: peak of bfloat16 products, in 10^12 operations a second.
      hbm_gib: memory that the compiler lets a program use; less than what is sold.
      hbm_gbps: its bandwidth in 10^9 bytes a second.
      ici_gbps: to both neighbours along one axis of the torus together, 10^9 bytes a second each way.
      dcn_gbps: share of the host's data-centre network.
      ghz: clock; the compiler counts cycles of it. ``tflops / (operations a cycle)``.
    """

    tflops: float
    hbm_gib: float
    hbm_gbps: float
    ici_gbps: float
    dcn_gbps: float
    ghz: float


CHIPS = {
    "v4": Chip(275, 30.75, 1228, 90, 6.25, 1.05),
    "v5e": Chip(197, 15.75, 819, 90, 3.1, 1.5),
    "v5p": Chip(459, 95.74, 2765, 180, 6.25, 1.75),
    "v6e": Chip(918, 31.25, 1638, 180, 12.5, 1.75),
    "tpu7x": Chip(1153.5, 94.75, 3690, 100, 6.25, 2.2),
}


@dataclass(frozen=True)
class Accelerator:
    """One slice of one TPU type.

    Attributes:
      name: as gcloud writes it, "v5litepod-16".
      topology: of its chips, "4x4".
      runtime: of TPU VMs, gcloud's --runtime-version; empty: offered on GKE alone.
      gke: value of GKE's node selector ``cloud.google.com/gke-tpu-accelerator``.
      compiler: prefix of its name for the TPU compiler.
      devices_per_chip: JAX devices. v4 and v5p join the two cores of a chip into one device, tpu7x does not.
    """

    name: str
    topology: str
    runtime: str
    gke: str
    compiler: str
    devices_per_chip: int = 1

    @property
    def chips(self) -> int:
        return math.prod(int(n) for n in self.topology.split("x"))

    @property
    def chips_per_host(self) -> int:
        return min(4, self.chips)

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def devices(self) -> int:
        """JAX devices of one slice."""
        return self.chips * self.devices_per_chip

    @property
    def aot(self) -> str:
        """The topology's name for ahead-of-time compilation, ``"v5e:4x4"``."""
        return f"{self.compiler}:{self.topology}"

    @property
    def chip(self) -> Chip:
        """What one JAX device can do."""
        return CHIPS[self.compiler]


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    **{8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"},
    **{512: "4x8x8", 1024: "8x8x8", 2048: "8x8x16", 4096: "8x16x16"},
}
# gcloud's prefix, topologies by the number in the name, runtime version, GKE's accelerator, compiler's name, devices
_GENERATIONS = (
    ("v4", _CUBES, "tpu-ubuntu2204-base", "tpu-v4-podslice", "v4", 1),
    ("v5litepod", _FLAT, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "v5e", 1),
    ("v5p", _CUBES, "v2-alpha-tpuv5", "tpu-v5p-slice", "v5p", 1),
    ("v6e", _FLAT, "v2-alpha-tpuv6e", "tpu-v6e-slice", "v6e", 1),
    ("tpu7x", _CUBES, "", "tpu7x", "tpu7x", 2),
)

ACCELERATORS = {
    f"{prefix}-{number}": Accelerator(f"{prefix}-{number}", topology, runtime, gke, compiler, devices)
    for prefix, topologies, runtime, gke, compiler, devices in _GENERATIONS
    for number, topology in topologies.items()
}


def accelerator(name: str) -> Accelerator:
    """The accelerator of this name; v5e may be written ``v5e-16`` or, as gcloud does, ``v5litepod-16``.

    Raises:
        ConfigError: there is none; the message names close matches.
    """
    found = ACCELERATORS.get(name.replace("v5e-", "v5litepod-"))
    if found is None:
        prefix = name.partition("-")[0].replace("v5e", "v5litepod")
        close = difflib.get_close_matches(name, ACCELERATORS, n=3)
        # A known generation with a number that it doesn't have: its own numbers say more than similar spellings.
        close = (
            [known for known in ACCELERATORS if known.startswith(f"{prefix}-")] or close or ["v5litepod-16", "v6e-16"]
        )
        raise ConfigError(f"unknown accelerator {name!r}: choose for example {', '.join(close)}")
    return found
