"""The sampler's benchmark: what is counted, on models of a few thousand parameters."""

import json

import jax.numpy as jnp
import pytest

from dreamer4_jax import bench_generate, cli
from dreamer4_jax.bench import Timing
from dreamer4_jax.config import ConfigError
from tests.saved_run import small_run_config


def test_the_floor_is_the_larger_of_products_and_memory():
    one = dict(frames=2, flops=4_000_000_000, read=1_000_000_000)
    by_products = bench_generate.row(Timing(2.0, 1.0), **one, gflops=4.0, gbps=2.0)
    assert (by_products["bound"], by_products["floor_ms"], by_products["times_floor"]) == ("products", 1000.0, 2.0)
    assert by_products["frames_per_s"] == 1.0
    by_memory = bench_generate.row(Timing(2.0, 1.0), **one, gflops=40.0, gbps=1.0)
    assert (by_memory["bound"], by_memory["floor_ms"]) == ("memory", 1000.0)


def test_copies_count_what_is_read_and_what_is_written(monkeypatch):
    monkeypatch.setattr(bench_generate, "time_jitted", lambda fn, args, repeats: Timing(1.0, args[0].nbytes / 1e9))
    assert bench_generate.copy_rate(4096) == pytest.approx(2.0)


def test_both_programs_are_measured_and_written(monkeypatch, tmp_path, capsys):
    config = small_run_config()
    monkeypatch.setattr(bench_generate, "named_config", lambda name: config)
    monkeypatch.setattr(bench_generate, "matmul_rate", lambda dtype: {jnp.dtype("float32"): 10.0}[dtype])
    monkeypatch.setattr(bench_generate, "copy_rate", lambda: 5.0)
    monkeypatch.setattr(bench_generate, "REPEATS", 2)
    assert cli.main(["bench", "generate", "--presets", "toy", "--steps", "2", "--out", str(tmp_path / "b.json")]) == 0
    data = json.loads((tmp_path / "b.json").read_text())
    frame, stream = data["rows"].values()
    assert list(data["rows"]) == ["toy, frame, batch 1, K = 2", "toy, stream, batch 1, K = 2"]
    assert data["machine"]["copy_gbps"] == 5.0 and data["estimates"] == []
    # A fused frame computes K + 1 frames, of which the stream's three passes are as many; it has decoder and heads too.
    assert 0 < frame["gflop"] < stream["gflop"] and 0 < frame["read_mb"] < stream["read_mb"]
    assert "toy, stream" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_by_name(capsys):
    for arguments, text in (
        (["--presets", "huge"], "unknown preset 'huge'"),
        (
            ["--presets", "tiny", "--steps", "3"],
            "--steps 3: must be a power of two up to dynamics.k_max = 16 of 'tiny'",
        ),
        (["--batch", "0"], "--batch [0]"),
        (["--batch", "many"], "--batch many: must be numbers"),
    ):
        assert cli.main(["bench", "generate", *arguments]) == 2
        assert text in capsys.readouterr().err
    with pytest.raises(ConfigError, match="unknown accelerator"):
        bench_generate.estimates(["tiny"], ["v9-1"], steps=4)


@pytest.mark.aot
def test_a_tpu_is_estimated():
    (row,) = bench_generate.estimates(["tiny"], ["v5e-1"], steps=4)
    assert row["fits"] and 1 <= row["times_floor"] and row["frames_per_s"] == pytest.approx(1e3 / row["ms"])
