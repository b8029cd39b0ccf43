"""VPT contractor recordings: keys, mouse, known quirks, the pointer, and events as the paper's tasks."""

import json

import numpy as np
import pytest

from dreamer4_jax.agent.actions import mu_law_mouse
from dreamer4_jax.data import readers
from dreamer4_jax.data.readers import vpt
from dreamer4_jax.data.readers.base import Fit, Part
from dreamer4_jax.data.readers.vpt_events import TASKS, events, task_of
from dreamer4_jax.data.schema import DataError
from tests.sources import write_video

NAMES = {name: key for key, name in vpt._KEYBOARD.items()}


def line(keys=(), dx=0.0, dy=0.0, buttons=(), new=(), hotbar=0, gui=False, x=640.0, y=360.0, stats=None):
    """One line as the recorder writes it."""
    return {
        "mouse": {"x": x, "y": y, "dx": dx, "dy": dy, "scaledX": 0.0, "scaledY": 0.0, "dwheel": 0.0,
                  "buttons": list(buttons), "newButtons": list(new)},
        "keyboard": {"keys": [NAMES[k] for k in keys], "newKeys": [], "chars": ""},
        "isGuiOpen": gui, "isGuiInventory": gui, "hotbar": hotbar, "yaw": 0.0, "pitch": 0.0, "xpos": 0.0, "ypos": 64.0,
        "zpos": 0.0, "tick": 0, "milli": 0, "inventory": [], "serverTick": 0, "serverTickDurationMs": 1.0,
        "stats": stats or {},
    }  # fmt: skip


def write(folder, name, lines, frames=None):
    """NAME.mp4 beside NAME.jsonl; by default frame t shows 40 where line t - 1 pressed `forward`, and 0 elsewhere."""
    if frames is None:
        pressed = [False, *("key.keyboard.w" in x["keyboard"]["keys"] for x in lines)][: len(lines)]
        frames = np.zeros((len(lines), 36, 64, 3), np.uint8)
        frames[:] = np.where(pressed, 200, 40)[:, None, None, None]
    folder.mkdir(exist_ok=True)
    write_video(folder / f"{name}.mp4", frames)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return frames


def pressed(episode, key):
    return episode.actions["keys"][:, vpt.KEYS.index(key)]


def test_the_frame_shows_the_action_that_led_to_it(tmp_path):
    rng = np.random.default_rng(0)
    lines = [line(["forward"] if rng.random() < 0.5 else []) for _ in range(30)]
    write(tmp_path / "set", "cheeky-cornflower-1-20220101-000000", lines)
    reader = readers.open_source(tmp_path / "set")
    assert reader.format == "vpt" and reader.fps == 20 and len(vpt.KEYS) == 23
    (entry,) = reader.entries()
    episode = reader.read(entry.key, Part(fit=Fit((16, 16)))).validate(reader.space.components)
    assert len(episode) == entry.frames == 30  # frames without input stay
    shown = episode.frames[:, 8, 8, 0] > 100
    np.testing.assert_array_equal(pressed(episode, "forward")[1:], shown[1:])
    assert 0 < shown.sum() < 29 and all(not p[0] and p[1:].all() for p in episode.present.values())
    part = reader.read(entry.key, Part(10, 20, Fit((16, 16))))
    np.testing.assert_array_equal(part.actions["keys"][1:], episode.actions["keys"][11:20])


def test_every_key_and_button():
    names = [*vpt._KEYBOARD.values()]
    lines = [line([name]) for name in names] + [line(buttons=[b], new=[b]) for b in range(3)]
    keys, _ = vpt.keys_and_mouse(lines)
    np.testing.assert_array_equal(keys, np.eye(23))
    foreign = line()
    foreign["keyboard"]["keys"] = ["key.keyboard.f3"]
    assert not vpt.keys_and_mouse([foreign])[0].any()


def test_the_camera_keeps_fractions_of_a_degree():
    # 3 pixels are 0.45 degrees: whole degrees, as in the public reader, would lose them.
    _, mouse = vpt.keys_and_mouse([line(dx=3, dy=-5), line(dx=-40, dy=0), line(dx=5000)])
    np.testing.assert_allclose(mouse, [[0.45, -0.75], [-6.0, 0.0], [0.0, 0.0]])
    ids = mu_law_mouse.encode(mouse[:, 0], mouse[:, 1])
    assert ids[0] != mu_law_mouse.encode(0.0, 0.0)
    dx, dy = mu_law_mouse.decode(ids)
    np.testing.assert_allclose(dx[0], 0.615, atol=1e-3)
    np.testing.assert_allclose(dy[0], -0.615, atol=1e-3)


