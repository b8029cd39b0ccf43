"""A run's trained models, loaded for inference: to play in, to step, to act with."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from dreamer4_jax.agent.heads import PolicyHead
from dreamer4_jax.agent.model import ActorCritic, Agent
from dreamer4_jax.config import Config, UserError, from_dict, override
from dreamer4_jax.training.checkpoint import CheckpointError, load_model
from dreamer4_jax.training.loop import model_path
from dreamer4_jax.world.dynamics import Dynamics
from dreamer4_jax.world.oracle import TransitionOracle
from dreamer4_jax.world.precision import cast_once
from dreamer4_jax.world.streams import Heads, Streams
from dreamer4_jax.world.tokenizer import Tokenizer


def model_makers(config: Config) -> dict[str, Callable[[Any], Any]]:
    """Phase -> function of a key that builds the model which the phase leaves in a run directory."""

    def agent(key: Any) -> Agent:
        return Agent(config, Dynamics(config, key), key)

    return {
        "tokenizer": lambda key: Tokenizer(config.tokenizer, key),
        "dynamics": lambda key: Dynamics(config, key),
        "diffusion": lambda key: Dynamics(override(config, {"dynamics.objective": "diffusion"}), key),
        "agent": agent,
        "imagination": lambda key: ActorCritic(config, agent(key).policy, key),
    }


def load_phase(run_dir: str | Path, config: Config, phase: str) -> Any:
    """The EMA model of a finished phase.

    Raises:
      CheckpointError: the phase is not finished in this run, or its model is damaged or of another config.
    """
    path = model_path(run_dir, phase)
    if not path.is_dir():
        raise CheckpointError(f"{path}: phase {phase!r} is not finished in this run; train it first")
    return load_model(path, jax.eval_shape(model_makers(config)[phase], jax.random.key(0)))[0]


def read_config(run_dir: str | Path) -> Config:
    """The config that a run was made with."""
    path = Path(run_dir) / "config.json"
    if not path.exists():
        raise UserError(f"{run_dir}: is no run directory (it has no config.json)")
    try:
        return from_dict(Config, json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: damaged ({error})") from error


@dataclass(frozen=True)
class World:
    """The models of a run after phase 2 or 3."""

    config: Config
    tokenizer: Tokenizer
    agent: Agent
    actor: ActorCritic | None  # None before imagination training

    @property
    def policy(self) -> PolicyHead:
        """After imagination training, or after cloning where there was none."""
        return self.agent.policy if self.actor is None else self.actor.policy

    @property
    def heads(self) -> Heads:
        value = None if self.actor is None else self.actor.value
        return Heads(self.agent.reward, self.agent.cont, self.policy, value)

    def streams(self, *, slots: int, context: int | None = None, dtype: str | None = None, **options: Any) -> Streams:
        """The world as `slots` streams to play in, see `Streams`."""
        return Streams(
            self.tokenizer, self.agent.dynamics, self.heads, slots=slots, context=context, dtype=dtype, **options
        )

    def oracle(self, *, steps: int, dtype: str | None = None) -> TransitionOracle:
        """The world as a pure step function, weights cast once."""
        tokenizer, dynamics = cast_once(self.tokenizer, dtype), cast_once(self.agent.dynamics, dtype)
        return TransitionOracle(tokenizer, dynamics, self.agent.reward, self.agent.cont, steps)


def load_world(run_dir: str | Path, *, phase: str | None = None) -> World:
    """Loads the models of a run directory; nothing in it is written, and arrays are all that is read.

    Args:
      phase: whose policy, "agent" or "imagination"; by default the latest that is finished.
    """
    if phase not in (None, "agent", "imagination"):
        raise UserError(f"phase = {phase!r}: must be 'agent' or 'imagination'")
    config = read_config(run_dir)
    tokenizer, agent = (load_phase(run_dir, config, name) for name in ("tokenizer", "agent"))
    imagined = phase == "imagination" or (phase is None and model_path(run_dir, "imagination").is_dir())
    return World(config, tokenizer, agent, load_phase(run_dir, config, "imagination") if imagined else None)
