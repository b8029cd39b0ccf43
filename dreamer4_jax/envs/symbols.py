"""Exact decoding of rendered BabyAI frames back into game states, one symbol a tile.

The templates are minigrid's own renderings of everything a BabyAI level can show. A tile of a generated frame gets the
symbol of the nearest template in squared distance, so a frame can be scored as the right or the wrong game state.
"""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, UInt8
from minigrid.core.constants import COLOR_NAMES
from minigrid.core.grid import Grid
from minigrid.core.world_object import Ball, Box, Door, Key, Wall, WorldObj

from dreamer4_jax.config import UserError

PADDING_SYMBOL = 0  # black: outside the level
_DIRECTIONS = ("right", "down", "left", "up")


def _scenes(view: str) -> list[tuple[str, WorldObj | None, int | None, bool]]:
    """(name, object, agent direction, highlighted) of everything a tile can show."""
    objects: list[tuple[str, WorldObj | None]] = [("empty", None), ("wall", Wall())]
    open_doors: list[tuple[str, WorldObj]] = []
    carried: list[tuple[str, WorldObj]] = []
    for color in COLOR_NAMES:
        items: list[tuple[str, WorldObj]] = [("key", Key(color)), ("ball", Ball(color)), ("box", Box(color))]
        carried += [(f"{color} {kind}", item) for kind, item in items]
        open_doors.append((f"{color} open door", Door(color, is_open=True)))
        objects += [
            (f"{color} closed door", Door(color)),
            (f"{color} locked door", Door(color, is_locked=True)),
        ]
    objects += carried + open_doors
    scenes: list[tuple[str, WorldObj | None, int | None, bool]] = [(name, item, None, False) for name, item in objects]
    below: list[tuple[str, WorldObj | None]] = [("empty", None), *open_doors]
    if view == "full":
        for d, direction in enumerate(_DIRECTIONS):
            scenes += [(f"agent {direction} on {name}", item, d, False) for name, item in below]
        return scenes
    # The agent's own view: it looks up, stands on what it carries, and what it sees is lit.
    scenes += [(f"{name}, lit", item, None, True) for name, item in objects]
    scenes += [(f"agent on {name}", item, 3, True) for name, item in [*below, *carried]]
    return scenes


class SymbolDecoder:
    """Nearest-template decoder of frames rendered at `tile` pixels a tile.

    Attributes:
        names: name of each symbol; symbol 0 is the black padding.
        templates: uint8 [symbols, tile, tile, 3].
    """

    def __init__(self, tile: int, view: Literal["full", "agent"] = "full"):
        self.tile = tile
        names, images = ["padding"], [np.zeros((tile, tile, 3), np.uint8)]
        for name, item, direction, lit in _scenes(view):
            image = Grid.render_tile(item, agent_dir=direction, highlight=lit, tile_size=tile).astype(np.uint8)
            twin = next((n for n, other in zip(names, images, strict=True) if np.array_equal(other, image)), None)
            if twin is not None:
                raise UserError(
                    f"env.tile = {tile}: {name!r} and {twin!r} render to the same pixels; use at least 6 pixels a tile"
                )
            names.append(name)
            images.append(image)
        self.names = tuple(names)
        self.templates = np.stack(images)
        flat = self.templates.reshape(len(images), -1).astype(np.float32)
        self._matrix = -2.0 * flat.T  # [pixels, symbols]
        self._norms = (flat * flat).sum(1)

    def _split(self, frames: UInt8[np.ndarray, "*batch H W 3"]) -> UInt8[np.ndarray, "*batch rows cols pixels"]:
        *batch, height, width, channels = frames.shape
        tile = self.tile
        if channels != 3 or height % tile or width % tile or frames.dtype != np.uint8:
            raise UserError(
                f"frames of shape {frames.shape} and type {frames.dtype} do not split into tiles of {tile} pixels: "
                f"expected uint8 [..., H, W, 3] with H and W multiples of env.tile = {tile}"
            )
        rows, cols = height // tile, width // tile
        grid = frames.reshape(*batch, rows, tile, cols, tile, 3)
        return np.moveaxis(grid, -4, -3).reshape(*batch, rows, cols, tile * tile * 3)

    def decode(self, frames: UInt8[np.ndarray, "*batch H W 3"]) -> Int[np.ndarray, "*batch rows cols"]:
        """Symbol of each tile: the nearest template in squared distance."""
        tiles = self._split(frames)
        flat = tiles.reshape(-1, tiles.shape[-1])
        out = np.empty(len(flat), np.int32)
        block = 65_536  # tiles at a time: bounds the float copy to some 50 MB at 8 pixels a tile
        for start in range(0, len(flat), block):
            part = flat[start : start + block].astype(np.float32)
            # |x|^2 is the same for every template, so it is left out of the distance.
            out[start : start + block] = (part @ self._matrix + self._norms).argmin(1)
        return out.reshape(tiles.shape[:-1])

    def exact_tiles(self, frames: UInt8[np.ndarray, "*batch H W 3"]) -> Bool[np.ndarray, "*batch rows cols"]:
        """Which tiles equal their template pixel for pixel."""
        tiles = self._split(frames)
        known = self.templates.reshape(len(self.templates), -1)
        return (tiles == known[self.decode(frames)]).all(-1)

    def exact(self, frames: UInt8[np.ndarray, "*batch H W 3"]) -> float:
        """Share of tiles that equal their template pixel for pixel."""
        return float(self.exact_tiles(frames).mean())

    def render(self, symbols: Int[np.ndarray, "*batch rows cols"]) -> UInt8[np.ndarray, "*batch H W 3"]:
        """The frames of a grid of symbols: the inverse of `decode` on rendered frames."""
        *batch, rows, cols = symbols.shape
        tiles = np.moveaxis(self.templates[symbols], -3, -4)  # [..., rows, tile, cols, tile, 3]
        return tiles.reshape(*batch, rows * self.tile, cols * self.tile, 3)
