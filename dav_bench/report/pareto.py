"""Which rows are beaten: Pareto layers, hypervolume, and ranks that are intervals.

Points are rows of an (n, d) array in which larger is better in every objective. A point dominates another if it is at
least as good in all objectives and better in one; equal points do not dominate each other, so ties stay ties.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import ndtri

DRAWS = 10_000
"""Draws of the bootstrap over seeds."""
SEEDS = 3
"""Fewer seeds give no rank."""


def dominates(points: np.ndarray) -> np.ndarray:
    """(n, n) booleans: whether point i dominates point j."""
    x = np.asarray(points, dtype=np.float64)
    least = np.all(x[:, None] >= x[None], axis=-1)
    return np.logical_and(least, np.any(x[:, None] > x[None], axis=-1))


def layers(points: np.ndarray) -> list[int]:
    """Layer of each point: 1 for those that no point dominates, 2 for those that only layer 1 does, and so on."""
    beats = dominates(points)
    found = np.zeros(len(beats), dtype=np.int64)
    layer = 0
    while (left := found == 0).any():
        layer += 1
        found[left & ~beats[left].any(0)] = layer
    return found.tolist()


def volume(points: np.ndarray, reference: Sequence[float] | np.ndarray) -> float:
    """Hypervolume: size of what the points dominate above the reference point, in the product of the units.

    Exact, by slices along the last objective; points that do not exceed the reference add nothing.
    """
    x = np.asarray(points, dtype=np.float64).reshape(-1, len(reference)) - np.asarray(reference, np.float64)
    x = x[(x > 0).all(-1)]
    if not len(x):
        return 0.0
    if x.shape[1] == 1:
        return float(x.max())
    x = x[np.argsort(-x[:, -1], kind="stable")]
    floors = np.append(x[1:, -1], 0.0)
    origin = [0.0] * (x.shape[1] - 1)
    slices = ((x[i, -1] - floors[i], x[: i + 1, :-1]) for i in range(len(x)))
    return float(sum(high * volume(part, origin) for high, part in slices if high > 0))


def box(point: Sequence[float] | np.ndarray, reference: Sequence[float] | np.ndarray) -> float:
    """Hypervolume of one point, whatever stands beside it."""
    return volume(np.asarray(point, dtype=np.float64)[None], reference)


def ranks(
    seeds: Sequence[np.ndarray], keys: Sequence[str] = (), draws: int = DRAWS, confidence: float = 0.95
) -> list[tuple[int, int]]:
    """Interval of the rank of each row: 1 + number of rows that dominate it.

    A point estimate of a rank says nothing about noise, and percentiles of bootstrapped ranks miss it where rows are
    close. So the bootstrap bounds differences (Mogstad, Romano, Shaikh & Wilhelm, "Inference for ranks", 2024): row j
    surely beats row i in an objective if t_ij = (m_j - m_i) / sqrt(s_i^2 / n_i + s_j^2 / n_j) exceeds c_i, the
    `confidence` quantile of the largest |t_ij| over all j and objectives where all means are equal. Then

        low  = 1 + rows that surely beat i in every objective
        high = 1 + rows that i does not surely beat in any objective.

    Differences that are settled leave the maximum, and c_i falls, until nothing more is settled (Romano & Wolf 2005).
    The bootstrap over seeds is parametric (Krishnamoorthy, Lu & Mathew 2007): it draws n_i seeds for each row from a
    normal law with the covariance of its seeds, and takes their means and variances. Resampling 3 seeds with
    replacement has a third less variance and no tails. Rows count as independent; those that share evaluation noise are
    positively correlated, which makes the intervals wider than need be, never too short.

    Args:
        seeds: For each row an (n_i, d) array, one line per seed, larger is better; n_i >= 2.
        keys: A name for each row, which its stream of random numbers depends on alone: the same rows give the same
            ranks on every machine and in every order. Their places without.
        draws: Draws of the bootstrap.
        confidence: Chance that the interval of one row holds its rank.
    """
    x = [np.asarray(part, dtype=np.float64) for part in seeds]
    if any(part.ndim != 2 or len(part) < 2 for part in x):
        raise ValueError("a rank needs (n, d) values with at least two seeds in each row")
    if len(x) < 2:
        return [(1, 1)] * len(x)
    names = keys or [str(i) for i in range(len(x))]
    drawn = [_draw(*pair, draws) for pair in zip(x, names, strict=True)]
    means, errors = (np.stack(parts) for parts in zip(*map(_moments, x), strict=True))  # (k, d)
    m, v = (np.stack(parts, axis=-1).T for parts in zip(*map(_moments, drawn), strict=True))  # (k, d, draws)
    m, v = np.ascontiguousarray(m), np.ascontiguousarray(v)
    found = []
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        t = _ratio(
            means[others] - means[i], errors[others] + errors[i]
        )  # (k - 1, d): above 0 where j is better
        null = np.abs(_ratio(m[others] - m[i], v[others] + v[i]))
        sure = np.zeros(t.shape, dtype=bool)
        while not sure.all():
            more = ~sure & (np.abs(t) > np.quantile(null[~sure].max(0), confidence))
            if not more.any():
                break
            sure |= more
        low = int((sure & (t > 0)).all(1).sum())
        high = int((~(sure & (t < 0)).any(1)).sum())
        found.append((1 + low, 1 + high))
    return found


def _ratio(difference: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Difference in standard errors; infinite where there is no spread at all, 0 where there is no difference."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / np.sqrt(variance))


def _moments(seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds and the variance of that mean, of (..., n, d) values."""
    return seeds.mean(-2), seeds.var(-2, ddof=1) / seeds.shape[-2]


def _draw(seeds: np.ndarray, key: str, draws: int) -> np.ndarray:
    """(draws, n, d) normal values with mean 0 and the covariance of (n, d) values."""
    n = len(seeds)
    root = np.linalg.qr(seeds - seeds.mean(0), mode="r")  # root.T @ root = (n - 1) covariance
    root = np.where(np.diag(root) < 0, -1.0, 1.0)[:, None] * root / np.sqrt(n - 1)
    words = np.frombuffer(random.Random(f"rank {key}").randbytes(8 * draws * n * len(root)), dtype="<u8")
    normal = ndtri(((words >> np.uint64(11)) + 0.5) / 2.0**53)  # the same on all versions of Python and numpy
    return normal.reshape(draws, n, len(root)) @ root


def reference_point(
    by: Sequence[tuple[str, str, str]], stated: Mapping[str, float], pretrained: Mapping[str, float]
) -> dict[str, float]:
    """Where the hypervolume begins: what the task states, else 0 for diversity and `pretrained` for the rest.

    Args:
        by: (name, role, better) of each objective.
        stated: `[rank] reference` of the task.
        pretrained: Values of the row `pretrained`.

    Returns:
        Value by name; without those that nothing gives.
    """
    found = {}
    for name, role, _ in by:
        if name in stated:
            found[name] = float(stated[name])
        elif role == "diversity":
            found[name] = 0.0
        elif name in pretrained:
            found[name] = float(pretrained[name])
    return found
