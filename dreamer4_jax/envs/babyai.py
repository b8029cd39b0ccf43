"""BabyAI levels (the `minigrid` package) as pixel environments whose missions are task words.

Observation: ``image`` uint8 [height, width, 3] and ``task`` int32 [words]. The image shows the whole grid, or the
agent's own 7 x 7 view, at ``env.tile`` pixels a tile, padded with black at the bottom and the right. Nothing else of
the simulator's state is observable.
"""

import contextlib
import difflib
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Int, UInt8
from minigrid.core.grid import Grid
from minigrid.core.world_object import WorldObj
from minigrid.minigrid_env import MiniGridEnv
from minigrid.utils.baby_ai_bot import BabyAIBot

from dreamer4_jax.config import ActionComponent, EnvConfig, UserError
from dreamer4_jax.envs.kinds import ExpertFailure

# Every word of BabyAI's language. The position in this tuple is part of the data format: append, never reorder.
# fmt: off
WORDS = (
    "a", "the", "go", "to", "pick", "up", "open", "put", "next", "and", "then", "after", "you", "your", "on", "in",
    "front", "of", "behind", "left", "right", "object", "ball", "box", "key", "door",
    "red", "green", "blue", "purple", "yellow", "grey",
)
# fmt: on
PADDING, UNKNOWN = 0, 1
WORD_IDS = {word: i + 2 for i, word in enumerate(WORDS)}
VOCABULARY = len(WORDS) + 2  # ids 0 .. VOCABULARY - 1; agent.task_vocab must be at least this
# How random actions are drawn: left, right, forward, pick up, drop, toggle, done. Uniform ones would mostly do nothing.
RANDOM = (0.2, 0.2, 0.35, 0.1, 0.08, 0.05, 0.02)


def actions(env_cfg: EnvConfig) -> tuple[ActionComponent, ...]:
    """BabyAI's seven actions."""
    return (ActionComponent("move", "categorical", len(RANDOM)),)


def encode_task(mission: str, words: int) -> Int[np.ndarray, " words"]:
    """Word ids of a mission, word i at slot i; 0 pads, 1 stands for a word outside the vocabulary.

    Punctuation is dropped: in BabyAI's language the only comma stands before "then".
    """
    found = re.findall(r"[a-z]+", mission.lower())
    if len(found) > words:
        raise UserError(
            f"mission {mission!r} has {len(found)} words, but agent.task_words = {words}: "
            f"set agent.task_words to at least {len(found)}"
        )
    ids = np.full(words, PADDING, np.int32)
    ids[: len(found)] = [WORD_IDS.get(word, UNKNOWN) for word in found]
    return ids


def decode_task(ids: Int[np.ndarray, " words"]) -> str:
    """The words of a task, for titles and reports."""
    return " ".join("?" if i == UNKNOWN else WORDS[i - 2] for i in map(int, ids) if i != PADDING)


def levels() -> list[str]:
    """Names of all registered BabyAI levels."""
    return sorted(name for name in gymnasium.registry if name.startswith("BabyAI-"))


class Tiles:
    """Composes frames from rendered tiles: bit-equal to minigrid's own renderer, several times faster.

    Minigrid compares the agent's position with every cell and copies each tile on its own. Here each distinct tile is
    rendered once, by minigrid, and a frame is one gather.
    """

    def __init__(self, tile: int):
        self.tile = tile
        self._index: dict[tuple[Any, ...], int] = {}
        self._atlas = np.zeros((0, tile, tile, 3), np.uint8)

    def _add(self, key: tuple[Any, ...], cell: WorldObj | None, agent_dir: int | None, highlight: bool) -> int:
        image = Grid.render_tile(cell, agent_dir=agent_dir, highlight=highlight, tile_size=self.tile)
        # Minigrid assigns its float tiles to a uint8 frame: the same truncation.
        self._atlas = np.concatenate([self._atlas, image.astype(np.uint8)[None]])
        return self._index.setdefault(key, len(self._atlas) - 1)

    def compose(
        self, grid: Grid, agent_pos: Sequence[int] | np.ndarray, agent_dir: int, highlight: np.ndarray | None
    ) -> UInt8[np.ndarray, "H W 3"]:
        """The picture of `grid`. `highlight` is minigrid's mask [columns, rows] or None."""
        width, height, tile = grid.width, grid.height, self.tile
        agent = int(agent_pos[1]) * width + int(agent_pos[0])
        lit = None if highlight is None else highlight.T.reshape(-1).tolist()
        index, ids = self._index, []
        for i, cell in enumerate(grid.grid):
            direction = agent_dir if i == agent else None
            light = False if lit is None else lit[i]
            key = (direction, light) if cell is None else (direction, light, *cell.encode())
            found = index.get(key)
            ids.append(self._add(key, cell, direction, light) if found is None else found)
        tiles = self._atlas[ids].reshape(height, width, tile, tile, 3)
        return tiles.transpose(0, 2, 1, 3, 4).reshape(height * tile, width * tile, 3)


