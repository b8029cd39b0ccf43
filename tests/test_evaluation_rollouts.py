"""Held-out clips: where they are cut, how they are shuffled and scored, and what is measured on them."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from dreamer4_jax.config import UserError
from dreamer4_jax.data.store import DatasetSpec, open_dataset
from dreamer4_jax.data.tokens import write_tokens
from dreamer4_jax.data.writer import write_dataset
from dreamer4_jax.envs.symbols import SymbolDecoder
from dreamer4_jax.evaluation import rollouts
from dreamer4_jax.evaluation.rollouts import HeldOut, imagine_clips, reconstruction, step_count, to_uint8
from dreamer4_jax.evaluation.summary import agent_targets, world_model_targets
from dreamer4_jax.presets import BASELINES
from dreamer4_jax.world import Dynamics, Tokenizer
from tests import small
from tests.toy_env import COMPONENT, frame_action, frame_step, toy_config, toy_episodes

NET = dict(layers=2, time_every=2, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, window=4)
FLAT = dict(NET, layers=1, time_every=0)


@cache
def config(**overrides):
    return toy_config(
        **{
            "tokenizer.channels": 2,
            "tokenizer.pack": 1,
            "tokenizer.encoder": FLAT,
            "tokenizer.decoder": FLAT,
            "dynamics": {"transformer": NET, "registers": 0, "k_max": 8},
            "data.chunk": 16,
            "evaluate.context": 2,
            "evaluate.frames": 3,
            "evaluate.clips": 6,
            **{f"train.{p}.length": 8 for p in ("tokenizer", "dynamics", "agent", "imagination")},
            **overrides,
        }
    )


def encode(frames, is_first):
    """Tokens that name their frame, so that both kinds of windows can be compared."""
    shown = np.stack([frames[..., 0, 0, 2] / 256, frame_step(frames) / 16], -1)
    return np.broadcast_to(shown[..., None, :], (*shown.shape[:-1], 4, 2))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Held-out frames in two streams, of which the second begins in the middle of nothing."""
    directory = tmp_path_factory.mktemp("data")
    spec = DatasetSpec("frames", 16, (16, 16), 3, (COMPONENT,))
    shards = {"train": [toy_episodes(10)], "holdout": [toy_episodes(12, seed=1), toy_episodes(9, seed=2)]}
    write_dataset(directory / "frames", spec, shards)
    write_tokens(directory / "frames", directory / "tokens", encode, identity="name")
    return open_dataset(directory / "frames"), open_dataset(directory / "tokens", identity="name")


def held(data, seed=0, **overrides):
    return HeldOut.sample(config(**overrides), *data, seed=seed)


def test_clips_lie_inside_one_episode_and_tokens_are_theirs(data):
    found = set()
    for seed in range(8):
        clips = held(data, seed)
        assert clips.frames.shape == (6, 5, 16, 16, 3) and clips.latents.shape == (6, 5, 4, 2)
        episode, step = clips.frames[..., 0, 0, 2].astype(int), frame_step(clips.frames)
        assert (episode == episode[:, :1]).all()
        np.testing.assert_array_equal(step, step[:, :1] + np.arange(5))
        np.testing.assert_allclose(clips.latents[..., 0, :], np.stack([episode / 256, step / 16], -1), atol=2e-3)
        # The action that led to each frame; none to the first of an episode.
        np.testing.assert_array_equal(clips.present["move"], step > 0)
        shown = np.where(step > 0, clips.actions["move"], -1)
        np.testing.assert_array_equal(shown, frame_action(clips.frames))
        clip_ids = list(zip(episode[:, 0], step[:, 0], strict=True))
        assert len(set(clip_ids)) == 6  # distinct
        same = clips.episodes[:, None] == clips.episodes
        np.testing.assert_array_equal(same, episode[:, :1] == episode[:, 0])
        found |= set(clip_ids)
    assert any(step == 0 for _, step in found) and any(step > 0 for _, step in found)
    assert {100 <= episode < 200 for episode, _ in found} == {True, False}  # of both streams
    np.testing.assert_array_equal(held(data, 3).frames, held(data, 3).frames)


