"""The efficient transformer. Knows nothing of videos, actions or rewards."""

from dreamer4_jax.nn.attention import Mask, attention
from dreamer4_jax.nn.cache import Cache
from dreamer4_jax.nn.transformer import Transformer

__all__ = ["Cache", "Mask", "Transformer", "attention"]
