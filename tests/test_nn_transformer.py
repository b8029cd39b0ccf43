"""The transformer: against a float64 reference, who sees whom, cached = uncached, scan and rematerialisation."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.nn import Mask, Transformer, layers
from dreamer4_jax.nn import cache as ring
from dreamer4_jax.nn.layers import Rotation
from dreamer4_jax.nn.transformer import _centres, _joint_centres, first_of_segment
from tests import reference
from tests.small import dependencies, drawn, transformer_config

N = 3
PLACES = np.array([[0, 0], [0, 1], [1, 0.5]], np.float32)
TYPES = Mask(types=(0, 0, 1), rules=((True, False), (True, True)))
CFG = transformer_config()
DEEP = transformer_config(time_every=2)  # two periods of space and time: half the compilation of eight layers

run = partial(Transformer.__call__, coordinates=PLACES, space_mask=TYPES)


def model(cfg, seed=0):
    return drawn(lambda key: Transformer(key, cfg), seed)


def with_config(net, **fields):
    """The same parameters under another config."""
    other = jax.eval_shape(partial(Transformer, cfg=replace(net.cfg, **fields)), jax.random.key(0))
    return jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(net))


def inputs(batch=2, frames=5, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, frames, N, 32)), jnp.float32)


@pytest.fixture(scope="module")
def deep():
    return model(DEEP)


@jax.jit
def forward(net, x, segments=None):
    return run(net, x, segments=segments)[0]


@jax.jit
def step(net, x, cache, segments=None):
    y, kv = run(net, x, cache=cache, segments=segments)
    return y, ring.write(cache, *kv, segments=segments)


# ---------------------------------------------------------------------------------------------------------------------
# The equations


def projections(attention, cfg):
    """Matrices of queries [D, H, K], keys and values [D, G, K], from the one that holds them by group."""
    w = np.asarray(attention.qkv[...], np.float64).reshape(cfg.width, cfg.kv_heads, -1, cfg.head_dim)
    return w[:, :, :-2].reshape(cfg.width, cfg.heads, cfg.head_dim), w[:, :, -2], w[:, :, -1]


def reference_forward(net, x, segments):
    """The whole stack in float64, written from paper 3.4 and `tests.reference`."""
    cfg = net.cfg
    x = np.asarray(x, np.float64)
    frames = x.shape[1]
    space = np.array([[TYPES.rules[a][b] for b in TYPES.types] for a in TYPES.types])
    now, then = np.arange(frames)[:, None], np.arange(frames)[None]
    time = (then <= now) & (then > now - cfg.window) & (segments[..., :, None] == segments[..., None, :])

    def layer(x, p, over_time):
        a = p.attention
        y = reference.rms_norm(x, p.norm1.scale[...])
        q, k, v = (np.einsum("btnd,dhk->btnhk", y, w) for w in projections(a, cfg))
        q, k = reference.rms_norm(q, a.q_scale[...]), reference.rms_norm(k, a.k_scale[...])
        if over_time:
            q, k, v = (np.swapaxes(z, 1, 2) for z in (q, k, v))
            turn = partial(reference.rope_1d, positions=np.arange(frames), base=cfg.rope_base_time)
        else:
            turn = partial(reference.rope_2d, rows=PLACES[:, 0], columns=PLACES[:, 1], base=cfg.rope_base_space)
        q, k = (np.swapaxes(turn(np.swapaxes(z, -2, -3)), -2, -3) for z in (q, k))
        bias = 0.0
        if a.q_bias is not None:  # [H, L, K] and [1, L, K] -> [H, L, L]
            tokens = q.shape[-3]
            b_q = turn(np.repeat(np.asarray(a.q_bias[...], np.float64)[:, None], tokens, 1))
            b_k = turn(np.repeat(np.asarray(a.k_bias[...], np.float64)[None, None], tokens, 1))
            bias = b_q @ np.swapaxes(b_k, -1, -2) / np.sqrt(cfg.head_dim)
        y = reference.attention(q, k, v, time[:, None] if over_time else space, cfg.softcap, bias)
        y = np.swapaxes(y, 1, 2) if over_time else y
        out = np.asarray(a.o[...], np.float64).reshape(cfg.heads, cfg.head_dim, cfg.width)
        x = x + np.einsum("btnhk,hkd->btnd", y, out)
        y = reference.rms_norm(x, p.norm2.scale[...])
        return x + reference.swiglu(y, p.mlp.gate[...], p.mlp.up[...], p.mlp.down[...])

    for i in range(cfg.layers // cfg.time_every):
        period = jax.tree.map(lambda leaf, i=i: leaf[i], net.periods)
        assert len(period.space) == 3
        for p in period.space:
            x = layer(x, p, over_time=False)
        x = layer(x, period.time, over_time=True)
    return reference.rms_norm(x, net.norm.scale[...])


@pytest.mark.parametrize("local", [0.0, 1.5])
def test_against_the_reference(local):
    net, x = model(transformer_config(layers=8, local_space=local, local_time=local)), inputs()
    segments = np.array([[0, 0, 0, 0, 0], [1, 1, 2, 2, 2]])
    expected = reference_forward(net, x, segments)
    np.testing.assert_allclose(forward(net, x, jnp.asarray(segments)), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("shift", [0, 1])
def test_local_attention_starts_where_its_heads_are_centred(shift):
    """With content muted the weights of a token peak at its right, left, lower and upper neighbour, head by head."""
    cfg = transformer_config(layers=1, time_every=1, local_space=4.0, local_time=4.0, local_shift=shift, softcap=0.0)
    net = jax.jit(partial(Transformer, cfg=cfg))(jax.random.key(0))
    around, before = _centres(cfg)
    grid = np.stack(np.meshgrid(np.arange(5), np.arange(5), indexing="ij"), -1).reshape(-1, 2)
    middle, ones = np.array([2, 2]), np.ones(cfg.head_dim)
    for h, (row, column) in enumerate([(0, 1), (0, -1), (1, 0), (-1, 0)]):
        q = np.broadcast_to(around[h], (1, 25, cfg.head_dim))
        k = np.broadcast_to(ones, (1, 25, cfg.head_dim))
        turn = partial(reference.rope_2d, rows=grid[:, 0], columns=grid[:, 1], base=cfg.rope_base_space)
        logits = turn(q)[0] @ turn(k)[0].T
        peak = grid[logits[2 * 5 + 2].argmax()]
        assert np.array_equal(peak, middle + shift * np.array([row, column]))
        turn = partial(reference.rope_1d, positions=np.arange(25), base=cfg.rope_base_time)
        logits = turn(np.broadcast_to(before[h], (1, 25, cfg.head_dim)))[0] @ turn(k)[0].T
        assert logits[12].argmax() == 12 - shift
    np.testing.assert_allclose(net.periods.time.attention.q_bias[...][0], 4.0 * before, rtol=1e-6)


def test_tokens_without_a_place_neither_have_nor_attract_local_attention():
    """What such a token computes is bit for bit what a layer without biases computes; the other tokens' is not."""
    net = model(transformer_config(layers=1, time_every=0, local_space=2.0))
    layer = jax.tree.map(lambda leaf: leaf[0], net.periods).space[0]
    bare = jax.tree.map(lambda x: x, layer)
    bare.attention.q_bias = jax.tree.map(jnp.zeros_like, layer.attention.q_bias)
    rotation = Rotation.by(layers.space_angles(PLACES, net.cfg.head_dim, net.cfg.rope_base_space), axes=2)
    run = jax.jit(lambda p, placed: p.space(inputs(), rotation, Mask(), placed), static_argnums=1)
    plain = run(bare, None)
    some = run(layer, (True, False, True))
    np.testing.assert_array_equal(some[:, :, 1], plain[:, :, 1])
    assert (np.abs(some - plain)[:, :, [0, 2]].max(-1) > 1e-3).all()


