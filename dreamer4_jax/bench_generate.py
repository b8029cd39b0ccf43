"""`dreamer4 bench generate`: frames a second of the sampler, and how far that is from what the machine could do.

Two programs for each preset, with weights that are drawn (their values cost no time) and full caches:

* frame: the dynamics alone, K passes a frame, the write of the last frame drawn into the first of them;
* stream: what a player waits for, `Streams.step`: K passes, one that writes the frame and reads it, heads, decoder.

The floor of a call is the larger of two times: its matrix products at the rate of one large product on this machine,
and its weights and caches, read once a pass, at the rate of a large copy. On a batch of one most machines are bound by
the second.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dreamer4_jax.bench import Timing, matmul_flops, matmul_rate, reference_config, time_jitted
from dreamer4_jax.config import Config, ConfigError, preset
from dreamer4_jax.inference import World, model_makers
from dreamer4_jax.nn.cache import Cache
from dreamer4_jax.parallel.programs import generated_frame
from dreamer4_jax.presets import PRESETS
from dreamer4_jax.training.metrics import write_atomic
from dreamer4_jax.world.slots import step_slots

REFERENCE = "reference"  # the shapes that other implementations were measured at
DEFAULT = (REFERENCE, "tiny", "small", "base")
REPEATS = 10
COPIED = 2**28  # bytes; far beyond any processor's cache


def copy_rate(size: int = COPIED, *, repeats: int = 5) -> float:
    """GB/s of a large elementwise operation on the default device, bytes read and bytes written together."""
    x = jnp.zeros(size // 4, jnp.float32)
    return 2 * x.nbytes / time_jitted(jax.jit(lambda x: x + 1.0), (x,), repeats=repeats).best / 1e9


def named_config(name: str) -> Config:
    """A preset, or the reference shapes."""
    if name == REFERENCE:
        return reference_config()
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}: choose of {', '.join([REFERENCE, *PRESETS])}")
    return preset(name)


def drawn(tree: Any) -> Any:
    """Arrays for a tree of shapes: small numbers, keys, and full ring caches."""
    rng = np.random.default_rng(0)

    def leaf(x: Any) -> Any:
        if isinstance(x, Cache):
            window = x.pos.shape[1]
            pos = jnp.broadcast_to(jnp.arange(window, dtype=jnp.int32), x.pos.shape)
            return Cache(leaf(x.k), leaf(x.v), pos, jnp.full(x.next.shape, window, jnp.int32))
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(x.shape, np.float32) * 0.02, x.dtype)
        return jnp.ones(x.shape, x.dtype)

    return jax.tree.map(leaf, tree, is_leaf=lambda x: isinstance(x, Cache))


def _time(call: Callable[[Any], Any], carry: Any, repeats: int) -> Timing:
    """Seconds of `call`, which takes what it returned before: its argument may be donated."""
    for _ in range(2):
        carry = jax.block_until_ready(call(carry))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        carry = jax.block_until_ready(call(carry))
        seconds.append(time.perf_counter() - began)
    return Timing(median(seconds), min(seconds))


def _bytes(*trees: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees) if hasattr(x.dtype, "itemsize"))


def row(timing: Timing, *, frames: int, flops: int, read: int, gflops: float, gbps: float) -> dict[str, Any]:
    """One measurement beside its floor. `read`: bytes that must come from memory; `frames`: made by one call."""
    compute, memory = flops / 1e9 / gflops, read / 1e9 / gbps
    floor = max(compute, memory)
    return {
        "frames_per_s": frames / timing.median,
        "ms": 1e3 * timing.median,
        "best_ms": 1e3 * timing.best,
        "gflop": flops / 1e9,
        "read_mb": read / 1e6,
        "floor_ms": 1e3 * floor,
        "bound": "products" if compute >= memory else "memory",
        "times_floor": timing.median / floor,
    }


def bench_frame(
    config: Config, *, batch: int, steps: int, gflops: float, gbps: float, repeats: int = REPEATS
) -> dict[str, Any]:
    """The dynamics alone: `parallel.programs.generated_frame`, here."""
    program = generated_frame(config, rows=batch, steps=steps)
    flops = matmul_flops(program.function, *program.arguments, trips=program.trips)
    model, cache, *rest, _ = drawn(program.arguments)
    k = jnp.int32(steps)
    timing = _time(lambda carry: program.function(model, carry[0], *rest, k), (cache,), repeats)
    read = program.passes * _bytes(model, cache_of(program.arguments))
    return row(timing, frames=batch, flops=flops, read=read, gflops=gflops, gbps=gbps)


def cache_of(arguments: Sequence[Any]) -> Any:
    """The ring among a program's arguments."""
    return next(x for x in arguments if isinstance(x, Cache))


