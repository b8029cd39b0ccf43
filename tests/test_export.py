"""Exported programs, run in a process that cannot import the project, against the project's own numbers."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import dreamer4_jax
from dreamer4_jax import cli
from dreamer4_jax.config import UserError
from dreamer4_jax.export import export
from dreamer4_jax.inference import load_world
from tests.saved_run import small_run_config, world, write_run

CFG = small_run_config()
DECISIONS, PLAN = 8, [(2, 1), (0, 4), (4, 2), (1, 2)]

ELSEWHERE = """
import sys
sys.modules["dreamer4_jax"] = None  # any import of it fails
folder, given, out = sys.argv[1:]
sys.path.insert(0, folder)
import numpy as np
from exported import Policy, World

data = np.load(given)
policy, found = Policy(folder, seed=7), {}
for i, image in enumerate(data["images"]):
    if i in (0, 5):
        policy.reset()
    found[f"move/{i}"] = policy.act(image, data["task"])["move"]
world = World(folder)
shown = [world.start(data["frames"], {"move": data["moves"]}, data["task"], seed=11)]
for move, steps in data["plan"]:
    shown.append(world.step({"move": move}, steps=int(steps)))
for i, seen in enumerate(shown):
    for name in ("frame", "reward", "cont", "value"):
        found[f"{name}/{i}"] = seen[name]
    found[f"intention/{i}"], found[f"drawn/{i}"] = seen["intention"]["move"], seen["action"]["move"]
assert not [name for name in sys.modules if name.startswith(("dreamer4_jax.", "flax"))]
np.savez(out, **found)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "toy"
    write_run(directory, CFG, data=False)
    return directory


def given():
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(0, 256, (DECISIONS, 16, 16, 3), dtype=np.uint8),
        "task": np.array([1, 2, 3], np.int32),
        "frames": rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8),
        "moves": np.array([0, 3, 1]),
        "plan": np.array(PLAN),
    }


def test_a_fresh_process_without_the_project_gets_the_same_numbers(run, tmp_path, capsys):
    folder = tmp_path / "portable"
    assert cli.main(["export", str(run), "--out", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    data = given()
    np.savez(tmp_path / "given.npz", **data)
    (tmp_path / "script.py").write_text(ELSEWHERE)
    arguments = [str(tmp_path / "script.py"), str(folder), str(tmp_path / "given.npz"), str(tmp_path / "found.npz")]
    subprocess.run([sys.executable, *arguments], check=True, cwd=tmp_path)
    found = np.load(tmp_path / "found.npz")

    policy = dreamer4_jax.load_policy(run, seed=7)
    for i, image in enumerate(data["images"]):
        if i in (0, 5):
            policy.reset()
        assert found[f"move/{i}"] == policy.act({"image": image, "task": data["task"]}), i
    assert len({int(found[f"move/{i}"]) for i in range(DECISIONS)}) > 1

    streams = load_world(run).streams(slots=1)
    state, shown = streams.join(streams.empty(), 0, data["frames"], {"move": data["moves"]}, data["task"], 11)
    for i, (move, steps) in enumerate([*PLAN, (0, 1)]):
        # Two compilations of one program: equal up to how they fuse.
        for name in ("reward", "cont", "value"):
            np.testing.assert_allclose(found[f"{name}/{i}"], getattr(shown, name)[0], rtol=1e-3, err_msg=f"{name} {i}")
        assert np.abs(found[f"frame/{i}"].astype(int) - shown.frame[0]).max() <= 1
        np.testing.assert_allclose(found[f"intention/{i}"], shown.intention["move"][0], rtol=1e-4)
        assert found[f"drawn/{i}"] == shown.action["move"][0]
        state, shown = streams.step(state, {"move": np.array([move])}, np.ones(1, bool), steps)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"] and manifest["actions"] == {"move": [[], "int32"]}
    assert sorted(p.name for p in folder.iterdir()) == [
        "exported.py", "manifest.json", "policy.jaxexport", "start.jaxexport", "step.jaxexport", "weights.npz",
    ]  # fmt: skip


@pytest.mark.slow
def test_bfloat16_weights_go_through_the_file(tmp_path):
    from dreamer4_jax import exported

    models = world(CFG)
    export(models, tmp_path / "half", dtype="bfloat16", platforms=["cpu"], greedy=True)
    kept = exported.World(tmp_path / "half")
    assert {x.dtype for x in kept._weights} == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    data, streams = given(), models.streams(slots=1, dtype="bfloat16")
    shown = kept.start(data["frames"], {"move": data["moves"]}, data["task"])
    _, expected = streams.join(streams.empty(), 0, data["frames"], {"move": data["moves"]}, data["task"], 0)
    np.testing.assert_array_equal(shown["frame"], expected.frame[0])


def test_what_cannot_be_exported_is_named(tmp_path):
    models = world(CFG)
    with pytest.raises(UserError, match="exists already"):
        export(models, tmp_path)
    with pytest.raises(UserError, match="platform 'abacus'"):
        export(models, tmp_path / "out", platforms=["abacus"])
    assert not (tmp_path / "out").exists()
