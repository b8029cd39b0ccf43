"""Imagined rollouts: what belongs to which step, what counts in the losses, and what they train."""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.agent import PolicyHead, ValueHead, distribution
from dreamer4_jax.agent.imagination import Trajectory, imagination_losses, imagine
from dreamer4_jax.agent.model import ActorCritic, Agent
from dreamer4_jax.config import AgentConfig
from dreamer4_jax.training import init_state, make_optimizer, make_train_step
from dreamer4_jax.training.phases import ImaginationPhase, cut_contexts
from dreamer4_jax.world import Dynamics
from dreamer4_jax.world.oracle import TransitionOracle
from dreamer4_jax.world.shortcut import observe
from tests import reference, small

MOVES = small.MOVES
END = 2  # the action that ends an episode of the ledger below
FIELDS = {"agent.hidden": 16, "agent.bins": 15, "agent.mtp": 2, "agent.context": 3, "agent.horizon": 3}


# ---------------------------------------------------------------------------------------------------------------------
# A world that is a ledger: its read-out is (last action, clock), its reward names the action and the clock


@partial(jax.tree_util.register_dataclass, data_fields=["h"], meta_fields=[])
@dataclass(frozen=True)
class LedgerState:
    h: Any


@partial(jax.tree_util.register_dataclass, data_fields=["z", "h", "reward", "cont"], meta_fields=[])
@dataclass(frozen=True)
class Seen:
    z: Any
    h: Any
    reward: Any
    cont: Any


class Ledger:
    def reset(self, context, actions, task, key, *, segments=None):
        last = actions.values["move"][:, -1].astype(jnp.float32)
        return LedgerState(jnp.stack([last, jnp.zeros_like(last)], -1))

    def step(self, state, action, key):
        move = action["move"].astype(jnp.float32)
        clock = state.h[:, 1] + 1
        h = jnp.stack([move, clock], -1)
        seen = Seen(h[:, None], h, 10 * clock + move, (action["move"] != END).astype(jnp.float32))
        return LedgerState(h), seen


class Following:
    """Takes the action after the last one: (last + 1) mod 3, with certainty."""

    def next(self, h):
        wanted = (h[..., 0].astype(jnp.int32) + 1) % MOVES
        return distribution(1e4 * jax.nn.one_hot(wanted, MOVES), small.config().actions)


def context(batch=3, frames=4, seed=0):
    actions = small.moves(batch, frames, seed)
    task = jnp.ones((batch, 2), jnp.int32)
    return small.latents(batch, frames, seed), actions, task, None


def test_every_reward_belongs_to_the_step_of_its_action():
    start = context()
    rollout = imagine(Ledger(), Following(), start, jax.random.key(0), horizon=5)
    assert rollout.h.shape == (6, 3, 2) and rollout.reward.shape == rollout.cont.shape == (5, 3)
    assert rollout.actions["move"].shape == (5, 3) and rollout.z.shape == (5, 3, 1, 2)
    before = np.asarray(start[1].values["move"])[:, -1]
    np.testing.assert_array_equal(rollout.h[0], np.stack([before, np.zeros(3)], -1))  # the last context frame
    actions = (before + 1 + np.arange(5)[:, None]) % MOVES
    np.testing.assert_array_equal(rollout.actions["move"], actions)  # drawn at h[t]
    np.testing.assert_array_equal(rollout.h[1:, :, 0], actions)  # and h[t + 1] has seen it
    np.testing.assert_array_equal(rollout.reward, 10 * np.arange(1, 6)[:, None] + actions)
    np.testing.assert_array_equal(rollout.cont, actions != END)
    np.testing.assert_array_equal(rollout.z[:, :, 0], rollout.h[1:])


def test_a_rollout_is_one_scan_whatever_its_horizon():
    oracle, policy = learned()

    def program(horizon):
        run = partial(imagine, oracle, policy, horizon=horizon)
        return jax.make_jaxpr(run)(context(), jax.random.key(0)).jaxpr

    short, long = program(3), program(11)
    assert len(short.eqns) == len(long.eqns)
    for found, horizon in ((short, 3), (long, 11)):
        scans = [e for e in found.eqns if e.primitive.name == "scan"]
        assert [e.params["length"] for e in scans].count(horizon) == 1


# ---------------------------------------------------------------------------------------------------------------------
# A learned world


