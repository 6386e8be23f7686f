"""Two rows of a board against each other, paired by seed: difference, interval, p, and a sentence for a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dav_bench.errors import DavBenchError
from dav_bench.report.board import costs, trained, values
from dav_bench.report.formats import amount, number
from dav_bench.report.order import FIRST
from dav_bench.report.rows import Row
from dav_bench.report.stats import CONFIDENCE, Interval, flip, holm, interval
from dav_bench.report.terms import Column, Terms

P_SEEDS = 6
"""Fewer pairs give no p: the exact test of 5 cannot go below 2 / 2^5 = 0.06."""


@dataclass(frozen=True)
class Difference:
    """One metric of two rows."""

    column: Column
    """What was measured."""
    a: float
    """Mean of A over the seeds that were paired."""
    b: float
    """Mean of B."""
    paired: Interval
    """Of A - B over pairs of seeds."""
    wins: Interval | None
    """Share of evaluation noises whose sample is better under A (ties are half), over seeds; None for set metrics,
    and where the two did not draw from the same noise."""
    p: float | None = None
    """Two-sided, exact sign-flip test over pairs; None below `P_SEEDS` pairs."""
    holm: float | None = None
    """p after Holm's correction over all metrics compared."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    a: str
    """Name of the first row."""
    b: str
    """Name of the second."""
    seeds: tuple[int, ...]
    """Seeds that were paired."""
    lines: tuple[Difference, ...]
    """One for each metric, in the order of the board."""
    main: Difference
    """The metric the sentence is about."""
    sentence: str
    """What a paper could say."""
    notes: tuple[str, ...]
    """What it rests on: pairs, costs, correction."""


def compare(
    a: Sequence[Row],
    b: Sequence[Row],
    terms: Terms,
    columns: Sequence[Column],
    names: tuple[str, str] = ("", ""),
    metric: str | None = None,
) -> Comparison:
    """Compare two rows under the same terms.

    A row that trains nothing and was run once, such as `pretrained`, counts as fixed and stands against every seed of
    the other.

    Args:
        a: Runs of the first row, one per seed.
        b: Runs of the second.
        terms: Those of their board.
        columns: The board's; costs are told in the notes and not tested.
        names: What to call the rows; their labels without.
        metric: What the sentence is about; None is the first that the task ranks by, or else the held-out reward.

    Raises:
        DavBenchError: no seed is common to both, or nothing was measured in both.
    """
    names = (names[0] or a[0].label, names[1] or b[0].label)
    pairs, left, fixed = _pairs(a, b, names)
    numbers = [(values(x, terms), values(y, terms)) for x, y in pairs]
    held = [c for c in columns if c.role != "cost" and all(c.name in x and c.name in y for x, y in numbers)]
    if not held:
        raise DavBenchError(f"{names[0]} and {names[1]} have no metric in common.")
    found = [_difference(c, numbers, pairs) for c in held]
    if len(pairs) >= P_SEEDS:
        found = _tested(found, numbers)
    main = _main(found, terms, metric)
    sentence = _sentence(names, main, len(pairs), len(found), a[0], terms, fixed)
    notes = _notes(names, pairs, left, fixed, len(found))
    seeds = tuple((y if fixed == names[0] else x).seed for x, y in pairs)
    return Comparison(*names, seeds, tuple(found), main, sentence, notes)


def _pairs(
    a: Sequence[Row], b: Sequence[Row], names: tuple[str, str]
) -> tuple[list[tuple[Row, Row]], list[str], str]:
    """Runs side by side, what was left out, and the name of the row that counts as fixed."""
    mine, theirs = ({row.seed: row for row in rows} for rows in (a, b))
    alone = [len(rows) == 1 and not trained(next(iter(rows.values()))) for rows in (mine, theirs)]
    if alone[1] and (not alone[0] or names[1] in FIRST):
        one = next(iter(theirs.values()))
        return [(mine[s], one) for s in sorted(mine)], [], names[1]
    if alone[0]:
        one = next(iter(mine.values()))
        return [(one, theirs[s]) for s in sorted(theirs)], [], names[0]
    common = sorted(mine.keys() & theirs.keys())
    if not common:
        raise DavBenchError(
            f"{names[0]} and {names[1]} share no seed.",
            f"{names[0]} has {sorted(mine)}, {names[1]} has {sorted(theirs)}.",
            "run both with the same --seeds",
        )
    left = [
        f"{name} seed {seed}"
        for name, rows in zip(names, (mine, theirs), strict=True)
        for seed in sorted(rows)
        if seed not in common
    ]
    return [(mine[s], theirs[s]) for s in common], left, ""


def _difference(
    column: Column,
    numbers: Sequence[tuple[Mapping[str, float], Mapping[str, float]]],
    pairs: Sequence[tuple[Row, Row]],
) -> Difference:
    first, second = (np.array([both[side][column.name] for both in numbers]) for side in (0, 1))
    shares = [_share(column, x, y) for x, y in pairs]
    wins = None if any(s is None for s in shares) else interval([s for s in shares if s is not None])
    return Difference(column, float(first.mean()), float(second.mean()), interval(first - second), wins)


