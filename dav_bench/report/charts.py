"""Charts of boards as Vega-Lite: quality against diversity, quality against cost, the samples behind a row, learning.

Each takes what a board holds and gives an altair chart, which a page makes interactive and `vl_convert` draws as SVG or
PNG. What a page may change (columns of the axes, number of samples, families shown) are parameters of the chart, so one
specification serves both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dav_bench.errors import DavBenchError, near
from dav_bench.report.curves import Over, Split, find_curve
from dav_bench.report.families import FAMILIES, family_of
from dav_bench.report.terms import Column

if TYPE_CHECKING:
    import altair as alt

    from dav_bench.registry import Catalog
    from dav_bench.report.board import Board, Section

HEIGHT = 340
"""Pixels of a chart; in a page its width is that of its container."""
WIDTH = 640
"""Pixels of a chart in a file of its own."""
GRID = 72
"""Points of a density."""

SHAPES = {
    "yardstick": "diamond",
    "search only": "circle",
    "trained": "square",
    "trained, then searched": "triangle-up",
}
"""What the marker says, so that nothing hangs on colour alone."""

_SPARSE = {"labelOverlap": "greedy", "tickCount": 6}
_SHOWN = "indexof(shown, datum.family) >= 0"


def points(board: Board, section: Section, catalog: Catalog | None = None) -> list[dict[str, Any]]:
    """One mark for each row: its numbers as `<column>`, `<column> lo` and `<column> hi`, and what gate it fails."""
    found = []
    for line in section.frame.iter_rows(named=True):
        family = family_of(line["method"], catalog)
        point = {
            "row": _named(line),
            "family": family.title,
            "seeds": line["n"],
            "kind": _kind(line, family.name),
        }
        if line.get("below"):
            point["below"] = line["below"]
        for column in board.columns:
            mean, half = line[column.name], line[f"{column.name} ±"]
            if mean is not None and np.isfinite(mean):
                point[column.name] = _short(mean)
                if half is not None and np.isfinite(half):
                    point |= {
                        f"{column.name} lo": _short(mean - half),
                        f"{column.name} hi": _short(mean + half),
                    }
        found.append(point)
    return found


def _named(line: Mapping[str, Any]) -> str:
    return line["label"] + ("" if line["source"] == "published" else " (local)")


def _kind(line: Mapping[str, Any], family: str) -> str:
    if family == "yardstick":
        return "yardstick"
    if not line.get("train-cost"):
        return "search only"
    return "trained, then searched" if "+" in line["method"] else "trained"


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def axes(board: Board) -> tuple[Column | None, Column | None]:
    """The columns that the first chart shows: diversity, and the reward that nothing was tuned on."""
    named = {c.name: c for c in board.columns}
    across = next((c for c in board.columns if c.role == "diversity"), None)
    return across, named.get("reward-heldout") or named.get("reward")


def pareto_chart(
    board: Board, section: Section | None = None, x: str | None = None, y: str | None = None, *,
    titles: bool = True, catalog: Catalog | None = None,
) -> alt.LayerChart:  # fmt: skip
    """Two columns against each other, with intervals, and steps through the rows that no other beats in both.

    Args:
        board: The board.
        section: Which of its tables; None is the main one.
        x: Column across; None is the diversity.
        y: Column upwards; None is the held-out reward, or the reward where nothing is held out.
        titles: Write the columns on the axes and draw legends; a page that lets readers choose does that itself.
        catalog: To find the family of methods of plugins.

    Parameters of the chart: `xcol`, `ycol` (columns), `xsign`, `ysign` (1 where more is better, -1 where less is),
    `xbend`, `ybend` (see `bend`) and `shown` (families).
    """
    across, up = (_column(board, name, usual) for name, usual in zip((x, y), axes(board), strict=True))
    data = points(board, section or board.main, catalog)
    what = f"{up.title} against {across.title} of {len(data)} rows of {board.terms.task}"
    names = {"xcol": across.name, "ycol": up.name, "xsign": sign(across), "ysign": sign(up)}
    bends = {"xbend": bend(p.get(across.name) for p in data), "ybend": bend(p.get(up.name) for p in data)}
    title = (heading(across), heading(up)) if titles else (None, None)
    places = {"x": "datum[xcol]", "lo": "datum[xcol + ' lo']", "hi": "datum[xcol + ' hi']"}
    scale = {"type": "symlog", "constant": {"expr": "xbend"}, "zero": False}
    return _scatter(data, what, names | bends, places, title, scale, board)


def _column(board: Board, name: str | None, usual: Column | None) -> Column:
    found = usual if name is None else next((c for c in board.columns if c.name == name), None)
    if found is None:
        names = [c.name for c in board.columns]
        what = "a second column to draw" if name is None else f"a column {name!r}"
        raise DavBenchError(
            f"the board of {board.terms.task} has not {what}{near(name or '', names)}",
            f"It has {', '.join(names)}.",
        )
    return found


def cost_chart(
    board: Board, section: Section | None = None, y: str | None = None, *, samples: int = 1000, titles: bool = True,
    catalog: Catalog | None = None,
) -> alt.LayerChart:  # fmt: skip
    """A column against all network rows that training and drawing `samples` samples take.

    Parameters of the chart: `ycol`, `ysign`, `ybend`, `samples` and `shown`.
    """
    up = _column(board, y, axes(board)[1])
    data = points(board, section or board.main, catalog)
    what = (
        f"{up.title} against the cost of training and drawing samples, {len(data)} rows of {board.terms.task}"
    )
    names = {"ycol": up.name, "ysign": sign(up), "xsign": -1, "ybend": bend(p.get(up.name) for p in data)}
    total = "datum['train-cost'] + samples * datum['sample-cost']"
    title = (
        (f"network rows to train and to draw {samples:,} samples", heading(up)) if titles else (None, None)
    )
    places = {
        "x": f"({total}) || null",
        "lo": "null",
        "hi": "null",
    }  # what costs nothing has no place on a log scale
    return _scatter(
        data, what, names | {"samples": samples}, places, title, {"type": "log", "nice": False}, board
    )


def _scatter(
    data: list[dict[str, Any]], what: str, values: Mapping[str, Any], across: Mapping[str, str],
    titles: tuple[str | None, str | None], scale: Mapping[str, Any], board: Board,
) -> alt.LayerChart:  # fmt: skip
    import altair as alt

    families = [p["family"] for p in data]
    params = [alt.param(name=name, value=value) for name, value in values.items()]
    params.append(_shown(families))
    base = alt.Chart()
    axis = _SPARSE
    log = scale["type"] == "log"
    lines = {"grid": not log, "format": "~s" if log else alt.Undefined}
    at_x = alt.X("x:Q", scale=alt.Scale(padding=18, **scale), title=titles[0],
                 axis=alt.Axis(**axis, **lines))  # fmt: skip
    at_y = alt.Y("y:Q", scale=alt.Scale(type="symlog", constant={"expr": "ybend"}, zero=False, padding=18),
                 title=titles[1], axis=alt.Axis(**axis))  # fmt: skip
    hue = hue_of(families, _legend(titles, "family"))
    shape = alt.Shape("kind:N", scale=alt.Scale(domain=list(SHAPES), range=list(SHAPES.values())),
                      legend=_legend(titles, "kind"))  # fmt: skip
    tips = [alt.Tooltip("row:N", title="method"), alt.Tooltip("family:N"), alt.Tooltip("seeds:Q")]
    tips += [alt.Tooltip(f"{c.name}:Q", title=c.title, format=",.4~g") for c in board.columns[:8]]
    tips += [alt.Tooltip("x:Q", title="rows in all", format=",.4~g")] if "samples" in values else []
    falling = [alt.SortField("u", "descending"), alt.SortField("v", "descending")]
    ahead = (
        base.transform_filter("datum.kind != 'yardstick' && !datum.below")
        .transform_calculate(u="xsign * datum.x", v="ysign * datum.y")
        .transform_window(best="max(v)", frame=[None, 0], sort=falling)
        .transform_window(before="lag(best)", sort=falling)
        .transform_filter("!isValid(datum.before) || datum.v > datum.before")
    )
    front = ahead.mark_line(
        strokeDash=[2, 4], strokeWidth=1.25, color="#888888", interpolate="step-before"
    ).encode(at_x, at_y, order="u:Q")
    wide = (
        base.transform_filter("isValid(datum.xlo)")
        .mark_rule(strokeWidth=1.25, opacity=0.55)
        .encode(alt.X("xlo:Q", title=titles[0]), at_y, alt.X2("xhi"), hue)
    )
    tall = base.transform_filter("isValid(datum.ylo)").mark_rule(strokeWidth=1.25, opacity=0.55).encode(
        at_x, alt.Y("ylo:Q", title=titles[1]), alt.Y2("yhi"), hue
    )  # fmt: skip
    faded = alt.condition("datum.below", alt.value(0.35), alt.value(1))  # what fails a gate is on no front
    tips += [alt.Tooltip("below:N", title="below the line")] if any("below" in p for p in data) else []
    dots = base.mark_point(filled=True, size=90, stroke="white", strokeWidth=0.75).encode(
        at_x, at_y, hue, shape, tooltip=tips, opacity=faded
    )
    late = "scale('x', datum.x) > width - 80"  # labels near the right edge stand to the left of their mark
    text = {
        "fontSize": 11,
        "limit": 130,
        "dy": -8,
        "align": {"expr": f"{late} ? 'right' : 'left'"},
        "dx": {"expr": f"{late} ? -7 : 7"},
    }
    label = ahead.mark_text(**text).encode(at_x, at_y, alt.Text("row:N"))
    text |= {"dy": 13}  # below the mark, out of the way of the others
    yard = (
        base.transform_filter("datum.kind == 'yardstick'")
        .mark_text(**text)
        .encode(at_x, at_y, alt.Text("row:N"))
    )
    chart = (
        alt.layer(front, *([] if across["lo"] == "null" else [wide]), tall, dots, label, yard)
        .add_params(*params)
        .transform_filter(_SHOWN)
        .transform_calculate(
            x=across["x"], xlo=across["lo"], xhi=across["hi"],
            y="datum[ycol]", ylo="datum[ycol + ' lo']", yhi="datum[ycol + ' hi']",
        )
        .transform_filter("isValid(datum.x) && isValid(datum.y)")
    )  # fmt: skip
    return _dressed(chart, what, HEIGHT, data)


def _legend(titles: tuple[str | None, str | None], title: str) -> Any:
    import altair as alt

    return None if titles == (None, None) else alt.Legend(title=title)


def densities_chart(
    board: Board, section: Section | None = None, key: str = "reward.heldout", catalog: Catalog | None = None
) -> alt.LayerChart | None:
    """The per-sample values behind each row of a table as ridges with their medians; None without such values.

    Args:
        board: The board.
        section: Which of its tables; None is the main one.
        key: Column of the samples, such as reward.heldout.
        catalog: To find the family of methods of plugins.
    """
    import altair as alt

    section, held = section or board.main, []
    for line in section.frame.iter_rows(named=True):
        mine = section.runs[line["method"], line["id"], line["source"]]
        found = [r.samples[key] for r in mine if key in r.samples]
        values = np.concatenate(found) if found else np.empty(0)
        values = values[np.isfinite(values)]
        if len(values) > 1:
            held.append((_named(line), family_of(line["method"], catalog), values))
    if not held:
        return None
    low, high = _window([v for _, _, v in held])
    grid = np.linspace(low, high, GRID)
    curves = [density(v, grid) for _, _, v in held]
    data = []
    for i, ((name, family, values), curve) in enumerate(zip(held, curves, strict=True)):
        peak = curve.max() or 1.0
        data.append({"row": name, "family": family.title, "i": -i, "top": -i + 0.5, "n": len(values),
                     "median": _short(float(np.median(values))),
                     "height": [round(0.92 * b / peak, 3) for b in curve]})  # fmt: skip
    names = [name for name, _, _ in held]
    families = [family.title for _, family, _ in held]
    hue = hue_of(families)
    level = {
        "title": None,
        "scale": alt.Scale(domain=[-len(names) + 0.8, 1.0], nice=False),
        "axis": alt.Axis(
            values=[-i for i in range(len(names))], labelExpr=f"{names!r}[-datum.value]", labelLimit=140,
            labelBaseline="bottom", labelOverlap=False,
        ),
    }  # fmt: skip
    title = {c.name: c.title for c in board.columns}.get(
        "reward-heldout" if "heldout" in key else "reward", key
    )
    across = {
        "title": f"{title} of single samples",
        "scale": alt.Scale(domain=[low, high], nice=False),
        "axis": alt.Axis(labelOverlap="greedy", tickCount=8),
    }
    step = (high - low) / (GRID - 1)
    ridge = (
        alt.Chart()
        .transform_flatten(["height"])
        .transform_window(k="row_number()", groupby=["i"])
        .transform_calculate(x=f"{low} + (datum.k - 1) * {step}", y="datum.i + datum.height")
        .mark_area(opacity=0.45, line={"strokeWidth": 1.25}, clip=True)
        .encode(alt.X("x:Q", **across), alt.Y("y:Q", **level), alt.Y2("i"), hue, detail="i:N")
    )
    tips = [alt.Tooltip("row:N", title="method"), alt.Tooltip("median:Q", format=",.4~g"),
            alt.Tooltip("n:Q", title="samples")]  # fmt: skip
    middle = (
        alt.Chart()
        .mark_rule(strokeWidth=2)
        .encode(alt.X("median:Q", **across), alt.Y("i:Q", **level), alt.Y2("top"), hue, tooltip=tips)
    )
    layers = alt.layer(ridge, middle).add_params(_shown(families)).transform_filter(_SHOWN)
    what = f"{title} of single samples for {len(names)} rows of {board.terms.task}"
    return _dressed(layers, what, 60 + 34 * len(names), data)


def density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density (len(grid),) with Silverman's bandwidth, no narrower than the grid."""
    spread = min(values.std(), np.subtract(*np.quantile(values, [0.75, 0.25])) / 1.34 or values.std())
    width = max(0.9 * spread * len(values) ** -0.2, float(grid[1] - grid[0]))
    return np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2).mean(1) / (width * np.sqrt(2 * np.pi))


