"""A training phase small enough to run in seconds; as a program, ``python -m tests.training_phases RUN_DIR``."""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dreamer4_jax import config as configs
from dreamer4_jax.config import PhaseConfig
from dreamer4_jax.parallel import Rules, make_mesh, start
from dreamer4_jax.training import Interrupted, open_run, run_phase
from dreamer4_jax.training.state import ALONE, Part


class Layer(nnx.Module):
    def __init__(self, key: jax.Array, width: int):
        self.w = nnx.Param(jax.random.normal(key, (width, width)) / width**0.5, axes=("embed", "ffn"))
        self.scale = nnx.Param(jnp.ones((width,)), axes=("ffn",))


class Net(nnx.Module):
    """Two stacked layers and a read-out."""

    def __init__(self, key: jax.Array, width: int = 4):
        keys = jax.random.split(key, 3)
        self.layers = jax.vmap(lambda k: Layer(k, width))(keys[:2])
        self.out = nnx.Param(jax.random.normal(keys[2], (width, 1)), axes=("embed", "channel"))

    def __call__(self, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ layer.w[...]) * layer.scale[...], None

        x, _ = jax.lax.scan(body, x, self.layers)
        return (x @ self.out[...])[..., 0]


TINY = PhaseConfig(steps=8, warmup=2, lr=0.01, weight_decay=0.1, log_every=1, save_every=100, ema=0.9)


@dataclass
class Regression:
    """Fits a frozen linear map under noise; short batches and, every fourth step, long ones."""

    config: PhaseConfig = TINY
    name: str = "dynamics"
    nan_at: int | None = None
    sleep: float = 0.0
    width: int = 4
    rows: int = 2
    seen: list[int] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    terms: tuple[str, ...] = ("fit", "drift")

    @property
    def frozen(self) -> Any:
        return {"target": jnp.arange(1.0, self.width + 1)}

    start_from = None
    identity = ""

    def init(self, key: jax.Array, base: Any = None) -> Net:
        return Net(key, self.width)

    def loss(self, model: Any, ema: Any, frozen: Any, batch: Any, key: jax.Array) -> Any:
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        fit = jnp.mean((model(x) - x @ frozen["target"]) ** 2)
        drift = jnp.mean((model(x) - ema(x)) ** 2) + 0.01 * jnp.mean(model.out[...] ** 2)
        return {"fit": fit + batch["poison"], "drift": 0.1 * drift}, {"x_mean": jnp.mean(x)}

    def batches(self, start: int, part: Part = ALONE) -> Iterator[dict[str, np.ndarray]]:
        step = start
        while True:
            time.sleep(self.sleep)
            self.seen.append(step)
            rng = np.random.default_rng(step)
            frames = 6 if step % 4 == 3 else 3
            poison = np.float32(np.nan if step == self.nan_at else 0.0)
            assert self.rows % part[1] == 0
            rows = self.rows // part[1]
            x = rng.standard_normal((self.rows, frames, self.width)).astype(np.float32)
            yield {"x": x[part[0] * rows : (part[0] + 1) * rows], "poison": poison}
            step += 1

    def evaluate(self, ema: Any, step: int) -> dict[str, float]:
        self.evaluated.append(step)
        return {"score": float(jnp.sum(ema.out[...]))}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sleep", type=float, default=0.02)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=1000)
    args = parser.parse_args()
    start()
    config = configs.preset("tiny")
    tiny = replace(TINY, steps=args.steps, save_every=args.save_every)
    phase = Regression(tiny, sleep=args.sleep, width=args.width, rows=args.rows)
    run_dir = open_run(args.run_dir, config, resume=True)
    try:
        run_phase(phase, config=config, run_dir=run_dir, seed=0, resume=True, mesh=make_mesh(), rules=Rules(min_size=0))
    except Interrupted as interrupted:
        print(interrupted)
        return interrupted.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
