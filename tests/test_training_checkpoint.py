"""Checkpoints: exact, atomic, and refused by name when missing, damaged or of something else."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4_jax.config import UserError
from dreamer4_jax.training import Checkpointer, CheckpointError, load_meta, load_model, save_model
from dreamer4_jax.training.checkpoint import fingerprint, first_difference
from tests.training_phases import Net

CONFIG = {"seed": 0, "dynamics": {"k_max": 16, "layers": 2}}
ROOT = Path(__file__).parent.parent


def tree(seed=0, width=4):
    return {"net": Net(jax.random.key(seed), width), "step": jnp.int32(seed), "none": None, "empty": {}}


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_round_trip_keeps_bits_structure_and_meta(tmp_path):
    with Checkpointer(tmp_path / "c") as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step), {"config": CONFIG, "seconds": 1.5})
    with Checkpointer(tmp_path / "c", read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 3
        restored, meta = checkpoints.restore(jax.eval_shape(tree), config=CONFIG)
        equal(restored, tree(3))
        assert meta["step"] == 3 and meta["seconds"] == 1.5 and meta["fingerprint"] == fingerprint(CONFIG)
        equal(checkpoints.restore(tree(), step=2)[0], tree(2))
        with pytest.raises(CheckpointError, match=r"no checkpoint .*c/1; the newest there is of step 3"):
            checkpoints.restore(tree(), step=1)  # two are kept


def test_arrays_may_be_donated_while_they_are_being_saved(tmp_path):
    change = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    x = jnp.zeros((1000, 1000))
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x}, {})
        for _ in range(20):
            x = change(x)
        jax.block_until_ready(x)
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        restored, _ = checkpoints.restore({"x": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)})
    np.testing.assert_array_equal(restored["x"], np.zeros((1000, 1000)))


def test_missing_is_an_error_of_the_user_and_creates_nothing(tmp_path):
    with Checkpointer(tmp_path / "none", read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match="no checkpoint in .*none"):
            checkpoints.restore(tree())
    with pytest.raises(UserError, match="no checkpoint in"):
        load_model(tmp_path / "none", tree())
    assert not (tmp_path / "none").exists()


def test_another_config_or_model_is_refused_by_the_first_name_that_differs(tmp_path):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, tree(), {"config": CONFIG})
        checkpoints.wait()
        other = {"seed": 0, "dynamics": {"k_max": 8, "layers": 3}}
        with pytest.raises(CheckpointError, match="another config: dynamics.k_max is 16 there and 8 here"):
            checkpoints.restore(tree(), config=other)
        checkpoints.restore(tree(), config={"seed": 0})  # a subset of the sections may be asked for
        with pytest.raises(
            CheckpointError, match=r"net/layers/scale/value is float32\[2, 4\] there and float32\[2, 5\]"
        ):
            checkpoints.restore(tree(width=5))
        with pytest.raises(CheckpointError, match=r"array more is \(absent\) there"):
            checkpoints.restore({**tree(), "more": jnp.ones(2)})


def test_first_difference_follows_the_order_of_the_fields():
    assert first_difference(CONFIG, json.loads(json.dumps(CONFIG))) is None
    assert first_difference({"a": {"x": 1}, "b": 2}, {"b": 3, "a": {"x": 1}}) == ("b", 2, 3)
    assert first_difference({"a": [1]}, {"a": [2], "z": 0}) == ("a", [1], [2])
    assert first_difference({"a": 1}, {"a": 1, "z": 0}) == ("z", "(absent)", 0)


def files(directory):
    return sorted(p for p in directory.rglob("*") if p.is_file())


def test_a_truncated_file_is_named_whichever_it_is(tmp_path):
    original = tmp_path / "original"
    with Checkpointer(original) as checkpoints:
        checkpoints.save(1, tree(), {"config": CONFIG})
    for i, path in enumerate(p for p in files(original) if p.stat().st_size > 0):
        copy = tmp_path / str(i)
        shutil.copytree(original, copy)
        victim = copy / path.relative_to(original)
        os.truncate(victim, victim.stat().st_size // 2)
        with Checkpointer(copy, read_only=True) as checkpoints:
            with pytest.raises(CheckpointError) as error:
                checkpoints.restore(tree(), config=CONFIG)
        assert str(victim) in str(error.value) and "damaged" in str(error.value)


def test_damage_is_found_without_the_list_of_sizes_too(tmp_path):
    """A process that was killed right after a save leaves a complete checkpoint that has no list."""
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, tree(width=200), {"config": CONFIG})
    (tmp_path / "1" / "files.json").unlink()
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        equal(checkpoints.restore(tree(width=200))[0], tree(width=200))
    largest = max(files(tmp_path), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        with pytest.raises(CheckpointError, match="1 is damaged and cannot be read"):
            checkpoints.restore(tree(width=200))


def test_model_alone(tmp_path):
    net = Net(jax.random.key(3))
    save_model(tmp_path / "model", net, {"config": CONFIG, "step": 7, "note": "kept"})
    loaded, meta = load_model(tmp_path / "model", jax.eval_shape(Net, jax.random.key(0)), config={"seed": 0})
    equal(loaded, net)
    assert load_meta(tmp_path / "model") == meta and meta["step"] == 7 and meta["note"] == "kept"
    with pytest.raises(CheckpointError, match="already holds a model"):
        save_model(tmp_path / "model", net, {"config": CONFIG, "step": 8})


def test_a_kill_while_saving_leaves_the_previous_checkpoint_usable(tmp_path):
    """Some 40 MB are saved every second step; the process is killed inside a save that is not its first."""
    steps = tmp_path / "run" / "checkpoints" / "dynamics" / "steps"
    command = [sys.executable, "-m", "tests.training_phases", str(tmp_path / "run"), "--width", "1000"]
    child = subprocess.Popen([*command, "--steps", "200", "--save-every", "2", "--sleep", "0"], cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        # Stopped first: then there is all the time to see whether it was inside a save.
        while True:
            assert child.poll() is None and time.monotonic() < deadline
            child.send_signal(signal.SIGSTOP)
            complete = [int(p.name) for p in steps.glob("*") if p.name.isdigit()]
            if complete and list(steps.glob("*tmp*")):
                break
            child.send_signal(signal.SIGCONT)
            time.sleep(0.005)
    finally:
        child.kill()
        child.wait()
    with Checkpointer(steps) as checkpoints:
        step = checkpoints.latest_step()
        assert step == max(complete)
        arrays = {n: jax.ShapeDtypeStruct(*_parse(d)) for n, d in checkpoints.meta(step)["arrays"].items()}
        flat, _ = checkpoints.restore(arrays)
        assert int(flat["step"]) == step and all(np.all(np.isfinite(x)) for x in flat.values())
        checkpoints.save(step + 2, flat, {})
        checkpoints.wait()
        assert checkpoints.latest_step() == step + 2
        assert not list(steps.glob("*tmp*")), "what the killed save left is cleaned up"


def _parse(description):
    dtype, _, shape = description.partition("[")
    return tuple(json.loads("[" + shape)), dtype
