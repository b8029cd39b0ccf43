"""Optimisers against NumPy in float64, the schedule and the loss normaliser against their closed forms."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dreamer4_jax.config import PhaseConfig
from dreamer4_jax.training import optim
from tests.training_phases import Net

CFG = PhaseConfig(steps=10, warmup=2, lr=0.1, decay=0.5, weight_decay=0.3, clip=1.0)


class Block(nnx.Module):
    """A stack of 3 layers as vmap makes it: no axis named for the stack. Then one that names it, and a plain scale."""

    def __init__(self, key: jax.Array):
        normal = jax.random.normal
        self.w = nnx.Param(normal(key, (3, 4, 5)), axes=("embed", "ffn"))
        self.scale = nnx.Param(normal(key, (3, 4)), axes=("embed",))
        self.named = nnx.Param(normal(key, (3, 4)), axes=("layers", "embed"))
        self.attention_out = nnx.Param(normal(key, (3, 2, 2, 6)), axes=("layers", "heads", "head_dim", "embed"))
        self.table = nnx.Param(normal(key, (7, 4)), axes=("token", "embed"))


def leaves(tree):
    return {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_matrices_are_told_by_their_axes_not_by_their_dimensions():
    decayed = {name.split(".")[1]: flag for name, flag in leaves(optim.is_matrix(Block(jax.random.key(0)))).items()}
    assert decayed == {"w": True, "scale": False, "named": False, "attention_out": True, "table": True}
    assert optim.is_matrix({"w": jnp.ones((2, 2)), "b": jnp.ones(2)}) == {"w": True, "b": False}


def numpy_schedule(cfg, s):
    up = (s + 1) / cfg.warmup
    down = (cfg.steps - s) / (cfg.decay * cfg.steps)
    return cfg.lr * min(1.0, up, down)


def test_schedule_is_the_closed_form():
    schedule = optim.wsd_schedule(CFG)
    rates = [float(schedule(s)) for s in range(CFG.steps + 1)]
    np.testing.assert_allclose(rates, [0.05] + [0.1] * 5 + [0.08, 0.06, 0.04, 0.02, 0.0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(rates, [numpy_schedule(CFG, s) for s in range(CFG.steps + 1)], rtol=1e-6, atol=1e-9)


def test_schedule_without_warmup_or_decay_is_constant():
    schedule = optim.wsd_schedule(replace(CFG, warmup=0, decay=0.0))
    np.testing.assert_allclose([float(schedule(s)) for s in (0, 5, 9)], 0.1, rtol=1e-6)


def numpy_adamw(p, grads, cfg, decays):
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        u = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
        p = p - numpy_schedule(cfg, t - 1) * (u + cfg.weight_decay * decays * p)
    return p


def numpy_laprop(p, grads, cfg, decays):
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        v = 0.99 * v + 0.01 * g**2
        m = 0.9 * m + 0.1 * g / (np.sqrt(v / (1 - 0.99**t)) + 1e-20)
        p = p - numpy_schedule(cfg, t - 1) * (m / (1 - 0.9**t) + cfg.weight_decay * decays * p)
    return p


def numpy_muon(p, grads, cfg, decays):
    """One 4 x 5 matrix: Nesterov momentum, five quintic Newton-Schulz steps, the size of AdamW's updates."""
    m = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = 0.95 * m + 0.05 * g
        x = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
        x = x / (np.linalg.norm(x) + 1e-8)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        p = p - numpy_schedule(cfg, t - 1) * (0.2 * np.sqrt(5) * x + cfg.weight_decay * decays * p)
    return p


def gradients(params, sizes):
    keys = jax.random.split(jax.random.key(1), len(sizes))
    return [
        jax.tree.map(lambda x, k=k, s=s: s * jax.random.normal(k, x.shape), params)
        for k, s in zip(keys, sizes, strict=True)
    ]


def run_three_steps(cfg, params, grads):
    optimizer = optim.make_optimizer(cfg)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for g in grads:
        params, state = step(params, state, g)
    return params