def test_bfloat16_follows_float32(deep):
    narrow = with_config(deep, dtype="bfloat16")
    y, exact = forward(narrow, inputs()), forward(deep, inputs())
    assert y.dtype == jnp.bfloat16
    assert float(jnp.abs(y - exact).mean()) < 0.02 * float(jnp.abs(exact).mean()) + 0.02


# ---------------------------------------------------------------------------------------------------------------------
# Who sees whom: gradients that are exactly zero, and those that are not

T = 7
ONE = np.zeros((1, T), np.int32)
THEN, NOW = np.meshgrid(np.arange(T), np.arange(T))
WINDOW = (THEN <= NOW) & (THEN > NOW - 3)
REACH = (THEN <= NOW) & (THEN >= NOW - 2 * 2)  # two time layers, each two frames back
RULES = np.array([[True, True, False], [True, True, False], [True, True, True]])


def seen(net, segments=ONE):
    """bool [T, N, T, N]: which outputs depend on which inputs."""
    return dependencies(output, inputs(1, T), net, segments).reshape(T, N, T, N)


def output(x, net, segments):
    return run(net, x, segments=segments)[0]


def expected(frames, tokens):
    """From who may see whom among frames [T, T] and tokens [N, N]."""
    return frames[:, None, :, None] & tokens[None, :, None, :]


