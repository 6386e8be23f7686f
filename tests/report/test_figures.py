"""Fronts and learning curves as files: what they show, how they are told, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dav_bench.cli import plot
from dav_bench.errors import DavBenchError
from dav_bench.report.board import Board, build
from dav_bench.report.charts import save
from dav_bench.report.curves import Curve
from dav_bench.report.figures import curves_figure, pareto_figure
from dav_bench.report.rows import Row
from dav_bench.report.terms import Terms

MakeRow = Callable[..., Row]


def curve(shift: float, cost: int = 100, split: str = "train") -> Curve:
    r = np.arange(1, 6)
    return Curve(split, "reward", r, cost * r, 2 * r, shift + r / 4)


@pytest.fixture
def board(rows: list[Row], terms: Terms) -> Board:
    shifts = {"dav": 0.0, "dav+tree": 0.5}
    told = [
        replace(r, curves=(curve(shifts[r.label] + r.seed, 100 + r.seed),)) if r.label in shifts else r
        for r in rows
    ]
    return build(told, terms)


def test_a_front_is_titled_and_described(board: Board) -> None:
    spec = pareto_figure(board).to_dict()
    assert spec["title"]["text"] == "A toy" and "interval over seeds" in spec["title"]["subtitle"][0]
    assert "held-out reward against levenshtein" in spec["description"]
    text = str(spec)
    assert "levenshtein (more is better)" in text and "held-out reward (more is better)" in text


def test_curves_are_means_over_seeds_with_a_band_and_a_name(board: Board) -> None:
    spec = curves_figure(board).to_dict()
    data = spec["data"]["values"]
    assert {p["row"] for p in data} == {"dav", "dav+tree"}
    first = next(p for p in data if p["row"] == "dav")
    assert first["seeds"] == 3 and first["low"] < first["value"] < first["high"]
    assert first["spent"] == 102, "from where the last seed began"
    names = [p for p in data if "label" in p]
    assert len(names) == 2 and abs(names[0]["label"] - names[1]["label"]) > 0.04
    text = str(spec)
    assert (
        "training cost (network rows, forward + 2 x backward)" in text
        and "train reward (more is better)" in text
    )
    assert "over the cost of training, toy" in spec["description"]


def test_names_of_rows_that_end_alike_do_not_overlap(rows: list[Row], terms: Terms) -> None:
    same = [replace(r, curves=(curve(0.0),)) for r in rows if r.label not in ("real", "pretrained")]
    data = curves_figure(build(same, terms)).to_dict()["data"]["values"]
    places = sorted(p["label"] for p in data if "label" in p)
    assert len(places) == 3 and np.diff(places).min() > 0.03


def test_one_seed_has_no_band(row: MakeRow, terms: Terms) -> None:
    made = build([replace(row("dav"), curves=(curve(0.0),))], terms)
    assert all(p["low"] is None for p in curves_figure(made).to_dict()["data"]["values"])


def test_a_curve_that_nobody_has_is_refused(board: Board, row: MakeRow, terms: Terms) -> None:
    with pytest.raises(DavBenchError, match=r"(?s)no row of toy has a curve of 'beauty'.*reward \(train\)"):
        curves_figure(board, metric="beauty")
    with pytest.raises(DavBenchError, match="Rows that train nothing"):
        curves_figure(build([row("svdd")], terms), split="eval")


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_figures_are_files_that_need_no_network(board: Board, tmp_path: Path, ending: str) -> None:
    for name, chart in (("front", pareto_figure(board)), ("curves", curves_figure(board))):
        path = tmp_path / f"{name}{ending}"
        save(chart, path)
        if ending == ".svg":
            text = path.read_text()
            assert "A toy" in text and "dav+tree" in text and "http://www.w3.org/2000/svg" in text
        else:
            with Image.open(path) as image:
                assert (
                    image.width > 1000
                    and len(image.convert("L").histogram())
                    and image.getextrema()[0][0] < 200
                )


def test_commands_refuse_what_they_cannot_draw(tmp_path: Path) -> None:
    with pytest.raises(DavBenchError, match="no form that charts"):
        plot.pareto("dna", tmp_path / "a.gif")
    for wrong in ({"split": "trane"}, {"over": "costs"}):
        with pytest.raises(DavBenchError, match="did you mean"):
            plot.curves("dna", tmp_path / "a.svg", **wrong)


def test_the_commands_draw_the_committed_board(tmp_path: Path) -> None:
    """From the published file alone; the fullest table where no budget is named."""
    results = Path(__file__).parents[2] / "results"
    if not (results / "leaderboards" / "tfbind8.parquet").exists():
        pytest.skip("no checkout")
    plot.pareto("tfbind8", tmp_path / "front.svg", None, None, None, results)
    plot.curves("tfbind8", tmp_path / "curves.svg", "reward", "train", "cost", "cost=1000000", results)
    assert "grpo" in (tmp_path / "front.svg").read_text() + (tmp_path / "curves.svg").read_text()
    assert "Training budget: cost 1,000,000" in (tmp_path / "curves.svg").read_text()
    with pytest.raises(DavBenchError, match=r"It has none, cost=1000000"):
        plot.pareto("tfbind8", tmp_path / "x.svg", None, None, "cost=1", results)
