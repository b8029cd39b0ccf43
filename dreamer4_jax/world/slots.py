"""What S streams in one batch remember and show, and the pure functions that join them and make their next frame.

`streams.Streams` compiles them and checks what it is given; the gymnasium environments and the export use them as they
are.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from dreamer4_jax.nn import cache as ring
from dreamer4_jax.world import adaptive
from dreamer4_jax.world.dynamics import Actions, Dynamics
from dreamer4_jax.world.oracle import ContinueLike, RewardLike, one_frame
from dreamer4_jax.world.shortcut import denoise, observe
from dreamer4_jax.world.tokenizer import Tokenizer


class PolicyLike(Protocol):
    def __call__(self, h: Array) -> Any: ...


@partial(jax.tree_util.register_dataclass, data_fields=["reward", "cont", "policy", "value"], meta_fields=[])
@dataclass(frozen=True)
class Heads:
    """What is read off h. `value` is None before imagination training."""

    reward: RewardLike
    cont: ContinueLike
    policy: PolicyLike
    value: RewardLike | None = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "decoder", "z", "h", "frame", "task", "key", "age", "passes", "active"],
    meta_fields=[],
)
@dataclass(frozen=True)
class StreamState:
    """Everything that S streams remember.

    Attributes:
      cache: the dynamics' history, finished frames at the context level.
      decoder: history of the tokenizer's decoder.
      z: [S, N, C], clean tokens of the last frame.
      h: [S, D], agent read-out of the last frame.
      frame: uint8 [S, Y, X, 3], the last frame, decoded.
      task: int32 [S, words].
      key: typed keys [S], from the seed of each `join`.
      age: int32 [S], frames sampled since `join`.
      passes: int32 [S], sampling steps that the last frame took; 0 if it is of the context.
      active: bool [S], between `join` and `leave`.
    """

    cache: ring.Cache
    decoder: ring.Cache
    z: Float[Array, "S N C"]
    h: Float[Array, "S D"]
    frame: UInt8[Array, "S Y X 3"]
    task: Int[Array, "S words"]
    key: Array
    age: Int[Array, " S"]
    passes: Int[Array, " S"]
    active: Bool[Array, " S"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["frame", "reward", "cont", "value", "action", "greedy", "intention", "z", "h", "age", "passes"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Shown:
    """The newest frame of every slot and what is read off it, as device arrays. Slots that did not advance show what
    they showed before; slots that nobody has joined show nothing of meaning.

    Attributes:
      frame: uint8 [S, Y, X, 3].
      reward, cont, value: float32 [S]. reward and cont (probability that the episode goes on) came with the frame;
        value is the expected return from it on, NaN without a value head.
      action: component -> [S, ...], drawn by the policy for the next step; greedy: its mode.
      intention: component -> [S, M, A], probabilities of classes or keys (means, if continuous) of the next M actions.
      z: [S, N, C] clean tokens, h: [S, D] read-out, age: int32 [S] frames sampled since `join`.
      passes: int32 [S], sampling steps that the frame took; 0 if it is of the context.
    """

    frame: UInt8[Array, "S Y X 3"]
    reward: Float[Array, " S"]
    cont: Float[Array, " S"]
    value: Float[Array, " S"]
    action: dict[str, Array]
    greedy: dict[str, Array]
    intention: dict[str, Float[Array, "S M A"]]
    z: Float[Array, "S N C"]
    h: Float[Array, "S D"]
    age: Int[Array, " S"]
    passes: Int[Array, " S"]


Models = tuple[Tokenizer, Dynamics, Heads]


def to_bytes(video: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """[0, 1] to uint8, rounded."""
    return jnp.round(video * 255.0).astype(jnp.uint8)


def _keys(state: StreamState) -> tuple[Array, Array, Array]:
    """Keys [S] of the frame that each slot makes next: of its noise, of its noise as context, of the policy's draw."""
    split = jax.vmap(lambda key, age: jax.random.split(jax.random.fold_in(key, age), 3))(state.key, state.age)
    return split[:, 0], split[:, 1], split[:, 2]