def test_a_space_layer_sees_its_own_frame_by_the_rules():
    net = model(transformer_config(layers=1, time_every=0))
    assert np.array_equal(seen(net), expected(np.eye(T, dtype=bool), RULES))


def test_a_time_layer_sees_its_own_token_in_the_window_and_the_segment():
    net = model(transformer_config(layers=1, time_every=1))
    assert np.array_equal(seen(net), expected(WINDOW, np.eye(N, dtype=bool)))
    segments = np.array([[4, 4, 5, 5, 5, 7, 7]])
    same = segments.T == segments
    assert np.array_equal(seen(net, segments), expected(WINDOW & same, np.eye(N, dtype=bool)))


def test_the_stack_is_causal_and_reaches_two_windows_back(deep):
    assert not REACH[-1].all()
    assert np.array_equal(seen(deep), expected(REACH, RULES))


def test_nothing_crosses_the_border_of_a_segment(deep):
    segments = np.array([[4, 4, 5, 5, 5, 7, 7]])
    assert np.array_equal(seen(deep, segments), expected(REACH & (segments.T == segments), RULES))


def test_a_segment_per_frame_makes_separate_images(deep):
    each = np.arange(T)[None]
    assert np.array_equal(seen(deep, each), expected(np.eye(T, dtype=bool), RULES))


def test_segments_count_episode_starts():
    starts = jnp.array([[True, False, True, False], [False, False, False, True]])
    assert np.array_equal(first_of_segment(starts), [[1, 1, 2, 2], [0, 0, 0, 1]])


def test_three_space_layers_then_time_that_adds_only_its_output():
    """Peer mistake 6: with zero outputs a time layer leaves every token as it is."""
    net = model(CFG)
    muted = jax.tree.map(lambda x: x, net)
    silent = muted.periods.time
    silent.attention.o = jax.tree.map(jnp.zeros_like, silent.attention.o)
    silent.mlp.down = jax.tree.map(jnp.zeros_like, silent.mlp.down)
    rest = model(transformer_config(layers=3, time_every=0))
    rest.norm = net.norm
    rest.periods.space = [jax.tree.map(lambda *x: jnp.concatenate(x), *net.periods.space)]
    np.testing.assert_allclose(forward(muted, inputs()), forward(rest, inputs()), rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(forward(net, inputs()) - forward(rest, inputs())).max()) > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Cached = uncached


CLIP = 12
WHOLE = np.zeros((2, CLIP), np.int32)  # one shape throughout: each costs a compilation


def steps(net, x, cache):
    parts = []
    for t in range(x.shape[1]):
        y, cache = step(net, x[:, t : t + 1], cache)
        parts.append(y)
    return np.concatenate(parts, 1), cache


def test_cached_equals_uncached_through_a_wrap(deep):
    x = inputs(2, CLIP)
    y, cache = steps(deep, x, ring.empty(DEEP, 2, N))
    np.testing.assert_allclose(y, forward(deep, x, WHOLE), rtol=2e-5, atol=2e-5)
    assert np.array_equal(cache.next, [CLIP, CLIP])


def test_local_attention_in_time_reaches_into_the_ring_as_into_the_window():
    """The biases' logits depend on where the cached frames stand, not on their slots."""
    cfg = replace(DEEP, local_space=1.5, local_time=2.0, local_shift=1)
    net, x = model(cfg), inputs(2, CLIP)
    y, _ = steps(net, x, ring.empty(cfg, 2, N))
    np.testing.assert_allclose(y, forward(net, x, WHOLE), rtol=2e-5, atol=2e-5)


def test_a_prefill_equals_steps(deep):
    x = inputs(2, CLIP)
    y, cache = step(deep, x[:, :10], ring.empty(DEEP, 2, N))
    rest, _ = steps(deep, x[:, 10:], cache)
    np.testing.assert_allclose(np.concatenate([y, rest], 1), forward(deep, x, WHOLE), rtol=2e-5, atol=2e-5)