@pytest.mark.parametrize("name,reference", [("adamw", numpy_adamw), ("laprop", numpy_laprop)])
def test_optimizer_equals_numpy(name, reference):
    params = Block(jax.random.key(0))
    # Norms far from 1, on both sides: clipped and not.
    grads = gradients(params, (5.0, 0.01, 1.0))
    got = leaves(run_three_steps(replace(CFG, optimizer=name), params, grads))
    scales = []
    for g in grads:
        norm = np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(g)))
        scales.append(min(1.0, 1.0 / norm))
    assert scales[0] < 1.0 and scales[1] == 1.0
    decays = leaves(optim.is_matrix(params))
    for at, start in leaves(params).items():
        gs = [np.asarray(leaves(g)[at], np.float64) * s for g, s in zip(grads, scales, strict=True)]
        expected = reference(np.asarray(start, np.float64), gs, CFG, float(decays[at]))
        np.testing.assert_allclose(got[at], expected, rtol=2e-5, atol=2e-6, err_msg=at)


def test_muon_equals_numpy_layer_by_layer_and_leaves_tables_to_adamw():
    params = Block(jax.random.key(0))
    cfg = replace(CFG, optimizer="muon", clip=0.0)
    grads = [
        jax.tree.map(lambda x, k=k: jax.random.normal(k, x.shape), params)
        for k in jax.random.split(jax.random.key(1), 3)
    ]
    got = run_three_steps(cfg, params, grads)
    for layer in range(3):
        gs = [np.asarray(g.w[...][layer], np.float64) for g in grads]
        expected = numpy_muon(np.asarray(params.w[...][layer], np.float64), gs, cfg, 1.0)
        np.testing.assert_allclose(got.w[...][layer], expected, rtol=1e-3, atol=1e-4)
    # (heads, head_dim, embed) is a map from heads * head_dim = 4 to embed = 6: the update of the first step is
    # 0.2 sqrt(6) times a matrix whose singular values Newton-Schulz brought near 1.
    one = run_three_steps(replace(cfg, weight_decay=0.0), params, grads[:1])
    update = np.asarray(one.attention_out[...] - params.attention_out[...])[1].reshape(4, 6) / numpy_schedule(cfg, 0)
    values = np.linalg.svd(update / (0.2 * np.sqrt(6)), compute_uv=False)
    assert values.max() < 1.3 and values.min() > 0.3
    # The first update of Adam has the size of the rate in every entry.
    np.testing.assert_allclose(
        np.abs(np.asarray(one.table[...] - params.table[...])), numpy_schedule(cfg, 0), rtol=1e-3
    )


def test_every_optimizer_lowers_a_loss():
    x = jax.random.normal(jax.random.key(5), (64, 4))
    y = jnp.sin(x.sum(-1))

    def loss(net):
        return jnp.mean((net(x) - y) ** 2)

    for name in ("adamw", "laprop", "muon"):
        net = Net(jax.random.key(0))
        optimizer = optim.make_optimizer(PhaseConfig(steps=100, optimizer=name, lr=0.02, warmup=5))

        @jax.jit
        def step(net, state, optimizer=optimizer):
            updates, state = optimizer.update(jax.grad(loss)(net), state, net)
            return optax.apply_updates(net, updates), state

        start, state = float(loss(net)), optimizer.init(net)
        for _ in range(100):
            net, state = step(net, state)
        assert float(loss(net)) < 0.3 * start, name


def test_normalizer_is_the_closed_form():
    values = [3.0, -1.0, 0.5, 40.0]
    norms = optim.init_norms(["a"])
    for t, value in enumerate(values, 1):
        scaled, norms = optim.normalize(norms, {"a": jnp.float32(value)})
        weights = 0.99 ** np.arange(t - 1, -1, -1)
        rms = np.sqrt(np.sum(weights * np.square(values[:t])) / np.sum(weights))
        np.testing.assert_allclose(scaled["a"], value / rms, rtol=1e-5)
    assert int(norms["count"]) == 4


def test_normalizer_starts_at_one_floors_and_passes_no_gradient_through_its_estimate():
    norms = optim.init_norms(["a", "zero"])
    scaled, _ = optim.normalize(norms, {"a": jnp.float32(123.0), "zero": jnp.float32(0.0)})
    assert float(scaled["a"]) == pytest.approx(1.0) and float(scaled["zero"]) == 0.0
    gradient = jax.grad(lambda x: optim.normalize(norms, {"a": x**2, "zero": 0.0 * x})[0]["a"])(3.0)
    assert float(gradient) == pytest.approx(6.0 / 9.0)  # of x^2 / 9, the 9 held fixed
    tiny, _ = optim.normalize(norms, {"a": jnp.float32(1e-9), "zero": jnp.float32(0.0)})
    assert float(tiny["a"]) == pytest.approx(1e-3)
