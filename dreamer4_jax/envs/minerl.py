"""Minecraft through MineRL 1.0, for policies trained on contractor recordings (the paper's evaluation, its Appendix A).

The game runs in a Python of its own (`minerl_host`); here are the actions, the pictures, the prompts and what counts.
The policy's 23 keys and 121 mouse classes are those of the recordings (`data.readers.vpt`). ESC is never pressed: it
would end the episode. The mouse moves the view and, while a GUI is open, the pointer; MineRL draws the pointer into the
picture itself, 16 pixels large, where recordings have the reader's arrow.
"""

import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np

from dreamer4_jax.config import UserError
from dreamer4_jax.data.readers.base import Fit
from dreamer4_jax.data.readers.vpt import KEYS
from dreamer4_jax.data.readers.vpt_events import TASKS, task_of

RATE = 20  # steps a second
LEVEL = "MineRLHumanSurvival-v0"
# As the contractors played.
SETTINGS = {
    "fov_range": [70, 70],
    "frameskip": 1,
    "gamma_range": [2, 2],
    "guiscale_range": [1, 1],
    "resolution": [640, 360],
    "cursor_size_range": [16, 16],
}
# The prompts of the paper's evaluation (its Table 6): a task, and how often until the next (when crafting, items).
PROMPTS: tuple[tuple[str, int | None], ...] = (
    ("mine_log", 10), ("craft_planks", 20), ("craft_crafting_table", 1), ("place_crafting_table", 1),
    ("craft_stick", 4), ("craft_wooden_pickaxe", 1), ("use_wooden_pickaxe", 1), ("mine_cobblestone", 3),
    ("craft_planks", 4), ("craft_crafting_table", 1), ("place_crafting_table", 1), ("craft_stick", 4),
    ("craft_stone_pickaxe", 1), ("use_stone_pickaxe", 1), ("mine_iron_ore", 3), ("mine_cobblestone", 8),
    ("craft_planks", 4), ("craft_crafting_table", 1), ("place_crafting_table", 1), ("craft_furnace", 1),
    ("craft_iron_ingot", 3), ("craft_stick", 2), ("craft_iron_pickaxe", 1), ("use_iron_pickaxe", 1),
    ("mine_diamond", None),
)  # fmt: skip
# What success is counted of, in the order of the paper's Table 7.
ITEMS = (
    "log", "planks", "crafting_table", "stick", "wooden_pickaxe", "cobblestone", "stone_pickaxe", "iron_ore", "furnace",
    "iron_ingot", "iron_pickaxe", "diamond",
)  # fmt: skip
INSTALL = """\
MineRL cannot be imported by {python}: {reason}
It is on no package index in the version that is needed, and it cannot share an interpreter with JAX (it wants NumPy
below 1.24), so it gets a Python of its own, from 3.8 to 3.10, and this one talks to it:
  1. Java: a JDK 8 as the only one on the path, `sudo apt-get install openjdk-8-jdk` (on Ubuntu after
     `sudo add-apt-repository ppa:openjdk-r/ppa`); `java -version` and `javac -version` must say 1.8
  2. python3.10 -m venv ~/minerl
  3. ~/minerl/bin/pip install 'setuptools<66' wheel 'numpy<1.24'
  4. ~/minerl/bin/pip install --no-build-isolation git+https://github.com/minerllabs/minerl@v1.0.0
     (builds Minecraft, for which it downloads from Mojang and Forge)
  5. without a screen: sudo apt-get install xvfb, and xvfb-run in front of the command
  6. dreamer4 evaluate RUN --env minerl --minerl-python ~/minerl/bin/python"""


def to_minerl(keys: np.ndarray, mouse: int) -> dict[str, Any]:
    """The action dictionary of MineRL 1.0 of keys [23] and a mouse class; the camera is (pitch, yaw) in degrees."""
    from dreamer4_jax.agent.actions import mu_law_mouse  # it imports JAX

    dx, dy = mu_law_mouse.decode(np.asarray(mouse))
    action: dict[str, Any] = {name: int(pressed) for name, pressed in zip(KEYS, keys, strict=True)}
    return action | {"ESC": 0, "camera": [float(dy), float(dx)]}


def item_of(name: str) -> str | None:
    """Which of `ITEMS` a thing in the inventory is: all kinds of wood are one."""
    name = name.removeprefix("minecraft:").removeprefix("minecraft.")
    for kind in ("log", "planks"):
        if name == kind or name.endswith(f"_{kind}"):
            return kind
    return name if name in ITEMS else None


class Prompts:
    """Where an episode stands on the ladder of `PROMPTS`, told by the game's statistics, which count up."""

    def __init__(self, statistics: Mapping[str, float]):
        self._totals = self._count(statistics)
        self._base, self.index = dict(self._totals), 0

    @staticmethod
    def _count(statistics: Mapping[str, float]) -> Counter[str]:
        totals: Counter[str] = Counter()
        for name, value in statistics.items():
            if task := task_of(name):
                totals[task] += int(value)
        return totals

    @property
    def task(self) -> str:
        return PROMPTS[self.index][0]

    def update(self, statistics: Mapping[str, float]) -> float:
        """Reads the statistics after a step: 1.0 if the prompted task was done in it, 0.0 if not. What was done before
        its prompt came does not count."""
        before, self._totals = self._totals, self._count(statistics)
        task, wanted = PROMPTS[self.index]
        done = self._totals[task] > before[task]
        if wanted is not None and self._totals[task] - self._base.get(task, 0) >= wanted:
            self.index, self._base = self.index + 1, dict(self._totals)
        return float(done)


