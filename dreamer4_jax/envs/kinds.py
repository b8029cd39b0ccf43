"""The kinds of real environment (`env.kind`): how one is made, acted in, and read off its frames.

A kind is a module of this package with

    VOCABULARY: int                                            word ids of its tasks
    actions(env_cfg) -> tuple[ActionComponent, ...]            of its levels, the same for all of them
    make(env_cfg, level, *, height, width, words) -> Env       `make` below says what an environment is like

It is imported when it is used, for most need packages of an extra.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
from jaxtyping import Int, UInt8

from dreamer4_jax.config import ActionComponent, Config, EnvConfig, UserError


class Decoder(Protocol):
    """Reads the symbols of a game's state off its frames."""

    def decode(self, frames: UInt8[np.ndarray, "*batch H W 3"]) -> Int[np.ndarray, "*batch rows cols"]: ...


class Expert(Protocol):
    """Plays one episode of an environment, with privileged access to it.

    One that works towards something says what its last action was for in an attribute `subgoal`.
    """

    def act(self, taken: Any) -> Any:
        """The next action, as the environment takes it; `taken` is the last one, which may have been another's (None
        at first). Raises `ExpertFailure` where the expert does not know what to do."""


class ExpertFailure(Exception):
    """An expert met a state that it was not written for."""


@dataclass(frozen=True)
class Kind:
    """Attributes:
    name: as errors call it.
    module: its module of this package.
    expert: whether there is a scripted expert, for `data.bot`.
    prefixes: what the names of its levels begin with.
    level: the one that is meant where none is named.
    extra: of this package's, that installs what it needs.
    max_steps, words, burst: usual values of ``env.max_steps``, ``agent.task_words`` and ``data.burst``.
    """

    name: str
    module: str
    expert: bool
    prefixes: tuple[str, ...]
    level: str
    extra: str = ""
    max_steps: int = 1000
    words: int = 1
    burst: float = 0.25

    @property
    def code(self) -> Any:
        try:
            return importlib.import_module(f"dreamer4_jax.envs.{self.module}")
        except ModuleNotFoundError as error:
            if not self.extra or str(error.name).startswith("dreamer4_jax"):
                raise
            raise UserError(
                f"{self.name} needs the package {error.name!r}: pip install 'dreamer4_jax[{self.extra}]'"
            ) from None

    @property
    def vocabulary(self) -> int:
        return self.code.VOCABULARY

    def actions(self, env_cfg: EnvConfig) -> tuple[ActionComponent, ...]:
        """The action components of its levels."""
        return self.code.actions(env_cfg)


KINDS = {
    "babyai": Kind("BabyAI", "babyai", True, ("BabyAI-",), "BabyAI-GoToLocal-v0", max_steps=32, words=12),
    "frozenlake": Kind("FrozenLake", "frozenlake", False, ("FrozenLake",), "FrozenLake-v1", max_steps=100),
    "control": Kind("Continuous control", "control", True, ("Pendulum-", "CarRacing-", "ball_in_cup-"), "Pendulum-v1"),
    # One slip may be the last in Crafter: half a percent of the steps begins a burst.
    "crafter": Kind("Crafter", "crafter", True, ("Crafter",), "Crafter", "crafter", burst=0.005),
    "atari": Kind("Atari", "atari", False, ("ALE/",), "ALE/Breakout-v5", "atari"),
    "minatar": Kind("MinAtar", "minatar", False, ("MinAtar/",), "MinAtar/Breakout-v0", "minatar"),
    "vizdoom": Kind("ViZDoom", "vizdoom", True, ("ViZDoom/",), "ViZDoom/basic", "vizdoom"),
}


def find(name: str) -> tuple[str, tuple[str, ...]]:
    """(kind, levels) of what people name an environment by: a kind, or levels of one kind with commas between."""
    if name in KINDS:
        return name, (KINDS[name].level,)
    levels = tuple(name.split(","))
    for key, kind in KINDS.items():
        if all(level.startswith(kind.prefixes) for level in levels):
            return key, levels
    known = ", ".join(f"{key} ({kind.level})" for key, kind in KINDS.items())
    raise UserError(
        f"unknown environment {name!r}: choose a kind, for the level in brackets, or levels of one: {known}"
    )


def make(env_cfg: EnvConfig, level: str, *, height: int, width: int, words: int) -> gymnasium.Env:
    """Builds a level.

    Observations are ``{"image": uint8 [height, width, 3], "task": int32 [words]}``, actions those of `envs.spaces`.
    ``info["mission"]`` of `reset` is the task in words, ``info["events"]`` names what a step brought about. The last
    step of an episode has ``info["success"]`` where the environment says what success is. The environment's own method
    `random_action(rng)` draws an aimless action, and `expert(rng)`, where there is one, makes an `Expert` for the
    episode that begins. Where chance is not drawn from ``env.unwrapped.np_random``, a method `reseed(seed)` gives what
    is drawn from another seed (`evaluation.simulator.clone`).
    """
    if env_cfg.kind == "none":
        raise UserError("env.kind = 'none': there is recorded data and no environment to play in")
    return KINDS[env_cfg.kind].code.make(env_cfg, level, height=height, width=width, words=words)


def decoder(config: Config) -> Decoder | None:
    """The decoder of a config's frames; None where their symbols are not known."""
    if config.env.kind == "babyai":
        from dreamer4_jax.envs.symbols import SymbolDecoder

        return SymbolDecoder(config.env.tile, config.env.view)
    if config.env.kind == "frozenlake":
        from dreamer4_jax.envs.frozenlake import StateDecoder

        return StateDecoder(config.env.levels[0], config.tokenizer.height, config.tokenizer.width)
    return None
