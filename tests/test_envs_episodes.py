"""`dreamer4 collect ENV`: whole episodes, the same for any number of workers, resumed after a kill, by any policy."""

import json
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest

from dreamer4_jax.config import UserError, override
from dreamer4_jax.data.schema import DataError
from dreamer4_jax.data.store import open_dataset
from dreamer4_jax.envs import babyai
from dreamer4_jax.envs.episodes import check_policy, collect_episodes, recording_config
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


def lake_run(directory, **options):
    """A run that plays FrozenLake, (its directory, the config to record it with, what `collect_episodes` takes)."""
    from tests.saved_run import small_run_config, write_run

    move = [{"name": "move", "kind": "categorical", "size": 4}]
    trained = small_run_config(**{"env.kind": "frozenlake", "env.levels": ["FrozenLake-v1"], "actions": move})
    write_run(directory, trained, data=False, **options)
    return recording_config("frozenlake", ("FrozenLake-v1",), policy=str(directory))


def segments_of(data):
    return [s for split in data.splits for i in range(data.chunks(split)) for s in data.segments(split, i)]


def episodes_of(directory):
    """Index -> (split, actions) of every episode, fillers too."""
    data = open_dataset(directory)
    found: dict[int, tuple[str, list[int]]] = {}
    for split in data.splits:
        for i in range(data.chunks(split)):
            chunk, segments = data.chunk(split, i), data.segments(split, i)
            stops = [*(s["start"] for s in segments[1:]), len(chunk["frames"])]
            for s, stop in zip(segments, stops, strict=True):
                assert (s["offset"] == 0) == (s["index"] not in found)  # an index is one episode's
                where, actions = found.setdefault(s["index"], (split, []))
                assert where == split and s.get("filler", False) == (s["index"] >= 2**32)
                actions += chunk["actions/move"][s["start"] : stop].tolist()
    return found


def test_no_two_shards_are_filled_with_the_same_episodes(tmp_path):
    """Shards of few and short episodes: each needs more fillers than it has episodes."""
    config = override(recording_config("frozenlake", ("FrozenLake-v1",), size=(16, 16)), {"data.chunk": 64})
    collect_episodes(config, tmp_path, policy="random", episodes=16, seed=0, progress=False)
    found = episodes_of(tmp_path)
    fillers = [index for index in found if index >= 2**32]
    assert len(fillers) > 32 and {found[index][0] for index in fillers} == {"train", "holdout"}
    seeds = {(s["index"], s["seed"]) for s in segments_of(open_dataset(tmp_path))}
    assert len(seeds) == len({seed for _, seed in seeds}) == len(found)


def test_an_episode_of_a_trained_policy_depends_on_its_number_alone(tmp_path):
    """Not on the shard that it is in, nor on what the policy played before; and nothing is compiled for it."""
    from dreamer4_jax.agent import model
    from dreamer4_jax.inference import load_policy

    run = tmp_path / "run"
    config = lake_run(run)
    for name, count in (("few", 8), ("many", 24)):
        collect_episodes(config, tmp_path / name, policy=str(run), episodes=count, seed=0, progress=False)
    few, many = episodes_of(tmp_path / "few"), episodes_of(tmp_path / "many")
    assert [few[i][1] for i in range(8)] == [many[i][1] for i in range(8)]
    assert len({tuple(many[i][1]) for i in range(24)}) > 12

    image = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    policy = load_policy(run)
    policy.reset(seed=7)
    first = [policy.act(x) for x in image]
    compiled = model._act._cache_size()
    policy.reset()
    assert [policy.act(x) for x in image] != first  # without a seed the draws go on
    policy.reset(seed=7)
    assert [policy.act(x) for x in image] == first and model._act._cache_size() == compiled


