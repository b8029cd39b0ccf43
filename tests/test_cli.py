"""The command line: bad input ends with one line and exit code 2, before anything is compiled or written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dreamer4_jax import cli, stages
from dreamer4_jax.cli import main, parser, resolve
from dreamer4_jax.config import preset, to_dict
from dreamer4_jax.training.loop import model_path
from tests.toy_env import write_toy_dataset

COMMANDS = ("run", "collect", "train", "evaluate", "generate", "report", "bench", "export")
# A world of 16 x 16 pixels over the toy dataset's actions and tasks.
TOY = [
    'actions=[{"name": "move", "kind": "categorical", "size": 5}]',
    "tokenizer.height=16",
    "tokenizer.width=16",
    "tokenizer.latents=4",
    "agent.task_words=3",
    "data.workers=1",
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory, where a run would make runs/; whoever begins to work in it has failed."""
    monkeypatch.chdir(tmp_path)
    for work in ("run_phase", "collect", "write_tokens"):
        monkeypatch.setattr(stages, work, lambda *args, work=work, **kwargs: pytest.fail(f"{work} was reached"))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def refused(capsys, directory, *argv, match: tuple[str, ...] = ()) -> str:
    """Runs a command that must be refused: exit code 2, one line on stderr, no file made, changed or removed."""
    before = contents(directory)
    capsys.readouterr()
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dreamer4: ") and err.count("\n") == 1, err
    for text in match:
        assert text in err, err
    assert contents(directory) == before
    return err


# ---------------------------------------------------------------------------------------------------------------------
# What is written is understood


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert command in capsys.readouterr().out


def test_the_help_names_every_command_and_needs_no_jax(tmp_path):
    script = (
        "import sys; from dreamer4_jax.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: code = end.code\n"
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, env={**os.environ}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    "argv",
    [
        ["run", "tiny", "dynamics.k_max=8", "--seed", "3"],
        ["run", "tiny", "--seed", "3", "dynamics.k_max=8"],
        ["run", "tiny", "--seed=3", "--dynamics.k_max=8"],
        ["run", "--seed", "3", "tiny", "dynamics.k_max=8"],
        ["train", "dynamics", "--experiment", "tiny", "--seed", "3", "--resume", "dynamics.k_max=8"],
    ],
)
def test_overrides_stand_anywhere(argv, monkeypatch):
    seen = []

    def keep(args):
        seen.append(resolve(args.experiment, args.size, args.seed, args.overrides))

    monkeypatch.setattr(cli, "_cmd_run", keep)
    monkeypatch.setattr(cli, "_cmd_train", keep)
    assert main(argv) == 0
    assert seen[0].dynamics.k_max == 8 and seen[0].seed == 3 and seen[0].name == "tiny"


def test_sizes_of_an_experiment():
    names = {size: resolve("quickstart", size, 1, []).name for size in ("smoke", "quick", "full")}
    assert len(set(names.values())) == 3
    smoke, quick = (resolve("quickstart", size, 1, []) for size in ("smoke", "quick"))
    assert smoke.data.frames < quick.data.frames and smoke.seed == 1
    assert parser().parse_args(["run", "quickstart", "--smoke"]).size == "smoke"
    assert resolve("quickstart", "quick", 0, ["env.levels=BabyAI-OpenDoor-v0"]).env.levels == ("BabyAI-OpenDoor-v0",)


@pytest.mark.parametrize("argv", [["run", "tiny", "--nonsense"], ["train", "dreams"], ["dance"], [], ["evaluate"]])
def test_what_argparse_refuses_exits_with_2_too(argv, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2 and "error:" in capsys.readouterr().err and contents(tmp_path) == {}


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["quickstrat"], ("unknown experiment or preset 'quickstrat'", "quickstart", "tiny")),
        (["tiny", "dynamics.kmax=8"], ("unknown config field 'dynamics.kmax'", "did you mean 'k_max'?")),
        (["tiny", "nonsense.k_max=8"], ("unknown config field 'nonsense'",)),
        (["tiny", "--sed=8"], ("unknown config field 'sed'",)),
        (["tiny", "dynamics.k_max=many"], ("dynamics.k_max = 'many'", "int")),
        (["tiny", "dynamics.k_max"], ("override 'dynamics.k_max'", "field=value")),
        (["tiny", "dynamics.k_max=12"], ("dynamics.k_max = 12", "power of two")),
        (["tiny", "dynamics.transformer.kv_heads=3"], ("dynamics.transformer.heads = 4", "multiple of")),
        (["tiny", "tokenizer.height=60"], ("tokenizer.height = 60", "multiple of tokenizer.patch = 8")),
        (["tiny", "dynamics.objective=magic"], ("dynamics.objective = 'magic'", "'shortcut'", "'diffusion'")),
        (["tiny", "--smoke"], ("--smoke", "preset 'tiny' has one size")),
        (["tiny", "--seed", "-1"], ("seed = -1",)),
        (["tiny", "env.levels=BabyAI-Nowhere-v0"], ("BabyAI-Nowhere-v0",)),
        (["tiny", "env.tile=16"], ("tile", "64")),
        (["tiny", "agent.task_vocab=5"], ("agent.task_vocab = 5", "at least")),
    ],
)
def test_a_bad_config_is_one_line(argv, match, capsys, tmp_path):
    refused(capsys, tmp_path, "run", *argv, "--run", str(tmp_path / "run"), match=match)
    assert not (tmp_path / "run").exists()


