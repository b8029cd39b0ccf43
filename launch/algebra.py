"""The algebra of sweeps: a sweep is a finite, ordered list of overrides, and these functions make bigger ones of it.

::

    product(values("train.dynamics.lr", 1e-3, 3e-3), values("dynamics.k_max", 4, 8))   # four trials
    zipped(values("tokenizer.latents", 64, 256), values("tokenizer.patch", 8, 4))      # two
    chain([{}], values("dynamics.objective", "diffusion"))                             # the default, and one other
    subsample(product(...), 10, seed=0)                                                # ten of many

Overrides are flat, ``{"train.dynamics.lr": 3e-3}``. Duplicates are removed, the first one stays: a trial that is asked
for twice is still one trial. Two parts of one trial that set the same field are a mistake and raise `ConfigError`.
"""

import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dreamer4_jax.config import ConfigError

Overrides = dict[str, Any]
Sweep = list[Overrides]


def plain(value: Any) -> Any:
    """A value as Python's own type: NumPy's numbers (of ``np.logspace``, say) unpacked, tuples as lists."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"{value!r}: is no value of a config field; use numbers, text, true or false, and lists of these")


def arguments(overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """Overrides as words of the command line, ``("train.dynamics.lr=0.003",)``."""

    def text(value: Any) -> str:
        value = plain(value)
        if isinstance(value, str):
            return value
        # repr gives a float back exactly; lists and true/false are written as in JSON
        return json.dumps(value) if isinstance(value, bool | list) else repr(value)

    return tuple(f"{field}={text(value)}" for field, value in overrides.items())


def _distinct(trials: Iterable[Overrides]) -> Sweep:
    out: dict[Any, Overrides] = {}
    for trial in trials:
        # By their text, since Python takes 1, 1.0 and True for equal; in any order of the fields.
        out.setdefault(tuple(sorted(arguments(trial))), trial)
    return list(out.values())


def _merged(parts: Sequence[Overrides]) -> Overrides:
    out: Overrides = {}
    for part in parts:
        for field in part:
            if field in out:
                raise ConfigError(f"sweep: {field} is set twice in one trial, to {out[field]!r} and {part[field]!r}")
        out |= part
    return out


def values(field: str, *vals: Any) -> Sweep:
    """One trial for each value of a field."""
    return _distinct({field: plain(v)} for v in vals)


def product(*sweeps: Sweep) -> Sweep:
    """Every combination, the last sweep varying fastest. Of no sweeps: one trial without overrides."""
    return _distinct(_merged(parts) for parts in itertools.product(*sweeps))


def zipped(*sweeps: Sweep) -> Sweep:
    """The first trials of all sweeps joined into one, then the second ones, ...; all must be equally long."""
    if len({len(s) for s in sweeps}) > 1:
        raise ConfigError(f"zipped: the sweeps have {', '.join(str(len(s)) for s in sweeps)} trials; make them equal")
    return _distinct(_merged(parts) for parts in zip(*sweeps, strict=True))


def chain(*sweeps: Sweep) -> Sweep:
    """The trials of one sweep after the other."""
    return _distinct(itertools.chain(*sweeps))


def subsample(sweep: Sweep, n: int, seed: int) -> Sweep:
    """`n` trials drawn without replacement, in their old order; the same ones for the same seed."""
    if not 0 <= n <= len(sweep):
        raise ConfigError(f"subsample: n = {n}: the sweep has {len(sweep)} trials")
    return [sweep[i] for i in sorted(random.Random(seed).sample(range(len(sweep)), n))]
