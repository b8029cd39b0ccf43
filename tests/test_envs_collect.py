"""Recording: the same data whatever the number of workers, resumed after an interruption, nothing overwritten."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dreamer4_jax.config import UserError, preset, to_dict
from dreamer4_jax.data.schema import DataError
from dreamer4_jax.data.store import open_dataset
from dreamer4_jax.envs import babyai, collect
from dreamer4_jax.envs.symbols import SymbolDecoder

TINY = {"data.frames": 256, "data.chunk": 32, "data.chunks_per_shard": 4, "data.workers": 1}
LEVELS = "BabyAI-GoToLocal-v0,BabyAI-PickupLoc-v0"
ACTIONS = 7


def config(**changes):
    return preset("tiny", **{**TINY, "train.tokenizer.length": 16, "env.levels": LEVELS, **changes})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "babyai"
    return path, collect.collect(config(), path, seed=7, progress=False)


def test_recorded_dataset(recorded):
    path, manifest = recorded
    data = open_dataset(path, config())
    assert data.frames("train") == data.frames("holdout") == 128
    for split in data.splits:
        for i in range(data.chunks(split)):
            c = data.chunk(split, i)
            assert SymbolDecoder(8).exact(c["frames"]) == 1.0
            np.testing.assert_array_equal(c["present/move"], ~c["is_first"])
            assert (c["reward"][c["is_first"]] == 0).all()
            # A reward comes with the terminal frame of a success, and only there.
            np.testing.assert_array_equal(c["reward"] > 0, c["is_terminal"])
            for s in data.segments(split, i):
                ids = babyai.encode_task(s["mission"], 12)
                np.testing.assert_array_equal(c["task"][s["start"]], ids)
                assert s["level"] in LEVELS and s["seed"] >= collect.FIRST_SEED
    total = manifest["statistics"]["all levels"]["all"]
    assert total["episodes"] == sum(manifest["statistics"][lv]["all"]["episodes"] for lv in LEVELS.split(","))
    assert 0 < total["success_rate"] <= 1


def test_same_data_for_any_number_of_workers(recorded, tmp_path):
    path, manifest = recorded
    # A process of its own: spawned workers import the main module, which here would be pytest's.
    code = (
        "import sys\n"
        "from dreamer4_jax.config import from_dict, Config\n"
        "from dreamer4_jax.envs.collect import collect\n"
        "import json\n"
        "if __name__ == '__main__':\n"
        "    config = from_dict(Config, json.loads(sys.argv[1]))\n"
        "    collect(config, sys.argv[2], seed=7, progress=False)\n"
        "    assert 'jax' not in sys.modules\n"
    )
    (tmp_path / "main.py").write_text(code)
    tree = json.dumps(to_dict(config(**{"data.workers": 2})))
    subprocess.run([sys.executable, str(tmp_path / "main.py"), tree, str(tmp_path / "two")], check=True)
    assert (tmp_path / "two/dataset.json").read_text() == (path / "dataset.json").read_text()
    for file in path.glob("dreamer4-*"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_resumes_and_repairs(recorded, tmp_path, monkeypatch):
    path, manifest = recorded
    made = []
    whole = collect.episodes

    def interrupted(cfg, seed, shard, tally=None):
        made.append(shard)
        if shard == 1 and len(made) == 2:
            raise KeyboardInterrupt
        return whole(cfg, seed, shard, tally)

    monkeypatch.setattr(collect, "episodes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect.collect(config(), tmp_path / "again", seed=7, progress=False)
    assert not (tmp_path / "again/dataset.json").exists()
    assert collect.collect(config(), tmp_path / "again", seed=7, progress=False) == manifest
    assert made == [0, 1, 1]  # the whole shard was kept
    shard = next((tmp_path / "again").glob("dreamer4-train*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert collect.collect(config(), tmp_path / "again", seed=7, progress=False) == manifest
    assert made == [0, 1, 1, 0]  # the damaged one was made again
    open_dataset(tmp_path / "again", config())


def test_a_directory_of_another_config_is_refused(recorded):
    path, _ = recorded
    with pytest.raises(DataError, match="env.max_steps is 32 there, 16 here"):
        collect.collect(config(**{"env.max_steps": 16}), path, seed=7, progress=False)
    with pytest.raises(DataError, match="seed is 7 there, 8 here"):
        collect.collect(config(), path, seed=8, progress=False)


def test_policies_differ_as_they_should():
    made = {}
    for policy, shares in {"bot": (1, 0), "noisy_bot": (0, 1), "aimless": (0, 0)}.items():
        c = config(**{"data.bot": shares[0], "data.noisy_bot": shares[1], "data.burst": 0.5, "env.max_steps": 16})
        stream = collect.episodes(c, 0, 0)
        made[policy] = [next(stream) for _ in range(40)]
        assert {e.meta["policy"] for e in made[policy]} == {policy}
    rate = {p: np.mean([e.meta["success"] for e in es]) for p, es in made.items()}
    assert rate["bot"] > rate["noisy_bot"] > rate["aimless"]
    assert {len(e) for es in made.values() for e in es} <= set(range(2, 18))


def test_random_actions_follow_their_shares():
    assert len(babyai.RANDOM) == ACTIONS and sum(babyai.RANDOM) == pytest.approx(1)
    c = config(**{"data.bot": 0.0, "data.noisy_bot": 0.0})  # aimless walks only
    env = babyai.make(c.env, c.env.levels[0], height=64, width=64, words=12)
    walker = collect.Scripted("aimless", c.data, env, np.random.default_rng(0))
    drawn = np.bincount([walker.act() for _ in range(4000)], minlength=ACTIONS) / 4000
    error = 4 * np.sqrt(np.array(babyai.RANDOM) / 4000)
    assert (np.abs(drawn - babyai.RANDOM) < error).all()


def test_data_policy_plays_in_lockstep():
    policy = collect.DataPolicy(config(), policy="bot")
    envs = [babyai.make(config().env, level, height=64, width=64, words=12) for level in LEVELS.split(",")]
    for i, env in enumerate(envs):
        env.reset(seed=i)
        policy.begin(i, env, i)
    policy.reset(np.ones(2, bool))
    live, success = {0, 1}, []
    images, tasks = np.zeros((2, 64, 64, 3), np.uint8), np.zeros((2, 12), np.int32)
    while live:
        actions = policy.act(images, tasks)["move"]
        for i in list(live):
            *_, terminated, truncated, info = envs[i].step(actions[i])
            if terminated or truncated:
                success.append(info["success"])
                live.remove(i)
                policy.end(i)
    assert success == [True, True]
    with pytest.raises(UserError, match="'expert': choose one of bot, noisy_bot, aimless"):
        collect.DataPolicy(config(), policy="expert")


def test_a_failing_bot_is_counted_and_named(monkeypatch):
    class Broken:
        calls = 0

        def __init__(self, env):
            pass

        def replan(self, action):
            Broken.calls += 1
            if Broken.calls % 3 == 0:
                raise AssertionError("no path")
            return 6

    monkeypatch.setattr(babyai, "BabyAIBot", Broken)
    c, tally = config(**{"data.bot": 1.0, "data.noisy_bot": 0.0, "env.max_steps": 2}), collect.Tally()
    stream = collect.episodes(c, 0, 0, tally)
    for _ in range(5):
        next(stream)
    assert tally.dropped and tally.dropped[0]["error"] == "AssertionError: no path"
    assert {"level", "policy", "seed", "mission"} <= set(tally.dropped[0])
    c = config(**{"data.bot": 1.0, "data.noisy_bot": 0.0, "env.max_steps": 3})
    with pytest.raises(UserError, match="expert fails on level"):
        next(collect.episodes(c, 0, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env.levels": "BabyAI-KeyInBox-v0"}, "cannot solve BabyAI-KeyInBox-v0"),
        ({"env.levels": "BabyAI-Unlock-v0"}, "renders 176 x 176"),
        ({"env.levels": "BabyAI-Nowhere-v0"}, "unknown level"),
        ({"data.burst": 1.5}, r"data.burst = 1.5: must be in \[0, 1\]"),
        ({"actions": [{"name": "move", "kind": "categorical", "size": 5}]}, "one categorical component of size 7"),
        ({"agent.task_vocab": 20}, "agent.task_vocab = 20"),
    ],
)
def test_bad_config_is_refused_before_writing(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        collect.collect(config(**changes), tmp_path / "data", seed=0, progress=False)
    assert not (tmp_path / "data").exists()
