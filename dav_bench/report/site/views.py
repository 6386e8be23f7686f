"""What templates show: boards and runs as plain text and numbers, ready to be written. No markup here."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dav_bench.plugins import catalog
from dav_bench.report import charts, formats
from dav_bench.report.board import values
from dav_bench.report.families import FAMILIES, Family, family_of
from dav_bench.report.site.gather import Material
from dav_bench.report.terms import Column, flat

if TYPE_CHECKING:
    from dav_bench.report.board import Board, Section
    from dav_bench.report.rows import Row

ROLE_TITLES = {"quality": "quality", "diversity": "diversity", "natural": "naturalness", "cost": "cost"}
WHISKER = 3.0
"""Values further than this many interquartile ranges from the quartiles are drawn at the edge of their column."""
COUNTS = ("forward", "backward", "shared", "reward", "reward_backward", "reward_shared", "seconds")
PHASES = ("search", "fit", "sample", "eval")


@dataclass(frozen=True)
class Cell:
    """One number of a table."""

    column: Column
    """What it is."""
    text: str
    """The mean as shown."""
    half: str = ""
    """Half-width of its interval as shown; empty without one."""
    value: float | None = None
    """The mean."""
    low: float | None = None
    """Left end of the interval in per cent of the width of the column."""
    at: float | None = None
    """The mean, likewise."""
    high: float | None = None
    """Right end, likewise."""
    beyond: bool = False
    """The mean lies outside of what the column draws."""


@dataclass(frozen=True)
class Line:
    """One row of a table."""

    label: str
    """Name of the row."""
    href: str
    """Page of the row, relative to that of the task."""
    family: Family
    """Family of its method."""
    source: str
    """published or local."""
    seeds: str
    """Training seeds."""
    n: int
    """Number of seeds."""
    version: str
    """Version of dav-bench."""
    cells: tuple[Cell, ...]
    """Numbers in the order of the columns."""
    rank: str = ""
    """Interval of its rank; empty without one."""
    layer: int | None = None
    """Pareto layer."""
    below: str = ""
    """Why it stands below the line."""
    yardstick: bool = False
    """Real samples and the like: no rank by nature."""


@dataclass(frozen=True)
class Table:
    """One section of a board."""

    anchor: str
    """Where links lead."""
    title: str
    """Heading."""
    groups: tuple[tuple[str, str, tuple[Column, ...]], ...]
    """Role, its title, its columns."""
    lines: tuple[Line, ...]
    """Rows."""
    remarks: tuple[str, ...] = ()
    """What the table means."""
    ranked: bool = False
    """Whether the task says by what it ranks."""
    by: str = ""
    """By what rows are placed."""
    charts: Mapping[str, str] = field(default_factory=dict)
    """Vega-Lite specifications as JSON by name."""
    axes: Mapping[str, str] = field(default_factory=dict)
    """Columns that the first chart shows, by axis."""
    overdone: tuple[tuple[str, ...], ...] = ()
    """Over-optimisation: header and lines."""

    @property
    def heights(self) -> dict[str, int]:
        """Pixels of each chart, reserved before it is drawn."""
        return {name: int(json.loads(text)["height"]) for name, text in self.charts.items()}


def task_folder(name: str) -> str:
    """Folder of a task's pages."""
    return name.replace("/", "~")


def page_name(label: str, run_id: str, source: str) -> str:
    """File of a row's page."""
    plain = re.sub(r"[^A-Za-z0-9.-]", "-", label.replace("+", "--"))
    return f"{plain}-{run_id}{'' if source == 'published' else '-local'}.html"


# ---------------------------------------------------------------------------------------- tables


def tables(material: Material) -> list[Table]:
    """All sections of a board that hold a row."""
    board = material.board
    found = [_table(board, s, f"s{i}", i) for i, s in enumerate(board.sections) if not s.frame.is_empty()]
    return found


