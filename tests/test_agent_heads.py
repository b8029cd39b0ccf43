"""Heads, symexp two-hot and the multi-token prediction loss: alignment, segments, presence (paper Eq 9)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from dreamer4_jax.agent import ContinueHead, PolicyHead, RewardHead, ValueHead, agent_losses, symexp_bins, symexp_twohot
from dreamer4_jax.agent.actions import distribution
from dreamer4_jax.agent.heads import future, same_episode, twohot_mean
from dreamer4_jax.config import ActionComponent, AgentConfig, ConfigError
from tests import reference

CFG = AgentConfig(mtp=3, hidden=16, bins=21)
PARTS = (ActionComponent("move", "categorical", 4), ActionComponent("keys", "binary", 2))
B, T, D, M = 2, 8, 12, 4


def make_heads(cfg=CFG, parts=PARTS, seed=0, random=False):
    keys = jax.random.split(jax.random.key(seed), 3)
    heads = PolicyHead(D, cfg, parts, keys[0]), RewardHead(D, cfg, keys[1]), ContinueHead(D, cfg, keys[2])
    if random:  # every output matters: none of the layers is at zero
        leaves, tree = jax.tree.flatten(heads)
        rng = np.random.default_rng(seed)
        heads = jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=x.shape) * 0.5, jnp.float32) for x in leaves])
    return heads


def make_batch(seed=0):
    """Episodes end in row 0 at frames 3 (terminated) and 6 (truncated); row 1 continues through the window."""
    rng = np.random.default_rng(seed)
    is_first = np.zeros((B, T), bool)
    is_first[0, [0, 4, 7]] = True
    is_terminal = np.zeros((B, T), bool)
    is_terminal[0, 3] = True
    present = ~is_first
    return {
        "actions": {
            "move": rng.integers(0, 4, (B, T)).astype(np.int32),
            "keys": rng.integers(0, 2, (B, T, 2)).astype(np.uint8),
        },
        "present": {"move": present.copy(), "keys": present.copy()},
        "reward": rng.normal(size=(B, T)).astype(np.float32),
        "is_first": is_first,
        "is_terminal": is_terminal,
        "relevant": np.ones(B, bool),
    }


def make_h(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, T, D)), jnp.float32)


jitted_twohot = jax.jit(symexp_twohot)
losses = jax.jit(lambda heads, h, batch: agent_losses(*heads, h, batch))


def slot_nll(heads, h, batch):
    """-ln p of every (row, frame, offset) by loops: {"policy", "reward", "continue"} -> {(b, t, n): nats}."""
    policy, reward, cont = heads
    actions, rewards, continues = policy(h), np.asarray(reward.logits(h), np.float64), np.asarray(cont.logits(h), float)
    move = np.asarray(jax.nn.log_softmax(actions.parts["move"].logits), np.float64)
    keys = np.asarray(actions.parts["keys"].logits, np.float64)
    bins = reference.symexp_bins(CFG.bins)
    segment = np.cumsum(batch["is_first"], 1)
    out = {"policy": {}, "reward": {}, "continue": {}}
    for b, t, n in np.ndindex(B, T, M):
        to = t + 1 + n
        if to < T and segment[b, to] == segment[b, t] and batch["relevant"][b]:
            nats = 0.0
            if batch["present"]["move"][b, to]:
                nats -= move[b, t, n, batch["actions"]["move"][b, to]]
            if batch["present"]["keys"][b, to]:
                p = 1 / (1 + np.exp(-keys[b, t, n]))
                pressed = batch["actions"]["keys"][b, to]
                nats -= np.log(np.where(pressed == 1, p, 1 - p)).sum()
            if batch["present"]["move"][b, to] or batch["present"]["keys"][b, to]:
                out["policy"][b, t, n] = nats
        to = t + n
        if to < T and segment[b, to] == segment[b, t]:
            logits = rewards[b, t, n]
            logp = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            out["reward"][b, t, n] = -(reference.twohot(float(batch["reward"][b, to]), bins) * logp).sum()
            p = 1 / (1 + np.exp(-continues[b, t, n]))
            out["continue"][b, t, n] = -np.log(1 - p if batch["is_terminal"][b, to] else p)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Symexp two-hot


def test_bins_are_symmetric_about_zero():
    bins = symexp_bins(255)
    assert bins.dtype == np.float32 and bins[127] == 0.0
    np.testing.assert_array_equal(bins, -bins[::-1])
    np.testing.assert_allclose(bins, reference.symexp_bins(255), rtol=1e-5)
    with pytest.raises(ConfigError, match="agent.bins = 4"):
        symexp_bins(4)


@given(st.lists(st.floats(-30, 30), min_size=8, max_size=8), st.sampled_from([3, 21, 255]))
def test_twohot_matches_the_reference_and_its_mean_is_the_number(exponents, n):
    x = np.asarray(reference.symexp(np.array(exponents)), np.float32)  # up to symexp(30): beyond the bins on both sides
    bins = symexp_bins(n)
    weights = np.asarray(jitted_twohot(x, bins), np.float64)
    expected = np.stack([reference.twohot(float(v), bins.astype(np.float64)) for v in x])
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
    mean = (weights * bins.astype(np.float64)).sum(-1)
    np.testing.assert_allclose(mean, np.clip(x, bins[0], bins[-1]), rtol=1e-5, atol=1e-6)


def test_twohot_of_bin_centres_is_one_hot():
    bins = symexp_bins(255)
    np.testing.assert_array_equal(symexp_twohot(jnp.asarray(bins), bins), np.eye(255, dtype=np.float32))


def test_mean_of_equal_logits_is_exactly_zero():
    for logit in (0.0, 3.7, -11.1):
        assert float(twohot_mean(jnp.full((255,), logit), symexp_bins(255))) == 0.0
    h = make_h()
    reward, value = RewardHead(D, AgentConfig(), jax.random.key(0)), ValueHead(D, AgentConfig(), jax.random.key(1))
    np.testing.assert_array_equal(reward.mean(h), 0.0)
    np.testing.assert_array_equal(value.mean(h), 0.0)


def test_value_head_learns_returns_without_a_burst_from_the_outer_bins():
    """Bins of 5e8 times a probability of 1/255: one rounding error would put the mean far outside the targets."""
    cfg = AgentConfig(hidden=32)
    value, tx = ValueHead(D, cfg, jax.random.key(0)), optax.adam(3e-3)

    @jax.jit
    def step(value, state, key):
        h = jax.random.normal(key, (64, D))
        returns = jax.nn.sigmoid(2 * h[:, 0])
        gradient = jax.grad(lambda v: v.loss(h, returns).mean())(value)
        updates, state = tx.update(gradient, state, value)
        value = optax.apply_updates(value, updates)
        return value, state, jnp.abs(value.mean(h) - returns)

    state, errors = tx.init(value), []
    for i in range(300):
        value, state, error = step(value, state, jax.random.fold_in(jax.random.key(1), i))
        errors.append(error)
    assert float(jnp.stack(errors).max()) < 1.0
    assert float(errors[-1].mean()) < 0.06


# ---------------------------------------------------------------------------------------------------------------------
# Modules


def test_shapes_and_the_cheap_first_offset():
    policy, reward, cont = make_heads(random=True)
    h = make_h()
    everything, now = jax.jit(lambda p, h: (p(h), p.next(h)))(policy, h)
    assert everything.parts["move"].logits.shape == (B, T, M, 4)
    for name in ("move", "keys"):
        np.testing.assert_allclose(now.parts[name].logits, everything.parts[name].logits[:, :, 0], rtol=1e-5, atol=1e-5)
    assert reward.logits(h).shape == (B, T, M, 21) and cont.logits(h).shape == (B, T, M)
    np.testing.assert_allclose(reward.mean(h), twohot_mean(reward.logits(h)[:, :, 0], symexp_bins(21)), rtol=1e-3)
    np.testing.assert_allclose(cont.prob(h), jax.nn.sigmoid(cont.logits(h)[:, :, 0]), rtol=1e-5)
    value = ValueHead(D, CFG, jax.random.key(0))
    assert value.logits(h).shape == (B, T, 21) and value.mean(h).shape == value.loss(h, jnp.zeros((B, T))).shape == (
        B,
        T,
    )


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_every_parameter_has_axes_and_a_fresh_head_reaches_its_input(layers):
    cfg = AgentConfig(mtp=3, hidden=16, bins=21, head_layers=layers)
    heads = make_heads(cfg)
    params = [p for head in heads for _, p in nnx.iter_graph(head) if isinstance(p, nnx.Param)]
    assert params and all(len(p.axes) == p[...].ndim and p[...].dtype == jnp.float32 for p in params)
    assert len(heads[0].mlp.hidden) == layers
    gradient = jax.jit(jax.grad(lambda h: losses(heads, h, make_batch())[0]["policy"]))(make_h())
    assert float(jnp.abs(gradient).max()) > 0  # peer mistake 7: behaviour cloning must train the agent tokens
    np.testing.assert_array_equal(heads[1].mean(make_h()), 0.0)


def test_heads_of_bfloat16_inputs_give_float32():
    policy, reward, cont = make_heads(random=True)
    h = make_h().astype(jnp.bfloat16)
    outputs = (policy(h), reward.logits(h), cont.logits(h), reward.mean(h), cont.prob(h))
    assert {x.dtype for x in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}


# ---------------------------------------------------------------------------------------------------------------------
# Multi-token prediction


def test_future_gathers_later_frames():
    x = jnp.arange(1, T + 1)[None].repeat(B, 0)
    for first in (0, 1):
        got = np.asarray(future(x, first, M))
        for t, n in np.ndindex(T, M):
            assert (got[:, t, n] == (t + first + n + 1 if t + first + n < T else 0)).all()
    assert future(jnp.zeros((B, T, 5)), 1, M).shape == (B, T, M, 5)
    assert future(jnp.zeros((B, 2)), 1, M).shape == (B, 2, M)  # windows shorter than the offsets


def test_same_episode_by_loops():
    is_first = make_batch()["is_first"]
    segment = np.cumsum(is_first, 1)
    for first in (0, 1):
        got = np.asarray(same_episode(jnp.asarray(is_first), first, M))
        for b, t, n in np.ndindex(B, T, M):
            to = t + first + n
            assert got[b, t, n] == (to < T and segment[b, to] == segment[b, t])


@pytest.mark.parametrize("seed", range(3))
def test_losses_are_the_means_of_all_counted_targets(seed):
    heads, h, batch = make_heads(random=True, seed=seed), make_h(seed), make_batch(seed)
    rng = np.random.default_rng(seed)
    for name in batch["present"]:  # missing per frame, per sample and per component, mixed (peer mistake 12)
        batch["present"][name] &= rng.random((B, T)) < 0.6
    batch["relevant"][seed % 2] = seed == 2
    terms, metrics = losses(heads, h, batch)
    for name, slots in slot_nll(heads, h, batch).items():
        np.testing.assert_allclose(terms[name], np.mean(list(slots.values())), rtol=1e-4, err_msg=name)
        assert terms[name].shape == () and terms[name].dtype == jnp.float32
    assert all(np.isfinite(float(m)) for m in metrics.values())


def test_event_weight_counts_rewards_and_ends_several_times():
    """The weighted mean over slots: terminal frames and the part of a reward in other bins than 0 count 5, the rest 1;
    cloning stays.

    The odds of "no reward" and "goes on" are 5 times those in the loss (logit adjustment)."""
    heads, h, batch = make_heads(random=True), make_h(), make_batch()
    batch["reward"] = np.where(batch["reward"] > 0.5, batch["reward"], 0.0).astype(np.float32)
    assert 0 < np.count_nonzero(batch["reward"]) < batch["reward"].size / 2
    weighted, _ = jax.jit(lambda heads, h, batch: agent_losses(*heads, h, batch, event_weight=5.0))(heads, h, batch)
    policy, reward, cont = heads
    reward.mlp.bias[...] = reward.mlp.bias[...].at[:, CFG.bins // 2].add(-np.log(5.0))
    cont.mlp.bias[...] = cont.mlp.bias[...] - np.log(5.0)
    slots = slot_nll((policy, reward, cont), h, batch)
    weights = {(b, t, n): 5.0 if batch["is_terminal"][b, t + n] else 1.0 for b, t, n in slots["continue"]}
    expected = sum(weights[at] * nll for at, nll in slots["continue"].items()) / sum(weights.values())
    np.testing.assert_allclose(weighted["continue"], expected, rtol=1e-4)
    logits, bins = np.asarray(reward.logits(h), np.float64), reference.symexp_bins(CFG.bins)
    total = count = 0.0
    for b, t, n in slots["reward"]:
        logp = logits[b, t, n] - np.log(np.exp(logits[b, t, n]).sum())
        mass = reference.twohot(float(batch["reward"][b, t + n]), bins) * np.where(bins == 0, 1.0, 5.0)
        total, count = total - (mass * logp).sum(), count + mass.sum()
    np.testing.assert_allclose(weighted["reward"], total / count, rtol=1e-4)
    assert float(weighted["policy"]) == float(losses(heads, h, batch)[0]["policy"])


@pytest.mark.parametrize("size", [0.5, -0.05])  # beyond the first bin, and between it and zero
def test_event_weight_leaves_the_learned_probabilities_alone(size):
    """Heads that see nothing learn the frequencies, whatever the weight: here 1 reward and 1 end in 8 frames."""
    cfg = AgentConfig(mtp=0, hidden=4, head_layers=0, bins=255)
    batch = {
        "actions": {"move": np.zeros((1, 8), np.int32)},
        "present": {"move": np.ones((1, 8), bool)},
        "reward": np.where(np.arange(8) == 3, size, 0.0)[None].astype(np.float32),
        "is_first": np.zeros((1, 8), bool),
        "is_terminal": (np.arange(8) == 3)[None],
        "relevant": np.ones(1, bool),
    }
    h, tx = jnp.ones((1, 8, D)), optax.adam(0.03)
    for weight in (1.0, 10.0):

        @jax.jit
        def step(heads, state, weight=weight):
            def total(heads):
                terms, _ = agent_losses(*heads, h, batch, event_weight=weight)
                return terms["reward"] + terms["continue"]

            updates, state = tx.update(jax.grad(total)(heads), state, heads)
            return optax.apply_updates(heads, updates), state

        heads = make_heads(cfg, PARTS[:1])
        state = tx.init(heads)
        for _ in range(1500):
            heads, state = step(heads, state)
        np.testing.assert_allclose(heads[1].mean(h), size / 8, atol=4e-3 * abs(size))
        np.testing.assert_allclose(heads[2].prob(h), 7 / 8, atol=2e-3)


def policy_targets(batch, change, heads=None, h=None):
    """Which (b, t, n) policy targets react to a change of the batch, by the loss of that slot's own logits."""
    heads, h = heads or make_heads(random=True), make_h() if h is None else h
    policy, reward, cont = heads
    altered = {k: ({n: v.copy() for n, v in x.items()} if isinstance(x, dict) else x.copy()) for k, x in batch.items()}
    change(altered)

    class Fixed:  # feeds logits in, so that the gradient tells which slot each target went to
        components, mlp = policy.components, policy.mlp

        def __init__(self, shift):
            self.shift = shift

        def __call__(self, x):
            return jax.tree.map(lambda logits, s: logits + s, policy(x), self.shift)

    def gradient(b):
        shift = jax.tree.map(jnp.zeros_like, policy(h))
        return jax.jit(jax.grad(lambda s: agent_losses(Fixed(s), reward, cont, h, b)[0]["policy"]))(shift)

    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(-1) > 0, gradient(batch), gradient(altered))
    return set(map(tuple, np.argwhere(np.any(jax.tree.leaves(moved), axis=0)).tolist()))


