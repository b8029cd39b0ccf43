"""ViZDoom's scenarios (the `vizdoom` package, which brings free game data): first person, keyboard and mouse.

All scenarios take one action, the one of Minecraft recordings (`data.readers.vpt`): 23 keys, each for itself, and the
mouse as one of 121 mu-law classes. An action lasts four tics of 1/35 s; the mouse turns by its angle in the first.
Keys without a meaning in Doom do nothing. The image is averaged down from 160 x 120 pixels, without the status bar.
"""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import vizdoom
from jaxtyping import UInt8
from vizdoom import Button, GameVariable

from dreamer4_jax.agent.actions import mu_law_mouse
from dreamer4_jax.config import ActionComponent, EnvConfig
from dreamer4_jax.data.readers.base import Fit
from dreamer4_jax.data.readers.vpt import COMPONENTS, KEYS
from dreamer4_jax.envs.pixels import PixelEnv, check_level

# The position of a scenario is its task's word id, less one: append, never reorder.
SCENARIOS = {
    "basic": "shoot the monster",
    "deadly_corridor": "reach the armor at the end of the corridor",
    "deathmatch": "kill as many as you can",
    "defend_the_center": "kill those who come from all sides",
    "defend_the_line": "kill those who come from the other side",
    "health_gathering": "stay alive on poison with medikits",
    "health_gathering_supreme": "stay alive in the poisoned maze with medikits",
    "my_way_home": "find the armor in the maze",
    "predict_position": "hit the running monster with a rocket",
    "take_cover": "stay alive under fire",
}
PREFIX = "ViZDoom/"
VOCABULARY = len(SCENARIOS) + 1
TICS = 4
KEY_OF = {
    "forward": Button.MOVE_FORWARD,
    "back": Button.MOVE_BACKWARD,
    "left": Button.MOVE_LEFT,
    "right": Button.MOVE_RIGHT,
    "attack": Button.ATTACK,
    "use": Button.USE,
    "jump": Button.JUMP,
    "sneak": Button.CROUCH,
    "sprint": Button.SPEED,
    "swapHands": Button.SELECT_NEXT_WEAPON,
    **{f"hotbar.{i}": getattr(Button, f"SELECT_WEAPON{i}") for i in range(1, 10)},
}
BUTTONS = (*KEY_OF.values(), Button.TURN_LEFT_RIGHT_DELTA, Button.LOOK_UP_DOWN_DELTA)
PRESSED = np.asarray([KEYS.index(name) for name in KEY_OF])
STILL = int(mu_law_mouse.encode(0.0, 0.0))
VARIABLES = (
    GameVariable.POSITION_X, GameVariable.POSITION_Y, GameVariable.ANGLE, GameVariable.PITCH,
    GameVariable.HEALTH, GameVariable.KILLCOUNT,
)  # fmt: skip
# Random play: how often each key is down, and the spread of the mouse in degrees a step.
RANDOM_KEYS = {"forward": 0.5, "back": 0.1, "left": 0.2, "right": 0.2, "attack": 0.25, "use": 0.02, "sprint": 0.1}
RANDOM_MOUSE = (4.0, 0.5)


def levels() -> tuple[str, ...]:
    return tuple(PREFIX + name for name in SCENARIOS)


def actions(env_cfg: EnvConfig) -> tuple[ActionComponent, ...]:
    """Keys and mouse, as in Minecraft recordings."""
    return COMPONENTS


def press(*names: str, dx: float = 0.0, dy: float = 0.0) -> dict[str, Any]:
    """The action with these keys down that turns by (dx, dy) degrees, to the right and downwards."""
    keys = np.zeros(len(KEYS), np.uint8)
    keys[[KEYS.index(name) for name in names]] = 1
    return {"keys": keys, "mouse": int(mu_law_mouse.encode(dx, dy))}


