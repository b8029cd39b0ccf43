"""Adapters of foreign simulators: what decides an episode, how it is recorded, and what each shows and takes."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from dreamer4_jax.config import ActionComponent, EnvConfig, UserError
from dreamer4_jax.envs import kinds, spaces
from dreamer4_jax.envs.collect import record
from dreamer4_jax.evaluation.simulator import clone

LEVELS = {
    "crafter": "CrafterDiamond",
    "atari": "ALE/Breakout-v5",
    "minatar": "MinAtar/SpaceInvaders-v0",
    "vizdoom": "ViZDoom/defend_the_center",
}
PACKAGES = {"crafter": "crafter", "atari": "ale_py", "minatar": "minatar", "vizdoom": "vizdoom"}
each_kind = pytest.mark.parametrize("kind", LEVELS)


def game(kind, level=None, *, size=64, max_steps=40):
    pytest.importorskip(PACKAGES[kind], reason=f"the extra {kind!r} is not installed")
    level = level or LEVELS[kind]
    return kinds.make(EnvConfig(kind, (level,), max_steps=max_steps), level, height=size, width=size, words=2)


def parts(kind):
    return kinds.KINDS[kind].actions(EnvConfig(kind, (LEVELS[kind],)))


def played(env, seed, steps):
    """A digest of all that is seen and earned, in a life that does not end early."""
    rng, seen = np.random.default_rng(seed), hashlib.sha256()
    observation, _ = env.reset(seed=seed)
    for _ in range(steps):
        if hasattr(env, "game") and hasattr(env.game, "_player"):
            env.game._player.health = 9  # Crafter's animals are balanced for as long as it lasts
        observation, reward, terminated, truncated, _ = env.step(env.random_action(rng))
        seen.update(observation["image"].tobytes() + np.float64(reward).tobytes())
        if terminated or truncated:
            break
    return seen.hexdigest()


@each_kind
def test_it_passes_gymnasiums_check(kind):
    env = game(kind)
    check_env(env, skip_render_check=True)
    image = env.reset(seed=1)[0]["image"]
    np.testing.assert_array_equal(env.render(), image)
    env.close()


@each_kind
def test_an_episode_depends_on_its_seed_alone(kind, tmp_path):
    """Not on what was played before, nor on the process, whose addresses and hashes are others."""
    env = game(kind, max_steps=250)
    first = played(env, 3, 250)
    assert played(env, 4, 30) != first
    assert played(env, 3, 250) == first
    env.close()
    code = (
        "import json, sys\n"
        "from tests.test_envs_games import game, played\n"
        "filler = [object() for _ in range(100_003)]\n"
        "print(json.dumps(played(game(sys.argv[1], max_steps=250), 3, 250)))\n"
    )
    other = subprocess.run([sys.executable, "-c", code, kind], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout.splitlines()[-1]) == first


@each_kind
def test_the_action_of_a_frame_is_the_one_that_led_to_it(kind):
    """Recorded actions, played again from the recorded seed, give the recorded frames; one step later they do not."""
    env, rng = game(kind), np.random.default_rng(0)
    episode = record(env, lambda _: env.random_action(rng), env.reset(seed=5), parts(kind), {})
    episode.validate(parts(kind))
    frames, steps = len(episode), range(1, len(episode))
    taken = [spaces.to_env({name: value[t] for name, value in episode.actions.items()}) for t in range(frames)]

    def again(actions):
        images = [env.reset(seed=5)[0]["image"]]
        images += [env.step(actions[t])[0]["image"] for t in steps]
        return np.stack(images)

    np.testing.assert_array_equal(again(taken), episode.frames)
    assert (again([*taken[1:], taken[-1]]) != episode.frames).any()
    env.close()


@each_kind
def test_unknown_levels_are_refused(kind):
    pytest.importorskip(PACKAGES[kind])
    with pytest.raises(UserError, match="unknown level 'Nowhere'; choose of"):
        game(kind, "Nowhere")


@each_kind
def test_a_missing_package_is_named_with_its_extra(kind, monkeypatch):
    module = f"dreamer4_jax.envs.{kinds.KINDS[kind].module}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, PACKAGES[kind], None)
    with pytest.raises(UserError, match=rf"needs the package '{PACKAGES[kind]}': pip install 'dreamer4_jax\[{kind}\]'"):
        kinds.KINDS[kind].actions(EnvConfig(kind, (LEVELS[kind],)))


def test_environments_are_found_by_kind_and_by_level():
    assert kinds.find("crafter") == ("crafter", ("Crafter",))
    assert kinds.find("ALE/Pong-v5,ALE/Breakout-v5") == ("atari", ("ALE/Pong-v5", "ALE/Breakout-v5"))
    for name in ("nowhere", "ALE/Pong-v5,Crafter"):
        with pytest.raises(UserError, match="unknown environment .* babyai .* vizdoom"):
            kinds.find(name)


def futures(env, seeds):
    """What is seen of the next steps, in copies and then in the environment itself: the same moves in all."""

    def after(other):
        seen, rng = hashlib.sha256(), np.random.default_rng(0)
        for _ in range(60):
            observation, _, terminated, truncated, _ = other.step(int(rng.integers(1, 5)))
            seen.update(observation["image"].tobytes())
            if terminated or truncated:
                break
        return seen.hexdigest()

    found = [after(clone(env, seed)) for seed in seeds]
    return found, after(env)


@pytest.mark.parametrize(("kind", "level"), [("minatar", "MinAtar/Asterix-v0"), ("crafter", "Crafter")])
def test_a_copy_does_not_know_the_future(kind, level):
    env = game(kind, level, max_steps=200)
    env.reset(seed=5)
    (one, again, *others), real = futures(env, (0, 0, 1, 2, 3))
    assert one == again and len({one, real, *others}) == 5


@pytest.mark.parametrize(("kind", "name"), [("atari", "Atari ALE/"), ("vizdoom", "ViZDoom ViZDoom/")])
def test_what_cannot_be_copied_is_named(kind, name):
    env = game(kind)
    env.reset(seed=0)
    with pytest.raises(UserError, match=f"^{name}.*: cannot be copied in the middle of an episode"):
        clone(env, 0)
    env.close()


def test_a_race_cannot_be_copied():
    """Gymnasium's copy of a race would be a new one, on which nobody has set out."""
    pytest.importorskip("Box2D", reason="the extra 'control' is not installed")
    env = kinds.make(EnvConfig("control", ("CarRacing-v3",)), "CarRacing-v3", height=32, width=32, words=1)
    env.reset(seed=0)
    with pytest.raises(UserError, match=r"^Continuous control CarRacing-v3: cannot be copied .*Box2D has no copies"):
        clone(env, 0)
    env.close()


