"""The paper's 20 Minecraft tasks (its Table 4) as events in the statistics of a contractor recording.

`stats` counts up over a play session, which goes on through several recordings: what stands in the first line is where
the count begins, and an event is a count that rises after it. The counts of a line are those of its frame.
"""

from collections.abc import Iterable, Mapping
from typing import Any

TASKS = (
    "mine_log mine_cobblestone mine_iron_ore mine_coal mine_diamond craft_planks craft_stick craft_crafting_table "
    "craft_furnace craft_iron_ingot craft_wooden_pickaxe craft_stone_pickaxe craft_iron_pickaxe open_crafting_table "
    "open_furnace place_crafting_table place_furnace use_wooden_pickaxe use_stone_pickaxe use_iron_pickaxe"
).split()

# (statistic, item) -> task. Placing a block is using its item; smelting counts as crafting when the ingot is taken out.
_EXACT = {
    ("mine_block", "stone"): "mine_cobblestone",
    ("mine_block", "cobblestone"): "mine_cobblestone",
    ("mine_block", "iron_ore"): "mine_iron_ore",
    ("mine_block", "coal_ore"): "mine_coal",
    ("mine_block", "diamond_ore"): "mine_diamond",
    ("custom", "interact_with_crafting_table"): "open_crafting_table",
    ("custom", "interact_with_furnace"): "open_furnace",
    ("use_item", "crafting_table"): "place_crafting_table",
    ("use_item", "furnace"): "place_furnace",
}
_EXACT |= {("craft_item", t.removeprefix("craft_")): t for t in TASKS if t.startswith("craft_")}
_EXACT |= {("use_item", t.removeprefix("use_")): t for t in TASKS if t.startswith("use_")}
_ENDINGS = {("mine_block", ("_log", "_wood")): "mine_log", ("craft_item", ("_planks",)): "craft_planks"}


def task_of(statistic: str) -> str | None:
    """The task of a statistic such as ``minecraft.mine_block:minecraft.oak_log``; None if it is of none."""
    kind, _, item = statistic.partition(":")
    kind, item = kind.removeprefix("minecraft."), item.removeprefix("minecraft.")
    if found := _EXACT.get((kind, item)):
        return found
    for (wanted, endings), task in _ENDINGS.items():
        if kind == wanted and item.endswith(endings):
            return task
    return None


def events(stats: Iterable[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """(frame, task) of every event, in order; several tasks of one frame in the order of `TASKS`."""
    out: list[tuple[int, str]] = []
    known: dict[str, float] | None = None
    for frame, line in enumerate(stats):
        if not line:
            continue  # some lines carry none
        if known is None:  # where the session's counts stand
            known = {name: float(value) for name, value in line.items()}
            continue
        risen = set()
        for name, value in line.items():
            if float(value) > known.get(name, 0.0) and (task := task_of(name)):
                risen.add(task)
            known[name] = float(value)
        out += [(frame, task) for task in TASKS if task in risen]
    return out