def test_collect_refuses_before_it_makes_the_directory(capsys, tmp_path):
    out = str(tmp_path / "data")
    refused(capsys, tmp_path, "collect", "tiny", "--out", out, *TOY, match=("actions", "size 7"))
    refused(capsys, tmp_path, "collect", "huge", "--out", out, match=("unknown environment 'huge'", "quickstart, tiny"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(capsys, tmp_path, "collect", "tiny", "--out", str(tmp_path / "mine"), match=("mine is not empty",))
    assert not (tmp_path / "data").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Data


@pytest.fixture
def toy(tmp_path):
    write_toy_dataset(tmp_path / "toy")
    return tmp_path / "toy"


def given(toy, *overrides):
    return ("run", "tiny", "--data", str(toy), "--run", "made", *overrides)


def test_a_dataset_that_does_not_fit(capsys, tmp_path, toy):
    refused(capsys, tmp_path, *given(toy), match=("holds frames of 16 x 16", "tokenizer.height", "64 x 64"))
    refused(capsys, tmp_path, *given(toy, *TOY[1:]), match=("action space move: categorical(5)", "categorical(7)"))
    refused(capsys, tmp_path, *given(toy, *TOY[:4]), match=("tasks of 3 words", "agent.task_words = 12"))
    refused(capsys, tmp_path, *given(tmp_path / "nowhere", *TOY), match=("nowhere", "does not exist"))
    assert not Path("made").exists()


def test_a_damaged_dataset_is_named(capsys, tmp_path, toy):
    shard = sorted(toy.glob("dreamer4-*array_record-*"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(capsys, tmp_path, *given(toy, *TOY), match=(f"shard {shard} is truncated",))
    shard.write_bytes(whole[:-9] + b"something")
    refused(capsys, tmp_path, *given(toy, *TOY), match=(f"shard {shard} is damaged",))
    shard.unlink()
    refused(capsys, tmp_path, *given(toy, *TOY), match=(f"shard {shard} is missing",))
    (toy / "dataset.json").write_text("{}")
    refused(capsys, tmp_path, *given(toy, *TOY), match=("dataset.json is damaged",))
    assert not Path("made").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def run(tmp_path):
    """A run directory of the tiny preset in which nothing has been trained."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(to_dict(preset("tiny"))))
    (directory / "metrics.jsonl").write_text('{"step": 1, "phase": "tokenizer", "loss": 0.5}\n')
    return directory


def test_a_run_directory_in_use_or_of_another_config(capsys, tmp_path, run):
    refused(capsys, tmp_path, "run", "tiny", "--run", str(run), match=("holds a run already; add --resume",))
    other = ("run", "tiny", "dynamics.k_max=8", "--run", str(run))
    named = ("belongs to another config: dynamics.k_max is 16 there and 8 here",)
    refused(capsys, tmp_path, *other, "--resume", match=named)
    refused(capsys, tmp_path, *other, match=named)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    refused(capsys, tmp_path, "run", "tiny", "--run", str(foreign), match=("not empty, and no run",))
    refused(capsys, tmp_path, "run", "tiny", "--run", str(foreign / "thesis.txt"), match=("is a file",))
    (run / "config.json").write_text("{ damaged")
    refused(capsys, tmp_path, "run", "tiny", "--run", str(run), "--resume", match=("config.json: damaged",))


def test_a_missing_checkpoint_is_named_before_any_work(capsys, tmp_path, run):
    fresh = ("train", "agent", "--experiment", "tiny", "--run", "new")
    refused(capsys, tmp_path, *fresh, match=("phase 'tokenizer' is not finished in this run; train it first",))
    assert not Path("new").exists()
    model_path(run, "tokenizer").mkdir(parents=True)
    agent = ("train", "agent", "--experiment", "tiny", "--run", str(run), "--resume")
    refused(capsys, tmp_path, *agent, match=("phase 'dynamics' is not finished",))
    model_path(run, "tokenizer").rmdir()
    for command in (["evaluate", str(run)], ["evaluate", str(run), "--policy", "phase 2 (cloning)"],
                    ["generate", str(run)]):  # fmt: skip
        refused(capsys, tmp_path, *command, match=("phase", "is not finished in this run; train it first"))


def test_a_damaged_checkpoint_is_named(capsys, tmp_path, run):
    from dreamer4_jax.training import save_model

    weights = {"w": np.ones(4, np.float32)}
    save_model(model_path(run, "tokenizer"), weights, {"config": to_dict(preset("tiny")), "step": 3})
    generate = ("generate", str(run))
    refused(capsys, tmp_path, *generate, match=("model/3 holds another model", "array"))
    stored = sorted(model_path(run, "tokenizer").rglob("d/*")) or sorted(
        model_path(run, "tokenizer").rglob("ocdbt*/**/*")
    )
    damaged = max((p for p in stored if p.is_file()), key=lambda p: p.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:5])
    refused(capsys, tmp_path, *generate, match=("model/3 is damaged", str(damaged)))


def test_bad_arguments_of_evaluate_and_generate(capsys, tmp_path, run):
    name = ("unknown policy 'god'", "'random'", "'blind'", "'phase 3, greedy'")
    refused(capsys, tmp_path, "evaluate", str(run), "--policy", "god", match=name)
    refused(capsys, tmp_path, "evaluate", str(run), "--episodes", "5", match=("--episodes is of --env minerl",))
    for steps in ("3", "0", "-4", "32"):
        refused(capsys, tmp_path, "generate", str(run), "--steps", steps,
                match=(f"--steps {steps}: must be a power of two up to dynamics.k_max = 16",))  # fmt: skip
    for command in ("evaluate", "generate", "report"):
        refused(capsys, tmp_path, command, str(tmp_path / "none"), match=("is no run directory",))
    tree = {**to_dict(preset("tiny")), "colour": "red"}
    (run / "config.json").write_text(json.dumps(tree))
    refused(capsys, tmp_path, "report", str(run), match=("unknown config field 'colour'",))


def test_what_is_not_finished_is_not_kept(capsys, tmp_path, run):
    out = str(tmp_path / "kept")
    refused(capsys, tmp_path, "report", str(run), "--keep", out, match=("has not been evaluated",))
    refused(capsys, tmp_path, "report", "experiments", "--keep", out, match=("is for a run",))
    assert not (tmp_path / "kept").exists()


def test_a_report_of_an_unfinished_run(capsys, run):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert "<html" in (run / "report.html").read_text() and (run / "results.json").exists()


def test_an_interruption_that_was_saved_exits_with_42(monkeypatch, capsys):
    from dreamer4_jax.training import Interrupted

    def stop(args):
        raise Interrupted("dynamics", 7, Path("checkpoints/7"))

    monkeypatch.setattr(cli, "_cmd_run", stop)
    assert main(["run", "tiny"]) == 42
    assert "interrupted after step 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "RUN"],
        ["generate", "RUN"],
        ["report", "RUN"],
        ["play", "RUN"],
        ["export", "RUN", "--out", "OUT"],
        ["data", "tokenize", "RUN", "DATA"],
        ["bench", "--out", "OUT"],
    ],
)
def test_commands_of_one_process_do_not_look_for_a_tpu_that_is_not_there(argv, tmp_path, monkeypatch, capsys):
    """Where the TPU compiler is installed, JAX would ask for a TPU and print pages of errors."""
    from dreamer4_jax import bench
    from dreamer4_jax.parallel import processes

    chosen = []
    monkeypatch.setattr(processes, "choose_platform", lambda: chosen.append(True))
    monkeypatch.setattr(bench, "main", lambda out: None)
    names = {"RUN": "run", "OUT": "out", "DATA": "data"}
    code = cli.main([str(tmp_path / names[word]) if word in names else word for word in argv])
    assert chosen == [True] and code == (0 if argv[0] == "bench" else 2)  # there is no such run
