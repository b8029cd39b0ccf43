"""The demo's server in a thread, and a run directory with untrained models that it can play."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn

from dreamer4_jax.config import Config, preset, to_dict
from dreamer4_jax.envs.collect import collect
from dreamer4_jax.inference import model_makers
from dreamer4_jax.play import server
from dreamer4_jax.play.engine import Engine
from dreamer4_jax.play.server import Guard, make_app
from dreamer4_jax.training.checkpoint import save_model
from dreamer4_jax.training.loop import model_path
from tests.small import drawn

NET = dict(layers=2, time_every=2, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, window=4)
FLAT = dict(NET, layers=1, time_every=0)


@contextmanager
def serving(engine: Engine, guard: Guard | None = None) -> Iterator[tuple[int, Engine]]:
    """(port, engine) of a server in a thread, run as the command runs it, signals apart."""
    app = make_app(engine, guard or Guard())
    port, bound = [], threading.Event()
    servers = []

    class Kept(uvicorn.Server):
        def __init__(self, config):
            super().__init__(config)
            servers.append(self)

        def install_signal_handlers(self):
            """Signals are the main thread's."""

        @contextmanager
        def capture_signals(self):
            yield

    def ready(number):
        port.append(number)
        bound.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "Server", Kept)
        thread = threading.Thread(target=server.serve, args=(app, "127.0.0.1", 0), kwargs={"ready": ready})
        thread.start()
        assert bound.wait(20)
        until = time.monotonic() + 120
        while not (servers and servers[0].started):
            assert time.monotonic() < until
            time.sleep(0.01)
        try:
            yield port[0], engine
        finally:
            servers[0].should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def tiny_config(**overrides) -> Config:
    """A BabyAI world at its real 64 x 64 pixels, with models of a few thousand parameters."""
    return preset(
        "tiny",
        **{
            "name": "tiny-run",
            "env.levels": "BabyAI-GoToObj-v0,BabyAI-GoToLocal-v0",
            "env.max_steps": 16,
            "data.frames": 256,
            "data.chunk": 32,
            "evaluate.context": 2,
            "evaluate.frames": 4,
            "data.chunks_per_shard": 4,
            "data.holdout": 0.5,
            "data.bot": 0.5,
            "data.noisy_bot": 0.0,
            "data.workers": 1,
            "tokenizer.channels": 2,
            "tokenizer.encoder": FLAT,
            "tokenizer.decoder": FLAT,
            "dynamics": {"transformer": NET, "registers": 0, "k_max": 8},
            "agent.hidden": 8,
            "agent.bins": 7,
            "agent.mtp": 2,
            "agent.context": 3,
            **overrides,
        },
    )


def tiny_run(directory: Path, *, phases: tuple[str, ...] = ("tokenizer", "dynamics", "agent", "imagination")) -> Path:
    """A run directory as a finished run leaves it, its models drawn at random instead of trained."""
    config = tiny_config()
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(to_dict(config)))
    collect(config, directory / "data" / "frames", seed=0, progress=False)
    makers = model_makers(config)
    for i, phase in enumerate(phases):
        path = model_path(directory, phase)
        path.parent.mkdir(parents=True)
        save_model(path, drawn(makers[phase], seed=i), {})
    return directory
