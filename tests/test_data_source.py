"""Training on data of one's own: what the source decides, what is skipped for want of labels, and tokens made ahead."""

import json
import subprocess

import numpy as np
import pytest

from dreamer4_jax import cli
from dreamer4_jax.config import ConfigError, UserError
from dreamer4_jax.data.convert import convert
from dreamer4_jax.data.schema import DataError
from dreamer4_jax.data.source import adopt, missing_labels
from dreamer4_jax.data.store import open_dataset
from dreamer4_jax.evaluation.rollouts import HeldOut
from dreamer4_jax.runner import Run
from dreamer4_jax.training.checkpoint import checksum
from tests.sources import play, write_labelled_videos, write_video
from tests.test_runner import micro, quick  # noqa: F401  # quick: steps compiled without optimisation
from tests.toy_env import write_toy_dataset


def moving_squares(count: int = 6, frames: int = 60):
    """Plain videos of a square that crosses the picture."""
    out = []
    for i in range(count):
        video = np.full((frames, 48, 64, 3), 30 * i, np.uint8)
        for t in range(frames):
            x = (3 * t + 7 * i) % 52
            video[t, 16:28, x : x + 12] = (250, 200, 40)
        out.append(video)
    return out


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "my game"
    for i, video in enumerate(moving_squares()):
        write_video(path / f"{i}.mp4", video)
    (path / "broken.mp4").write_bytes(b"nothing")
    return path


def own(source, **overrides):
    return adopt(micro(**{"data.source": str(source), "data.holdout": 0.2, **overrides}))


def test_the_source_decides_actions_tasks_and_name(videos, tmp_path):
    c = own(videos)
    assert [part.name for part in c.actions] == ["none"] and c.env.kind == "none" and c.env.levels == ()
    assert c.name == "micro-my_game" and c.agent.task_words == 1 and c.data.source == str(videos)
    write_labelled_videos(tmp_path / "labelled", play(3), "jsonl")
    c = own(tmp_path / "labelled")
    assert [(p.name, p.kind, p.size) for p in c.actions] == [("action", "categorical", 5)]
    convert(tmp_path / "labelled", tmp_path / "data", size=(64, 64), chunk=8, workers=1, progress=False)
    assert own(tmp_path / "data").actions == c.actions  # the same, converted before
    for source, message in ((tmp_path / "nowhere", "does not exist"), (tmp_path / "data/features.json", "no format")):
        with pytest.raises(DataError, match=message):
            own(source)


