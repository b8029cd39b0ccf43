"""What a trial showed: its metric, its cost, and whether it is worth going on with. Read from its run directory."""

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dreamer4_jax.config import ConfigError, UserError

Curve = list[tuple[int, float]]  # (step, value), ascending

RIVALS = 4  # trials that must have come as far before one is stopped for being worse
PATIENCE = 1 / 3  # share of its steps that a trial may make before it is judged
_PART = re.compile(r"(?:^|\.)([^.\[\]]+)|\[(\w+)=([^\]]+)\]|\[(\d+)\]")


class MetricError(UserError):
    """A finished run does not hold the metric."""


class Value(NamedTuple):
    """A number, with its 95 % interval where the run measured one."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Metric:
    """What a sweep looks for, and which way.

    Attributes:
      path: a place in results.json, ``closed_loop.results[policy=random].success``: dots go into groups, brackets
        choose from a list by a field or by number; an interval counts by its mean. Or a series of metrics.jsonl,
        ``dynamics:loss/dynamics``: phase and name.
      goal: "min" or "max".
    """

    path: str
    goal: Literal["min", "max"]

    def __post_init__(self) -> None:
        if self.goal not in ("min", "max"):
            raise ConfigError(f"metric {self.path}: goal {self.goal!r}: choose 'min' or 'max'")
        if not self.path or (not self.series and "".join(m.group() for m in _PART.finditer(self.path)) != self.path):
            raise ConfigError(
                f"metric {self.path!r}: write a place in results.json as a.b[name=x].c, or a series as phase:name"
            )

    @property
    def series(self) -> bool:
        """Whether it is known while the run goes on."""
        return re.fullmatch(r"\w+:.+", self.path) is not None

    @property
    def phase(self) -> str:
        """The phase of a series."""
        return self.path.partition(":")[0]

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is better than `b`, and not equal."""
        return a < b if self.goal == "min" else a > b

    def curve(self, run_dir: str | Path) -> Curve:
        """A series as far as the run has come; values that were not finite are left out."""
        from dreamer4_jax.training.metrics import read_metrics

        phase, _, name = self.path.partition(":")
        lines = [line for line in read_metrics(run_dir) if line["phase"] == phase]
        return [(line["step"], line[name]) for line in lines if line.get(name) is not None]

    def value(self, run_dir: str | Path) -> Value:
        """The metric of a finished run; a series counts by its last tenth. `MetricError` if there is none."""
        if self.series:
            curve = self.curve(run_dir)
            if not curve:
                raise MetricError(f"metric {self.path}: not in {Path(run_dir) / 'metrics.jsonl'}")
            return Value(smoothed(curve, curve[-1][0]))
        path = Path(run_dir) / "results.json"
        if not path.exists():
            raise MetricError(f"metric {self.path}: there is no {path}")
        return _find(json.loads(path.read_text()), self.path)


def _choices(node: Any, field: str | None) -> str:
    if isinstance(node, dict):
        return f"; choose from {', '.join(node)}"
    if isinstance(node, list) and field:
        return f"; choose from {', '.join(str(item.get(field)) for item in node)}"
    return f"; it has {len(node)} entries" if isinstance(node, list) else f"; it is {node!r}"


def _find(tree: Any, path: str) -> Value:
    """Walks a dotted path; says where it ends and what there is instead."""
    node, done = tree, ""
    for match in _PART.finditer(path):
        name, field, wanted, index = match.groups()
        if name and isinstance(node, dict) and name in node:
            node = node[name]
        elif field and isinstance(node, list) and any(str(item.get(field)) == wanted for item in node):
            node = next(item for item in node if str(item.get(field)) == wanted)
        elif index and isinstance(node, list) and int(index) < len(node):
            node = node[int(index)]
        else:
            raise MetricError(
                f"metric {path}: {done or 'results.json'} has no {match.group()!r}{_choices(node, field)}"
            )
        done += match.group()
    interval = node if isinstance(node, dict) and "mean" in node else {"mean": node}
    mean = interval["mean"]
    if isinstance(mean, bool) or not isinstance(mean, int | float):
        raise MetricError(f"metric {path}: is {json.dumps(mean)[:80]} and no number")
    return Value(float(mean), interval.get("low"), interval.get("high"))


class Cost(NamedTuple):
    """What a run has cost so far, all resumes together."""

    seconds: float
    steps: int


def cost(run_dir: str | Path) -> Cost:
    """Seconds of every stage and phase, and updates of all phases."""
    from dreamer4_jax.training.metrics import read_ledger, read_metrics

    stages = Path(run_dir) / "stages.json"
    seconds = sum(json.loads(stages.read_text()).values()) if stages.exists() else 0.0
    seconds += sum(sum(phase.values()) for phase in read_ledger(run_dir).values())
    last = {line["phase"]: line["step"] for line in read_metrics(run_dir)}
    return Cost(round(seconds, 3), sum(last.values()))


def smoothed(curve: Curve, step: int) -> float:
    """The mean over the last tenth of the steps up to `step`: the loss of one batch says little.

    The curve must have a point there; of a curve with wide gaps, it is the last point before `step`.
    """
    until = [(s, v) for s, v in curve if s <= step]
    return statistics.fmean([v for s, v in until if s > 0.9 * step] or [until[-1][1]])


def below_median(own: Curve, others: Sequence[Curve], metric: Metric, steps: int) -> bool:
    """The median rule: whether a trial is worse than the median of the others that came as far.

    Args:
      own: the trial's series so far.
      others: those of the trials that ended.
      steps: that the trial's phase will make in all; before `PATIENCE` of them nothing is judged.
    """
    if not own or own[-1][0] < PATIENCE * steps:
        return False
    step = own[-1][0]
    rivals = [smoothed(c, step) for c in others if c and c[0][0] <= step <= c[-1][0]]
    return len(rivals) >= RIVALS and metric.better(statistics.median(rivals), smoothed(own, step))
