"""The trained world model behind the sessions: `world.streams.Streams` with a second opinion on every frame."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dreamer4_jax.agent.actions import ActionDistribution, distribution, logits_size
from dreamer4_jax.config import ActionComponent, Config
from dreamer4_jax.envs.symbols import SymbolDecoder
from dreamer4_jax.evaluation.metrics import psnr
from dreamer4_jax.evaluation.worldmodel import PSNR_CAP
from dreamer4_jax.inference import load_phase, load_world, read_config
from dreamer4_jax.play.catalogue import Start
from dreamer4_jax.play.view import Move, View
from dreamer4_jax.training.loop import model_path
from dreamer4_jax.world import adaptive
from dreamer4_jax.world.dynamics import Dynamics
from dreamer4_jax.world.oracle import one_frame
from dreamer4_jax.world.slots import Heads, Shown, StreamState, to_bytes
from dreamer4_jax.world.streams import Streams
from dreamer4_jax.world.tokenizer import Tokenizer

OTHER_SEED = 7919  # folded into a stream's key for the second opinion; `Streams` itself folds in ages alone


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["components"])
class _NoPolicy:
    """Stands for the policy of a run that has none yet; nothing of it is shown."""

    def __init__(self, components: tuple[ActionComponent, ...]):
        self.components = components

    def __call__(self, h: Array) -> ActionDistribution:
        return distribution(jnp.zeros((*h.shape[:-1], 1, logits_size(self.components))), self.components)


@jax.tree_util.register_static
class _NoScalar:
    """Stands for the reward and continue heads of a run that has none yet; nothing of it is shown."""

    def mean(self, h: Array) -> Array:
        return jnp.zeros(h.shape[:-1])

    prob = mean


@jax.jit
def _second(
    tokenizer: Tokenizer,
    dynamics: Dynamics,
    state: StreamState,
    actions: dict[str, Array],
    steps: Int[Array, " S"],
    tolerance: Float[Array, " S"],
) -> UInt8[Array, "S Y X 3"]:
    """The next frame of every stream, from another noise seed than the stream's own."""
    keys = jax.vmap(lambda key, age: jax.random.fold_in(jax.random.fold_in(key, OTHER_SEED), age))(state.key, state.age)
    z, _ = adaptive.denoise(dynamics, state.cache, one_frame(actions), keys, steps=steps, tolerance=tolerance)
    return to_bytes(tokenizer.decode_after(state.decoder, z)[0][:, 0])


@jax.jit
def _again(tokenizer: Tokenizer, frames: UInt8[Array, "S Y X 3"]) -> UInt8[Array, "S Y X 3"]:
    """Each frame through the tokenizer and back, as an image of its own."""
    return to_bytes(tokenizer.decode(tokenizer.encode(frames[:, None]))[:, 0])


