"""The world model as a gymnasium environment."""

import warnings
from dataclasses import dataclass, replace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import dreamer4_jax.envs
from dreamer4_jax.agent.heads import symexp_bins
from dreamer4_jax.config import UserError
from dreamer4_jax.data.store import open_dataset
from dreamer4_jax.envs import world_model
from dreamer4_jax.envs.spaces import action_space
from dreamer4_jax.envs.starts import Starts
from dreamer4_jax.envs.world_model import WorldModelEnv, WorldModelVectorEnv
from dreamer4_jax.inference import recording
from tests.saved_run import small_run_config, world, write_run
from tests.toy_env import ACTIONS, frame_action, frame_step

CFG = small_run_config()
NAME = dreamer4_jax.envs.WORLD_MODEL
T = CFG.agent.context


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "toy"
    write_run(directory, CFG)
    return directory


@pytest.fixture(scope="module")
def starts(run):
    return Starts.draw(CFG, open_dataset(recording(run), CFG), number=20)


def rollout(env, seed, steps, actions=None):
    """(observations, rewards, ends) of one reset and some steps, new episodes included."""
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    out = [(observation["image"], observation["task"], 0.0, False, False)]
    for i in range(steps):
        action = int(rng.integers(ACTIONS)) if actions is None else actions[i]
        observation, reward, terminated, truncated, _ = env.step(action)
        out.append((observation["image"], observation["task"], reward, terminated, truncated))
        if terminated or truncated:
            observation, _ = env.reset()
            out.append((observation["image"], observation["task"], 0.0, False, False))
    return out


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# ---------------------------------------------------------------------------------------------------------------------
# Contexts


def test_starts_are_windows_of_one_episode_that_is_not_over(starts):
    """The toy's frames show their step (green), episode (blue) and action (red)."""
    assert len(starts) == 20 and starts.frames.shape[1] == T and (starts.task == [1, 2, 3]).all()
    for frames, count, move, present in zip(
        starts.frames, starts.count, starts.actions["move"], starts.present["move"], strict=True
    ):
        mine, step = frames[T - count :], frame_step(frames[T - count :])
        np.testing.assert_array_equal(np.diff(step), 1)
        assert len(np.unique(mine[:, 0, 0, 2])) == 1 and (count == T or step[0] == 0)
        # Not terminal, not cut: the episode goes on.
        assert step[-1] < 9 and frame_action(mine)[-1] != 4
        np.testing.assert_array_equal(move[T - count :][step > 0], frame_action(mine)[step > 0])
        np.testing.assert_array_equal(present[T - count :], step > 0)
    assert {1, T} <= set(starts.count.tolist())


def test_starts_go_through_a_file(starts, tmp_path):
    starts.save(tmp_path / "starts.npz")
    again = Starts.load(tmp_path / "starts.npz", CFG)
    assert_equal(again.__dict__, starts.__dict__)
    least = {"frames": starts.frames[:2, :3], "task": starts.task[:2], "actions/move": starts.actions["move"][:2, :3]}
    np.savez(tmp_path / "least.npz", **least)
    read = Starts.load(tmp_path / "least.npz", CFG)
    assert (read.count == 3).all() and (read.present["move"] == [False, True, True]).all()
    for change, match in (
        ({"task": None}, "array 'task' is missing"),
        ({"actions/move": least["actions/move"][:1]}, r"'actions/move' is int32 \[1, 3\]: must be int32 \[2, 3\]"),
        ({"frames": least["frames"] / 255}, "'frames' is float64"),
        ({"count": np.array([0, 3])}, "each count must be from 1 to 3"),
        ({"frames": np.array([{}], object)}, "cannot be read as an npz file of arrays"),
    ):
        np.savez(tmp_path / "bad.npz", **{k: v for k, v in (least | change).items() if v is not None})
        with pytest.raises(UserError, match=match):
            Starts.load(tmp_path / "bad.npz", CFG)
    with pytest.raises(UserError, match="nothing.npz: cannot be read"):
        Starts.load(tmp_path / "nothing.npz", CFG)


# ---------------------------------------------------------------------------------------------------------------------
# Environments


