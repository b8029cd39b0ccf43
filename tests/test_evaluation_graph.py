"""Tables of Markov decision processes: read, estimated, compared and solved, against values worked out by hand."""

import numpy as np
import pytest

from dreamer4_jax.envs import frozenlake
from dreamer4_jax.evaluation.graph import (
    Mdp,
    edges,
    from_samples,
    from_table,
    policy_value,
    precision_recall,
    return_within,
    sampling_floor,
    total_variation,
    value_iteration,
    widen,
)

# From 0, action 0 stays with probability 1/2 and otherwise ends in 2 with reward 1; action 1 goes to 1, which is worth
# 0.6 at once by either action. State 2 is terminal.
P = np.zeros((3, 2, 3))
P[0, 0] = [0.5, 0, 0.5]
P[0, 1] = [0, 1, 0]
P[1, :, 2] = 1
R = np.asarray([[0.5, 0], [0.6, 0.6], [0, 0]])
CONT = np.ones((3, 2, 3))
CONT[:, :, 2] = 0
TOY = Mdp(P, R, CONT)


def test_values_of_a_process_solved_by_hand():
    # V(0) = max(0.5 + 0.5 g V(0), g 0.6) = 0.5 / (1 - 0.5 g) at g = 0.9: 0.909.. > 0.54.
    value, policy = value_iteration(TOY, 0.9)
    np.testing.assert_allclose(value, [0.5 / 0.55, 0.6, 0], atol=1e-9)
    np.testing.assert_array_equal(policy, [0, 0, 0])
    np.testing.assert_allclose(policy_value(TOY, policy, 0.9), value, atol=1e-9)
    np.testing.assert_allclose(policy_value(TOY, np.asarray([1, 0, 0]), 0.9), [0.54, 0.6, 0])
    # Within n steps, action 0 arrives with probability 1 - 2^-n.
    for steps in range(4):
        assert return_within(TOY, policy, steps)[0] == pytest.approx(1 - 0.5**steps)
    np.testing.assert_array_equal(TOY.terminal, [False, False, True])
    with pytest.raises(ValueError, match="gamma = 1"):
        value_iteration(TOY, 1.0)


def test_a_process_with_further_states_is_the_same_process():
    wide = widen(TOY, 2)
    assert wide.transition.shape == wide.cont.shape == (5, 2, 5) and wide.reward.shape == (5, 2)
    np.testing.assert_allclose(value_iteration(wide, 0.9)[0], [*value_iteration(TOY, 0.9)[0], 0, 0])


def test_a_continue_of_zero_cuts_the_value_of_what_follows():
    value, _ = value_iteration(Mdp(P, R, 0 * CONT), 0.9)
    np.testing.assert_allclose(value, [0.5, 0.6, 0])


def test_samples_give_frequencies_means_and_counts():
    state, action = np.asarray([0, 0, 0, 0, 1]), np.asarray([0, 0, 0, 0, 1])
    after, reward = np.asarray([0, 2, 2, 2, 2]), np.asarray([0, 1, 1, 0, 0.6])
    mdp, n = from_samples(state, action, after, reward, np.asarray([1, 0, 0.5, 0.25, 0]), states=3, actions=2)
    np.testing.assert_allclose(mdp.transition[0, 0], [0.25, 0, 0.75])
    np.testing.assert_allclose(mdp.reward, [[0.5, 0], [0, 0.6], [0, 0]])
    np.testing.assert_allclose(mdp.cont[0, 0], [1, 0, 0.25])
    np.testing.assert_array_equal(n, [[4, 0], [0, 1], [0, 0]])
    assert not mdp.transition[0, 1].any()  # never asked


def test_precision_and_recall_of_edges():
    found = P.copy()
    found[0, 0] = [0.45, 0.1, 0.45]  # one edge invented
    found[1, 1] = 0  # one missed
    got = precision_recall(edges(TOY, 0), edges(Mdp(found, R, CONT), 0.05))
    assert got == {"found": 4, "invented": 1, "missed": 1, "precision": 0.8, "recall": 0.8}
    assert precision_recall(edges(TOY, 0), edges(Mdp(found, R, CONT), 0.2))["precision"] == 1.0
    assert edges(TOY, 0).sum() == 5  # a probability of 0 is no edge, whatever the threshold


def test_total_variation_and_the_floor_of_sampling():
    assert total_variation(np.asarray([1.0, 0]), np.asarray([0, 1.0])) == 1
    assert total_variation(np.asarray([0.5, 0.5]), np.asarray([0.25, 0.75])) == 0.25
    # Of n flips of a fair coin: E|X/n - 1/2| exactly, from the binomial.
    from math import comb

    n = 10
    exact = sum(comb(n, k) * abs(k / n - 0.5) for k in range(n + 1)) / 2**n
    floor = sampling_floor(np.asarray([[0.5, 0.5], [1.0, 0.0]]), np.asarray([n, n]), draws=4000)
    assert floor.shape == (4000, 2)
    assert floor[:, 0].mean() == pytest.approx(exact, abs=4 * floor[:, 0].std() / 4000**0.5)
    assert not floor[:, 1].any()  # nothing to miss where there is one outcome


def test_frozen_lake_is_solved_as_it_is_known_to_be():
    """The optimal policy of the slippery 4 x 4 lake reaches the goal with probability 0.8235 = 14/17."""
    group = frozenlake.classes("FrozenLake-v1", 64, 64)
    lake = from_table(frozenlake.table("FrozenLake-v1"), group)
    assert lake.transition.shape == (13, 4, 13)
    np.testing.assert_allclose(lake.transition.sum(-1)[~lake.terminal], 1)
    assert lake.terminal.sum() == 2  # the holes, one class, and the goal
    _, policy = value_iteration(lake, 0.9999)
    assert policy_value(lake, policy, 1 - 1e-9)[0] == pytest.approx(14 / 17, abs=1e-3)
    # Brute force over the raw table, without classes: the same value at a discount.
    raw, value = frozenlake.table("FrozenLake-v1"), np.zeros(16)
    for _ in range(3000):
        value = np.asarray(
            [max(sum(p * (r + 0.95 * value[t] * (not e)) for p, t, r, e in raw[s][a]) for a in raw[s]) for s in raw]
        )
    np.testing.assert_allclose(value_iteration(lake, 0.95)[0][group], value, atol=1e-8)


def test_states_that_look_alike_must_behave_alike():
    table = {0: {0: [(1.0, 1, 0.0, False)]}, 1: {0: [(1.0, 2, 1.0, True)]}, 2: {0: [(1.0, 2, 0.0, True)]}}
    with pytest.raises(ValueError, match="state 1"):
        from_table(table, np.asarray([0, 0, 1]))
    mdp = from_table(table, np.asarray([0, 1, 2]))
    np.testing.assert_array_equal(mdp.transition[:, 0], [[0, 1, 0], [0, 0, 1], [0, 0, 0]])
    assert mdp.cont[0, 0, 1] == 1 and mdp.cont[1, 0, 2] == 0
