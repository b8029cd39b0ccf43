"""Ways over Crafter's true map: what each cell costs to enter, the cheapest way to every cell, the next move on it."""

from typing import Any

import numpy as np
from crafter import objects
from jaxtyping import Bool, Float
from scipy import ndimage, sparse
from scipy.sparse import csgraph

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


class Walker:
    """Sees the whole map and every creature of `crafter.CrafterEnv`, whose `game` has been reset, and finds its way."""

    def __init__(self, game: Any):
        self._game = game
        self._world, self._player = game._world, game._player
        self._area: Cell = tuple(self._world.area)
        self._grid = _graph(*self._area)

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

    def _inside(self, cell: Cell) -> bool:
        return 0 <= cell[0] < self._area[0] and 0 <= cell[1] < self._area[1]
