"""The ring: what it holds after writes, wraps, resets and episode borders."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.nn import cache as ring
from tests.small import transformer_config

W, N = 4, 2
CFG = transformer_config(layers=8, kv_heads=1, head_dim=4, window=W)
write = jax.jit(ring.write)


def frames(first, count, batch=2):
    """Keys and values that say which stream, token and frame they are of."""
    index = np.asarray(first)[:, None] + np.arange(count)
    code = 1000 * np.arange(batch)[:, None, None] + 100 * np.arange(N)[None, :, None] + index[:, None]
    k = np.broadcast_to(code[None, ..., None, :, None], (2, batch, N, 1, count, 4)).astype(np.float32)
    return jnp.asarray(k), jnp.asarray(-k)


def check(cache, visible):
    """Each stream's visible slots hold exactly the frames `visible[stream]`, keys and values where `pos` says."""
    for b, expected in enumerate(visible):
        held = [int(p) for p in cache.pos[b] if p >= 0]
        assert sorted(held) == list(expected)
        for slot, p in enumerate(np.asarray(cache.pos[b])):
            if p >= 0:
                code = 1000 * b + 100 * np.arange(N) + p
                assert np.array_equal(cache.k[:, b, :, 0, slot, 0], np.stack([code] * 2))
                assert np.array_equal(cache.v[:, b, :, 0, slot, 0], -np.stack([code] * 2))


def test_empty():
    cache = ring.empty(CFG, 2, N)
    assert cache.k.shape == cache.v.shape == (2, 2, N, 1, W, 4)
    check(cache, [[], []])
    assert np.array_equal(cache.next, [0, 0])


@pytest.mark.parametrize("chunk", [1, 3, 4, 7])
def test_writes_keep_the_last_frames(chunk):
    cache = ring.empty(CFG, 2, N)
    for i in range(9):
        cache = write(cache, *frames([i * chunk] * 2, chunk))
        end = (i + 1) * chunk
        check(cache, [range(max(0, end - W), end)] * 2)
        assert np.array_equal(cache.next, [end, end])


def test_streams_of_different_age_and_reset():
    cache = ring.empty(CFG, 2, N)
    for i in range(6):
        cache = write(cache, *frames([i, i], 1))
    before = cache
    cache = ring.reset(cache, jnp.array([True, False]))
    check(cache, [[], range(2, 6)])
    assert np.array_equal(cache.next, [0, 6])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(cache), strict=True):
        axis = 0 if old.ndim < 3 else 1
        assert np.array_equal(jnp.take(old, 1, axis), jnp.take(new, 1, axis))
    for i in range(3):
        cache = write(cache, *frames([i, 6 + i], 1))
    check(cache, [range(3), range(5, 9)])


@pytest.mark.parametrize("count", [3, 6])
def test_segments_hide_finished_episodes(count):
    cache = write(ring.empty(CFG, 2, N), *frames([0, 0], 2))
    # Stream 0 goes on in its episode; in stream 1 a new one starts with the last frame.
    segments = jnp.asarray([[3] * count, [3] * (count - 1) + [4]])
    cache = write(cache, *frames([2, 2], count), segments)
    end = 2 + count
    check(cache, [range(max(0, end - W), end), [end - 1]])
    # What follows belongs to the last frame's episode.
    check(write(cache, *frames([end, end], 1)), [range(max(0, end + 1 - W), end + 1), [end - 1, end]])


def test_bytes_do_not_depend_on_the_history():
    step = jax.jit(partial(ring.write))
    cache = ring.empty(CFG, 2, N)
    size = sum(x.nbytes for x in jax.tree.leaves(cache))
    for i in range(3 * W):
        cache = step(cache, *frames([i, i], 1))
        assert sum(x.nbytes for x in jax.tree.leaves(cache)) == size
    assert step._cache_size() == 1


def test_dtype_is_the_models():
    cache = ring.empty(transformer_config(dtype="bfloat16"), 1, N)
    assert cache.k.dtype == jnp.bfloat16 and cache.pos.dtype == cache.next.dtype == jnp.int32
    cache = ring.write(cache, jnp.ones((1, 1, N, 2, 1, 8)), jnp.ones((1, 1, N, 2, 1, 8)))
    assert cache.k.dtype == jnp.bfloat16
