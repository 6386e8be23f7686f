"""Where rows stand on a board: layers, ranks, gates; and what they overdo."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from dav_bench.report.board import build
from dav_bench.report.curves import Curve, band, curves_of, overdone
from dav_bench.report.formats import render
from dav_bench.report.rows import Row
from dav_bench.report.terms import Terms

MakeRow = Callable[..., Row]
RANK = {"by": ["reward-heldout", "levenshtein"], "gates": {"kmer-corr": ">= 0.7"}}


@pytest.fixture
def ranked(terms: Terms) -> Terms:
    return replace(terms, rank=RANK)


def with_numbers(made: Row, heldout: float, levenshtein: float, kmer: float = 0.9) -> Row:
    samples = {**made.samples, "reward.heldout": np.full(8, heldout + made.seed / 64)}
    return replace(made, samples=samples, metrics={"levenshtein": levenshtein, "kmer-corr": kmer})


@pytest.fixture
def field(row: MakeRow) -> list[Row]:
    """A front of two, one that is beaten, one that fails the gate, one seed alone, and the yardsticks."""
    numbers = {"a": (4.0, 90.0), "b": (2.0, 110.0), "c": (1.0, 80.0), "d": (9.0, 120.0, 0.5)}
    rows = [with_numbers(row(m, s), *v) for m, v in numbers.items() for s in range(3)]
    rows += [with_numbers(row("e"), 3.0, 70.0), with_numbers(row("pretrained"), 0.0, 110.0)]
    return [*rows, with_numbers(row("real"), 9.0, 130.0), with_numbers(row("exact"), 9.0, 130.0)]


def test_rows_stand_in_layers_and_what_fails_a_gate_below(field: list[Row], ranked: Terms) -> None:
    frame = build(field, ranked).main.frame
    assert frame["label"].to_list() == ["real", "exact", "pretrained", "a", "b", "e", "c", "d"]
    assert frame["layer"].to_list() == [None, None, None, 1, 1, 2, 2, None]
    assert frame["hypervolume"].to_list()[3:] == [4.015625 * 90, 2.015625 * 110, 3 * 70, 1.015625 * 80, None]
    assert frame["rank low"].to_list() == [None] * 3 + [1, 1, None, 3, None]
    assert frame["rank high"].to_list() == [None] * 3 + [1, 1, None, 3, None]
    assert frame["below"].to_list()[-1] == "kmer-corr 0.5 is not >= 0.7" and set(frame["below"][:-1]) == {""}


def test_a_board_says_by_what_it_ranks_and_who_has_no_rank(field: list[Row], ranked: Terms) -> None:
    board = build(field, ranked)
    front = board.main.front
    assert front is not None and front.reference == {"reward-heldout": 0.0, "levenshtein": 0.0}
    assert front.volume == pytest.approx(4.015625 * 90 + 2.015625 * 20)
    text = render(board, "md")
    assert "| method | seeds | layer | rank | train reward" in text
    assert "| a | 0-2 | 1 | 1 |" in text and "| c | 0-2 | 2 | 3 |" in text and "| e | 0 | 2 | – |" in text
    assert "Rows after `real`, `exact` and `pretrained` are ordered by layer" in text
    assert "(held-out reward 0.000, levenshtein 0.000)" in text
    assert "- Below the line, without layer or rank: d (kmer-corr 0.5 is not >= 0.7)." in text
    assert "- No rank with fewer than 3 seeds: e (1)." in text
    assert f"- Hypervolume of layer 1: {front.volume:.1f}." in text
    held = json.loads(render(board, "json"))
    assert held["front"]["by"] == RANK["by"] and held["rows"][3]["rank low"] == 1
    assert held["rows"][3]["layer"] == 1 and any("Below the line" in n for n in held["notes"])
    assert "layer,rank low,rank high,hypervolume,below" in render(board, "csv").splitlines()[0]
    assert "Below the line" in render(board, "html")


def test_one_objective_gives_a_rank_without_layers(field: list[Row], ranked: Terms) -> None:
    board = build(field, replace(ranked, rank={"by": ["reward-heldout"]}))
    assert board.main.frame["label"].to_list()[3:] == ["d", "a", "e", "b", "c"]
    assert board.main.frame["rank low"].drop_nulls().to_list() == [1, 2, 3, 4]
    text = render(board, "md")
    assert "| method | seeds | rank |" in text and "Hypervolume" not in text
    assert "are ordered by held-out reward;" in text


def test_what_was_not_measured_has_no_place(field: list[Row], ranked: Terms) -> None:
    bare = [replace(r, metrics={"kmer-corr": 0.9}) if r.label == "a" else r for r in field]
    line = next(r for r in build(bare, ranked).main.frame.to_dicts() if r["label"] == "a")
    assert line["below"] == "levenshtein not measured" and line["layer"] is None
    without = [replace(r, metrics={}) for r in field]
    board = build(without, ranked)
    assert board.main.front is None and "layer" not in board.main.frame.columns


def test_the_order_of_runs_does_not_matter(field: list[Row], ranked: Terms) -> None:
    for fmt in ("md", "csv", "json"):
        assert render(build(field, ranked), fmt) == render(build(field[::-1], ranked), fmt)


def test_seconds_have_no_rank_and_other_budgets_their_own(field: list[Row], ranked: Terms) -> None:
    rows = []
    for made in field:
        for budget in ({"unit": "cost", "train": 9}, {"unit": "seconds", "train": 9}):
            trained = {"fit": {"forward": 1.0}}
            rows.append(replace(made, spec={**made.spec, "budget": budget}, meter=trained))
    board = build(rows, ranked)
    assert [s.front is None for s in board.budgets] == [False, True]
    assert board.budgets[0].frame["layer"].drop_nulls().to_list() == [1, 1, 2, 2]
    assert board.budgets[1].frame["layer"].is_null().all()
    assert board.budgets[1].frame["label"].to_list() == sorted(board.budgets[1].frame["label"])


def test_the_runs_behind_a_line_are_at_hand(field: list[Row], ranked: Terms) -> None:
    main = build(field, ranked).main
    for line in main.frame.iter_rows(named=True):
        runs = main.runs[line["method"], line["id"], line["source"]]
        assert len(runs) == line["n"] and {r.label for r in runs} == {line["method"]}


# ---------------------------------------------------------------------------------- over-optimisation


def test_overdone_is_what_the_training_reward_gains_alone() -> None:
    start, end = {"train": -1.0, "heldout": -0.5}, {"train": 3.0, "heldout": 0.5}
    assert overdone(start, end) == {"train gain": 4.0, "heldout gain": 1.0, "transfer": 0.25}
    assert overdone(start, end, [0.0, 1.25, 0.75])["peak loss"] == 0.75
    assert overdone(start, end, [0.0, 0.25])["peak loss"] == 0.0, "the end is the peak"
    assert "transfer" not in overdone(end, start), "nothing was gained that could be shared"


def test_a_board_shows_it_for_each_row_against_the_pretrained_model(
    rows: list[Row], terms: Terms, row: MakeRow
) -> None:
    way = Curve(
        "eval", "reward-heldout", np.array([1, 2]), np.array([10, 20]), np.array([1, 2]), np.array([9.25, 1])
    )
    rows = [replace(r, curves=(way,)) if r.label == "dav" else r for r in rows]
    board = build(rows, terms)
    frame = board.main.overdone
    assert frame["label"].to_list() == ["dav+tree", "dav", "best-of-n"]
    assert frame["transfer"].to_list() == [0.5] * 3, "the held-out reward is a quarter on half the scale"
    gap = board.main.frame.filter(pl.col("label").is_in(["dav", "pretrained"]))["gap"].to_list()
    assert frame["train gain"][1] - frame["heldout gain"][1] == pytest.approx(gap[1] - gap[0])
    ends = [np.median(r.samples["reward.heldout"]) for r in rows if r.label == "dav"]
    assert frame["peak loss"].to_list() == [None, pytest.approx(9.25 - np.mean(ends)), None]
    assert "### Train against held-out reward" in render(board, "md")
    rest = [r for r in rows if r.label != "pretrained"]
    assert build(rest, terms).main.overdone.is_empty() and "### Train" not in render(build(rest, terms), "md")


# ---------------------------------------------------------------------------------------------- curves


def metrics(
    values: list[float], split: str = "train", metric: str = "reward", cost: int = 10
) -> pl.DataFrame:
    rows = [
        {"round": r, "cost": cost * r, "reward_rows": 2 * r, "seconds": 0.5 * r, "split": split, "metric": metric,
         "value": v, "n": 8}
        for r, v in enumerate(values, 1)
    ]  # fmt: skip
    return pl.DataFrame(rows)


def test_a_row_keeps_curves_of_what_the_board_measures() -> None:
    frame = pl.concat(
        [metrics([3.0, 1.0]), metrics([0.5], "eval"), metrics([9.0], metric="loss"), metrics([7.0], "final")]
    )
    found = curves_of(frame.sample(fraction=1.0, shuffle=True, seed=0), {"reward": 7.0})
    assert [(c.split, c.metric) for c in found] == [("eval", "reward"), ("train", "reward")]
    assert found[1].value.tolist() == [3, 1] and found[1].over("cost").tolist() == [10, 20]
    assert found[1].over("reward_rows").tolist() == [2, 4] and found[1].round.tolist() == [1, 2]


def test_long_curves_are_thinned_with_both_ends() -> None:
    (found,) = curves_of(metrics([float(i) for i in range(1, 2001)]), {"reward"})
    assert len(found.value) == 200 and found.round[[0, -1]].tolist() == [1, 2000]
    assert np.diff(found.round).max() <= 11 and (found.value == found.round).all()


def test_a_band_compares_seeds_at_the_same_cost() -> None:
    curves = [curves_of(metrics(v, cost=c), {"reward"})[0] for v, c in (([1, 2, 3], 10), ([2, 4], 20))]
    found = band(curves)
    assert [point[0] for point in found] == [20, 30], "only where both have been"
    assert [point[1] for point in found] == [(2 + 2) / 2, (3 + 3) / 2]
    assert all(low <= mean <= high and n == 2 for _, mean, low, high, n in found)
    (alone,) = band(curves[:1])[:1]
    assert alone[2:] == (None, None, 1)
    far = curves_of(metrics([1.0], cost=999), {"reward"})[0]
    assert band([curves[0], far]) == []
