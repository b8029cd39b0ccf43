"""Keys for an action space: which bindings a person has, and the action that the held ones make.

The page shows the bindings and sends the numbers of those held down; it never sends an action. Every kind of action
space has bindings; environments that name their actions get keys that fit the names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dreamer4_jax.agent.actions import mu_law_mouse
from dreamer4_jax.config import ActionComponent, Config

Action = dict[str, np.ndarray]  # component -> the value of one step, without leading axes

# Names as `KeyboardEvent.code`, so that they mean places on the keyboard whatever its layout.
BABYAI = (
    ("turn left", ("ArrowLeft", "KeyA"), "↺"),
    ("turn right", ("ArrowRight", "KeyD"), "↻"),
    ("forward", ("ArrowUp", "KeyW"), "↑"),
    ("pick up", ("KeyE",), "⤒"),
    ("drop", ("KeyQ",), "⤓"),
    ("open", ("KeyF",), "◫"),
    ("wait", ("ArrowDown", "KeyS"), "·"),
)
# What is left for the actions of other spaces: everything that the page itself does not use.
SPARE = tuple(
    [f"Digit{i}" for i in (*range(1, 10), 0)] + [f"Key{c}" for c in "QWEASDFGZXCVYUIOJKL"] + ["Comma", "Semicolon"]
)
ARROWS = (  # label, key, x, y
    ("left", "ArrowLeft", -1, 0),
    ("right", "ArrowRight", 1, 0),
    ("up", "ArrowUp", 0, -1),
    ("down", "ArrowDown", 0, 1),
)


@dataclass(frozen=True)
class Binding:
    """Keys that stand for a part of an action: entry `index` of a component, set to `value`."""

    label: str
    keys: tuple[str, ...]
    component: str
    index: int
    value: float = 1.0
    symbol: str = ""


@dataclass(frozen=True)
class Controls:
    """The bindings of an action space, and the action without any."""

    components: tuple[ActionComponent, ...]
    bindings: tuple[Binding, ...]
    idle: dict[str, int] = field(default_factory=dict)  # class of categorical components when nothing is held

    def compose(self, held: Sequence[int]) -> Action:
        """The action that the held bindings (by number; unknown ones are ignored) make; the last pressed wins."""
        action: Action = {}
        turn = {part.name: np.zeros(2) for part in self.components if part.kind == "mouse"}
        for part in self.components:
            if part.kind in ("categorical", "mouse"):
                action[part.name] = np.asarray(self.idle.get(part.name, 0), np.int32)
            else:
                action[part.name] = np.zeros(part.size, np.uint8 if part.kind == "binary" else np.float32)
        kinds = {part.name: part.kind for part in self.components}
        for number in held:
            if number >= len(self.bindings):
                continue
            b = self.bindings[number]
            match kinds[b.component]:
                case "categorical":
                    action[b.component] = np.asarray(b.index, np.int32)
                case "mouse":
                    turn[b.component][b.index] = b.value
                case _:
                    action[b.component][b.index] = b.value
        for name, (dx, dy) in turn.items():
            action[name] = np.asarray(mu_law_mouse.encode(dx, dy), np.int32)
        return action

    def names(self, component: str) -> list[str]:
        """Names of a categorical component's classes."""
        return [b.label for b in self.bindings if b.component == component]

    def describe(self, action: Action) -> str:
        """The action in words, for captions and the page."""
        words = []
        for part in self.components:
            value = action[part.name]
            match part.kind:
                case "categorical":
                    words.append(self.names(part.name)[int(value)])
                case "mouse":
                    dx, dy = mu_law_mouse.decode(int(value))
                    words.append(f"turn {dx:+.1f}° {dy:+.1f}°")
                case "binary":
                    words += [b.label for b in self.bindings if b.component == part.name and value[b.index]]
                case "continuous":
                    words.append(" ".join(f"{v:+.2f}" for v in value))
        return ", ".join(words) or "nothing"

    def to_json(self) -> list[dict[str, Any]]:
        kinds = {part.name: part.kind for part in self.components}
        return [
            {"label": b.label, "keys": list(b.keys), "symbol": b.symbol, "component": b.component, "index": b.index,
             "kind": kinds[b.component]}
            for b in self.bindings
        ]  # fmt: skip


def controls(config: Config) -> Controls:
    """Bindings for the action space of a config."""
    if config.env.kind == "babyai" and [(p.kind, p.size) for p in config.actions] == [("categorical", len(BABYAI))]:
        name = config.actions[0].name
        bindings = tuple(Binding(label, keys, name, i, symbol=s) for i, (label, keys, s) in enumerate(BABYAI))
        return Controls(config.actions, bindings, {name: len(BABYAI) - 1})
    spare, arrows_free = list(SPARE), True
    # Without a mouse the arrows are a joystick: two directions of each of two continuous dimensions.
    mouse = any(part.kind == "mouse" for part in config.actions)
    stick = [] if mouse else ["ArrowLeft", "ArrowRight", "ArrowDown", "ArrowUp"]
    bindings_list: list[Binding] = []

    def key() -> tuple[str, ...]:
        return (spare.pop(0),) if spare else ()  # without a key there is still the button on the page

    idle: dict[str, int] = {}
    for part in config.actions:
        if part.kind == "mouse":
            free, arrows_free = arrows_free, False
            for label, code, dx, dy in ARROWS:
                bindings_list.append(
                    Binding(f"look {label}", (code,) if free else key(), part.name, int(dx == 0), 4.0 * (dx + dy))
                )
        elif part.kind == "continuous":
            for i in range(part.size):
                for value in (-1.0, 1.0):
                    keys = (stick.pop(0),) if stick else key()
                    bindings_list.append(
                        Binding(f"{part.name} {i} {'+' if value > 0 else '−'}", keys, part.name, i, value)
                    )
        else:
            idle |= {part.name: 0} if part.kind == "categorical" else {}
            bindings_list += [Binding(f"{part.name} {i}", key(), part.name, i) for i in range(part.size)]
    return Controls(config.actions, tuple(bindings_list), idle)