def _share(column: Column, a: Row, b: Row) -> float | None:
    """Share of evaluation noises whose sample is better (higher, where neither is better) under A."""
    names = {"reward": "reward.train", "reward-heldout": "reward.heldout"}
    key = names.get(column.name, f"metric.{column.name}")
    if key not in a.samples or key not in b.samples or _noise(a) != _noise(b):
        return None
    difference = (
        a.samples[key] - b.samples[key] if len(a.samples[key]) == len(b.samples[key]) else np.array([np.nan])
    )
    if not np.isfinite(difference).all():
        return None
    better = -difference if column.better == "down" else difference
    return float(np.mean((better > 0) + 0.5 * (better == 0)))


def _noise(row: Row) -> int:
    """Which evaluation noise a run drew from: all trained ones from the same, and seed 0 of the others too."""
    if row.spec["method"] in ("real", "exact"):
        return -1 - row.seed  # not drawn from noise, or by another way
    return 0 if trained(row) else row.seed


def _tested(
    found: Sequence[Difference], numbers: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]
) -> list[Difference]:
    each = [[x[d.column.name] - y[d.column.name] for x, y in numbers] for d in found]
    p = [flip(differences) for differences in each]
    return [
        Difference(d.column, d.a, d.b, d.paired, d.wins, one, corrected)
        for d, one, corrected in zip(found, p, holm(p), strict=True)
    ]


def _main(found: Sequence[Difference], terms: Terms, metric: str | None) -> Difference:
    held = {d.column.name: d for d in found}
    if metric is not None:
        if metric not in held:
            raise DavBenchError(f"{metric!r} was not measured in both rows.", f"There are {', '.join(held)}.")
        return held[metric]
    wanted = [*terms.rank.get("by", ()), "reward-heldout", "reward"]
    return next((held[name] for name in wanted if name in held), found[0])


def _sentence(
    names: tuple[str, str], d: Difference, n: int, metrics: int, row: Row, terms: Terms, fixed: str
) -> str:
    """Honest for any number of seeds: no interval for one, no p below six, no winner where 0 is inside."""
    way = "higher" if d.paired.mean > 0 else "lower"
    way += {"up": "", "down": " (lower is better)"}.get(d.column.better, "")
    said = (
        f"On {terms.task} (version {row.spec['task_version']}, {row.spec['eval']['samples']} evaluation samples "
        "per seed), "
        f"{d.column.title} is {number(d.a)} for {names[0]} and {number(d.b)} for {names[1]}"
    )
    once = f" {fixed} was run once and counts as fixed." if fixed else ""
    if n == 1 or d.paired.half is None:
        return f"{said}, with one seed: a difference of {_signed(d.paired.mean)} without an interval.{once}"
    low, high = d.paired.mean - d.paired.half, d.paired.mean + d.paired.half
    said += (
        f", {way} by {number(abs(d.paired.mean))} "
        f"({CONFIDENCE:.0%} interval of the paired difference over {n} seeds {_signed(low)} to {_signed(high)}"
    ).replace("%", " %")
    if d.p is None or d.holm is None:
        said += f"; {n} seeds allow no test)."
    else:
        said += f"; exact sign-flip test, p = {d.holm:.2g} after Holm's correction over {metrics} metrics)."
    if low <= 0 <= high:
        said += " The interval includes 0: these runs do not show which of the two is better."
    elif d.holm is not None and d.holm > 1 - CONFIDENCE:
        said += " The corrected p is above 0.05: not significant among the metrics compared."
    return said + once


def _signed(value: float) -> str:
    text = number(value)
    return text if text.startswith("-") or value == 0 else f"+{text}"


def _notes(
    names: tuple[str, str], pairs: Sequence[tuple[Row, Row]], left: Sequence[str], fixed: str, metrics: int
) -> tuple[str, ...]:
    n = len(pairs)
    shared = sum(_noise(x) == _noise(y) for x, y in pairs)
    lines = [
        f"Pairs: {n}, by seed; {shared} of them drew from the same evaluation noise. ± is half the 95 % Student t "
        "interval of the mean difference; intervals of several metrics hold one by one, not all at once."
    ]
    if fixed:
        lines.append(f"{fixed} trains nothing and was run once: its own noise is in no interval.")
    if left:
        lines.append(f"Left out, because the other row lacks the seed: {', '.join(left)}.")
    least = 2 / 2**n
    if n < P_SEEDS:
        lines.append(
            f"No p-values: with {n} {'pair' if n == 1 else 'pairs'} an exact sign-flip test cannot go below "
            f"{min(1.0, least):.2g}; from {P_SEEDS} seeds on they are given."
        )
    else:
        lines.append(
            f"p: exact two-sided sign-flip test over {n} pairs, at least {least:.2g}; Holm's correction over "
            f"{metrics} metrics makes that {min(1.0, metrics * least):.2g}."
        )
    spent = [[costs(row) for row in side] for side in zip(*pairs, strict=True)]
    training, drawing = (
        [float(np.mean([c.get(name, 0.0) for c in side])) for side in spent]
        for name in ("train-cost", "sample-cost")
    )
    lines.append(
        f"Cost in network rows: training {amount(round(training[0]))} ({names[0]}) and {amount(round(training[1]))} "
        f"({names[1]}), per sample {number(drawing[0])} and {number(drawing[1])}."
    )
    return tuple(lines)