def test_a_stuck_attack_is_released_until_it_is_pressed_anew():
    first = line(buttons=[0], new=[0])
    lines = [first, line(buttons=[0]), line(buttons=[0, 1], new=[1]), line(buttons=[0], new=[0]), line(buttons=[0])]
    keys, _ = vpt.keys_and_mouse(lines)
    np.testing.assert_array_equal(keys[:, vpt.KEYS.index("attack")], [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(keys[:, vpt.KEYS.index("use")], [0, 0, 1, 0, 0])


def test_the_scroll_wheel_counts_as_a_hotbar_key():
    keys, _ = vpt.keys_and_mouse([line(hotbar=4), line(hotbar=4), line(hotbar=6), line(hotbar=6)])
    hotbar = keys[:, [vpt.KEYS.index(f"hotbar.{i}") for i in range(1, 10)]]
    assert hotbar.sum() == 1 and hotbar[2, 6] == 1  # the slot of the first line was chosen before


def test_the_pointer_is_drawn_where_a_gui_is_open(tmp_path):
    frames = np.full((3, 360, 640, 3), 90, np.uint8)
    lines = [line(), line(gui=True, x=200, y=100), line(gui=True, x=1279, y=719)]
    write(tmp_path / "set", "a", lines, frames)
    reader = readers.open_source(tmp_path / "set")
    video = reader.read("a", Part()).frames.astype(int)
    different = np.abs(video - video[0, 200, 200]).max(-1) > 30
    assert not different[0].any()
    rows, columns = np.nonzero(different[1])  # at half of 720 lines: (100, 50) and 16 pixels on
    assert (
        (columns.min(), rows.min()) == (100, 50) and columns.max() < 116 and rows.max() < 66 and different[1].sum() > 60
    )
    assert different[2].sum() == 1  # the tip in the corner; the rest is outside


def test_statistics_become_the_papers_tasks():
    assert len(TASKS) == 20 and TASKS[0] == "mine_log" and TASKS[4] == "mine_diamond"
    for name, task in (
        ("minecraft.mine_block:minecraft.birch_log", "mine_log"),
        ("minecraft.mine_block:minecraft.stone", "mine_cobblestone"),
        ("minecraft.craft_item:minecraft.spruce_planks", "craft_planks"),
        ("minecraft.craft_item:minecraft.iron_ingot", "craft_iron_ingot"),
        ("minecraft.use_item:minecraft.crafting_table", "place_crafting_table"),
        ("minecraft.custom:minecraft.interact_with_furnace", "open_furnace"),
        ("minecraft.use_item:minecraft.iron_pickaxe", "use_iron_pickaxe"),
        ("minecraft.craft_item:minecraft.stone_pickaxe", "craft_stone_pickaxe"),
        ("minecraft.custom:minecraft.jump", None),
        ("minecraft.pickup:minecraft.oak_log", None),
    ):
        assert task_of(name) == task
    log, planks = "minecraft.mine_block:minecraft.oak_log", "minecraft.craft_item:minecraft.oak_planks"
    # What the session had counted before is no event; a line without counts is none either.
    assert events([{log: 7}, {log: 7}, {}, {log: 8}, {log: 8, planks: 4}, {log: 9, planks: 8}]) == [
        (3, "mine_log"), (4, "craft_planks"), (5, "mine_log"), (5, "craft_planks")]  # fmt: skip


def test_the_task_of_a_frame_is_the_event_to_come(tmp_path):
    log, planks = "minecraft.mine_block:minecraft.oak_log", "minecraft.craft_item:minecraft.oak_planks"
    stats = [{log: 3}, {log: 3}, {log: 4}, {log: 4}, {log: 4}, {log: 4, planks: 4}, {log: 4, planks: 4}]
    write(tmp_path / "set", "a", [line(stats=s) for s in stats])
    reader = readers.open_source(tmp_path / "set")
    episode = reader.read("a", Part(fit=Fit((8, 8)))).validate(reader.space.components)
    np.testing.assert_array_equal(episode.task[:, 0], [1, 1, 1, 6, 6, 6, 0])
    np.testing.assert_array_equal(episode.reward, [0, 0, 1, 0, 0, 1, 0])
    assert [reader.tasks[0], reader.tasks[5]] == ["mine_log", "craft_planks"]
    assert episode.meta["events"] == {"mine_log": 1, "craft_planks": 1}


def test_bad_recordings_are_named(tmp_path):
    lines = [line() for _ in range(60)]
    write(tmp_path / "set", "good", lines)
    write(tmp_path / "set", "longer", lines + [line()] * 2, np.zeros((60, 36, 64, 3), np.uint8))
    write(tmp_path / "set", "other", lines + [line()] * 30, np.zeros((60, 36, 64, 3), np.uint8))
    write(tmp_path / "set", "broken", lines)
    text = (tmp_path / "set/broken.jsonl").read_text().splitlines()
    (tmp_path / "set/broken.jsonl").write_text("\n".join([*text[:5], "{half", *text[6:]]))
    write(tmp_path / "set", "cut", lines)
    (tmp_path / "set/cut.jsonl").write_text("\n".join(text)[:-20])  # the recorder stopped within a line
    write(tmp_path / "set", "alone", lines)
    (tmp_path / "set/alone.jsonl").unlink()
    reader = readers.open_source(tmp_path / "set", "vpt")
    for key, frames in (("good", 60), ("longer", 60), ("cut", 59)):
        assert len(reader.read(key, Part(fit=Fit((8, 8))))) == frames
    for key, message in (
        ("other", "other: has 60 frames and 90 lines: they are not of one recording"),
        ("broken", "broken.jsonl: line 6 is no JSON"),
        ("alone", "alone: cannot be read .FileNotFoundError"),
    ):
        with pytest.raises(DataError, match=message):
            reader.read(key, Part())
