"""Where a run computes: the device mesh, and the one table that shards everything over it."""

from dreamer4_jax.parallel.mesh import AXES, MeshSpec, common_divisor, make_mesh, start
from dreamer4_jax.parallel.sharding import Rules, constrain

__all__ = ["AXES", "MeshSpec", "Rules", "common_divisor", "constrain", "make_mesh", "start"]
