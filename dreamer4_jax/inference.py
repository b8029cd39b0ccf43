"""A run's trained models, loaded for inference: to play in, to step, to act with."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from dreamer4_jax.agent.heads import PolicyHead
from dreamer4_jax.agent.model import ActorCritic, Agent, WorldModelPolicy
from dreamer4_jax.config import Config, ConfigError, UserError, complete, from_dict, override
from dreamer4_jax.envs.spaces import to_env
from dreamer4_jax.presets import BASELINES
from dreamer4_jax.training.checkpoint import CheckpointError, load_meta, load_model
from dreamer4_jax.training.loop import model_path
from dreamer4_jax.world.dynamics import Dynamics
from dreamer4_jax.world.oracle import TransitionOracle
from dreamer4_jax.world.precision import cast_once
from dreamer4_jax.world.slots import Heads
from dreamer4_jax.world.streams import Streams
from dreamer4_jax.world.tokenizer import Tokenizer


def model_makers(config: Config) -> dict[str, Callable[[Any], Any]]:
    """Phase -> function of a key that builds the model which the phase leaves in a run directory."""

    def agent(key: Any) -> Agent:
        return Agent(config, Dynamics(config, key), key)

    def baseline(fields: dict[str, Any], key: Any) -> Dynamics:
        return Dynamics(override(config, fields), key)

    return {
        "tokenizer": lambda key: Tokenizer(config.tokenizer, key),
        "dynamics": lambda key: Dynamics(config, key),
        **{name: partial(baseline, other.fields) for name, other in BASELINES.items()},
        "agent": agent,
        "imagination": lambda key: ActorCritic(config, agent(key).policy, key),
    }


def finished_path(run_dir: str | Path, phase: str) -> Path:
    """Where the model of a finished phase lies; `CheckpointError` if it is not finished."""
    path = model_path(run_dir, phase)
    if not path.is_dir():
        raise CheckpointError(f"{path}: phase {phase!r} is not finished in this run; train it first")
    return path


def load_phase(run_dir: str | Path, config: Config, phase: str) -> Any:
    """The EMA model of a finished phase.

    Raises:
      CheckpointError: the phase is not finished in this run, or its model is damaged or of another config.
    """
    return load_model(finished_path(run_dir, phase), jax.eval_shape(model_makers(config)[phase], jax.random.key(0)))[0]


def load_tokenizer(path: Path) -> tuple[Tokenizer, Path | None]:
    """The tokenizer of a run directory, or of the directory of its model; and the run directory, if it is one."""
    run = path if (path / "config.json").is_file() else None
    model = finished_path(run, "tokenizer") if run else path
    meta = load_meta(model)
    if meta.get("phase") != "tokenizer":
        raise CheckpointError(f"{model}: holds the model of phase {meta.get('phase')!r}, not of a tokenizer")
    cfg = from_dict(Config, meta["config"]).tokenizer
    abstract = jax.eval_shape(lambda key: Tokenizer(cfg, key), jax.random.key(0))
    return load_model(model, abstract)[0], run


def read_config(run_dir: str | Path) -> Config:
    """The config that a run was made with."""
    path = Path(run_dir) / "config.json"
    if not path.exists():
        raise UserError(f"{run_dir}: is no run directory (it has no config.json)")
    try:
        return from_dict(Config, complete(json.loads(path.read_text())))
    except ConfigError:
        raise
    except ValueError as error:  # no JSON, or no text
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


def recording(run_dir: str | Path) -> Path:
    """The recorded dataset of a run: its own, or the one that it was given."""
    note = Path(run_dir) / "data.json"
    return Path(json.loads(note.read_text())["directory"]) if note.exists() else Path(run_dir) / "data" / "frames"


class LoadedPolicy:
    """A trained policy for any gymnasium loop. It remembers the episode in caches of fixed size, so that a decision
    costs the same at any age.

        policy = dreamer4_jax.load_policy("runs/quickstart-seed0")
        observation, _ = env.reset()
        policy.reset()
        action = policy.act(observation)

    With the same seed it acts exactly as in the closed-loop evaluation.
    """

    def __init__(self, config: Config, policy: WorldModelPolicy):
        self.config = config
        self._policy = policy
        self._streams: int | None = None
        self._starting: np.ndarray | None = None

    def reset(self, starting: Bool[np.ndarray, " E"] | None = None, *, seed: int | None = None) -> None:
        """A new episode begins with the next `act`; of a vector environment those that `starting` marks (all).

        Args:
          seed: of all draws from here on, as `load_policy` takes it, so that an episode does not depend on those before
            it. By default the draws go on.
        """
        if seed is not None:
            self._policy.reseed(seed)
        if starting is None:
            self._starting = None if self._streams is None else np.ones(self._streams, bool)
        elif self._streams is not None and np.shape(starting) != (self._streams,):
            raise ValueError(f"starting {np.shape(starting)}: must be one bool for each of the {self._streams} streams")
        else:
            self._starting = np.asarray(starting, bool)

    def act(self, observation: Any) -> Any:
        """The next action.

        Args:
          observation: {"image": uint8 [H, W, 3], "task": int [words]}, or these with a leading axis of E environments.
            Without "task", or as an image alone, the task is empty.

        Returns:
          What the environment takes: an int where the actions are one categorical component, the array of another
          single component, a dictionary of several; with a leading axis of E where the observation has one.
        """
        t, words = self.config.tokenizer, self.config.agent.task_words
        given = observation if isinstance(observation, Mapping) else {"image": observation}
        image = np.asarray(given["image"])
        lead = image.shape[:-3]
        if image.dtype != np.uint8 or len(lead) > 1 or image.shape[-3:] != (t.height, t.width, 3):
            raise ValueError(
                f"observation image {image.dtype} {[*image.shape]}: must be uint8 [{t.height}, {t.width}, 3], or a "
                "batch of these"
            )
        task = np.asarray(given.get("task", np.zeros((*lead, words))), np.int32)
        if task.shape != (*lead, words):
            raise ValueError(f"observation task {[*task.shape]}: must be {[*lead, words]}")
        count = lead[0] if lead else 1
        if self._streams is None:
            self._streams = count
            self._starting = np.ones(count, bool)
        if count != self._streams:
            raise ValueError(f"observation of {count} environments: this policy plays in {self._streams}; load another")
        if self._starting is not None:
            self._policy.reset(self._starting)
            self._starting = None
        actions = self._policy.act(image.reshape(count, *image.shape[-3:]), task.reshape(count, words))
        if not lead:
            actions = {name: value[0] for name, value in actions.items()}
        return to_env(actions)


def load_policy(
    checkpoint: str | Path,
    *,
    phase: str | None = None,
    greedy: bool = False,
    seed: int = 0,
    dtype: str | None = None,
) -> LoadedPolicy:
    """The trained policy of a run directory, for use in any gymnasium loop.

    Args:
      phase: "agent" (cloned) or "imagination"; by default the latest that is finished.
      greedy: take the most probable action instead of drawing one.
      seed: of the draws and of the noise on what is remembered.
      dtype: "float32" or "bfloat16" instead of the config's.
    """
    world = load_world(checkpoint, phase=phase)
    models = cast_once(world.tokenizer, dtype), cast_once(world.agent.dynamics, dtype), world.policy
    return LoadedPolicy(world.config, WorldModelPolicy(*models, seed=seed, greedy=greedy))
