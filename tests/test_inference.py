"""Loading a run for inference, and its policy in gymnasium loops."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import dreamer4_jax
from dreamer4_jax import inference
from dreamer4_jax.agent import model as agent_model
from dreamer4_jax.agent.model import WorldModelPolicy
from dreamer4_jax.config import UserError
from dreamer4_jax.evaluation.closed_loop import evaluate_policy
from dreamer4_jax.inference import load_world, recording
from dreamer4_jax.training.checkpoint import CheckpointError
from dreamer4_jax.world.streams import Streams
from tests.saved_run import small_run_config, write_run
from tests.toy_env import ShowAction

CFG = small_run_config()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run directory, its models)."""
    directory = tmp_path_factory.mktemp("runs") / "toy"
    return directory, write_run(directory, CFG)


def test_a_run_is_loaded_as_it_was_saved(run, tmp_path):
    directory, saved = run
    loaded = load_world(directory)
    for a, b in zip(jax.tree.leaves(loaded.__dict__), jax.tree.leaves(saved.__dict__), strict=True):
        np.testing.assert_array_equal(a, b)
    assert loaded.config == CFG and loaded.heads.value is not None and loaded.policy is loaded.actor.policy
    cloned = load_world(directory, phase="agent")
    assert cloned.actor is None and cloned.heads.value is None and cloned.policy is cloned.agent.policy
    assert isinstance(loaded.streams(slots=2), Streams) and loaded.oracle(steps=2).steps == 2
    assert recording(directory) == directory / "data" / "frames"
    (tmp_path / "data.json").write_text(json.dumps({"directory": "elsewhere"}))
    assert str(recording(tmp_path)) == "elsewhere"


def test_what_cannot_be_loaded_is_named(run, tmp_path):
    with pytest.raises(UserError, match="no run directory"):
        load_world(tmp_path)
    with pytest.raises(UserError, match="phase = 'dreaming'"):
        load_world(run[0], phase="dreaming")
    write_run(tmp_path / "cloned", CFG, actor=False, data=False)
    assert load_world(tmp_path / "cloned").actor is None
    with pytest.raises(CheckpointError, match="phase 'imagination' is not finished"):
        load_world(tmp_path / "cloned", phase="imagination")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: damaged"):
        load_world(tmp_path)


class Recorded(ShowAction):
    """Notes the actions that it is given; its last step says whether it was a success."""

    def __init__(self):
        super().__init__()
        self.given = []

    def step(self, action):
        self.given.append(int(action))
        return super().step(action)


@pytest.mark.parametrize("greedy", [False, True])
def test_a_loaded_policy_acts_as_in_the_closed_loop_evaluation(run, greedy):
    directory, saved = run
    env = Recorded()
    policy = WorldModelPolicy(saved.tokenizer, saved.agent.dynamics, saved.policy, seed=3, greedy=greedy)
    result = evaluate_policy(policy, lambda level: env, ("toy",), episodes=3, envs=1, seed=5)
    # The same episodes in a plain loop.
    again, loaded = Recorded(), dreamer4_jax.load_policy(directory, seed=3, greedy=greedy)
    for i, seed in enumerate(result.seeds):
        observation, _ = again.reset(seed=int(seed))
        loaded.reset()
        over, total = False, 0.0
        while not over:
            observation, reward, terminated, truncated, _ = again.step(loaded.act(observation))
            over, total = terminated or truncated, total + reward
        assert total == result.returns[i]
    assert again.given == env.given and len(env.given) == result.lengths.sum()


def test_a_decision_costs_the_same_at_any_age(run):
    policy = dreamer4_jax.load_policy(run[0])
    env = ShowAction(steps=10**6)
    observation, _ = env.reset(seed=0)
    sizes = []
    for _ in range(4 * CFG.dynamics.transformer.window + 1):
        assert policy.act(observation) in range(5)
        live = sum(x.nbytes for x in jax.live_arrays())
        sizes.append((agent_model._act._cache_size(), live, policy._policy._memory.dynamics.k.nbytes))
        observation, *_ = env.step(0)
    assert len(set(sizes[1:])) == 1
    assert policy._policy._memory.dynamics.next[0] == len(sizes)


def test_a_loaded_policy_plays_in_a_vector_of_environments(run):
    """Each stream decides by what it alone has seen since its episode began."""
    many, other = (dreamer4_jax.load_policy(run[0]) for _ in range(2))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 2, 16, 16, 3), dtype=np.uint8)
    tasks = np.array([[1, 2, 3], [3, 2, 1]])
    seen = []
    for t, batch in enumerate(images):
        if t == 3:
            many.reset(np.array([False, True]))
            other.reset()
        actions = many.act({"image": batch, "task": tasks})
        beside = other.act({"image": np.stack([255 - batch[0], batch[1]]), "task": tasks})
        assert actions.shape == (2,) and actions[1] == beside[1]
        seen.append(actions)
    assert many._policy._memory.dynamics.next.tolist() == [6, 3]
    assert len(np.unique(seen)) > 1
    alone = dreamer4_jax.load_policy(run[0])
    alone.act(images[0, 0])
    with pytest.raises(ValueError, match="of 1 environments: this policy plays in 2"):
        many.act(images[0, 0])
    with pytest.raises(ValueError, match=r"uint8 \[16, 16, 3\]"):
        alone.act(images[0, 0, :8])
    with pytest.raises(ValueError, match=r"task \[2\]: must be \[3\]"):
        alone.act({"image": images[0, 0], "task": [1, 2]})
    assert isinstance(alone.act(images[0, 0]), int)  # without a task


def test_the_package_is_light_and_names_what_it_has():
    code = "import sys, dreamer4_jax as d; assert 'jax' not in sys.modules; d.load_policy; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert dreamer4_jax.load_policy is inference.load_policy
    with pytest.raises(AttributeError, match="no attribute 'load_dream'"):
        dreamer4_jax.load_dream  # noqa: B018
