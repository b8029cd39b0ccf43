"""Minecraft through MineRL: actions, prompts and items, and the game's process with a stand-in for MineRL in it."""

import json
import sys

import numpy as np
import pytest

from dreamer4_jax import cli
from dreamer4_jax.agent.actions import mu_law_mouse
from dreamer4_jax.config import UserError
from dreamer4_jax.data.readers.base import Fit
from dreamer4_jax.data.readers.vpt import COMPONENTS, KEYS
from dreamer4_jax.data.readers.vpt_events import TASKS
from dreamer4_jax.envs.minerl import ITEMS, PROMPTS, HostedGame, MineRL, Prompts, item_of, to_minerl
from dreamer4_jax.evaluation import minecraft
from tests import minerl_stand_in


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """MineRL for the processes that are started from here on."""
    minerl_stand_in.install(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


def keys(*names):
    return {"keys": np.isin(KEYS, names).astype(np.uint8), "mouse": 60}  # 60: still


def test_actions_are_minerls_dictionary():
    for i, name in enumerate(KEYS):
        action = to_minerl(np.eye(23, dtype=np.uint8)[i], 60)
        pressed = [n for n, v in action.items() if n != "camera" and v]
        assert pressed == ([] if name == "ESC" else [name]) and action["camera"] == [0, 0]
        assert set(action) == {*KEYS, "camera"}
    for mouse in range(121):  # the camera is (pitch, yaw): down and right are positive
        pitch, yaw = to_minerl(np.zeros(23), mouse)["camera"]
        assert mu_law_mouse.encode(yaw, pitch) == mouse and json.loads(json.dumps([pitch, yaw])) == [pitch, yaw]
    pitch, yaw = to_minerl(np.zeros(23), int(mu_law_mouse.encode(10.0, -1.6)))["camera"]
    np.testing.assert_allclose([pitch, yaw], [-1.609, 10], atol=1e-3)


def test_prompts_follow_the_papers_ladder():
    """Each prompt's statistic counts up to what Table 6 wants; wood of any kind; nothing done earlier counts."""
    names = {
        "mine_log": "mine_block:birch_log", "craft_planks": "craft_item:oak_planks",
        "mine_cobblestone": "mine_block:stone", "mine_iron_ore": "mine_block:iron_ore",
        "mine_diamond": "mine_block:diamond_ore",
        "place_crafting_table": "use_item:crafting_table",
        **{t: f"craft_item:{t[6:]}" for t in TASKS if t.startswith("craft_") and t != "craft_planks"},
        **{t: f"use_item:{t[4:]}" for t in TASKS if t.startswith("use_")},
    }  # fmt: skip
    counts = dict.fromkeys(names.values(), 7.0)  # of an earlier life
    prompts, visited = Prompts(counts), []
    for task, wanted in PROMPTS:
        visited.append(prompts.task)
        assert prompts.task == task
        counts["mine_block:dirt"] = counts.get("mine_block:dirt", 0) + 1
        assert prompts.update(counts) == 0 and prompts.task == task
        for _ in range(wanted or 50):
            counts[names[task]] += 1
            at = prompts.index
            assert prompts.update(counts) == 1
        assert prompts.index == at + (wanted is not None)
    assert visited[0] == "mine_log" and prompts.task == "mine_diamond" and len(PROMPTS) == 25
    assert {t for t, _ in PROMPTS} <= set(TASKS)


def test_items_are_told_by_name():
    assert [item_of(n) for n in ("oak_log", "log", "minecraft:dark_oak_planks", "diamond", "minecraft.furnace")] == [
        "log", "log", "planks", "diamond", "furnace"
    ]  # fmt: skip
    assert [item_of(n) for n in ("log_pile", "diamond_ore", "stone", "air", "catalog")] == [None] * 5
    assert len(ITEMS) == len(minecraft.PAPER) == 12


def test_an_episode_through_the_games_process(stand_in):
    env = MineRL(HostedGame(), Fit((96, 160), "pad"), minutes=20 / 1200)
    observation, info = env.reset(seed=5)
    assert env.observation_space.contains(observation) and info["prompt"] == "mine_log"
    # 360 x 640 padded to 96 x 160: ninety lines of picture, six of black, as the recordings have it.
    assert (observation["image"][:90, :, 0] == 5).all() and not observation["image"][90:].any()
    assert observation["task"] == [TASKS.index("mine_log") + 1]
    observation, *_ = env.step({"keys": np.zeros(23, np.uint8), "mouse": mu_law_mouse.encode(5.8, -3.2)})
    np.testing.assert_array_equal(observation["image"][0, 0], [5, 67, 158])  # pitch -3.215, yaw 5.809
    rewards = []
    for _ in range(10):
        observation, reward, terminated, truncated, info = env.step(keys("attack"))
        rewards.append(reward)
        assert not terminated and not truncated
    assert rewards == [1] * 10 and info["prompt"] == "craft_planks"
    assert observation["task"] == [TASKS.index("craft_planks") + 1]
    assert env.step(keys("attack"))[1] == 0  # another log is not what is prompted
    _, reward, _, _, info = env.step(keys("use", "inventory", "ESC"))
    assert reward == 1 and info["gui"]
    for _ in range(7):
        *_, terminated, truncated, info = env.step(keys("sneak"))
    assert (terminated, truncated) == (False, True)  # twenty steps
    assert info["items"] == {"log": 2 / 1200, "planks": 13 / 1200} and info["success"] is False
    env.reset(seed=6)
    for _ in range(10):
        *_, terminated, truncated, info = env.step(keys("drop"))
    assert terminated and info["items"] == {}
    env.close()


def test_a_crash_of_the_game_is_an_error(stand_in, capfd):
    game = HostedGame()
    game.reset(0)
    with pytest.raises(UserError, match="has ended, code 3"):
        game.step(to_minerl(keys("forward")["keys"], 60))
    game.close()
    assert "Gradle" in capfd.readouterr().err


def test_without_minerl_the_message_has_the_steps(monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(UserError) as error:
        HostedGame()
    text = str(error.value)
    for step in ("openjdk-8-jdk", "venv", "numpy<1.24", "github.com/minerllabs/minerl@v1.0.0", "--minerl-python"):
        assert step in text
    assert sys.executable in text and "No module named" in text
    with pytest.raises(UserError, match="cannot be run"):
        HostedGame("/no/such/python")


class Woodcutter:
    """Mines in every stream, and in the first one also crafts."""

    name = "woodcutter"

    def reset(self, starting):
        self.step = 0

    def act(self, images, tasks):
        self.step += 1
        streams = [keys("attack") if self.step < 4 or i else keys("use") for i in range(len(images))]
        return {name: np.stack([s[name] for s in streams]) for name in ("keys", "mouse")}


def test_the_table_counts_episodes_that_hold_an_item(stand_in):
    found = minecraft.evaluate_minecraft(
        Woodcutter(), HostedGame, Fit((32, 64)), episodes=2, streams=2, minutes=6 / 1200, seed=0
    )
    log, planks, stick = (found["items"][n] for n in ("log", "planks", "stick"))
    assert (log["success"]["mean"], planks["success"]["mean"], stick["success"]["mean"]) == (1, 0.5, 0)
    assert log["minutes"] == 1 / 1200 and planks["minutes"] == 4 / 1200 and stick["minutes"] is None
    assert 0 < planks["success"]["low"] < 0.5 < planks["success"]["high"] < 1
    assert found["return"] == (3 + 6) / 2  # logs alone are prompted
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(minecraft.table([found]))
    text = console.export_text()
    assert "woodcutter" in text and "50.0 [" in text and "99.1" in text
    assert json.loads(minecraft.to_text([found]))["paper"]["diamond"] == 0.7


def test_runs_of_other_worlds_are_refused(tmp_path, capsys):
    from tests.saved_run import small_run_config, write_run

    write_run(tmp_path / "run", small_run_config())
    assert cli.main(["evaluate", str(tmp_path / "run"), "--env", "minerl"]) == 2
    assert "keys (binary 23)" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "run"), "--env", "minerl", "--policy", "nobody"]) == 2
    assert "unknown policy 'nobody'" in capsys.readouterr().err
    assert COMPONENTS[1].size == 121
