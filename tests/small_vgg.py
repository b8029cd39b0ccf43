"""A VGG of a few channels as a perceptual distance; `perceptual.BLOCKS` must be set to `BLOCKS`."""

import numpy as np

from dreamer4_jax.world.perceptual import Distance

BLOCKS = ((3, 4), (5,), (6, 6), (4,), (7,))


def small_net(seed: int = 0, kind: str = "vgg") -> Distance:
    """Random weights, and positive heads."""
    rng, layers, before = np.random.default_rng(seed), {}, 3
    for block, channels in enumerate(BLOCKS):
        for i, after in enumerate(channels):
            kernel = rng.standard_normal((3, 3, before, after)) / np.sqrt(4.5 * before)
            bias = 0.1 * rng.standard_normal(after)
            layers[f"block{block + 1}.conv{i + 1}"] = kernel.astype(np.float32), bias.astype(np.float32)
            before = after
    heads = tuple(rng.uniform(0, 1, c[-1]).astype(np.float32) for c in BLOCKS)
    return Distance(layers, heads, kind)  # type: ignore[arg-type]
