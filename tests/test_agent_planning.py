"""Search: it finds what is optimal in worlds that are known exactly, and branches from the world model rightly."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.agent import ValueHead, distribution
from dreamer4_jax.agent.branching import BranchingOracle
from dreamer4_jax.agent.model import Agent, WorldModelPolicy, readout_width
from dreamer4_jax.agent.planning import BestOfN, CrossEntropy, GumbelMuZero, SearchPolicy
from dreamer4_jax.config import ActionComponent, UserError
from dreamer4_jax.evaluation.closed_loop import evaluate_policy
from dreamer4_jax.evaluation.simulator import EnvCopies, clone
from dreamer4_jax.world import Dynamics, Tokenizer
from dreamer4_jax.world.oracle import TransitionOracle
from tests import small
from tests.toy_env import COMPONENT, ShowAction, toy_config

# ---------------------------------------------------------------------------------------------------------------------
# Exact worlds


@partial(jax.tree_util.register_dataclass, data_fields=["h"], meta_fields=[])
@dataclass(frozen=True)
class State:
    h: Any


@partial(jax.tree_util.register_dataclass, data_fields=["reward", "cont"], meta_fields=[])
@dataclass(frozen=True)
class Seen:
    reward: Any
    cont: Any


@dataclass(frozen=True)
class Chain:
    """Five states, begun in the middle: left, stay, right. The left end pays 0.1, the right end 1, both end."""

    streams: int
    pay = np.asarray([0.1, 0, 0, 0, 1.0], np.float32)
    best = 2
    value = 0.95  # two steps to the right at gamma 0.95: the second pays 1

    def start(self):
        return State(jnp.broadcast_to(jax.nn.one_hot(2, 5), (self.streams, 5)))

    def step(self, state, action, key):
        at = jnp.argmax(state.h, -1)
        ended = (at == 0) | (at == 4)
        after = jnp.where(ended, at, jnp.clip(at + action["move"] - 1, 0, 4))
        reward = jnp.where(ended, 0.0, jnp.asarray(self.pay)[after])
        cont = jnp.where((after == 0) | (after == 4), 0.0, 1.0)
        return State(jax.nn.one_hot(after, 5)), Seen(reward, cont)


@dataclass(frozen=True)
class Bandit:
    """One state, three actions worth 0, 0.3 and 1."""

    streams: int
    pay = np.asarray([0.0, 0.3, 1.0])

    def start(self):
        return State(jnp.zeros((self.streams, 1)))

    def step(self, state, action, key):
        return state, Seen(jnp.asarray(self.pay, jnp.float32)[action["move"]], jnp.zeros(state.h.shape[0]))


class Prior:
    """Prefers left, whatever it sees."""

    probs = np.asarray([0.6, 0.25, 0.15])
    components = (ActionComponent("move", "categorical", 3),)

    def next(self, h):
        logits = jnp.log(jnp.asarray(self.probs, jnp.float32))
        return distribution(jnp.broadcast_to(logits, (*h.shape[:-1], 3)), self.components)


class Worthless:
    def mean(self, h):
        return jnp.zeros(h.shape[:-1])


STREAMS = 4096


def plan(search, model, seed=0):
    return jax.jit(lambda key: search(model, Prior(), Worthless(), key))(jax.random.key(seed))


def shares(found):
    return np.bincount(np.asarray(found.action["move"]), minlength=3) / len(found.value)


SEARCHES = (
    BestOfN(128, horizon=4, gamma=0.95),
    CrossEntropy(512, rounds=4, horizon=4, elite=0.05, gamma=0.95),
    GumbelMuZero(128, depth=4, gamma=0.95),
)


@pytest.mark.parametrize("search", SEARCHES, ids=lambda s: type(s).__name__)
def test_every_search_finds_the_better_end_of_the_chain_in_the_true_model(search):
    found = plan(search, Chain(64))
    assert shares(found)[Chain.best] >= 0.95  # the prior goes right with 0.15
    value = np.asarray(found.value)[np.asarray(found.action["move"]) == Chain.best]
    assert (value <= Chain.value + 1e-5).all()  # nobody can do better in this world
    assert value.mean() > (0.6 if isinstance(search, GumbelMuZero) else 0.8)  # a tree's value averages what it tried
    assert found.action["move"].dtype == jnp.int32


@pytest.mark.parametrize("search", [BestOfN(1, horizon=3), GumbelMuZero(1)], ids=["BestOfN", "GumbelMuZero"])
def test_a_budget_of_one_is_the_prior(search):
    error = 4 * np.sqrt(Prior.probs * (1 - Prior.probs) / STREAMS)
    assert (np.abs(shares(plan(search, Chain(STREAMS))) - Prior.probs) < error).all()


@pytest.mark.parametrize("budget", [1, 2, 4, 16])
def test_best_of_n_earns_the_expected_largest_of_n_draws(budget):
    """E[max of n draws] = sum_v v (F(v)^n - F(v-)^n), which grows with n; the search believes what it gets."""
    found = plan(BestOfN(budget, horizon=1), Bandit(STREAMS))
    cumulated = np.cumsum(Prior.probs) ** budget
    expected = np.diff(np.concatenate([[0], cumulated]))  # actions are in the order of what they pay
    error = 4 * np.sqrt(expected * (1 - expected) / STREAMS) + 1e-9
    assert (np.abs(shares(found) - expected) <= error).all()
    np.testing.assert_allclose(found.value, Bandit.pay[np.asarray(found.action["move"])], atol=1e-6)


@pytest.mark.parametrize("kind", [BestOfN, CrossEntropy, GumbelMuZero])
def test_a_larger_budget_does_no_worse_than_a_smaller_one_or_the_prior(kind):
    limit = {"depth": 1} if kind is GumbelMuZero else {"horizon": 1}
    earned = [shares(plan(kind(budget, **limit), Bandit(STREAMS))) @ Bandit.pay for budget in (4, 16, 64)]
    error = 4 / np.sqrt(STREAMS)
    assert earned[0] > Prior.probs @ Bandit.pay + error
    assert all(later > earlier - error for earlier, later in zip(earned, earned[1:], strict=False))
    assert earned[-1] > 0.85


def test_the_cross_entropy_method_takes_every_kind_of_action():
    """Reward 1 - |x - 0.5| for a continuous value, and 1 for pressing the second of two keys alone."""
    parts = (ActionComponent("move", "continuous", 1), ActionComponent("keys", "binary", 2))

    class Target(Bandit):
        def step(self, state, action, key):
            keys = 1.0 * (action["keys"] == jnp.asarray([0, 1]))
            reward = 1.0 - jnp.abs(action["move"][:, 0] - 0.5) + keys.sum(-1)
            return state, Seen(reward, jnp.zeros(state.h.shape[0]))

    class Wide:
        def next(self, h):
            return distribution(jnp.broadcast_to(jnp.asarray([0.0, 1.0, 0.0, 0.0]), (*h.shape[:-1], 4)), parts)

    search = CrossEntropy(256, rounds=4, horizon=1)
    found = jax.jit(lambda key: search(Target(32), Wide(), Worthless(), key))(jax.random.key(0))
    np.testing.assert_array_equal(found.action["keys"], np.tile([0, 1], (32, 1)))
    np.testing.assert_allclose(found.action["move"][:, 0], 0.5, atol=0.15)
    with pytest.raises(UserError, match="tree search takes one categorical component"):
        GumbelMuZero(2)(Target(2), Wide(), Worthless(), jax.random.key(0))


def test_budgets_that_cannot_be_divided_are_refused():
    with pytest.raises(UserError, match="budget = 5"):
        CrossEntropy(5, rounds=2)


def test_the_frames_of_a_decision_are_counted():
    """The model is asked exactly `frames` times a decision, `dependent` times one after the other."""
    for search in (
        BestOfN(6, horizon=3),
        CrossEntropy(8, rounds=2, horizon=3),
        CrossEntropy(12, rounds=3, horizon=2),
        GumbelMuZero(5, depth=3),
    ):
        calls = []

        class Counted(Chain):
            def step(self, state, action, key, calls=calls):
                jax.debug.callback(lambda x: calls.append(len(x)), state.h)
                return super().step(state, action, key)

        jax.block_until_ready(plan(search, Counted(1)))
        jax.effects_barrier()
        assert (sum(calls), len(calls)) == (search.frames, search.dependent), search


# ---------------------------------------------------------------------------------------------------------------------
# The world model as a tree


@cache
def world(steps=2):
    cfg = small.config(**{"agent.hidden": 16, "agent.bins": 15, "agent.mtp": 1})
    agent = small.drawn(lambda key: Agent(cfg, Dynamics(cfg, key), key))
    value = small.drawn(lambda key: ValueHead(readout_width(cfg), cfg.agent, key))
    return cfg, TransitionOracle(None, agent.dynamics, agent.reward, agent.cont, steps=steps), agent.policy, value


def roots(oracle, batch=3):
    return oracle.reset(
        small.latents(batch, 4), small.moves(batch, 4), jnp.ones((batch, 2), jnp.int32), jax.random.key(5)
    )


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


def test_a_branch_is_what_the_oracle_would_have_written():
    """Frame by frame to the full depth, over a ring that has begun anew: states, rewards and histories are equal."""
    _, oracle, _, _ = world()
    state = jax.jit(roots)(oracle)
    tree = BranchingOracle(oracle, state, depth=3)
    branch = tree.start()
    straight, below = jax.jit(oracle.step), jax.jit(tree.step)
    for t in range(3):
        action, key = {"move": jnp.asarray([t, 1, 2 - t])}, jax.random.key(t)
        state, seen = straight(state, action, key)
        branch, also = below(branch, action, key)
        close(seen, also)
        close(state, tree.state(branch))
    # The window is 3 frames: the same with a shorter path in a ring that still holds frames of the root.
    np.testing.assert_array_equal(branch.length, [3, 3, 3])


def test_branches_of_other_streams_may_stand_in_any_order():
    _, oracle, _, _ = world()
    tree = BranchingOracle(oracle, jax.jit(roots)(oracle), depth=2)
    order = jnp.asarray([2, 0, 0, 1])
    start = tree.start()
    mixed = jax.tree.map(lambda x: x[order], start)
    close(jax.tree.map(lambda x: x[:, order] if x.ndim == 6 else x[order], tree.state(start)), tree.state(mixed))


def test_a_node_costs_its_depth_and_not_the_window():
    _, oracle, _, _ = world()
    state = jax.eval_shape(roots, oracle)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    branch = jax.eval_shape(lambda s: BranchingOracle(oracle, s, depth=1).start(), state)
    assert size((branch.k, branch.v)) * 3 == size((state.cache.k, state.cache.v))
    with pytest.raises(UserError, match="search depth = 4: must be from 1 to dynamics.transformer.window = 3"):
        BranchingOracle(oracle, state, depth=4)


@pytest.mark.parametrize(
    "search",
    [BestOfN(2, horizon=2), CrossEntropy(4, horizon=2), GumbelMuZero(4, depth=3)],
    ids=lambda s: type(s).__name__,
)
def test_a_search_of_the_world_model_gives_finite_plans_that_its_key_decides(search):
    _, oracle, policy, value = world()

    @jax.jit
    def run(oracle, policy, value, state, key):
        return search(BranchingOracle(oracle, state, search.depth), policy, value, key)

    state = jax.jit(roots)(oracle)
    first, again, other = (run(oracle, policy, value, state, jax.random.key(k)) for k in (0, 0, 1))
    assert first.action["move"].shape == first.value.shape == (3,)
    assert ((first.action["move"] >= 0) & (first.action["move"] < small.MOVES)).all()
    assert np.isfinite(first.value).all()
    close(first, again)
    assert (np.asarray(first.value) != np.asarray(other.value)).any()


# ---------------------------------------------------------------------------------------------------------------------
# Acting


@cache
def player():
    net = dict(layers=2, width=16, heads=2, kv_heads=2, head_dim=8, ffn=16, time_every=2, window=4)
    flat = dict(net, layers=1, time_every=0)
    cfg = toy_config(
        **{
            "tokenizer": {"height": 16, "width": 16, "patch": 8, "latents": 4, "channels": 4, "pack": 1}
            | {"encoder": flat, "decoder": flat},
            "dynamics": {"transformer": net, "registers": 0, "k_max": 4},
            "agent.hidden": 16,
            "agent.bins": 15,
            "agent.mtp": 1,
        }
    )
    tokenizer = small.drawn(lambda key: Tokenizer(cfg.tokenizer, key))
    agent = small.drawn(lambda key: Agent(cfg, Dynamics(cfg, key), key))
    value = jax.jit(lambda key: ValueHead(readout_width(cfg), cfg.agent, key))(jax.random.key(0))  # 0 everywhere
    return TransitionOracle(tokenizer, agent.dynamics, agent.reward, agent.cont, steps=1), agent.policy, value


def play(policy, episodes=3):
    return evaluate_policy(policy, lambda level: ShowAction(), ["toy"], episodes=episodes, envs=2, seed=0)


def test_search_in_copies_of_the_real_environment_finds_what_pays():
    """Action 2 pays 1 at once and 4 ends: with the true model 9 steps pay 9, whatever the world model thinks."""
    oracle, policy, value = player()
    searcher = SearchPolicy(oracle, policy, value, BestOfN(32, horizon=1), real=EnvCopies(16, 16))
    result = play(searcher)
    np.testing.assert_array_equal(result.returns, [9, 9, 9])
    np.testing.assert_array_equal(searcher.believed, [1, 1, 1])  # the best of one step, for every episode
    tree = SearchPolicy(oracle, policy, value, GumbelMuZero(32, depth=2), real=EnvCopies(16, 16))
    assert play(tree).returns.mean() > 5


def test_a_policy_that_searches_plays_every_episode_and_says_what_it_believes():
    oracle, policy, value = player()
    searcher = SearchPolicy(oracle, policy, value, GumbelMuZero(3, depth=2), name="tree")
    result = play(searcher)
    assert result.policy == "tree" and len(searcher.believed) == 3 and np.isfinite(searcher.believed).all()


def test_what_is_seen_does_not_depend_on_the_search():
    """The same keys and actions: the history that a search policy has seen is the acting policy's."""
    oracle, policy, value = player()
    plain = WorldModelPolicy(oracle.tokenizer, oracle.dynamics, policy)
    search = SearchPolicy(oracle, policy, value, BestOfN(1, horizon=1))
    images, tasks = np.full((2, 16, 16, 3), 99, np.uint8), np.ones((2, 3), np.int32)
    plain.act(images, tasks), search.act(images, tasks)
    close(plain._memory.dynamics, search._memory.dynamics)


def test_a_copy_of_an_environment_goes_its_own_way():
    env = ShowAction()
    env.reset(seed=3)
    other = clone(env, 0)
    other.step(4)
    assert env._last == -1 and other._last == 4 and other.np_random is not env.np_random
    copies = EnvCopies(16, 16)
    copies.roots = {0: env}
    copies.restart()
    node, paid = np.zeros(1, np.int32), []
    for action in (2, 4, 2):
        _, reward, cont, node = copies._step(node, {COMPONENT.name: np.asarray([action])})
        paid.append((float(reward[0]), float(cont[0])))
    assert paid == [(1.0, 1.0), (0.0, 0.0), (0.0, 0.0)]  # nothing follows an end