@cache
def agent(cfg=None) -> Agent:
    cfg = cfg or small.config(**FIELDS)
    return small.drawn(lambda key: Agent(cfg, Dynamics(cfg, key), key))


def learned(steps=2):
    a = agent()
    return TransitionOracle(None, a.dynamics, a.reward, a.cont, steps=steps), a.policy


@cache
def compiled_imagine():
    run = lambda oracle, policy, context, key: imagine(oracle, policy, context, key, horizon=4)
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})  # compiles in a third of the time


def test_a_learned_world_reads_rewards_from_the_frame_that_the_action_led_to():
    oracle, policy = learned()
    key = jax.random.key(1)
    z, actions, task, _ = start = context()
    rollout = compiled_imagine()(oracle, policy, start, key)
    np.testing.assert_allclose(rollout.reward, oracle.reward.mean(rollout.h[1:]), rtol=1e-4)
    np.testing.assert_allclose(rollout.cont, oracle.cont.prob(rollout.h[1:]), rtol=1e-4)
    assert np.ptp(rollout.reward) > 0
    # h[0] is the read-out of the last context frame.
    wide = jnp.broadcast_to(task[:, None], (*z.shape[:2], 2))
    cache = oracle.dynamics.init_cache(3)
    seen = jax.jit(lambda m, c, k: observe(m, c, z, actions, k, task=wide)[1])
    h = seen(oracle.dynamics, cache, jax.random.split(key)[0])
    np.testing.assert_allclose(rollout.h[0], h[:, -1], atol=1e-4)


