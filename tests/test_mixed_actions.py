"""Actions of several kinds at once, from recording through all phases to play in the real environment and back.

The environment shows its last action, so that whatever pairs frames with actions can be checked to the index.
"""

import json

import numpy as np
import pytest

from dreamer4_jax.config import ActionComponent
from dreamer4_jax.data.store import open_dataset
from dreamer4_jax.envs import control
from dreamer4_jax.envs.world_model import WorldModelEnv
from dreamer4_jax.inference import load_policy
from dreamer4_jax.runner import Run
from tests.test_runner import micro, quick  # noqa: F401  # quick: steps compiled without optimisation

PARTS = (
    ActionComponent("move", "categorical", 3),
    ActionComponent("keys", "binary", 2),
    ActionComponent("look", "mouse", 121),
    ActionComponent("arm", "continuous", 2),
)
START = 250


class Shows:
    """Each quarter of the picture shows one component of the last action; 250 everywhere before the first. The reward
    is dense and a cost: how far the arm is from its middle."""

    mission, repeat, limit = "hold still", 1, 12

    def __init__(self, parts, height, width):
        self._picture = np.zeros((height, width, 3), np.uint8)

    def reset(self, seed):
        self._picture[:] = START

    def step(self, action, last):
        for quarter, value in enumerate(shown(action)):
            rows, columns = divmod(quarter, 2)
            self._picture[8 * rows : 8 * rows + 8, 8 * columns : 8 * columns + 8] = value
        return cost(action), False, None

    def picture(self):
        return self._picture.copy()

    def expert(self, rng):
        return Still()

    def close(self):
        pass


class Still:
    def act(self, taken):
        return {
            "move": 1,
            "keys": np.asarray([1, 0], np.uint8),
            "look": 60,
            "arm": np.zeros(2, np.float32),
        }


def shown(action):
    """Four colours: what the picture shows of an action."""
    arm = np.round(100 + 50 * np.clip(action["arm"], -1, 1))
    return (
        [40 * int(action["move"]), 0, 0],
        [*(100 * np.asarray(action["keys"], int)), 0],
        [int(action["look"]), 0, 0],
        [*arm.astype(int), 0],
    )


def cost(action):
    return -0.1 - float(np.abs(np.clip(action["arm"], -1, 1)).sum())


def mixed():
    """The micro run in an environment of four components, whose reward is a cost."""
    return micro(
        **{
            "name": "mixed",
            "env.kind": "control",
            "env.levels": ["shows"],
            "env.max_steps": 12,
            "actions": [{"name": p.name, "kind": p.kind, "size": p.size} for p in PARTS],
            "agent.task_words": 1,
            "data.frames": 416,
            "data.chunk": 13,
            "data.chunks_per_shard": 16,
            "data.bot": 0.2,
            "data.noisy_bot": 0.4,
            "tokenizer.height": 16,
            "tokenizer.width": 16,
            "tokenizer.latents": 4,
            "evaluate.episodes": 3,
            "evaluate.envs": 2,
        }
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(run directory, what `all` returned)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(control.LEVELS, "shows", control.Level(Shows, PARTS))
        patch.setitem(control.WORDS, "shows", 1)
        directory = tmp_path_factory.mktemp("runs") / "mixed"
        yield directory, Run(mixed(), directory, progress=False).all()


def test_recorded_frames_show_the_actions_stored_with_them(finished):
    directory, _ = finished
    data = open_dataset(directory / "data" / "frames", mixed())
    seen = 0
    for split in data.splits:
        for i in range(data.chunks(split)):
            chunk = data.chunk(split, i)
            for t in range(len(chunk["frames"])):
                action = {p.name: chunk[f"actions/{p.name}"][t] for p in PARTS}
                corners = chunk["frames"][t, ::8, ::8].reshape(4, 3)
                present = [bool(chunk[f"present/{p.name}"][t]) for p in PARTS]
                assert all(present) or not any(present)
                if not present[0]:
                    assert chunk["is_first"][t] and chunk["reward"][t] == 0 and (corners == START).all()
                    continue
                seen += 1
                np.testing.assert_array_equal(corners, shown(action))
                assert chunk["reward"][t] == pytest.approx(cost(action), abs=1e-5)
    assert seen > 300


def test_every_phase_and_policy_ran(finished):
    directory, data = finished
    results = data["closed_loop"]["results"]
    assert len(results) == 7
    for r in results:
        assert np.isnan(r.success).all() and (r.lengths == 12).all() and (r.returns < -1).all()
        assert r.summary()["success"] is None
    stored = json.loads((directory / "results.json").read_text())
    assert [p["success"] for p in stored["closed_loop"]["results"]] == [None] * 7
    names = [t["name"] for t in data["targets"]]
    assert "return of phase 3 (imagination) above phase 2 (cloning)" in names
    page = (directory / "report.html").read_text()
    assert "Return by level" in page and "Success %" not in page


def test_the_policy_acts_as_the_environment_takes_it(finished):
    directory, _ = finished
    policy = load_policy(directory)
    env = control.make(mixed().env, "shows", height=16, width=16, words=1)
    observation, _ = env.reset(seed=0)
    policy.reset()
    for _ in range(3):
        action = policy.act(observation)
        assert set(action) == {p.name for p in PARTS}
        observation, reward, *_ = env.step(action)
        corners = observation["image"][::8, ::8].reshape(4, 3)
        np.testing.assert_array_equal(corners, shown(action))  # whatever lies beyond the range was clipped
        assert reward == pytest.approx(cost(action), abs=1e-5)


def test_the_world_model_takes_the_same_actions(finished):
    directory, _ = finished
    real = control.make(mixed().env, "shows", height=16, width=16, words=1)
    dream = WorldModelEnv(directory, number=4)
    assert dream.action_space == real.action_space
    dream.reset(seed=0)
    dream.action_space.seed(0)
    observation, reward, *_ = dream.step(dream.action_space.sample())
    assert observation in dream.observation_space and np.isfinite(reward)
