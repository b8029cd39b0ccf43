"""The four phases of Dreamer 4 for the one training loop: what each trains, its data and its loss."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dreamer4_jax.agent.heads import PolicyHead, agent_losses
from dreamer4_jax.agent.imagination import imagination_losses, imagine
from dreamer4_jax.agent.model import ActorCritic, Agent
from dreamer4_jax.config import Config, PhaseConfig
from dreamer4_jax.data.labels import labels_of
from dreamer4_jax.data.pipeline import Loader
from dreamer4_jax.data.store import Dataset
from dreamer4_jax.nn.transformer import first_of_segment
from dreamer4_jax.parallel.sharding import gathered
from dreamer4_jax.training.checkpoint import checksum
from dreamer4_jax.training.state import ALONE, Part
from dreamer4_jax.world import perceptual
from dreamer4_jax.world.dynamics import Actions, Dynamics
from dreamer4_jax.world.oracle import TransitionOracle
from dreamer4_jax.world.perceptual import Distance
from dreamer4_jax.world.precision import cast_once
from dreamer4_jax.world.shortcut import shortcut_forward
from dreamer4_jax.world.tokenizer import Tokenizer, tokenizer_loss

Terms = dict[str, Array]


def _loader(
    config: Config, phase: PhaseConfig, dataset: Dataset, part: Part, salt: int, relevant: float = 0.0
) -> Loader:
    return Loader(
        dataset,
        batch=phase.batch,
        length=phase.length,
        long_length=phase.long_length,
        long_every=phase.long_every,
        relevant_fraction=relevant,
        labels=labels_of(config, dataset),
        threads=config.data.readers,
        seed=config.seed * 16 + salt,
        process_index=part[0],
        process_count=part[1],
    )


def batch_actions(batch: dict[str, Any]) -> Actions:
    """The actions of a batch of the data pipeline."""
    return Actions(dict(batch["actions"]), dict(batch["present"]))


def separate_images(
    key: Array, actions: Actions, segments: Int[Array, "B T"], fraction: float
) -> tuple[Actions, Int[Array, "B T"]]:
    """Treats a share of the rows as separate images (paper section 4): each frame is a start frame, without action."""
    rows = jax.random.uniform(key, (segments.shape[0], 1)) < fraction
    alone = jnp.arange(segments.shape[1], dtype=segments.dtype)
    present = {name: p & ~rows for name, p in actions.present.items()}
    return Actions(actions.values, present), jnp.where(rows, alone, segments)


@dataclass
class TokenizerPhase:
    """Phase 1a: reconstruct video from partly dropped patches (paper Eq 5).

    Attributes:
      distance: the network of the perceptual term, instead of loading the one that the config names.
    """

    full: Config
    dataset: Dataset
    name: str = "tokenizer"
    distance: Distance | None = None
    start_from: Any = None

    @cached_property
    def frozen(self) -> Distance | None:
        return self.distance or perceptual.load(self.full.tokenizer.perceptual)

    @cached_property
    def identity(self) -> str:
        return "" if self.frozen is None else f"{self.full.tokenizer.perceptual} {checksum(self.frozen)}"

    @property
    def terms(self) -> tuple[str, ...]:
        return ("reconstruction",) if self.frozen is None else ("reconstruction", "perceptual")

    @property
    def weights(self) -> Mapping[str, float]:
        return {"perceptual": self.full.tokenizer.perceptual_weight}

    @property
    def config(self) -> PhaseConfig:
        return self.full.train.tokenizer

    def init(self, key: Array, base: Any = None) -> Tokenizer:
        return jax.jit(lambda k: Tokenizer(self.full.tokenizer, k))(key)  # op by op it takes many times as long

    def loss(self, model: Tokenizer, ema: Any, frozen: Any, batch: dict[str, Any], key: Array) -> tuple[Terms, Terms]:
        segments = first_of_segment(batch["is_first"])
        return tokenizer_loss(model, batch["frames"], key, segments=segments, distance=frozen)

    def batches(self, start: int, part: Part = ALONE) -> Iterator[dict[str, Any]]:
        for batch in _loader(self.full, self.config, self.dataset, part, 1).iterate(start):
            yield {"frames": batch["frames"], "is_first": batch["is_first"]}

    def evaluate(self, ema: Any, step: int) -> dict[str, float]:
        return {}


@dataclass
class DynamicsPhase:
    """Phase 1b: shortcut forcing on cached tokens (paper Eq 7, 8); the teacher is the EMA by default."""

    full: Config
    dataset: Dataset
    name: str = "dynamics"
    frozen: Any = None
    identity: str = ""
    start_from: Any = None
    terms: tuple[str, ...] = ("dynamics",)
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def config(self) -> PhaseConfig:
        return self.full.train.dynamics

    def init(self, key: Array, base: Any = None) -> Dynamics:
        return jax.jit(lambda k: Dynamics(self.full, k))(key)

    def loss(self, model: Dynamics, ema: Dynamics, frozen: Any, batch: dict[str, Any], key: Array):
        image, noise = jax.random.split(key)
        actions, segments = separate_images(
            image, batch_actions(batch), first_of_segment(batch["is_first"]), self.config.image_fraction
        )
        teacher = ema if self.full.dynamics.teacher == "ema" else model
        loss, metrics, _ = shortcut_forward(model, teacher, batch["latents"], actions, noise, segments=segments)
        return {"dynamics": loss}, metrics

    def batches(self, start: int, part: Part = ALONE) -> Iterator[dict[str, Any]]:
        for batch in _loader(self.full, self.config, self.dataset, part, 2).iterate(start):
            yield {name: batch[name] for name in ("latents", "actions", "present", "is_first")}

    def evaluate(self, ema: Any, step: int) -> dict[str, float]:
        return {}


@dataclass
class AgentPhase:
    """Phase 2: the whole world model is finetuned with task tokens; dynamics loss on the uniform half of the rows,
    behavioural cloning on the relevant half, reward and continue on all (paper Eq 9, section 4.1)."""

    full: Config
    dataset: Dataset
    dynamics: Dynamics
    name: str = "agent"
    frozen: Any = None
    identity: str = ""
    terms: tuple[str, ...] = ("dynamics", "policy", "reward", "continue")

    @property
    def config(self) -> PhaseConfig:
        return self.full.train.agent

    @property
    def weights(self) -> Mapping[str, float]:
        # The dynamics has learned its part: normalised, the rest of its loss is noise as large as the heads' signal.
        # With too small a weight the heads' losses spoil it: watch what is measured "after phase 2".
        return {"dynamics": self.full.agent.dynamics_weight}

    @property
    def start_from(self) -> Dynamics:
        return self.dynamics

    def init(self, key: Array, base: Dynamics | None = None) -> Agent:
        return jax.jit(lambda dynamics, k: Agent(self.full, dynamics, k))(base or self.dynamics, key)

    def loss(self, model: Agent, ema: Agent, frozen: Any, batch: dict[str, Any], key: Array):
        teacher = ema.dynamics if self.full.dynamics.teacher == "ema" else model.dynamics
        # Rounded down: where the share does not divide a long batch, the number of relevant rows varies by one.
        uniform = max(1, math.floor(batch["latents"].shape[0] * (1 - self.full.agent.relevant_fraction) + 1e-6))
        loss, metrics, h = shortcut_forward(
            model.dynamics,
            teacher,
            batch["latents"],
            batch_actions(batch),
            key,
            task=batch["task"],
            segments=first_of_segment(batch["is_first"]),
            rows=uniform,
        )
        assert h is not None
        terms, heads = agent_losses(
            model.policy, model.reward, model.cont, h, batch, event_weight=self.full.agent.event_weight
        )
        return {"dynamics": loss} | terms, metrics | heads

    def batches(self, start: int, part: Part = ALONE) -> Iterator[dict[str, Any]]:
        # Rows of the uniform half come first: the dynamics loss takes them by position.
        yield from _loader(self.full, self.config, self.dataset, part, 3, self.full.agent.relevant_fraction).iterate(
            start
        )

    def evaluate(self, ema: Any, step: int) -> dict[str, float]:
        return {}


@dataclass
class ImaginationPhase:
    """Phase 3: policy and value are trained on imagined rollouts; everything else is frozen (paper Eq 10, 11)."""

    full: Config
    dataset: Dataset
    agent: Agent
    name: str = "imagination"
    frozen: Any = field(init=False)
    identity: str = ""  # what is frozen was trained in this run
    terms: tuple[str, ...] = ("policy", "value")
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.frozen = {
            "dynamics": self.agent.dynamics,
            "reward": self.agent.reward,
            "cont": self.agent.cont,
            "prior": self.agent.policy,
        }

    @property
    def config(self) -> PhaseConfig:
        return self.full.train.imagination

    @property
    def start_from(self) -> PolicyHead:
        return self.agent.policy

    def init(self, key: Array, base: PolicyHead | None = None) -> ActorCritic:
        return jax.jit(lambda policy, k: ActorCritic(self.full, policy, k))(base or self.agent.policy, key)

    def loss(self, model: ActorCritic, ema: Any, frozen: Any, batch: dict[str, Any], key: Array):
        cfg = self.full.agent
        cut, roll = jax.random.split(key)
        # Frozen weights are cast and gathered once, in front of the rollout: on a pod each pass would gather them anew.
        dynamics = gathered(cast_once(frozen["dynamics"]))
        oracle = TransitionOracle(None, dynamics, frozen["reward"], frozen["cont"], steps=cfg.sample_steps)
        context, alive = cut_contexts(cut, batch, cfg.context)
        # PPO's proximal policy is the EMA: one step is made on a rollout, and to the trained policy all ratios are 1.
        behaviour = ema.policy if cfg.objective == "ppo" else model.policy
        rollout = jax.lax.stop_gradient(imagine(oracle, behaviour, context, roll, horizon=cfg.horizon))
        return imagination_losses(
            model.policy, model.value, frozen["prior"], rollout, cfg, alive=alive, behaviour=behaviour
        )

    def batches(self, start: int, part: Part = ALONE) -> Iterator[dict[str, Any]]:
        loader = _loader(self.full, self.config, self.dataset, part, 4, self.full.agent.relevant_fraction)
        names = ("latents", "actions", "present", "is_first", "is_last", "task")
        for batch in loader.iterate(start):
            yield {name: batch[name] for name in names}

    def evaluate(self, ema: Any, step: int) -> dict[str, float]:
        return {}


def cut_contexts(key: Array, batch: dict[str, Any], frames: int):
    """Draws one context of `frames` frames from each window of a batch; it ends before the last frame of an episode.

    Returns:
      (tokens [B, frames, N, C], actions, task [B, words], segments), and float [B]: 0 where no frame could be drawn.
    """
    length = batch["is_last"].shape[1]
    inside: Bool[Array, "B T"] = ~batch["is_last"] & (jnp.arange(length) >= frames - 1)
    score = jnp.where(inside, jax.random.uniform(key, inside.shape), -1.0)
    end = jnp.argmax(score, axis=1)
    index = jnp.maximum(end - frames + 1, 0)[:, None] + jnp.arange(frames)

    def take(x: Array) -> Array:
        return jax.vmap(lambda row, i: row[i])(jnp.asarray(x), index)

    actions = batch_actions(jax.tree.map(take, {"actions": batch["actions"], "present": batch["present"]}))
    segments = take(first_of_segment(batch["is_first"]))
    alive = jnp.any(inside, axis=1).astype(jnp.float32)
    return (take(batch["latents"]).astype(jnp.float32), actions, take(batch["task"])[:, -1], segments), alive