def test_a_pass_reads_the_ring_and_does_not_write_it(deep):
    _, cache = steps(deep, inputs(2, 2), ring.empty(DEEP, 2, N))
    before = jax.tree.map(np.array, cache)
    first, second = step(deep, inputs(2, 1, 1), cache)[0], step(deep, inputs(2, 1, 1), cache)[0]
    assert np.array_equal(first, second)
    jax.tree.map(np.testing.assert_array_equal, before, cache)


def test_2000_frames_equal_windowed_recomputation(deep):
    """Peer mistakes 3 and 4: positions stay exact, and neither bytes nor programs grow."""
    frames, reach = 2000, 2 * (DEEP.window - 1) + 1
    x = inputs(1, frames)

    @jax.jit
    def roll(net, x):
        def body(cache, frame):
            y, cache = step(net, frame[:, None], cache)
            return cache, y[:, 0]

        return jax.lax.scan(body, ring.empty(DEEP, 1, N), jnp.swapaxes(x, 0, 1))

    cache, y = roll(deep, x)
    assert int(cache.next[0]) == frames and sorted(map(int, cache.pos[0])) == [1997, 1998, 1999]
    for t in (10, 255, 256, 257, 300, 1023, 1999):
        window = x[:, t - reach + 1 : t + 1]
        fresh = ring.empty(DEEP, 1, N)
        placed = ring.Cache(fresh.k, fresh.v, fresh.pos, fresh.next + t - reach + 1)
        np.testing.assert_allclose(y[t], step(deep, window, placed)[0][:, -1], rtol=3e-5, atol=3e-5)
        # At positions counted from 0 only the rounding of the angles differs: 2,000 radians times 2^-24.
        np.testing.assert_allclose(y[t], step(deep, window, fresh)[0][:, -1], rtol=2e-3, atol=2e-3)


def test_cost_per_frame_is_constant(deep):
    """Peer mistake 4: one program of constant bytes and operations serves frame 10 and frame 2,000."""
    one = jax.jit(lambda net, x, cache: step.__wrapped__(net, x, cache))
    cache, x, sizes = ring.empty(DEEP, 1, N), inputs(1, 1), set()
    for at in (0, 1, 10, 2000):
        cache = ring.Cache(cache.k, cache.v, cache.pos, jnp.full((1,), at, jnp.int32))
        _, cache = one(deep, x, cache)
        sizes.add(sum(leaf.nbytes for leaf in jax.tree.leaves(cache)))
    assert one._cache_size() == 1 and len(sizes) == 1


def test_streams_of_different_age_in_one_batch(deep):
    x = inputs(2, CLIP)
    old, cache = steps(deep, x[:, :6], ring.empty(DEEP, 2, N))
    reset = ring.reset(cache, jnp.array([True, False]))
    together, after = steps(deep, x[:, 6:], reset)
    # Stream 0 starts anew: as if an episode began there. Positions differ: angles round differently.
    segments = np.array([[0] * 6 + [1] * 6, [0] * CLIP])
    whole = forward(deep, x, segments)
    np.testing.assert_allclose(np.concatenate([old, together], 1), whole, rtol=1e-4, atol=1e-4)
    assert np.array_equal(after.next, [6, CLIP])
    # To the bit, stream 1 never noticed, and stream 0 is a fresh one.
    kept, _ = steps(deep, x[:, 6:], cache)
    fresh, _ = steps(deep, x[:, 6:], ring.empty(DEEP, 2, N))
    assert np.array_equal(together[1], kept[1]) and not np.array_equal(together[0], kept[0])
    assert np.array_equal(together[0], fresh[0])


def test_prefill_with_segments_equals_stepping_with_resets(deep):
    x = inputs(2, CLIP)
    starts = np.zeros((2, CLIP), bool)
    starts[0, [0, 3]] = starts[1, [0, 5, 11]] = True
    segments = first_of_segment(jnp.asarray(starts))
    whole, prefilled = step(deep, x, ring.empty(DEEP, 2, N), segments)
    cache, parts = ring.empty(DEEP, 2, N), []
    for t in range(CLIP):
        y, cache = step(deep, x[:, t : t + 1], ring.reset(cache, jnp.asarray(starts[:, t])))
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(whole, forward(deep, x, segments), rtol=2e-5, atol=2e-5)
    more = inputs(2, 1, 9)
    np.testing.assert_allclose(step(deep, more, cache)[0], step(deep, more, prefilled)[0], rtol=1e-4, atol=1e-4)


