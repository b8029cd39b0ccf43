"""The device mesh ``("replica", "data", "ctx", "model")``.

Batches are split over replica and data, parameters over data and ctx, the frames of a video (in time layers its tokens)
over ctx, heads and feed-forward features over model. Only replica crosses slices.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dreamer4_jax.config import ConfigError

AXES = ("replica", "data", "ctx", "model")


@dataclass(frozen=True)
class MeshSpec:
    """Sizes of the mesh axes; one of them may be -1: whatever the others leave of the devices."""

    replica: int = 1
    data: int = -1
    ctx: int = 1
    model: int = 1

    @classmethod
    def parse(cls, text: str) -> "MeshSpec":
        """``"data=4,ctx=2"`` -> a spec; raises `ConfigError` for an unknown axis, a bad size or two sizes of -1."""
        sizes: dict[str, int] = {}
        for item in filter(None, text.split(",")):
            name, _, size = item.partition("=")
            if name not in AXES:
                raise ConfigError(f"--mesh {text}: unknown axis {name!r}; the axes are {', '.join(AXES)}")
            try:
                sizes[name] = int(size)
            except ValueError:
                raise ConfigError(f"--mesh {text}: {name}={size!r} is not a number") from None
            if sizes[name] < 1 and sizes[name] != -1:
                raise ConfigError(f"--mesh {text}: {name}={size} must be at least 1, or -1 for the rest")
        if -1 in sizes.values() and "data" not in sizes:
            sizes["data"] = 1
        spec = cls(**sizes)
        if spec.sizes.count(-1) > 1:
            raise ConfigError(f"--mesh {text}: only one axis can take the rest of the devices")
        return spec

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)


def common_divisor(batches: Iterable[int], devices: int) -> int:
    """The largest number of at most `devices` devices among which every one of `batches` can be divided."""
    rows = math.gcd(*batches)
    return next(n for n in range(min(devices, rows), 0, -1) if rows % n == 0)


def make_mesh(spec: MeshSpec | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all `devices` (of every process by default), neighbours in the machine's network side by side.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = list((spec or MeshSpec()).sizes)
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // fixed)
    if math.prod(sizes) != len(devices):
        wanted = ",".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(f"mesh {wanted}: is for {math.prod(sizes)} devices, but there are {len(devices)}")
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if devices[0].platform == "cpu":
        grid = np.array(devices).reshape(sizes)  # no network to consider
    elif slices > 1:
        if sizes[0] % slices:
            raise ConfigError(
                f"mesh replica={sizes[0]}: there are {slices} slices, and only replica crosses them: make it a multiple"
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
