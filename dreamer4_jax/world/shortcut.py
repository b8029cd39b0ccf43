"""Shortcut forcing (paper Eq 4, 6, 7, 8) and the samplers: fixed K, K as a traced argument.

Everything here is float32: signal levels, targets, losses.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dreamer4_jax.config import DynamicsConfig
from dreamer4_jax.nn.cache import Cache
from dreamer4_jax.world.dynamics import Actions, Dynamics


def sample_tau_d(
    key: Array, shape: tuple[int, ...], k_max: int, *, coarsest: int = 0, finest: int | None = None
) -> tuple[Array, Array]:
    """Signal level and step size per frame (paper Eq 4), float32 of the given shape.

    ``d = 2^-i`` with i uniform over the ladder {0, .., log2 k_max} (or from `coarsest` to `finest`, both included),
    ``tau`` uniform over {0, d, 2d, .., 1 - d}.
    """
    finest = k_max.bit_length() - 1 if finest is None else finest
    of_d, of_tau = jax.random.split(key)
    exponent = jax.random.randint(of_d, shape, coarsest, finest + 1)
    steps = 2**exponent
    # randint has no per-element bound: floor of a uniform, kept below the bound against rounding.
    index = jnp.minimum(jnp.floor(jax.random.uniform(of_tau, shape) * steps), steps - 1)
    return index / steps.astype(jnp.float32), 1.0 / steps.astype(jnp.float32)


def ramp(tau: Array) -> Array:
    """Loss weight ``w(tau) = 0.9 tau + 0.1`` (paper Eq 8)."""
    return 0.9 * tau + 0.1


def add_noise(z1: Array, noise: Array, tau: Float[Array, "B T"]) -> Array:
    """``z~ = (1 - tau) z0 + tau z1`` (paper Eq 6)."""
    tau = tau[..., None, None]
    return (1.0 - tau) * noise + tau * z1


def euler_step(z: Array, z1_hat: Array, tau: Array, d: Array) -> Array:
    """``z + (z1_hat - z) d / (1 - tau)``; with tau = 1 - d this is z1_hat itself. `tau`, `d` broadcast against z."""
    return z + (z1_hat - z) * (d / (1.0 - tau))


def bootstrap_target(f, z: Array, tau: Float[Array, "B T"], d: Float[Array, "B T"]) -> Array:
    """Two half steps of the teacher as one clean prediction: ``sg(z~ + (1 - tau) (b' + b'') / 2)``, x-space of Eq 7.

    ``f(z, tau, d) -> z1_hat`` is the teacher. The squared error of z1_hat to this equals Eq 7's bootstrap term with its
    factor (1 - tau)^2.
    """
    t, half = tau[..., None, None], d[..., None, None] / 2
    b1 = (f(z, tau, d / 2) - z) / (1.0 - t)
    middle = z + b1 * half
    b2 = (f(middle, tau + d / 2, d / 2) - middle) / (1.0 - (t + half))
    return jax.lax.stop_gradient(z + (1.0 - t) * (b1 + b2) / 2)


def noisy_frames(key: Array, z1: Float[Array, "B T N C"], cfg: DynamicsConfig, bootstrap_rows: int):
    """Draws (tau, d), noise and z~ of a batch. Returns (z~, tau, d, flow bool [B, T]).

    mix = "rows": the first `bootstrap_rows` rows take d above 1/k_max, the rest 1/k_max. mix = "frames": Eq 4 for every
    frame. Plain diffusion forcing has no bootstrap frames.
    """
    finest = cfg.k_max.bit_length() - 1
    of_noise, a, b = jax.random.split(key, 3)
    shape = z1.shape[:2]
    if cfg.objective == "shortcut" and cfg.mix == "frames":
        tau, d = sample_tau_d(a, shape, cfg.k_max)
    else:
        tau, d = sample_tau_d(a, shape, cfg.k_max, coarsest=finest)
        if bootstrap_rows:
            tau_b, d_b = sample_tau_d(b, (bootstrap_rows, shape[1]), cfg.k_max, finest=finest - 1)
            tau, d = tau.at[:bootstrap_rows].set(tau_b), d.at[:bootstrap_rows].set(d_b)
    noise = jax.random.normal(of_noise, z1.shape, jnp.float32)
    return add_noise(z1, noise, tau), tau, d, d == 1.0 / cfg.k_max


def bootstrap_rows(cfg: DynamicsConfig, rows: int) -> int:
    """How many of the first rows are on the bootstrap branch; at least one, and at least one is left for flow."""
    if cfg.objective == "diffusion":
        return 0
    return rows if cfg.mix == "frames" else max(1, min(rows - 1, round(cfg.bootstrap_fraction * rows)))


def shortcut_forward(
    model: Dynamics,
    teacher: Dynamics,
    z1: Float[Array, "B T N C"],
    actions: Actions,
    key: Array,
    *,
    task: Int[Array, "B T words"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    rows: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Array], Float[Array, "B T D"] | None]:
    """`shortcut_loss` that also returns the agent read-out h of the noisy frames (None without a task).

    Only the first `rows` rows carry the loss (all by default); the bootstrap branch takes the first of them. Frames of
    the other rows are noised to the context level alone: it is the level at which h is read when the agent acts.
    """
    cfg = model.cfg.dynamics
    z1 = z1.astype(jnp.float32)
    rows = z1.shape[0] if rows is None else rows
    boot = bootstrap_rows(cfg, rows)
    z, tau, d, flow = noisy_frames(key, z1, cfg, boot)
    if rows < z1.shape[0]:
        level = jnp.full((z1.shape[0] - rows, z1.shape[1]), model.context_level, jnp.float32)
        noise = jax.random.normal(jax.random.fold_in(key, rows), z1[rows:].shape, jnp.float32)
        z, tau = z.at[rows:].set(add_noise(z1[rows:], noise, level)), tau.at[rows:].set(level)
        d = d.at[rows:].set(1.0 / cfg.k_max)
    with jax.named_scope("student"):
        out = model(z, tau, d, actions, task=task, segments=segments)
    target = z1
    # Online weights as teacher: stopped here, the program keeps none of the teacher's activations for a gradient.
    teacher = jax.tree.map(jax.lax.stop_gradient, teacher)
    if boot:
        z_b, tau_b, d_b, actions_b, segments_b, flow_b = jax.tree.map(
            lambda x: x[:boot], (z, tau, d, actions, segments, flow)
        )

        def f(half_z, half_tau, half_d):
            # Frames that are already at the finest step have no half step: they stay as they are, as context.
            return teacher(
                jnp.where(flow_b[..., None, None], z_b, half_z),
                jnp.where(flow_b, tau_b, half_tau),
                jnp.where(flow_b, d_b, half_d),
                actions_b,
                segments=segments_b,
            ).z1

        with jax.named_scope("teacher"):
            goal = bootstrap_target(f, z_b, tau_b, d_b)
        target = target.at[:boot].set(jnp.where(flow_b[..., None, None], z1[:boot], goal))
    error = jnp.mean((out.z1 - jax.lax.stop_gradient(target)) ** 2, axis=(-2, -1))[:rows]
    tau, flow = tau[:rows], flow[:rows]
    weight = {"both": ramp(tau), "flow": jnp.where(flow, ramp(tau), 1.0), "none": jnp.ones_like(tau)}[cfg.ramp]
    metrics = {"flow": jnp.sum(error * flow) / jnp.maximum(jnp.sum(flow), 1)}
    if boot:
        metrics["bootstrap"] = jnp.sum(error * ~flow) / jnp.maximum(jnp.sum(~flow), 1)
    return jnp.mean(weight * error), metrics, out.h


def shortcut_loss(
    model: Dynamics,
    teacher: Dynamics,
    z1: Float[Array, "B T N C"],
    actions: Actions,
    key: Array,
    *,
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Shortcut forcing (paper Eq 7 with Eq 8): flow term at d = 1/k_max, bootstrap term above, both in x-space.

    Args:
      z1: clean tokens.
      teacher: weights of the bootstrap target (EMA or online); no gradient flows into it.
      segments: episode numbers; a number per frame makes the frames of a row separate images.

    Returns:
      The ramp-weighted mean over rows and frames, and the unweighted errors "flow" and "bootstrap".
    """
    loss, metrics, _ = shortcut_forward(model, teacher, z1, actions, key, segments=segments)
    return loss, metrics


# ---------------------------------------------------------------------------------------------------------------------
# Samplers


def observe(
    dynamics: Dynamics,
    cache: Cache,
    z1: Float[Array, "B T N C"],
    actions: Actions,
    key: Array,
    *,
    task: Int[Array, "B T words"] | None = None,
    segments: Int[Array, "B T"] | None = None,
) -> tuple[Cache, Float[Array, "B T D"] | None]:
    """Writes finished frames: noised to the context level, labelled with that level. Returns the cache and h."""
    tau = jnp.full(z1.shape[:2], dynamics.context_level, jnp.float32)
    d = jnp.full(z1.shape[:2], 1.0 / dynamics.k_max, jnp.float32)
    z = add_noise(z1.astype(jnp.float32), jax.random.normal(key, z1.shape, jnp.float32), tau)
    with jax.named_scope("observe"):
        out = dynamics(z, tau, d, actions, task=task, segments=segments, cache=cache)
    assert out.cache is not None
    return out.cache, out.h


def denoise(
    dynamics: Dynamics,
    cache: Cache,
    actions: Actions,
    key: Array,
    *,
    steps: Int[Array, ""] | int,
) -> Float[Array, "B 1 N C"]:
    """Samples the next frame from pure noise in `steps` equal steps. `steps` is a power of two up to k_max and may be
    traced: one program serves every K. Agent tokens take no part: nothing that is predicted here depends on them.
    """
    batch = cache.pos.shape[0]
    shape = (batch, 1, dynamics.cfg.tokenizer.tokens, dynamics.cfg.tokenizer.token_channels)
    size = 1.0 / jnp.asarray(steps, jnp.float32)

    def body(i, z):
        tau = jnp.asarray(i, jnp.float32) * size
        out = dynamics(z, jnp.full((batch, 1), tau), jnp.full((batch, 1), size), actions, cache=cache)
        return euler_step(z, out.z1, tau, size)

    with jax.named_scope("denoise"):
        return jax.lax.fori_loop(0, jnp.asarray(steps, jnp.int32), body, jax.random.normal(key, shape, jnp.float32))


def generate(
    dynamics: Dynamics,
    context: Float[Array, "B T N C"],
    actions: Actions,
    key: Array,
    *,
    steps: Int[Array, ""] | int,
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N C"]:
    """Continues `context` by the frames whose actions are given (paper 3.2, inference).

    Args:
      context: clean tokens of the first frames, T_context of them.
      actions: actions of context and future, [B, T_context + T_future].
      steps: K, may be traced.
      segments: episode numbers of the context frames.

    Returns:
      Tokens of the T_future generated frames.
    """
    frames = context.shape[1]
    before = jax.tree.map(lambda x: x[:, :frames], actions)
    after = jax.tree.map(lambda x: jnp.swapaxes(x[:, frames:], 0, 1)[:, :, None], actions)
    of_context, of_future = jax.random.split(key)
    cache = dynamics.init_cache(context.shape[0])
    cache, _ = observe(dynamics, cache, context, before, of_context, segments=segments)

    def frame(cache, scanned):
        action, k = scanned
        noise, write = jax.random.split(k)
        z = denoise(dynamics, cache, action, noise, steps=steps)
        cache, _ = observe(dynamics, cache, z, action, write)
        return cache, z[:, 0]

    future = jax.tree.leaves(after)[0].shape[0]
    _, out = jax.lax.scan(frame, cache, (after, jax.random.split(of_future, future)))
    return jnp.swapaxes(out, 0, 1)
