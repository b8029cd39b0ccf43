"""The mesh and the table of shardings; any mesh trains as one device does."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from dreamer4_jax.config import ConfigError
from dreamer4_jax.data.tokens import write_tokens
from dreamer4_jax.nn import layers
from dreamer4_jax.parallel import AXES, MeshSpec, Rules, common_divisor, constrain, make_mesh
from dreamer4_jax.parallel.sharding import batch_shardings, check_rows
from dreamer4_jax.training.optim import make_optimizer
from tests.test_training_phases import encode
from tests.toy_env import write_toy_dataset
from tests.training_phases import TINY

WHOLE = PartitionSpec()


def abstract(**sizes) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def specs(tree, **sizes):
    shardings = Rules(min_size=0).shardings(tree, abstract(**sizes))
    return {jax.tree_util.keystr(path): s.spec for path, s in jax.tree_util.tree_leaves_with_path(shardings)}


# ---------------------------------------------------------------------------------------------------------------------
# Mesh


@pytest.mark.parametrize(
    "text, sizes",
    [("data=8", (1, 8, 1, 1)), ("data=4,ctx=2", (1, 4, 2, 1)), ("replica=2", (2, -1, 1, 1)), ("ctx=-1", (1, 1, -1, 1))],
)
def test_a_mesh_is_written_as_sizes(text, sizes):
    assert MeshSpec.parse(text).sizes == sizes


@pytest.mark.parametrize(
    "text, message",
    [
        ("dta=2", "unknown axis 'dta'; the axes are replica, data, ctx, model"),
        ("data=two", "data='two' is not a number"),
        ("data=0", "data=0 must be at least 1"),
        ("data=-1,ctx=-1", "only one axis"),
    ],
)
def test_a_mesh_that_is_written_wrongly_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        MeshSpec.parse(text)


def test_a_mesh_for_another_number_of_devices_is_refused():
    assert make_mesh().shape == dict(replica=1, data=1, ctx=1, model=1)
    with pytest.raises(ConfigError, match=r"mesh replica=1,data=4,ctx=2,model=1: is for 8 devices, but there are 1"):
        make_mesh(MeshSpec(data=4, ctx=2))


def test_slices_are_crossed_by_replica_alone():
    class Device:
        platform = "tpu"

        def __init__(self, index):
            self.slice_index = index // 4

    with pytest.raises(ConfigError, match="mesh replica=1: there are 2 slices, and only replica crosses them"):
        make_mesh(MeshSpec(data=8), [Device(i) for i in range(8)])


@pytest.mark.parametrize(
    "batches, devices, expected", [((8, 4, 12, 32), 2, 2), ((8, 12), 8, 4), ((6,), 4, 3), ((5,), 4, 1)]
)
def test_as_many_devices_as_divide_every_batch(batches, devices, expected):
    assert common_divisor(batches, devices) == expected


def test_rows_that_the_devices_cannot_share_are_refused():
    check_rows(8, abstract(replica=2, data=4), "train.agent.batch")
    with pytest.raises(ConfigError, match=r"train.agent.batch = 12: cannot be divided among 8 devices"):
        check_rows(12, abstract(replica=2, data=4), "train.agent.batch")


# ---------------------------------------------------------------------------------------------------------------------
# Rules


class Block(nnx.Module):
    """Attention, feed-forward and a scale, as the transformer names their axes; two of them stacked."""

    def __init__(self, key):
        self.q = layers.fan_in(key, (8, 4, 2), ("embed", "heads", "head_dim"))
        self.k = layers.fan_in(key, (8, 1, 2), ("embed", "kv_heads", "head_dim"))
        self.down = layers.fan_in(key, (6, 8), ("ffn", "embed"))
        self.scale = layers.ones((8,), ("embed",))


def blocks() -> Block:
    return jax.vmap(Block)(jax.random.split(jax.random.key(0), 2))


def test_parameters_are_split_by_the_names_of_their_axes_and_stacked_layers_stay_together():
    found = specs(blocks(), data=2, ctx=2, model=2)
    assert found[".q.value"] == PartitionSpec(None, ("data", "ctx"), ("model",), None)
    assert found[".k.value"] == PartitionSpec(None, ("data", "ctx"), None, None)  # one head is not divided
    assert found[".down.value"] == PartitionSpec(None, ("model",), ("data", "ctx"))
    assert found[".scale.value"] == PartitionSpec(None, ("data", "ctx"))


def test_an_axis_that_does_not_divide_stays_whole_and_replicas_hold_the_same():
    assert specs(blocks(), data=3)[".q.value"] == PartitionSpec(None, None, None, None)
    assert specs(blocks(), replica=8)[".q.value"] == PartitionSpec(None, None, None, None)


def test_the_optimiser_state_is_split_as_its_parameters_are():
    model = blocks()
    state = jax.eval_shape(make_optimizer(TINY).init, model)
    of_state, of_model = specs(state, data=4), specs(model, data=4)
    moments = {path: spec for path, spec in of_state.items() if "mu" in path}
    assert len(moments) == len(of_model)
    for path, spec in moments.items():
        assert spec == next(s for name, s in of_model.items() if path.endswith(name))
    assert of_state[next(path for path in of_state if path.endswith(".count"))] == WHOLE


def test_small_parameters_are_held_whole():
    shardings = Rules(min_size=200).shardings(blocks(), abstract(data=4))
    assert {s.spec for s in jax.tree.leaves(shardings)} == {WHOLE}


def test_rows_of_a_batch_are_split_and_nothing_else():
    batch = {"z": jnp.zeros((8, 3, 4)), "relevant": jnp.zeros(8), "scale": 1.0}
    found = batch_shardings(batch, abstract(replica=2, data=4, ctx=2))
    assert found["z"].spec == PartitionSpec(("replica", "data"), None, None)
    assert found["relevant"].spec == PartitionSpec(("replica", "data"))
    assert found["scale"].spec == WHOLE


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.zeros((4, 2))
    assert constrain(x, "batch", None) is x


# ---------------------------------------------------------------------------------------------------------------------
# Any mesh = one device


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy")
    write_toy_dataset(directory / "frames")
    write_tokens(directory / "frames", directory / "tokens", encode, identity="shown")
    return directory


MESHES = ("data=8", "data=4,ctx=2", "data=2,ctx=2,model=2", "replica=2,data=4")


def on_eight_devices(toy, *words):
    """What `tests.sharded_phases` prints, from a process of its own that has eight devices."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "tests.sharded_phases", str(toy), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def require_equal_updates(toy, phase, of, meshes, share):
    """`share`: of the state, each device holds less than this."""
    found = on_eight_devices(toy, phase, ",".join(of), *meshes)
    assert list(found) == list(meshes)
    for mesh, values in found.items():
        assert values["loss"] < 1e-5, mesh
        assert all(values[name] < 1e-5 for name in of), mesh
        assert values["share"] < share, mesh


def test_gradients_are_the_same_on_a_mesh_of_eight(toy):
    """Peer mistake 2: gradients are reduced over all devices."""
    require_equal_updates(toy, "dynamics", ["gradients"], MESHES[2:3], 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["tokenizer", "perceptual", "dynamics", "agent", "imagination"])
def test_every_phase_updates_the_same_on_every_mesh(toy, phase):
    require_equal_updates(toy, phase, ["gradients", "parameters"], MESHES, 0.5)


@pytest.mark.slow
def test_imagination_gathers_its_weights_once_whatever_the_horizon(toy):
    found = on_eight_devices(toy, "imagination", "exchanged", "2", "4")
    assert found["2"] == found["4"] > 0