def _window(held: Sequence[np.ndarray]) -> tuple[float, float]:
    """Where most of the values lie, so that a few stray ones do not flatten the rest."""
    low = min(float(np.quantile(v, 0.01)) for v in held)
    high = max(float(np.quantile(v, 0.99)) for v in held)
    room = 0.06 * ((high - low) or 1.0)
    return _short(low - room), _short(high + room)


def curves_chart(
    board: Board, section: Section | None = None, metric: str = "reward", split: Split = "train", over: Over = "cost",
    catalog: Catalog | None = None,
) -> alt.LayerChart | None:  # fmt: skip
    """A metric over what training had spent, a line for each run; None where no run recorded it.

    Args:
        board: The board.
        section: Which of its tables; None is the main one.
        metric: Name of the metric.
        split: train (what the search of a round found) or eval (the samples of an evaluation on the way).
        over: cost (network rows) or reward_rows.
        catalog: To find the family of methods of plugins.
    """
    import altair as alt

    section = section or board.main
    data: list[dict[str, Any]] = []
    for line in section.frame.iter_rows(named=True):
        family = family_of(line["method"], catalog).title
        for run in section.runs[line["method"], line["id"], line["source"]]:
            found = find_curve(run.curves, metric, split)
            if found is None:
                continue
            kept = np.isfinite(found.value)
            spent, value = ([_short(v) for v in x[kept]] for x in (found.over(over), found.value))
            data.append(
                {"row": _named(line), "seed": run.seed, "family": family, "spent": spent, "value": value}
            )
    if not data:
        return None
    title = {c.name: c.title for c in board.columns}.get(metric, metric)
    unit = "network rows" if over == "cost" else "reward rows"
    base = alt.Chart().encode(
        alt.X("spent:Q", title=f"{unit} spent on training", axis=alt.Axis(format="~s", **_SPARSE)),
        alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
        hue_of([p["family"] for p in data]),
        detail=["row:N", "seed:N"],
    )
    tips = [alt.Tooltip("row:N", title="method"), alt.Tooltip("seed:N"), alt.Tooltip("spent:Q", format=",.4~g"),
            alt.Tooltip("value:Q", title=title, format=",.4~g")]  # fmt: skip
    few = (
        max(len(p["spent"]) for p in data) <= 24
    )  # more dots than that would hide their lines, and only give tips
    lines = base.mark_line(strokeWidth=1.5 if few else 1, opacity=0.75)
    dots = base.mark_point(filled=True, size=24, opacity=1 if few else 0).encode(tooltip=tips)
    layers = alt.layer(lines, dots).add_params(_shown([p["family"] for p in data])).transform_filter(_SHOWN)
    layers = layers.transform_flatten(["spent", "value"])
    return _dressed(layers, f"{title} over {unit} spent on training, {board.terms.task}", HEIGHT, data)