def test_segments_with_a_history(deep):
    """The ring belongs to the episode of the first new frame."""
    x = inputs(2, CLIP)
    _, cache = steps(deep, x[:, :3], ring.empty(DEEP, 2, N))
    segments = np.array([[0] * 4 + [1] * 8, [0] * 3 + [1] * 9])  # the window of frame 4 reaches into the ring
    y, _ = step(deep, x[:, 3:], cache, jnp.asarray(segments[:, 3:]))
    np.testing.assert_allclose(y[0], forward(deep, x, segments)[0, 3:], rtol=2e-5, atol=2e-5)
    # A caller who says that the first new frame goes on in row 1 gets that: the number itself means nothing.
    np.testing.assert_allclose(y[1], forward(deep, x, WHOLE)[1, 3:], rtol=2e-5, atol=2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Scan and rematerialisation


def value_and_gradients(net, x):
    return jax.jit(jax.value_and_grad(lambda net, x: jnp.mean(jnp.sin(run(net, x)[0])), (0, 1)))(net, x)


@pytest.fixture(scope="module")
def plain():
    net = model(transformer_config(layers=2, time_every=1))
    return net, value_and_gradients(net, inputs())


@pytest.mark.parametrize("scan,remat", [(False, "none"), (True, "full"), (True, "dots")])
def test_scan_and_remat_change_no_value_and_no_gradient(plain, scan, remat):
    net, expected = plain
    other = value_and_gradients(with_config(net, scan=scan, remat=remat), inputs())
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_parameters_are_stacked_and_drawn_with_a_key_each():
    cfg = transformer_config(layers=2, time_every=1)  # a full period takes seconds to compile
    net = jax.jit(partial(Transformer, cfg=cfg))(jax.random.key(0))
    q = net.periods.time.attention.qkv[...]
    assert q.shape == (2, 32, (4 + 2 * 2) * 8) and not np.array_equal(q[0], q[1])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(net))
    np.testing.assert_allclose(np.std(q), 32**-0.5, rtol=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Time layers that are not factorised: over all tokens of all frames


JOINT = transformer_config(layers=2, time_every=1, time_factorised=False, local_space=1.5, local_time=1.0)
PLACED = np.array([True, True, False])
jointly = partial(run, placed=PLACED)


def rope_joint(x, frames, places, cfg):
    """Rotary embedding of x [..., L, K]: four blocks of pairs (i, i + K/8), two turned by time, then row and column."""
    x, eighth = np.asarray(x, np.float64), x.shape[-1] // 8
    out = np.empty_like(x)
    for token, (frame, (row, column)) in enumerate(zip(frames, places, strict=True)):
        for block, at in enumerate([frame, frame, row, column]):
            for i in range(eighth):
                if block < 2:  # K/4 frequencies
                    angle = at * cfg.rope_base_time ** (-(block * eighth + i) / (2 * eighth))
                else:  # K/8 of each
                    angle = at * cfg.rope_base_space ** (-i / eighth)
                j = 2 * block * eighth + i
                a, b = x[..., token, j], x[..., token, j + eighth]
                out[..., token, j] = a * np.cos(angle) - b * np.sin(angle)
                out[..., token, j + eighth] = b * np.cos(angle) + a * np.sin(angle)
    return out


def joint_reference(net, x, segments):
    """Dense block-causal layers in float64, over one row of T N tokens."""
    cfg, x = net.cfg, np.asarray(x, np.float64)
    batch, frames = x.shape[:2]
    frame, place = np.divmod(np.arange(frames * N), N)
    kind = np.array(TYPES.types)[place]
    rules = np.array(TYPES.rules)[kind[:, None], kind[None]]
    now, then = frame[:, None], frame[None]
    seg = segments[:, frame]
    mask = rules & (then <= now) & (then > now - cfg.window) & (seg[:, :, None] == seg[:, None, :])
    at, half = PLACED[place], cfg.head_dim // 2
    x = x.reshape(batch, frames * N, -1)
    for i in range(cfg.layers):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], net.periods).time
        a, y = p.attention, reference.rms_norm(x, p.norm1.scale[...])
        q, k, v = (np.einsum("bld,dhk->blhk", y, w) for w in projections(a, cfg))
        q, k = reference.rms_norm(q, a.q_scale[...]), reference.rms_norm(k, a.k_scale[...])
        turn = lambda z: np.swapaxes(rope_joint(np.swapaxes(z, -2, -3), frame, PLACES[place], cfg), -2, -3)
        bias = []
        for part, allowed in ((slice(None, half), 1.0), (slice(half, None), np.outer(at, at))):
            b_q, b_k = (np.zeros((len(frame), h, cfg.head_dim)) for h in (cfg.heads, 1))
            b_q[..., part], b_k[..., part] = a.q_bias[...][:, part], a.k_bias[...][part]
            b_q, b_k = (np.swapaxes(turn(z), -2, -3) for z in (b_q, b_k))
            bias.append(allowed * (b_q @ np.swapaxes(b_k, -1, -2)) / np.sqrt(half) * np.sqrt(2))
        y = reference.attention(turn(q), turn(k), v, mask, cfg.softcap, sum(bias))
        x = x + y.reshape(*x.shape[:2], -1) @ np.asarray(a.o[...], np.float64)
        y = reference.rms_norm(x, p.norm2.scale[...])
        x = x + reference.swiglu(y, p.mlp.gate[...], p.mlp.up[...], p.mlp.down[...])
    return reference.rms_norm(x, net.norm.scale[...]).reshape(batch, frames, N, -1)