def show(heads: Heads, state: StreamState) -> Shown:
    coming = heads.policy(state.h)  # [S, M]
    now = jax.tree.map(lambda x: x[:, 0], coming)
    drawn = jax.vmap(lambda part, key: part.sample(key))(now, _keys(state)[2])
    nothing = jnp.full(state.age.shape, jnp.nan, jnp.float32)
    return Shown(
        frame=state.frame,
        reward=heads.reward.mean(state.h),
        cont=heads.cont.prob(state.h),
        value=nothing if heads.value is None else heads.value.mean(state.h),
        action=drawn,
        greedy=now.mode(),
        intention=coming.intention(),
        z=state.z,
        h=state.h,
        age=state.age,
        passes=state.passes,
    )


def join_slots(
    models: Models,
    state: StreamState,
    slots: Int[Array, " R"],
    frames: UInt8[Array, "R T Y X 3"],
    actions: Actions,
    count: Int[Array, " R"],
    task: Int[Array, "R words"],
    seed: Array,
) -> tuple[StreamState, Shown]:
    """R slots begin streams; a slot number beyond the last is dropped.

    Args:
      count: of the T frames only the last `count` are context; those before them are filling, an episode of its own.
      seed: uint32 [R].
    """
    tokenizer, dynamics, heads = models
    rows, total = frames.shape[:2]
    segments = (jnp.arange(total) >= total - count[:, None]).astype(jnp.int32)
    keys = jax.vmap(lambda s: jax.random.split(jax.random.key(s)))(seed)
    z = tokenizer.encode(frames, segments=segments)
    words = jnp.broadcast_to(task[:, None], (rows, total, task.shape[-1]))
    cache, h = observe(dynamics, dynamics.init_cache(rows), z, actions, keys[:, 1], task=words, segments=segments)
    assert h is not None
    video, decoder = tokenizer.decode_after(tokenizer.init_cache(rows).decoder, z, segments=segments)

    def put(whole: Array, part: Any) -> Array:
        return whole.at[slots].set(part, mode="drop")

    state = StreamState(
        cache=ring.put(state.cache, slots, cache),
        decoder=ring.put(state.decoder, slots, decoder),
        z=put(state.z, z[:, -1]),
        h=put(state.h, h[:, -1]),
        frame=put(state.frame, to_bytes(video[:, -1])),
        task=put(state.task, task),
        key=put(state.key, keys[:, 0]),
        age=put(state.age, 0),
        passes=put(state.passes, 0),
        active=put(state.active, True),
    )
    return state, show(heads, state)


def step_slots(
    models: Models,
    state: StreamState,
    actions: dict[str, Array],
    advance: Bool[Array, " S"],
    steps: Int[Array, " S"],
    tolerance: Float[Array, " S"] | None = None,
) -> tuple[StreamState, Shown]:
    """One frame in every active slot that `advance` marks, in as many passes as the most demanding of them takes, and
    one that writes the frames and reads h.

    Args:
      tolerance: refines the `steps` of each slot (`adaptive.denoise`); None for equal steps in a smaller program, which
        is no faster.
    """
    tokenizer, dynamics, heads = models
    go = advance & state.active
    noise, write, _ = _keys(state)
    led = one_frame(actions)
    # A slot that rests asks for one pass, so that it never makes the others wait.
    passes = jnp.where(go, steps, 1)
    if tolerance is None:
        z = denoise(dynamics, state.cache, led, noise, steps=passes)
    else:
        limit = jnp.where(go, tolerance, jnp.inf)
        z, passes = adaptive.denoise(dynamics, state.cache, led, noise, steps=passes, tolerance=limit)
    cache, h = observe(dynamics, state.cache, z, led, write, task=state.task[:, None], streams=go)
    assert h is not None
    video, decoder = tokenizer.decode_after(state.decoder, z, streams=go)

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(go.reshape(-1, *(1,) * (old.ndim - 1)), new.astype(old.dtype), old)

    state = StreamState(
        cache=cache,
        decoder=decoder,
        z=keep(z[:, 0], state.z),
        h=keep(h[:, 0], state.h),
        frame=keep(to_bytes(video[:, 0]), state.frame),
        task=state.task,
        key=state.key,
        age=state.age + go,
        passes=keep(passes, state.passes),
        active=state.active,
    )
    return state, show(heads, state)
