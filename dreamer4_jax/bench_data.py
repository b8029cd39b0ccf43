"""`dreamer4 bench data`: frames a second that the input pipeline delivers beside those that a training step takes.

For each phase the pipeline is read as fast as it goes, from memory and from disk, with one thread and with more; and
the phase's step is timed on a batch that is there. A ratio above 1 means that training never waits for data; how much
it did is in every run's metrics as ``time/data_wait``. Without a dataset of one's own, frames of the config's size are
made up: of tiles, some of which change, so that they shrink like those of a game.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dreamer4_jax.bench import machine
from dreamer4_jax.config import Config, ConfigError, UserError, override
from dreamer4_jax.data.schema import Episode, action_array
from dreamer4_jax.data.store import CACHE_BYTES, Dataset, DatasetSpec, open_dataset
from dreamer4_jax.data.tokens import write_tokens
from dreamer4_jax.data.writer import write_dataset
from dreamer4_jax.training.metrics import write_atomic
from dreamer4_jax.training.optim import make_optimizer
from dreamer4_jax.training.phases import AgentPhase, DynamicsPhase, ImaginationPhase, TokenizerPhase
from dreamer4_jax.training.state import init_state, make_train_step

PHASES = ("tokenizer", "dynamics", "agent", "imagination")
CHUNKS, BYTES = 48, 400_000_000  # of the made-up dataset at most, in three shards of one episode at least
TILE, CHANGED = 8, 0.05  # its tiles: pixels of a side, and the share that changes from frame to frame
STEPS = 5  # timed steps of a phase


def made_up(config: Config, directory: Path) -> None:
    """Writes a small dataset of the config's frames, actions and tasks; a reward ends each episode."""
    spec, rng = DatasetSpec.of(config), np.random.default_rng(config.seed)
    rows, columns = (-(-n // TILE) for n in spec.size)
    pictures = rng.integers(0, 256, (32, TILE, TILE, 3), np.uint8)
    pictures[16:] = pictures[16:, :1, :1]  # half of them of one colour

    def episode() -> Episode:
        t = 2 * spec.chunk
        tiles = np.repeat(rng.integers(0, 32, (1, rows, columns)), t, axis=0)
        for i in range(1, t):
            moved = rng.random((rows, columns)) < CHANGED
            tiles[i] = np.where(moved, rng.integers(0, 32, (rows, columns)), tiles[i - 1])
        frames = pictures[tiles].transpose(0, 1, 3, 2, 4, 5).reshape(t, rows * TILE, columns * TILE, 3)
        actions = {c.name: action_array(c, t) for c in config.actions}
        present = {c.name: np.arange(t) > 0 for c in config.actions}
        reward = np.zeros(t, np.float32)
        reward[-1] = 1.0
        task = np.zeros(spec.words, np.int32)
        return Episode(frames[:, : spec.size[0], : spec.size[1]], actions, present, reward, True, task)

    count = max(1, min(CHUNKS // 6, BYTES // (6 * spec.chunk * spec.frame_bytes())))
    streams = [[episode() for _ in range(count)] for _ in range(3)]
    write_dataset(directory, spec, {"train": [*streams[:2]], "holdout": [streams[2]]})


def made_up_tokens(config: Config, raw: Path, directory: Path) -> None:
    """Writes random tokens for a dataset: they are as large as true ones, which shrink hardly more."""
    t, rng = config.tokenizer, np.random.default_rng(config.seed)
    draw = lambda frames, _: np.tanh(rng.standard_normal((*frames.shape[:2], t.tokens, t.token_channels)))
    write_tokens(raw, directory, draw, identity="made up", batch_chunks=1)


def make_phase(config: Config, name: str, data: Dataset) -> Any:
    """A phase on models that nobody trained: their values cost no time."""
    if name == "tokenizer":
        return TokenizerPhase(config, data)
    key = jax.random.key(config.seed)
    dynamics = DynamicsPhase(config, data)
    if name == "dynamics":
        return dynamics
    agent = AgentPhase(config, data, dynamics.init(key))
    return agent if name == "agent" else ImaginationPhase(config, data, agent.init(key))


def delivered(phase: Any, seconds: float) -> float:
    """Frames a second of a phase's batches, as fast as they come; those that were read ahead are not counted."""
    batches = phase.batches(0)
    size = lambda batch: int(np.prod(batch["is_first"].shape))
    for _ in range(max(4, 2 * phase.full.data.readers) + 1):
        next(batches)
    frames, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        frames += size(next(batches))
    spent = time.perf_counter() - began
    if callable(close := getattr(batches, "close", None)):
        close()
    return frames / spent


def consumed(phase: Any) -> float:
    """Frames a second of a phase's training step on a batch that is there, the median of `STEPS`."""
    key, optimizer = jax.random.key(0), make_optimizer(phase.config)
    batch = next(phase.batches(0))
    state, step = init_state(phase, optimizer, key), make_train_step(phase, optimizer)
    frozen, on_device, times = phase.frozen, jax.device_put(batch), []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        state, _ = step(state, frozen, on_device, key)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - began)
    return int(np.prod(batch["is_first"].shape)) / statistics.median(times[1:])  # the first one compiles


def bench(
    config: Config,
    directory: Path,
    *,
    phases: Sequence[str],
    readers: Sequence[int],
    seconds: float,
    data: str | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Rows: phase, what it reads, from where and with how many threads, frames/s delivered and taken, their ratio.

    Args:
      directory: for what has to be made up.
      data: a dataset of frames to read instead.
    """
    raw, tokens = Path(data) if data else directory / "frames", directory / "tokens"
    if not data:
        made_up(config, raw)
    opened = open_dataset(raw, config)
    if set(phases) - {"tokenizer"}:
        made_up_tokens(config, raw, tokens)
    rows = []
    for name in track(phases, "measuring", disable=not progress, console=Console(stderr=True)):
        taken = None
        for source, cache in (("memory", CACHE_BYTES), ("disk", 0)):
            found = open_dataset(raw if name == "tokenizer" else tokens, cache_bytes=cache)
            for split in found.splits if cache else ():
                for i in range(found.chunks(split)):  # fills the cache
                    found.window(split, i * found.spec.chunk, 1)
            for count in readers:
                phase = make_phase(override(config, {"data.readers": count}), name, found)
                taken = taken or consumed(phase)
                speed = delivered(phase, seconds)
                rows.append(
                    {
                        "phase": name,
                        "reads": opened.spec.kind if name == "tokenizer" else "tokens",
                        "from": source,
                        "readers": count,
                        "delivered_frames_per_s": round(speed, 1),
                        "taken_frames_per_s": round(taken, 1),
                        "ratio": round(speed / taken, 2),
                        "bytes_per_frame": found.spec.frame_bytes(),
                    }
                )
    return rows


def table(config: Config, on: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people."""
    out = Table(title=f"{config.name} on {on['devices']} x {on['device']}, {on['cores']} cores")
    for head in ("phase", "reads", "from", "readers", "delivered, frames/s", "taken, frames/s", "ratio"):
        out.add_column(head, justify="left" if head in ("phase", "reads", "from") else "right")
    for r in rows:
        speeds = (f"{r[k]:,.0f}" for k in ("delivered_frames_per_s", "taken_frames_per_s"))
        out.add_row(r["phase"], r["reads"], r["from"], str(r["readers"]), *speeds, f"{r['ratio']:.1f}")
    return out


def numbers(text: str, option: str) -> tuple[int, ...]:
    """``1,2,4`` -> (1, 2, 4)."""
    try:
        found = tuple(int(n) for n in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ConfigError(f"{option} {text}: must be numbers of at least 1, separated by commas")
    return found


def main(
    config: Config, *, phases: str, readers: str, seconds: float, data: str | None = None, out: str | None = None
) -> None:
    """`dreamer4 bench data`: prints the table, and writes the figures to `out` if given."""
    names = tuple(filter(None, phases.split(",")))
    if unknown := [n for n in names if n not in PHASES]:
        raise UserError(f"--phases {unknown[0]}: choose of {', '.join(PHASES)}")
    if not seconds > 0:
        raise ConfigError(f"--seconds {seconds}: must be above 0")
    counts = numbers(readers, "--readers")
    with tempfile.TemporaryDirectory() as directory:
        rows = bench(config, Path(directory), phases=names, readers=counts, seconds=seconds, data=data)
    on = {**machine(), "cores": os.cpu_count()}
    Console().print(table(config, on, rows))
    if out:
        tree = {"machine": on, "config": config.name, "data": data or "made up", "rows": rows}
        write_atomic(Path(out), json.dumps(tree, indent=2) + "\n")