class VizdoomEnv(PixelEnv):
    """One scenario. `game` is ViZDoom's own, for those who may look into it.

    Success is to have killed the monster, reached the armor, or lived until the time limit: the scenario's, or
    ``env.max_steps`` where that is shorter. Where a scenario is about the number of kills, there is no such measure.
    """

    def __init__(self, env_cfg: EnvConfig, level: str, **sizes: int):
        super().__init__(level, COMPONENTS, max_steps=env_cfg.max_steps, vocabulary=VOCABULARY, **sizes)
        self.scenario = level.removeprefix(PREFIX)
        self.idle = press()
        self.game = game = vizdoom.DoomGame()
        game.load_config(str(Path(vizdoom.scenarios_path) / f"{self.scenario}.cfg"))
        game.set_available_buttons(list(BUTTONS))
        game.set_available_game_variables(list(VARIABLES))
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_render_hud(False)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_audio_buffer_enabled(False)
        game.set_objects_info_enabled(True)  # what an expert looks at
        game.set_mode(vizdoom.Mode.PLAYER)
        if game.get_episode_timeout():  # one clock alone, and it cuts an episode instead of ending it
            self._limit = min(self._limit, game.get_episode_timeout() // TICS)
            game.set_episode_timeout(0)
        # The engine writes its settings, and a folder, to where it is started.
        self._scratch = tempfile.TemporaryDirectory(prefix="vizdoom-")
        with contextlib.chdir(self._scratch.name):
            game.init()
        self._fit = Fit((sizes["height"], sizes["width"]))

    def _mission(self) -> tuple[int, str]:
        return list(SCENARIOS).index(self.scenario) + 1, SCENARIOS[self.scenario]

    def _begin(self, seed: int) -> UInt8[np.ndarray, "H W 3"]:
        self.game.set_seed(seed)
        self.game.new_episode()
        return self._fit(self.game.get_state().screen_buffer)

    def _advance(self, action: Any) -> tuple[UInt8[np.ndarray, "H W 3"], float, bool]:
        keys = np.asarray(action["keys"])[PRESSED].astype(float).tolist()
        dx, dy = (float(v) for v in mu_law_mouse.decode(int(action["mouse"])))
        reward, screen = 0.0, None
        for tic in range(TICS):
            # Doom looks up by a positive angle.
            reward += self.game.make_action([*keys, *((dx, -dy) if tic == 0 else (0.0, 0.0))], 1)
            if self.game.is_episode_finished():  # and nothing can be seen any more
                break
            screen = self.game.get_state().screen_buffer
        image = self._image if screen is None else self._fit(screen)
        return image, reward, self.game.is_episode_finished()

    def _succeeded(self, ended: bool) -> bool | None:
        match self.scenario:
            case "deathmatch" | "defend_the_center" | "defend_the_line":
                return None
            case "health_gathering" | "health_gathering_supreme" | "take_cover":
                return not self.game.is_player_dead()
            case "basic" | "predict_position":
                return self.game.get_game_variable(GameVariable.KILLCOUNT) > 0
        return ended and not self.game.is_player_dead()

    def random_action(self, rng: np.random.Generator) -> dict[str, Any]:
        """Some keys that mean something in Doom, and a move of the mouse."""
        down = [name for name, share in RANDOM_KEYS.items() if rng.random() < share]
        dx, dy = rng.normal(0.0, RANDOM_MOUSE)
        return press(*down, dx=float(dx), dy=float(dy))

    def expert(self, rng: np.random.Generator) -> Any:
        """Aims and shoots, or fetches; for some scenarios only."""
        from dreamer4_jax.envs.vizdoom_expert import Expert

        return Expert(self)

    def close(self) -> None:
        self.game.close()
        self._scratch.cleanup()


def make(env_cfg: EnvConfig, level: str, *, height: int, width: int, words: int) -> VizdoomEnv:
    """Builds a scenario with time limit ``env.max_steps``; see `babyai.make` for the arguments."""
    check_level(level, levels())
    return VizdoomEnv(env_cfg, level, height=height, width=width, words=words)
