"""A BabyAI room as a graph: its states, its kinds of edges, and an oracle that knows all of them but one."""

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.config import preset
from dreamer4_jax.envs import babyai
from dreamer4_jax.envs.symbols import SymbolDecoder
from dreamer4_jax.evaluation.graph import edges, from_samples, precision_recall, return_within, value_iteration, widen
from dreamer4_jax.evaluation.rooms import KINDS, ask, explore
from experiments.room_graph import score

LEVEL = "BabyAI-GoToObj-v0"


@pytest.fixture(scope="module")
def decoder():
    return SymbolDecoder(8)


@pytest.fixture(scope="module")
def room(decoder):
    config = preset("tiny", **{"env.levels": LEVEL, "env.max_steps": 24})
    return explore(babyai.make(config.env, LEVEL, height=64, width=64, words=9), LEVEL, 5, decoder)


def test_every_free_place_and_direction_is_a_state(room):
    inside = 6 * 6 - 1  # of 8 x 8 tiles the border is wall, and one object stands inside
    assert len({(x, y) for x, y, _ in room.place.tolist()}) == inside
    assert room.states == 4 * inside == len({tuple(p) for p in room.place.tolist()})


def test_moves_are_those_of_the_game(room):
    """Written from the rules: turns change the direction alone, a walk moves one tile ahead or not at all."""
    ahead = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    number = {tuple(p): i for i, p in enumerate(room.place.tolist())}
    for s in np.flatnonzero(~room.true.terminal):
        x, y, d = room.place[s]
        left, right, walk = room.true.transition[s].argmax(-1)
        assert left == number[x, y, (d - 1) % 4] and right == number[x, y, (d + 1) % 4]
        assert walk == number.get((x + ahead[d][0], y + ahead[d][1], d), s)
    np.testing.assert_array_equal(
        room.true.transition.sum(-1), np.where(room.true.terminal, 0, 1)[:, None] * np.ones(3)
    )


def test_the_mission_ends_in_front_of_the_object_and_can_be_done_from_everywhere(room):
    ended = room.true.terminal
    assert 1 <= ended.sum() <= 4  # one for each free side of the object
    kinds = room.kinds
    assert (kinds[ended] == -1).all() and set(kinds[~ended].reshape(-1)) == set(range(len(KINDS)))
    arrive = kinds == KINDS.index("arrive")
    assert (room.true.reward[arrive] == 1).all() and room.true.reward[~arrive].sum() == 0
    _, plan = value_iteration(room.true, 0.95)
    np.testing.assert_allclose(return_within(room.true, plan, 24)[~ended], 1.0)


@partial(jax.tree_util.register_dataclass, data_fields=["frames", "after", "reward"], meta_fields=[])
@dataclass(frozen=True)
class Table:
    """An oracle that looks its answers up: pixels are its tokens."""

    frames: Any  # [S + 1, P]; the last one shows no state
    after: Any  # [S, 3]
    reward: Any

    class tokenizer:  # noqa: N801
        @staticmethod
        def encode(frames):
            return frames.reshape(*frames.shape[:2], 1, -1) / 255.0

    dynamics = SimpleNamespace(cfg=SimpleNamespace(actions=(SimpleNamespace(name="move"),)))

    def reset(self, context, actions, task, key, *, segments):
        assert context.shape[1] == 1 and not actions.present["move"].shape[1:] == ()
        return jnp.argmin(jnp.abs(context[:, 0] - self.frames[None, :]).sum(-1), -1)

    def step(self, state, action, key):
        after = self.after[state, action["move"]]
        gain = self.reward[state, action["move"]]
        return after, SimpleNamespace(z=self.frames[after][:, None], reward=gain, cont=1.0 - gain)

    def decode(self, z):
        return z.reshape(*z.shape[:2], 64, 64, 3)


def table(room, after):
    flat = np.concatenate([room.frames.reshape(room.states, -1), np.zeros((1, 64 * 64 * 3), np.uint8)]) / 255.0
    return Table(jnp.asarray(flat, jnp.float32), jnp.asarray(after), jnp.asarray(room.true.reward, jnp.float32))


def test_an_oracle_that_knows_the_room_is_its_graph(room, decoder):
    found = ask(table(room, room.true.transition.argmax(-1)), room, decoder, samples=2, seed=0)
    learned, count = from_samples(**found, states=room.states + 1, actions=3)
    true = widen(room.true, 1)
    np.testing.assert_array_equal(learned.transition, true.transition)
    np.testing.assert_allclose(learned.reward, true.reward)
    assert (count[: room.states] == np.where(room.true.terminal, 0, 2)[:, None]).all()
    row = score(room, learned, 24)
    assert row["plan"] == row["best"] == 1.0 and row["invented"] == row["missed"] == row["rewards_missed"] == 0
    assert row["right"] == dict.fromkeys(KINDS, 1.0)


def test_an_edge_that_it_has_wrong_is_missed_and_another_invented(room, decoder):
    after = room.true.transition.argmax(-1)
    walk = KINDS.index("walk")
    first, second = np.argwhere(room.kinds == walk)[:2]
    after[tuple(first)] = first[0]  # stays
    after[tuple(second)] = room.states  # shows no state at all
    found = ask(table(room, after), room, decoder, samples=1, seed=0)
    learned, _ = from_samples(**found, states=room.states + 1, actions=3)
    got = precision_recall(edges(widen(room.true, 1), 0), edges(learned, 0.5))
    assert (got["missed"], got["invented"]) == (2, 2)
    row = score(room, learned, 24)
    walks = (room.kinds == walk).sum()
    assert row["right"]["walk"] == pytest.approx(1 - 2 / walks) and row["right"]["turn"] == 1.0
    assert row["unrecognised"] == pytest.approx(1 / (3 * (~room.true.terminal).sum()))