def test_policy_predicts_the_action_after_the_frame():
    """Item 11: the action stored at t led to frame t; it is no target of t, n = 0, nor of any frame from t on."""

    def change(batch):
        batch["actions"]["move"][1, 5] = (batch["actions"]["move"][1, 5] + 1) % 4

    # The action stored at 5 is the n = 0 target of frame 4, n = 1 of frame 3 and so on; never of frame 5.
    assert policy_targets(make_batch(), change) == {(1, 4, 0), (1, 3, 1), (1, 2, 2), (1, 1, 3)}


def test_policy_targets_never_cross_an_episode():
    def change(batch):
        batch["actions"]["move"][0, 5] = (batch["actions"]["move"][0, 5] + 1) % 4

    assert policy_targets(make_batch(), change) == {(0, 4, 0)}  # frames 0 to 3 belong to the episode before

    def change_first(batch):
        batch["actions"]["move"][0, 4] = (batch["actions"]["move"][0, 4] + 1) % 4
        batch["actions"]["keys"][0, 7] = 1 - batch["actions"]["keys"][0, 7]

    batch = make_batch()
    batch["present"] = {name: np.ones((B, T), bool) for name in batch["present"]}  # even if marked present
    assert policy_targets(batch, change_first) == set()


def test_presence_is_per_frame_and_per_component():
    batch = make_batch()
    batch["present"]["move"][1, 5] = False

    def change(b):
        b["actions"]["move"][1, 5] = 99  # absent: never read

    assert policy_targets(batch, change) == set()

    def change_keys(b):
        b["actions"]["keys"][1, 5] = 1 - b["actions"]["keys"][1, 5]  # the other component of the same frame is

    assert policy_targets(batch, change_keys) == {(1, 4, 0), (1, 3, 1), (1, 2, 2), (1, 1, 3)}


