"""Counting of floating-point operations and the timing harness."""

import functools
import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from dreamer4_jax import bench
from dreamer4_jax.parallel import make_mesh
from experiments.base import step_flops
from tests import small

A, B = jnp.ones((4, 8)), jnp.ones((8, 8))
ONE = 2 * 4 * 8 * 8


def test_counts_products_through_jit_remat_and_derivatives() -> None:
    assert bench.matmul_flops(jnp.matmul, A, B) == ONE
    assert bench.matmul_flops(jax.jit(lambda a, b: jnp.tanh(a @ b)), A, B) == ONE
    loss = lambda b: jnp.tanh(A @ b).sum()
    assert bench.matmul_flops(jax.grad(loss), B) == 2 * ONE
    assert bench.matmul_flops(jax.grad(jax.checkpoint(loss)), B) == 3 * ONE, "remat computes the product again"
    assert (
        bench.matmul_flops(lambda a, b: jnp.einsum("btk,bkn->btn", a, b), jnp.ones((3, 4, 8)), jnp.ones((3, 8, 8)))
        == 3 * ONE
    )


def test_counts_custom_derivatives() -> None:
    @jax.custom_vjp
    def f(b):
        return A @ b

    f.defvjp(lambda b: (A @ b, None), lambda _, g: (A.T @ g,))
    assert bench.matmul_flops(f, B) == ONE
    assert bench.matmul_flops(jax.grad(lambda b: f(b).sum()), B) == 2 * ONE


def test_counts_loops() -> None:
    def scanned(a):
        return jax.lax.scan(lambda c, _: (c @ B, None), a, None, length=5)[0]

    assert bench.matmul_flops(scanned, A) == 5 * ONE

    def looped(a, n):
        return jax.lax.fori_loop(0, n, lambda _, c: c @ B, a)

    assert bench.matmul_flops(looped, A, jnp.int32(3), trips=3) == 3 * ONE
    with pytest.raises(ValueError, match="pass trips"):
        bench.matmul_flops(looped, A, jnp.int32(3))


def test_counts_the_dearest_branch() -> None:
    def either(p, a):
        return jax.lax.cond(p, lambda x: x @ B @ B, lambda x: x @ B, a)

    assert bench.matmul_flops(either, True, A) == 2 * ONE


def test_counts_convolutions() -> None:
    conv = functools.partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="VALID")
    flops = bench.matmul_flops(conv, jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 3, 3)))
    assert flops == 2 * (2 * 5 * 6 * 6) * (3 * 3 * 3)


def test_times_and_rates() -> None:
    timing = bench.time_jitted(jax.jit(jnp.matmul), (A, B), repeats=3)
    assert 0 < timing.best <= timing.median
    assert bench.matmul_rate((64,), repeats=2) > 0
    with pytest.raises(ValueError, match="repeats = 0"):
        bench.time_jitted(jnp.matmul, (A, B), repeats=0)


def test_share_is_of_the_median() -> None:
    row = bench.result(bench.Timing(median=0.5, best=0.4), frames=32, flops=20_000_000_000, gflops=100.0)
    assert row["frames_per_s"] == 64
    assert row["share_of_matmul_rate"] == pytest.approx(0.4)
    text = io.StringIO()
    on = {"device": "cpu", "devices": 1, "matmul_gflops": 100.0}
    Console(file=text, width=120).print(bench.table(on, {"train": row}))
    assert "64.0" in text.getvalue() and "40%" in text.getvalue()


def test_a_step_costs_its_short_and_long_batches_by_their_shares() -> None:
    """Of four steps three are short, of 4 rows of 4 frames, and one is long, of 2 rows of 8."""

    def cost(batch: int, length: int, long: int = 0) -> float:
        fields = {"batch": batch, "length": length, "long_length": long, "long_every": 4}
        config = small.config(**{f"train.dynamics.{name}": value for name, value in fields.items()})
        return step_flops(SimpleNamespace(mesh=make_mesh()), config)  # type: ignore[arg-type]

    assert cost(4, 4) != cost(2, 8)
    assert cost(4, 4, long=8) == pytest.approx(0.75 * cost(4, 4) + 0.25 * cost(2, 8), rel=1e-12)
