"""Returns and policy objectives against the paper's equations and hand-made sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamer4_jax.agent import (
    awr_loss,
    distribution,
    filtered_bc_loss,
    lambda_returns,
    normalize,
    pmpo_loss,
    ppo_loss,
    reinforce_loss,
    winners,
)
from dreamer4_jax.config import ActionComponent
from tests import reference

LOGP = jnp.asarray([-1.0, -2.0, -0.5, -3.0])
KL = jnp.asarray([0.1, 0.2, 0.0, 0.5])
ADVANTAGE = jnp.asarray([1.0, -0.1, 0.0, -7.0])


jitted_returns, jitted_pmpo = jax.jit(lambda_returns), jax.jit(pmpo_loss)


def arrays(*items):
    return [jnp.asarray(x, jnp.float32) for x in items]


def test_returns_of_hand_made_sequences():
    """The reward of a step is its own; nothing flows back over a termination."""
    reward, value, cont = arrays([0, 1, 0, 2], [5, 5, 5, 5, 3], [1, 0, 1, 1])
    # lambda = 1: discounted sums, cut at the termination of step 1, then bootstrapped from the last value.
    np.testing.assert_allclose(
        lambda_returns(reward, value, cont, 0.5, 1.0), [0.5 * 1, 1, 0.5 * (2 + 0.5 * 3), 2 + 0.5 * 3]
    )
    # lambda = 0: one-step targets with the value of the next state.
    np.testing.assert_allclose(lambda_returns(reward, value, cont, 0.5, 0.0), [2.5, 1.0, 2.5, 2 + 1.5])
    # In between, by hand: R3 = 2 + .5 * 3, R2 = .5 (.5 * 5 + .5 R3), R1 = 1, R0 = .5 (.5 * 5 + .5 * 1).
    np.testing.assert_allclose(lambda_returns(reward, value, cont, 0.5, 0.5), [1.5, 1.0, 2.125, 3.5])


def test_returns_of_a_terminated_episode_ignore_all_later_values():
    reward, cont = arrays([0, 0, 1, 0, 0], [1, 1, 0, 1, 1])
    a = lambda_returns(reward, jnp.zeros(6), cont, 0.9, 0.95)
    b = lambda_returns(reward, jnp.asarray([0.0, 0, 0, 9, 9, 9]), cont, 0.9, 0.95)
    np.testing.assert_allclose(a[:3], b[:3])
    np.testing.assert_allclose(a[2], 1.0)
    assert float(jnp.abs(a[3:] - b[3:]).min()) > 0


@given(st.sampled_from([1, 2, 11]), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10_000))
def test_returns_match_the_explicit_recursion(frames, gamma, lam, seed):
    rng = np.random.default_rng(seed)
    reward, value = rng.normal(size=(frames, 2, 3)), rng.normal(size=(frames + 1, 2, 3))
    cont = (rng.random((frames, 2, 3)) < 0.7) * rng.random((frames, 2, 3))
    got = jitted_returns(*arrays(reward, value, cont), gamma, lam)
    assert got.shape == (frames, 2, 3)
    for b in np.ndindex(2, 3):
        at = (slice(None), *b)
        expected = reference.lambda_returns(reward[at], value[at], cont[at], gamma, lam)
        np.testing.assert_allclose(got[at], expected, rtol=1e-4, atol=1e-5)


def test_returns_want_one_more_value_than_rewards():
    with pytest.raises(ValueError, match="value has 3 states"):
        lambda_returns(jnp.zeros(3), jnp.zeros(3), jnp.ones(3), 0.9, 0.9)


@given(st.sampled_from([1, 2, 9]), st.floats(0, 1), st.floats(0, 2), st.integers(0, 10_000))
def test_pmpo_matches_equation_11(states, alpha, beta, seed):
    rng = np.random.default_rng(seed)
    logp, kl = -rng.exponential(size=states), rng.exponential(size=states)
    advantage = rng.normal(size=states) * (rng.random(states) < 0.8)  # some are exactly 0: they belong to D+
    got = jitted_pmpo(*arrays(logp, kl, advantage), alpha=alpha, beta=beta)
    assert got.shape == ()
    np.testing.assert_allclose(got, reference.pmpo(logp, kl, advantage, alpha, beta), rtol=1e-5, atol=1e-5)


def test_pmpo_takes_any_leading_shape():
    flat = pmpo_loss(LOGP, KL, ADVANTAGE)
    np.testing.assert_allclose(pmpo_loss(*(x.reshape(2, 2) for x in (LOGP, KL, ADVANTAGE))), flat, rtol=1e-6)


def test_pmpo_gradient_has_the_sign_of_the_advantage_and_its_size_only():
    gradient = jax.grad(pmpo_loss)(LOGP, KL, ADVANTAGE)
    # Descent raises the log-probability of good actions and lowers that of bad ones; sets are averaged apart.
    np.testing.assert_allclose(gradient, [-0.25, 0.25, -0.25, 0.25])
    unbalanced = jax.grad(pmpo_loss)(LOGP, KL, jnp.asarray([1.0, 1.0, 1.0, -1.0]), alpha=0.25)
    np.testing.assert_allclose(unbalanced, [-0.25 / 3] * 3 + [0.75], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(pmpo_loss)(LOGP, KL, 1e3 * ADVANTAGE), gradient)
    np.testing.assert_allclose(jax.grad(pmpo_loss, argnums=1)(LOGP, KL, ADVANTAGE), [0.3 / 4] * 4, rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(pmpo_loss, argnums=2)(LOGP, KL, ADVANTAGE), [0.0] * 4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_pmpo_empty_set_adds_nothing(sign):
    advantage = sign * jnp.ones(4)
    loss, gradient = jax.value_and_grad(pmpo_loss)(LOGP, KL, advantage)
    np.testing.assert_allclose(loss, -sign * 0.5 * LOGP.mean() + 0.3 * KL.mean(), rtol=1e-6)
    np.testing.assert_allclose(gradient, [-sign * 0.5 / 4] * 4)


def test_states_of_weight_zero_count_nothing_even_if_not_finite():
    keep = jnp.asarray([1.0, 1.0, 1.0, 0.0])
    broken = LOGP.at[3].set(-jnp.inf), KL.at[3].set(jnp.nan), ADVANTAGE

    def cloning(logp, kl, advantage, weight=None):
        return filtered_bc_loss(logp, kl, advantage > -1, weight=weight)

    for loss in (pmpo_loss, reinforce_loss, awr_loss, cloning):
        expected = loss(LOGP[:3], KL[:3], ADVANTAGE[:3])
        np.testing.assert_allclose(loss(*broken, weight=keep), expected, rtol=1e-6)
        gradient = jax.grad(loss)(*broken, weight=keep)
        np.testing.assert_allclose(gradient[:3], jax.grad(loss)(LOGP[:3], KL[:3], ADVANTAGE[:3]), rtol=1e-6)
        assert float(gradient[3]) == 0.0
        assert float(loss(LOGP, KL, ADVANTAGE, weight=jnp.zeros(4))) == 0.0


def test_weights_are_the_share_of_a_state_in_its_set():
    weight = jnp.asarray([2.0, 1.0, 1.0, 3.0])
    repeated = jnp.asarray([0, 0, 1, 2, 3, 3, 3])
    expected = pmpo_loss(LOGP[repeated], KL[repeated], ADVANTAGE[repeated])
    np.testing.assert_allclose(pmpo_loss(LOGP, KL, ADVANTAGE, weight=weight), expected, rtol=1e-6)
    assert not np.asarray(jax.grad(lambda w: pmpo_loss(LOGP, KL, ADVANTAGE, weight=w))(weight)).any()


def test_kl_is_of_the_policy_to_the_prior():
    """KL(policy || prior) punishes what the prior excludes, and hardly what the policy gives up."""
    component = (ActionComponent("move", "categorical", 3),)
    prior = distribution(jnp.log(jnp.asarray([0.499, 0.499, 0.002])), component)
    gives_up = distribution(jnp.log(jnp.asarray([0.996, 0.002, 0.002])), component)
    goes_out = distribution(jnp.log(jnp.asarray([0.25, 0.25, 0.5])), component)
    zero = jnp.zeros(1)

    def objective(policy):
        return float(pmpo_loss(zero, policy.kl(prior)[None], zero, beta=1.0))

    np.testing.assert_allclose(objective(gives_up), 0.996 * np.log(0.996 / 0.499) + 0.002 * np.log(0.002 / 0.499), 1e-4)
    assert objective(goes_out) > 3 * objective(gives_up)
    assert float(prior.kl(gives_up)) > float(prior.kl(goes_out))  # the other direction would rank them the other way


def test_reinforce():
    np.testing.assert_allclose(
        reinforce_loss(LOGP, KL, ADVANTAGE, beta=0.3), -(ADVANTAGE * LOGP).mean() + 0.3 * KL.mean(), rtol=1e-6
    )
    np.testing.assert_allclose(jax.grad(reinforce_loss)(LOGP, KL, ADVANTAGE), -ADVANTAGE / 4)


def test_ppo_clips_where_the_ratio_has_already_moved_far_enough():
    old = jnp.log(jnp.asarray([0.5, 0.5, 0.5, 0.5]))
    logp = jnp.log(jnp.asarray([0.7, 0.7, 0.3, 0.3]))  # ratios 1.4 and 0.6
    advantage = jnp.asarray([1.0, -1.0, 1.0, -1.0])
    loss, gradient = jax.value_and_grad(ppo_loss)(logp, KL, advantage, old_logp=old, beta=0.0)
    np.testing.assert_allclose(loss, -(1.2 - 1.4 + 0.6 - 0.8) / 4, rtol=1e-5)
    np.testing.assert_allclose(gradient, [0.0, 1.4 / 4, -0.6 / 4, 0.0], atol=1e-6)
    unmoved = jax.grad(ppo_loss)(logp, KL, advantage, old_logp=logp, beta=0.0)
    np.testing.assert_allclose(unmoved, jax.grad(reinforce_loss)(logp, KL, advantage, beta=0.0), rtol=1e-6)


def test_awr():
    weights = np.minimum(np.exp(np.asarray(ADVANTAGE) / 0.5), 2.0)
    expected = -(weights * np.asarray(LOGP)).mean() + 0.3 * float(KL.mean())
    np.testing.assert_allclose(awr_loss(LOGP, KL, ADVANTAGE, temperature=0.5, max_weight=2.0), expected, rtol=1e-5)
    # A hot temperature forgets the advantage: cloning of everything; a cold one keeps what is above 0 alone.
    np.testing.assert_allclose(awr_loss(LOGP, KL, ADVANTAGE, temperature=1e6, beta=0.0), -LOGP.mean(), rtol=1e-4)
    cold = awr_loss(LOGP, KL, jnp.asarray([1.0, -1, -1, -1]), temperature=1e-2, max_weight=4.0, beta=0.0)
    np.testing.assert_allclose(cold, -LOGP[0], rtol=1e-5)


def test_filtered_cloning_imitates_the_winners_and_no_other():
    logp = jnp.asarray([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])  # [T, B]
    won = jnp.asarray([False, True, False])
    np.testing.assert_allclose(filtered_bc_loss(logp, 0 * logp, won), 3.5)
    gradient = jax.grad(filtered_bc_loss)(logp, 0 * logp, won)
    np.testing.assert_allclose(gradient, [[0, -0.5, 0], [0, -0.5, 0]])
    assert float(filtered_bc_loss(logp, 0 * logp, jnp.zeros(3, bool))) == 0.0  # nobody won


def test_winners_are_the_best_share_of_the_living():
    total, alive = jnp.asarray([0.1, 0.9, 0.5, 0.7, 5.0]), jnp.asarray([1.0, 1, 1, 1, 0])
    np.testing.assert_array_equal(winners(total, alive, 0.25), [False, True, False, False, False])
    np.testing.assert_array_equal(winners(total, alive, 0.5), [False, True, False, True, False])
    np.testing.assert_array_equal(winners(total, alive, 1.0), [True] * 4 + [False])
    np.testing.assert_array_equal(winners(0 * total, alive, 0.25), [True] * 4 + [False])  # equals win together
    np.testing.assert_array_equal(winners(1e4 * total, alive, 0.5), winners(total, alive, 0.5))
    assert not winners(total, jnp.zeros(5), 0.5).any()


@given(st.sampled_from([1, 2, 9]), st.floats(0, 2), st.floats(0.05, 3), st.integers(0, 10_000))
def test_the_other_objectives_match_their_equations(states, beta, number, seed):
    """`number` is the temperature of AWR, and a tenth of it the clip of PPO."""
    rng = np.random.default_rng(seed)
    logp, old = (-rng.exponential(size=(states, 3)) for _ in range(2))
    kl, advantage, total = rng.exponential(size=(states, 3)), rng.normal(size=(states, 3)), rng.normal(size=3)
    lp, k, a, o = arrays(logp, kl, advantage, old)
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    close(reinforce_loss(lp, k, a, beta=beta), reference.reinforce(logp, kl, advantage, beta))
    scaled = normalize(a, jnp.ones(a.shape))
    close(reinforce_loss(lp, k, scaled, beta=beta), reference.reinforce(logp, kl, advantage, beta, rms=True))
    clipped = ppo_loss(lp, k, a, old_logp=o, clip=number / 10, beta=beta)
    close(clipped, reference.ppo(logp, kl, advantage, old, number / 10, beta))
    weighted = awr_loss(lp, k, a, temperature=number, max_weight=20.0, beta=beta)
    close(weighted, reference.awr(logp, kl, advantage, number, 20.0, beta))
    won = winners(jnp.asarray(total, jnp.float32), jnp.ones(3), 0.5)
    close(filtered_bc_loss(lp, k, won, beta=beta), reference.filtered_bc(logp, kl, total, 0.5, beta))


def test_pmpo_alone_ignores_the_scale_of_the_advantage():
    losses = {"pmpo": pmpo_loss, "reinforce": reinforce_loss, "awr": awr_loss}
    moved = {n: abs(float(f(LOGP, KL, 10 * ADVANTAGE) - f(LOGP, KL, ADVANTAGE))) for n, f in losses.items()}
    assert moved["pmpo"] == 0 and min(moved["reinforce"], moved["awr"]) > 0.1
    # Divided by its root mean square, the advantage has lost its scale for everyone, and kept its signs.
    w = jnp.asarray([1.0, 2.0, 0.0, 1.0])
    scaled = normalize(ADVANTAGE, w)
    np.testing.assert_allclose(normalize(1e3 * ADVANTAGE, w), scaled, rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(w * scaled**2) / jnp.sum(w), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(jnp.sign(scaled), jnp.sign(ADVANTAGE))
    np.testing.assert_array_equal(normalize(0 * ADVANTAGE, w), 0 * ADVANTAGE)