def test_too_few_windows_are_named(data):
    with pytest.raises(UserError, match=r"evaluate.clips = 500: the held-out split has \d+ windows of 5 frames"):
        held(data, **{"evaluate.clips": 500})
    with pytest.raises(UserError, match="has 0 windows of 12 frames"):
        held(data, **{"evaluate.frames": 10})  # no episode of the toy environment has 12 frames


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_clips_all_get_the_actions_of_another(data, seed):
    clips = held(data)
    numbered = replace(clips, actions={"move": np.arange(30, dtype=np.int32).reshape(6, 5)})
    other = numbered.shuffled(seed)
    rows = other.actions["move"][:, 0] // 5
    assert sorted(rows) == list(range(6)) and (rows != np.arange(6)).all()
    np.testing.assert_array_equal(other.actions["move"], numbered.actions["move"][rows])
    for name in ("frames", "latents", "present", "context"):
        np.testing.assert_array_equal(
            *(jax.tree.leaves(getattr(x, name)) if name == "present" else getattr(x, name) for x in (other, numbered))
        )


def symbol_clips():
    """Three clips of frames made of decoder templates: 2 x 2 tiles, of which one changes in frame 3 and on."""
    decoder = SymbolDecoder(8)
    symbols = np.full((3, 5, 2, 2), decoder.names.index("empty"))
    symbols[:, :, 0, 0] = decoder.names.index("wall")
    symbols[:, 3:, 1, 1] = decoder.names.index("red ball")
    tiles = decoder.templates[symbols]  # [n, T, 2, 2, 8, 8, 3]
    frames = tiles.transpose(0, 1, 2, 4, 3, 5, 6).reshape(3, 5, 16, 16, 3)
    actions = {"move": np.zeros((3, 5), np.int32)}
    return HeldOut(frames, np.zeros((3, 5, 4, 2), np.float32), actions, {"move": np.ones((3, 5), bool)}, 2, decoder)


def test_scores_of_perfect_and_of_frozen_video():
    clips = symbol_clips()
    future = clips.frames[:, 2:] / 255.0
    perfect = clips.score(future).summary()["average"]
    assert perfect["symbol_accuracy"]["mean"] == perfect["changed_accuracy"]["mean"] == 1
    assert perfect["psnr"]["mean"] == 60 and perfect["ssim"]["mean"] == pytest.approx(1)
    # The future's frames 2 and 3 (of 3) have one changed tile of four: repeating the context misses 2 tiles of 12.
    assert perfect["repeat_accuracy"]["mean"] == pytest.approx(10 / 12)
    assert perfect["repeat_changed_accuracy"]["mean"] == 0 and perfect["changed_tiles"] == 6
    frozen = clips.score(np.repeat(clips.frames[:, 1:2], 3, 1) / 255.0).summary()["average"]
    assert frozen["symbol_accuracy"]["mean"] == pytest.approx(10 / 12) and frozen["changed_accuracy"]["mean"] == 0


def test_bytes_of_video():
    np.testing.assert_array_equal(to_uint8([-0.5, 0.0, 0.501, 1.0, 3.0]), [0, 0, 128, 255, 255])


@cache
def models():
    tokenizer = small.drawn(lambda key: Tokenizer(config().tokenizer, key), 1)
    return tokenizer, *(small.drawn(lambda key: Dynamics(config(), key), seed) for seed in (0, 2))


def test_reconstruction(data):
    clips = held(data)
    out = reconstruction(models()[0], clips, shown=4)
    assert set(out) == {"psnr", "ssim", "symbol_accuracy", "frames", "shown"} and out["frames"] == 30
    for name in ("psnr", "ssim", "symbol_accuracy"):
        assert out[name]["low"] <= out[name]["mean"] <= out[name]["high"]
    assert out["shown"]["real"].shape == out["shown"]["reconstructed"].shape == (4, 16, 16, 3)
    alone, unknown = (reconstruction(models()[0], replace(clips, episodes=e))["psnr"] for e in (np.arange(6), None))
    assert alone == pytest.approx(unknown)
    pairs = {f: np.repeat(getattr(clips, f)[:3], 2, 0) for f in ("frames", "latents")}
    both = [
        reconstruction(models()[0], replace(clips, **pairs, episodes=e))["psnr"] for e in ([0, 0, 1, 1, 2, 2], None)
    ]
    widths = [i["high"] - i["low"] for i in both]
    assert widths[0] > 1.2 * widths[1]
    assert out["shown"]["reconstructed"].dtype == np.uint8


