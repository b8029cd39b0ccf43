"""Continuous control from pixels: gymnasium's Pendulum and CarRacing, DeepMind Control's ball in cup.

Observation: ``image`` uint8 [height, width, 3] and ``task`` int32 [words], one word for each level. A step of ours is
`repeat` steps of the simulator with one action, whose rewards are added up, so that returns are the simulator's own.
Continuous actions lie in [-1, 1]; what lies beyond is clipped.

| level              | action                                         | repeat | steps | success            |
|--------------------|------------------------------------------------|--------|-------|--------------------|
| Pendulum-v1        | torque                                         | 4      | 50    | not defined        |
| CarRacing-v3       | steering; gas above 0, brake below             | 4      | 250   | the lap is finished |
| CarRacing-v3-keys  | steering; two keys, gas and brake (mixed)      | 4      | 250   | the lap is finished |
| ball_in_cup-catch  | force on the cup, sideways and up              | 4      | 250   | the ball was in the cup |

`repeat` of ball in cup is PlaNet's (arXiv 1811.04551). The scripted experts, which know the simulator's state, are
means to record mediocre data and no more: an energy controller that swings the pendulum up, one that steers after the
middle of the track, and for the cup a search among random movements in a copy of the simulator.
"""

import io
import os
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
from jaxtyping import UInt8

from dreamer4_jax.config import ActionComponent, EnvConfig, UserError
from dreamer4_jax.data.readers.base import Fit
from dreamer4_jax.envs.kinds import Expert
from dreamer4_jax.envs.pictures import headless
from dreamer4_jax.envs.pixels import PixelEnv, check_level
from dreamer4_jax.envs.spaces import clipped, from_env, nothing, same, to_env, uniform

EXTRA = 'needs the extra "control": pip install "dreamer4_jax[control]"'
HOLD = 0.25  # probability that aimless play draws a new action; it holds the last one otherwise
SHARPNESS = 4  # a drawn picture is this many times as large, and averaged down


class Simulator(Protocol):
    """What a level is made of."""

    mission: str
    repeat: int
    limit: int  # its own steps

    def reset(self, seed: int) -> None: ...

    def step(self, action: dict[str, np.ndarray], last: bool) -> tuple[float, bool, bool | None]:
        """One step of its own: (reward, terminated, success so far or None). `last`: a picture is asked for next."""

    def picture(self) -> UInt8[np.ndarray, "H W 3"]: ...

    def expert(self, rng: np.random.Generator) -> Expert: ...

    def close(self) -> None: ...


# ---------------------------------------------------------------------------------------------------------------------
# Pendulum


class Pendulum:
    """Gymnasium's Pendulum-v1. Its picture is left without the arrow that shows the torque: the action is no part of
    the state. Of the rest it keeps the middle, which the rod reaches: two thirds are always white. The speed shows
    in no single picture."""

    mission, repeat, limit = "swing up and stay", 4, 200

    def __init__(self, parts: Sequence[ActionComponent], height: int, width: int):
        from gymnasium.envs.classic_control.pendulum import PendulumEnv

        self.env = PendulumEnv(render_mode="rgb_array")
        self.env.screen_dim = SHARPNESS * max(height, width)
        self._fit = Fit((height, width))
        with headless():
            self.reset(0)
            self.picture()  # it opens its screen with the first

    def reset(self, seed: int) -> None:
        self.env.reset(seed=seed)

    def step(self, action: dict[str, np.ndarray], last: bool) -> tuple[float, bool, bool | None]:
        _, reward, *_ = self.env.step(self.env.max_torque * action["torque"])
        return float(reward), False, None

    def picture(self) -> UInt8[np.ndarray, "H W 3"]:
        self.env.last_u = None
        drawn = np.asarray(self.env.render())
        edge = len(drawn) * 7 // 32  # as much as the rod, which ends a quarter from the edge, leaves for a margin
        return self._fit(drawn[edge:-edge, edge:-edge])

    def expert(self, rng: np.random.Generator) -> Expert:
        return SwingUp(self)

    def close(self) -> None:
        self.env.close()


