"""Asking an oracle for a graph: with the true lake in its place, the true table comes out."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamer4_jax.envs.frozenlake import StateDecoder, classes, pictures, table
from dreamer4_jax.evaluation.graph import edges, from_samples, from_table, precision_recall, sampling_floor, widen
from dreamer4_jax.evaluation.graph import total_variation as distance
from dreamer4_jax.evaluation.transitions import Play, ask

LEVEL = "FrozenLake-v1"
TRUE = from_table(table(LEVEL), classes(LEVEL, 64, 64))
STATES = len(TRUE.reward)
DECODER = StateDecoder(LEVEL, 64, 64)


@partial(jax.tree_util.register_dataclass, data_fields=["at"], meta_fields=[])
@dataclass(frozen=True)
class At:
    at: Any


@partial(jax.tree_util.register_dataclass, data_fields=["z", "reward", "cont"], meta_fields=[])
@dataclass(frozen=True)
class Seen:
    z: Any
    reward: Any
    cont: Any


@partial(jax.tree_util.register_dataclass, data_fields=["table", "frames", "blank"], meta_fields=[])
@dataclass(frozen=True)
class Lake:
    """The true table; the tokens of a frame are the state, one-hot. With `blank` set, frames show nothing."""

    table: Any
    frames: Any
    blank: Any

    def reset(self, context, actions, task, key, *, segments=None):
        return At(jnp.argmax(context[:, -1, 0], -1))

    def step(self, state, action, key):
        logits = jnp.log(self.table[state.at, action["move"]])
        after = jax.random.categorical(key, logits)
        z = jax.nn.one_hot(after, STATES)[:, None]
        goal = (after == STATES - 1).astype(jnp.float32)
        return At(after), Seen(z, goal, 1.0 - goal)

    def decode(self, z):
        return jnp.where(self.blank, 0.0, self.frames[jnp.argmax(z[:, :, 0], -1)])


def play(frames=6, seed=0):
    """Chunks that visit every state that an episode goes on in."""
    rng = np.random.default_rng(seed)
    inner = np.flatnonzero(~TRUE.terminal)
    state = np.stack([rng.permutation(inner)[:frames] for _ in range(60)])
    none = np.zeros(state.shape, bool)
    first = none.copy()
    first[:, 0] = True
    latents = np.eye(STATES, dtype=np.float32)[state][:, :, None]
    move = rng.integers(0, 4, state.shape).astype(np.int32)
    task = np.ones((*state.shape, 1), np.int32)
    return Play(state, move, ~first, latents, 0.0 * state, first, none, none, task, "move")


def learned(blank, samples=128):
    frames = np.asarray(DECODER.templates, np.float32) / 255
    oracle = Lake(jnp.asarray(TRUE.transition, jnp.float32), jnp.asarray(frames), jnp.asarray(blank))
    asked = ask(oracle, play(), DECODER, actions=4, samples=samples, frames=3, seed=0)
    return from_samples(**asked, states=STATES + 1, actions=4)


def test_the_true_world_gives_its_own_graph_up_to_sampling():
    mdp, count = learned(False)
    true = widen(TRUE, 1)
    inner = ~true.terminal
    np.testing.assert_array_equal(count[inner], 128)
    assert not count[true.terminal].any()
    found = precision_recall(edges(true, 0)[inner], edges(mdp, 0.05)[inner])
    assert found["invented"] == found["missed"] == 0 and found["found"] == edges(true, 0).sum()
    floor = sampling_floor(true.transition[inner], count[inner]).mean((1, 2))
    assert abs(distance(mdp.transition, true.transition)[inner].mean() - floor.mean()) < 5 * floor.std()
    assert np.abs(mdp.reward - true.reward)[inner].max() < 0.2


def test_frames_that_show_no_state_are_counted_apart():
    mdp, _ = learned(True, samples=4)
    np.testing.assert_array_equal(mdp.transition[~widen(TRUE, 1).terminal][..., STATES], 1)


def test_contexts_end_at_the_state_inside_an_episode():
    recorded = play()
    latents, move, present, task, segments = recorded.contexts(3, 40, 3, np.random.default_rng(0))
    assert latents.shape == (40, 3, 1, STATES) and task.shape == (40, 1)
    assert (latents[:, -1, 0].argmax(-1) == 3).all() and move.shape == present.shape == segments.shape == (40, 3)
    assert recorded.contexts(STATES - 1, 4, 3, np.random.default_rng(0)) is None
    steps = recorded.steps()
    assert len(steps["state"]) == 60 * 5 and (steps["cont"] == 1).all()
    np.testing.assert_array_equal(steps["after"].reshape(60, 5), recorded.state[:, 1:])
    assert len(pictures(LEVEL, 64, 64)) == 16