def bench_stream(
    config: Config, *, batch: int, steps: int, gflops: float, gbps: float, repeats: int = REPEATS
) -> dict[str, Any]:
    """`Streams.step` of `batch` streams, host and device together."""
    shapes = {name: jax.eval_shape(make, jax.random.key(0)) for name, make in model_makers(config).items()}
    made = {name: drawn(shapes[name]) for name in ("tokenizer", "agent", "imagination")}
    world = World(config, made["tokenizer"], made["agent"], made["imagination"])
    streams = world.streams(slots=batch, context=1)
    del made, world
    t = config.tokenizer
    go: Any = np.ones(batch, bool)
    frames, task = np.zeros((1, t.height, t.width, 3), np.uint8), np.zeros(config.agent.task_words, np.int32)
    state = streams.empty()
    for slot in range(batch):
        state, shown = streams.join(state, slot, frames, streams.no_actions(1), task, slot)
    actions: Any = streams.no_actions(batch)
    k: Any = np.full(batch, steps, np.int32)
    tokenizer, dynamics, heads = streams.models
    flops = matmul_flops(lambda m, s: step_slots(m, s, actions, go, k), streams.models, state, trips=steps)
    read = (steps + 1) * _bytes(dynamics, state.cache) + _bytes(tokenizer.decoder, state.decoder, heads)
    timing = _time(lambda carry: streams.step(carry[0], actions, go, k), (state, shown), repeats)
    return row(timing, frames=batch, flops=flops, read=read, gflops=gflops, gbps=gbps)


def table(on: dict[str, Any], rows: dict[str, dict[str, Any]]) -> Table:
    """The measurements for people."""
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in on["matmul_gflops"].items())
    out = Table(title=f"{on['devices']} x {on['device']}; GFLOP/s: {rates}; copies at {on['copy_gbps']:.1f} GB/s")
    out.add_column("program")
    for head in ("frames/s", "ms a call", "(best)", "GFLOP", "MB read", "floor ms", "bound by", "times floor"):
        out.add_column(head, justify="right")
    for name, r in rows.items():
        cells = [f"{r[key]:.1f}" for key in ("frames_per_s", "ms", "best_ms")]
        cells += [f"{r['gflop']:.2f}", f"{r['read_mb']:.0f}", f"{r['floor_ms']:.2f}", r["bound"]]
        out.add_row(name, *cells, f"{r['times_floor']:.1f}")
    return out


def estimates(names: Sequence[str], accelerators: Sequence[str], *, steps: int) -> list[dict[str, Any]]:
    """The frame program compiled ahead of time for TPUs that need not be there, see `parallel.aot`."""
    from dreamer4_jax.parallel.aot import aot_compile

    out = []
    for name in names:
        for target in accelerators:
            for report in aot_compile(named_config(name), target, programs=("generate",), steps=steps):
                floor = 1e3 * report.roofline_s
                out.append(
                    {
                        "preset": name,
                        "accelerator": target,
                        "fits": report.fits,
                        "frames_per_s": report.frames_per_s,
                        "ms": 1e3 * report.step_s,
                        "floor_ms": floor,
                        "times_floor": 1e3 * report.step_s / floor if report.fits else 0.0,
                    }
                )
    return out


def estimate_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The estimates for people."""
    out = Table(title="one stream on one TPU chip, the compiler's estimate")
    for head in ("preset", "TPU", "frames/s", "ms a frame", "floor ms", "times floor"):
        out.add_column(head)
    for r in rows:
        cells = [f"{r[key]:.2f}" for key in ("frames_per_s", "ms", "floor_ms", "times_floor")]
        out.add_row(r["preset"], r["accelerator"], *(cells if r["fits"] else ["does not fit", "", "", ""]))
    return out


def main(
    names: Sequence[str] = DEFAULT,
    *,
    steps: int = 4,
    batches: Sequence[int] = (1,),
    accelerators: Sequence[str] = (),
    out: str | None = None,
) -> None:
    """Prints the tables, and writes the figures to `out` if given."""
    configs = {name: named_config(name) for name in names}
    for name, config in configs.items():
        if steps < 1 or steps & (steps - 1) or steps > config.dynamics.k_max:
            raise ConfigError(
                f"--steps {steps}: must be a power of two up to dynamics.k_max = {config.dynamics.k_max} of {name!r}"
            )
    if not batches or min(batches) < 1:
        raise ConfigError(f"--batch {list(batches)}: must be at least 1")
    dtypes = sorted({config.dynamics.transformer.dtype for config in configs.values()}, reverse=True)
    device = jax.devices()[0]
    on: dict[str, Any] = {"device": device.device_kind, "devices": jax.device_count(), "copy_gbps": copy_rate()}
    on["matmul_gflops"] = {name: matmul_rate(dtype=jnp.dtype(name)) for name in dtypes}
    rows: dict[str, dict[str, Any]] = {}
    work = [(name, batch, part) for name in configs for batch in batches for part in (bench_frame, bench_stream)]
    console = Console(stderr=True)
    for name, batch, part in track(work, "measuring", console=console, disable=not console.is_terminal):
        what = "frame" if part is bench_frame else "stream"
        gflops = on["matmul_gflops"][configs[name].dynamics.transformer.dtype]
        rows[f"{name}, {what}, batch {batch}, K = {steps}"] = part(
            configs[name], batch=batch, steps=steps, gflops=gflops, gbps=on["copy_gbps"]
        )
    shown = Console()
    if not shown.is_terminal:
        shown.width = 160  # a file or a pipe has no edge
    shown.print(table(on, rows))
    tpu = estimates(names, accelerators, steps=steps)
    if tpu:
        shown.print(estimate_table(tpu))
    if out:
        write_atomic(Path(out), json.dumps({"machine": on, "rows": rows, "estimates": tpu}, indent=2) + "\n")
