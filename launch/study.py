"""A search instead of a list: an Optuna study that is asked for trials and told what came of them.

A sweep file says where to look, ``STUDY = {"train.dynamics.lr": log_uniform(1e-4, 1e-2), "dynamics.k_max":
choice(4, 8, 16)}``. Optuna is an optional extra and is imported when a study begins.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dreamer4_jax.config import ConfigError, UserError
from launch.algebra import Overrides, plain
from launch.metric import PATIENCE, RIVALS, Curve, Metric, smoothed


@dataclass(frozen=True)
class Distribution:
    """Where the values of one field come from; made by the functions below."""

    kind: Literal["float", "int", "choice"]
    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.kind != "choice" and not self.low <= self.high:
            raise ConfigError(f"distribution from {self.low} to {self.high}: the first must not exceed the second")
        if self.log and self.low <= 0:
            raise ConfigError(f"logarithmic distribution from {self.low}: must begin above 0")
        if self.kind == "choice" and not self.choices:
            raise ConfigError("choice(): needs at least one value")

    @property
    def corners(self) -> tuple[Any, ...]:
        """Its extreme values, or all choices: what is tried on the config before anything starts."""
        return self.choices if self.kind == "choice" else (self.low, self.high)


def uniform(low: float, high: float) -> Distribution:
    """A number in [low, high]."""
    return Distribution("float", low, high)


def log_uniform(low: float, high: float) -> Distribution:
    """A number in [low, high] whose logarithm is uniform."""
    return Distribution("float", low, high, log=True)


def integers(low: int, high: int) -> Distribution:
    """A whole number in [low, high]."""
    return Distribution("int", low, high)


def choice(*choices: Any) -> Distribution:
    """One of some values without order."""
    return Distribution("choice", choices=tuple(plain(c) for c in choices))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError("a STUDY needs Optuna: pip install 'dreamer4_jax[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class Study:
    """An Optuna study in a file, by ask and tell; it survives the death of this process at any point.

    Args:
      space: field -> `Distribution`.
      metric: what is looked for.
      prune: a series to stop bad trials by; None: every trial runs to its end.
      steps: that the series' phase makes in all.
      path: of the SQLite file. (Optuna's journal file is spoiled by a process that dies while it writes.)
      seed: of the sampler. What is asked for follows from it and from what was told so far.
    """

    def __init__(
        self, space: Mapping[str, Distribution], metric: Metric, prune: Metric | None, steps: int, path: Path, seed: int
    ):
        optuna = _optuna()
        self._states = optuna.trial.TrialState
        d = optuna.distributions
        self._space = {
            field: d.CategoricalDistribution(s.choices)
            if s.kind == "choice"
            else {"float": d.FloatDistribution, "int": d.IntDistribution}[s.kind](s.low, s.high, log=s.log)
            for field, s in space.items()
        }
        # constant_liar: trials that are running count as bad, so that parallel ones do not all try the same place
        self._sampler = lambda n: optuna.samplers.TPESampler(seed=seed + n, constant_liar=True)
        pruner = optuna.pruners.MedianPruner(RIVALS, int(PATIENCE * steps)) if prune else optuna.pruners.NopPruner()
        direction = {"min": "minimize", "max": "maximize"}
        self._storage = optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}")
        self._study = optuna.create_study(
            study_name="sweep",
            storage=self._storage,
            pruner=pruner,
            direction=direction[metric.goal],
            load_if_exists=True,
        )
        # Optuna judges a trial's series in the direction of its value.
        self._sign = 1 if prune is None or prune.goal == metric.goal else -1
        self._trial = optuna.trial.Trial
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state == self._states.RUNNING and set(trial.params) != set(space):
                self.tell(trial.number, "failed")  # the process died while this one was being drawn

    def __len__(self) -> int:
        """How many trials were asked for, those apart that were never drawn."""
        return sum(set(t.params) == set(self._space) for t in self._study.get_trials(deepcopy=False))

    def ask(self) -> tuple[int, Overrides]:
        """Number and overrides of a new trial."""
        # A sampler that is seeded once would, after a restart, draw its first trials again.
        self._study.sampler = self._sampler(len(self._study.get_trials(deepcopy=False)))
        trial = self._study.ask(self._space)
        return trial.number, {field: trial.params[field] for field in self._space}

    def running(self) -> dict[int, Overrides]:
        """Trials that were asked for, and of which nothing was told yet."""
        trials = self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,))
        return {t.number: {field: t.params[field] for field in self._space} for t in trials}

    def prune(self, number: int, curve: Curve) -> bool:
        """Reports a trial's series so far; whether the pruner says that it is not worth going on."""
        study = self._storage.get_study_id_from_name("sweep")
        trial = self._trial(self._study, self._storage.get_trial_id_from_study_id_trial_number(study, number))
        known = self._study.get_trials(deepcopy=False)[number].intermediate_values
        for step, _ in curve:
            if step not in known:
                trial.report(self._sign * smoothed(curve, step), step)
        return trial.should_prune()

    def tell(self, number: int, state: Literal["finished", "pruned", "failed"], value: float | None = None) -> None:
        """What came of a trial."""
        states = {"finished": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
        self._study.tell(number, value, state=self._states[states[state]])
