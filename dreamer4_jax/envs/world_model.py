"""The world model as a gymnasium environment, single and vectorised: thousands of imagined episodes in one program.

    import dreamer4_jax.envs
    env = gymnasium.make("dreamer4_jax/WorldModel-v0", checkpoint="runs/quickstart-seed0")
    envs = gymnasium.make_vec("dreamer4_jax/WorldModel-v0", num_envs=1024, checkpoint="runs/quickstart-seed0")

Observations are those of the real environment, {"image", "task"}; the action space is the config's. An episode starts
behind a context that was recorded in the real environment; it terminates as often as the continue head says, and is
truncated after `max_steps`. Everything random follows from the seed of `reset`: sub-environment i of a vector
environment that was reset with seed s plays what a single one plays that was reset with seed s + i.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from jaxtyping import Array, Bool, Int, UInt8

from dreamer4_jax.agent.heads import symexp_bins
from dreamer4_jax.config import Config, UserError
from dreamer4_jax.data.store import open_dataset
from dreamer4_jax.envs.spaces import action_space
from dreamer4_jax.envs.starts import Starts
from dreamer4_jax.inference import World, load_world, recording
from dreamer4_jax.world.dynamics import Actions
from dreamer4_jax.world.slots import Models, StreamState, join_slots, step_slots

Rewards = Literal["mean", "sampled"]


@partial(jax.jit, donate_argnums=1)
def _begin(models: Models, state: StreamState, starts: dict[str, Any], rows: Array, index: Array, seeds: Array):
    """Slots `rows` start behind the contexts `index`. Returns their frames too."""
    picked = jax.tree.map(lambda x: x[index], starts)
    led = Actions(picked["actions"], picked["present"])
    state, _ = join_slots(models, state, rows, picked["frames"], led, picked["count"], picked["task"], seeds)
    return state, state.frame


@partial(jax.jit, donate_argnums=1, static_argnames="rewards")
def _advance(
    models: Models,
    state: StreamState,
    actions: dict[str, Array],
    go: Bool[Array, " S"],
    steps: Int[Array, " S"],
    *,
    rewards: Rewards,
) -> tuple[StreamState, dict[str, Array]]:
    state, shown = step_slots(models, state, actions, go, steps)
    # A key of the frame that the stream's own draws do not use.
    keys = jax.vmap(lambda k, age: jax.random.split(jax.random.fold_in(jax.random.fold_in(k, age), 1)))(
        state.key, state.age
    )
    reward = shown.reward
    if rewards == "sampled":
        head: Any = models[2].reward
        logits = head.logits(shown.h)[:, 0]
        reward = jnp.asarray(symexp_bins(head.bins))[jax.vmap(jax.random.categorical)(keys[:, 1], logits)]
    end = jax.vmap(jax.random.bernoulli)(keys[:, 0], 1.0 - shown.cont)
    return state, {"frame": shown.frame, "reward": reward, "end": end, "cont": shown.cont, "value": shown.value}


class Dreams:
    """E imagined episodes at once: what both environments are made of.

    Args:
      checkpoint: run directory of a run that has finished phase 2, or a loaded `World`.
      starts: `Starts`, an npz file of them, or None: drawn from the run's recording.
      number: how many contexts are drawn from the recording.
      steps: K of the sampler, agent.sample_steps by default.
      rewards: "mean" is the reward head's expectation, "sampled" a draw of one of its bins.
    """

    def __init__(
        self,
        checkpoint: str | Path | World,
        *,
        envs: int,
        starts: str | Path | Starts | None = None,
        number: int = 256,
        steps: int | None = None,
        rewards: Rewards = "mean",
        dtype: str | None = None,
    ):
        world = checkpoint if isinstance(checkpoint, World) else load_world(checkpoint)
        self.config = c = world.config
        if rewards not in ("mean", "sampled"):
            raise UserError(f"rewards = {rewards!r}: must be 'mean' or 'sampled'")
        k = c.agent.sample_steps if steps is None else steps
        if k < 1 or k & (k - 1) or k > c.dynamics.k_max:
            raise UserError(f"steps = {k}: must be a power of two up to dynamics.k_max = {c.dynamics.k_max}")
        if starts is None:
            if isinstance(checkpoint, World):
                raise UserError("starts = None: a world without its run directory has no recording; give starts")
            starts = Starts.draw(c, open_dataset(recording(checkpoint), c), number=number)
        elif not isinstance(starts, Starts):
            starts = Starts.load(starts, c)
        self.starts, self.envs = starts, envs
        streams = world.streams(slots=envs, context=starts.frames.shape[1], dtype=dtype)
        self._models, self._state = streams.models, streams.empty()
        names = ("frames", "actions", "present", "count", "task")
        self._starts = jax.device_put({name: getattr(starts, name) for name in names}, jax.local_devices()[0])
        self._steps, self._rewards = np.full(envs, k, np.int32), rewards
        # Episodes end at any step, a few at a time: contexts are computed for this many, however many end.
        self._rows = -(-envs // 8)

    def begin(self, rows: Int[np.ndarray, " R"], index: Int[np.ndarray, " R"], seeds: Int[np.ndarray, " R"]) -> Any:
        """Episodes `rows` start behind contexts `index`. Returns the frames of all."""
        frame: Any = self._state.frame
        for at in range(0, len(rows), self._rows):
            part = slice(at, at + self._rows)
            fill = self._rows - len(rows[part])
            padded = (
                np.concatenate([rows[part], np.full(fill, self.envs)]).astype(np.int32),  # beyond the last: dropped
                np.concatenate([index[part], np.zeros(fill, int)]).astype(np.int32),
                np.concatenate([seeds[part], np.zeros(fill, int)]).astype(np.uint32),
            )
            self._state, frame = _begin(self._models, self._state, self._starts, *padded)
        return np.asarray(frame)

    def advance(self, actions: dict[str, np.ndarray], go: Bool[np.ndarray, " E"]) -> dict[str, np.ndarray]:
        """A step of the episodes that `go` marks: frame, reward, end, cont, value, [E, ...] each."""
        self._state, out = _advance(self._models, self._state, actions, go, self._steps, rewards=self._rewards)
        return {name: np.asarray(value) for name, value in out.items()}


def observation_space(config: Config) -> gymnasium.spaces.Dict:
    """Frames and task words, as the real environment shows them."""
    t, a = config.tokenizer, config.agent
    return gymnasium.spaces.Dict(
        image=gymnasium.spaces.Box(0, 255, (t.height, t.width, 3), np.uint8),
        task=gymnasium.spaces.Box(0, a.task_vocab - 1, (a.task_words,), np.int32),
    )


def _components(config: Config, actions: Any) -> dict[str, np.ndarray]:
    """Actions [E, ...] of the batched space, by component, in the types that the program was compiled for."""
    if len(config.actions) == 1:
        actions = {config.actions[0].name: actions}
    return {
        part.name: np.asarray(actions[part.name], np.float32 if part.kind == "continuous" else np.int32)
        for part in config.actions
    }


def _max_steps(config: Config, value: int | None) -> int:
    limit = config.env.max_steps if value is None else value
    if limit < 1:
        raise UserError(f"max_steps = {limit}: must be at least 1")
    return limit


def _draw(rng: np.random.Generator, starts: int, given: int | None = None) -> tuple[int, int]:
    """(context, seed of the stream) of an episode."""
    index, seed = int(rng.integers(starts)), int(rng.integers(2**32))
    if given is None:
        return index, seed
    if not 0 <= given < starts:
        raise UserError(f"options['start'] = {given}: must be from 0 to {starts - 1}")
    return given, seed


class WorldModelEnv(gymnasium.Env):
    """One imagined episode after another. Arguments: see `Dreams`; `max_steps` is env.max_steps by default.

    ``reset(options={"start": i})`` starts behind context i. ``info`` of a step has "cont", the probability that the
    episode went on, and "value", the expected return (NaN before imagination training). Human rendering is
    gymnasium's own, around "rgb_array".
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        checkpoint: str | Path | World,
        *,
        max_steps: int | None = None,
        render_mode: str | None = None,
        **options: Any,
    ):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UserError(f"render_mode = {render_mode!r}: must be None or 'rgb_array'")
        self._dreams = Dreams(checkpoint, envs=1, **options)
        self.config, self.render_mode = self._dreams.config, render_mode
        self.max_steps = _max_steps(self.config, max_steps)
        self.observation_space = observation_space(self.config)
        self.action_space = action_space(self.config.actions)
        self._frame: np.ndarray | None = None
        self._task = np.zeros(self.config.agent.task_words, np.int32)
        self._age = 0

    def _observe(self, frame: UInt8[np.ndarray, "H W 3"]) -> dict[str, np.ndarray]:
        self._frame = frame
        return {"image": frame.copy(), "task": self._task.copy()}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        starts = self._dreams.starts
        index, stream = _draw(self.np_random, len(starts), (options or {}).get("start"))
        self._age, self._task = 0, starts.task[index]
        frames = self._dreams.begin(np.array([0]), np.array([index]), np.array([stream]))
        return self._observe(frames[0]), {"start": index}

    def step(self, action: Any) -> tuple[dict, float, bool, bool, dict]:
        if self._frame is None:
            raise UserError("step() before the first reset()")
        batched = {k: np.asarray(v)[None] for k, v in action.items()} if isinstance(action, dict) else [action]
        out = self._dreams.advance(_components(self.config, batched), np.ones(1, bool))
        self._age += 1
        terminated = bool(out["end"][0])
        info = {"cont": float(out["cont"][0]), "value": float(out["value"][0])}
        truncated = not terminated and self._age >= self.max_steps
        return self._observe(out["frame"][0]), float(out["reward"][0]), terminated, truncated, info

    def render(self) -> np.ndarray | None:
        return None if self.render_mode is None or self._frame is None else self._frame.copy()


