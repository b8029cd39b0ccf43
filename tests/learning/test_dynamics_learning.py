"""A small dynamics learns a world from its latents: each action paints one of four tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamer4_jax.world import Actions, Dynamics, generate, shortcut
from tests.small import config

CFG = config(
    **{
        "actions": [{"name": "move", "kind": "categorical", "size": 8}],
        "dynamics.transformer.time_every": 2,
        "dynamics.transformer.window": 8,
        "dynamics.k_max": 8,
    }
)
BATCH, FRAMES, CONTEXT, STEPS = 32, 8, 2, 600


def world(seed: int, batch: int = BATCH) -> tuple[np.ndarray, Actions]:
    """Clean tokens [B, T, 4, 4] and the moves that led to each frame: move a paints token a % 4, bright if a >= 4."""
    rng = np.random.default_rng(seed)
    move = rng.integers(0, 8, (batch, FRAMES)).astype(np.int32)
    bright = np.empty((batch, FRAMES, 4), bool)
    bright[:, 0] = rng.random((batch, 4)) < 0.5
    for t in range(1, FRAMES):
        painted = move[:, t, None] % 4 == np.arange(4)
        bright[:, t] = np.where(painted, move[:, t, None] >= 4, bright[:, t - 1])
    z = np.where(bright, 0.8, -0.8)[..., None].repeat(4, -1)
    present = np.broadcast_to(np.arange(FRAMES) > 0, move.shape)
    return z.astype(np.float32), Actions({"move": move}, {"move": present})


@pytest.fixture(scope="module")
def trained() -> Dynamics:
    model = jax.jit(partial(Dynamics, CFG))(jax.random.key(0))
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(3e-3, 3e-4, STEPS)))

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(model, ema, state, z, actions, key):
        loss = lambda model: shortcut.shortcut_loss(model, ema, z, actions, key)[0]
        updates, state = optimiser.update(jax.grad(loss)(model), state, model)
        model = optax.apply_updates(model, updates)
        return model, jax.tree.map(lambda e, m: 0.98 * e + 0.02 * m, ema, model), state

    ema, state = jax.tree.map(jnp.copy, model), optimiser.init(model)
    for step in range(STEPS):
        z, actions = world(step)
        model, ema, state = update(model, ema, state, z, actions, jax.random.fold_in(jax.random.key(1), step))
    return ema


@pytest.mark.slow
def test_the_world_is_learned_and_follows_its_actions(trained):
    """At K = 4: far above repeating the last frame, and above the same model shown other actions; K = 1 works too."""
    z, actions = world(10**6, 64)
    move, future = np.asarray(actions.values["move"]), z[:, CONTEXT:].mean(-1) > 0
    sample = jax.jit(generate)

    def accuracy(moves: np.ndarray, steps: int) -> float:
        shown = Actions({"move": moves}, actions.present)
        out = np.asarray(sample(trained, z[:, :CONTEXT], shown, jax.random.key(2), steps=steps))
        return float(((out.mean(-1) > 0) == future).mean())

    repeat = float(((z[:, CONTEXT - 1 : CONTEXT].mean(-1) > 0) == future).mean())
    shuffled = accuracy(np.roll(move, 1, 0), 4)
    scores = {steps: accuracy(move, steps) for steps in (1, 4, 8)}
    print(f"repeat {repeat:.3f}, shuffled actions {shuffled:.3f}, by K {scores}")
    assert repeat < 0.75 and shuffled < 0.75
    assert scores[4] > 0.97 and scores[8] > 0.97 and scores[1] > 0.95
    assert sample._cache_size() == 1
