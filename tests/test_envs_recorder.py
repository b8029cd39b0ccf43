"""`RecordEpisodes`: what it takes for a picture, and that no file of another episode is touched."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest

from dreamer4_jax.data.schema import DataError
from dreamer4_jax.envs.recorder import RecordEpisodes, image_of
from tests.toy_env import ShowAction


def episode(env):
    env.reset(seed=0)
    for _ in range(3):
        env.step(0)


def test_a_recorded_episode_is_never_overwritten(tmp_path, monkeypatch):
    env = RecordEpisodes(ShowAction(16), tmp_path)
    for _ in range(4):
        episode(env)
    env.save()
    (tmp_path / "episode-000001.npz").unlink()  # someone did not like it
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    episode(env)
    # Another process takes the next number at the last moment.
    plain, rivals = Path.open, ["theirs"]

    def late(self, mode="r", *args, **kwargs):
        if mode == "x" and rivals:
            self.write_text(rivals.pop())
        return plain(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", late)
    assert env.save() == tmp_path / "episode-000005.npz"
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name in before} == before
    assert (tmp_path / "episode-000004.npz").read_text() == "theirs" and len(list(tmp_path.iterdir())) == 5


class Symbols(gymnasium.Env):
    """As MiniGrid's: a grid of small numbers, and a picture where it is drawn."""

    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, shape, high, picture):
        self.observation_space = gymnasium.spaces.Dict(image=gymnasium.spaces.Box(0, high, shape, np.uint8))
        self.seen, self.picture = {"image": np.full(shape, min(high, 10), np.uint8)}, picture

    def reset(self, **_):
        return self.seen, {}

    def step(self, action):
        return self.seen, 0.0, False, False, {}

    def render(self):
        return self.picture


def test_a_grid_of_symbols_is_no_picture(tmp_path):
    drawn = np.full((32, 32, 3), 200, np.uint8)
    for shape, high in (((7, 7, 3), 255), ((7, 7, 20), 255), ((20, 20, 3), 10)):
        env = Symbols(shape, high, drawn)
        assert image_of(env, env.seen) is drawn
        env.picture = None
        with pytest.raises(DataError, match=r'grid of symbols .* with render_mode="rgb_array", or wrap .*RGBImgObs'):
            RecordEpisodes(env, tmp_path).reset()
    for shape in ((16, 16, 3), (16, 16), (3, 64, 64), (84, 84, 4), (210, 160, 3)):
        env = Symbols(shape, 255, drawn)
        assert image_of(env, env.seen) is env.seen["image"]
    with pytest.raises(DataError, match=r"neither its observation nor render\(\) is a picture"):
        image_of(ShowAction(16), {"position": 3})
