"""Boards: numbers from rows, order, what does not compare, and bytes."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dav_bench.report.board import build, difference, span, values
from dav_bench.report.formats import FORMATS, amount, number, render, rich_table
from dav_bench.report.published import load_published, save
from dav_bench.report.rows import Row
from dav_bench.report.terms import Terms

MakeRow = Callable[..., Row]


def test_the_numbers_of_a_row_are_those_of_its_run(row: MakeRow, terms: Terms) -> None:
    one = row("dav", seed=1)
    found = values(one, terms)
    train, heldout = np.median(one.samples["reward.train"]), np.median(one.samples["reward.heldout"])
    assert found["reward"] == train and found["reward-heldout"] == heldout
    assert found["gap"] == pytest.approx((train - 0.5) / 2 - (heldout - 0.25) / 1)
    assert found["accessibility"] == one.samples["metric.accessibility"].mean()
    assert found["levenshtein"] == one.metrics["levenshtein"]
    assert found["train-cost"] == 1000 + 400 + 2 * 300, "evaluation and the final samples are no training"
    assert found["sample-cost"] == 8 and found["reward-rows"] == 100 + 2 * 50 + 8
    assert found["seconds"] == 3.5 and found["peak-mb"] == 513


def test_seeds_of_one_setting_make_one_row_with_an_interval(row: MakeRow, terms: Terms) -> None:
    rows = [row("dav", seed) for seed in (0, 1, 4)]
    (line,) = build(rows, terms).main.frame.to_dicts()
    each = [values(r, terms)["reward"] for r in rows]
    half = 4.302652729911275 * np.std(each, ddof=1) / math.sqrt(3)
    assert (line["seeds"], line["n"]) == ("0-1,4", 3)
    assert (line["reward"], line["reward ±"]) == pytest.approx((np.mean(each), half))
    (single,) = build(rows[:1], terms).main.frame.to_dicts()
    assert single["reward ±"] is None and "±" not in render(build(rows[:1], terms), "md").split("Measured")[0]


def test_real_and_pretrained_come_first_then_the_best_held_out_reward(rows: list[Row], terms: Terms) -> None:
    frame = build(rows, terms).main.frame
    assert frame["label"].to_list() == ["real", "pretrained", "dav+tree", "dav", "best-of-n"]


def test_the_order_of_rows_does_not_matter(rows: list[Row], terms: Terms) -> None:
    shuffled = list(rows)
    random.Random(0).shuffle(shuffled)
    for fmt in FORMATS:
        assert render(build(rows, terms), fmt) == render(build(shuffled, terms), fmt)


def test_rows_under_other_terms_stand_apart_with_the_reason(row: MakeRow, terms: Terms) -> None:
    rows = [
        row("dav"),
        row("dav", task_version=2),
        row("dav", eval={"samples": 16, "seed": 20000, "every": 4}),
        row("svdd", eval={"samples": 8, "seed": 20000, "every": 1}),
        row("dav", sampler={"steps": 16}),
        row("dav", heldout=False),
    ]
    board = build(rows, terms)
    assert sorted(board.main.frame["label"]) == ["dav", "svdd"], "how often a run is watched changes nothing"
    assert [s.reason for s in board.apart] == [
        "eval.samples 16 instead of 8",
        "heldout False instead of True",
        "sampler.steps 16 instead of 8",
        "task_version 2 instead of 1",
    ]
    text = render(board, "md")
    assert all(f"## Not comparable: {s.reason}" in text for s in board.apart)
    assert difference({"heldout": False, "rewards": {"heldout": {"use": "x"}}}, {"heldout": True}) == (
        "heldout False instead of True"
    )
    assert difference({"a": {"b": 1}}, {"a": {}}) == "a.b 1 instead of unset"


COST, SECONDS = {"unit": "cost", "train": 20000}, {"unit": "seconds", "train": 60}


def budgeted(row: MakeRow) -> list[Row]:
    rows = [row("real"), row("pretrained"), row("best-of-n"), row("dav", 1)]
    rows += [row(label, budget=COST) for label in ("dav", "dav+tree")]
    rows += [row(label, budget={"unit": "cost", "train": 500}) for label in ("dav",)]
    return rows + [row(label, budget=SECONDS) for label in ("dav+tree", "ddpo", "dav")]


def test_each_budget_has_a_section_of_its_own(row: MakeRow, terms: Terms) -> None:
    board = build(budgeted(row), terms)
    assert board.main.frame["label"].to_list() == ["real", "pretrained", "dav", "best-of-n"]
    assert [(str(s.budget), s.frame["label"].to_list()) for s in board.budgets] == [
        ("cost 500", ["real", "pretrained", "dav", "best-of-n"]),
        ("cost 20,000", ["real", "pretrained", "dav+tree", "dav", "best-of-n"]),
        ("seconds 60", ["best-of-n", "dav", "dav+tree", "ddpo", "pretrained", "real"]),
    ]
    text = render(board, "md")
    assert text.index("# toy") < text.index("## Training budget: cost 500\n") < text.index("cost 20,000\n")
    assert text.count("not reproducible") == 1 and text.index("seconds 60\n") < text.index("not reproducible")
    assert not board.apart and "Not comparable" not in text
    page, console = render(board, "html"), shown(rich_table(board, board.budgets[1]))
    assert "<h2>Training budget: seconds 60</h2>" in page and "Training budget: cost 20,000" in console


def test_budgets_are_told_in_csv_and_json(row: MakeRow, terms: Terms) -> None:
    board = build(budgeted(row), terms)
    lines = list(csv.DictReader(io.StringIO(render(board, "csv"))))
    assert [sum(r["apart"] == a for r in lines) for a in ("", "training budget: cost=20000")] == [4, 5]
    held = json.loads(render(board, "json"))["budgets"]
    assert [(b["unit"], b["train"], b["reproducible"]) for b in held] == [
        ("cost", 500, True), ("cost", 20000, True), ("seconds", 60, False),
    ]  # fmt: skip
    assert [r["label"] for r in held[0]["rows"]] == ["real", "pretrained", "dav", "best-of-n"]
    assert "budgets" not in json.loads(render(build([row("dav")], terms), "json")), "as it always was"


def test_other_terms_stand_apart_under_any_budget(row: MakeRow, terms: Terms) -> None:
    board = build([row("dav", budget=COST, sampler={"steps": 9})], terms)
    assert not board.budgets and board.apart[0].reason == "sampler.steps 9 instead of 8"


def test_a_section_names_what_was_not_run_and_what_cannot_run(row: MakeRow, terms: Terms) -> None:
    methods = [{"method": m, "reason": ""} for m in ("best-of-n", "dav", "ddpo", "grpo")]
    methods.append({"method": "adjoint", "reason": "works on vector"})
    board = build(budgeted(row), replace(terms, methods=tuple(methods)))
    assert [s.missing for s in board.budgets] == [("ddpo", "grpo"), ("ddpo", "grpo"), ("grpo",)]
    text = render(board, "md")
    assert text.count("- Not run yet: ddpo, grpo.\n") == 2
    assert text.count("- Cannot run on this task: adjoint (works on vector).\n") == 3
    assert "Not run yet" not in render(build(make_main(row), replace(terms, methods=tuple(methods))), "md")


def make_main(row: MakeRow) -> list[Row]:
    return [row("real"), row("dav")]


def test_settings_that_share_a_label_are_told_apart(row: MakeRow, terms: Terms) -> None:
    rows = [row("dav", params={"width": w, "alpha": 0.5}) for w in (4, 8)]
    labels = build(rows, terms).main.frame["label"].to_list()
    assert sorted(labels) == ["dav (width=4)", "dav (width=8)"]


def test_local_rows_are_marked(row: MakeRow, terms: Terms) -> None:
    text = render(build([row("dav"), row("svdd", source="local")], terms), "md")
    assert "| dav |" in text and "| svdd (local) |" in text


def test_without_a_scale_the_real_row_gives_it(rows: list[Row], terms: Terms) -> None:
    board = build(rows, replace(terms, scales={}))
    real = next(r for r in rows if r.label == "real").samples
    assert board.terms.scales["train"]["median"] == np.median(real["reward.train"])
    assert board.terms.scales["train"]["q90"] == pytest.approx(np.quantile(real["reward.train"], 0.9))
    assert board.main.frame["gap"][0] == pytest.approx(0)
    assert "row `real`" in render(board, "md")
    others = [r for r in rows if r.label != "real"]
    assert "gap" not in {c.name for c in build(others, replace(terms, scales={})).columns}


def test_what_was_not_measured_is_a_dash(row: MakeRow, terms: Terms) -> None:
    bare = replace(row("svdd"), samples={"reward.train": np.array([1.0, math.nan])}, metrics={}, peak_mb=None)
    board = build([bare, row("dav")], terms)
    line = next(r for r in board.main.frame.to_dicts() if r["label"] == "svdd")
    assert line["reward-heldout"] is None and line["levenshtein"] is None and math.isnan(line["reward"])
    assert "| svdd | 0 | nan | – |" in render(board, "md")
    held = json.loads(render(board, "json"))["rows"]
    assert next(r for r in held if r["label"] == "svdd")["reward"] is None


def test_a_metric_that_one_seed_lacks_is_not_averaged_over_the_others(row: MakeRow, terms: Terms) -> None:
    rows = [row("dav", 0), replace(row("dav", 1), metrics={})]
    (line,) = build(rows, terms).main.frame.to_dicts()
    assert line["levenshtein"] is None and line["reward"] is not None


def test_no_rows_make_an_empty_board(terms: Terms) -> None:
    board = build([], terms)
    assert board.main.frame.is_empty()
    for fmt in FORMATS:
        assert render(board, fmt)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_published_board_of_an_earlier_version_gives_the_same_bytes(golden: Path, fmt: str) -> None:
    board = build(*load_published(golden))
    assert render(board, fmt) == golden.with_suffix(f".{fmt}").read_text(encoding="utf-8")


def test_the_parquet_file_holds_the_rows(rows: list[Row], terms: Terms, tmp_path: Path) -> None:
    save(rows, terms, tmp_path / "a.parquet")
    save(rows[::-1], terms, tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    held, back = load_published(tmp_path / "a.parquet")
    assert back == terms and len(held) == len(rows)
    wanted = {r.identity: r for r in rows}
    for one in held:
        other = wanted[one.identity]
        assert (one.spec, one.meter, one.metrics, one.label, one.seed, one.run_id, one.arguments) == (
            other.spec, other.meter, other.metrics, other.label, other.seed, other.run_id, other.arguments
        )  # fmt: skip
        assert one.samples.keys() == other.samples.keys()
        assert all(np.array_equal(one.samples[k], other.samples[k]) for k in one.samples)


def test_csv_and_json_hold_every_row(rows: list[Row], row: MakeRow, terms: Terms) -> None:
    board = build([*rows, row("dav", sampler={"steps": 9})], terms)
    lines = list(csv.DictReader(io.StringIO(render(board, "csv"))))
    assert len(lines) == 6 and lines[-1]["apart"] == "sampler.steps 9 instead of 8"
    assert float(lines[2]["reward"]) == board.main.frame["reward"][2]
    held = json.loads(render(board, "json"))
    assert [len(held["rows"]), len(held["apart"][0]["rows"]), held["task"]] == [5, 1, "toy"]


def test_text_of_others_cannot_break_a_page(row: MakeRow, terms: Terms) -> None:
    evil = replace(terms, title="<script>a|b</script>")
    page = render(build([row("dav")], evil), "html")
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_the_terminal_table_has_a_column_per_method(rows: list[Row], terms: Terms) -> None:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(rich_table(build(rows, terms)))
    text = console.export_text()
    assert "held-out reward" in text and "dav+tree" in text.split("held-out")[0]


def test_the_terminal_marks_local_rows_when_asked(row: MakeRow, terms: Terms) -> None:
    board = build([row("dav", source="local"), row("svdd", sampler={"steps": 9})], terms)
    assert "local" not in shown(rich_table(board)) and "dav (local)" in shown(rich_table(board, mark=True))
    apart = shown(rich_table(board, board.apart[0]))
    assert "svdd" in apart and "Not comparable: sampler.steps 9 instead of 8" in apart


def shown(table: object) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(table)
    return " ".join(console.export_text().split())


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.3971, "0.397"), (-0.00001, "0.000"), (-1.5, "-1.500"), (12.345, "12.35"), (123.4, "123.4"),
     (1234.5, "1,234"), (2_410_000, "2.41 M"), (3.2e9, "3.20 G"), (math.inf, "inf"), (10.0, "10.00")],
)  # fmt: skip
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_amounts_stay_whole() -> None:
    assert [amount(v) for v in (None, 0.0, 29.0, 3.5, 12_345.0, 7e6)] == [
        "–",
        "0",
        "29",
        "3.500",
        "12,345",
        "7.00 M",
    ]


def test_seeds_read_as_the_command_line_takes_them() -> None:
    assert [span(s) for s in ([0], [2, 0, 1], [0, 2, 5, 6, 7])] == ["0", "0-2", "0,2,5-7"]