class Game(Protocol):
    """What `minerl_host` answers: (header, picture uint8 [360, 640, 3])."""

    def reset(self, seed: int) -> tuple[dict[str, Any], np.ndarray]: ...

    def step(self, action: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]: ...

    def close(self) -> None: ...


class HostedGame:
    """The game in a process of its own.

    Raises:
      UserError: that Python has no MineRL (the message has the steps to install it), or its process has ended.
    """

    def __init__(self, python: str = sys.executable, settings: Mapping[str, Any] = SETTINGS):
        self.python = python
        command = [python, str(Path(__file__).with_name("minerl_host.py"))]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise UserError(f"--minerl-python {python}: cannot be run ({error})") from None
        header, _ = self._ask({"op": "make", "settings": dict(settings)})
        if reason := header.get("missing"):
            self.close()
            raise UserError(INSTALL.format(python=python, reason=reason))

    def _ask(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], bytes]:
        out, back = self._process.stdin, self._process.stdout
        assert out is not None and back is not None
        try:
            out.write((json.dumps(request) + "\n").encode())
            out.flush()
            header = json.loads(back.readline())
            payload = back.read(header.get("bytes", 0))
        except (OSError, ValueError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)  # whoever closes its end is about to leave
            self._process.kill()
            code = self._process.wait()
            raise UserError(f"Minecraft ({self.python}) has ended, code {code}; what it said stands above") from None
        return header, payload

    def _frame(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        header, payload = self._ask(request)
        return header, np.frombuffer(payload, np.uint8).reshape(header["shape"])

    def reset(self, seed: int) -> tuple[dict[str, Any], np.ndarray]:
        return self._frame({"op": "reset", "seed": seed})

    def step(self, action: Mapping[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        return self._frame({"op": "step", "action": dict(action)})

    def close(self) -> None:
        if self._process.poll() is None:
            self._ask({"op": "close"})
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()


class MineRL(gymnasium.Env):
    """An hour in a new world, with nothing in hand: the prompts of the paper one after the other.

    Observation: ``image`` uint8 [height, width, 3], fitted as the recordings were, and ``task`` int32 [1], the prompt's
    id in the recordings (its place in `vpt_events.TASKS`, from 1). Reward 1 where the prompted task is done. The last
    ``info`` has "success" (a diamond) and "items": the minutes after which each of `ITEMS` was first held.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(self, game: Game, fit: Fit, *, minutes: float = 60.0):
        assert fit.size is not None
        self._game, self._fit, self._steps = game, fit, round(60 * RATE * minutes)
        self.observation_space = gymnasium.spaces.Dict(
            image=gymnasium.spaces.Box(0, 255, (*fit.size, 3), np.uint8),
            task=gymnasium.spaces.Box(0, len(TASKS), (1,), np.int32),
        )
        self.action_space = gymnasium.spaces.Dict(
            keys=gymnasium.spaces.MultiBinary(len(KEYS)), mouse=gymnasium.spaces.Discrete(121)
        )
        self._prompts = Prompts({})
        self._items: dict[str, float] = {}
        self._step = 0

    def _observe(self, picture: np.ndarray) -> dict[str, np.ndarray]:
        task = TASKS.index(self._prompts.task) + 1
        return {"image": self._fit(picture), "task": np.asarray([task], np.int32)}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        header, picture = self._game.reset(int(self.np_random.integers(2**31)) if seed is None else seed)
        self._prompts, self._items, self._step = Prompts(header["statistics"]), {}, 0
        return self._observe(picture), {"prompt": self._prompts.task}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        header, picture = self._game.step(to_minerl(action["keys"], action["mouse"]))
        self._step += 1
        reward = self._prompts.update(header["statistics"])
        for name, count in header["inventory"].items():
            if count > 0 and (item := item_of(name)):
                self._items.setdefault(item, self._step / (60 * RATE))
        info: dict[str, Any] = {"prompt": self._prompts.task, "gui": header["gui"]}
        terminated = bool(header["done"])
        truncated = not terminated and self._step >= self._steps
        if terminated or truncated:
            info |= {"success": "diamond" in self._items, "items": dict(self._items)}
        return self._observe(picture), reward, terminated, truncated, info

    def close(self) -> None:
        self._game.close()


class Tallied(gymnasium.Wrapper):
    """Hands the items of each finished episode to `tally`."""

    def __init__(self, env: MineRL, tally: Callable[[dict[str, float]], Any]):
        super().__init__(env)
        self._tally = tally

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        found = self.env.step(action)
        if "items" in found[4]:
            self._tally(found[4]["items"])
        return found
