"""Layers, hypervolume, gates and ranks: against definitions, by enumeration and by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dav_bench.errors import DavBenchError
from dav_bench.report.gates import Gate
from dav_bench.report.pareto import (
    box,
    dominates,
    layers,
    ranks,
    reference_point,
    volume,
)


def test_a_point_dominates_what_is_nowhere_better() -> None:
    points = np.array([[1.0, 1.0], [1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
    assert dominates(points).tolist() == [
        [False, False, False, False],
        [True, False, False, True],
        [True, False, False, True],
        [False, False, False, False],
    ]


def test_layers_peel_the_front_and_equal_points_share_one() -> None:
    assert layers(np.array([[3, 1], [1, 3], [2, 2], [2, 1], [1, 1], [2, 2], [0, 0]])) == [1, 1, 1, 2, 3, 1, 4]
    assert layers(np.array([[1.0], [3.0], [2.0], [3.0]])) == [3, 1, 2, 1], "one objective: its order"


def test_layers_do_not_depend_on_units() -> None:
    points = np.random.default_rng(0).normal(size=(30, 2))
    assert layers(points) == layers(points * [1e6, 1e-3] + [5, -7])


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_hypervolume_is_the_volume_that_is_dominated(d: int) -> None:
    """Counted on a grid whose cells are whole units."""
    points = np.random.default_rng(d).integers(-1, 6, (12, d)).astype(float)
    cells = itertools.product(range(5), repeat=d)
    counted = sum(any((p >= np.array(c) + 1).all() for p in points) for c in cells)
    assert volume(points, [0.0] * d) == counted > 0
    assert volume(points + 7.5, [7.5] * d) == pytest.approx(counted)


def test_a_box_does_not_depend_on_the_points_beside_it() -> None:
    points = np.array([[3, 1], [1, 3], [1, 1], [2.5, 1], [-1, 9]])
    assert volume(points, [0, 0]) == 5
    assert [box(p, [0, 0]) for p in points] == [3, 3, 1, 2.5, 0]


def test_a_gate_compares_with_a_number() -> None:
    gate = Gate.of("kmer-corr", ">= 0.9")
    assert str(gate) == "kmer-corr >= 0.9"
    assert [gate.passes(v) for v in (0.9, 0.95, 0.89, float("nan"))] == [True, True, False, False]
    assert Gate.of("fid", "<2e1").passes(19) and not Gate.of("fid", "< 20").passes(20)
    for text in ("0.9", "== 0.9", ">= high", ">= nan", ""):
        with pytest.raises(DavBenchError, match="no condition"):
            Gate.of("kmer-corr", text)


def test_the_hypervolume_begins_where_the_task_says_or_at_the_pretrained_model() -> None:
    by = [("reward-heldout", "quality", "up"), ("levenshtein", "diversity", "up")]
    assert reference_point(by, {}, {"reward-heldout": -2.0, "levenshtein": 110.0}) == {
        "reward-heldout": -2.0, "levenshtein": 0.0,
    }  # fmt: skip
    assert reference_point(by, {"levenshtein": 90}, {}) == {"levenshtein": 90.0}


def test_ranks_are_certain_where_seeds_agree_and_open_where_they_do_not() -> None:
    clear = [np.array([[m - 0.01], [m], [m + 0.01]]) for m in (1.0, 3.0, 2.0)]
    assert ranks(clear) == [(3, 3), (1, 1), (2, 2)]
    wide = [np.array([[m - 5], [m], [m + 5]]) for m in (1.0, 3.0, 2.0)]
    assert ranks(wide) == [(1, 3)] * 3
    assert ranks([np.zeros((3, 1)), np.ones((3, 1))]) == [(2, 2), (1, 1)], "no spread, no doubt"
    assert ranks([np.ones((3, 2))] * 2) == [(1, 2)] * 2, "equal rows share an interval"
    assert ranks(clear[:1]) == [(1, 1)] and ranks([]) == []


def test_a_trade_off_beats_nobody() -> None:
    jitter = np.array([[-0.01, 0.01], [0, 0], [0.01, -0.01]])
    rows = [jitter + m for m in ([3, 1], [1, 3], [0, 0])]
    assert ranks(rows) == [(1, 1), (1, 1), (3, 3)]


def test_the_order_of_rows_does_not_change_their_ranks() -> None:
    rng = np.random.default_rng(0)
    rows = {f"m{i}": rng.normal(i, 2, (3, 2)) for i in range(6)}
    found = dict(zip(rows, ranks(list(rows.values()), list(rows)), strict=True))
    names = sorted(rows, reverse=True)
    assert dict(zip(names, ranks([rows[n] for n in names], names), strict=True)) == found


def test_a_rank_needs_two_seeds() -> None:
    with pytest.raises(ValueError, match="two seeds"):
        ranks([np.zeros((1, 1)), np.zeros((3, 1))])
