"""Dreamer 4 (arXiv 2509.24527) in JAX/Flax: a world model trained from video, and an agent trained inside it.

Dimension table. Every signature and einsum in this package uses these letters.

====== =============================================================================
letter meaning
====== =============================================================================
B      batch: sequences, streams or environments
T      frames of a sequence (time)
N      tokens of a frame
P      patches of an image
D      model width
H      query heads
G      key/value heads (grouped-query attention); H is a multiple of G
K      head dimension
F      feed-forward width
C      channels of a latent (packed) token
L      rows of an attention (queries);  S  its columns (keys)
W      frames kept by the ring cache (the window)
M      multi-token prediction offsets, n = 0 .. M-1
A      size of an action component
====== =============================================================================

Signal level ``tau`` runs from 0 (pure noise) to 1 (clean data); ``d`` is the step size of the sampler, ``d = 1/K``.

Alignment, everywhere: index ``t`` of a sequence holds frame ``t``, the action that *led to* frame ``t`` and the
reward received *with* frame ``t``. The first frame of an episode has no action (``present`` is False) and reward 0.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_policy"]


def __getattr__(name: str) -> Any:
    """Imported when first asked for: the package itself imports no JAX."""
    if name in __all__:
        from dreamer4_jax import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
