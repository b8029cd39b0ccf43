"""Live recording from any gymnasium environment by random actions: the source is ``gym:ID``, as ``gym:CarRacing-v3``.

Frames are the observation where it is a picture, else what the environment renders. Episode i is seeded with
`seed` + i, environment and actions both. To record a policy of your own, wrap the environment in
`envs.recorder.RecordEpisodes` and convert its folder.
"""

from typing import Any

import numpy as np

from dreamer4_jax.config import ActionComponent
from dreamer4_jax.data.readers.actions import ActionSpace, component_name
from dreamer4_jax.data.readers.base import Entry, Options, Part, Reader, assemble, reading, stack
from dreamer4_jax.data.schema import DataError, Episode


def space_of(space: Any) -> ActionSpace:
    """The components of a gymnasium action space. Ranges of a Box without bounds are taken as [-1, 1] and clipped."""
    import gymnasium.spaces as s

    from dreamer4_jax.envs.recorder import flatten

    components: list[ActionComponent] = []
    low: dict[str, tuple[float, ...]] = {}
    high: dict[str, tuple[float, ...]] = {}

    def walk(sub: Any, name: str) -> None:
        match sub:
            case s.Dict():
                for n, inner in sub.spaces.items():
                    walk(inner, n)
            case s.Tuple():
                for i, inner in enumerate(sub.spaces):
                    walk(inner, f"{name}_{i}")
            case s.Discrete():
                components.append(ActionComponent(component_name(name), "categorical", int(sub.n)))
            case s.MultiDiscrete():
                for i, n in enumerate(np.reshape(sub.nvec, -1)):
                    components.append(ActionComponent(component_name(f"{name}_{i}"), "categorical", int(n)))
            case s.MultiBinary():
                components.append(ActionComponent(component_name(name), "binary", int(np.prod(sub.shape))))
            case s.Box():
                bounded = np.isfinite(sub.low) & np.isfinite(sub.high) & (sub.high > sub.low)
                name = component_name(name)
                components.append(ActionComponent(name, "continuous", int(np.prod(sub.shape))))
                low[name] = tuple(np.where(bounded, sub.low, -1.0).reshape(-1).tolist())
                high[name] = tuple(np.where(bounded, sub.high, 1.0).reshape(-1).tolist())
            case _:
                flatten(sub, None, name)  # raises, naming what is supported

    walk(space, "action")
    return ActionSpace(tuple(components), low, high)


class GymnasiumReader(Reader):
    format = "gymnasium"
    decided = True

    def __init__(self, source: str, options: Options, space: ActionSpace | None = None):
        super().__init__(source, options, space)
        if options.episodes < 1 or options.steps < 1:
            raise DataError(f"episodes = {options.episodes}, steps = {options.steps}: must be at least 1")
        self._env = self._make(source.removeprefix("gym:"))
        self.space = space or space_of(self._env.action_space)
        self.fps = self._env.metadata.get("render_fps")

    @staticmethod
    def _make(name: str) -> Any:
        import gymnasium

        try:
            try:
                return gymnasium.make(name, render_mode="rgb_array")
            except TypeError:  # its constructor knows no render mode
                return gymnasium.make(name)
        except (gymnasium.error.Error, ImportError) as error:
            raise DataError(f"gym:{name}: cannot be made ({error})") from None

    @classmethod
    def claims(cls, source: str) -> bool:
        return source.startswith("gym:")

    def entries(self) -> list[Entry]:
        return [Entry(str(self.options.seed + i), 0) for i in range(self.options.episodes)]

    def read(self, key: str, part: Part) -> Episode:
        from dreamer4_jax.envs.recorder import flatten, image_of

        with reading(f"{self.source}, seed {key}"):
            env = self._env
            observation, _ = env.reset(seed=int(key))
            env.action_space.seed(int(key))
            frames, rewards, rows, ended = [part.fit(image_of(env, observation))], [], [], False
            for _ in range(self.options.steps):
                action = env.action_space.sample()
                observation, reward, terminated, truncated, _ = env.step(action)
                frames.append(part.fit(image_of(env, observation)))
                rewards.append(float(reward))
                rows.append({component_name(k): v for k, v in flatten(env.action_space, action).items()})
                if terminated or truncated:
                    ended = bool(terminated)
                    break
            return assemble(
                stack(iter(frames[part.start : part.stop])),
                self.space,
                {name: np.stack([row[name] for row in rows]) for name in rows[0]},
                alignment="taken",
                total=len(frames),
                part=part,
                rewards=np.asarray(rewards, np.float32),
                is_terminal=ended,
                meta={"source": self.source, "seed": int(key), "policy": "random"},
            )


READER = GymnasiumReader