def test_an_action_without_any_present_component_is_not_counted():
    heads, h, batch = make_heads(random=True), make_h(), make_batch()
    batch["present"] = {name: np.zeros((B, T), bool) for name in batch["present"]}
    terms, metrics = losses(heads, h, batch)
    assert float(terms["policy"]) == 0.0 and float(metrics["policy_targets"]) == 0.0
    gradient = jax.jit(jax.grad(lambda p: losses((p, *heads[1:]), h, batch)[0]["policy"]))(heads[0])
    assert all(float(jnp.abs(x).max()) == 0.0 for x in jax.tree.leaves(gradient))


def test_policy_only_on_relevant_rows_reward_and_continue_on_all():
    heads, h, batch = make_heads(random=True), make_h(), make_batch()
    batch["relevant"] = np.array([False, True])

    def per_row(name):
        gradient = jax.jit(jax.grad(lambda x: losses(heads, x, batch)[0][name]))(h)
        return (np.abs(np.asarray(gradient)).max((1, 2)) > 0).tolist()

    assert per_row("policy") == [False, True]
    assert per_row("reward") == per_row("continue") == [True, True]
    batch["relevant"][:] = False
    assert float(losses(heads, h, batch)[0]["policy"]) == 0.0


@pytest.mark.parametrize("term", ["reward", "continue"])
def test_reward_and_continue_come_with_their_frame(term):
    """Reward offset n of frame t is stored at t + n: n = 0 is the reward for the action that led to frame t."""
    heads, h, batch = make_heads(random=True), make_h(), make_batch()

    def frames_that_see(b, t):
        altered = {**batch, "reward": batch["reward"].copy(), "is_terminal": batch["is_terminal"].copy()}
        if term == "reward":
            altered["reward"][b, t] += 1.0
        else:
            altered["is_terminal"][b, t] ^= True
        gradients = [jax.grad(lambda x, y=y: losses(heads, x, y)[0][term])(h) for y in (batch, altered)]
        return np.unique(np.argwhere(np.abs(gradients[0] - gradients[1]).max(-1) > 0)[:, 1]).tolist()

    assert frames_that_see(1, 5) == [2, 3, 4, 5]  # n = 3, 2, 1, 0
    assert frames_that_see(0, 5) == [4, 5]  # the episode starts at 4
    assert frames_that_see(0, 3) == [0, 1, 2, 3]  # a terminal frame is still of its episode
    assert frames_that_see(0, 7) == [7]


