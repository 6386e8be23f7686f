"""Intervals over training seeds: the seed is the unit of replication, samples are nested in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
"""Coverage of the intervals on every board."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with the half-width of its Student t interval."""

    mean: float
    """Mean over seeds."""
    half: float | None
    """t(n-1, (1+confidence)/2) * s / sqrt(n); None for a single seed, which says nothing about its spread."""
    n: int
    """Number of seeds."""

    @property
    def low(self) -> float | None:
        """Lower end, None for a single seed."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """Upper end, None for a single seed."""
        return None if self.half is None else self.mean + self.half


def interval(values: Iterable[float], confidence: float = CONFIDENCE) -> Interval:
    """Student t interval of the mean of one value per seed (covers .94 to .96 from 3 to 10 seeds).

    Args:
        values: One number per seed: a mean or median over its samples, or a metric of the whole set.
        confidence: Coverage, between 0 and 1.
    """
    x = np.asarray(list(values), dtype=np.float64)
    if x.size == 0:
        raise ValueError("an interval needs at least one seed")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, None, 1)
    t = float(stdtrit(x.size - 1, (1 + confidence) / 2))
    return Interval(mean, t * float(x.std(ddof=1)) / math.sqrt(x.size), int(x.size))


def reduced(values: Iterable[float], how: str) -> float:
    """The median or the mean of per-sample values; NaN where any of them is, so that trouble shows."""
    x = np.asarray(list(values), dtype=np.float64)
    if how not in ("median", "mean"):
        raise ValueError(f"{how!r} is neither median nor mean")
    if x.size == 0:
        return math.nan
    return float(np.median(x) if how == "median" else x.mean())


def per_seed(samples: Mapping[int, Iterable[float]], how: str) -> list[float]:
    """One number per seed from per-sample values, in the order of the seeds; feed it to `interval`."""
    return [reduced(samples[seed], how) for seed in sorted(samples)]


def scaled(value: float, median: float, q90: float) -> float:
    """A reward on the scale of real elements: 0 is their median, 1 their 90th percentile."""
    return (value - median) / (q90 - median)


EXACT = 20
"""Most pairs whose sign flips are all tried; beyond, so many random ones that a small p is off by 0.001."""


def flip(differences: Iterable[float]) -> float:
    """Two-sided p of paired differences by the exact sign-flip test.

    Where A and B are the same, each difference is as likely as its negative: p is the share of all 2^n sign patterns
    whose sum lies at least as far from 0 as the one seen. It cannot go below 2 / 2^n.

    Args:
        differences: One for each pair of seeds.

    Returns:
        p in (0, 1]; NaN where a difference is.
    """
    signed = np.asarray(list(differences), dtype=np.float64)
    x = np.abs(signed)
    if not np.isfinite(x).all() or x.size == 0:
        return math.nan
    if x.size <= EXACT:
        sums = np.zeros(1)
        for value in x:
            sums = np.concatenate([sums + value, sums - value])
    else:
        signs = np.random.default_rng(0).integers(0, 2, (2**16, x.size)) * 2 - 1
        sums = np.append(signs @ x, signed.sum())
    seen = abs(float(signed.sum()))
    return float(
        np.mean(np.abs(sums) >= seen - 1e-9 * float(x.sum()))
    )  # equal sums differ in their last digits


def holm(p: Iterable[float]) -> list[float]:
    """Holm's step-down correction: the chance of any false finding among all tests stays below the level.

    Args:
        p: One for each test; NaN is no test and stays.

    Returns:
        Corrected values in the same order, at most 1.
    """
    x = np.asarray(list(p), dtype=np.float64)
    found, largest = np.full(x.size, math.nan), 0.0
    order = [i for i in np.argsort(x, kind="stable") if not math.isnan(x[i])]
    for step, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - step) * float(x[i])))
        found[i] = largest
    return found.tolist()