def test_the_key_decides_the_rollout():
    oracle, policy = learned()
    runs = [compiled_imagine()(oracle, policy, context(), jax.random.key(k)) for k in (0, 0, 1)]
    for a, b in zip(jax.tree.leaves(runs[0]), jax.tree.leaves(runs[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (np.asarray(runs[0].z) != np.asarray(runs[2].z)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def heads(width=8):
    cfg = AgentConfig(hidden=16, bins=15, mtp=1, gamma=0.9, lam=0.8, alpha=0.3, beta=0.7)
    parts = small.config().actions
    policy, prior = (small.drawn(lambda k: PolicyHead(width, cfg, parts, k), seed) for seed in (0, 1))
    return cfg, policy, small.drawn(lambda k: ValueHead(width, cfg, k), 2), prior


def trajectory(cont, seed=0, width=8):
    rng = np.random.default_rng(seed)
    steps, batch = np.shape(cont)
    return Trajectory(
        h=jnp.asarray(rng.normal(size=(steps + 1, batch, width)), jnp.float32),
        actions={"move": jnp.asarray(rng.integers(0, MOVES, (steps, batch)), jnp.int32)},
        reward=jnp.asarray(rng.normal(size=(steps, batch)), jnp.float32),
        cont=jnp.asarray(cont, jnp.float32),
        z=jnp.zeros((steps, batch, 1, 1)),
    )


@cache
def compiled_losses(cfg):
    return jax.jit(lambda policy, value, prior, r, alive: imagination_losses(policy, value, prior, r, cfg, alive=alive))


def by_hand(rollout, cfg, policy, value, prior, counted):
    """(logp, kl, advantage, value loss) of the states in `counted`, a list of (t, b); returns by the reference."""
    values = np.asarray(value.mean(rollout.h), np.float64)
    cont, reward = np.asarray(rollout.cont, np.float64), np.asarray(rollout.reward, np.float64)
    returns = np.stack(
        [
            reference.lambda_returns(reward[:, b], values[:, b], cont[:, b], cfg.gamma, cfg.lam)
            for b in range(cont.shape[1])
        ],
        axis=1,
    )
    p, q = (np.asarray(jax.nn.log_softmax(x.next(rollout.h).parts["move"].logits), np.float64) for x in (policy, prior))
    lp = np.asarray(jax.nn.log_softmax(value.logits(rollout.h)), np.float64)
    bins = reference.symexp_bins(cfg.bins)
    rows = []
    for t, b in counted:
        logp = p[t, b, int(rollout.actions["move"][t, b])]
        kl = np.sum(np.exp(p[t, b]) * (p[t, b] - q[t, b]))
        rows.append((logp, kl, returns[t, b] - values[t, b], -reference.twohot(returns[t, b], bins) @ lp[t, b]))
    return np.asarray(rows), returns


def test_losses_of_hand_made_trajectories_with_terminations():
    """Rollout 0 goes on, 1 ends with its second step, 2 with its first, 3 began after the end of its episode."""
    cont = np.ones((4, 4))
    cont[1, 1] = cont[0, 2] = 0
    rollout, (cfg, policy, value, prior) = trajectory(cont), heads()
    alive = jnp.asarray([1.0, 1, 1, 0])
    losses, metrics = compiled_losses(cfg)(policy, value, prior, rollout, alive)
    # The state from which the last step was taken counts; those after it don't.
    counted = [(t, 0) for t in range(4)] + [(0, 1), (1, 1), (0, 2)]
    rows, returns = by_hand(rollout, cfg, policy, value, prior, counted)
    logp, kl, advantage, nll = rows.T
    assert (advantage >= 0).any() and (advantage < 0).any()
    np.testing.assert_allclose(losses["policy"], reference.pmpo(logp, kl, advantage, cfg.alpha, cfg.beta), rtol=1e-4)
    np.testing.assert_allclose(losses["value"], nll.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["kl_to_prior"], kl.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["imagined_return"], returns[0, :3].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["advantage_positive"], (advantage >= 0).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["alive_at_end"], 1 / 4)
    # Nothing of the states that don't count is read.
    poisoned = replace(rollout, h=rollout.h.at[:, 3].set(7.0).at[2:4, 1].set(5.0).at[1:4, 2].set(-3.0))
    again, _ = compiled_losses(cfg)(policy, value, prior, poisoned, alive)
    for name in losses:
        np.testing.assert_allclose(losses[name], again[name], rtol=1e-4)


def test_states_after_a_probable_end_count_the_product_of_the_continues():
    cont = np.asarray([[0.5, 1.0], [0.8, 0.25], [0.1, 1.0]])
    rollout, (cfg, policy, value, prior) = trajectory(cont, seed=3), heads()
    losses, metrics = compiled_losses(cfg)(policy, value, prior, rollout, jnp.ones(2))
    every = [(t, b) for t in range(3) for b in range(2)]
    rows, _ = by_hand(rollout, cfg, policy, value, prior, every)
    logp, kl, advantage, nll = rows.T
    weight = np.asarray([[1, 1], [0.5, 1], [0.4, 0.25]]).ravel()
    good = advantage >= 0

    def mean(x, w):
        return np.sum(x * w) / np.sum(w)

    want = (1 - cfg.alpha) * mean(logp, weight * ~good) - cfg.alpha * mean(logp, weight * good)
    np.testing.assert_allclose(losses["policy"], want + cfg.beta * mean(kl, weight), rtol=1e-4)
    np.testing.assert_allclose(losses["value"], mean(nll, weight), rtol=1e-4)
    np.testing.assert_allclose(metrics["alive_at_end"], np.mean([0.4, 0.25]), rtol=1e-5)


OBJECTIVES = ("pmpo", "reinforce", "ppo", "awr", "filtered_bc", "none")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_config_chooses_the_objective(objective):
    """Every objective on the same rollout, with an end in it, against its equation over the states that count."""
    cont = np.ones((3, 4))
    cont[1, 1] = 0
    rollout, (cfg, policy, value, prior) = trajectory(cont, seed=5), heads()
    cfg = replace(cfg, objective=objective, reward_scale=0.5, ppo_clip=0.1, awr_temperature=2.0, bc_share=0.5)
    alive = jnp.asarray([1.0, 1, 1, 0])
    run = lambda policy, old: imagination_losses(policy, value, prior, rollout, cfg, alive=alive, behaviour=old)
    losses, metrics = jax.jit(run)(policy, prior)
    counted = [(t, b) for t in range(3) for b in range(3) if (t, b) != (2, 1)]
    scaled = replace(rollout, reward=0.5 * rollout.reward)
    (logp, kl, advantage, nll), returns = (x.T for x in by_hand(scaled, cfg, policy, value, prior, counted))
    old = by_hand(scaled, cfg, prior, value, prior, counted)[0][:, 0]
    won = np.argsort(-np.asarray([sum(float(rollout.reward[t, c]) for t, c in counted if c == b) for b in range(3)]))
    expected = {
        "pmpo": reference.pmpo(logp, kl, advantage, cfg.alpha, cfg.beta),
        "reinforce": reference.reinforce(logp, kl, advantage, cfg.beta),
        "ppo": reference.ppo(logp, kl, advantage, old, 0.1, cfg.beta),
        "awr": reference.awr(logp, kl, advantage, 2.0, 20.0, cfg.beta),
        "filtered_bc": -np.mean([lp for lp, (_, b) in zip(logp, counted, strict=True) if b in won[:2]])
        + cfg.beta * kl.mean(),
        "none": 0.0,
    }
    np.testing.assert_allclose(losses["policy"], expected[objective], rtol=1e-4)
    np.testing.assert_allclose(losses["value"], nll.mean(), rtol=1e-4)  # whatever the policy learns from
    np.testing.assert_allclose(metrics["imagined_return"], returns.T[0, :3].mean(), rtol=1e-4)
    if objective == "ppo":
        outside = np.abs(np.exp(logp - old) - 1) > 0.1
        assert 0 < outside.mean() and metrics["ratio_outside_clip"] == pytest.approx(outside.mean())


def test_pmpo_is_invariant_to_the_scale_of_rewards():
    """Rewards and values doubled: the same loss and gradient to the last bit, where REINFORCE follows the scale."""
    rollout, (cfg, policy, _, prior) = trajectory(np.ones((3, 4)), seed=7), heads()
    values = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)

    @dataclass(frozen=True)
    class Table:
        scale: float

        def mean(self, h):
            return self.scale * values

        def loss(self, h, returns):
            return 0.0 * returns

    def gradient(objective, scale, norm=False):
        c = replace(cfg, objective=objective, reward_scale=scale, normalize_advantage=norm)
        loss = lambda p: imagination_losses(p, Table(scale), prior, rollout, c, alive=jnp.ones(4))[0]["policy"]
        return np.concatenate([np.ravel(g) for g in jax.tree.leaves(jax.jit(jax.grad(loss))(policy))])

    np.testing.assert_array_equal(gradient("pmpo", 1.0), gradient("pmpo", 64.0))
    assert np.abs(gradient("reinforce", 64.0) - gradient("reinforce", 1.0)).max() > 1e-3
    np.testing.assert_allclose(gradient("reinforce", 64.0, True), gradient("reinforce", 1.0, True), atol=1e-6)


def test_a_batch_without_a_living_context_adds_nothing():
    rollout, (cfg, policy, value, prior) = trajectory(np.ones((3, 2))), heads()

    def total(models):
        losses, metrics = imagination_losses(*models, prior, rollout, cfg, alive=jnp.zeros(2))
        return losses["policy"] + losses["value"], metrics

    (loss, metrics), grads = jax.jit(jax.value_and_grad(total, has_aux=True))((policy, value))
    assert float(loss) == 0 and not small.nonzero(grads)
    assert all(np.isfinite(m) for m in metrics.values())


def test_each_loss_trains_its_own_head_and_nothing_else():
    rollout, (cfg, policy, value, prior) = trajectory(np.ones((3, 2))), heads()

    def term(name, policy, value, rollout):
        return imagination_losses(policy, value, prior, rollout, cfg, alive=jnp.ones(2))[0][name]

    reached = {}
    for name in ("policy", "value"):
        floats = replace(rollout, actions={})  # integers have no gradient

        def of(p, v, r, name=name):
            return term(name, p, v, replace(r, actions=rollout.actions))

        reached[name] = [small.nonzero(g) for g in jax.jit(jax.grad(of, argnums=(0, 1, 2)))(policy, value, floats)]
    assert reached == {"policy": [True, False, False], "value": [False, True, False]}


# ---------------------------------------------------------------------------------------------------------------------
# Contexts


def window(frames, is_last=None, is_first=None, batch=2):
    """Every entry names its row and frame: tokens 100 row + frame, and so do task and action (frame alone)."""
    rows, at = np.indices((batch, frames))
    number = (100 * rows + at).astype(np.float32)
    zeros = np.zeros((batch, frames), bool)
    return {
        "latents": np.broadcast_to(number[..., None, None], (batch, frames, 4, 4)).astype(np.float16),
        "actions": {"move": (at % MOVES).astype(np.int32)},
        "present": {"move": at != 0},
        "is_first": zeros if is_first is None else np.asarray(is_first, bool),
        "is_last": zeros if is_last is None else np.asarray(is_last, bool),
        "task": np.stack([rows, at], -1).astype(np.int32),
    }


def cuts(batch, frames, draws):
    keys = jax.random.split(jax.random.key(0), draws)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda k: cut_contexts(k, batch, frames)))(keys))


