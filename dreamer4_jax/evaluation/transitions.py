"""Asks the transition oracle what follows every state and action of a small world, and reads its frames back."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dreamer4_jax.data.store import Dataset
from dreamer4_jax.envs.frozenlake import StateDecoder
from dreamer4_jax.nn.transformer import first_of_segment
from dreamer4_jax.world.dynamics import Actions
from dreamer4_jax.world.oracle import TransitionOracle

STREAMS = 256  # asked at once


@dataclass(frozen=True)
class Play:
    """Recorded play, state by state: chunks of the training split of a dataset of one categorical component.

    Attributes:
      state: int [chunks, T], decoded from the frames.
      move: int32 [chunks, T], the action that led to each frame; `present` False where there was none.
      latents: [chunks, T, N, C]; reward, is_first, is_last, is_terminal: [chunks, T]; task: [chunks, T, words].
    """

    state: Int[np.ndarray, "n T"]
    move: Int[np.ndarray, "n T"]
    present: Bool[np.ndarray, "n T"]
    latents: Float[np.ndarray, "n T N C"]
    reward: Float[np.ndarray, "n T"]
    is_first: Bool[np.ndarray, "n T"]
    is_last: Bool[np.ndarray, "n T"]
    is_terminal: Bool[np.ndarray, "n T"]
    task: Int[np.ndarray, "n T words"]
    component: str

    @classmethod
    def read(cls, frames: Dataset, tokens: Dataset, decoder: StateDecoder) -> "Play":
        (component,) = frames.spec.actions
        shown, coded = ([data.chunk("train", i) for i in range(data.chunks("train"))] for data in (frames, tokens))
        stack = lambda chunks, name: np.stack([c[name] for c in chunks])
        names = ("latents", "reward", "is_first", "is_last", "is_terminal", "task")
        return cls(
            state=np.stack([decoder.decode(c["frames"])[:, 0, 0] for c in shown]),
            move=stack(coded, f"actions/{component.name}"),
            present=stack(coded, f"present/{component.name}"),
            component=component.name,
            **{name: stack(coded, name) for name in names},
        )

    def steps(self) -> dict[str, np.ndarray]:
        """The recorded steps inside the chunks, as arguments of `graph.from_samples`."""
        inside = ~self.is_first[:, 1:]
        return {
            "state": self.state[:, :-1][inside],
            "action": self.move[:, 1:][inside],
            "after": self.state[:, 1:][inside],
            "reward": self.reward[:, 1:][inside],
            "cont": 1.0 - self.is_terminal[:, 1:][inside],
        }

    def contexts(self, state: int, count: int, frames: int, rng: np.random.Generator):
        """`count` histories of `frames` frames, drawn with replacement, whose last frame shows `state` in an episode
        that goes on: (latents, move, present, task, segments), or None if there is none."""
        at = np.argwhere((self.state == state) & ~self.is_last & (np.arange(self.state.shape[1]) >= frames - 1))
        if not len(at):
            return None
        chunk, end = at[rng.integers(len(at), size=count)].T
        index = end[:, None] - frames + 1 + np.arange(frames)
        take = lambda x: x[chunk[:, None], index]
        segments = np.asarray(first_of_segment(take(self.is_first)))
        return take(self.latents), take(self.move), take(self.present), take(self.task)[:, -1], segments


@jax.jit
def query(oracle: TransitionOracle, context: Any, move: dict[str, Array], key: Array):
    """What follows `move` [B] after contexts (latents, moves, present, task, segments): the frames, uint8 [B, H, W, 3],
    rewards and probabilities that the episode goes on."""
    latents, before, present, task, segments = context
    look, step = jax.random.split(key)
    (name,) = move
    state = oracle.reset(
        latents.astype(jnp.float32), Actions({name: before}, {name: present}), task, look, segments=segments
    )
    _, seen = oracle.step(state, move, step)
    frame = jnp.round(oracle.decode(seen.z[:, None])[:, 0] * 255).astype(jnp.uint8)
    return frame, seen.reward, seen.cont


def ask(
    oracle: TransitionOracle, play: Play, decoder: StateDecoder, *, actions: int, samples: int, frames: int, seed: int
) -> dict[str, np.ndarray]:
    """Samples the oracle `samples` times from every recorded state and action; arguments of `graph.from_samples`.

    The history in front of a state is one that was played. A frame whose nearest picture is further away than half the
    distance of the two closest pictures is none of the states: it is counted as state ``len(decoder.names)``.

    Args:
      frames: length of the histories.
    """
    rng = np.random.default_rng(seed)
    states = len(decoder.names)
    out: dict[str, list[np.ndarray]] = {name: [] for name in ("state", "action", "after", "reward", "cont")}
    for state in range(states):
        context = play.contexts(state, samples * actions, frames, rng)
        if context is None:
            continue
        move = np.tile(np.arange(actions, dtype=np.int32), samples)
        for start in range(0, len(move), STREAMS):
            # The last piece is filled up with its own beginning, so that one program serves all.
            piece = np.resize(np.arange(start, min(start + STREAMS, len(move))), STREAMS)
            key = jax.random.fold_in(jax.random.key(seed), state * len(move) + start)
            chosen = {play.component: move[piece]}
            frame, reward, cont = map(np.asarray, query(oracle, [x[piece] for x in context], chosen, key))
            real = slice(0, min(STREAMS, len(move) - start))
            distance = decoder.distances(frame[real])
            after = np.where(distance.min(-1) <= decoder.nearest / 4, distance.argmin(-1), states)
            for name, values in zip(
                out, (np.full(len(after), state), move[piece][real], after, reward[real], cont[real]), strict=True
            ):
                out[name].append(values)
    return {name: np.concatenate(values) for name, values in out.items()}
