"""An experiment from recording to report, at the smallest size that goes through every stage."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from dreamer4_jax import cli, runner
from dreamer4_jax.agent import model as agent_model
from dreamer4_jax.config import Config, UserError, override, preset
from dreamer4_jax.data.schema import DataError
from dreamer4_jax.evaluation import rollouts
from dreamer4_jax.inference import load_phase
from dreamer4_jax.presets import BASELINES
from dreamer4_jax.runner import Run
from dreamer4_jax.stages import NEEDS, PHASES
from dreamer4_jax.training import CheckpointError, loop, read_metrics, state
from dreamer4_jax.training.checkpoint import checksum
from tests.toy_env import toy_config, write_toy_dataset

POLICIES = (
    "random",
    "data",
    "blind",
    "phase 2 (cloning)",
    "phase 2, greedy",
    "phase 3 (imagination)",
    "phase 3, greedy",
)
NET = dict(layers=2, time_every=2, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, window=4)
FLAT = dict(NET, layers=1, time_every=0)
PHASE = {"steps": 2, "batch": 4, "length": 4, "warmup": 1, "log_every": 1}


def micro(**overrides) -> Config:
    """Two levels, some hundred frames, two steps a phase."""
    return preset(
        "tiny",
        **{
            "name": "micro",
            "env.levels": "BabyAI-GoToObj-v0,BabyAI-GoToLocal-v0",
            "env.max_steps": 24,
            "data.frames": 640,
            "data.chunk": 16,
            "data.chunks_per_shard": 8,
            "data.holdout": 0.2,
            "data.bot": 0.8,
            "data.noisy_bot": 0.2,
            "data.workers": 1,
            "tokenizer.channels": 2,
            "tokenizer.encoder": FLAT,
            "tokenizer.decoder": FLAT,
            "dynamics": {"transformer": NET, "registers": 0, "k_max": 2},
            "agent.hidden": 8,
            "agent.bins": 7,
            "agent.mtp": 1,
            "agent.context": 3,
            "agent.horizon": 2,
            "agent.sample_steps": 2,
            **{f"train.{p}": PHASE for p in PHASES},
            "train.agent.length": 8,  # windows that show how a reward was earned
            "train.imagination.length": 8,
            "evaluate.episodes": 4,
            "evaluate.envs": 4,
            "evaluate.clips": 4,
            "evaluate.context": 2,
            "evaluate.frames": 4,
            **overrides,
        },
    )


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Steps compiled without optimisation, and a blind policy of a few steps: nothing here is about speed or skill."""

    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

    def make_train_step(phase, optimizer, shardings):
        return jax.jit(
            state.make_train_step(phase, optimizer, shardings).__wrapped__, donate_argnums=0, compiler_options=options
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", make_train_step)
        for module, name, fixed in (
            (rollouts, "_generate", {}),
            (agent_model, "_act", {"static_argnames": "greedy", "donate_argnums": 3}),
        ):
            plain = getattr(module, name).__wrapped__
            patch.setattr(module, name, jax.jit(plain, compiler_options=options, **fixed))
        train = runner.train_blind
        patch.setattr(runner, "train_blind", lambda *args, **kwargs: train(*args, **{**kwargs, "steps": 20}))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(run directory, what `all` returned)."""
    directory = tmp_path_factory.mktemp("runs") / "micro"
    return directory, Run(micro(), directory, progress=False).all()


def files(directory: Path, *, but: tuple[str, ...] = ()) -> dict[str, int]:
    """Modification times of the files of a run."""
    found = (p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in found if p.name not in but}


def test_variants_are_trained_on_the_same_tokens(finished, tmp_path):
    directory, _ = finished
    shutil.copytree(directory, tmp_path / "run")
    run = Run.reopen(tmp_path / "run")
    other = run.variant("velocity", {"dynamics.prediction": "v", "train.dynamics.steps": 3})
    assert other.cfg.dynamics.prediction == "v" and run.config.dynamics.prediction == "x"
    assert {row["step"] for row in read_metrics(run.dir) if row["phase"] == "velocity"} == {1, 2, 3}
    before = files(run.dir / "checkpoints")
    again = Run.reopen(run.dir).variant("velocity", {"dynamics.prediction": "v", "train.dynamics.steps": 3})
    assert checksum(again) == checksum(other) and files(run.dir / "checkpoints") == before, (
        "a finished one is read, not trained again"
    )
    with pytest.raises(UserError, match="another config"):
        Run.reopen(run.dir).variant("velocity", {"dynamics.ramp": "none"})
    for name, fields, match in (
        ("coarse", {"tokenizer.pack": 2}, "tokenizer.pack is none of"),
        ("agent", {"dynamics.ramp": "none"}, "is a phase of the run"),
    ):
        with pytest.raises(UserError, match=match):
            run.variant(name, fields)


def test_a_run_goes_from_recording_to_report(finished):
    directory, data = finished
    for name in ("config.json", "metrics.jsonl", "report.html", "results.json", "stages.json"):
        assert (directory / name).stat().st_size > 0, name
    assert json.loads((directory / "config.json").read_text())["name"] == "micro"
    # A decision is compiled once for sampling and once for the mode, whichever policy makes it.
    assert agent_model._act._cache_size() == 2 and rollouts._generate._cache_size() == 1
    assert {line["phase"] for line in read_metrics(directory)} == set(PHASES)
    # The world model: reconstructions, every K, and what shuffled actions cost (peer mistake 15).
    assert {"psnr", "ssim", "symbol_accuracy"} <= set(data["reconstruction"])
    assert [row["steps"] for row in data["steps"]["models"][0]["rows"]] == [1, 2]
    names = [c["name"] for c in data["world_model"]["conditions"]]
    assert names == [*(f"shortcut forcing, {a} actions" for a in ("true", "shuffled")), "after phase 2, true actions"]
    # The policies: a blind one beside the agents (15), each agent sampled and greedy (16), on the same episodes.
    results = data["closed_loop"]["results"]
    assert tuple(r.policy for r in results) == POLICIES
    for r in results:
        assert r.episodes == 4 and set(r.levels) == {"BabyAI-GoToObj-v0", "BabyAI-GoToLocal-v0"}
        np.testing.assert_array_equal(r.seeds, results[0].seeds)
        assert (r.lengths <= 24).all() and ((r.returns > 0) == r.success).all()
    stored = json.loads((directory / "results.json").read_text())
    for r in results:
        assert r.policy in json.dumps(stored)
    # Every target has a verdict, and every stage and phase its cost.
    assert all(isinstance(t["passed"], bool) for t in data["targets"]) and len(data["targets"]) == 12
    assert {p["name"] for p in data["phases"]} >= {*PHASES, "collect", "tokens", "evaluate", "evaluate_world_model"}
    page = (directory / "report.html").read_text()
    for text in (*POLICIES[2:4], "shuffled actions", "BabyAI-GoToLocal-v0"):
        assert text in page


def test_what_is_kept_of_a_run_is_what_its_report_says(finished, tmp_path):
    directory, data = finished
    assert cli.main(["report", str(directory), "--keep", str(tmp_path / "kept")]) == 0
    kept = json.loads((tmp_path / "kept" / "seed0.json").read_text())
    assert kept["targets"] == data["targets"] and kept["name"] == "micro"
    results = data["closed_loop"]["results"]
    assert [(p["policy"], p["return"]["mean"]) for p in kept["policies"]] == [
        (r.policy, pytest.approx(r.returns.mean())) for r in results
    ]
    with Image.open(tmp_path / "kept" / "seed0.png") as strip, Image.open(tmp_path / "kept" / "seed0.webp") as video:
        assert strip.width > strip.height and video.n_frames > 1


def test_running_again_does_nothing_again(finished):
    directory, data = finished
    rewritten = ("report.html", "results.json", "stages.json")
    before = files(directory, but=rewritten)
    again = Run(micro(), directory, resume=True, progress=False).all()
    after = files(directory, but=rewritten)
    data_files = {n for n in before if n.startswith("data/") and not n.endswith("array_record")}
    changed = {n for n in after if before.get(n) != after[n]} - data_files
    assert not {n for n in changed if n.startswith(("checkpoints", "evaluation", "metrics", "config"))}, changed
    assert not {n for n in changed if "array_record-" in n}, changed
    for a, b in zip(data["closed_loop"]["results"], again["closed_loop"]["results"], strict=True):
        assert a.to_json() == b.to_json()
    # And a stage of a reopened run reads what was measured.
    run = Run(micro(), directory, resume=True, progress=False)
    assert run.evaluate_policy("random").to_json() == data["closed_loop"]["results"][0].to_json()


def test_a_directory_in_use_or_of_another_config_is_refused_and_left_alone(finished):
    directory, _ = finished
    before = files(directory)
    with pytest.raises(UserError, match="holds a run already; add --resume"):
        Run(micro(), directory)
    with pytest.raises(UserError, match="another config: dynamics.k_max is 2 there and 4 here"):
        Run(micro(**{"dynamics.k_max": 4}), directory, resume=True)
    assert files(directory) == before


def test_phases_share_what_they_are_built_on(finished):
    run = Run(micro(), finished[0], resume=True, progress=False)
    tokens = run.tokens()
    assert tokens.manifest["tokenizer"] == checksum(run.model("tokenizer"))
    # Phase 3 began with the policy of phase 2 and left everything else to it.
    assert checksum(run.model("imagination").policy) != checksum(run.model("agent").policy)
    play = run.policies()["phase 3, greedy"]()
    assert play.name == "phase 3, greedy"
    for mine, theirs in zip(play._models, (run.model("tokenizer"), run.model("agent").dynamics), strict=False):
        assert checksum(mine) == checksum(theirs)
    assert checksum(play._models[2]) == checksum(run.model("imagination").policy)
    assert checksum(run.policies()["phase 2 (cloning)"]()._models[2]) == checksum(run.model("agent").policy)


def test_a_phase_without_its_predecessor_says_so_before_any_work(tmp_path):
    run = Run(micro(), tmp_path / "run", progress=False)
    before = files(tmp_path)
    for name, needs in NEEDS.items():
        with pytest.raises(CheckpointError, match=f"phase '{needs[0]}' is not finished in this run; train it first"):
            run.train(name)
    with pytest.raises(CheckpointError, match="'tokenizer' is not finished"):
        run.evaluate_world_model()
    with pytest.raises(UserError, match="unknown phase 'dreaming'"):
        run.train("dreaming")
    assert files(tmp_path) == before  # nothing was recorded


def test_a_given_dataset_is_checked_first_and_found_again(tmp_path):
    write_toy_dataset(tmp_path / "toy")
    with pytest.raises(DataError, match="16 x 16, the config wants tokenizer.height x tokenizer.width = 64 x 64"):
        Run(micro(), tmp_path / "run", data_dir=tmp_path / "toy")
    assert not (tmp_path / "run").exists()
    fitting = toy_config(**{"agent.context": 3})
    first = Run(fitting, tmp_path / "run", data_dir=tmp_path / "toy", progress=False)
    assert first.collect().directory == tmp_path / "toy"
    # Later commands need not name it, but must not name another.
    again = Run(fitting, tmp_path / "run", resume=True, progress=False)
    assert again.collect().directory == tmp_path / "toy" and not (tmp_path / "run" / "data").exists()
    write_toy_dataset(tmp_path / "other", episodes=20)
    with pytest.raises(UserError, match="was made with .*toy; use that"):
        Run(fitting, tmp_path / "run", resume=True, data_dir=tmp_path / "other")


def test_a_run_with_its_own_recording_takes_no_other(finished, tmp_path):
    own = finished[0] / "data" / "frames"
    shutil.copytree(own, tmp_path / "copy")
    with pytest.raises(UserError, match="has its own recording"):
        Run(micro(), finished[0], resume=True, data_dir=tmp_path / "copy")
    assert Run(micro(), finished[0], resume=True, data_dir=own, progress=False).raw_dir == own


def test_levels_that_do_not_exist_are_found_before_the_directory_is_made(tmp_path):
    with pytest.raises(UserError, match="BabyAI-Nowhere-v0"):
        Run(micro(**{"env.levels": "BabyAI-Nowhere-v0"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_checksum_is_of_every_weight():
    tree = {"a": np.arange(4.0), "b": np.zeros(2)}
    moved = {"a": np.arange(4.0), "b": np.asarray([0.0, 1e-7])}
    renamed = {"a": np.arange(4.0), "c": np.zeros(2)}
    assert checksum(tree) == checksum(jax.tree.map(np.array, tree))
    assert len({checksum(t) for t in (tree, moved, renamed)}) == 3


def test_baselines_are_trained_beside_the_run_and_measured_with_it(finished, tmp_path):
    directory, _ = finished
    shutil.copytree(directory, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    run = Run.reopen(tmp_path / "run")
    predicted = {"diffusion": ("x", "x"), "diffusion_v": ("v", "v")}
    assert set(BASELINES) == set(predicted)
    for name, (prediction, loss_space) in predicted.items():
        model = run.train(name)
        fields = {"objective": "diffusion", "prediction": prediction, "loss_space": loss_space}
        assert model.cfg.dynamics == dataclasses.replace(run.config.dynamics, **fields)
        assert checksum(load_phase(run.dir, run.config, name)) == checksum(model)
    run.config = override(run.config, {"evaluate.diffusion_baseline": True})
    measured = [m["name"] for m in run.evaluate_world_model()["steps"]["models"]]
    assert measured == ["shortcut forcing", *(b.title for b in BASELINES.values())]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"evaluate.frames": 13, "env.max_steps": 12}, "the held-out split has 0 windows of 15 frames"),
        ({"train.agent.length": 1}, "no window of 1 frames earns a reward"),
    ],
)
def test_what_the_last_stages_need_is_asked_for_before_the_first_is_trained(tmp_path, fields, match):
    run = Run(micro(**fields), tmp_path / "run", progress=False)
    with pytest.raises(UserError, match=match):
        run.all()
    assert (run.dir / "data").exists() and not (run.dir / "checkpoints").exists()


def test_the_command_line_knows_every_phase():
    assert cli.PHASES == PHASES and set(cli.BASELINES) == set(BASELINES)