@pytest.fixture(scope="module")
def finished(videos, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "own"
    return directory, Run(own(videos), directory, progress=False).all()


@pytest.mark.slow
def test_plain_videos_become_a_world_model(finished, capsys):
    directory, data = finished
    assert (directory / "checkpoints/dynamics/model").is_dir() and not (directory / "checkpoints/agent").exists()
    names = [c["name"] for c in data["world_model"]["conditions"]]
    assert names == ["shortcut forcing, true actions", "the last frame repeated"]  # no actions that could be shuffled
    page = (directory / "report.html").read_text()
    for text in (
        "Phases 2 and 3 are skipped: the data has no actions and no rewards above 0",
        "1 episodes of the source were left out, the first because broken.mp4",
        "the last frame repeated",
        "image/webp",
    ):
        assert text in page
    assert "Symbols %" not in page and "symbol_accuracy" not in data["reconstruction"]
    run = Run(own(json.loads((directory / "config.json").read_text())["data"]["source"]), directory, resume=True)
    assert run.policies() == {}
    with pytest.raises(UserError, match="there is no environment to play in"):
        run.make_env("anything")
    run.generate(directory / "clip.webp", steps=1, clips=2)
    assert (directory / "clip.webp").stat().st_size > 0


def test_repeating_the_last_frame_is_scored_as_what_it_is():
    frames = np.random.default_rng(0).integers(0, 256, (4, 5, 16, 16, 3)).astype(np.uint8)
    held = HeldOut(frames, np.zeros((4, 5, 1, 1), np.float32), {}, {}, 2, None)
    last, after = frames[:, 1].astype(np.float64), frames[:, 2].astype(np.float64)
    want = 10 * np.log10(255**2 / ((last - after) ** 2).mean((1, 2, 3)))
    repeated = held.score(held.repeated()).summary()
    np.testing.assert_allclose(repeated["horizons"][0]["psnr"]["mean"], want.mean(), rtol=1e-3)
    assert not held.labelled and "symbol_accuracy" not in repeated["average"]


def test_what_is_missing_is_said(tmp_path):
    write_labelled_videos(tmp_path / "actions", play(8), "npy")  # actions, no rewards
    write_labelled_videos(tmp_path / "both", play(8), "jsonl")
    for name, want in (("actions", "the data has no rewards above 0"), ("both", "")):
        convert(tmp_path / name, tmp_path / f"{name}-data", size=(16, 16), chunk=8, workers=1, progress=False)
        assert missing_labels(open_dataset(tmp_path / f"{name}-data")) == want


def test_a_source_too_small_to_be_evaluated_is_refused_before_training(tmp_path):
    for i, video in enumerate(moving_squares(2, 24)):
        write_video(tmp_path / f"few/{i}.mp4", video)
    run = Run(own(tmp_path / "few", **{"evaluate.clips": 40}), tmp_path / "run", progress=False)
    with pytest.raises(UserError, match="evaluate.clips = 40: the held-out split has 11 windows"):
        run.all()
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_dataset_that_does_not_fit_is_refused(tmp_path):
    write_toy_dataset(tmp_path / "toy")
    c = own(tmp_path / "toy")
    with pytest.raises(DataError, match="frames of 16 x 16, the config wants"):
        Run(c, tmp_path / "run", progress=False)
    with pytest.raises(UserError, match="give one of them"):
        Run(c, tmp_path / "run", data_dir=tmp_path / "toy", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_command_line_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["run", "quickstart", f"data.source={tmp_path}/empty"], "is empty"),
        (["data", "convert", f"{tmp_path}/empty", f"{tmp_path}/out"], "is empty"),
        (["data", "convert", f"{tmp_path}/empty", f"{tmp_path}/out", "--size", "big"], "--size 'big'"),
        (["data", "inspect", f"{tmp_path}/empty"], "no dataset"),
        (["data", "tokenize", f"{tmp_path}/empty", f"{tmp_path}/empty", "--out", f"{tmp_path}/out"], "no checkpoint"),
    ):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


@pytest.mark.slow
def test_tokens_are_made_ahead_and_belong_to_their_tokenizer(finished, tmp_path, capsys):
    directory, _ = finished
    frames, tokens = directory / "data/frames", tmp_path / "tokens"
    assert cli.main(["data", "tokenize", str(directory), str(frames), "--out", str(tokens), "--quiet"]) == 0
    mine, made = open_dataset(directory / "data/tokens"), open_dataset(tokens)
    assert mine.manifest["splits"] == made.manifest["splits"]  # what the run itself made, bit for bit
    model = directory / "checkpoints/tokenizer/model"
    assert (
        cli.main(["data", "tokenize", str(model), str(frames), "--out", str(tokens), "--quiet"]) == 0
    )  # as a checkpoint
    assert cli.main(["data", "tokenize", str(model), str(frames)]) == 2
    dynamics = directory / "checkpoints/dynamics/model"
    assert cli.main(["data", "tokenize", str(dynamics), str(frames), "--out", str(tokens)]) == 2
    assert "holds the model of phase 'dynamics'" in capsys.readouterr().err
    # A run whose tokenizer is another does not take them.
    source = json.loads((directory / "config.json").read_text())["data"]["source"]
    other = Run(own(source, seed=1), tmp_path / "other", progress=False)
    other.train("tokenizer")
    assert checksum(other.model("tokenizer")) != made.manifest["tokenizer"]
    subprocess.run(["cp", "-r", str(tokens), str(tmp_path / "other/data/tokens")], check=True)
    with pytest.raises(DataError, match="holds a dataset of another config .*tokenizer is '.*' there"):
        other.train("dynamics")


def test_no_levels_are_needed_only_without_an_environment():
    with pytest.raises(ConfigError, match="needs at least one level"):
        micro(**{"env.levels": []})
    assert micro(**{"env.levels": [], "env.kind": "none"}).env.levels == ()
