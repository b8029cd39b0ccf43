"""`dreamer4 collect ENV`: whole episodes, the same for any number of workers, resumed after a kill, by any policy."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dreamer4_jax.config import UserError, override
from dreamer4_jax.data.schema import DataError
from dreamer4_jax.data.store import open_dataset
from dreamer4_jax.envs import babyai
from dreamer4_jax.envs.episodes import collect_episodes, recording_config
from dreamer4_jax.envs.kinds import ExpertFailure

LEVELS = "BabyAI-GoToLocal-v0,BabyAI-PickupLoc-v0"
EPISODES = 12


def command(out, *options):
    return [sys.executable, "-m", "dreamer4_jax.cli", "collect", LEVELS, "--policy", "noisy", "--episodes",
            str(EPISODES), "--out", str(out), "--seed", "5", "--quiet", *options]  # fmt: skip


def contents(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if not p.name.startswith(".")}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("episodes") / "one"
    done = subprocess.run(command(out, "--workers", "1"), capture_output=True, text=True, check=True)
    return out, done.stdout


def test_every_episode_is_whole_and_counted_once(recorded):
    out, text = recorded
    data = open_dataset(out)
    found: dict[int, int] = {}
    for split in data.splits:
        for i in range(data.chunks(split)):
            chunk, segments = data.chunk(split, i), data.segments(split, i)
            stops = [*(s["start"] for s in segments[1:]), len(chunk["frames"])]
            for s, stop in zip(segments, stops, strict=True):
                if s.get("filler"):
                    continue
                assert s["level"] == LEVELS.split(",")[s["index"] % 2] and s["policy"] == "noisy"
                found[s["index"]] = found.get(s["index"], 0) + stop - s["start"]
                # A piece is the last of its episode if it has all its frames.
                whole = s["offset"] + stop - s["start"] == s["steps"] + 1
                assert chunk["is_last"][stop - 1] == whole
                if whole:
                    assert found[s["index"]] == s["steps"] + 1
    assert sorted(found) == list(range(EPISODES))
    total = json.loads((out / "dataset.json").read_text())["statistics"]["all levels"]["all"]
    assert total["episodes"] == EPISODES and "all levels" in text


def test_the_same_for_any_number_of_workers(recorded, tmp_path):
    out, _ = recorded
    subprocess.run(command(tmp_path / "three", "--workers", "3"), check=True, capture_output=True)
    assert contents(tmp_path / "three") == contents(out)


def test_goes_on_after_a_kill(recorded, tmp_path):
    out, again = recorded[0], tmp_path / "again"
    with subprocess.Popen(command(again, "--workers", "1"), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (notes := list(again.glob(".dreamer4-*.json"))):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not (again / "dataset.json").exists()
    kept = again / notes[0].name.removeprefix(".").removesuffix(".json")
    before = kept.stat().st_mtime_ns
    subprocess.run(command(again, "--workers", "2"), check=True, capture_output=True)
    assert contents(again) == contents(out) and kept.stat().st_mtime_ns == before
    refused = subprocess.run(command(again, "env.max_steps=20"), capture_output=True, text=True)
    assert refused.returncode == 2 and "env.max_steps is 32 there, 20 here" in refused.stderr


def test_what_does_not_exist_is_refused_with_what_does(tmp_path, capsys):
    from dreamer4_jax.cli import main

    out = ["--out", str(tmp_path / "data"), "--quiet"]
    for arguments, message in (
        (["nowhere"], "unknown environment 'nowhere'"),
        (["nowhere"], "crafter (Crafter)"),
        (["nowhere"], "quickstart, tiny, small, base, paper"),
        (["babyai", "--policy", "wizard"], "--policy 'wizard': choose of random, expert, noisy, or"),
        (["frozenlake", "--policy", "expert"], "no scripted expert for FrozenLake"),
        (["BabyAI-KeyInBox-v0", "--policy", "expert"], "cannot solve BabyAI-KeyInBox-v0"),
        (["babyai", "--episodes", "1"], "--episodes 1: must be at least 2"),
        (["babyai", "--workers", "0"], "--workers 0: must be at least 1"),
        (["babyai", "--size", "64"], "--size '64': expected HEIGHTxWIDTH"),
        (["babyai", "--size", "32x32"], "renders 64 x 64"),
        (["tiny", "--size", "32x32"], "--size 32x32: tiny has a size of its own"),
        (["babyai", "env.max_step=3"], "max_step"),
    ):
        assert main(["collect", *arguments, *out]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_an_experiments_levels_by_one_policy(tmp_path):
    from dreamer4_jax.cli import main

    arguments = ["tiny", "--policy", "expert", "--episodes", "3", "--workers", "1", "--quiet"]
    assert main(["collect", *arguments, "--out", str(tmp_path / "data")]) == 0
    data = open_dataset(tmp_path / "data")
    assert data.manifest["statistics"]["all levels"]["expert"] == {
        **data.manifest["statistics"]["all levels"]["expert"], "episodes": 3, "success_rate": 1.0,
    }  # fmt: skip


def test_where_the_expert_fails_another_episode_takes_the_place(tmp_path, monkeypatch):
    class Fragile:
        made = 0

        def __init__(self, env):
            Fragile.made += 1
            self.number = Fragile.made

        def act(self, taken):
            if self.number % 2 == 0:
                raise ExpertFailure("no path")
            return 6

    monkeypatch.setattr(babyai, "Bot", Fragile)
    config = override(recording_config("babyai", ("BabyAI-GoToLocal-v0",)), {"env.max_steps": 3})
    manifest = collect_episodes(config, tmp_path / "a", policy="expert", episodes=4, seed=0, progress=False)
    assert manifest["statistics"]["all levels"]["all"]["episodes"] == 4
    assert manifest["dropped"] and manifest["dropped"][0]["error"] == "no path"

    class Hopeless(Fragile):
        def act(self, taken):
            raise ExpertFailure("no path")

    monkeypatch.setattr(babyai, "Bot", Hopeless)
    with pytest.raises(UserError, match="the expert fails on level BabyAI-GoToLocal-v0, 20 times in a row"):
        collect_episodes(config, tmp_path / "b", policy="expert", episodes=4, seed=0, progress=False)


def test_a_trained_policy_plays(tmp_path):
    from tests.saved_run import small_run_config, write_run

    move = [{"name": "move", "kind": "categorical", "size": 4}]
    trained = small_run_config(**{"env.kind": "frozenlake", "env.levels": ["FrozenLake-v1"], "actions": move})
    write_run(tmp_path / "run", trained, data=False)
    run = str(tmp_path / "run")
    config = override(recording_config("frozenlake", ("FrozenLake-v1",), policy=run), {"env.max_steps": 8})
    assert (config.tokenizer.height, config.agent.task_words) == (16, trained.agent.task_words)
    kwargs = dict(policy=run, episodes=4, seed=1, progress=False)
    manifest = collect_episodes(config, tmp_path / "a", **kwargs)
    assert manifest["statistics"]["FrozenLake-v1"][run]["episodes"] == 4
    chunk = open_dataset(tmp_path / "a").chunk("train", 0)
    assert len(set(chunk["actions/move"].tolist())) > 1
    assert collect_episodes(config, tmp_path / "b", **kwargs) == manifest
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(DataError, match="seed is 1 there, 2 here"):
        collect_episodes(config, tmp_path / "a", **{**kwargs, "seed": 2})
    with pytest.raises(UserError, match="acts with one categorical component of size 4, BabyAI takes"):
        collect_episodes(recording_config("babyai", ("BabyAI-GoToLocal-v0",)), tmp_path / "c", **kwargs)
    with pytest.raises(UserError, match="it sees 16 x 16 pixels and 3 task words, the recording has 64 x 64 and 1"):
        collect_episodes(recording_config("frozenlake", ("FrozenLake-v1",)), tmp_path / "c", **kwargs)
    with pytest.raises(UserError, match="--size 64x64: .* was trained at 16x16"):
        recording_config("frozenlake", ("FrozenLake-v1",), policy=run, size=(64, 64))


def test_a_task_that_changes_is_recorded_by_frame():
    from dreamer4_jax.envs.collect import record
    from tests.toy_env import COMPONENT, ShowAction

    class Changing(ShowAction):
        def step(self, action):
            observation, *rest, info = super().step(action)
            observation["task"] = np.asarray([len(self.seen), 0, 0], np.int32)
            self.seen.append(action)
            return observation, *rest, {**info, "events": ("odd",) if len(self.seen) % 2 else ()}

    env = Changing(16, 3, 5)
    env.seen = []
    episode = record(env, lambda _: 1, env.reset(seed=0), (COMPONENT,), {}).validate((COMPONENT,))
    assert episode.task[1:, 0].tolist() == list(range(len(episode) - 1)) and episode.meta["events"] == {"odd": 1}
    env.seen = []
    assert len(record(env, lambda _: 1, env.reset(seed=0), (COMPONENT,), {}, limit=3)) == 3
    one = record(env, lambda _: 1, env.reset(seed=0), (COMPONENT,), {}, limit=1).validate((COMPONENT,))
    assert len(one) == 1 and one.task.shape == (3,)