def test_a_context_ends_before_an_end_and_is_drawn_uniformly():
    """Row 0: one long episode. Row 1: ends with frame 4, the next begins with frame 5 and ends with frame 8."""
    last, first = np.zeros((2, 9)), np.zeros((2, 9))
    last[1, [4, 8]] = first[1, 5] = 1
    (z, actions, task, segments), alive = cuts(window(9, last, first), 3, 4000)
    assert z.shape == (4000, 2, 3, 4, 4) and z.dtype == np.float32
    assert task.shape == (4000, 2, 2) and segments.shape == (4000, 2, 3) and (alive == 1).all()
    end = z[:, :, -1, 0, 0].astype(int) - [0, 100]
    # Everything belongs to the same three consecutive frames.
    at = end[..., None] + np.arange(-2, 1)
    np.testing.assert_array_equal(z[..., 0, 0], at + np.asarray([0, 100])[:, None])
    np.testing.assert_array_equal(z, z[..., :1, :1] + np.zeros((4, 4)))
    np.testing.assert_array_equal(actions.values["move"], at % MOVES)
    np.testing.assert_array_equal(actions.present["move"], at != 0)
    np.testing.assert_array_equal(task, np.stack([np.broadcast_to([0, 1], end.shape), end], -1))
    later = np.stack([np.zeros_like(at[:, 0]), at[:, 1] >= 5], 1)
    np.testing.assert_array_equal(segments, later)
    # Uniform over the allowed ends: five standard deviations of a count.
    for row, allowed in ((0, range(2, 9)), (1, (2, 3, 5, 6, 7))):
        values, counts = np.unique(end[:, row], return_counts=True)
        assert list(values) == list(allowed)
        share = 1 / len(values)
        assert np.abs(counts / 4000 - share).max() < 5 * np.sqrt(share * (1 - share) / 4000)


