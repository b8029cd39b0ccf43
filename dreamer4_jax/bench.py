"""Microbenchmarks: how fast this machine multiplies matrices, and which share of that the world model reaches.

A speed in frames per second says little without the machine under it, so each benchmark also counts the floating-point
operations of its matrix products and divides by the best rate that one large product reaches on the same devices.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from rich.table import Table


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    best: float


def time_jitted(fn: Callable[..., Any], args: Sequence[Any], *, repeats: int = 10) -> Timing:
    """Times ``fn(*args)`` after a warm-up call that compiles; each call is waited for.

    The same arguments are passed every time, so `fn` must not donate them.
    """
    if repeats < 1:
        raise ValueError(f"repeats = {repeats}: must be at least 1")
    jax.block_until_ready(fn(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        seconds.append(time.perf_counter() - start)
    return Timing(statistics.median(seconds), min(seconds))


def matmul_rate(sizes: Sequence[int] = (1024, 1536, 2048), *, repeats: int = 5, dtype: Any = jnp.float32) -> float:
    """GFLOP/s of the fastest square product on the default device, at JAX's default precision for `dtype`."""
    product = jax.jit(jnp.matmul)
    best = 0.0
    for size in sizes:
        a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
        best = max(best, 2 * size**3 / time_jitted(product, (a, b), repeats=repeats).best / 1e9)
    return best


def matmul_flops(fn: Callable[..., Any], *args: Any, trips: int | None = None) -> int:
    """Floating-point operations of the matrix products in one call of ``fn(*args)``, from its jaxpr.

    XLA's own cost analysis counts the body of a loop once; this multiplies by the length of a scan. A loop whose
    length is known only at run time counts `trips` times (the K steps of the sampler, say). A Pallas kernel counts as
    one of its blocks, and a shard_map as one of its devices: count with the XLA path of attention on one device.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr, trips)


def _count(jaxpr: core.Jaxpr, trips: int | None) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = _shape(eqn.invars[0])
            total += 2 * int(np.prod([left[i] for i in contracted])) * int(np.prod(_shape(eqn.outvars[0])))
        elif name == "conv_general_dilated":
            kernel, numbers = _shape(eqn.invars[1]), params["dimension_numbers"]
            total += 2 * int(np.prod(_shape(eqn.outvars[0])) * np.prod(kernel)) // kernel[numbers.rhs_spec[0]]
        elif name == "scan":
            total += params["length"] * _count(params["jaxpr"].jaxpr, trips)
        elif name == "while":
            body = _count(params["body_jaxpr"].jaxpr, trips) + _count(params["cond_jaxpr"].jaxpr, trips)
            if body and trips is None:
                raise ValueError("the function holds a loop of unknown length with products in it: pass trips")
            total += body * (trips or 0)
        elif name == "cond":
            total += max(_count(branch.jaxpr, trips) for branch in params["branches"])
        else:
            total += sum(_count(inner, trips) for inner in _inner(params))
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The jaxprs of a call: jit, remat, and the forward side of custom derivatives."""
    found = [value for key, value in params.items() if key in ("jaxpr", "call_jaxpr", "fun_jaxpr")]
    return [value.jaxpr if isinstance(value, core.ClosedJaxpr) else value for value in found]


def machine() -> dict[str, Any]:
    """What the numbers were measured on: device, count, and its rate of matrix products."""
    device = jax.devices()[0]
    return {"device": device.device_kind, "devices": jax.device_count(), "matmul_gflops": round(matmul_rate(), 1)}


def result(timing: Timing, *, frames: int, flops: int, gflops: float) -> dict[str, float]:
    """One row: frames per second (median), milliseconds of a call, and the share of the machine's `gflops`."""
    return {
        "frames_per_s": frames / timing.median,
        "ms": 1e3 * timing.median,
        "best_ms": 1e3 * timing.best,
        "gflop": flops / 1e9,
        "share_of_matmul_rate": flops / 1e9 / timing.median / gflops,
    }


def table(on: dict[str, Any], rows: dict[str, dict[str, float]]) -> Table:
    """The results for people; the dictionaries themselves are for files."""
    out = Table(
        title=f"{on['devices']} x {on['device']}, matrix products at {on['matmul_gflops']:.0f} GFLOP/s (float32)"
    )
    out.add_column("benchmark")
    for head in ("frames/s", "ms a call (median)", "(best)", "GFLOP a call", "share of matmul rate"):
        out.add_column(head, justify="right")
    for name, row in rows.items():
        out.add_row(
            name,
            f"{row['frames_per_s']:.1f}",
            f"{row['ms']:.1f}",
            f"{row['best_ms']:.1f}",
            f"{row['gflop']:.2f}",
            f"{row['share_of_matmul_rate']:.0%}",
        )
    return out