def test_separate_images_have_no_policy_targets():
    """Rows treated as images are marked is_first everywhere: only n = 0 of reward and continue remains."""
    heads, h, batch = make_heads(random=True), make_h(), make_batch()
    batch["is_first"][:] = True
    slots = slot_nll(heads, h, batch)
    assert not slots["policy"] and set(n for _, _, n in slots["reward"]) == {0}
    terms, _ = losses(heads, h, batch)
    assert float(terms["policy"]) == 0.0
    np.testing.assert_allclose(terms["reward"], np.mean(list(slots["reward"].values())), rtol=1e-4)


def test_metrics_of_a_perfect_policy():
    """A policy that knows the next action scores 1; one that repeats the action that led to the frame does not."""
    batch = make_batch()
    _, reward, cont = make_heads()

    class Oracle:
        components, mlp = PARTS, make_heads()[0].mlp

        def __init__(self, first):
            self.first = first

        def __call__(self, h):
            move = 50.0 * jax.nn.one_hot(future(jnp.asarray(batch["actions"]["move"]), self.first, M), 4)
            keys = 100.0 * (future(jnp.asarray(batch["actions"]["keys"]), self.first, M).astype(jnp.float32) - 0.5)
            return distribution(jnp.concatenate([move, keys], -1), PARTS)

    terms, metrics = agent_losses(Oracle(1), reward, cont, make_h(), batch)
    assert float(terms["policy"]) < 1e-6
    assert float(metrics["policy_accuracy/move"]) == float(metrics["policy_accuracy/keys"]) == 1.0
    copy, _ = agent_losses(Oracle(0), reward, cont, make_h(), batch)
    assert float(copy["policy"]) > 5.0
    # A fresh reward head predicts 0.
    np.testing.assert_allclose(metrics["reward_error"], np.abs(batch["reward"]).mean(), rtol=1e-5)


def test_reward_that_depends_on_the_action_alone_is_learned():
    """Item 18: h of frame t holds the action that led to it, so reward (s, a) at n = 0 can be learned."""
    cfg = AgentConfig(mtp=1, hidden=32, bins=41)
    heads, tx = make_heads(cfg), optax.adam(1e-2)
    rng = np.random.default_rng(0)
    batch = make_batch()
    batch["is_first"][:] = False

    @jax.jit
    def step(heads, state, move):
        h = jnp.concatenate([jax.nn.one_hot(move, 4), jnp.ones((B, T, D - 4))], -1)
        data = {**batch, "reward": (move == 2).astype(jnp.float32)}
        (_, metrics), gradient = jax.value_and_grad(
            lambda x: (lambda terms, m: (terms["reward"], m))(*agent_losses(*x, h, data)), has_aux=True
        )(heads)
        updates, state = tx.update(gradient, state, heads)
        return optax.apply_updates(heads, updates), state, metrics

    state = tx.init(heads)
    for _ in range(200):
        heads, state, metrics = step(heads, state, jnp.asarray(rng.integers(0, 4, (B, T))))
    assert float(metrics["reward_error"]) < 0.1
