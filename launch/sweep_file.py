"""Sweep files: what is to be run.

A sweep file is Python:

::

    EXPERIMENT = "quickstart"                      # a file of experiments/ or a preset
    SIZE = "smoke"                                 # "quick" if left out
    SWEEP = product(values(...), values(...))      # launch.algebra
    STUDY, TRIALS = {field: log_uniform(...)}, 40  # or a search by Optuna (launch.study), so many trials long
    METRIC = Metric("...", "max")                  # launch.metric: what is looked for
    PRUNE = Metric("dynamics:loss", "min")         # optional: a series to stop bad trials by
    COST = "seconds"                               # optional, or "steps": what the metric is plotted against
    CORES = 1                                      # optional: processor cores of one trial
"""

import hashlib
import json
import re
import runpy
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreamer4_jax.cli import resolve
from dreamer4_jax.config import Config, ConfigError, UserError
from launch.algebra import Overrides, arguments
from launch.metric import Metric
from launch.process import Trial
from launch.spec import RunSpec
from launch.study import Distribution


@dataclass(frozen=True)
class Sweep:
    """A sweep file; see the top of this module."""

    path: Path
    experiment: str
    size: str
    metric: Metric
    grid: tuple[Overrides, ...] = ()
    space: dict[str, Distribution] = field(default_factory=dict)
    trials: int = 0
    prune: Metric | None = None
    cost: str = "seconds"
    cores: int = 1

    def identity(self) -> dict[str, Any]:
        """What the trials in a sweep directory have in common. A grid may grow, and its metric is only read."""
        out: dict[str, Any] = {"experiment": self.experiment, "size": self.size}
        if self.space:
            metric = {"path": self.metric.path, "goal": self.metric.goal}
            out |= {"metric": metric, "study": {name: repr(spec) for name, spec in self.space.items()}}
        return out


def load(file: str) -> Sweep:
    """Reads a sweep file: a path, or the name of one in experiments/sweeps/."""
    import experiments

    path = Path(file)
    if path.suffix != ".py":
        path = Path(experiments.__path__[0]) / "sweeps" / f"{file}.py"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in (Path(experiments.__path__[0]) / "sweeps").glob("[!_]*.py")))
        raise UserError(f"no sweep file {path}: give a path, or one of experiments/sweeps/: {names}")
    try:
        found = runpy.run_path(str(path))
    except UserError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else "?"
        raise UserError(f"{path}:{line}: {type(error).__name__}: {error}") from error

    def take(name: str, kind: Any, default: Any = None) -> Any:
        if name not in found and default is None:
            raise UserError(f"{path}: has no {name}; a sweep file needs EXPERIMENT, METRIC, and SWEEP or STUDY")
        value = found.get(name, default)
        if not isinstance(value, kind):
            raise UserError(f"{path}: {name} = {value!r}: must be a {kind.__name__}")
        return value

    if ("SWEEP" in found) == ("STUDY" in found):
        raise UserError(f"{path}: needs either SWEEP, a list of overrides, or STUDY, a space to search")
    kind: dict[str, Any]
    if "SWEEP" in found:
        kind = {"grid": tuple(take("SWEEP", list))}
        if not kind["grid"] or not all(isinstance(overrides, dict) for overrides in kind["grid"]):
            raise UserError(f"{path}: SWEEP must hold at least one trial, and each be a dict of overrides")
    else:
        kind = {"space": take("STUDY", dict), "trials": take("TRIALS", int)}
        if not kind["space"] or kind["trials"] < 1:
            raise UserError(f"{path}: STUDY needs at least one field, and TRIALS must be at least 1")
    prune = found.get("PRUNE")
    sweep = Sweep(
        path,
        take("EXPERIMENT", str),
        take("SIZE", str, "quick"),
        take("METRIC", Metric),
        prune=None if prune is None else take("PRUNE", Metric),
        cost=take("COST", str, "seconds"),
        cores=take("CORES", int, 1),
        **kind,
    )
    if sweep.cost not in ("seconds", "steps"):
        raise UserError(f"{path}: COST = {sweep.cost!r}: choose 'seconds' or 'steps'")
    if sweep.prune and not sweep.prune.series:
        raise UserError(f"{path}: PRUNE = {sweep.prune.path}: must be a series, as phase:name")
    return sweep


def trial_name(experiment: str, overrides: Mapping[str, Any]) -> str:
    """A name that depends on nothing but the experiment and the overrides, not even on their order."""
    digest = hashlib.sha256(json.dumps(sorted(arguments(overrides))).encode()).hexdigest()[:10]
    return f"{re.sub('[^a-z0-9]+', '-', experiment.lower()).strip('-')[:29].rstrip('-')}-{digest}"


def make_trial(sweep: Sweep, overrides: Overrides, directory: Path) -> Trial:
    """A trial of a sweep; raises `ConfigError` if its config cannot work."""
    words = arguments(overrides)
    try:
        config = resolve(sweep.experiment, sweep.size, 0, words)
    except ConfigError as error:
        raise ConfigError(f"trial {' '.join(words) or 'without overrides'}: {error}") from error
    spec = RunSpec(
        trial_name(sweep.experiment, overrides),
        sweep.experiment,
        sweep.size,
        overrides=words,
        output=str(directory),
        devices_per_process=sweep.cores,
    )
    return Trial(overrides, spec, config)


def expand(sweep: Sweep, directory: Path) -> list[Trial]:
    """All trials of a grid, validated. Of trials with the same config, which train the same, the first one stays.

    Of a study, whose trials are drawn later: none, but each end of each field is tried on the config.
    """
    for name, spec in sweep.space.items():
        if not isinstance(spec, Distribution):
            raise ConfigError(
                f"STUDY[{name!r}] = {spec!r}: use uniform, log_uniform, integers or choice of launch.study"
            )
        for corner in spec.corners:
            make_trial(sweep, {name: corner}, directory)
    out: dict[Config, Trial] = {}
    for overrides in sweep.grid:
        trial = make_trial(sweep, overrides, directory)
        out.setdefault(trial.config, trial)
    return list(out.values())
