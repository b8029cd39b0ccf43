"""The frame of experiments: what is written, the page made of it, and Wilson intervals."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dreamer4_jax.config import UserError
from dreamer4_jax.evaluation import plots, study_page, wilson_ci
from dreamer4_jax.evaluation.study import Study, code, entry, load
from dreamer4_jax.training import Interrupted

STUDY = Study("coin", "Is the <coin> fair?", "heads in half of the throws", seeds=(0, 1))


def throw(argv):
    call = STUDY.call("doc", argv, add=lambda p: p.add_argument("--throws", type=int, default=10))
    rows = [{"seed": s, "heads": wilson_ci(5, call.args.throws), "skew": float("nan")} for s in call.track(call.seeds)]
    figure, (axes,) = plots.panels(["heads"])
    axes.plot([0, 1], [0.5, 0.5])
    return call.write(rows, finding="It is & it stays.", figure=figure)


def test_a_call_writes_its_command_seeds_machine_and_rows(tmp_path):
    path = throw(["--size", "smoke", "--out", str(tmp_path / "coin"), "--throws", "20"])
    tree = json.loads(path.read_text())
    assert tree["command"] == f"python -m experiments.coin --size smoke --out {tmp_path}/coin --throws 20"
    assert tree["seeds"] == [0] and tree["size"] == "smoke" and "jax" in tree["versions"]
    assert tree["rows"][0]["heads"] == wilson_ci(5, 20)._asdict() and tree["rows"][0]["skew"] is None
    assert sorted(p.name for p in path.parent.iterdir()) == ["coin.json", "coin.png"]
    assert (path.parent / tree["figure"]).read_bytes().startswith(b"\x89PNG")


def test_a_log_gets_a_line_for_each_item(tmp_path, capsys):
    throw(["--out", str(tmp_path / "coin")])
    told = capsys.readouterr().err
    assert "coin: 1 of 2 in 0.0 minutes, about 0.0 to go" in told and "coin: 2 of 2" in told


def test_an_interrupted_study_says_so_and_can_be_retried(capsys):
    def main():
        raise Interrupted("dynamics", 7, Path("runs/mine/7"))

    with pytest.raises(SystemExit) as stopped:
        entry(main)
    told = capsys.readouterr().err
    assert stopped.value.code == 42 and "saved to runs/mine/7; the same command goes on" in told


def test_what_is_kept_is_taken_by_the_same_code_and_options_alone(tmp_path, monkeypatch):
    computed = []

    def ask(code, throws="10", seed="0"):
        monkeypatch.setattr("dreamer4_jax.evaluation.study.code", lambda study: code)
        options = ["--runs", str(tmp_path / "runs"), "--throws", throws, "--seeds", seed, "--out", f"{tmp_path}/{seed}"]
        call = STUDY.call("doc", options, add=lambda p: p.add_argument("--throws", type=int, default=10))

        def compute():
            computed.append(code)
            return [{"heads": wilson_ci(5, call.args.throws), "skew": float("nan")}]

        return call.kept("cell", compute)

    first = ask("a")
    assert first == [{"heads": wilson_ci(5, 10)._asdict(), "skew": None}]
    assert ask("a") == first and ask("a", seed="1") == first and computed == ["a"]
    assert ask("a", throws="20") != first and ask("b") == first and computed == ["a", "a", "b"]
    assert ask(None) == first and computed[3:] == [None], "changed code takes nothing, and keeps nothing"
    assert ask("b") == first and len(computed) == 4


def test_code_is_named_by_what_was_committed_of_the_library_and_of_the_experiment(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    def write(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        git("add", name)

    assert code("coin", tmp_path) is None, "no checkout"
    git("init")
    assert code("coin", tmp_path) is None, "nothing is tracked"
    for name in ("dreamer4_jax/nn.py", "experiments/coin.py", "experiments/base.py", "experiments/other.py"):
        write(name, "1")
    assert code("coin", tmp_path) is None, "not committed"
    git("commit", "-m", "first")
    first = code("coin", tmp_path)
    write("experiments/other.py", "2")
    git("commit", "-m", "another experiment")
    assert first and code("coin", tmp_path) == first != code("other", tmp_path)
    write("dreamer4_jax/nn.py", "2")
    assert code("coin", tmp_path) is None
    git("commit", "-m", "the library")
    assert code("coin", tmp_path) not in (None, first)


def test_only_the_laptop_size_writes_into_the_committed_results():
    outs = {size: STUDY.call("doc", ["--size", size]).out.as_posix() for size in ("smoke", "laptop", "tpu")}
    assert outs == {
        "smoke": "runs/smoke/coin",
        "laptop": "experiments/results/coin",
        "tpu": "experiments/results/coin-tpu",
    }


def test_the_smoke_size_takes_one_seed_unless_told():
    assert STUDY.call("doc", ["--size", "laptop"]).seeds == (0, 1)
    assert STUDY.call("doc", ["--size", "smoke"]).seeds == (0,)
    assert STUDY.call("doc", ["--size", "smoke", "--seeds", "1", "0"]).seeds == (1, 0)


def test_a_seed_that_stands_twice_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        STUDY.call("doc", ["--seeds", "1", "1"])
    assert stop.value.code == 2 and "a seed stands there twice" in capsys.readouterr().err


def test_a_users_error_ends_with_its_message_and_code_2(capsys):
    def main():
        raise UserError("no such run")

    with pytest.raises(SystemExit) as stop:
        entry(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "dreamer4: no such run\n"


def test_the_page_shows_each_question_its_finding_command_and_figure(tmp_path):
    throw(["--size", "smoke", "--out", str(tmp_path / "coin")])
    shutil.copytree(tmp_path / "coin", tmp_path / "other")
    (tmp_path / "other" / "unrelated.json").write_text('{"rows": []}')
    page = study_page.write_page(tmp_path).read_text()
    assert page.count("Is the &lt;coin&gt; fair?") == 2 and page.count("It is &amp; it stays.") == 2
    assert page.count("data:image/png;base64,") == 2 and "python -m experiments.coin --size smoke" in page
    assert "<coin>" not in page


def test_the_page_of_no_results_and_damaged_results_are_errors_that_name_the_place(tmp_path):
    (tmp_path / "coin").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path}: holds no results"):
        study_page.write_page(tmp_path)
    (tmp_path / "coin" / "coin.json").write_text('{"question"')
    with pytest.raises(UserError, match="coin.json: damaged"):
        load(tmp_path)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (812, 1000)])
def test_wilson_ends_solve_the_score_equation(successes, trials):
    """The ends are where ``|p_hat - p| = z sqrt(p (1 - p) / n)``: the roots of a quadratic."""
    z, hat = 1.959963984540054, successes / trials
    low, high = np.sort(np.roots([1 + z**2 / trials, -(2 * hat + z**2 / trials), hat**2]).real)
    found = wilson_ci(successes, trials)
    np.testing.assert_allclose(found, [hat, low, high], atol=1e-9)


def test_wilson_refuses_counts_that_cannot_be():
    with pytest.raises(UserError, match="11 successes of 10 trials"):
        wilson_ci(11, 10)