def test_every_step_count_runs_the_same_program_and_the_controls_are_there(data):
    tokenizer, first, second = models()
    clips = held(data)
    before = rollouts._generate._cache_size()
    both = {"shortcut forcing": first, "diffusion forcing": second}
    out = step_count(config(), both, tokenizer, clips, finetuned=second, shown=2)
    assert rollouts._generate._cache_size() == before + 1  # for every K, the controls, and all models
    assert [m["name"] for m in out["steps"]["models"]] == ["shortcut forcing", "diffusion forcing"]
    for model in out["steps"]["models"]:
        assert [row["steps"] for row in model["rows"]] == [1, 2, 4, 8]
        assert all(row["milliseconds"] > 0 for row in model["rows"])
    assert [c["name"] for c in out["conditions"]] == [
        *(f"{m}, {a} actions" for m in ("shortcut forcing", "diffusion forcing") for a in ("true", "shuffled")),
        "after phase 2, true actions",
    ]
    assert out["conditions"][4]["average"] == out["conditions"][2]["average"]  # here it is the second model again
    assert out["steps_shown"] == rollouts.SHOWN_STEPS == 4
    shown = out["shown"]
    assert shown["context"].shape == (2, 2, 16, 16, 3) and shown["real"].shape == shown["imagined"].shape
    # What is shown is the first model's video at the control's K, beside the frames that it should be.
    np.testing.assert_array_equal(shown["real"], clips.frames[:2, 2:])
    np.testing.assert_array_equal(shown["imagined"], to_uint8(imagine_clips(first, tokenizer, clips, 4, 0))[:2])


def test_a_decoder_with_time_layers_sees_the_context():
    """The tokens after the context, decoded behind it, look as they do in the whole clip."""
    cfg = config().tokenizer
    cfg = replace(cfg, encoder=replace(cfg.encoder, **NET), decoder=replace(cfg.decoder, **NET))
    tokenizer = jax.jit(lambda key: Tokenizer(cfg, key))(jax.random.key(0))
    z = np.random.default_rng(0).uniform(-1, 1, (2, 5, cfg.tokens, cfg.token_channels)).astype(np.float32)
    clips = HeldOut(np.zeros((2, 5, 16, 16, 3), np.uint8), z, {}, {}, 2, SymbolDecoder(8))
    whole = np.asarray(tokenizer.decode(z))[:, 2:]
    np.testing.assert_allclose(rollouts._video(tokenizer, clips, z[:, 2:]), whole, atol=1e-5)
    assert np.abs(np.asarray(tokenizer.decode(z[:, 2:])) - whole).max() > 1e-3


def test_imagined_clips_depend_on_their_actions_context_and_steps(data):
    tokenizer, model, _ = models()
    clips = held(data)
    base = imagine_clips(model, tokenizer, clips, 2, 0)
    assert base.shape == (6, 3, 16, 16, 3)
    np.testing.assert_array_equal(base, imagine_clips(model, tokenizer, clips, 2, 0))
    late = {"move": clips.actions["move"].copy()}
    late["move"][:, -1] = (late["move"][:, -1] + 1) % 5
    changed = imagine_clips(model, tokenizer, replace(clips, actions=late), 2, 0)
    np.testing.assert_array_equal(base[:, :2], changed[:, :2])  # the action that leads to the last frame
    assert (base[:, 2] != changed[:, 2]).any((1, 2, 3)).all()
    assert (imagine_clips(model, tokenizer, clips, 4, 0) != base).any()
    # The frames to be imagined are not looked at.
    future = replace(clips, latents=np.concatenate([clips.latents[:, :2], 0 * clips.latents[:, 2:]], 1))
    np.testing.assert_array_equal(imagine_clips(model, tokenizer, future, 2, 0), base)