class BabyAIEnv(gymnasium.Wrapper):
    """One BabyAI level as pixels and task words. ``env.unwrapped`` is minigrid's own environment."""

    shared: Sequence[str] = ("_tiles",)  # parts that copies may share (`evaluation.simulator.clone`)
    idle = len(RANDOM) - 1  # "done" does nothing

    def __init__(self, env: MiniGridEnv, config: EnvConfig, level: str, *, height: int, width: int, words: int):
        super().__init__(env)
        env.spec = None  # nothing can rebuild it from gymnasium's registry: `make` builds it
        # Minigrid encodes the agent's symbolic view at every step, half of a step's time. Nobody reads it here.
        env.gen_obs = dict  # type: ignore[method-assign]
        self.level = level
        self._agent_view = config.view == "agent"
        self._grid_env = env
        self._tiles = Tiles(config.tile)
        self._size, self._words = (height, width), words
        self.observation_space = gymnasium.spaces.Dict(
            image=gymnasium.spaces.Box(0, 255, (height, width, 3), np.uint8),
            task=gymnasium.spaces.Box(0, VOCABULARY - 1, (words,), np.int32),
        )
        self._task = np.zeros(words, np.int32)

    def frame(self) -> UInt8[np.ndarray, "H W 3"]:
        """The current view at its own size, without padding."""
        env = self._grid_env
        if self._agent_view:
            grid, visible = env.gen_obs_grid()
            place = env.agent_view_size // 2, env.agent_view_size - 1
            return self._tiles.compose(grid, place, 3, visible)
        return self._tiles.compose(env.grid, env.agent_pos, env.agent_dir, None)

    def _observe(self) -> dict[str, np.ndarray]:
        view = self.frame()
        if view.shape[:2] == self._size:
            image = view
        else:
            image = np.zeros((*self._size, 3), np.uint8)
            image[: view.shape[0], : view.shape[1]] = view
        return {"image": image, "task": self._task.copy()}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        with contextlib.redirect_stdout(io.StringIO()):  # minigrid prints each rejected mission
            self._grid_env.reset(seed=seed, options=options)
        self._task = encode_task(self._grid_env.mission, self._words)
        return self._observe(), {"mission": self._grid_env.mission}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        _, given, terminated, truncated, _ = self._grid_env.step(int(action))
        reward = float(given)
        info: dict[str, Any] = {"mission": self._grid_env.mission}
        terminated, truncated = bool(terminated), bool(truncated)
        if terminated or truncated:
            info["success"] = terminated and reward > 0
        return self._observe(), reward, terminated, truncated, info

    def render(self) -> UInt8[np.ndarray, "H W 3"]:
        return self.frame()

    def random_action(self, rng: np.random.Generator) -> int:
        """One of the seven, with the shares of `RANDOM`."""
        return draw(RANDOM, rng)

    def expert(self, rng: np.random.Generator) -> "Bot":
        """Minigrid's bot, which makes no use of chance."""
        return Bot(self)


class Bot:
    """BabyAI's bot. It follows the episode through foreign actions too, told of each that was really taken."""

    def __init__(self, env: BabyAIEnv):
        self._bot = BabyAIBot(env)

    def act(self, taken: int | None) -> int:
        try:
            return int(self._bot.replan(taken))
        except Exception as error:  # whatever it asserts or trips over in a state it was not written for
            raise ExpertFailure(f"{type(error).__name__}: {error}") from error


def draw(shares: Sequence[float], rng: np.random.Generator) -> int:
    """A class, drawn with the given shares."""
    return int(np.searchsorted(np.cumsum(shares), rng.random() * sum(shares), side="right"))


def make(env_cfg: EnvConfig, level: str, *, height: int, width: int, words: int) -> BabyAIEnv:
    """Builds a level with time limit ``env.max_steps``.

    Args:
        level: a registered name such as "BabyAI-GoToLocal-v0".
        height, width: size of the padded image, from the tokenizer's config.
        words: length of the task, ``agent.task_words``.
    """
    known = levels()
    if level not in known:
        close = difflib.get_close_matches(level, known, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"{len(known)} levels are known, e.g. {known[0]}"
        raise UserError(f"env.levels: unknown level {level!r}; {hint}")
    if env_cfg.tile < 1:
        raise UserError(f"env.tile = {env_cfg.tile}: must be positive")
    if env_cfg.max_steps < 1:
        raise UserError(f"env.max_steps = {env_cfg.max_steps}: must be at least 1")
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gymnasium.make(level, disable_env_checker=True).unwrapped
    assert isinstance(env, MiniGridEnv)
    # A fixed limit, set on the instance: not every level's constructor takes `max_steps`. BabyAI's reward,
    # 1 - 0.9 * step / max_steps, then counts against this limit too.
    env.max_steps = env_cfg.max_steps
    env.fixed_max_steps = True  # type: ignore[attr-defined]
    rows, cols = (env.agent_view_size,) * 2 if env_cfg.view == "agent" else (env.height, env.width)
    need_h, need_w = rows * env_cfg.tile, cols * env_cfg.tile
    if need_h > height or need_w > width:
        raise UserError(
            f"level {level} renders {need_h} x {need_w} pixels at env.tile = {env_cfg.tile}, more than "
            f"tokenizer.height x tokenizer.width = {height} x {width}: set these to at least {need_h} and {need_w}, "
            'or env.view = "agent", or choose a smaller level'
        )
    return BabyAIEnv(env, env_cfg, level, height=height, width=width, words=words)
