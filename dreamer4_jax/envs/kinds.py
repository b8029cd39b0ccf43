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
    """Plays one episode of an environment, with privileged access to it."""

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
    """

    name: str
    module: str
    expert: bool

    @property
    def code(self) -> Any:
        return importlib.import_module(f"dreamer4_jax.envs.{self.module}")

    @property
    def vocabulary(self) -> int:
        return self.code.VOCABULARY

    def actions(self, env_cfg: EnvConfig) -> tuple[ActionComponent, ...]:
        """The action components of its levels."""
        return self.code.actions(env_cfg)


KINDS = {
    "babyai": Kind("BabyAI", "babyai", expert=True),
    "frozenlake": Kind("FrozenLake", "frozenlake", expert=False),
    "control": Kind("Continuous control", "control", expert=True),
}


def make(env_cfg: EnvConfig, level: str, *, height: int, width: int, words: int) -> gymnasium.Env:
    """Builds a level.

    Observations are ``{"image": uint8 [height, width, 3], "task": int32 [words]}``, actions those of `envs.spaces`.
    ``info["mission"]`` of `reset` is the task in words. The last step of an episode has ``info["success"]`` where the
    environment says what success is. The environment's own method `random_action(rng)` draws an aimless action, and
    `expert(rng)`, where there is one, makes an `Expert` for the episode that begins.
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