class WorldModelVectorEnv(gymnasium.vector.VectorEnv):
    """`num_envs` imagined episodes in one batch. An episode that ended begins anew with the next step, whose action it
    ignores (gymnasium's NEXT_STEP). Arguments and info: see `WorldModelEnv`."""

    metadata: dict[str, Any] = {
        "render_modes": ["rgb_array"],
        "render_fps": 10,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        checkpoint: str | Path | World,
        num_envs: int = 1,
        *,
        max_steps: int | None = None,
        render_mode: str | None = None,
        **options: Any,
    ):
        if num_envs < 1:
            raise UserError(f"num_envs = {num_envs}: must be at least 1")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UserError(f"render_mode = {render_mode!r}: must be None or 'rgb_array'")
        self._dreams = Dreams(checkpoint, envs=num_envs, **options)
        self.config, self.render_mode, self.num_envs = self._dreams.config, render_mode, num_envs
        self.max_steps = _max_steps(self.config, max_steps)
        self.single_observation_space = observation_space(self.config)
        self.single_action_space = action_space(self.config.actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rngs: list[np.random.Generator] = []
        self._task = np.zeros((num_envs, self.config.agent.task_words), np.int32)
        self._start = np.zeros(num_envs, np.int64)
        self._age = np.zeros(num_envs, np.int64)
        self._over = np.zeros(num_envs, bool)
        self._frame: np.ndarray | None = None

    def _begin(self, rows: np.ndarray, start: int | None = None) -> np.ndarray:
        starts = self._dreams.starts
        drawn = np.array([_draw(self._rngs[i], len(starts), start) for i in rows])
        self._start[rows], self._age[rows], self._task[rows] = drawn[:, 0], 0, starts.task[drawn[:, 0]]
        return self._dreams.begin(rows, drawn[:, 0], drawn[:, 1])

    def _observe(self, frame: np.ndarray) -> dict[str, np.ndarray]:
        self._frame = frame
        return {"image": frame.copy(), "task": self._task.copy()}

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict, dict]:
        """Starts all episodes; a seed s gives sub-environment i the seed s + i."""
        seeds: list[int | None]
        if seed is None or isinstance(seed, int):
            super().reset(seed=seed)
            seeds = [None if seed is None else seed + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
            if len(seeds) != self.num_envs:
                raise UserError(f"seed: {len(seeds)} seeds for {self.num_envs} environments")
        if seeds[0] is not None or not self._rngs:
            self._rngs = [gymnasium.utils.seeding.np_random(s)[0] for s in seeds]
        self._over[:] = False
        frame = self._begin(np.arange(self.num_envs), (options or {}).get("start"))
        return self._observe(frame), {"start": self._start.copy()}

    def step(self, actions: Any) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        if self._frame is None:
            raise UserError("step() before the first reset()")
        over = self._over
        out = self._dreams.advance(_components(self.config, actions), ~over)
        frame = out["frame"]
        self._age += ~over
        terminated = out["end"] & ~over
        truncated = ~terminated & ~over & (self._age >= self.max_steps)
        if over.any():
            frame = self._begin(np.flatnonzero(over))
        self._over = terminated | truncated
        info = {name: np.where(over, np.nan, out[name]) for name in ("cont", "value")}
        return self._observe(frame), np.where(over, 0.0, out["reward"]), terminated, truncated, info

    def render(self) -> tuple[np.ndarray, ...] | None:
        return None if self.render_mode is None or self._frame is None else tuple(self._frame.copy())
