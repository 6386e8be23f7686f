"""Charts as figures of their own: with a title, names beside the lines, and a band for the spread between seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dav_bench.errors import DavBenchError
from dav_bench.report import charts
from dav_bench.report.curves import Over, Split, band, find_curve
from dav_bench.report.families import family_of
from dav_bench.report.formats import heading_of

if TYPE_CHECKING:
    import altair as alt

    from dav_bench.report.board import Board, Section
    from dav_bench.report.rows import Row

SPENT = {"cost": "network rows, forward + 2 x backward", "reward_rows": "reward rows, forward + 2 x backward"}
"""Units of what training spends."""

SPLITS = {"train": "Samples that the search of a round found", "eval": "Evaluation samples on the way"}
"""What a curve is measured on."""


def pareto_figure(
    board: Board, section: Section | None = None, x: str | None = None, y: str | None = None
) -> alt.LayerChart:
    """`charts.pareto_chart` with a title: rows with intervals, and the front that no other row beats in both."""
    section = section or board.main
    chart = charts.pareto_chart(board, section, x, y)
    return titled(
        chart, board, section, "Bars: 95 % interval over seeds. Dotted: rows that no other beats in both."
    )


def curves_figure(
    board: Board,
    section: Section | None = None,
    metric: str = "reward",
    split: Split = "train",
    over: Over = "cost",
) -> alt.LayerChart:
    """A metric over what training had spent: mean over seeds of each row, with its Student t interval.

    Seeds are compared at the same cost (`curves.band`); rows of one seed have no band.

    Raises:
        DavBenchError: no row has that curve; those that there are are named.
    """
    import altair as alt

    section = section or board.main
    data: list[dict[str, Any]] = []
    for line in section.frame.iter_rows(named=True):
        runs = section.runs[line["method"], line["id"], line["source"]]
        found = [find_curve(run.curves, metric, split) for run in runs]
        held = [c for c in found if c is not None]
        if not held or len(held) < len(found):
            continue
        family = family_of(line["method"]).title
        points = band(held, over)
        for i, (spent, mean, low, high, n) in enumerate(points):
            point = {"row": line["label"], "family": family, "spent": spent, "value": mean, "seeds": n}
            data.append(point | {"low": low, "high": high, "last": i == len(points) - 1})
    if not data:
        raise no_curves(board, section, metric, split)
    title = next((charts.heading(c) for c in board.columns if c.name == metric), metric)
    legend = alt.Legend(title="family", symbolOpacity=1)
    hue = charts.hue_of((p["family"] for p in data), legend)
    room = 1.17 * max(p["spent"] for p in data)  # for the names of the rows
    cost = f"training cost ({SPENT[over]})"
    x = alt.X("spent:Q", title=cost, scale=alt.Scale(domainMin=0, domainMax=room, nice=False),
              axis=alt.Axis(format="~s", labelOverlap="greedy"))  # fmt: skip
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False))
    base = alt.Chart()
    area = base.transform_filter("isValid(datum.low)").mark_area(opacity=0.12).encode(
        x, alt.Y("low:Q", title=title), alt.Y2("high"), hue, detail="row:N"
    )  # fmt: skip
    lines = base.mark_line(strokeWidth=1.75).encode(x, y, hue, detail="row:N")
    ends = base.transform_filter("isValid(datum.label)")
    dots = ends.mark_point(filled=True, size=36, opacity=1).encode(x, y, hue)
    names = ends.mark_text(fontSize=11, align="left").encode(
        alt.X("right:Q", title=cost), alt.Y("label:Q", title=title), alt.Text("row:N"), hue
    )
    what = f"{title} over the cost of training, {board.terms.task}. {SPLITS.get(split, split)}."
    chart = charts._dressed(alt.layer(area, lines, dots, names), what, charts.HEIGHT, _labelled(data))
    return titled(chart, board, section, f"{SPLITS.get(split, split)}. Band: 95 % interval over seeds.")


def _labelled(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the last point of each row a place for its name: to the right of all, apart from the others."""
    heights = [v for p in data for v in (p["low"], p["high"], p["value"]) if v is not None]
    gap = 0.042 * (max(heights) - min(heights))
    ends = sorted((p for p in data if p.pop("last")), key=lambda p: p["value"])
    right = 1.02 * max(p["spent"] for p in data)
    places = np.array([p["value"] for p in ends])
    for _ in range(200):  # neighbours that overlap push each other away
        push = np.maximum(0.0, gap - np.diff(places)) / 2
        places[1:] += push
        places[:-1] -= push
    for place, end in zip(places.tolist(), ends, strict=True):
        end |= {"label": place, "right": right}
    return data


def titled(chart: alt.LayerChart, board: Board, section: Section, note: str) -> alt.LayerChart:
    """A chart under the name of its board, and of its table where that is not the main one."""
    import altair as alt

    name = board.terms.title or board.terms.task
    below = [heading_of(section), note] if section.budget or section.reason else [note]
    return chart.properties(
        title=alt.TitleParams(name, subtitle=below, anchor="start", subtitleColor="#666666")
    )


def no_curves(board: Board, section: Section, metric: str, split: str) -> DavBenchError:
    """The error that names what was recorded."""
    runs: Sequence[Row] = [run for rows in section.runs.values() for run in rows]
    known = sorted({f"{c.metric} ({c.split})" for run in runs for c in run.curves})
    return DavBenchError(
        f"no row of {board.terms.task} has a curve of {metric!r} in {split}.",
        f"There are {', '.join(known)}."
        if known
        else "Rows that train nothing have none, nor those of earlier versions.",
        "--metric reward; evaluations on the way need `--set eval.every=5` when a run is made",
    )
