"""The perceptual term in training: off it changes no bit, on it is normalised and weighted; its weights in no file."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from dreamer4_jax.config import UserError, preset
from dreamer4_jax.data.store import open_dataset
from dreamer4_jax.nn.transformer import first_of_segment
from dreamer4_jax.parallel import AXES
from dreamer4_jax.parallel.programs import training_step
from dreamer4_jax.runner import Run
from dreamer4_jax.training import CheckpointError, loop, open_run, read_metrics, run_phase, state, steps_path
from dreamer4_jax.training.optim import make_optimizer
from dreamer4_jax.training.phases import TokenizerPhase
from dreamer4_jax.world import perceptual, tokenizer
from tests import small, small_vgg
from tests.small_vgg import small_net
from tests.toy_env import toy_config, write_toy_dataset

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
FLAT = dict(layers=1, time_every=0, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, window=4)
PHASE = {"steps": 2, "batch": 4, "length": 2, "warmup": 1, "log_every": 1}


def config(**overrides):
    """Written as if a file of weights were used; the network is handed to the phase."""
    values = {
        "tokenizer.channels": 2,
        "tokenizer.pack": 1,
        "tokenizer.encoder": FLAT,
        "tokenizer.decoder": FLAT,
        "tokenizer.perceptual": "small.npz",
        "tokenizer.perceptual_frames": 1,
        "train.tokenizer": PHASE,
    }
    return toy_config(**{**values, **overrides})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write_toy_dataset(directory)
    return open_dataset(directory)


STEPS = {}  # compiled once for each kind of phase and config


def make_train_step(phase, optimizer, shardings=None):
    """Without optimisation, and without donation: states are used twice here."""
    step = state.make_train_step(phase, optimizer, shardings).__wrapped__
    return STEPS.setdefault((type(phase), phase.full), jax.jit(step, compiler_options=QUICK))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few channels, and quick compilation."""
    monkeypatch.setattr(perceptual, "BLOCKS", small_vgg.BLOCKS)
    monkeypatch.setattr(loop, "make_train_step", make_train_step)


def phase(data, cfg, **fields):
    made = TokenizerPhase(cfg, data, **fields)
    drawn = small.drawn(made.init, 5)
    made.init = lambda key, base=None: drawn
    return made


def train(directory, made, **options):
    run_dir = open_run(directory, made.full, resume=True)
    return run_phase(made, config=made.full, run_dir=run_dir, seed=0, progress=False, **options)


class MeanSquaredError(TokenizerPhase):
    """The loss as it was before there was a perceptual term."""

    frozen = None
    weights = {}

    def loss(self, model, ema, frozen, batch, key):
        segments, target = first_of_segment(batch["is_first"]), tokenizer.to_float(batch["frames"])
        drop = tokenizer.sample_drop(key, (*target.shape[:2], model.cfg.patches), model.cfg.mask_max)
        output = model.reconstruct(model.encode(batch["frames"], drop=drop, segments=segments), segments=segments)
        mse = ((output - target) ** 2).mean()
        # With the same metrics: who else reads the error decides what the compiler fuses, and so its roundings.
        return {"reconstruction": mse}, {"mse": mse, "psnr_dropped": -10.0 * jnp.log10(jnp.maximum(mse, 1e-10))}


def test_off_it_changes_no_bit(data, tmp_path):
    cfg = config(**{"tokenizer.perceptual": "none"})
    plain = MeanSquaredError(cfg, data)
    plain.init = phase(data, cfg).init
    ours, theirs = train(tmp_path / "off", phase(data, cfg)), train(tmp_path / "plain", plain)
    for a, b in zip(jax.tree.leaves(ours.state), jax.tree.leaves(theirs.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not any("perceptual" in name for line in read_metrics(tmp_path / "off") for name in line)


def test_on_it_is_normalised_weighted_and_frozen(data):
    net = small_net()
    made = phase(data, config(), distance=net)
    optimizer, batch, key = make_optimizer(made.config), next(made.batches(0)), jax.random.key(1)
    after, metrics = make_train_step(made, optimizer)(state.init_state(made, optimizer, key), made.frozen, batch, key)
    parts = float(metrics["scaled/reconstruction"]), float(metrics["scaled/perceptual"])
    np.testing.assert_allclose(metrics["loss"], parts[0] + 0.2 * parts[1], rtol=1e-5)
    np.testing.assert_allclose(parts, 1, rtol=1e-3)  # each divided by its own size, at the first step by itself
    assert float(metrics["loss/perceptual"]) > 0 and bool(metrics["finite"])
    assert set(after.norms["mean_square"]) == {"reconstruction", "perceptual"}
    # A step with the weight at zero goes elsewhere: the term reaches the parameters.
    other = replace(made, full=config(**{"tokenizer.perceptual_weight": 1e-9}))
    other.init = made.init
    moved, _ = make_train_step(other, optimizer)(state.init_state(other, optimizer, key), net, batch, key)
    pairs = zip(jax.tree.leaves(after.model), jax.tree.leaves(moved.model), strict=True)
    assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in pairs)


def test_checkpoints_hold_the_identity_of_the_weights_and_not_the_weights(data, tmp_path):
    cfg = config()
    assert not train(tmp_path, phase(data, cfg, distance=small_net(0)), stop_after=1).finished
    with loop.Checkpointer(steps_path(tmp_path, "tokenizer"), read_only=True) as kept:
        meta = kept.meta()
    assert meta["frozen"].startswith("small.npz ") and len(meta["frozen"]) == len("small.npz ") + 16
    assert not any("conv" in name or "heads" in name for name in meta["arrays"])
    for other in (small_net(1), replace(small_net(0), heads=small_net(1).heads)):
        with pytest.raises(CheckpointError, match="other frozen weights: small.npz .* there and small.npz"):
            train(tmp_path, phase(data, cfg, distance=other), resume=True)
    done = train(tmp_path, phase(data, cfg, distance=small_net(0)), resume=True)
    whole = train(tmp_path.with_name("whole"), phase(data, cfg, distance=small_net(0)))
    for a, b in zip(jax.tree.leaves(done.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert json.loads((tmp_path / "config.json").read_text())["tokenizer"]["perceptual"] == "small.npz"
    # The finished model is read without the network, which may be on another machine.
    assert train(tmp_path, phase(data, cfg), resume=True).finished


def test_a_run_that_lacks_the_weights_is_refused_before_it_is_made(data, tmp_path):
    with pytest.raises(UserError, match="small.npz.*no such file"):
        Run(config(), tmp_path / "run", data_dir=data.directory, progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "weights"), [("lpips-hed", 14_714_688 + 1_472), ("efficientnet-lite0", 54_048)])
def test_the_step_lowers_for_eight_devices_without_the_weights(name, weights, monkeypatch):
    """The weights are arguments, held whole by every device, and no file is read. VGG16's convolutions are known for
    14,714,688 weights."""
    monkeypatch.undo()
    monkeypatch.setattr(perceptual, "load", None)
    cfg = preset("tiny", **{"tokenizer.perceptual": name})
    mesh = AbstractMesh((1, 2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 4)
    program = training_step(cfg, "tokenizer", rows=8, frames=4, mesh=mesh)
    assert program.bytes_by_kind()["frozen models"] == 4 * weights
    with jax.sharding.use_abstract_mesh(mesh):
        text = program.function.trace(*program.arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert "convolution" in text and len(text) < 3e6  # constants would be megabytes
