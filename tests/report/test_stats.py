"""Intervals over seeds: against scipy, and by their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as reference

from dav_bench.report.stats import interval, per_seed, reduced, scaled


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_the_interval_is_that_of_scipy(n: int, confidence: float) -> None:
    x = np.random.default_rng(n).normal(3, 2, n)
    found = interval(x, confidence)
    low, high = reference.t.interval(confidence, n - 1, loc=x.mean(), scale=reference.sem(x))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    assert found.mean == pytest.approx(x.mean()) and found.n == n


@pytest.mark.parametrize("n", [3, 10])
def test_the_interval_covers_as_often_as_it_says(n: int) -> None:
    rng = np.random.default_rng(0)
    hits = [(i := interval(rng.normal(1, 5, n))).low <= 1 <= i.high for _ in range(4000)]  # type: ignore[operator]
    assert 0.94 < np.mean(hits) < 0.96


def test_one_seed_has_no_interval() -> None:
    found = interval([2.5])
    assert (found.mean, found.half, found.low, found.high, found.n) == (2.5, None, None, None, 1)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        interval([])
    with pytest.raises(ValueError, match="between 0 and 1"):
        interval([1, 2], 95)
    with pytest.raises(ValueError, match="neither"):
        reduced([1], "max")


def test_samples_are_reduced_within_their_seed_first() -> None:
    """Ten samples of one seed are not ten seeds."""
    samples = {1: [0, 0, 9], 0: [1, 2, 3, 4]}
    assert per_seed(samples, "median") == [2.5, 0.0]
    assert per_seed(samples, "mean") == [2.5, 3.0]
    assert interval(per_seed(samples, "median")).n == 2


def test_a_nan_shows() -> None:
    assert math.isnan(reduced([1, math.nan], "mean")) and math.isnan(reduced([1, math.nan, 2], "median"))
    assert math.isnan(reduced([], "median"))


def test_the_scale_puts_real_elements_at_zero_and_one() -> None:
    assert (scaled(0.5, 0.5, 2.5), scaled(2.5, 0.5, 2.5), scaled(6.5, 0.5, 2.5)) == (0, 1, 3)
