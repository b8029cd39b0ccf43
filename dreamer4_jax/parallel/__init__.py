"""Where a run computes: the device mesh, the one table that shards everything over it, and processes that join."""

from dreamer4_jax.parallel.mesh import AXES, MeshSpec, common_divisor, make_mesh
from dreamer4_jax.parallel.processes import barrier, is_main, start
from dreamer4_jax.parallel.sharding import Rules, constrain

__all__ = ["AXES", "MeshSpec", "Rules", "barrier", "common_divisor", "constrain", "is_main", "make_mesh", "start"]
