"""A privileged expert for Crafter: shortest paths on the true map, a tech tree up to the diamond, and staying alive.

It looks at the whole map and at every creature, which no agent can. Each step it finds the cheapest way to every cell,
with the cost of digging, bridging and danger, and then asks in this order: fight, rest, drink, eat, sleep, next item.
"""

from typing import Any

import numpy as np
from crafter import constants, objects
from jaxtyping import Bool, Float
from scipy import ndimage, sparse
from scipy.sparse import csgraph

from dreamer4_jax.envs.crafter import ACTIONS

Cell = tuple[int, int]
MOVES: dict[Cell, str] = {(-1, 0): "move_left", (1, 0): "move_right", (0, -1): "move_up", (0, 1): "move_down"}
DIRECTIONS = tuple(MOVES)
WALKABLE = ("grass", "sand", "path")
TOOL = {"stone": "wood_pickaxe", "coal": "wood_pickaxe", "iron": "stone_pickaxe", "diamond": "iron_pickaxe"}
DIG = 3.0  # steps to enter a cell that must be dug: turn, do, move
SIGHT = 6  # cells along which an arrow is feared
MOST = 9  # of any item


def _graph(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """(indptr, indices) of the grid's neighbours; cell (x, y) is node x * height + y."""
    indptr, indices = [0], []
    for x in range(width):
        for y in range(height):
            near = [(x + dx, y + dy) for dx, dy in DIRECTIONS if 0 <= x + dx < width and 0 <= y + dy < height]
            indices += [a * height + b for a, b in near]
            indptr.append(len(indices))
    return np.asarray(indptr, np.int32), np.asarray(indices, np.int32)


class Planner:
    """The expert in one episode of `crafter.CrafterEnv`, whose `game` has been reset.

    Attributes:
        subgoal: what the last action was for.
    """

    def __init__(self, env: Any, rng: np.random.Generator):
        self._game, self._rng = env.get_wrapper_attr("game"), rng
        self._world, self._player = self._game._world, self._game._player
        self._area: Cell = tuple(self._world.area)
        self._grid = _graph(*self._area)
        self._shelter: tuple[Cell, Cell, Cell] | None = None  # entrance, room, and the cell behind it
        self._wish = ""  # a need that is being met, until it is met
        self.subgoal = ""

    def act(self, taken: int | None = None) -> int:
        """The next action. It plans anew at every step, whatever was `taken` in between."""
        self._look()
        self.subgoal = ""
        return ACTIONS.index(self._choose() or "noop")

    # ----------------------------------------------------------------------------------------------- what there is

    def _look(self) -> None:
        world, player = self._world, self._player
        self._at: Cell = (int(player.pos[0]), int(player.pos[1]))
        self._facing: Cell = (int(player.facing[0]), int(player.facing[1]))
        self._has, self._done = player.inventory, player.achievements
        self._others: list[Any] = [o for o in world.objects if o is not player and not o.removed]
        self._taken = world._obj_map > 0
        self._taken[self._at] = False
        self._foes = [o for o in self._others if isinstance(o, objects.Zombie | objects.Skeleton)]
        self._searched = False

    def _search(self) -> None:
        """Finds the cheapest way to every cell."""
        if self._searched:
            return
        self._searched = True
        indptr, indices = self._grid
        cost = self._costs().reshape(-1)
        graph = sparse.csr_array((cost[indices], indices, indptr), shape=(len(cost), len(cost)))
        start = self._at[0] * self._area[1] + self._at[1]
        distance, self._previous = csgraph.dijkstra(graph, indices=start, return_predecessors=True, limit=1e4)
        self._distance = distance.reshape(self._area)

    def _is(self, *materials: str) -> Bool[np.ndarray, "X Y"]:
        return np.isin(self._world._mat_map, [self._world._mat_ids[m] for m in materials])

    def _free(self) -> Bool[np.ndarray, "X Y"]:
        return self._is(*WALKABLE) & ~self._taken

    def _material(self, cell: Cell) -> str | None:
        return self._world[cell][0]

    def _walkable(self, cell: Cell) -> bool:
        material, creature = self._world[cell]
        return material in WALKABLE and creature is None

    @staticmethod
    def _next(cell: Cell, step: Cell) -> Cell:
        return cell[0] + step[0], cell[1] + step[1]

    def _costs(self) -> Float[np.ndarray, "X Y"]:
        """Steps, and danger in units of steps, of entering each cell; infinite where there is no way."""
        by_material = {name: 1.0 for name in WALKABLE} | {"tree": DIG}
        by_material |= {name: DIG for name, tool in TOOL.items() if self._has[tool]}
        if self._has["stone"] >= 2:
            by_material |= {"water": DIG + 1, "lava": 4 * DIG}
        table = np.full(len(self._world._mat_ids), np.inf)
        for name, steps in by_material.items():
            table[self._world._mat_ids[name]] = steps
        cost = table[self._world._mat_map]
        # A slip beside lava would be the last.
        cost[ndimage.binary_dilation(self._is("lava"))] += 1.0
        weak = 2.0 if self._has["health"] <= 4 else 1.0
        for other in self._others:
            x, y = (int(v) for v in other.pos)
            match other:
                case objects.Plant():
                    cost[x, y] = np.inf
                case objects.Zombie():
                    self._add(cost, x, y, (6.0, 5.0, 3.0, 1.5), weak)
                case objects.Skeleton():
                    self._add(cost, x, y, (4.0, 2.0, 2.0, 1.0), weak)
                    for cell in self._line_of_fire((x, y)):
                        cost[cell] += 4.0 * weak
                case objects.Arrow():
                    for cell in self._line_of_fire((x, y), (int(other.facing[0]), int(other.facing[1]))):
                        cost[cell] += 4.0
                    cost[x, y] += 2.0
                case _:
                    cost[x, y] += 3.0
        return cost

    def _add(self, cost: np.ndarray, x: int, y: int, by_distance: tuple[float, ...], factor: float) -> None:
        """Adds to the cells within a distance of (x, y)."""
        reach = len(by_distance) - 1
        x0, x1, y0, y1 = max(0, x - reach), x + reach + 1, max(0, y - reach), y + reach + 1
        part = cost[x0:x1, y0:y1]
        away = np.abs(np.arange(x0, x0 + part.shape[0]) - x)[:, None] + np.abs(np.arange(y0, y0 + part.shape[1]) - y)
        part += factor * np.asarray((*by_distance, 0.0))[np.minimum(away, reach + 1)]

    def _line_of_fire(self, cell: Cell, *steps: Cell) -> list[Cell]:
        """Cells that an arrow from `cell` can reach."""
        out = []
        for step in steps or DIRECTIONS:
            at = cell
            for _ in range(SIGHT):
                at = self._next(at, step)
                if self._material(at) not in (*WALKABLE, "water", "lava"):
                    break
                out.append(at)
        return out

    # ------------------------------------------------------------------------------------------------- how to do it

    def _approach(self, targets: Bool[np.ndarray, "X Y"], score: Any = 0.0) -> tuple[float, Cell, Cell] | None:
        """(cost, where to stand, target) of the cheapest of the targets to stand beside; `score` [X, Y] is added."""
        self._search()
        padded = np.pad(self._distance, 1, constant_values=np.inf)
        w, h = self._area
        beside = np.stack([padded[1 - dx : 1 - dx + w, 1 - dy : 1 - dy + h] for dx, dy in DIRECTIONS])
        total = np.where(targets, beside + score, np.inf)
        best = np.unravel_index(int(np.argmin(total)), total.shape)
        if not np.isfinite(total[best]):
            return None
        (dx, dy), target = DIRECTIONS[int(best[0])], (int(best[1]), int(best[2]))
        return float(beside[best]), (target[0] - dx, target[1] - dy), target

    def _cost(self, targets: Bool[np.ndarray, "X Y"]) -> float:
        found = self._approach(targets)
        return found[0] if found else np.inf

    def _use(self, targets: Bool[np.ndarray, "X Y"], action: str = "do", score: Any = 0.0) -> str | None:
        """Goes beside the best target, turns to it and acts."""
        found = self._approach(targets, score)
        if found is None:
            return None
        _, stand, target = found
        return self._walk(stand) if stand != self._at else self._turn(target) or action

    def _walk(self, goal: Cell) -> str | None:
        """The first action on the cheapest way to a cell."""
        self._search()
        if not np.isfinite(self._distance[goal]) or goal == self._at:
            return None
        height, start = self._area[1], self._at[0] * self._area[1] + self._at[1]
        node = goal[0] * height + goal[1]
        while self._previous[node] != start:
            node = self._previous[node]
        return self._enter(divmod(int(node), height))

    def _turn(self, cell: Cell) -> str | None:
        """Faces a neighbour that cannot be walked into; None if it is faced already."""
        step = cell[0] - self._at[0], cell[1] - self._at[1]
        return None if step == self._facing else MOVES[step]

    def _enter(self, cell: Cell) -> str:
        """Moves into a neighbour, or clears the way."""
        material, creature = self._world[cell]
        if isinstance(creature, objects.Arrow):
            return "noop"
        if creature is not None:
            return self._turn(cell) or "do"
        if material in WALKABLE:
            return MOVES[cell[0] - self._at[0], cell[1] - self._at[1]]
        if material == "lava" and self._turn(cell):
            # To turn to lava is to walk into it. It is faced by walking towards it: one step back, and up to it again.
            back = self._next(self._at, (self._at[0] - cell[0], self._at[1] - cell[1]))
            return self._enter(back) if self._inside(back) and self._material(back) != "lava" else "noop"
        return self._turn(cell) or ("place_stone" if material in ("water", "lava") else "do")

    def _put(self, action: str, beside: str | None = None) -> str:
        """Places a table or a furnace on a neighbour, within reach of `beside` where that is given."""
        front = self._next(self._at, self._facing)
        if self._walkable(front):
            return action
        options: list[tuple[float, str]] = []
        for step, move in MOVES.items():
            cell = self._next(self._at, step)
            if self._walkable(cell):
                kept = beside is None or self._near(beside, cell)
                options.append((1.0 if kept and self._walkable(self._next(cell, step)) else 5.0, move))
            elif TOOL.get(str(self._material(cell))) and self._has[TOOL[str(self._material(cell))]]:
                options.append((2.0, self._turn(cell) or "do"))
        return min(options, default=(0.0, "noop"))[1]

    def _near(self, material: str, cell: Cell | None = None) -> bool:
        x, y = cell or self._at
        ids = self._world._mat_map[max(0, x - 1) : x + 2, max(0, y - 1) : y + 2]
        return bool((ids == self._world._mat_ids[material]).any())

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

    def _inside(self, cell: Cell) -> bool:
        return 0 <= cell[0] < self._area[0] and 0 <= cell[1] < self._area[1]

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