class PlayWorld:
    """A world model with S slots, as the engine uses it (`engine.World`).

    Args:
      heads: None for a run whose agent has not been trained: then there are frames and nothing else.
      slots: people who play at once.
    """

    def __init__(self, tokenizer: Tokenizer, dynamics: Dynamics, heads: Heads | None, *, slots: int, context: int):
        cfg = dynamics.cfg
        self.slots, self.k_max, self.has_policy = slots, cfg.dynamics.k_max, heads is not None
        self._has_value = heads is not None and heads.value is not None
        nothing = _NoScalar()
        stand_in = Heads(nothing, nothing, _NoPolicy(cfg.actions))
        self._streams = Streams(tokenizer, dynamics, heads or stand_in, slots=slots, context=context)
        self._models = self._streams.models[:2]  # cast once, and held once
        self._state = self._streams.empty()

    def warm_up(self) -> None:
        """Compiles everything that play needs."""
        self._streams.warm_up()
        actions = self._streams.no_actions(self.slots)
        once, never = np.ones(self.slots, np.int32), np.full(self.slots, np.inf, np.float32)
        frames = _second(*self._models, self._state, actions, once, never)
        jax.block_until_ready(_again(self._models[0], frames))

    def start(self, slot: int, start: Start) -> View:
        self._state, shown = self._streams.join(
            self._state, slot, start.frames, start.actions, start.task, start.seed, present=start.present
        )
        return self._view(self._read(shown), slot, None, None)

    def step(self, moves: Mapping[int, Move]) -> dict[int, View]:
        actions = self._streams.no_actions(self.slots)
        advance, steps = np.zeros(self.slots, bool), np.ones(self.slots, np.int32)
        tolerance = np.full(self.slots, np.inf, np.float32)
        for slot, move in moves.items():
            advance[slot], steps[slot], tolerance[slot] = True, move.steps, move.tolerance
            for name, value in move.action.items():
                actions[name][slot] = value
        doubted = [slot for slot, move in moves.items() if move.doubt]
        other = again = None
        if doubted:  # before the step, which uses up the state
            asked, limit = np.ones(self.slots, np.int32), np.full(self.slots, np.inf, np.float32)
            asked[doubted], limit[doubted] = steps[doubted], tolerance[doubted]
            other = _second(*self._models, self._state, actions, asked, limit)
        self._state, shown = self._streams.step(self._state, actions, advance, steps, tolerance)
        if doubted:
            other, again = jax.device_get((other, _again(self._models[0], shown.frame)))
        values = self._read(shown)
        return {
            slot: self._view(values, slot, *((other, again) if move.doubt else (None, None)))
            for slot, move in moves.items()
        }

    def leave(self, slot: int) -> None:
        self._state = self._streams.leave(self._state, slot)

    @staticmethod
    def _read(shown: Shown) -> dict[str, Any]:
        names = ("frame", "reward", "cont", "value", "action", "intention", "passes")
        return jax.device_get({name: getattr(shown, name) for name in names})

    def _view(self, values: dict[str, Any], slot: int, other: np.ndarray | None, again: np.ndarray | None) -> View:
        """One slot's part, copied: a view would keep the whole batch in memory."""
        frame = values["frame"][slot].copy()
        doubt: dict[str, Any] = {
            "passes": int(values["passes"][slot]) or None,
            "other": None if other is None else other[slot].copy(),
            "again": None if again is None else again[slot].copy(),
        }
        if not self.has_policy:
            return View(frame, **doubt)
        return View(
            frame,
            reward=float(values["reward"][slot]),
            cont=float(values["cont"][slot]),
            value=float(values["value"][slot]) if self._has_value else None,
            plan={name: p[slot].copy() for name, p in values["intention"].items()},
            choice={name: a[slot].copy() for name, a in values["action"].items()},
            **doubt,
        )


def compare_frames(config: Config) -> Callable[[np.ndarray, np.ndarray], dict[str, Any]]:
    """(dream, real) -> how far apart they are: PSNR in dB, and where tiles are symbols the share that is right."""
    decoder = SymbolDecoder(config.env.tile, config.env.view) if config.env.kind == "babyai" else None

    def compare(dream: UInt8[np.ndarray, "H W 3"], real: UInt8[np.ndarray, "H W 3"]) -> dict[str, Any]:
        out: dict[str, Any] = {"psnr": round(min(float(psnr(dream, real)), PSNR_CAP), 1)}
        if decoder is not None:
            wrong = decoder.decode(dream) != decoder.decode(real)
            out |= {"right": round(1.0 - float(wrong.mean()), 4), "wrong": np.flatnonzero(wrong).tolist()}
        return out

    return compare


def open_world(run_dir: str | Path, *, slots: int) -> PlayWorld:
    """The newest model of a run: of its agent if that is trained, with the policy that imagination improved if there
    is one; of the world model alone otherwise."""
    config = read_config(run_dir)
    context = config.dynamics.transformer.window
    if model_path(run_dir, "agent").is_dir():
        world = load_world(run_dir)
        return PlayWorld(world.tokenizer, world.agent.dynamics, world.heads, slots=slots, context=context)
    tokenizer, dynamics = (load_phase(run_dir, config, name) for name in ("tokenizer", "dynamics"))
    return PlayWorld(tokenizer, dynamics, None, slots=slots, context=context)
