"""Gymnasium adapters, scripted policies that record data, the symbol decoder, and the world model as an environment.

Importing this package registers "dreamer4_jax/WorldModel-v0" with gymnasium.
"""

from gymnasium.envs.registration import register, registry

WORLD_MODEL = "dreamer4_jax/WorldModel-v0"

if WORLD_MODEL not in registry:
    register(
        WORLD_MODEL,
        entry_point="dreamer4_jax.envs.world_model:WorldModelEnv",
        vector_entry_point="dreamer4_jax.envs.world_model:WorldModelVectorEnv",
    )
