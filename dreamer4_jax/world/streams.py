"""Continuous batching: streams of different age in one batch, each joined, stepped, reset and ended on its own.

A slot's numbers are a function of its own context, seed and actions: what other slots do changes none of them. All
shapes are fixed, so nothing is compiled after the first `join`, `step` and `leave`, and a frame costs the same at any
age. Of S streams with different numbers of sampling steps each pass computes all: a batched pass costs an accelerator
about as much as that of one stream, and groups of changing size would compile anew.

A frame takes K passes and one more that writes it and reads reward, value and policy off it: whoever chooses the next
action, person or policy, has seen them. `shortcut.generate`, where all actions are known before, does without.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from dreamer4_jax.nn import cache as ring
from dreamer4_jax.world.dynamics import Actions, Dynamics
from dreamer4_jax.world.precision import cast_once
from dreamer4_jax.world.slots import Heads, Models, Shown, StreamState, join_slots, step_slots
from dreamer4_jax.world.tokenizer import Tokenizer

_join = jax.jit(join_slots, donate_argnums=1)
_step = jax.jit(step_slots, donate_argnums=1)


@partial(jax.jit, donate_argnums=0)
def _leave(state: StreamState, slot: Int[Array, ""]) -> StreamState:
    here = jnp.arange(len(state.active)) == slot

    def clear(x: Array) -> Array:
        return jnp.where(here.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros((), x.dtype), x)

    return StreamState(
        cache=ring.reset(state.cache, here),
        decoder=ring.reset(state.decoder, here),
        z=clear(state.z),
        h=clear(state.h),
        frame=clear(state.frame),
        task=clear(state.task),
        key=state.key,
        age=clear(state.age),
        passes=clear(state.passes),
        active=clear(state.active),
    )


class Streams:
    """`slots` streams in one batch. The state is passed in and out, and what is passed in is donated.

    Args:
      context: frames of context that a `join` computes; of longer ones the last count.
      dtype: "bfloat16" or "float32" for the transformers' products, instead of the config's. Either way the weights
        are cast once, here.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        dynamics: Dynamics,
        heads: Heads,
        *,
        slots: int,
        context: int | None = None,
        dtype: str | None = None,
    ):
        self.config = dynamics.cfg
        self.slots = slots
        self.context = self.config.agent.context if context is None else context
        for name, value in (("slots", slots), ("context", self.context)):
            if value < 1:
                raise ValueError(f"Streams({name}={value}): must be at least 1")
        models = cast_once(tokenizer, dtype), cast_once(dynamics, dtype), heads
        # Bound to a device from the start, as everything is that a jitted function returns: one program, not two.
        self._device = jax.local_devices()[0]
        self.models: Models = jax.device_put(models, self._device)

    def empty(self) -> StreamState:
        """The state in which no slot has been joined."""
        tokenizer, dynamics, _ = self.models
        c, s = self.config, self.slots
        t = c.tokenizer
        state = StreamState(
            cache=dynamics.init_cache(s),
            decoder=tokenizer.init_cache(s).decoder,
            z=jnp.zeros((s, t.tokens, t.token_channels), jnp.float32),
            h=jnp.zeros((s, c.dynamics.transformer.width * c.dynamics.agent_tokens), jnp.float32),
            frame=jnp.zeros((s, t.height, t.width, 3), jnp.uint8),
            task=jnp.zeros((s, c.agent.task_words), jnp.int32),
            key=jax.random.split(jax.random.key(0), s),
            age=jnp.zeros((s,), jnp.int32),
            passes=jnp.zeros((s,), jnp.int32),
            active=jnp.zeros((s,), bool),
        )
        return jax.device_put(state, self._device)

    def join(
        self,
        state: StreamState,
        slot: int,
        frames: UInt8[np.ndarray, "T Y X 3"],
        actions: Mapping[str, np.ndarray],
        task: Int[np.ndarray, " words"],
        seed: int,
        *,
        present: Mapping[str, np.ndarray] | None = None,
    ) -> tuple[StreamState, Shown]:
        """Starts, or starts anew, one slot from context frames. The other slots stay as they are, bit for bit.

        Args:
          actions: component -> [T, ...], the actions that led to the frames.
          present: component -> bool [T]; by default every action but that of the first frame, which begins an episode.
          seed: of the stream's noise and of the policy's draws.
        """
        self._check_slot(slot)
        t, total = self.config.tokenizer, self.context
        frames = np.asarray(frames)
        if frames.ndim != 4 or not len(frames) or frames.shape[1:] != (t.height, t.width, 3):
            raise ValueError(f"frames {frames.shape}: must be [T, {t.height}, {t.width}, 3] with T at least 1")
        if frames.dtype != np.uint8:
            raise ValueError(f"frames are {frames.dtype}: must be uint8")
        length, count = len(frames), min(len(frames), total)
        given = self._actions(actions, length)
        if present is None:
            present = {name: np.arange(length) > 0 for name in given}

        def fixed(x: np.ndarray) -> np.ndarray:
            out = np.zeros((total, *x.shape[1:]), x.dtype)
            out[total - count :] = x[length - count :]
            return out

        there = {}
        for name in given:
            flags = np.asarray(present[name], bool)
            if flags.shape != (length,):
                raise ValueError(f"present[{name!r}] {flags.shape}: must be one bool for each of the {length} frames")
            there[name] = fixed(flags)[None]
        words = np.asarray(task, np.int32)
        if words.shape != (self.config.agent.task_words,):
            raise ValueError(
                f"task {words.shape}: must have agent.task_words = {self.config.agent.task_words} word ids"
            )
        led = Actions({name: fixed(value)[None] for name, value in given.items()}, there)  # type: ignore[misc,arg-type]
        return _join(
            self.models,
            state,
            np.array([slot], np.int32),
            fixed(frames)[None],
            led,
            np.array([count], np.int32),
            words[None],
            np.array([seed % 2**32], np.uint32),
        )

    def leave(self, state: StreamState, slot: int) -> StreamState:
        """Ends a slot and forgets what it held. It rests until it is joined again."""
        self._check_slot(slot)
        return _leave(state, np.int32(slot))

    def step(
        self,
        state: StreamState,
        actions: Mapping[str, np.ndarray],
        advance: Bool[np.ndarray, " S"],
        steps: Int[np.ndarray, " S"] | int,
        tolerance: Float[np.ndarray, " S"] | float = np.inf,
    ) -> tuple[StreamState, Shown]:
        """Makes one frame in every joined slot that `advance` marks; the others stay as they are, bit for bit.

        Args:
          actions: component -> [S, ...]; those of resting slots are ignored.
          steps: K of each slot, or of all: a power of two up to dynamics.k_max. The call takes as many passes as the
            largest of those that advance, and one more, which writes the frames and reads h.
          tolerance: of each slot, or of all: a slot's steps are halved where the frame that they lead to would differ
            by more than this (`adaptive.difference`); infinite for `steps` equal ones.
        """
        go = np.asarray(advance)
        if go.shape != (self.slots,) or go.dtype != bool:
            raise ValueError(f"advance {go.dtype}{list(go.shape)}: must be one bool for each of the {self.slots} slots")
        k = np.broadcast_to(np.asarray(steps, np.int32), (self.slots,))
        k_max = self.config.dynamics.k_max
        wrong = k[go & ((k < 1) | (k > k_max) | (k & (k - 1) != 0))]
        if len(wrong):
            raise ValueError(f"steps = {wrong[0]}: must be a power of two up to dynamics.k_max = {k_max}")
        limit = np.broadcast_to(np.asarray(tolerance, np.float32), (self.slots,))
        if not (limit >= 0).all():
            raise ValueError(f"tolerance = {limit[~(limit >= 0)][0]:g}: must be at least 0")
        return _step(self.models, state, self._actions(actions, self.slots), go, k, limit)

    def warm_up(self) -> None:
        """Compiles everything, so that the first stream waits for nothing."""
        t, c = self.config.tokenizer, self.config
        frames, task = np.zeros((1, t.height, t.width, 3), np.uint8), np.zeros(c.agent.task_words, np.int32)
        state, shown = self.join(self.empty(), 0, frames, self.no_actions(1), task, 0)
        state, shown = self.step(state, self.no_actions(self.slots), np.ones(self.slots, bool), 1)
        jax.block_until_ready(self.leave(state, 0))

    def no_actions(self, count: int) -> dict[str, np.ndarray]:
        """Zeros in the shapes and types of `count` actions."""
        out = {}
        for part in self.config.actions:
            wide = (count,) if part.kind in ("categorical", "mouse") else (count, part.size)
            out[part.name] = np.zeros(wide, np.float32 if part.kind == "continuous" else np.int32)
        return out

    def _actions(self, actions: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        """The actions in the types that the programs were compiled for."""
        like = self.no_actions(count)
        if set(actions) != set(like):
            raise ValueError(f"actions {sorted(actions)}: must be the components {sorted(like)}")
        out = {}
        for name, wanted in like.items():
            value = np.asarray(actions[name])
            if value.shape != wanted.shape:
                raise ValueError(f"actions[{name!r}] {value.shape}: must be {wanted.shape}")
            out[name] = value.astype(wanted.dtype)
        return out

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot = {slot}: must be from 0 to {self.slots - 1}")
