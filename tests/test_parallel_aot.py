"""Ahead-of-time compilation by the real TPU compiler, in a process of its own: it needs no TPU."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from dreamer4_jax.config import ConfigError, preset
from dreamer4_jax.parallel import Rules, make_mesh
from dreamer4_jax.parallel.aot import _needed, aot_compile, model_flops
from dreamer4_jax.parallel.programs import generated_frame, training_step

SMALL = [
    "tokenizer.encoder.layers=1",
    "tokenizer.decoder.layers=1",
    "dynamics.transformer.layers=2",
    "dynamics.transformer.time_every=2",
    "train.dynamics.batch=8",
    "train.dynamics.length=8",
]
compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def run(*arguments):
    """`dreamer4 aot tiny`: (exit code, reports, output)."""
    out = arguments[arguments.index("--out") + 1]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "dreamer4_jax.cli", "aot", "tiny", *map(str, arguments), *SMALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    with open(out) as file:
        return done.returncode, json.load(file), done.stdout


@compiler
def test_a_frame_compiles_for_every_generation(tmp_path):
    others = [word for name in ("v5e-1", "v5p-8", "v6e-1", "tpu7x-8") for word in ("--compare", name)]
    code, reports, text = run("--accelerator", "v4-8", *others, "--programs", "generate", "--out", tmp_path / "out")
    assert code == 0 and len(reports) == 5 and all(r["fits"] for r in reports)
    assert [r["accelerator"] for r in reports] == ["v4-8", "v5litepod-1", "v5p-8", "v6e-1", "tpu7x-8"]
    for r in reports:
        assert 0 < r["roofline_s"] < r["step_s"] < 1 and r["frames_per_s"] == 1 / r["step_s"]
        assert {"parameters", "cache", "activations"} <= set(r["hbm"]) and r["peak"] < r["limit"]
        assert r["collectives"] == [] and abs(sum(r["scopes"].values()) - 1) < 1e-6
    assert "generate K=4" in text and "v6e-1" in text


@compiler
def test_a_training_step_on_a_mesh_exchanges_gradients_and_frames(tmp_path):
    arguments = ("--accelerator", "v5e-4", "--mesh", "data=2,ctx=2", "--programs", "dynamics")
    code, (report,), _ = run(*arguments, "--out", tmp_path / "out", "--keep-text", tmp_path)
    assert code == 0 and report["mesh"] == {"replica": 1, "data": 2, "ctx": 2, "model": 1}
    found = {(at["kind"], at["size"]) for at in report["collectives"]}
    assert ("all-reduce", 4) in found  # gradients: the parameters are too small to be split
    assert any(kind in ("all-to-all", "all-gather") and size == 2 for kind, size in found)  # frames to tokens
    assert not any(at["slices"] for at in report["collectives"])
    assert {"parameters", "optimiser", "EMA", "batch"} <= set(report["hbm"])
    # AdamW: two moments; the average of the weights: as many bytes as they are.
    assert report["hbm"]["EMA"] == report["hbm"]["parameters"] < report["hbm"]["optimiser"] / 1.99
    assert list(tmp_path.glob("*.hlo.txt"))


@compiler
@pytest.mark.aot
def test_slices_exchange_gradients_and_nothing_else(tmp_path):
    """Four bootstrap rows for four groups of devices: neither frames nor parameters cross."""
    arguments = ("--accelerator", "v5e-4", "--slices", 2, "--mesh", "replica=2,data=2,ctx=2", "--programs", "dynamics")
    code, (report,), _ = run(*arguments, "--out", tmp_path / "out", "--rows", 16)
    crossing = {at["kind"]: at["bytes"] for at in report["collectives"] if at["slices"]}
    assert code == 0 and set(crossing) == {"all-reduce"} and crossing["all-reduce"] > 0


@compiler
@pytest.mark.aot
@pytest.mark.parametrize("phase", ["tokenizer", "agent", "imagination"])
def test_every_phase_compiles_for_a_mesh(tmp_path, phase):
    sizes = [f"train.{phase}.batch=8", f"train.{phase}.length=8", "agent.context=4", "agent.horizon=3"]
    arguments = ("--accelerator", "v5e-4", "--mesh", "data=2,ctx=2", "--programs", phase)
    code, (report,), _ = run(*arguments, "--out", tmp_path / "out", *sizes)
    assert code == 0 and report["fits"] and report["frames"] == 64


@compiler
@pytest.mark.aot
def test_what_does_not_fit_is_found_without_a_tpu(tmp_path):
    """A batch of 2048 x 64 frames of 256 x 256 on one v5e."""
    sizes = ["tokenizer.height=256", "tokenizer.width=256", "tokenizer.latents=1024", "train.tokenizer.length=64"]
    arguments = ("--accelerator", "v5e-1", "--programs", "tokenizer", "--rows", 2048, "--out", tmp_path / "out")
    code, (report,), text = run(*arguments, *sizes)
    assert code == 1 and not report["fits"] and report["peak"] > report["limit"]
    assert "RESOURCE_EXHAUSTED" in report["error"] and "NO" in text


def test_needed_bytes_are_read_from_the_compilers_message():
    text = "the total memory required for HLO temporaries (512.00G) exceeds available HBM (15.75G)."
    assert _needed(f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {text}") == 512 * 2**30
    assert _needed("RESOURCE_EXHAUSTED: something else") == 0
    assert _needed("Ran out of memory in memory space hbm. Used 20.5M of 16M hbm.") == int(20.5 * 2**20)


def test_model_flops_are_those_of_the_products():
    """By hand for the tokenizer: 2 m n k for each product forward, twice that backward (the first layer's input has no
    gradient); rematerialisation adds none."""
    config = preset("tiny", **{"train.tokenizer.batch": 2})
    t, e = config.tokenizer, config.tokenizer.encoder
    tokens, images = t.patches + t.latents, 2 * 3
    layer = tokens * (4 * e.width**2 + 3 * e.width * e.ffn) + 2 * tokens**2 * e.width
    patch = t.patches * 3 * t.patch**2 * e.width
    bottleneck = t.latents * t.channels * e.width
    forward = 2 * images * (2 * layer + 2 * patch + 2 * bottleneck)
    small = 2 * images * patch  # of the embedding: no gradient of the pixels
    found = model_flops(config, "tokenizer", rows=2, frames=3)
    local = 2 * (tokens**2 * e.width) * 3 * 2  # the products of the local biases, forward and backward at most
    assert 3 * forward - small <= found <= 3 * forward - small + local
    assert found == model_flops(preset("tiny", **{"tokenizer.encoder.remat": "full"}), "tokenizer", rows=2, frames=3)


def test_bytes_of_the_arguments_are_those_of_one_device():
    mesh = make_mesh()
    program = training_step(preset("tiny"), "dynamics", rows=4, frames=8, mesh=mesh, rules=Rules())
    sizes = program.bytes_by_kind()
    assert sizes["EMA"] == sizes["parameters"] and sizes["optimiser"] == 2 * sizes["parameters"] + 8
    frames = generated_frame(preset("tiny"), rows=3, mesh=mesh)
    t = preset("tiny").dynamics.transformer
    expected = 2 * t.time_layers * 3 * 24 * t.window * t.kv_heads * t.head_dim * 4
    assert expected < frames.bytes_by_kind()["cache"] < expected + 1000


@pytest.mark.parametrize(
    "topology, programs, message",
    [("v5e-7", (), "unknown accelerator 'v5e-7'"), ("v5e-1", ("dynamic",), "unknown program 'dynamic'")],
)
def test_unknown_names_are_refused(topology, programs, message):
    with pytest.raises(ConfigError, match=message):
        aot_compile(preset("tiny"), topology, programs=programs)
