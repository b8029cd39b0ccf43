"""The loop: exact resume, interruption, divergence, run directories, what it records."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from dreamer4_jax.config import ConfigError, UserError, preset
from dreamer4_jax.training import (
    Checkpointer,
    CheckpointError,
    DivergenceError,
    Interrupted,
    abstract_state,
    load_model,
    loop,
    make_optimizer,
    model_path,
    open_run,
    read_ledger,
    read_metrics,
    run_phase,
    state,
    steps_path,
)
from tests.training_phases import TINY, Net, Regression

CONFIG = preset("tiny")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """One step for all phases whose steps are the same program: compiling is all the cost here.

    That another process, which compiles for itself, goes on exactly where this one stopped is tested with SIGTERM.
    """
    steps = {}

    def make_train_step(phase, optimizer, shardings):
        key = type(phase).loss, replace(phase.config, save_every=1, log_every=1)
        return steps.setdefault(key, state.make_train_step(phase, optimizer, shardings))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", make_train_step)
        yield


def train(phase, run_dir, **options):
    run_dir = open_run(run_dir, CONFIG, resume=True)
    return run_phase(phase, config=CONFIG, run_dir=run_dir, seed=0, **options)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def lines(run_dir):
    """Every line of the log, but for the metrics that tell how fast the machine was."""
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in read_metrics(run_dir)]


@pytest.mark.parametrize("optimizer", ["adamw", "laprop", "muon"])
def test_n_and_resume_and_n_are_2n_bit_for_bit(tmp_path, optimizer):
    """Peer mistake 10: everything that the future depends on is in the checkpoint."""
    cfg = replace(TINY, optimizer=optimizer)
    whole = train(Regression(cfg), tmp_path / "whole")
    first = train(Regression(cfg), tmp_path / "parts", stop_after=4)
    assert not first.finished and first.steps == 4
    phase = Regression(cfg)
    second = train(phase, tmp_path / "parts", resume=True)
    assert phase.seen == [4, 5, 6, 7], "the batches of the steps that were left, and no other"
    assert second.finished and second.steps == 8 and int(second.state.step) == 8
    equal(second.state, whole.state)  # parameters, optimiser, EMA, normaliser
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert second.evaluation == whole.evaluation


def test_a_resumed_run_from_an_earlier_checkpoint_repeats_the_lost_steps(tmp_path):
    cfg = replace(TINY, save_every=3)
    whole = train(Regression(cfg), tmp_path / "whole")
    train(Regression(cfg), tmp_path / "parts", stop_after=5)
    # As if the process had died after logging step 5 and half of another line, its last save being step 3.
    shutil.rmtree(steps_path(tmp_path / "parts", "dynamics") / "5")
    logged = read_metrics(tmp_path / "parts")
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"phase": "tokenizer", "step": 99, "loss": 1.0}) + '\n{"phase": "dyn')
    phase = Regression(cfg)
    result = train(phase, tmp_path / "parts", resume=True)
    assert phase.seen == [3, 4, 5, 6, 7]
    equal(result.state, whole.state)
    # Steps 4 and 5 at the speed that the dead process had logged.
    rates = [line["time/steps_per_s"] for line in logged if line["step"] in (4, 5)]
    assert read_ledger(tmp_path / "parts")["dynamics"]["lost"] == pytest.approx(sum(1 / r for r in rates), abs=2e-3)
    assert "lost" not in read_ledger(tmp_path / "whole")["dynamics"]
    mine = [line for line in lines(tmp_path / "parts") if line["phase"] == "dynamics"]
    assert mine == lines(tmp_path / "whole")
    assert sum(line["phase"] == "tokenizer" for line in read_metrics(tmp_path / "parts")) == 1


def test_sigterm_in_another_process_saves_and_resumes_exactly(tmp_path):
    command = [
        sys.executable,
        "-m",
        "tests.training_phases",
        str(tmp_path / "killed"),
        "--steps",
        "24",
        "--sleep",
        "0.1",
    ]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 3:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == Interrupted.exit_code == 42
    with Checkpointer(steps_path(tmp_path / "killed", "dynamics"), read_only=True) as checkpoints:
        step = checkpoints.latest_step()
    assert step is not None and 3 <= step < 8
    assert f"interrupted after step {step}" in out and "--resume" in out
    resumed = train(Regression(), tmp_path / "killed", resume=True)
    whole = train(Regression(), tmp_path / "whole")
    equal(resumed.state, whole.state)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


class Signalling(Regression):
    """Raises Ctrl-C in its own process while the batch of step 3 is made."""

    def batches(self, start, part=(0, 1)):
        for step, batch in enumerate(super().batches(start), start):
            if step == 3:
                signal.raise_signal(signal.SIGINT)
                # A second signal of either kind is the system's: it ends the process at once.
                assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            yield batch


def test_ctrl_c_finishes_the_step_saves_and_gives_the_handlers_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        train(Signalling(), tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert stopped.value.step == 3 and stopped.value.checkpoint.is_dir()
    assert train(Regression(), tmp_path, resume=True).steps == 8


def test_a_signal_during_evaluation_stops_at_once_and_loses_no_step(tmp_path):
    phase = Regression()
    phase.evaluate = lambda ema, step: signal.raise_signal(signal.SIGTERM) or {"score": 0.0}
    with pytest.raises(Interrupted):
        train(phase, tmp_path)
    assert not model_path(tmp_path, "dynamics").exists()
    again = Regression()
    result = train(again, tmp_path, resume=True)
    assert result.finished and again.evaluated == [8]
    assert [line["step"] for line in read_metrics(tmp_path)] == [*range(1, 9), 8]


def test_runs_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(Regression(), tmp_path)))
    thread.start()
    thread.join()
    assert results[0].finished


def test_nan_stops_with_the_last_good_checkpoint_intact(tmp_path):
    cfg = replace(TINY, save_every=2)
    with pytest.raises(DivergenceError) as error:
        train(Regression(cfg, nan_at=5), tmp_path)  # the update that would make step 6
    good = steps_path(tmp_path, "dynamics") / "4"
    message = str(error.value)
    assert "dynamics: not finite at step 6: loss terms fit = nan" in message and str(good) in message
    assert "drift = nan (" not in message and "train.dynamics.lr" in message
    with Checkpointer(steps_path(tmp_path, "dynamics"), read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 4
        phase = Regression(cfg)
        restored, _ = checkpoints.restore(abstract_state(phase, make_optimizer(cfg)))
    equal(restored, train(Regression(cfg), tmp_path / "healthy", stop_after=4).state)
    assert max(line["step"] for line in read_metrics(tmp_path)) == 5


def test_nan_in_the_very_last_step_is_not_saved(tmp_path):
    with pytest.raises(DivergenceError, match="no checkpoint was saved yet"):
        train(Regression(nan_at=7), tmp_path)
    assert not model_path(tmp_path, "dynamics").exists()


def test_a_finished_phase_is_recognised(tmp_path):
    whole = train(Regression(), tmp_path)
    phase = Regression()
    again = train(phase, tmp_path, resume=True)
    assert again.finished and again.state is None and phase.seen == [] and phase.evaluated == []
    equal(again.ema, whole.ema)
    assert again.evaluation == whole.evaluation and again.seconds == pytest.approx(whole.seconds, abs=0.1)
    loaded, meta = load_model(model_path(tmp_path, "dynamics"), jax.eval_shape(Net, jax.random.key(0)))
    equal(loaded, whole.ema)
    assert meta["step"] == 8 and meta["phase"] == "dynamics"


def test_nothing_is_trained_over_without_resume(tmp_path):
    train(Regression(), tmp_path, stop_after=2)
    with pytest.raises(CheckpointError, match="add --resume"):
        train(Regression(), tmp_path)


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    train(Regression(), tmp_path, stop_after=2)
    other = preset("tiny", **{"dynamics.k_max": 8})
    with pytest.raises(CheckpointError, match="dynamics.k_max is 16 there and 8 here"):
        run_phase(Regression(), config=other, run_dir=tmp_path, seed=0, resume=True)


def test_run_directory_belongs_to_one_config(tmp_path):
    run = open_run(tmp_path / "a" / "b", CONFIG)
    written = (run / "config.json").read_bytes()
    assert json.loads(written)["name"] == "tiny"
    with pytest.raises(UserError, match="holds a run already; add --resume"):
        open_run(run, CONFIG)
    assert open_run(run, CONFIG, resume=True) == run
    with pytest.raises(UserError, match="another config: dynamics.k_max is 16 there and 8 here"):
        open_run(run, preset("tiny", **{"dynamics.k_max": 8, "evaluate.clips": 3}), resume=True)
    assert (run / "config.json").read_bytes() == written


def test_the_launchers_logs_may_be_there_before_the_run(tmp_path):
    (tmp_path / "logs").mkdir()
    assert open_run(tmp_path, CONFIG) == tmp_path
    assert (tmp_path / "config.json").exists()


def test_a_directory_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("words")
    for resume in (False, True):
        with pytest.raises(UserError, match="not empty, and no run"):
            open_run(tmp_path, CONFIG, resume)
    with pytest.raises(UserError, match="is a file"):
        open_run(tmp_path / "thesis.tex", CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: damaged"):
        open_run(tmp_path, CONFIG, resume=True)


def test_log_events_and_ledger(tmp_path):
    cfg = replace(TINY, log_every=4)
    train(Regression(cfg), tmp_path, stop_after=6)
    result = train(Regression(cfg, name="dynamics"), tmp_path, resume=True)
    train(Regression(cfg, name="agent"), tmp_path)
    log = read_metrics(tmp_path)
    assert [(e["phase"], e["step"]) for e in log] == [(p, s) for p in ("dynamics", "agent") for s in (1, 4, 8, 8)]
    assert log[0]["time/steps_per_s"] > 0 and log[1]["time/frames_per_s"] > log[1]["time/steps_per_s"]
    assert log[3] == {"phase": "dynamics", "step": 8, "eval/score": pytest.approx(result.evaluation["score"])}
    assert log[0]["loss/fit"] != log[4]["loss/fit"], "phases draw their own keys"
    assert list((tmp_path / "tb" / "agent").glob("events.*"))
    ledger = read_ledger(tmp_path)
    assert set(ledger["dynamics"]) == {"setup", "compile", "data", "train", "save", "evaluate"}
    assert sum(ledger["dynamics"].values()) == pytest.approx(result.seconds, abs=0.1)


def test_the_ledger_counts_waiting_for_data_and_adds_up_over_resumes(tmp_path):
    train(Regression(sleep=0.05), tmp_path, stop_after=4)
    first = read_ledger(tmp_path)["dynamics"]["data"]
    assert first >= 4 * 0.05
    train(Regression(sleep=0.05), tmp_path, resume=True)
    assert read_ledger(tmp_path)["dynamics"]["data"] >= first + 4 * 0.05


class Shapeless(Regression):
    def batches(self, start, part=(0, 1)):
        for batch in super().batches(start):
            yield batch | {"x": batch["x"][:, : 1 + len(self.seen) % 3]}


class Short(Regression):
    def batches(self, start, part=(0, 1)):
        yield next(super().batches(start))


def test_bad_phases_and_configs_stop_with_a_reason(tmp_path):
    with pytest.raises(ValueError, match="a third shape of batches"):
        train(Shapeless(), tmp_path / "shapes")
    with pytest.raises(UserError, match="the data ended before step 1 of 8"):
        train(Short(), tmp_path / "short")
    for field, value in {"steps": 0, "log_every": 0, "save_every": -1, "lr": 0.0}.items():
        with pytest.raises(ConfigError, match=rf"train.dynamics.{field} = {value}"):
            train(Regression(replace(TINY, **{field: value})), tmp_path / "config")
