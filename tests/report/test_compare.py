"""Two rows against each other: pairs, intervals, exact tests, and what may be said."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as reference
from typer.testing import CliRunner

from dav_bench.cli import app
from dav_bench.cli.compare import find_pair
from dav_bench.errors import DavBenchError
from dav_bench.report.board import build
from dav_bench.report.compare import Comparison, compare
from dav_bench.report.rows import Row
from dav_bench.report.stats import flip, holm
from dav_bench.report.terms import Terms
from dav_bench.store import RunDir

MakeRow = Callable[..., Row]
RunOf = Callable[..., list[RunDir]]


def shifted(row: Row, by: float) -> Row:
    """The same run with held-out rewards and a set metric moved by a constant."""
    moved = row.samples["reward.heldout"] + by
    metrics = {**row.metrics, "levenshtein": row.metrics["levenshtein"] - by}
    return replace(row, samples={**row.samples, "reward.heldout": moved}, metrics=metrics)


def against(a: list[Row], b: list[Row], terms: Terms, metric: str | None = None) -> Comparison:
    return compare(a, b, terms, build([*a, *b], terms).columns, metric=metric)


# -------------------------------------------------------------------------------------------- p-values


@pytest.mark.parametrize("n", [1, 3, 6, 9])
def test_the_sign_flip_test_tries_every_sign(n: int) -> None:
    x = np.random.default_rng(n).normal(0.7, 1, n)
    signs = np.array(list(itertools.product((-1, 1), repeat=n)))
    assert flip(x) == np.mean(np.abs(signs @ x) >= abs(x.sum()) - 1e-12)
    assert flip(np.abs(x)) == 2 / 2**n
    if n > 1:
        whole = reference.permutation_test((x,), np.sum, permutation_type="samples", n_resamples=np.inf)
        assert flip(x) == pytest.approx(whole.pvalue)


def test_ties_and_nothing_are_no_evidence() -> None:
    assert flip([0.0] * 6) == 1.0 and flip([1, -1, 1, -1]) == 1.0
    assert flip([0.1, 0.2, 0.3, 0.1, 0.2, 0.3]) == 2 / 64, "sums that differ in their last digits are equal"
    assert np.isnan(flip([1.0, float("nan")])) and np.isnan(flip([]))


def test_many_pairs_are_sampled() -> None:
    x = np.random.default_rng(0).normal(0.4, 1, 24)
    assert flip(x) == pytest.approx(reference.ttest_1samp(x, 0).pvalue, abs=0.02)


def test_p_is_uniform_where_there_is_no_difference() -> None:
    rng = np.random.default_rng(0)
    p = np.array([flip(rng.standard_t(3, 6)) for _ in range(2000)])
    for level in (1 / 32, 2 / 32, 8 / 32, 16 / 32):
        assert np.mean(p <= level) == pytest.approx(level, abs=4 * np.sqrt(level / 2000))


def test_holm_is_the_step_down_correction() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
    mixed = holm([0.02, float("nan"), 0.01])
    assert mixed[0] == pytest.approx(0.02) and np.isnan(mixed[1]) and mixed[2] == pytest.approx(0.02)


def test_holm_keeps_false_findings_rare() -> None:
    """Eight metrics of ten seeds without any difference, strongly correlated or not."""
    rng = np.random.default_rng(1)
    for shared in (0.0, 0.9):
        found = 0
        for _ in range(300):
            noise = shared * rng.normal(size=(1, 10)) + (1 - shared) * rng.normal(size=(8, 10))
            found += min(holm([flip(x) for x in noise])) <= 0.05
        assert found / 300 < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 300)


# ----------------------------------------------------------------------------------------------- pairs


def test_seeds_are_paired_and_their_common_noise_cancels(row: MakeRow, terms: Terms) -> None:
    a = [row("dav", s) for s in range(4)]
    b = [shifted(row("dav-kl", s), -1.0 + s / 16) for s in (1, 2, 3, 7)]
    found = against(a, b, terms)
    each = [
        np.median(x.samples["reward.heldout"]) - np.median(y.samples["reward.heldout"])
        for x, y in zip(a[1:], b[:3], strict=True)
    ]
    assert found.seeds == (1, 2, 3) and found.main.column.name == "reward-heldout"
    low, high = reference.t.interval(0.95, 2, loc=np.mean(each), scale=reference.sem(each))
    assert (found.main.paired.low, found.main.paired.high) == pytest.approx((low, high))
    assert found.main.paired.mean == pytest.approx(found.main.a - found.main.b)
    assert "Left out, because the other row lacks the seed: dav seed 0, dav-kl seed 7." in found.notes
    unpaired = np.std([np.median(r.samples["reward.heldout"]) for r in b[:3]], ddof=1)
    assert found.main.paired.half < 4.3 * unpaired


def test_a_better_sample_under_the_same_noise_is_a_win(row: MakeRow, terms: Terms) -> None:
    a, b = ([row("dav", s) for s in range(3)] for _ in range(2))
    better = [shifted(r, 0.25) for r in a]
    found = {d.column.name: d for d in against(better, b, terms).lines}
    assert found["reward-heldout"].wins is not None and found["reward-heldout"].wins.mean == 1.0
    assert found["reward"].wins is not None and found["reward"].wins.mean == 0.5, "ties are half"
    assert found["levenshtein"].wins is None, "a set has no samples to compare"
    search = [row("svdd", s) for s in range(3)]
    lines = {d.column.name: d for d in against(a, search, terms).lines}
    assert lines["reward"].wins is None, "seeds above 0 of what does not train draw from other noise"


def test_a_yardstick_that_was_run_once_counts_as_fixed(row: MakeRow, terms: Terms) -> None:
    a, b = [row("dav", s) for s in range(3)], [row("pretrained")]
    found = against(a, b, terms)
    assert found.seeds == (0, 1, 2) and found.main.paired.n == 3
    assert "pretrained was run once and counts as fixed" in found.sentence
    other = against(b, a, terms)
    assert other.main.paired.mean == -found.main.paired.mean and other.seeds == (0, 1, 2)
    with pytest.raises(DavBenchError, match="share no seed"):
        against([row("dav", 0), row("dav", 1)], [row("ddpo", 2), row("ddpo", 3)], terms)


# -------------------------------------------------------------------------------------- what may be said


def test_three_seeds_give_an_interval_and_no_p(row: MakeRow, terms: Terms) -> None:
    a = [shifted(row("dav", s), 1.0 + s / 64) for s in range(3)]
    found = against(a, [row("ddpo", s) for s in range(3)], terms)
    assert all(d.p is None and d.holm is None for d in found.lines)
    assert "p =" not in found.sentence and "3 seeds allow no test" in found.sentence
    assert "higher by" in found.sentence and "does not show" not in found.sentence
    assert any("cannot go below 0.25" in note for note in found.notes)
    assert "on toy (version 1, 8 evaluation samples per seed)" in found.sentence.lower()


def test_an_interval_with_zero_names_no_winner(row: MakeRow, terms: Terms) -> None:
    a = [shifted(row("dav", s), by) for s, by in enumerate((-1.0, 0.5, 1.0))]
    found = against(a, [row("dav", s) for s in range(3)], terms)
    assert "these runs do not show which of the two is better" in found.sentence


def test_one_seed_says_so(row: MakeRow, terms: Terms) -> None:
    found = against([row("dav")], [shifted(row("ddpo"), 1.0)], terms)
    assert "with one seed" in found.sentence and "without an interval" in found.sentence
    assert found.main.paired.half is None


def test_from_six_seeds_on_p_is_exact_and_corrected(row: MakeRow, terms: Terms) -> None:
    a = [shifted(row("dav", s), 1.0 + s / 64) for s in range(10)]
    b = [row("dav", s) for s in range(10)]
    found = against(a, b, terms)
    lines = {d.column.name: d for d in found.lines}
    m = len(found.lines)
    assert lines["reward-heldout"].p == 2 / 1024 and lines["reward"].p == 1.0
    assert lines["reward-heldout"].holm == pytest.approx(m * 2 / 1024)
    assert f"p = {m * 2 / 1024:.2g} after Holm's correction over {m} metrics" in found.sentence
    assert any("at least 0.002" in note for note in found.notes)
    six = against(a[:6], b[:6], terms)
    assert six.main.p == 2 / 64 and "not significant among the metrics compared" in six.sentence


def test_the_sentence_is_about_what_the_task_ranks_by_or_what_was_asked(row: MakeRow, terms: Terms) -> None:
    a, b = [row("dav", s) for s in range(3)], [shifted(row("ddpo", s), 1.0) for s in range(3)]
    assert against(a, b, replace(terms, rank={"by": ["levenshtein"]})).main.column.name == "levenshtein"
    assert against(a, b, terms, "gap").main.column.name == "gap"
    assert "lower is better" in against(a, b, terms, "gap").sentence
    with pytest.raises(DavBenchError, match="was not measured in both"):
        against(a, b, terms, "beauty")


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("common", [0.0, 2.0])
def test_paired_intervals_cover(seeds: int, common: float) -> None:
    """Of the difference, whatever the two share: a seed's luck cancels."""
    rng = np.random.default_rng([seeds, int(common)])
    luck = common * rng.standard_normal((20_000, seeds))
    a = luck + 0.5 + 0.3 * rng.standard_normal((20_000, seeds))
    b = luck + 1.0 * rng.standard_normal((20_000, seeds))
    d = a - b
    half = reference.t.ppf(0.975, seeds - 1) * d.std(1, ddof=1) / np.sqrt(seeds)
    assert 0.93 < np.mean(np.abs(d.mean(1) - 0.5) <= half) < 0.97