def save(chart: Any, path: Path) -> None:
    """Write a chart as .svg, .png, .json (Vega-Lite) or .html, by the ending of the path; offline."""
    import vl_convert

    spec = chart.to_dict()
    if path.suffix in (".svg", ".png"):
        spec |= {"width": WIDTH, "background": "white"}  # there is no container to fill
    writers = {
        ".svg": lambda: vl_convert.vegalite_to_svg(spec).encode(),
        ".png": lambda: vl_convert.vegalite_to_png(spec, scale=2),
        ".json": lambda: (json.dumps(spec, indent=1) + "\n").encode(),
        ".html": lambda: vl_convert.vegalite_to_html(spec, bundle=True).encode(),
    }
    if path.suffix not in writers:
        raise DavBenchError(
            f"{path} has no ending of a picture.", f"There are {', '.join(writers)}.", "--out figure.svg"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(writers[path.suffix]())


def _roses(titles: Iterable[str]) -> tuple[list[str], list[str]]:
    """Families that occur and their hues, in the order of legends."""
    held = set(titles)
    found = [f for f in FAMILIES if f.title in held]
    return [f.title for f in found], [f.colour for f in found]


def hue_of(titles: Iterable[str], legend: Any = None) -> Any:
    """Colour by family: the hues of those in `titles`, in the order in which every chart has them."""
    import altair as alt

    names, hues = _roses(titles)
    return alt.Color("family:N", scale=alt.Scale(domain=names, range=hues), legend=legend)


def _shown(titles: Iterable[str]) -> Any:
    import altair as alt

    return alt.param(name="shown", value=_roses(titles)[0])


def sign(column: Column) -> int:
    """1 where more is better (or neither is), -1 where less is."""
    return -1 if column.better == "down" else 1


def heading(column: Column) -> str:
    """Title of an axis with the better direction."""
    return column.title + {"up": " (more is better)", "down": " (less is better)"}.get(column.better, "")


def bend(values: Iterable[float | None]) -> float:
    """Where an axis turns from linear to logarithmic: the constant of a symmetric log scale.

    So large that the scale is linear, unless a few values lie far from the rest; then their typical distance to 0.
    """
    x = np.abs([v for v in values if v is not None])
    middle = float(np.median(x)) if len(x) else 0.0
    far = middle > 0 and float(x.max()) > 30 * middle
    return _short(middle) if far else 1e6 * float(x.max() if len(x) and x.max() > 0 else 1.0)


def _dressed(chart: Any, what: str, height: int, data: Any) -> Any:
    """Size, description and plain looks; a page colours text and grid by its own style sheet."""
    import altair as alt

    font = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
    size = {"width": "container", "height": height, "autosize": {"type": "fit", "contains": "padding"}}
    chart = (
        chart.properties(description=what, **size)
        .configure(font=font, background="transparent", padding={"left": 4, "right": 8, "top": 8, "bottom": 4})
        .configure_view(stroke=None)
        .configure_axis(
            domain=False, ticks=False, labelPadding=8, titlePadding=10, labelFontSize=11, titleFontSize=12,
            titleFontWeight="normal", gridColor="#8884", labelColor="#666666", titleColor="#666666",
        )
        .configure_text(color="#555555")
    )  # fmt: skip
    chart.data = alt.Data(values=data)  # last, since altair copies what a chart holds with each change
    return chart
