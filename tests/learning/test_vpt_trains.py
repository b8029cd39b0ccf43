"""Contractor recordings in their true layout, from mp4 and jsonl through all phases to an hour in (a stand-in for)
Minecraft."""

import json

import numpy as np
import pytest

from dreamer4_jax import cli
from dreamer4_jax.data.readers.vpt import COMPONENTS, KEYS
from dreamer4_jax.data.readers.vpt_events import TASKS
from dreamer4_jax.data.store import open_dataset
from dreamer4_jax.training import read_metrics
from tests import minerl_stand_in
from tests.test_readers_vpt import line, write

pytestmark = pytest.mark.slow
NET = "width=32 heads=2 kv_heads=2 head_dim=16 ffn=48".split()
SMALL = [
    "tokenizer.height=48", "tokenizer.width=64", "tokenizer.latents=48", "tokenizer.mask_max=0.5", "data.chunk=16",
    *(f"tokenizer.{half}.{field}" for half in ("encoder", "decoder") for field in NET),
    *(f"dynamics.transformer.{field}" for field in (*NET, "layers=2", "time_every=2", "window=8")),
    "dynamics.k_max=4", "agent.context=4", "agent.horizon=2", "agent.sample_steps=1", "agent.hidden=16", "agent.mtp=2",
    "agent.bins=31", "evaluate.frames=8",
    *(f"train.{phase}.{field}" for phase in ("tokenizer", "dynamics", "agent", "imagination")
      for field in ("steps=3", "batch=4", "length=8", "warmup=1", "log_every=1")),
]  # fmt: skip


def record(folder, name, seed, frames=48):
    """640 x 360 at 20 frames a second: random keys and mouse, an inventory that opens, and logs that are mined."""
    rng, lines, logs = np.random.default_rng(seed), [], 5
    names = [n for n in KEYS if n not in ("attack", "use", "pickItem", "ESC")]
    for t in range(frames):
        logs += t % 12 == 7
        gui = 20 <= t < 30
        lines.append(
            line(
                [n for n in names if rng.random() < 0.2],
                *rng.normal(0, 30, 2),
                buttons=[int(rng.integers(3))] if rng.random() < 0.5 else [],
                gui=gui,
                x=float(rng.uniform(0, 1280)),
                y=float(rng.uniform(0, 720)),
                hotbar=t // 10 % 9,
                stats={"minecraft.mine_block:minecraft.oak_log": logs},
            )
        )
    shade = np.linspace(40, 200, frames)[:, None, None, None]
    picture = np.broadcast_to(np.linspace(0, 50, 640)[None, None, :, None], (1, 360, 640, 3))
    write(folder, name, lines, (shade + picture).astype(np.uint8))


def test_recordings_train_every_phase_and_the_policy_plays(tmp_path, monkeypatch, capsys):
    for i in range(4):
        record(tmp_path / "vpt", f"cheeky-cornflower-{i}-20220101-00000{i}", i)
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    convert = ["data", "convert", str(tmp_path / "vpt"), data, "--size", "48x64", "--fit", "pad", "--chunk", "16"]
    assert cli.main([*convert, "--holdout", "0.25", "--workers", "1", "--quiet"]) == 0
    dataset = open_dataset(data)
    assert dataset.spec.actions == COMPONENTS and [a.size for a in COMPONENTS] == [23, 121]
    seen = dataset.window("train", 0, 16)
    assert seen["actions/keys"].any() and len(set(seen["actions/mouse"].tolist())) > 4
    assert not seen["frames"][:, 36:].any()  # 48 x 64 of 360 x 640: padded below
    assert TASKS[int(seen["task"][5, 0]) - 1] == "mine_log" and dataset.rewarded("train").any()

    for phase in ("tokenizer", "dynamics", "agent", "imagination"):
        command = ["train", phase, "--experiment", "tiny", "--run", run, "--resume", "--quiet"]
        assert cli.main([*command, f"data.source={data}", *SMALL]) == 0, phase
    lines = read_metrics(run)
    for phase, terms in (
        ("tokenizer", {"reconstruction"}),
        ("dynamics", {"dynamics"}),
        ("agent", {"dynamics", "policy", "reward", "continue"}),
        ("imagination", {"policy", "value"}),
    ):
        logged = [m for m in lines if m["phase"] == phase and "loss" in m]
        assert [m["step"] for m in logged] == [1, 2, 3]
        found = {k.removeprefix("loss/") for m in logged for k in m if k.startswith("loss/")}
        assert found == terms and all(np.isfinite(m[f"loss/{t}"]) for m in logged for t in terms)
    # A policy that knows nothing presses each key with probability one half and draws a mouse class of 121.
    first = next(m for m in lines if m["phase"] == "agent" and "loss" in m)["loss/policy"]
    nothing = 23 * np.log(2) + np.log(121)
    assert 0.5 * nothing < first < 2 * nothing

    minerl_stand_in.install(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    capsys.readouterr()
    assert cli.main(["evaluate", run, "--env", "minerl", "--episodes", "2", "--minutes", "0.005"]) == 0
    assert "phase 3 (imagination)" in capsys.readouterr().out
    results = json.loads((tmp_path / "run/evaluation/minecraft.json").read_text())["results"]
    assert [r["policy"] for r in results] == ["phase 2 (cloning)", "phase 3 (imagination)"]
    assert all(r["episodes"] == 2 and r["items"]["diamond"]["success"]["mean"] == 0 for r in results)