def _table(board: Board, section: Section, anchor: str, place: int) -> Table:
    frame = section.frame
    ranges = {c.name: _range(frame[c.name].to_list()) for c in board.columns}
    held = [c for c in board.columns if frame[c.name].is_not_null().any()]
    groups = tuple(
        (role, title, tuple(c for c in held if c.role == role))
        for role, title in ROLE_TITLES.items()
        if any(c.role == role for c in held)
    )
    order = [c for _, _, columns in groups for c in columns]
    lines = tuple(_line(row, order, ranges) for row in frame.iter_rows(named=True))
    front = section.front
    title = formats.heading_of(section) if place else "Leaderboard"
    by = ", ".join(c.title for c in front.by) if front else ""
    drawn = {} if section.reason else _charts(board, section)
    across, up = charts.axes(board)
    axes = {"x": across.name, "y": up.name} if across and up else {}
    return Table(
        anchor, title, groups, lines, tuple(formats.remarks(section)), "layer" in frame.columns, by, drawn, axes,
        _overdone(section),
    )  # fmt: skip


def _overdone(section: Section) -> tuple[tuple[str, ...], ...]:
    frame = section.overdone
    if frame.is_empty():
        return ()
    names = [c for c in frame.columns if f"{c} ±" in frame.columns]
    lines = [("method", "seeds", *(n.replace("heldout", "held-out") for n in names))]
    for row in frame.iter_rows(named=True):
        cells = []
        for name in names:
            half = row[f"{name} ±"]
            cells.append(
                formats.number(row[name]) + (f" ± {formats.number(half)}" if half is not None else "")
            )
        lines.append((row["label"], row["seeds"], *cells))
    return tuple(lines)


def _line(
    row: Mapping[str, Any], columns: Sequence[Column], ranges: Mapping[str, tuple[float, float]]
) -> Line:
    family = family_of(row["method"], catalog())
    low, high = row.get("rank low"), row.get("rank high")
    rank = "" if low is None else str(low) if low == high else f"{low}–{high}"
    return Line(
        row["label"], page_name(row["method"], row["id"], row["source"]), family, row["source"], row["seeds"],
        row["n"], row["version"], tuple(_cell(row, c, ranges[c.name]) for c in columns), rank, row.get("layer"),
        row.get("below") or "", family.name == "yardstick",
    )  # fmt: skip


def _cell(row: Mapping[str, Any], column: Column, ends: tuple[float, float]) -> Cell:
    value, half = row[column.name], row[f"{column.name} ±"]
    cost = column.role == "cost"
    text = formats.amount(value) if cost else formats.number(value)
    if value is None or not math.isfinite(value):
        return Cell(column, text)
    low, high = ends
    width = high - low
    if width <= 0:
        return Cell(column, text, _half(half, cost), value)

    def place(x: float) -> float:
        return round(100 * min(1.0, max(0.0, (x - low) / width)), 1)

    spread = half if half is not None and math.isfinite(half) else 0.0
    beyond = not low <= value <= high
    return Cell(
        column,
        text,
        _half(half, cost),
        value,
        place(value - spread),
        place(value),
        place(value + spread),
        beyond,
    )


def _half(half: float | None, cost: bool) -> str:
    return "" if half is None or cost or not math.isfinite(half) else formats.number(half)


def _range(held: Iterable[float | None]) -> tuple[float, float]:
    """What a column draws: all its means, without those far from the rest."""
    x = np.array([v for v in held if v is not None and math.isfinite(v)])
    if not len(x):
        return 0.0, 0.0
    q1, q3 = np.quantile(x, [0.25, 0.75])
    room = WHISKER * (q3 - q1)
    inside = x[(x >= q1 - room) & (x <= q3 + room)] if room > 0 else x
    low, high = float(inside.min()), float(inside.max())
    edge = 0.06 * (high - low)
    return low - edge, high + edge


def _charts(board: Board, section: Section) -> dict[str, str]:
    found: dict[str, Any] = {}
    across, up = charts.axes(board)
    many = len(section.frame) > 1
    if across and up and many:
        found["pareto"] = charts.pareto_chart(board, section, titles=False, catalog=catalog())
    if up and many and {"train-cost", "sample-cost"} <= {c.name for c in board.columns}:
        found["cost"] = charts.cost_chart(board, section, titles=False, catalog=catalog())
    keys = ("reward.heldout", "reward.train")
    found["samples"] = next(
        (c for key in keys if (c := charts.densities_chart(board, section, key, catalog())) is not None), None
    )
    held = [(split, "reward-heldout" if split == "eval" else "reward") for split in ("train", "eval")]
    for split, metric in held:
        found[f"learning-{split}"] = charts.curves_chart(board, section, metric, split, catalog=catalog())  # type: ignore[arg-type]
    return {name: spec(chart) for name, chart in found.items() if chart is not None}