def test_a_policy_that_has_changed_does_not_go_on(tmp_path, monkeypatch):
    import shutil

    from tests.saved_run import SEEDS

    run = tmp_path / "run"
    config = lake_run(run, actor=False)
    monkeypatch.chdir(tmp_path)
    kwargs = dict(policy="run", episodes=4, seed=0, progress=False)
    manifest = collect_episodes(config, "a", **kwargs)
    request = manifest["request"]
    assert (request["policy"], request["phase"]) == (str(run), "agent") and len(request["weights"]) == 16
    assert collect_episodes(config, "a", **{**kwargs, "policy": str(run)}) == manifest  # by any name
    shutil.rmtree(run)
    monkeypatch.setitem(SEEDS, "agent", 5)
    lake_run(run, actor=False)  # trained again
    for _ in range(2):
        with pytest.raises(DataError, match=r"another config \(weights is '[0-9a-f]{16}' there"):
            collect_episodes(config, "a", **kwargs)
        (tmp_path / "a" / "dataset.json").unlink(missing_ok=True)  # nor where it was interrupted
    shutil.rmtree(run)
    lake_run(run)
    with pytest.raises(DataError, match="phase is 'agent' there, 'imagination' here"):
        collect_episodes(config, "a", **kwargs)


def test_the_phase_is_chosen_once(tmp_path, monkeypatch):
    """Phase 3 finishes while the shards are made: they all play phase 2."""
    import shutil

    from dreamer4_jax.envs import episodes

    run, plain = tmp_path / "run", episodes.make_shard
    config = lake_run(run)
    later = tmp_path / "later"
    shutil.move(run / "checkpoints" / "imagination", later)
    kwargs = dict(policy=str(run), episodes=4, seed=0, progress=False)
    manifest = collect_episodes(config, tmp_path / "a", **kwargs)

    def finishing(job):
        if later.exists():
            shutil.move(later, run / "checkpoints" / "imagination")
        return plain(job)

    monkeypatch.setattr(episodes, "make_shard", finishing)
    assert collect_episodes(config, tmp_path / "b", **kwargs) == manifest
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_trained_policy_sees_what_it_was_trained_on(tmp_path):
    from dreamer4_jax.training.loop import open_run
    from tests.saved_run import small_run_config

    seven = [{"name": "move", "kind": "categorical", "size": 7}]
    fields = {"env.view": "agent", "env.tile": 6, "env.max_steps": 9, "tokenizer.height": 64, "tokenizer.width": 64,
              "tokenizer.latents": 64, "actions": seven}  # fmt: skip
    run = str(tmp_path / "run")
    open_run(tmp_path / "run", small_run_config(**fields))
    config = recording_config("babyai", ("BabyAI-PickupLoc-v0",), policy=run)
    assert (config.env.view, config.env.tile, config.env.max_steps) == ("agent", 6, 9)
    assert config.env.levels == ("BabyAI-PickupLoc-v0",)
    check_policy(override(config, {"env.max_steps": 20}), run)
    with pytest.raises(UserError, match="trained with env.view = agent, the recording has full; give env.view=agent"):
        check_policy(override(config, {"env.view": "full"}), run)
    with pytest.raises(UserError, match="trained with env.tile = 6, the recording has 8; give env.tile=6"):
        check_policy(override(config, {"env.tile": 8}), run)
    other = recording_config("crafter", ("Crafter",), policy=run) if find_spec("crafter") else None
    assert other is None or (other.env.view, other.env.max_steps) == ("full", 1000)


def test_actions_beyond_the_range_are_recorded_as_they_were_done():
    import gymnasium

    from dreamer4_jax.config import ActionComponent
    from dreamer4_jax.envs.collect import record
    from tests.toy_env import ShowAction

    parts = (ActionComponent("arm", "continuous", 2), ActionComponent("keys", "binary", 1))
    given = []

    class Arm(ShowAction):
        action_space = gymnasium.spaces.Dict()

        def step(self, action):
            given.append(action["arm"])
            return super().step(0)

    env = Arm(16, 3, 2)
    action = {"arm": np.asarray([1.5, -0.25], np.float32), "keys": np.ones(1, np.uint8)}
    episode = record(env, lambda _: action, env.reset(seed=0), parts, {}).validate(parts)
    np.testing.assert_array_equal(episode.actions["arm"], [[0, 0], [1, -0.25], [1, -0.25]])
    np.testing.assert_array_equal(episode.actions["keys"], [[0], [1], [1]])
    np.testing.assert_array_equal(given, [[1.5, -0.25]] * 2)  # the environment is asked for what was chosen


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