# --------------------------------------------------------------------------------------------- the command


def test_rows_are_found_by_name_or_id_in_one_table(row: MakeRow, terms: Terms) -> None:
    cost = [{"unit": "cost", "train": n} for n in (500, 900)]
    rows = [row(m, s, budget=b) for m in ("dav", "ddpo") for s in range(2) for b in cost]
    wide = [row("dav", s, params={"width": w, "alpha": 0.5}) for s in range(2) for w in (4, 8)]
    board = build([*rows, *wide, row("pretrained"), row("svdd", task_version=2)], terms)
    (name, runs), (other, _) = find_pair(board, "dav", "pretrained", "cost=900")
    assert (name, other, [r.seed for r in runs]) == ("dav", "pretrained", [0, 1])
    assert runs[0].spec["budget"]["train"] == 900
    assert find_pair(board, "dav (width=8)", "pretrained")[0][0] == "dav (width=8)"
    assert find_pair(board, wide[0].run_id, "pretrained", "none")[0][1][0].run_id == wide[0].run_id
    for args, message in (
        (("dav", "ddpo"), "stand in 2 tables"),
        (("dav", "pretrained", "none"), "'dav' means 2 rows"),
        (("dav", "nobody", "cost=500"), "no row 'nobody'"),
        (("svdd", "dav", "cost=500"), "task_version 2 instead of 1"),
        (("dav", "dav", "cost=500"), "one and the same"),
        (("dav", "ddpo", "cost=7"), "no table 'cost=7'"),
        (("ddpo", "dav (width=8)"), "no table holds both"),
    ):
        with pytest.raises(DavBenchError, match="(?s)" + message.replace("(", r"\(").replace(")", r"\)")):
            find_pair(board, *args)


