"""The algebra of sweeps against itertools."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamer4_jax.config import ConfigError
from launch.algebra import arguments, chain, product, subsample, values, zipped

numbers = st.lists(st.integers(-3, 3), max_size=5)


def sweeps(fields):
    """Lists of distinct trials over some fields, in which a trial may leave fields out."""
    trial = st.dictionaries(st.sampled_from(fields), st.integers(0, 2))
    return st.lists(trial, max_size=5, unique_by=lambda t: tuple(sorted(t.items())))


@given(numbers)
def test_values_are_distinct_in_order(xs):
    assert values("a", *xs) == [{"a": x} for x in dict.fromkeys(xs)]


@given(sweeps("ab"), sweeps("cd"), sweeps("e"))
def test_product(first, second, third):
    parts = (first, second, third)
    found = product(*parts)
    assert found == [dict(kv for part in row for kv in part.items()) for row in itertools.product(*parts)]
    assert len(found) == len(parts[0]) * len(parts[1]) * len(parts[2])


@given(sweeps("ab"), sweeps("bc"))
def test_a_field_that_is_set_twice_is_refused(first, second):
    if any(set(a) & set(b) for a in first for b in second):
        with pytest.raises(ConfigError, match="set twice"):
            product(first, second)
    else:
        assert len(product(first, second)) <= len(first) * len(second)


@given(sweeps("ab"), sweeps("cd"))
def test_zipped(first, second):
    if len(first) == len(second):
        assert zipped(first, second) == [a | b for a, b in zip(first, second, strict=True)]
    else:
        with pytest.raises(ConfigError, match=f"{len(first)}, {len(second)} trials"):
            zipped(first, second)


@given(st.lists(sweeps("ab"), max_size=3))
def test_chain_keeps_the_first_of_equal_trials(parts):
    expected = []
    for trial in itertools.chain(*parts):
        if trial not in expected:
            expected.append(trial)
    assert chain(*parts) == expected


@given(sweeps("abc"), st.integers(0, 6), st.integers(0, 5))
def test_subsample(sweep, n, seed):
    if n > len(sweep):
        with pytest.raises(ConfigError, match=f"has {len(sweep)} trials"):
            subsample(sweep, n, seed)
        return
    found = subsample(sweep, n, seed)
    assert len(found) == n and found == subsample(sweep, n, seed)
    assert any(list(kept) == found for kept in itertools.combinations(sweep, n))


def test_the_neutral_elements():
    some = values("a", 1, 2)
    assert product() == [{}] and zipped() == [] and chain() == []
    assert product(some) == zipped(some) == chain(some) == some and product(some, []) == []
    assert len({str(subsample(values("a", *range(50)), 5, seed)) for seed in range(5)}) > 1


def test_values_become_words():
    overrides = {"i": 1, "f": 1.0, "t": True, "s": "a b", "l": ("x", "y"), "n": np.float64(0.1), "m": np.int64(3)}
    assert arguments(overrides) == ("i=1", "f=1.0", "t=true", "s=a b", 'l=["x", "y"]', "n=0.1", "m=3")
    assert len(values("a", 1, 1.0, True, "1")) == 3  # a field reads 1 and "1" alike
    with pytest.raises(ConfigError, match="no value of a config field"):
        values("a", None)
