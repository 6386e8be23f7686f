"""Learning curves over cost, so that methods whose rounds differ can be compared, and what training overdoes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from dav_bench.report.stats import interval

if TYPE_CHECKING:
    import polars as pl

    from dav_bench.store import RunDir

Split: TypeAlias = Literal["train", "eval", "final"]
Over: TypeAlias = Literal["cost", "reward_rows", "seconds"]

POINTS = 200
"""Most rounds of one curve that a row keeps, evenly spaced with the first and the last."""


@dataclass(frozen=True)
class Curve:
    """One metric of one run, round by round."""

    split: str
    """train: what the search of the round found; eval: the evaluation samples every `eval.every` rounds."""
    metric: str
    """Such as reward, the median training reward."""
    round: np.ndarray
    """(n,) rounds."""
    cost: np.ndarray
    """(n,) network rows that training had spent by then, forward + 2 x backward."""
    reward_rows: np.ndarray
    """(n,) reward rows, counted alike."""
    value: np.ndarray
    """(n,) values."""

    def over(self, name: str) -> np.ndarray:
        """What had been spent: `cost` or `reward_rows`."""
        return self.cost if name == "cost" else self.reward_rows


def curve(
    run: RunDir, metric: str = "reward", split: Split = "train", over: Over = "cost"
) -> list[tuple[float, float]]:
    """(what training had spent, value) for each round of a run that recorded the metric, in order.

    Args:
        run: Any run, finished or not.
        metric: Such as `reward`, the median training reward.
        split: `train` is what the search of the round found, `eval` the evaluation samples every `eval.every`
            rounds, `final` the samples at the end.
        over: Network rows (`cost`) or reward rows, forward + 2 x backward, or seconds of search and fit.
    """
    rows = run.metrics().select("round", "split", "metric", over, "value").rows()
    return [(spent, value) for _, s, m, spent, value in sorted(rows) if (s, m) == (split, metric)]


def curves_of(metrics: pl.DataFrame, names: Collection[str]) -> tuple[Curve, ...]:
    """The curves that a row keeps: metrics of the final samples that were also measured on the way.

    Args:
        metrics: metrics.parquet of a run.
        names: Names of the metrics to keep; losses and gradients are of no use to a board.
    """
    columns = ("split", "metric", "round", "cost", "reward_rows", "value")
    held: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for split, metric, *point in metrics.select(columns).rows():
        if split in ("train", "eval") and metric in names:
            held.setdefault((split, metric), []).append(tuple(point))
    return tuple(_curve(*key, sorted(points)) for key, points in sorted(held.items()))


def _curve(split: str, metric: str, points: Sequence[tuple[float, ...]]) -> Curve:
    kept = np.unique(np.linspace(0, len(points) - 1, min(len(points), POINTS)).round().astype(int))
    rounds, cost, reward_rows, value = np.array([points[i] for i in kept], dtype=np.float64).T
    return Curve(split, metric, rounds.astype(np.int64), cost, reward_rows, value)


def band(
    curves: Sequence[Curve], over: str = "cost", points: int = 60
) -> list[tuple[float, float, float | None, float | None, int]]:
    """Mean and Student t interval over seeds along the cost: (spent, mean, low, high, seeds).

    Seeds whose rounds cost differently are interpolated linearly, and compared only where all of them have been:
    from the latest first round to the earliest last one.

    Args:
        curves: The same metric of each seed.
        over: `cost` or `reward_rows`.
        points: Most points of the band.
    """
    spent = [c.over(over) for c in curves]
    first, last = max(s[0] for s in spent), min(s[-1] for s in spent)
    if last < first:
        return []
    grid = np.unique(np.concatenate(spent))
    grid = grid[(grid >= first) & (grid <= last)]
    if len(grid) > points:
        grid = np.linspace(first, last, points)
    seeds = np.stack([np.interp(grid, s, c.value) for s, c in zip(spent, curves, strict=True)])
    found = []
    for at, values in zip(grid, seeds.T, strict=True):
        whole = interval(values)
        found.append((float(at), whole.mean, whole.low, whole.high, whole.n))
    return found


def find_curve(curves: Iterable[Curve], metric: str, split: str) -> Curve | None:
    """The curve of a metric in a split, if it was recorded."""
    return next((c for c in curves if (c.metric, c.split) == (metric, split)), None)


def overdone(
    start: Mapping[str, float], end: Mapping[str, float], heldout: Sequence[float] = ()
) -> dict[str, float]:
    """Over-optimisation of one run: how much of what the training reward gained the held-out reward shows as well.

    All rewards are on the scale of real elements (`stats.scaled`: 0 their median, 1 their 90th percentile).

        train gain   = train(end) - train(pretrained)
        heldout gain = held-out(end) - held-out(pretrained)
        transfer     = heldout gain / train gain, where the training reward grew: 1 all of it, 0 nothing, < 0 harm
        peak loss    = largest held-out reward on the way - held-out(end), where it was measured on the way

    Gap(end) - gap(pretrained) is train gain - heldout gain.

    Args:
        start: `train` and `heldout` of the pretrained model.
        end: The same of the final samples.
        heldout: Held-out rewards of the evaluations on the way.
    """
    train, held = (end[role] - start[role] for role in ("train", "heldout"))
    found = {"train gain": train, "heldout gain": held}
    if train > 0:
        found["transfer"] = held / train
    if len(heldout):
        found["peak loss"] = max(0.0, float(np.max(heldout)) - end["heldout"])
    return found