# ---------------------------------------------------------------------------------------------------------------------
# Crafter


def test_crafter_shows_the_last_move():
    env = game("crafter", "Crafter")
    env.reset(seed=0)
    looks = {}
    for move, name in ((1, "left"), (2, "right"), (3, "up"), (4, "down")):
        # Crafter's pictures have their axes the other way round; the player stands in the fifth column, fourth row.
        looks[move] = env.game._textures.get(f"player-{name}", (7, 7)).transpose(1, 0, 2)
    rng = np.random.default_rng(0)
    episode = record(env, lambda _: int(rng.integers(1, 5)), env.reset(seed=0), parts("crafter"), {})
    for t in range(1, len(episode)):
        cell = episode.frames[t, 21:28, 28:35].astype(float)
        errors = {}
        for move, look in looks.items():
            solid = look[..., 3] == 255
            # Daylight changes all colours a little.
            errors[move] = np.abs(cell[solid] - look[solid][:, :3].astype(float)).mean()
        assert min(errors, key=errors.get) == episode.actions["move"][t]


def test_which_creature_goes_depends_on_no_address():
    """Crafter keeps the creatures of a part of the world as a set and draws one by its number."""
    env = game("crafter")
    from crafter.objects import Cow

    left = []
    for order in (list, lambda creatures: list(creatures)[::-1]):
        env.reset(seed=0)
        world, part = env.game._world, (0, 12, 0, 12)
        for creature in list(world._chunks[part]):
            world.remove(creature)
        for x, y in np.argwhere(np.isin(world._mat_map[:12, :12], [world._mat_ids["grass"]]))[:20]:
            world.add(Cow(world, (x, y)))
        world.random.seed(0)
        before = len(world._chunks[part])
        for _ in range(60):
            env.game._balance_chunk(part, order(world._chunks[part]))
        left.append(sorted(tuple(map(int, cow.pos)) for cow in world._chunks[part]))
    assert left[0] == left[1] and 0 < len(left[0]) < before


