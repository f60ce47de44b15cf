"""Prediction intervals of rows that were left out: by hand."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

ANALYSIS = Path(__file__).parents[2] / "analysis"


@pytest.fixture
def residuals(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ANALYSIS))
    yield importlib.import_module("residuals")
    sys.modules.pop("residuals", None)


def test_the_correlation_of_two_pairs_by_hand(residuals: ModuleType) -> None:
    """Squares within 0.5 + 0.5 of 2 degrees, between 2 · (2² + 2²) of 1: (16 - 0.5) / (16 + 0.5)."""
    values, groups = pd.Series([0.0, 1.0, 4.0, 5.0]), pd.Series(list("aabb"))
    assert residuals.correlation(values, groups) == pytest.approx(15.5 / 16.5)


def test_the_correlation_of_groups_of_unlike_size_by_hand(residuals: ModuleType) -> None:
    """Means 1, 5 of 1 and 3 values, of all 4: within 2 of 2 degrees, between 9 + 3; a usual size of 4 - 10 / 4."""
    values, groups = pd.Series([1.0, 4.0, 5.0, 6.0]), pd.Series(list("abbb"))
    assert residuals.correlation(values, groups) == pytest.approx((12 - 1) / (12 + 0.5 * 1))


def test_rows_of_a_group_that_differ_as_all_do_are_not_alike(residuals: ModuleType) -> None:
    values = pd.Series([-1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    assert residuals.correlation(values, pd.Series(list("aabbcc"))) == 0.0


@pytest.mark.parametrize("groups", ["abcd", "aaaa"])
def test_rows_that_cannot_tell_count_as_alike(residuals: ModuleType, groups: str) -> None:
    assert residuals.correlation(pd.Series([0.0, 1.0, 2.0, 3.0]), pd.Series(list(groups))) == 1.0


def test_equal_residuals_have_an_interval_of_no_width(residuals: ModuleType) -> None:
    values, groups = pd.Series([0.5] * 4), pd.Series(list("aabb"))
    assert residuals.correlation(values, groups) == 1.0
    assert residuals.ends(values, groups) == (0.0, 0.5)


@pytest.mark.parametrize(("alike", "count"), [(1.0, 20), (0.0, 100), (0.25, 20 * 5 / 2)])
def test_how_alike_rows_of_a_group_are_says_how_much_they_count(
    residuals: ModuleType, alike: float, count: float
) -> None:
    """20 groups of 5 rows, evenly spread over -1..1: between 10 and 90 % are 0.8 of it, half of that on either side."""
    values = pd.Series(np.linspace(-1, 1, 100))
    groups = pd.Series(np.tile(np.arange(20), 5))
    low, high = residuals.ends(values, groups, alike=alike)
    ends = np.interp([0.1, 0.9], (np.arange(100) + 0.5) / 100, values)
    expected = student.ppf(0.95, count - 1) / 1.2815516 * math.sqrt(1 + 1 / count) * ends
    assert (low, high) == pytest.approx(expected, abs=6e-3)  # of three digits


def test_a_group_of_many_alike_rows_counts_once(residuals: ModuleType) -> None:
    """99 rows at 1 and one group each at 0, 0.25, 0.5 and 0.75: their order decides, not their number."""
    values = pd.Series([1.0] * 99 + [0.0, 0.25, 0.5, 0.75])
    groups = pd.Series(["many"] * 99 + list("abcd"))
    once = residuals.ends(pd.Series([1.0, 0.0, 0.25, 0.5, 0.75]), pd.Series(list("eabcd")))
    many = residuals.ends(values, groups)
    assert many[0] == pytest.approx(once[0], abs=0.15)
    assert residuals.ends(values, groups, alike=0.0)[0] == 0.0  # nearly every row is at 1: the middle 80 % has no width