@pytest.fixture(scope="module")
def joint():
    return model(JOINT)


@jax.jit
def joint_forward(net, x, segments=None):
    return jointly(net, x, segments=segments)[0]


def test_dense_layers_against_the_reference(joint):
    segments = np.array([[0, 0, 0, 0, 0], [1, 1, 2, 2, 2]])
    got = joint_forward(joint, inputs(), jnp.asarray(segments))
    np.testing.assert_allclose(got, joint_reference(joint, inputs(), segments), rtol=2e-4, atol=2e-4)


def test_dense_local_attention_starts_where_its_heads_are_centred():
    """With content muted, the weights of a token peak at its neighbour, head by head, in the frame before."""
    cfg = replace(JOINT, layers=1, local_space=4.0, local_time=4.0, local_shift=1, head_dim=32, heads=4)
    size, centres = _joint_centres(cfg)
    places = np.array([(r, c) for r in range(5) for c in range(5)], np.float64)
    frame, place = np.divmod(np.arange(4 * 25), 25)
    k = rope_joint(size * np.ones((100, 32)), frame, places[place], cfg)
    for h, side in enumerate([(0, 1), (0, -1), (1, 0), (-1, 0)]):
        q = rope_joint(np.broadcast_to(size * np.asarray(centres[h]), (100, 32)), frame, places[place], cfg)
        peak = (q @ k.T)[2 * 25 + 12].argmax()
        assert frame[peak] == 1 and np.array_equal(places[place[peak]], np.array([2, 2]) + side)


def test_dense_layers_have_exactly_zero_gradient_to_what_they_must_not_see():
    net = model(replace(JOINT, layers=1))
    sees = dependencies(lambda x: jointly(net, x)[0], inputs(batch=1))
    frame, place = np.divmod(np.arange(5 * N), N)
    kind = np.array(TYPES.types)[place]
    now, then = frame[:, None], frame[None]
    expected = (then <= now) & (then > now - JOINT.window) & np.array(TYPES.rules)[kind[:, None], kind[None]]
    np.testing.assert_array_equal(sees, expected)


def test_dense_layers_with_a_cache_compute_what_they_compute_without(joint):
    """A ring of three frames that wraps; in one stream another episode begins at the third frame."""
    x, segments = inputs(frames=5), jnp.array([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])
    cache, got = ring.empty(JOINT, 2, N), []

    @jax.jit
    def step(net, x, cache, segments):
        y, kv = jointly(net, x, cache=cache, segments=segments)
        return y, ring.write(cache, *kv, segments=segments)

    for part in (slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)):
        y, cache = step(joint, x[:, part], cache, segments[:, part])
        got.append(y)
        if part.stop == 2:  # what the ring holds is another episode's
            pos = jnp.where(jnp.array([False, True])[:, None], -1, cache.pos)
            cache = ring.Cache(cache.k, cache.v, pos, cache.next)
    expected = joint_forward(joint, x, segments)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), expected, rtol=1e-4, atol=1e-5)