def test_the_planner_reaches_the_diamond_task_by_task():
    from dreamer4_jax.config import DataConfig
    from dreamer4_jax.envs.collect import Scripted

    env = game("crafter", max_steps=400)
    from dreamer4_jax.envs.crafter import MILESTONES

    first = env.reset(seed=SOLVED)
    script = Scripted("bot", DataConfig(), env, np.random.default_rng(0))
    episode = record(env, script.act, first, parts("crafter"), {"seed": SOLVED})
    assert episode.meta["success"] and episode.is_terminal
    assert episode.reward.sum() == len(MILESTONES) and set(MILESTONES) <= set(episode.meta["events"])
    # The frame that is rewarded still has the task that it fulfils, where tasks are fulfilled in order.
    for number, name in enumerate(MILESTONES):
        at = episode.meta["events"][name]
        assert episode.reward[at] >= 1 and episode.task[at, 0] <= number + 2
    assert episode.task[0].tolist() == [2, 0] and episode.task[-1, 0] == len(MILESTONES) + 1
    assert (np.diff(episode.task[:, 0]) >= 0).all()
    # Labels: from which frame on actions were for what.
    starts = [start for start, _ in script.labels["subgoals"]]
    assert starts[0] == 1 and starts == sorted(set(starts))
    names = [name for _, name in script.labels["subgoals"]]
    assert names[0] == "collect_wood" and names[-1] == "collect_diamond"


SOLVED = 6  # a seed whose diamond is near


# ---------------------------------------------------------------------------------------------------------------------
# Atari, MinAtar


def test_atari_games_share_their_actions_and_have_no_success():
    for level in ("ALE/Pong-v5", "ALE/Breakout-v5"):
        env = game("atari", level, max_steps=3)
        env.reset(seed=0)
        *_, truncated, info = [env.step(17) for _ in range(3)][-1]
        assert truncated and "success" not in info and env.action_space.n == 18
    with pytest.raises(UserError, match="and 96 more"):
        game("atari", "ALE/Nope-v5")


def test_no_action_sticks_from_one_minatar_episode_to_the_next():
    """A tenth of the actions repeat the one before; the first of an episode has none before it."""
    used, fresh = game("minatar", LEVELS["minatar"]), game("minatar", LEVELS["minatar"])
    left, right = 1, 3
    moved = 0
    for seed in range(60):
        used.reset(seed=1000)
        used.step(left)
        used.reset(seed=seed)
        fresh.reset(seed=1000)
        fresh.step(right)
        fresh.reset(seed=seed)
        before = fresh.render()
        np.testing.assert_array_equal(used.step(right)[0]["image"], after := fresh.step(right)[0]["image"])
        moved += (before != after).any()
    assert moved


def test_minatars_picture_is_its_state():
    env = game("minatar", "MinAtar/Seaquest-v0", size=64)
    from dreamer4_jax.envs import minatar

    colours = minatar.palette(10)
    assert len(np.unique(colours, axis=0)) == 11
    rng = np.random.default_rng(0)
    observation, _ = env.reset(seed=2)
    for _ in range(30):
        image, state = observation["image"], env._game.state()
        cells = image[:60, :60].reshape(10, 6, 10, 6, 3)
        assert (cells == cells[:, :1, :, :1]).all() and not image[60:].any() and not image[:, 60:].any()
        distance = np.abs(cells[:, 0, :, 0, None].astype(int) - colours).sum(-1)
        last = (state * np.arange(1, 11)).max(-1)
        np.testing.assert_array_equal(distance.argmin(-1), last)
        observation, *_ = env.step(env.random_action(rng))