def test_published_and_local_seeds_are_one_row(row: MakeRow, terms: Terms) -> None:
    rows = [row("dav", s, source) for s, source in ((0, "published"), (1, "local"), (0, "local"))]
    (_, runs), _ = find_pair(build([*rows, row("pretrained")], terms), "dav", "pretrained")
    assert [(r.seed, r.source) for r in runs] == [(0, "published"), (1, "local")]


def test_the_command_prints_a_table_a_sentence_and_what_it_rests_on(toy: Path, run_of: RunOf) -> None:
    run_of(methods=["dav", "svdd"], seeds=[0, 1, 2])
    done = CliRunner().invoke(app, ["compare", "dav", "svdd", "--task", "toy"], catch_exceptions=False)
    assert done.exit_code == 0
    for part in (
        "A - B",
        "held-out reward ↑",
        "95 % interval of the paired difference over 3 seeds",
        "No p-values",
    ):
        assert part in done.stdout
    args = ["compare", "dav", "svdd", "--task", "toy", "--json", "--metric", "levenshtein"]
    held = json.loads(CliRunner().invoke(app, args, catch_exceptions=False).stdout)
    assert (
        held["seeds"] == [0, 1, 2] and held["main"] == "levenshtein" and held["sentence"].startswith("On toy")
    )
    line = next(m for m in held["metrics"] if m["metric"] == "levenshtein")
    assert line["difference"] == pytest.approx(line["a"] - line["b"]) and line["p"] is None
