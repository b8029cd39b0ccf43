"""A privileged expert for Crafter: shortest paths on the true map, a tech tree up to the diamond, and staying alive.

It looks at the whole map and at every creature, which no agent can. Each step it finds the cheapest way to every cell,
with the cost of digging, bridging and danger, and then asks in this order: fight, rest, drink, eat, sleep, next item.
"""

from typing import Any

import numpy as np
from crafter import constants, objects
from jaxtyping import Bool
from scipy import ndimage

from dreamer4_jax.envs.crafter import ACTIONS
from dreamer4_jax.envs.crafter_map import DIRECTIONS, MOST, MOVES, WALKABLE, Cell, Walker


class Planner(Walker):
    """The expert in one episode of `crafter.CrafterEnv`, whose `game` has been reset.

    Attributes:
        subgoal: what the last action was for.
    """

    def __init__(self, env: Any, rng: np.random.Generator):
        super().__init__(env.get_wrapper_attr("game"))
        self._rng = rng
        self._shelter: tuple[Cell, Cell, Cell] | None = None  # entrance, room, and the cell behind it
        self._wish = ""  # a need that is being met, until it is met
        self.subgoal = ""

    def act(self, taken: int | None = None) -> int:
        """The next action. It plans anew at every step, whatever was `taken` in between."""
        self._look()
        self.subgoal = ""
        return ACTIONS.index(self._choose() or "noop")

    # ------------------------------------------------------------------------------------------------- staying alive

    def _choose(self) -> str | None:
        if self._player.sleeping:
            return self._for("sleep", "sleep")
        for need in (self._fight, self._rest, self._drink, self._eat, self._sleep):
            action = need()
            if action:
                return action
        self._wish = ""
        return self._craft()

    def _for(self, subgoal: str, action: str | None) -> str | None:
        if action:
            self.subgoal = subgoal
        return action

    def _fight(self) -> str | None:
        for foe in self._foes:
            if np.abs(foe.pos - self._player.pos).sum() == 1:
                return self._for("fight", self._turn((int(foe.pos[0]), int(foe.pos[1]))) or "do")
        return None

    def _rest(self) -> str | None:
        """Hides with little health, until there is more."""
        h = self._has
        enough = 7 if self._wish == "rest" else 4
        if h["health"] >= enough or min(h["food"], h["drink"]) <= 1:
            return None
        action = self._for("rest", self._hide())
        self._wish = "rest" if action else self._wish
        return action

    def _drink(self) -> str | None:
        level, water = self._has["drink"], self._is("water")
        if self._wish == "drink" and level < MOST - 1 or level <= 3 or (level <= 6 and self._cost(water) <= 3):
            action = self._for("drink", self._use(water))
            self._wish = "drink" if action else self._wish
            return action
        return None

    def _eat(self) -> str | None:
        level, cows = self._has["food"], self._creatures(objects.Cow)
        if self._wish == "eat" and level < MOST - 3 or level <= 3 or (level <= 6 and self._cost(cows) <= 4):
            action = self._for("eat", self._use(cows))
            self._wish = "eat" if action else self._wish
            return action
        return None

    def _creatures(self, kind: Any) -> Bool[np.ndarray, "X Y"]:
        out = np.zeros(self._area, bool)
        for creature in self._others:
            if isinstance(creature, kind):
                out[tuple(creature.pos)] = True
        return out

    def _sleep(self) -> str | None:
        energy, dark = self._has["energy"], self._world.daylight < 0.35
        if energy <= 2 or (dark and energy <= 5) or (self._wish == "sleep" and energy < MOST - 1):
            action = self._for("sleep", self._hide())
            self._wish = "sleep" if action else self._wish
            return action
        return None

    def _hide(self) -> str | None:
        """Digs two cells into rock, steps back, walls the entrance up and sleeps; None where that is not possible.

        One cannot turn to a free cell without walking into it: hence the second cell, to come back from.
        """
        if not self._has["wood_pickaxe"]:
            return None
        open_ = self._is(*WALKABLE)
        around = [self._next(self._at, step) for step in DIRECTIONS]
        if not any(self._inside(cell) and open_[cell] for cell in around):
            return "sleep" if self._has["energy"] < MOST else "noop"
        if self._shelter and not self._sound(*self._shelter):
            self._shelter = None
        self._shelter = self._shelter or self._find_shelter(open_)
        if self._shelter is None:
            return None
        entrance, room, behind = self._shelter
        if self._at == behind:
            # Both cells are closed once the entrance is.
            return ("sleep" if self._has["energy"] < MOST else "noop") if not open_[entrance] else self._enter(room)
        if self._at == room:
            if self._next(room, self._facing) == entrance:
                if not open_[entrance]:
                    return "sleep" if self._has["energy"] < MOST else "noop"
                return "do" if self._taken[entrance] else "place_stone" if self._has["stone"] else None
            return self._enter(behind)
        if self._at == entrance:
            return self._enter(room)
        return self._walk(entrance)

    def _sound(self, entrance: Cell, room: Cell, behind: Cell) -> bool:
        """Whether nothing can get to the two cells but through the entrance."""
        for cell, inner in ((room, (entrance, behind)), (behind, (room,))):
            for step in DIRECTIONS:
                beside = self._next(cell, step)
                if beside not in inner and (self._material(beside) in WALKABLE or self._material(beside) == "lava"):
                    return False
        return self._material(entrance) != "lava"

    def _find_shelter(self, open_: Bool[np.ndarray, "X Y"]) -> tuple[Cell, Cell, Cell] | None:
        """The cheapest place for `_hide` within reach."""
        self._search()
        diggable = self._is("stone", "path") & ~self._taken
        best, found = 60.0, None
        near = np.argwhere(diggable & (self._distance < best))
        for x, y in near[np.argsort(self._distance[tuple(near.T)], kind="stable")]:
            room = int(x), int(y)
            if self._distance[room] >= best:
                break
            for step in DIRECTIONS:
                entrance, behind = self._next(room, (-step[0], -step[1])), self._next(room, step)
                if not (self._inside(entrance) and self._inside(behind) and diggable[behind]):
                    continue
                stones = self._has["stone"] + (not open_[room]) + (not open_[behind])
                way = self._distance[entrance] + (0.0 if open_[room] else 2.0) + (0.0 if open_[behind] else 2.0)
                if stones and way < best and self._sound(entrance, room, behind):
                    best, found = float(way), (entrance, room, behind)
        return found

    # ----------------------------------------------------------------------------------------------- up to a diamond

    def _craft(self) -> str | None:
        h = self._has
        if not h["wood_pickaxe"]:
            return self._first_tool()
        at_table = self._near("table")
        if at_table and not h["wood_sword"] and h["wood"] >= 3:
            return self._for("make_wood_sword", "make_wood_sword")
        if not h["stone_pickaxe"]:
            return self._second_tool(at_table)
        if at_table and not h["stone_sword"] and h["stone"] and h["wood"] >= (2 if self._near("furnace") else 4):
            return self._for("make_stone_sword", "make_stone_sword")
        if not h["iron_pickaxe"]:
            return self._third_tool(at_table)
        if not self._done["collect_diamond"]:
            return self._gather("diamond", "diamond")
        return self._rewards()

    def _gather(self, name: str, material: str, score: Any = 0.0) -> str | None:
        way = self._use(self._is(material) & ~self._taken, score=score)
        if way is None and self._has["stone"] < MOST and self._has["wood_pickaxe"]:
            way = self._use(self._is("stone"))  # to build bridges
        return self._for(f"collect_{name}", way)

    def _first_tool(self) -> str | None:
        """Wood for everything, then the table where there is rock, and iron not far."""
        wood = self._has["wood"]
        if self._near("table") and wood:
            return self._for("make_wood_pickaxe", "make_wood_pickaxe")
        trees = self._cost(self._is("tree"))
        if wood < 4 or (wood < MOST and trees <= (12 if wood < 7 else 6)):
            return self._gather("wood", "tree")
        rock, iron = self._is("stone"), self._is("iron")
        score = 0.5 * ndimage.distance_transform_cdt(~iron, metric="taxicab") if iron.any() else 0.0
        found = self._approach(rock, score)
        if found is not None and found[0] > 2:
            return self._for("place_table", self._walk(found[1]))
        return self._for("place_table", self._put("place_table"))

    def _second_tool(self, at_table: bool) -> str | None:
        h = self._has
        if h["wood"] < 1:
            return self._gather("wood", "tree")
        if h["stone"] < 1 + (h["wood"] >= 4):
            return self._gather("stone", "stone")
        if at_table:
            return self._for("make_stone_pickaxe", "make_stone_pickaxe")
        return self._to_table("make_stone_pickaxe", 1)

    def _to_table(self, subgoal: str, wood: int) -> str | None:
        """Goes to a table, or builds another one if that is far; `wood` is needed there."""
        tables, have = self._is("table"), self._has["wood"]
        far = self._cost(tables)
        if far > 10 and have >= wood + 2:
            return self._for("place_table", self._put("place_table"))
        if far > 10 and self._cost(self._is("tree")) + 3 * (wood + 2 - have) < far:
            return self._gather("wood", "tree")
        found = self._approach(tables)
        return self._for(subgoal, self._walk(found[1])) if found else self._gather("wood", "tree")

    def _third_tool(self, at_table: bool) -> str | None:
        h = self._has
        lacking = [name for name in ("coal", "iron") if not h[name]]
        if lacking:
            nearest = min(lacking, key=lambda name: self._cost(self._is(name)))
            return self._gather(nearest, nearest)
        if h["wood"] < 1:
            return self._gather("wood", "tree")
        furnace = self._near("furnace")
        if at_table and furnace:
            return self._for("make_iron_pickaxe", "make_iron_pickaxe")
        if not furnace and h["stone"] < 4 and self._cost(self._is("furnace")) > 6:
            return self._gather("stone", "stone")
        if not at_table:
            return self._to_table("make_iron_pickaxe", 1)
        return self._for("place_furnace", self._put("place_furnace", "table"))

    def _rewards(self) -> str | None:
        """The other achievements that can be had, cheapest first."""
        h, done = self._has, self._done
        front = self._next(self._at, self._facing)
        if h["sapling"] and not done["place_plant"]:
            grass = self._is("grass") & ~self._taken
            return self._for("place_plant", "place_plant" if self._inside(front) and grass[front] else self._roam())
        if not done["place_stone"] and h["stone"]:
            return self._for("place_stone", "place_stone" if self._walkable(front) else self._roam())
        if not done["collect_sapling"]:
            on_grass = self._inside(front) and self._material(front) == "grass" and not self._taken[front]
            return self._for("collect_sapling", "do" if on_grass else self._use(self._is("grass") & ~self._taken))
        if not done["make_iron_sword"] and (h["wood"] or np.isfinite(self._cost(self._is("tree")))):
            for name, material in (("coal", "coal"), ("iron", "iron"), ("wood", "tree")):
                if not h[name] and np.isfinite(self._cost(self._is(material))):
                    return self._gather(name, material)
            if h["coal"] and h["iron"] and self._near("table") and self._near("furnace"):
                return self._for("make_iron_sword", "make_iron_sword")
            found = self._approach(self._is("furnace"))
            if h["coal"] and h["iron"] and found and found[1] != self._at:
                return self._for("make_iron_sword", self._walk(found[1]))
        wanted = (
            ("collect_drink", self._is("water")),
            ("eat_cow", self._creatures(objects.Cow)),
            ("defeat_zombie", self._creatures(objects.Zombie)),
            ("defeat_skeleton", self._creatures(objects.Skeleton)),
        )
        ways = [(self._cost(where), name, where) for name, where in wanted if not done[name]]
        ways = [way for way in ways if np.isfinite(way[0])]
        if ways:
            _, name, where = min(ways, key=lambda way: way[0])
            return self._for(name, self._use(where))
        if not done["wake_up"] and h["energy"] < MOST:
            return self._for("wake_up", self._hide())
        return self._for("collect_diamond", self._use(self._is("diamond"))) or self._for("rest", self._hide())

    def _roam(self) -> str | None:
        """A random step onto free ground."""
        options = [move for step, move in MOVES.items() if self._walkable(self._next(self._at, step))]
        return options[int(self._rng.integers(len(options)))] if options else None


assert set(DIRECTIONS) == {(0, 1), (0, -1), (1, 0), (-1, 0)} and set(WALKABLE) == set(constants.walkable)
