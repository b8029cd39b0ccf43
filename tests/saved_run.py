"""A run directory as training leaves it, with weights that are drawn instead of trained: nothing is compiled."""

from pathlib import Path
from typing import Any

from dreamer4_jax.config import Config, to_dict
from dreamer4_jax.inference import World, model_makers
from dreamer4_jax.training.checkpoint import save_model
from dreamer4_jax.training.loop import model_path, open_run
from tests.small import drawn
from tests.toy_env import toy_config, write_toy_dataset

SEEDS = {"tokenizer": 0, "agent": 3, "imagination": 4}
STACK = dict(layers=2, time_every=2, width=32, heads=4, kv_heads=2, head_dim=8, ffn=48, window=3)


def small_run_config(**overrides: Any) -> Config:
    """The toy environment's frames and actions, models of one space and one time layer."""
    stack = dict(STACK)
    return toy_config(
        **{
            "tokenizer.channels": 4,
            "tokenizer.pack": 1,
            "tokenizer.encoder": stack,
            "tokenizer.decoder": stack,
            "dynamics": {"transformer": stack, "registers": 1, "k_max": 4},
            "agent.task_vocab": 6,
            "agent.hidden": 8,
            "agent.bins": 7,
            "agent.mtp": 1,
            "agent.context": 4,
            "agent.sample_steps": 2,
            "env.max_steps": 6,
            **overrides,
        }
    )


def world(config: Config, *, actor: bool = True) -> World:
    """The models of `write_run`."""
    makers = model_makers(config)
    made = {name: drawn(makers[name], seed) for name, seed in SEEDS.items()}
    return World(config, made["tokenizer"], made["agent"], made["imagination"] if actor else None)


def write_run(directory: Path, config: Config, *, actor: bool = True, data: bool = True) -> World:
    """Writes config.json, the models and a recording; returns the models."""
    open_run(directory, config)
    models = world(config, actor=actor)
    for name, model in (("tokenizer", models.tokenizer), ("agent", models.agent), ("imagination", models.actor)):
        if model is not None:
            save_model(model_path(directory, name), model, {"config": to_dict(config), "step": 1})
    if data:
        write_toy_dataset(directory / "data" / "frames")
    return models
