"""The kinds of real environment (`env.kind`): how one is made, acted in, and read off its frames."""

from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
from jaxtyping import Int, UInt8

from dreamer4_jax.config import Config, EnvConfig, UserError
from dreamer4_jax.envs import babyai, frozenlake
from dreamer4_jax.envs.symbols import SymbolDecoder


class Decoder(Protocol):
    """Reads the symbols of a game's state off its frames."""

    def decode(self, frames: UInt8[np.ndarray, "*batch H W 3"]) -> Int[np.ndarray, "*batch rows cols"]: ...


@dataclass(frozen=True)
class Kind:
    """Attributes:
    name: as errors call it.
    actions: classes of its one categorical component.
    vocabulary: word ids of its tasks.
    expert: whether the scripted expert, `data.bot`, knows it.
    """

    name: str
    actions: int
    vocabulary: int
    expert: bool


KINDS = {
    "babyai": Kind("BabyAI", len(babyai.RANDOM), babyai.VOCABULARY, expert=True),
    "frozenlake": Kind("FrozenLake", len(frozenlake.ACTIONS), frozenlake.VOCABULARY, expert=False),
}


def make(env_cfg: EnvConfig, level: str, *, height: int, width: int, words: int) -> gymnasium.Env:
    """Builds a level: observations ``{"image", "task"}``, and ``info["success"]`` with the last step of an episode."""
    if env_cfg.kind == "none":
        raise UserError("env.kind = 'none': there is recorded data and no environment to play in")
    module: Any = {"babyai": babyai, "frozenlake": frozenlake}[env_cfg.kind]
    return module.make(env_cfg, level, height=height, width=width, words=words)


def decoder(config: Config) -> Decoder | None:
    """The decoder of a config's frames; None where their symbols are not known."""
    if config.env.kind == "none":
        return None
    if config.env.kind == "babyai":
        return SymbolDecoder(config.env.tile, config.env.view)
    return frozenlake.StateDecoder(config.env.levels[0], config.tokenizer.height, config.tokenizer.width)
