"""A stand-in for MineRL 1.0's HumanSurvival, to be found as `minerl` by the processes of games.

It answers as that does: the old gym, nested statistics of NumPy scalars, and noise on the standard output. `attack`
mines a log of oak, `use` crafts four planks of one; ESC or ten steps of `drop` end the episode. The picture shows the
seed and the camera. In world 0 the game crashes at `forward`.
"""

from pathlib import Path

import numpy as np


class HumanSurvival:
    def __init__(self, **settings):
        assert settings["resolution"] == [640, 360] and settings["cursor_size_range"] == [16, 16]
        assert settings["fov_range"] == [70, 70] and settings["guiscale_range"] == [1, 1]

    def make(self):
        print("a line of Gradle's on the standard output")
        return Game()


class Space:
    def noop(self):
        names = "ESC attack back drop forward inventory jump left pickItem right sneak sprint swapHands use".split()
        names += [f"hotbar.{i}" for i in range(1, 10)]
        return {**{n: np.array(0) for n in names}, "camera": np.zeros(2, np.float32)}


class Game:
    action_space = Space()

    def seed(self, seed):
        self.world = seed

    def _observe(self, camera=(0.0, 0.0)):
        pov = np.zeros((360, 640, 3), np.uint8)
        pov[:] = self.world % 256, 100 + 10 * camera[0], 100 + 10 * camera[1]
        stat = lambda name, n: {"minecraft": {name: np.array(float(n))}}
        return {
            "pov": pov,
            "inventory": {"oak_log": np.array(self.logs), "oak_planks": np.array(self.planks), "diamond": np.array(0)},
            "mine_block": stat("oak_log", self.mined),
            "craft_item": stat("oak_planks", self.crafted),
            "use_item": {},
            "full_stats": {"interact_with_furnace": np.array(0.0)},
            "life_stats": {"life": np.array(20.0)},
        }

    def reset(self):
        print("another one")
        self.logs = self.planks = self.mined = self.crafted = self.dropped = 0
        return self._observe()

    def step(self, action):
        assert set(action) == set(Space().noop()), sorted(action)
        if action["forward"] and self.world == 0:
            raise SystemExit(3)
        self.logs += action["attack"]
        self.mined += action["attack"]
        if action["use"] and self.logs:
            self.logs, self.planks, self.crafted = self.logs - 1, self.planks + 4, self.crafted + 4
        self.dropped += action["drop"]
        gui = bool(action["inventory"])
        return self._observe(action["camera"]), 0.0, bool(action["ESC"] or self.dropped > 9), {"isGuiOpen": gui}

    def close(self):
        print("closed")


def install(folder):
    """Lays this file out as the package `minerl` in `folder`."""
    specs = folder / "minerl/herobraine/env_specs"
    specs.mkdir(parents=True)
    for package in (specs, specs.parent, specs.parent.parent):
        (package / "__init__.py").write_text("")
    (specs / "human_survival_specs.py").write_text(Path(__file__).read_text())
