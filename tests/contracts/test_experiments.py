"""What every experiment must keep, whoever adds one: found by itself, and lowered for a mesh of eight devices."""

import importlib

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from dreamer4_jax.cli import PHASES, experiments
from dreamer4_jax.config import Config, from_dict, preset, to_dict
from dreamer4_jax.parallel import AXES
from dreamer4_jax.parallel.programs import programs
from dreamer4_jax.presets import PRESETS

EIGHT = AbstractMesh((1, 2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 4)


def test_experiments_are_found():
    assert "quickstart" in experiments()


@pytest.mark.parametrize("name", experiments())
def test_an_experiment_has_its_sizes_and_says_how_it_is_run(name):
    module = importlib.import_module(f"experiments.{name}")
    assert f"dreamer4 run {name}" in module.__doc__
    for size in ("smoke", "quick", "full"):
        config = module.config(size, 3)
        assert config.seed == 3 and from_dict(Config, to_dict(config)) == config


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", experiments())
def test_every_training_step_lowers_for_eight_devices(name, phase):
    """Peer mistake 13. Frames or tokens, heads and rows divided: the constraints are there, on any machine."""
    lower(importlib.import_module(f"experiments.{name}").config("quick", 0), phase)


def lower(config, phase):
    for program in programs(config, (phase,), mesh=EIGHT):
        with jax.sharding.use_abstract_mesh(EIGHT):
            lowered = program.function.trace(*program.arguments).lower(lowering_platforms=("tpu",))
        text = lowered.as_text()
        assert '"ctx"' in text and '"model"' in text and "sdy.mesh" in text


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_lowers_for_eight_devices(name, phase):
    """Peer mistake 13: no preset is shipped that never ran; the large ones at least become programs."""
    lower(preset(name), phase)
