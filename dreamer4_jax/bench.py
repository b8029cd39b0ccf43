"""Microbenchmarks: how fast this machine multiplies matrices, and which share of that the world model reaches.

A speed in frames per second says little without the machine under it, so each benchmark also counts the floating-point
operations of its matrix products and divides by the best rate that one large product reaches on the same devices.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from rich.console import Console
from rich.table import Table

from dreamer4_jax.config import Config, TransformerConfig, preset
from dreamer4_jax.training.metrics import write_atomic
from dreamer4_jax.training.optim import make_optimizer
from dreamer4_jax.training.phases import DynamicsPhase
from dreamer4_jax.training.state import init_state, make_train_step
from dreamer4_jax.world.dynamics import Actions
from dreamer4_jax.world.shortcut import next_frame, observe


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


# ---------------------------------------------------------------------------------------------------------------------
# Dynamics at the shapes that other implementations were measured at


def reference_config() -> Config:
    """d 256, 8 layers, 64 tokens x 32 channels, 8 registers: 74 world tokens a frame."""
    stack = TransformerConfig(layers=8, width=256, heads=8, kv_heads=4, head_dim=32, ffn=704, window=16)
    base = preset("tiny")
    return dataclasses.replace(
        base,
        name="bench",
        tokenizer=dataclasses.replace(base.tokenizer, channels=32, pack=1),
        # Six agent tokens fill the frame to a multiple of 8; they are not computed here.
        dynamics=dataclasses.replace(base.dynamics, transformer=stack, registers=8, agent_tokens=6, k_max=64),
    )


def bench_dynamics(
    gflops: float, *, batch: int = 4, frames: int = 8, context: int = 4, steps: int = 4
) -> dict[str, Any]:
    """Rows of `result`: one training step (shortcut forcing, EMA teacher, AdamW) on `batch` x `frames`, and one
    generated frame at batch 1 behind `context` frames: `steps` passes; the first of them also writes the last frame."""
    config = reference_config()
    key = jax.random.key(0)
    shape = (batch, frames, config.tokenizer.tokens, config.tokenizer.token_channels)
    data: dict[str, Any] = {
        "latents": jax.random.uniform(key, shape, minval=-1.0),
        "actions": {"move": jnp.zeros(shape[:2], jnp.int32)},
        "present": {"move": jnp.ones(shape[:2], bool)},
        "is_first": jnp.zeros(shape[:2], bool),
    }
    phase = DynamicsPhase(config, None)  # type: ignore[arg-type]  # the batch is given: no dataset is read
    optimizer = make_optimizer(phase.config)
    state = init_state(phase, optimizer, key)
    train = make_train_step(phase, optimizer)
    flops = matmul_flops(lambda s, b: train(s, None, b, key), state, data)

    def step_many(state, count):
        for _ in range(count):
            state, _ = train(state, None, data, key)
        return jax.block_until_ready(state)

    state = step_many(state, 2)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        state = step_many(state, 2)
        times.append((time.perf_counter() - began) / 2)
    rows = {
        f"training step, batch {batch} x {frames} frames": result(
            Timing(statistics.median(times), min(times)), frames=batch * frames, flops=flops, gflops=gflops
        )
    }

    model = state.ema
    past = Actions({"move": jnp.zeros((1, context), jnp.int32)}, {"move": jnp.ones((1, context), bool)})
    latents = data["latents"][:1, :context]
    cut = lambda start, stop: jax.tree.map(lambda x: x[:, start:stop], past)
    cache, _ = observe(model, model.init_cache(1), latents[:, :-1], cut(0, -1), key)
    one = cut(-1, None)

    def frame(model, cache, last, key, k):
        return next_frame(model, cache, last, one, one, (key, jax.random.fold_in(key, 1)), steps=k)

    arguments = (model, cache, latents[:, -1:], key, jnp.int32(steps))
    flops = matmul_flops(frame, *arguments, trips=steps - 1)
    rows[f"generated frame, batch 1, K = {steps}"] = result(
        time_jitted(jax.jit(frame), arguments), frames=1, flops=flops, gflops=gflops
    )
    return rows


def main(out: str | None = None) -> None:
    """`dreamer4 bench`: prints the table, and writes the figures to `out` if given."""
    on = machine()
    rows = bench_dynamics(on["matmul_gflops"])
    Console().print(table(on, rows))
    if out:
        write_atomic(Path(out), json.dumps({"machine": on, "rows": rows}, indent=2) + "\n")
