"""The jitted step: what it changes, what it refuses, how often it compiles, and that its state is donated."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.training import abstract_state, init_state, make_optimizer, make_train_step
from dreamer4_jax.training.optim import wsd_schedule
from dreamer4_jax.training.state import ema_decay
from tests.training_phases import TINY, Regression


@functools.cache
def compiled(config):
    """The step of all phases of one config, which compile but once."""
    return make_train_step(Regression(config), make_optimizer(config))


def prepare(phase):
    optimizer = make_optimizer(phase.config)
    state = init_state(phase, optimizer, jax.random.key(0))
    return optimizer, state, compiled(phase.config)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_step_advances_everything_and_reports():
    phase = Regression()
    _, state, step = prepare(phase)
    before = jax.device_get(state)
    after, metrics = step(state, phase.frozen, next(phase.batches(0)), jax.random.key(1))
    assert int(after.step) == 1 and int(after.norms["count"]) == 1
    assert set(metrics) == {
        "loss", "loss/fit", "loss/drift", "scaled/fit", "scaled/drift", "grad_norm", "lr", "finite", "x_mean",
    }  # fmt: skip
    assert float(metrics["lr"]) == pytest.approx(float(wsd_schedule(TINY)(0)))
    # The first step divides every term by itself.
    assert float(metrics["loss"]) == pytest.approx(2.0, rel=1e-5) and bool(metrics["finite"])
    for old, new, average in zip(*(jax.tree.leaves(t) for t in (before.model, after.model, after.ema)), strict=True):
        assert np.all(old != new)
        # The average starts at the initial values and takes 1 - (1 + 0) / (10 + 0) = 0.9 of the new ones.
        np.testing.assert_allclose(average, 0.1 * old + 0.9 * np.asarray(new), rtol=1e-5, atol=1e-7)


def test_the_key_of_a_step_is_that_of_its_number():
    phase = Regression()
    _, state, step = prepare(phase)
    state, first = step(state, phase.frozen, next(phase.batches(0)), jax.random.key(1))
    state, second = step(state, phase.frozen, next(phase.batches(0)), jax.random.key(1))
    x = next(phase.batches(0))["x"]
    for number, metrics in enumerate((first, second)):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), number), x.shape)
        np.testing.assert_allclose(metrics["x_mean"], np.mean(x + 0.1 * np.asarray(noise)), rtol=1e-5)


def test_ema_decay_warms_up():
    steps = jnp.array([0, 8, 10_000])
    np.testing.assert_allclose(jax.vmap(lambda s: ema_decay(0.99, s))(steps), [0.1, 0.5, 0.99], rtol=1e-6)


def test_terms_are_summed_as_they_are_without_the_normaliser():
    phase = Regression(replace(TINY, normalize_losses=False))
    _, state, step = prepare(phase)
    _, metrics = step(state, phase.frozen, next(phase.batches(0)), jax.random.key(1))
    np.testing.assert_allclose(metrics["loss"], metrics["loss/fit"] + metrics["loss/drift"], rtol=1e-6)
    assert not any(name.startswith("scaled/") for name in metrics)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_changes_nothing(poison):
    phase = Regression()
    _, state, step = prepare(phase)
    batch = next(phase.batches(0))
    state, _ = step(state, phase.frozen, batch, jax.random.key(1))
    before = jax.device_get(state)
    # 1e30 is finite, and so is what it is divided by; its square, which the normaliser would keep, is not.
    state, metrics = step(state, phase.frozen, batch | {"poison": np.float32(poison)}, jax.random.key(1))
    assert not bool(metrics["finite"])
    equal(jax.device_get(state), before)
    state, metrics = step(state, phase.frozen, batch, jax.random.key(1))
    assert bool(metrics["finite"]) and int(state.step) == 2


def test_a_step_compiles_once_for_each_of_the_two_lengths():
    phase = Regression()
    optimizer, state, _ = prepare(phase)
    step = make_train_step(phase, optimizer)
    batches, key, frozen = phase.batches(0), jax.random.key(1), phase.frozen
    for done in range(1, 13):
        state, _ = step(state, frozen, jax.device_put(next(batches)), key)
        assert step._cache_size() == (1 if done < 4 else 2)


def test_the_state_is_donated_and_what_the_phase_holds_is_not():
    phase = Regression()
    held = phase.init(jax.random.key(7))
    phase.init = lambda key, base=None: held  # a phase that starts from arrays somebody else still reads
    _, state, step = prepare(phase)
    batch, key = jax.device_put(next(phase.batches(0))), jax.random.key(1)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    analysis = step.lower(state, phase.frozen, batch, key).compile().memory_analysis()
    assert analysis.alias_size_in_bytes >= size
    step(state, phase.frozen, batch, key)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(held))


def test_abstract_state_is_the_shape_of_the_real_one():
    phase = Regression()
    optimizer, state, _ = prepare(phase)
    abstract = abstract_state(phase, optimizer)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for a, x in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype) == (x.shape, x.dtype)


def test_a_loss_that_returns_no_scalar_or_takes_a_name_of_the_loop_is_refused():
    phase = Regression()
    good = phase.loss
    optimizer, state, _ = prepare(phase)
    batch = next(phase.batches(0))
    phase.loss = lambda *a: ({"fit": jnp.ones(3), "drift": jnp.ones(())}, {})
    with pytest.raises(ValueError, match=r"'fit' of the loss has shape \(3,\)"):
        make_train_step(phase, optimizer)(state, phase.frozen, batch, jax.random.key(1))
    phase.loss = lambda *a: (good(*a)[0], {"lr": jnp.ones(())})
    with pytest.raises(ValueError, match=r"\['lr'\]"):
        make_train_step(phase, optimizer)(state, phase.frozen, batch, jax.random.key(1))


def test_a_loss_whose_terms_are_not_those_that_the_phase_names_is_refused():
    phase = Regression()
    optimizer, state, _ = prepare(phase)
    phase.terms = ("fit",)
    with pytest.raises(ValueError, match=r"its loss has the terms \['drift', 'fit'\], it names \['fit'\]"):
        make_train_step(phase, optimizer)(state, phase.frozen, next(phase.batches(0)), jax.random.key(1))


def test_weights_scale_the_gradient_of_a_term_and_not_its_estimate():
    """With weight 0 the term "fit" adds nothing to the gradient, though its running mean square is kept."""
    updated = {}
    for name, weights in {"none": {}, "one": {"fit": 1.0}, "zero": {"fit": 0.0}}.items():
        phase = Regression(replace(TINY, weight_decay=0.0), weights=weights)
        optimizer, batch = make_optimizer(phase.config), next(phase.batches(0))
        state = init_state(phase, optimizer, jax.random.key(0))
        updated[name] = make_train_step(phase, optimizer)(state, phase.frozen, batch, jax.random.key(1))
    (plain, whole), (one, _), (zero, metrics) = updated["none"], updated["one"], updated["zero"]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), plain.model, one.model))
    assert float(zero.norms["mean_square"]["fit"]) == float(plain.norms["mean_square"]["fit"]) > 0
    np.testing.assert_allclose(metrics["loss"], metrics["scaled/drift"], rtol=1e-6)
    assert float(metrics["grad_norm"]) < 0.9 * float(whole["grad_norm"])