class SwingUp:
    """Pumps energy until the pendulum would just reach the top, and balances it there."""

    def __init__(self, pendulum: Pendulum):
        self._env = pendulum.env

    def act(self, taken: Any) -> np.ndarray:
        angle, speed = self._env.state
        angle = (angle + np.pi) % (2 * np.pi) - np.pi  # 0 at the top
        weight = 3 * self._env.g / (2 * self._env.l)  # angular acceleration where it lies horizontally
        if abs(angle) < 0.5 and abs(speed) < 3.0:
            torque = -8.0 * angle - 2.0 * speed
        else:
            missing = weight * (1 - np.cos(angle)) - speed**2 / 2
            torque = np.sign(speed or 1.0) * missing
        return np.clip([torque / self._env.max_torque], -1, 1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# CarRacing


class Race:
    """Gymnasium's CarRacing-v3, seen as its own 96 x 96 observation, averaged down. 0 on the pedal is no pedal."""

    mission, repeat, limit = "drive the lap", 4, 1000

    def __init__(self, parts: Sequence[ActionComponent], height: int, width: int):
        try:
            from gymnasium.envs.box2d.car_racing import CarRacing
        except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
            raise UserError(f"CarRacing {EXTRA} ({error})") from error

        class Unseen(CarRacing):
            """Draws a picture where one is asked for; between them it would cost most of the time."""

            seen = True

            def _render(self, mode: str) -> Any:
                return super()._render(mode) if self.seen else self.state

        self.keys = len(parts) > 1
        with headless():
            self.env = Unseen()
        self._fit = Fit((height, width))

    def reset(self, seed: int) -> None:
        self.env.seen = True
        with redirect_stdout(io.StringIO()):  # it prints each track that does not close
            self.env.reset(seed=seed)
        self._lap = False

    def step(self, action: dict[str, np.ndarray], last: bool) -> tuple[float, bool, bool | None]:
        self.env.seen = last
        if self.keys:
            steer, (gas, brake) = action["steer"][0], action["pedals"]
        else:
            steer, pedal = action["drive"]
            gas, brake = max(pedal, 0.0), max(-pedal, 0.0)
        _, reward, terminated, _, info = self.env.step(np.asarray([steer, gas, brake], np.float32))
        self._lap |= bool(info.get("lap_finished", False))
        return float(reward), bool(terminated), self._lap

    def picture(self) -> UInt8[np.ndarray, "H W 3"]:
        if not self.env.seen:  # the episode ended between two pictures
            self.env.seen = True
            self.env.state = self.env._render("state_pixels")
        return self._fit(np.asarray(self.env.state))

    def expert(self, rng: np.random.Generator) -> Expert:
        return Driver(self)

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("Box2D has no copies")  # gymnasium would build a new race in its place

    def close(self) -> None:
        self.env.close()


class Driver:
    """Steers towards the middle of the track some tiles ahead, slower where it bends."""

    ahead, speed = 6, 45.0

    def __init__(self, race: Race):
        self._race = race

    def act(self, taken: Any) -> Any:
        env = self._race.env
        assert env.car is not None
        place, angle = np.asarray(env.car.hull.position), float(env.car.hull.angle)
        middle = np.asarray([tile[2:4] for tile in env.track])
        near = int(np.argmin(((middle - place) ** 2).sum(1)))
        way = middle[(near + self.ahead) % len(middle)] - place
        forward, right = np.asarray([-np.sin(angle), np.cos(angle)]), np.asarray([np.cos(angle), np.sin(angle)])
        bend = float(np.arctan2(way @ right, way @ forward))
        steer = float(np.clip(2.0 * bend, -1, 1))
        speed = float(np.linalg.norm(np.asarray(env.car.hull.linearVelocity)))
        wanted = self.speed * max(0.4, 1.0 - 1.5 * abs(bend))
        pedal = float(np.clip(0.1 * (wanted - speed), -0.5, 0.6))
        if self._race.keys:
            pressed = np.asarray([pedal > 0.1, pedal < -0.3], np.uint8)
            return {"steer": np.asarray([steer], np.float32), "pedals": pressed}
        return np.asarray([steer, pedal], np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# DeepMind Control


class BallInCup:
    """DeepMind Control's ball_in_cup catch: reward 1 for each of its steps at which the ball is in the cup. Its picture
    is without shadows."""

    mission, repeat, limit = "catch the ball", 4, 1000

    def __init__(self, parts: Sequence[ActionComponent], height: int, width: int):
        # Read when dm_control is imported first. Without a screen its own choice, GLFW, cannot draw.
        if not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")
        self._size, self._fit = (SHARPNESS * height, SHARPNESS * width), Fit((height, width))
        try:
            import mujoco
        except ImportError as error:
            raise UserError(f"DeepMind Control {EXTRA} ({error})") from error
        try:
            from dm_control import suite

            self.env = suite.load("ball_in_cup", "catch", task_kwargs={"random": 0})
            # Drawn by a processor, shadows and multisampling take four fifths of the time; averaging down is as smooth.
            quality, buffer = self.physics.model.vis.quality, self.physics.model.vis.global_
            quality.shadowsize = quality.offsamples = 0
            buffer.offheight, buffer.offwidth = SHARPNESS * height, SHARPNESS * width
            self.picture()
        except ModuleNotFoundError as error:
            raise UserError(f"DeepMind Control {EXTRA} ({error})") from error
        # Of OpenGL's libraries, or of MuJoCo 4.
        except (ImportError, AttributeError, RuntimeError, mujoco.FatalError) as error:
            raise UserError(
                f"ball_in_cup: MuJoCo cannot draw ({error}). It needs mujoco<4 and, without a screen, EGL or OSMesa "
                "(Debian and Ubuntu: apt install libegl1, or apt install libosmesa6 and MUJOCO_GL=osmesa)"
            ) from error

    @property
    def physics(self) -> Any:
        return self.env.physics

    def reset(self, seed: int) -> None:
        self.env.task._random = np.random.RandomState(seed)  # fixed by its constructor otherwise
        self.env.reset()
        self._caught = False

    def step(self, action: dict[str, np.ndarray], last: bool) -> tuple[float, bool, bool | None]:
        reward = float(self.env.step(action["force"]).reward or 0.0)
        self._caught |= reward > 0
        return reward, False, self._caught

    def picture(self) -> UInt8[np.ndarray, "H W 3"]:
        return self._fit(self.physics.render(*self._size, camera_id=0))

    def expert(self, rng: np.random.Generator) -> Expert:
        return Catcher(self, rng)

    def close(self) -> None:
        self.env.close()


class Catcher:
    """Tries random movements in a copy of the simulator, and makes the one after which the ball lies in the cup, or
    else comes closest to it. Planned anew when the movement is over or another's action has come between."""

    tries, length, rest = 24, 12, 5  # movements; our steps that each lasts, and that the cup rests after it

    def __init__(self, ball: BallInCup, rng: np.random.Generator):
        self._ball, self._rng = ball, rng
        self._copy: Any = None
        self._plan: list[np.ndarray] = []
        self._sent: np.ndarray | None = None

    def act(self, taken: Any) -> np.ndarray:
        still = np.zeros(2, np.float32)
        if taken is not None and self._sent is not None and not np.array_equal(taken, self._sent):
            self._plan = []
        if not self._plan:
            held = self._ball.physics.in_target() and self._outcome([still] * self.rest) < 0
            self._plan = [still] if held else self._search()
        self._sent = self._plan.pop(0)
        return self._sent

    def _search(self) -> list[np.ndarray]:
        best: tuple[float, list[np.ndarray]] = (np.inf, [])
        for _ in range(self.tries):
            # Few turns: the string needs long pulls.
            turns = np.cumsum(self._rng.random(self.length) < 0.4)
            drawn = self._rng.uniform(-1, 1, (self.length + 1, 2)).astype(np.float32)
            plan = [drawn[i] for i in turns] + [np.zeros(2, np.float32)] * self.rest
            best = min(best, (self._outcome(plan), plan), key=lambda found: found[0])
            if best[0] < 0:
                break
        return best[1]

    def _outcome(self, plan: Sequence[np.ndarray]) -> float:
        """Distance of the ball from the cup after a movement; below 0 if it lies in it."""
        physics = self._ball.physics
        if self._copy is None:
            self._copy = physics.copy(share_model=True)
        copy, substeps = self._copy, self._ball.env._n_sub_steps
        copy.set_state(physics.get_state())
        copy.forward()
        for force in plan:
            copy.set_control(force)
            copy.step(substeps * self._ball.repeat)
        return -1.0 if copy.in_target() else float(np.linalg.norm(copy.ball_to_target()))


# ---------------------------------------------------------------------------------------------------------------------
# The kind


@dataclass(frozen=True)
class Level:
    """Attributes:
    simulator: made of the components, and the height and width of pictures.
    parts: the components of its actions.
    """

    simulator: Callable[[Sequence[ActionComponent], int, int], Simulator]
    parts: tuple[ActionComponent, ...]


LEVELS = {
    "Pendulum-v1": Level(Pendulum, (ActionComponent("torque", "continuous", 1),)),
    "CarRacing-v3": Level(Race, (ActionComponent("drive", "continuous", 2),)),
    "CarRacing-v3-keys": Level(
        Race, (ActionComponent("steer", "continuous", 1), ActionComponent("pedals", "binary", 2))
    ),
    "ball_in_cup-catch": Level(BallInCup, (ActionComponent("force", "continuous", 2),)),
}
WORDS = {level: i + 1 for i, level in enumerate(LEVELS)}  # part of the data format: append to LEVELS, never reorder
VOCABULARY = len(LEVELS) + 1


class Control(PixelEnv):
    """One level as pixels, `simulator` beneath."""

    def __init__(self, level: str, *, max_steps: int, **sizes: int):
        self.parts = _level(level).parts
        self.simulator = sim = _level(level).simulator(self.parts, sizes["height"], sizes["width"])
        limit = min(max_steps, sim.limit // sim.repeat)
        super().__init__(level, self.parts, vocabulary=VOCABULARY, max_steps=limit, **sizes)
        self.idle = to_env(nothing(self.parts, 1), 0)
        self._held: Any = None
        self._success: bool | None = None

    def _mission(self) -> tuple[int, str]:
        return WORDS[self.level], self.simulator.mission

    def _begin(self, seed: int) -> UInt8[np.ndarray, "H W 3"]:
        self.simulator.reset(seed)
        self._held = self._success = None
        return self.simulator.picture()

    def _advance(self, action: Any) -> tuple[UInt8[np.ndarray, "H W 3"], float, bool]:
        parts, sim = clipped(from_env(action, self.parts), self.parts), self.simulator
        total, terminated = 0.0, False
        for i in range(sim.repeat):
            reward, terminated, self._success = sim.step(parts, i == sim.repeat - 1)
            total += reward
            if terminated:
                break
        return sim.picture(), total, terminated

    def _succeeded(self, ended: bool) -> bool | None:
        return self._success

    def close(self) -> None:
        self.simulator.close()

    def random_action(self, rng: np.random.Generator) -> Any:
        """Uniform, and held for some steps: the mean of independent ones does next to nothing."""
        if self._held is None or rng.random() < HOLD:
            self._held = to_env(uniform(self.parts, rng, 1), 0)
        return self._held

    def expert(self, rng: np.random.Generator) -> Expert:
        """The level's scripted expert for the episode that begins."""
        return self.simulator.expert(rng)


def _level(level: str) -> Level:
    check_level(level, tuple(LEVELS))
    return LEVELS[level]


def actions(env_cfg: EnvConfig) -> tuple[ActionComponent, ...]:
    """The components of the levels, which must be the same."""
    first, *others = env_cfg.levels
    for level in others:
        if not same(_level(level).parts, _level(first).parts):
            raise UserError(f"env.levels: {first} and {level} have different actions; choose one of them")
    return _level(first).parts


def make(env_cfg: EnvConfig, level: str, *, height: int, width: int, words: int) -> Control:
    """Builds a level; its own time limit holds, and ``env.max_steps`` where that is shorter."""
    return Control(level, height=height, width=width, words=words, max_steps=env_cfg.max_steps)