# ---------------------------------------------------------------------------------------------------------------------
# The judgement


def interval(mean, half=0.01):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def measured(**changed):
    def row(steps, accuracy, changed=0.6):
        return {
            "steps": steps,
            "symbol_accuracy": interval(accuracy),
            "repeat_accuracy": interval(0.93),
            "changed_accuracy": None if changed is None else interval(changed),
            "repeat_changed_accuracy": None if changed is None else interval(0.1),
        }

    return {
        "reconstruction": {"symbol_accuracy": interval(0.995), "psnr": interval(40.0)},
        "steps_shown": 4,
        "steps": {
            "models": [
                {"name": "shortcut forcing", "rows": [row(1, 0.9), row(4, 0.97), row(16, 0.975)]},
                *({"name": b.title, "rows": [row(1, 0.5), row(4, 0.9), row(16, 0.97)]} for b in BASELINES.values()),
            ]
        },
        "conditions": [{"average": row(4, 0.97)}, {"average": row(4, 0.9, 0.2)}],
        **changed,
    }


def verdicts(targets):
    return [t["passed"] for t in targets]


def test_targets_of_the_world_model():
    assert verdicts(world_model_targets(measured())) == [True] * 8
    bad = measured(reconstruction={"symbol_accuracy": interval(0.98), "psnr": interval(31.9)})
    assert verdicts(world_model_targets(bad)) == [False, False] + [True] * 6
    slow = measured()
    slow["steps"]["models"][0]["rows"][1]["symbol_accuracy"] = interval(0.96)  # K = 4 loses 1.5 points to K = 16
    assert verdicts(world_model_targets(slow)) == [True] * 5 + [False, True, True]
    assert world_model_targets(slow)[5]["value"] == "1.50 points lower"
    slow["steps"]["models"][0]["rows"][1]["symbol_accuracy"] = interval(0.98)
    assert world_model_targets(slow)[5]["value"] == "0.50 points higher"
    blind = measured()
    blind["conditions"][1] = blind["conditions"][0]  # shuffled actions cost nothing
    assert verdicts(world_model_targets(blind)) == [True] * 4 + [False, True, True, True]
    without = measured()
    for found in without["steps"]["models"][1:]:  # neither baseline is worse
        found["rows"] = without["steps"]["models"][0]["rows"]
    assert verdicts(world_model_targets(without)) == [True] * 6 + [False, False]


def test_phase_2_must_not_spoil_the_world_model():
    kept, spoiled = measured(), measured()
    kept["conditions"].append({"name": rollouts.FINETUNED, "average": kept["conditions"][0]["average"]})
    worse = spoiled["conditions"][0]["average"] | {"changed_accuracy": interval(0.3)}
    spoiled["conditions"].append({"name": rollouts.FINETUNED, "average": worse})
    assert verdicts(world_model_targets(kept)) == [True] * 9
    assert verdicts(world_model_targets(spoiled)) == [True] * 6 + [False, True, True]


def test_targets_where_no_tile_changed_are_not_met_instead_of_a_crash():
    still = measured()
    for rows in (still["steps"]["models"][0]["rows"], [c["average"] for c in still["conditions"]]):
        for row in rows:
            row["changed_accuracy"] = row["repeat_changed_accuracy"] = None
    assert verdicts(world_model_targets(still)) == [True, True, True, False, False, True, True, True]


def test_targets_of_the_agent_want_intervals_apart():
    class Played:
        def __init__(self, policy, success):
            self.policy, self._success = policy, interval(success, 0.05)

        def summary(self):
            return {"success": self._success}

    played = [Played("random", 0.1), Played("blind", 0.3), Played("phase 2 (cloning)", 0.5)]
    apart = agent_targets([*played, Played("phase 3 (imagination)", 0.65)])
    assert len(apart) == 5 and verdicts(apart) == [True] * 5
    near = agent_targets([*played, Played("phase 3 (imagination)", 0.58)])
    assert verdicts(near) == [False, True, True, True, True]
    assert verdicts(agent_targets(played)) == [True, True]
