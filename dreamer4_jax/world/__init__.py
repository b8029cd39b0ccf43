"""The world model: tokenizer, dynamics, shortcut forcing, samplers and the transition oracle."""

from dreamer4_jax.world import shortcut
from dreamer4_jax.world.dynamics import Actions, Dynamics, DynamicsOutput
from dreamer4_jax.world.oracle import TransitionOracle
from dreamer4_jax.world.shortcut import generate
from dreamer4_jax.world.tokenizer import Tokenizer

__all__ = ["Actions", "Dynamics", "DynamicsOutput", "Tokenizer", "TransitionOracle", "generate", "shortcut"]