def test_a_window_without_room_for_a_context_counts_nothing():
    last = np.zeros((2, 4))
    last[0, 2:] = 1  # frames 2 and 3 are ends, and a context of 3 cannot end earlier
    _, alive = cuts(window(4, last), 3, 8)
    np.testing.assert_array_equal(alive, np.broadcast_to([0.0, 1.0], (8, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# The phase


@cache
def imagination_phase(beta=0.3):
    cfg = small.config(
        **FIELDS,
        **{
            "agent.beta": beta,
            "agent.sample_steps": 2,
            "train.imagination.lr": 0.01,
        },
    )
    return ImaginationPhase(cfg, None, agent())  # type: ignore[arg-type]  # no dataset: batches are made here


def test_training_in_imagination_moves_policy_and_value_alone():
    """Dynamics, reward, continue and prior stay bit for bit, and the KL is to the prior, not to the last policy."""
    phase = imagination_phase()
    frozen = phase.frozen
    before = jax.tree.map(lambda x: np.array(x), frozen)
    optimizer = make_optimizer(phase.config)
    batch = window(8)
    state = init_state(phase, optimizer, jax.random.key(0))
    assert isinstance(state.model, ActorCritic)
    for mine, prior in zip(jax.tree.leaves(state.model.policy), jax.tree.leaves(frozen["prior"]), strict=True):
        np.testing.assert_array_equal(mine, prior)  # starts from the cloned policy
    started = jax.tree.map(lambda x: np.array(x), state.model)
    train_step = make_train_step(phase, optimizer)
    divergence = []
    for _ in range(3):
        # The state is donated: were the prior's buffers part of it, reading them again would fail.
        state, metrics = train_step(state, frozen, batch, jax.random.key(1))
        assert bool(metrics["finite"])
        divergence.append(float(metrics["kl_to_prior"]))
    for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    assert small.nonzero(jax.tree.map(lambda a, b: a - b, state.model.policy, started.policy))
    assert small.nonzero(jax.tree.map(lambda a, b: a - b, state.model.value, started.value))
    assert divergence[0] == pytest.approx(0, abs=1e-6)
    # The policy that rolls out is the one being trained: a KL to it would stay 0.
    assert divergence[2] > divergence[1] > 1e-6