def spec(chart: Any) -> str:
    """A chart as JSON for a script element; not validated, which would take most of the time."""
    return as_json(chart.to_dict(validate=False))


def as_json(value: Any) -> str:
    """JSON that no text can break out of a script element."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def choices(board: Board) -> list[dict[str, Any]]:
    """Columns that readers may put on an axis."""
    frames = [s.frame for s in board.sections if not s.reason]
    found = []
    for c in board.columns:
        held = [v for f in frames for v in f[c.name].to_list() if v is not None]
        if held:
            found.append({"name": c.name, "title": c.title, "role": ROLE_TITLES[c.role], "sign": charts.sign(c),
                          "bend": charts.bend(held), "better": c.better})  # fmt: skip
    return found


def families(found: Iterable[Table]) -> list[Family]:
    """Families that occur, in the order of legends."""
    held = {line.family for table in found for line in table.lines}
    return [f for f in FAMILIES if f in held]


def published(board: Board) -> list[dict[str, Any]]:
    """Numbers of others, a table for each source."""
    return [
        {"title": title, "header": header, "lines": lines, "source": title.partition(" (evidence")[0]}
        for title, header, lines in formats._pivot(board.terms.reference)
    ]


def podium(board: Board, found: Sequence[Table]) -> dict[str, Any]:
    """The first rows of the fullest comparable table, for the front page."""
    comparable = [t for t, s in zip(found, _filled(board), strict=True) if not s.reason]
    if not comparable:
        return {}
    table = max(comparable, key=lambda t: len(t.lines))
    shown = [c for c in (charts.axes(board)[1], charts.axes(board)[0]) if c is not None]
    target = next((c for c in board.columns if c.name == "target-distance"), None)
    shown = [target, *shown] if target else shown
    lines = [line for line in table.lines if not line.yardstick][:4]
    yard = [line for line in table.lines if line.yardstick]
    named = [
        (line, [next((c for c in line.cells if c.column.name == s.name), None) for s in shown[:3]])
        for line in (*lines, *yard)
    ]
    return {"table": table, "columns": shown[:3], "lines": named, "more": len(table.lines) - len(named)}


def _filled(board: Board) -> list[Section]:
    return [s for s in board.sections if not s.frame.is_empty()]


def sketch(board: Board) -> list[dict[str, Any]]:
    """The first chart in small: places in per cent of its width and height."""
    across, up = charts.axes(board)
    sections = [s for s in _filled(board) if not s.reason]
    if across is None or up is None or not sections:
        return []
    marks = charts.points(board, max(sections, key=lambda s: len(s.frame)), catalog())
    held = [(m, m[across.name], m[up.name]) for m in marks if across.name in m and up.name in m]
    if len(held) < 2:
        return []
    hue = {f.title: f for f in FAMILIES}
    (x0, x1), (y0, y1) = _ends([x for _, x, _ in held]), _ends([y for _, _, y in held])
    return [
        {"x": round(100 * (x - x0) / (x1 - x0), 1), "y": round(100 - 100 * (y - y0) / (y1 - y0), 1),
         "colour": hue[m["family"]].colour, "yardstick": m["kind"] == "yardstick", "row": m["row"]}
        for m, x, y in held
    ]  # fmt: skip


def _ends(held: Sequence[float]) -> tuple[float, float]:
    low, high = min(held), max(held)
    room = 0.1 * ((high - low) or 1.0)
    return low - room, high + room


# ------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class RowPage:
    """Everything about one row: all seeds of one setting."""

    line: Mapping[str, Any]
    """Its line of the table."""
    family: Family
    """Family of its method."""
    table: str
    """Title of the section it stands in."""
    anchor: str
    """Anchor of that section."""
    numbers: Sequence[tuple[Column, str, list[str]]]
    """Column, mean with interval, and the value of each seed."""
    seeds: Sequence[int]
    """Training seeds."""
    settings: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    """Part of the specification with its settings."""
    meter: Sequence[tuple[str, list[str]]]
    """Phase of the meter, and its counts over the seeds."""
    counts: Sequence[str]
    """What the meter counts."""
    identities: Sequence[tuple[int, str]]
    """Seed and identity."""
    environment: Sequence[tuple[str, str]]
    """Where a local run happened."""
    notes: Sequence[str] = ()
    """What a reader should know first."""


PARTS = ("params", "search", "budget", "model", "sampler", "rewards", "eval", "prompts")
PART_TITLES = {"params": "method", "search": "test-time search", "eval": "evaluation"}


def row_pages(material: Material) -> list[tuple[str, RowPage, tuple[Row, ...]]]:
    """File name, content and runs of every row; a row that several sections repeat has one page."""
    board, found = material.board, {}
    for i, section in enumerate(board.sections):
        for line in section.frame.iter_rows(named=True):
            name = page_name(line["method"], line["id"], line["source"])
            if name in found:
                continue
            rows = section.runs[line["method"], line["id"], line["source"]]
            title = formats.heading_of(section) if i else "Leaderboard"
            found[name] = (name, _row_page(material, line, rows, title, f"s{i}", section.reason), rows)
    return list(found.values())


def _row_page(
    material: Material, line: Mapping[str, Any], rows: Sequence[Row], title: str, anchor: str, reason: str
) -> RowPage:
    board = material.board
    each = [values(row, board.terms) for row in rows]
    numbers = []
    for column in board.columns:
        if line[column.name] is not None:
            show = formats.amount if column.role == "cost" else formats.number
            numbers.append((column, formats.cell(line, column), [show(e.get(column.name)) for e in each]))
    notes = [f"Not comparable with the leaderboard: {reason}."] if reason else []
    notes += [f"Below the line: {line['below']}."] if line.get("below") else []
    notes += (
        ["A run of this machine: not part of the published board."] if line["source"] != "published" else []
    )
    counts, meter = _meter(rows)
    return RowPage(
        line, family_of(line["method"], catalog()), title, anchor, numbers, [r.seed for r in rows],
        _settings(rows[0].spec), meter, counts, [(r.seed, r.identity) for r in rows],
        _environment(material, rows), notes,
    )  # fmt: skip


def _settings(given: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    found = []
    for part in PARTS:
        held = flat(given.get(part) or {})
        lines = [(key, _text(value)) for key, value in held.items() if key and key != "text"]
        if lines:
            found.append((PART_TITLES.get(part, part), lines))
    rest = [(k, _text(given[k])) for k in ("task", "task_version", "task_hash", "heldout") if k in given]
    return [*found, ("task", rest)]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "–" if value in ("", "none", None) else str(value)


def _meter(rows: Sequence[Row]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Counts by phase, as the mean over seeds."""
    phases = [p for p in PHASES if any(p in r.meter for r in rows)]
    phases += sorted({p for r in rows for p in r.meter} - set(phases))
    held = {name for r in rows for p in phases for name in r.meter.get(p, {})}
    names = [*(n for n in COUNTS if n in held), *sorted(held - set(COUNTS))]
    names = [n for n in names if any(r.meter.get(p, {}).get(n) for r in rows for p in phases)]
    lines = []
    for phase in phases:
        means = [float(np.mean([r.meter.get(phase, {}).get(n, 0) for r in rows])) for n in names]
        told = [round(v, 1) if n == "seconds" else round(v) for n, v in zip(names, means, strict=True)]
        lines.append((phase, [formats.amount(v) for v in told]))
    return [n.replace("_", " ") for n in names], lines


def _environment(material: Material, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Versions and hardware, in one line where all seeds agree."""
    found: dict[str, list[str]] = {}
    runs = material.local(rows)
    for env in [row.env for row in rows]:
        for key, value in _told(env):
            found.setdefault(key, [])
            if value not in found[key]:
                found[key].append(value)
    for run in runs:
        started = str(run.meta.get("started", ""))[:16].replace("T", " ")
        found.setdefault("started", []).append(f"{started} UTC (seed {run.meta.get('seed')})")
    return [(key, "; ".join(v)) for key, v in found.items()]


def _told(env: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    git = env.get("git") or {}
    yield from (("python", str(env["python"])),) if env.get("python") else ()
    yield from (("platform", str(env["platform"])),) if env.get("platform") else ()
    if git.get("sha"):
        yield "git", git["sha"][:12] + (f" with changes {git['diff']}" if git.get("diff") else "")
    for key in ("hardware", "cuda", "execution", "packages", "plugins"):
        if env.get(key):
            yield key, ", ".join(f"{k} {_text(v)}" for k, v in env[key].items())


# --------------------------------------------------------------------------------------- stamps


def digest(parts: Iterable[bytes]) -> str:
    """sha256 of several pieces."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()