def test_gymnasiums_checker_finds_nothing(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(NAME, checkpoint=run, render_mode="rgb_array")
        check_env(env.unwrapped)
    assert env.action_space == gymnasium.spaces.Discrete(ACTIONS)
    observation, info = env.reset(seed=1)
    np.testing.assert_array_equal(env.render(), observation["image"])
    assert info["start"] in range(len(env.unwrapped._dreams.starts))
    assert gymnasium.make(f"dreamer4_jax.envs:{NAME}", checkpoint=run).observation_space == env.observation_space
    env.close()


def test_seeds_reproduce_and_other_seeds_do_not(starts):
    made = [WorldModelEnv(world(CFG), starts=starts) for _ in range(2)]
    first = rollout(made[0], 3, 10)
    assert_equal(first, rollout(made[1], 3, 10))
    assert_equal(first, rollout(made[0], 3, 10))  # whatever was played before
    other = rollout(made[0], 4, 10, actions=[0] * 10)
    assert any((a[0] != b[0]).any() for a, b in zip(first, other, strict=False))
    # The given start, and what follows it depends on the actions.
    frames = []
    for action in (0, 3):
        observation, info = made[0].reset(seed=9, options={"start": 5})
        assert info["start"] == 5
        frames.append((observation["image"], made[0].step(action)[0]["image"]))
    np.testing.assert_array_equal(frames[0][0], frames[1][0])
    assert (frames[0][1] != frames[1][1]).any()


def test_a_vector_environment_plays_what_single_ones_play(starts):
    """In one batch products round differently: here, to a pixel value."""
    models, count = world(CFG), 64
    envs = gymnasium.make_vec(NAME, num_envs=count, checkpoint=models, starts=starts)
    assert isinstance(envs, WorldModelVectorEnv)
    observation, info = envs.reset(seed=20)
    singles = [WorldModelEnv(models, starts=starts) for _ in range(2)]
    for i, env in enumerate(singles):
        seen, told = env.reset(seed=20 + 3 * i)
        assert told["start"] == info["start"][3 * i]
        assert np.abs(seen["image"].astype(int) - observation["image"][3 * i]).max() <= 1
    over, rng = np.zeros(count, bool), np.random.default_rng(0)
    for _ in range(15):
        actions = rng.integers(0, ACTIONS, count)
        observation, reward, terminated, truncated, info = envs.step(actions)
        for i, env in enumerate(singles):
            at = 3 * i
            if over[at]:
                seen, got, end, cut = env.reset()[0], 0.0, False, False
            else:
                seen, got, end, cut, _ = env.step(actions[at])
            assert (end, cut) == (terminated[at], truncated[at]) and observation in envs.observation_space
            assert got == pytest.approx(reward[at], rel=0.05, abs=1e-3)
            assert np.abs(seen["image"].astype(int) - observation["image"][at]).max() <= 2
        over = terminated | truncated


def test_episodes_end_by_the_continue_head_or_the_limit(starts):
    @dataclass(frozen=True)
    class Continues:
        p: float

        def prob(self, h):
            return jnp.full(h.shape[:-1], self.p)

    jax.tree_util.register_dataclass(Continues, data_fields=["p"], meta_fields=[])
    count, base = 64, world(CFG)
    ends = {}
    for p in (0.0, 0.7, 1.0):
        agent = replace_head(base.agent, cont=Continues(p))
        envs = WorldModelVectorEnv(replace(base, agent=agent), count, starts=starts)
        envs.reset(seed=0)
        ages, found, over = np.zeros(count, int), [], np.zeros(count, bool)
        for _ in range(14):
            _, reward, terminated, truncated, info = envs.step(np.zeros(count, int))
            assert (reward[over] == 0).all() and not (terminated & truncated).any()
            assert np.isnan(info["cont"][over]).all() and np.allclose(info["cont"][~over], p)
            ages = np.where(over, 0, ages + 1)
            over = terminated | truncated
            assert not (truncated & (ages != CFG.env.max_steps)).any() and not (ages > CFG.env.max_steps).any()
            found += [(age, bool(t)) for age, t in zip(ages[over], terminated[over], strict=True)]
        ends[p] = found
    assert set(ends[0.0]) == {(1, True)} and set(ends[1.0]) == {(CFG.env.max_steps, False)}
    # Each step of p = 0.7 ends an episode with probability 0.3: within 5 standard errors.
    lengths, terminal = np.array(ends[0.7]).T
    share = terminal.sum() / lengths.sum()
    assert abs(share - 0.3) < 5 * (0.21 / lengths.sum()) ** 0.5


def replace_head(agent, **heads):
    copy = jax.tree.unflatten(jax.tree.structure(agent), jax.tree.leaves(agent))
    for name, head in heads.items():
        # A plain object in a module: nnx would not take it as an attribute of a tree.
        object.__setattr__(copy, name, head)
    return copy


def test_sampled_rewards_are_bins_with_the_means_expectation(starts):
    base = world(CFG)
    mean, drawn = (WorldModelVectorEnv(base, 64, starts=starts, rewards=how) for how in ("mean", "sampled"))
    bins = symexp_bins(CFG.agent.bins)
    rewards = []
    for envs in (mean, drawn):
        envs.reset(seed=0, options={"start": 0})
        rewards.append(np.stack([envs.step(np.zeros(64, int))[1] for _ in range(2)]))
    assert np.isin(rewards[1][0], bins).all() and not np.isin(rewards[0][0], bins).any()
    assert len(np.unique(rewards[1][0])) > 1
    head = np.asarray(rewards[0][0], np.float64)
    spread = bins.astype(np.float64).std() / 8  # standard error of 64 draws, at most about this
    assert abs(rewards[1][0].mean() - head.mean()) < 5 * spread


def test_a_policy_learns_in_it_with_a_plain_loop(starts):
    """REINFORCE over logits alone, where the reward is what one action's embedding does to h."""

    @dataclass(frozen=True)
    class Direction:
        w: jax.Array

        def mean(self, h):
            return h @ self.w

    jax.tree_util.register_dataclass(Direction, data_fields=["w"], meta_fields=[])
    base, count = world(CFG), 64
    w = jnp.asarray(np.random.default_rng(1).standard_normal(32), jnp.float32)
    envs = gymnasium.make_vec(
        NAME, num_envs=count, checkpoint=replace(base, agent=replace_head(base.agent, reward=Direction(w))),
        starts=starts, max_steps=100,
    )  # fmt: skip
    envs.reset(seed=0)
    by_action = [np.mean([envs.step(np.full(count, a))[1].mean() for _ in range(3)]) for a in range(ACTIONS)]
    rng, logits, trace = np.random.default_rng(0), np.zeros(ACTIONS), []
    for _ in range(60):
        p = np.exp(logits - logits.max())
        p /= p.sum()
        actions = rng.choice(ACTIONS, count, p=p)
        reward = envs.step(actions)[1]
        trace.append(reward.mean())
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        logits += 0.3 * (advantage[:, None] * (np.eye(ACTIONS)[actions] - p)).mean(0) * ACTIONS
    spread = np.std(trace[:10])
    assert np.mean(trace[-10:]) > np.mean(trace[:10]) + spread
    assert np.argmax(p) == np.argmax(by_action)


def test_nothing_is_compiled_while_episodes_come_and_go(starts):
    envs = WorldModelVectorEnv(world(CFG), 64, starts=starts)
    envs.reset(seed=0)
    envs.step(np.zeros(64, int))
    sizes = world_model._begin._cache_size(), world_model._advance._cache_size()
    for i in range(10):
        envs.step(np.full(64, i % ACTIONS))
    assert sizes == (world_model._begin._cache_size(), world_model._advance._cache_size())


def test_spaces_of_other_actions():
    parts = [
        {"name": "keys", "kind": "binary", "size": 3},
        {"name": "mouse", "kind": "mouse", "size": 121},
        {"name": "arm", "kind": "continuous", "size": 2},
    ]
    space = action_space(small_run_config(actions=parts).actions)
    assert space["keys"].shape == (3,) and space["mouse"].n == 121 and space["arm"].high.tolist() == [1, 1]


@pytest.mark.slow
def test_actions_of_several_components_are_taken(starts):
    parts = [{"name": "keys", "kind": "binary", "size": 3}, {"name": "arm", "kind": "continuous", "size": 2}]
    config = small_run_config(actions=parts)
    n, t = starts.frames.shape[:2]
    actions = {"keys": np.zeros((n, t, 3), np.uint8), "arm": np.zeros((n, t, 2), np.float32)}
    given = replace(starts, actions=actions, present={name: starts.present["move"] for name in actions})
    for env in (WorldModelEnv(world(config), starts=given), WorldModelVectorEnv(world(config), 3, starts=given)):
        env.action_space.seed(0)
        env.reset(seed=0)
        for _ in range(2):
            observation, *_ = env.step(env.action_space.sample())
            assert observation in env.observation_space


def test_what_does_not_fit_is_refused_by_name(run, starts):
    for match, options in (
        ("rewards = 'best'", {"rewards": "best"}),
        ("steps = 3: must be a power of two up to dynamics.k_max = 4", {"steps": 3}),
        ("max_steps = 0", {"max_steps": 0}),
        ("render_mode = 'ansi'", {"render_mode": "ansi"}),
    ):
        with pytest.raises(UserError, match=match):
            WorldModelEnv(world(CFG), starts=starts, **options)
    with pytest.raises(UserError, match="has no recording; give starts"):
        WorldModelEnv(world(CFG))
    with pytest.raises(UserError, match="no run directory"):
        WorldModelEnv(run / "nowhere")
    with pytest.raises(UserError, match="num_envs = 0"):
        WorldModelVectorEnv(world(CFG), 0, starts=starts)
    env = WorldModelEnv(world(CFG), starts=starts)
    with pytest.raises(UserError, match="before the first reset"):
        env.step(0)
    with pytest.raises(UserError, match=r"options\['start'\] = 20: must be from 0 to 19"):
        env.reset(options={"start": 20})
