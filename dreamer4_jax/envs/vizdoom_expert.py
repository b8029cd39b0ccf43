"""A privileged expert for some of ViZDoom's scenarios: it knows where everything is, aims and shoots, or walks there.

It turns with the mouse, by at most ten degrees a step as all who play do, and sees through walls, of which its
scenarios have none in the way.
"""

import math
from typing import Any

from vizdoom import GameVariable

from dreamer4_jax.config import UserError
from dreamer4_jax.envs.vizdoom import press

SHOOT = ("basic", "defend_the_center", "defend_the_line")
FETCH = {"health_gathering": "Medikit"}
MONSTERS = ("Cacodemon", "Demon", "MarineChainsawVzd", "DoomImp", "Zombieman", "ShotgunGuy", "ChaingunGuy")
RADIUS = 16.0  # of what is aimed at, in Doom's units
TURN = 10.0  # degrees of one step, the mouse's most


class Expert:
    """The expert in one episode of `vizdoom.VizdoomEnv`, which has been reset.

    Attributes:
        subgoal: what the last action was for.
    """

    def __init__(self, env: Any):
        self._env, self._game = env, env.game
        self.subgoal = ""
        if env.scenario not in (*SHOOT, *FETCH):
            known = ", ".join(f"ViZDoom/{name}" for name in (*SHOOT, *FETCH))
            raise UserError(f"there is no scripted expert for {env.level}; there is one for {known}")

    def act(self, taken: Any = None) -> dict[str, Any]:
        """The next action. It looks anew at every step, whatever was `taken` in between."""
        shoots = self._env.scenario in SHOOT
        names = MONSTERS if shoots else (FETCH[self._env.scenario],)
        found = [self._towards(o) for o in self._game.get_state().objects if o.name in names]
        if not found:
            self.subgoal = "wait"
            return press()
        # The nearest, but who is near in angle is dealt with sooner.
        distance, turn = min(found, key=lambda to: to[0] + 4.0 * abs(to[1]))
        dx = max(-TURN, min(TURN, turn))
        if shoots:
            self.subgoal = "shoot"
            # The mouse turns before the trigger is pulled; it has classes, so a little is always left.
            aimed = abs(turn - dx) <= math.degrees(math.atan2(RADIUS, distance))
            return press(*(("attack",) if aimed else ()), dx=dx)
        self.subgoal = "fetch"
        return press(*(("forward",) if abs(turn) < 40.0 else ()), dx=dx)

    def _towards(self, thing: Any) -> tuple[float, float]:
        """(distance, degrees to turn to the right) of an object."""
        value = self._game.get_game_variable
        dx = thing.position_x - value(GameVariable.POSITION_X)
        dy = thing.position_y - value(GameVariable.POSITION_Y)
        turn = value(GameVariable.ANGLE) - math.degrees(math.atan2(dy, dx))
        return math.hypot(dx, dy), (turn + 180.0) % 360.0 - 180.0
