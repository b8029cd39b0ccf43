"""Depth of compiled programs: chains, loops that carry and loops that do not, and passes of the sampler."""

import jax
import jax.numpy as jnp
import pytest

from dreamer4_jax.parallel.chains import Depth, depth, in_scope
from dreamer4_jax.parallel.hlo import Module
from dreamer4_jax.world import Dynamics, shortcut
from tests.small import config, latents, moves

X = jax.ShapeDtypeStruct((8, 8), jnp.float32)
N = jax.ShapeDtypeStruct((), jnp.int32)


def step(w, x):
    with jax.named_scope("step"):
        return jnp.tanh(x @ w)


def measured(f, *shapes, trips=None):
    return depth(Module.parse(jax.jit(f).lower(*shapes).compile().as_text()), in_scope("step"), trips=trips)


def test_a_chain_and_two_chains_beside_each_other():
    assert measured(lambda w, x: step(w, step(w, step(w, x))), X, X) == Depth(3, 3)
    assert measured(lambda w, x: step(w, step(w, x)) + step(w, jnp.sin(x)), X, X) == Depth(2, 3)


def test_a_loop_that_carries_is_as_deep_as_it_is_long():
    assert measured(lambda w, x: jax.lax.fori_loop(0, 7, lambda i, x: step(w, x), x), X, X) == Depth(7, 7)


def test_iterations_that_do_not_wait_for_each_other_are_one_deep():
    def f(w, x):
        return jax.lax.scan(lambda count, row: (count + 1, step(w, row)), 0, jnp.stack([x] * 5))

    assert measured(f, X, X) == Depth(1, 5)


def test_what_is_carried_in_turns_counts_once_a_turn():
    """a takes b's place and b what is made of a: after six turns a chain is three long."""

    def f(w, x):
        return jax.lax.fori_loop(0, 6, lambda i, ab: (ab[1], step(w, ab[0])), (x, 2 * x))

    assert measured(f, X, X) == Depth(3, 6)


def test_nested_loops_multiply_and_a_length_that_is_an_argument_must_be_given():
    def f(w, x, n):
        inner = lambda x: jax.lax.fori_loop(0, n, lambda i, x: step(w, x), x)
        return jax.lax.fori_loop(0, 3, lambda i, x: inner(x), x)

    assert measured(f, X, X, N, trips=4) == Depth(12, 12)
    with pytest.raises(ValueError, match="pass trips"):
        measured(f, X, X, N)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_clip_takes_k_passes_a_frame_one_after_the_other(steps):
    cfg = config(**{"dynamics.transformer.layers": 2, "dynamics.transformer.time_every": 2})
    model = jax.eval_shape(lambda key: Dynamics(cfg, key), jax.random.key(0))
    f = lambda model, z, actions, key: shortcut.generate(model, z, actions, key, steps=steps)
    compiled = jax.jit(f).lower(model, latents(1, 2), moves(1, 5), jax.random.key(0)).compile()
    assert depth(Module.parse(compiled.as_text()), in_scope("flow")) == Depth(3 * steps, 3 * steps)
