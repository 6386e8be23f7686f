"""Weighted particles: how many they are worth, which of them go on, and how fast a target is approached.

Log-weights are (G, N), one row for each group; groups never meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .noise import Noise


def ess(logw: Tensor) -> Tensor:
    """(G,) effective number of particles 1 / Σ W², between 1 and N."""
    return 1 / (logw.softmax(1) ** 2).sum(1)


def _invert(weights: Tensor, points: Tensor) -> Tensor:
    """(G, N) first particle whose share of the cumulated weights lies beyond each of the sorted points in (0, 1)."""
    cdf = weights.double().cumsum(1)
    return torch.searchsorted(cdf / cdf[:, -1:], points, right=True).clamp_max(weights.shape[1] - 1)


def multinomial(weights: Tensor, noise: Noise) -> Tensor:
    """N independent draws."""
    return _invert(weights, noise.uniform(weights.shape[1], dtype=torch.float64).sort(1).values)


def stratified(weights: Tensor, noise: Noise) -> Tensor:
    """One draw in each N-th of the cumulated weights."""
    n = weights.shape[1]
    grid = torch.arange(n, dtype=torch.float64, device=weights.device)
    return _invert(weights, (grid + noise.uniform(n, dtype=torch.float64)) / n)


def systematic(weights: Tensor, noise: Noise) -> Tensor:
    """The same with one number for all: a particle of weight W has ⌊NW⌋ or ⌈NW⌉ children."""
    n = weights.shape[1]
    grid = torch.arange(n, dtype=torch.float64, device=weights.device)
    return _invert(weights, (grid + noise.uniform(1, dtype=torch.float64)) / n)


def ssp(weights: Tensor, noise: Noise) -> Tensor:
    """Srinivasan sampling process (Gerber, Chopin and Whiteley 2019): ⌊NW⌋ or ⌈NW⌉ children, in no fixed order.

    The fractional parts of NW meet in pairs.  Of a pair (a, b) one becomes 0 or 1 and the other takes the rest,
    with chances that keep both expectations, and goes on to the next.
    """
    groups, n = weights.shape
    expected = n * weights.double() / weights.double().sum(1, keepdim=True)
    counts = expected.floor()
    part = expected - counts
    u = noise.uniform(n, dtype=torch.float64)
    rows = torch.arange(groups, device=weights.device)
    held = torch.zeros(groups, dtype=torch.long, device=weights.device)
    for j in range(1, n):
        a, b = part[rows, held], part[:, j]
        both = a + b
        over = both >= 1  # one becomes 1, else one becomes 0: the same at a sum of 1, where rounding decides
        chance = torch.where(over, (1 - b) / (2 - both).clamp_min(1e-300), a / both.clamp_min(1e-300))
        first = u[:, j] < chance  # a becomes 1, or is not the one that becomes 0
        counts[rows, held] += (over & first).to(counts)
        counts[:, j] += (over & ~first).to(counts)
        held = torch.where(over == first, j, held)
        part[rows, held] = both - over.to(both)
    counts[rows, held] += n - counts.sum(1)  # the last part is 0 or 1 up to rounding
    place = torch.arange(n, dtype=torch.float64, device=weights.device).expand(groups, n) + 0.5
    return torch.searchsorted(counts.cumsum(1), place.contiguous(), right=True)


RESAMPLERS: dict[str, Callable[[Tensor, Noise], Tensor]] = {
    "multinomial": multinomial,
    "systematic": systematic,
    "stratified": stratified,
    "ssp": ssp,
}
"""(weights (G, N), streams (G,)) -> (G, N) ancestors in ascending order, each particle N W times on average."""


@dataclass(frozen=True)
class Tempering:
    """The share λ_i of the look-ahead value that is trusted at x_i; λ_0 = 1, so that the end is exact in any case."""

    kind: Literal["none", "exp", "discount", "adaptive"] = "none"
    """All of it; (1 + γ)^(T−i) − 1, at most 1 (DAS); γ^i (DAV's discount); the most that leaves enough particles."""
    gamma: float | None = None
    """γ; None for `exp` reaches 1 after 87 % of the steps, as DAS's 0.008 does in 100."""
    level: float = 0.5
    """Effective share of particles that `adaptive` goes down to."""

    def share(self, i: int, steps: int) -> float:
        """λ_i of a fixed schedule; for `adaptive` its start, 0."""
        if i == 0 or self.kind == "none":
            return 1.0
        if self.kind == "adaptive":
            return 0.0
        if self.kind == "discount":
            return float((1.0 if self.gamma is None else self.gamma) ** i)
        gamma = 2 ** (1 / max(0.87 * steps, 1)) - 1 if self.gamma is None else self.gamma
        return min((1 + gamma) ** (steps - i) - 1, 1.0)

    def solve(self, share: Tensor, logw: Tensor, gain: Tensor) -> Tensor:
        """(G,) the largest λ in [share, 1] at which exp(logw + λ gain) is worth `level` of all particles.

        By bisection; the upper end of the last bracket is taken, so that resampling at the same level follows.
        Groups already below keep their `share` (G,).
        """
        least = self.level * logw.shape[1]

        def enough(lam: Tensor) -> Tensor:
            return ess(logw + lam[:, None] * gain) >= least

        low, high = share, torch.ones_like(share)
        done, stuck = enough(high), ~enough(low)
        for _ in range(50):
            middle = (low + high) / 2
            fits = enough(middle)
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return torch.where(done, torch.ones_like(share), torch.where(stuck, share, high))


@dataclass(frozen=True)
class Potential:
    """Feynman-Kac potentials: what a particle is weighted by at each look-ahead value it meets (FK steering).

    With s = λ / α: `diff` gives s V minus all that was given before, so a particle stands at exp(s V); `rt` gives
    s V each time, `max` s times the largest V so far, `add` s times their sum.  The last one is r / α minus all
    that was given before for every kind, so their product along a path is exp(r(x_0) / α).
    """

    kind: Literal["diff", "max", "add", "rt"] = "diff"
    terminal: Literal["exact", "release"] = "exact"
    """The release takes the largest or the sum of all values in place of r(x_0), which is another target."""
    floor: float | None = None
    """Value that the running maximum starts from (release: 0)."""
    clamp: float | None = None
    """Largest potential (release: 1e10, where selection ends)."""

    def start(self, base: Tensor) -> Tensor:
        """Running statistic before the first value; values are counted from `base`."""
        if self.kind != "max":
            return torch.zeros_like(base)
        return torch.full_like(base, -math.inf) if self.floor is None else self.floor - base

    def follow(self, run: Tensor, value: Tensor) -> Tensor:
        """The running statistic with one more value."""
        if self.kind == "max":
            return torch.maximum(run, value)
        return run + value if self.kind == "add" else value

    def log(self, run: Tensor, value: Tensor, given: Tensor, scale: Tensor, last: bool) -> Tensor:
        """Log-potential of a particle whose statistic `run` holds `value`, and that was `given` that much before."""
        if last:
            out = scale * (run if self.terminal == "release" else value) - given
        else:
            out = scale * run - (given if self.kind == "diff" else 0)
        return out if self.clamp is None else out.clamp_max(math.log(self.clamp))


@dataclass(frozen=True)
class Interval:
    """Where look-ahead values are taken, as shares of the steps; x_0 is always weighed."""

    start: float = 0.0
    end: float = 1.0
    every: float = 0.0
    """0 is every step."""

    def __call__(self, steps: int) -> frozenset[int]:
        """Grid indices i = T … 1 of the states that are weighed."""
        gap = max(self.every * steps, 1.0)
        first, last = self.start * steps, self.end * steps
        count = math.floor((last - first) / gap + 1e-9) + 1
        return frozenset(i for j in range(count) if (i := steps - round(first + j * gap)) > 0)