# ---------------------------------------------------------------------------------------------------------------------
# ViZDoom


def test_doom_takes_the_actions_of_minecraft_recordings():
    from dreamer4_jax.data.readers.vpt import COMPONENTS

    env = game("vizdoom")
    assert parts("vizdoom") == COMPONENTS
    assert COMPONENTS[1] == ActionComponent("mouse", "mouse", 121)
    assert set(env.action_space.spaces) == {"keys", "mouse"} and env.action_space["keys"].n == 23
    env.close()


def test_each_class_of_the_mouse_turns_by_its_angle():
    from vizdoom import GameVariable

    from dreamer4_jax.agent.actions import mu_law_mouse
    from dreamer4_jax.envs.vizdoom import press

    env = game("vizdoom", "ViZDoom/my_way_home", max_steps=500)
    env.reset(seed=0)
    for mouse in range(121):
        dx, dy = mu_law_mouse.decode(mouse)
        before = [env.game.get_game_variable(v) for v in (GameVariable.ANGLE, GameVariable.PITCH)]
        env.step({**press(), "mouse": mouse})
        after = [env.game.get_game_variable(v) for v in (GameVariable.ANGLE, GameVariable.PITCH)]
        turned = (before[0] - after[0] + 180) % 360 - 180  # Doom counts angles to the left
        assert turned == pytest.approx(dx, abs=0.02)
        if abs(before[1] + dy) < 20:  # its neck is stiff
            assert after[1] - before[1] == pytest.approx(dy, abs=0.02)
    env.close()


def shift(before, after, axis):
    """How many pixels the picture has moved to the right (axis 1) or down (axis 0): the one that fits best."""
    a, b = (np.moveaxis(x.astype(float).mean(-1), axis, 0)[4:-4] for x in (before, after))
    errors = {}
    for s in range(-10, 11):
        one, two = (a[: len(a) - s], b[s:]) if s >= 0 else (a[-s:], b[: len(b) + s])
        errors[s] = np.abs(one - two).mean()
    return min(errors, key=errors.get)


def test_doom_shows_the_last_turn():
    from dreamer4_jax.envs.vizdoom import press

    env = game("vizdoom", "ViZDoom/my_way_home")
    env.reset(seed=1)
    for axis, name in ((1, "dx"), (0, "dy")):
        rng = np.random.default_rng(0)
        seen = [env.reset(seed=1)[0]["image"]]
        signs = []
        for _ in range(8):
            signs.append(int(rng.choice([-1, 1])) if abs(sum(signs)) < 2 else -int(np.sign(sum(signs))))
            seen.append(env.step(press(**{name: 6.0 * signs[-1]}))[0]["image"])
        moved = [shift(*pair, axis) for pair in zip(seen[:-1], seen[1:], strict=True)]
        # To the right: the picture moves left. Downwards: the picture moves up.
        assert [int(np.sign(m)) for m in moved] == [-s for s in signs], (name, moved, signs)
    env.close()


def test_doom_leaves_nothing_behind_where_it_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    env = game("vizdoom")
    env.reset(seed=0)
    env.close()
    assert not list(tmp_path.iterdir())


def test_dooms_expert_shoots_what_is_to_be_shot():
    env = game("vizdoom", "ViZDoom/basic", max_steps=75)
    for seed in range(3):
        env.reset(seed=seed)
        expert, ended, info = env.expert(np.random.default_rng(0)), False, {}
        while not ended:
            _, _, terminated, truncated, info = env.step(expert.act())
            ended = terminated or truncated
        assert terminated and info["success"] and expert.subgoal == "shoot"
    env.close()
    other = game("vizdoom", "ViZDoom/my_way_home")
    other.reset(seed=0)
    with pytest.raises(UserError, match="no scripted expert for ViZDoom/my_way_home; there is one for ViZDoom/basic"):
        other.expert(np.random.default_rng(0))
    other.close()
