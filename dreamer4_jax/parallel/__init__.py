"""Where a run computes: the device mesh, the one table that shards everything over it, and processes that join."""

from typing import Any

from dreamer4_jax.parallel.mesh import AXES, MeshSpec, common_divisor, make_mesh
from dreamer4_jax.parallel.processes import barrier, is_main, start
from dreamer4_jax.parallel.sharding import Rules, constrain

__all__ = [
    "AXES",
    "MeshSpec",
    "Rules",
    "aot_compile",
    "barrier",
    "common_divisor",
    "constrain",
    "is_main",
    "make_mesh",
    "start",
]


def __getattr__(name: str) -> Any:
    if name == "aot_compile":  # it compiles whole programs, whose modules import this package
        from dreamer4_jax.parallel.aot import aot_compile

        return aot_compile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
