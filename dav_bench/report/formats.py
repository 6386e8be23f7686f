"""A board as Markdown, HTML, CSV, JSON or a rich table. Pure text from a `Board`: same board, same bytes."""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dav_bench.report.board import OVERDONE, Board, Section
from dav_bench.report.order import FIRST, Front
from dav_bench.report.pareto import SEEDS
from dav_bench.report.terms import Column, flat

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table

FORMATS = ("md", "html", "csv", "json")
"""What `render` writes."""

_ARROW = {"up": " ↑", "down": " ↓"}
_FREE = ("task_hash",)  # settings that mean nothing to a reader


def render(board: Board, fmt: str) -> str:
    """Write a board in one of `FORMATS`."""
    return {"md": markdown, "html": page, "csv": table_csv, "json": document}[fmt](board)


# ---------------------------------------------------------------------------------------- cells


def number(value: float | None) -> str:
    """A number with about four digits: 0.397, 12.35, 1,234, 2.41 M; a dash where nothing was measured."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M")):
        if size >= limit:
            return f"{value / limit:.2f} {unit}"
    if size >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.{3 if size < 10 else 2 if size < 100 else 1}f}"
    return text.lstrip("-") if float(text) == 0 else text


def amount(value: float | None) -> str:
    """A number of the cost columns: whole numbers stay whole."""
    return (
        f"{value:,.0f}" if value is not None and abs(value) < 1e6 and value == int(value) else number(value)
    )


def cell(line: Mapping[str, Any], column: Column) -> str:
    """One cell: mean ± half-width of the interval over seeds."""
    if column.role == "cost":
        return amount(line[column.name])
    return _with_error(line[column.name], line[f"{column.name} ±"])


def heading(column: Column) -> str:
    """Title with the better direction."""
    return column.title + _ARROW.get(column.better, "")


def _cells(section: Section, columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """Header and text of one table; versions are shown."""
    places = _places(section)
    header = ["method", "seeds", *places, *map(heading, columns), "version"]
    lines = []
    for line in section.frame.iter_rows(named=True):
        numbers = [*(_place(line, p) for p in places), *(cell(line, c) for c in columns)]
        lines.append([named(line), line["seeds"], *numbers, line["version"] or "–"])
    return header, lines


def named(line: Mapping[str, Any]) -> str:
    """Name of a row; "local" marks what is not published, "foreign" what was imported."""
    return str(line["label"]) + ("" if line["source"] == "published" else f" ({line['source']})")


def _places(section: Section) -> list[str]:
    """Columns that say where a row stands; with a single objective the layers are the order itself.

    None where no row has a rank yet: after a run of one seed a table shows numbers, not places.
    """
    if section.front is None or section.frame["rank low"].is_null().all():
        return []
    return ["layer", "rank"] if len(section.front.by) > 1 else ["rank"]


def _place(line: Mapping[str, Any], name: str) -> str:
    if name == "layer":
        return "–" if line["layer"] is None else str(line["layer"])
    low, high = line["rank low"], line["rank high"]
    return "–" if low is None else str(low) if low == high else f"{low}–{high}"


def _overdone(section: Section) -> tuple[list[str], list[list[str]]]:
    """Header and text of the table of over-optimisation, without what no row has."""
    frame = section.overdone
    shown = [name for name in OVERDONE if not frame.is_empty() and frame[name].drop_nulls().len()]
    lines = []
    for line in frame.iter_rows(named=True):
        pairs = [(line[name], line[f"{name} ±"]) for name in shown]
        lines.append([named(line), line["seeds"], *(_with_error(*pair) for pair in pairs)])
    return ["method", "seeds", *(_OVERDONE[name] for name in shown)], lines


_OVERDONE = {
    "train gain": "train gain",
    "heldout gain": "held-out gain",
    "transfer": "transfer ↑",
    "peak loss": "peak loss ↓",
}


def _with_error(mean: float | None, half: float | None) -> str:
    return number(mean) if half is None else f"{number(mean)} ± {number(half)}"


# ---------------------------------------------------------------------------------------- notes


def protocol(board: Board) -> str:
    """One sentence: how the rows of the main table were measured."""
    settings = flat(board.terms.settings)
    told = [f"{key} {value}" for key, value in sorted(settings.items()) if key not in _FREE and value != ""]
    return f"Measured with: {', '.join(told)}."


def notes(board: Board) -> list[str]:
    """What the numbers mean, one line each."""
    terms, names = board.terms, {c.name for c in board.columns}
    lines = [
        *_ordered(board),
        "± is half the 95 % Student t interval of the mean over seeds, t(n-1, .975) s / sqrt(n); one seed has none. "
        "Cost columns are means.",
        f"Rewards are the {terms.reduce} over samples.",
    ]
    if "gap" in names:
        scale = "; ".join(
            f"{role}: median {number(s['median'])}, 90th percentile {number(s['q90'])}"
            for role, s in sorted(terms.scales.items())
        )
        lines.append(
            "gap = scaled train reward - scaled held-out reward, where scaled = (reward - median) / "
            f"(90th percentile - median) of {terms.scale_of} ({scale}). Above 0: the method fits its own reward."
        )
    lines.append(
        "cost = network rows forward + 2 x rows backward; training cost is all before the final samples "
        "(a row `a+b` carries the training of `a`), cost per sample is the drawing of one of them, "
        "evaluation is charged to nobody; reward rows count training and drawing."
    )
    lines += [f"{c.title} ({c.role}): {c.summary}." for c in terms.metrics if c.summary and c.name in names]
    return lines


def _ordered(board: Board) -> list[str]:
    """In which order the rows stand, and what that says."""
    methods = set(board.main.frame["method"]) if not board.main.frame.is_empty() else set()
    first = [f"`{m}`" for m in FIRST if m in methods]
    after = f"Rows after {_and(first)}" if first else "Rows"
    front = board.main.front
    if front is None:
        by = "by held-out reward (train reward where there is none)"
        if "target-distance" in {c.name for c in board.columns}:
            by = "by their distance to the exact target"
        return [
            f"{after} are ordered {by}, "
            "which is no rank: with fewer than 3 seeds, or where intervals overlap, the order says nothing."
        ]
    by = _and([c.title for c in front.by])
    lines = [f"{after} are ordered by {by}; the order of rows whose ranks overlap says nothing."]
    if len(front.by) > 1:
        lines = [
            f"{after} are ordered by layer: 1 where no row is as good in {by} and better in one of them, 2 where only "
            f"rows of layer 1 are, and so on; within a layer by hypervolume{_reference(front)}. Means decide, so the "
            "order of rows whose ranks overlap says nothing."
        ]
    worse = f"are better in {by}"
    if len(front.by) > 1:
        worse = f"are as good in {by} and better in one of them"
    return [
        *lines,
        f"rank = 1 + number of rows that {worse}, as a 95 % interval from a bootstrap over seeds "
        "(docs/statistics.md); no rank with fewer than 3 seeds, and none for yardsticks.",
    ]


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _reference(front: Front) -> str:
    if not front.reference:
        return ""
    at = ", ".join(f"{c.title} {number(front.reference[c.name])}" for c in front.by)
    return f" above the reference point ({at})"


def _unplaced(section: Section) -> list[str]:
    """Rows without a rank, with the reason, and how much the first layer covers; one line each."""
    if section.front is None:
        return []
    lines = []
    methods = [line for line in section.frame.iter_rows(named=True) if line["method"] not in FIRST]
    if below := [f"{named(line)} ({line['below']})" for line in methods if line["below"]]:
        lines.append(f"Below the line, without layer or rank: {', '.join(below)}.")
    few = [f"{named(line)} ({line['n']})" for line in methods if not line["below"] and line["n"] < SEEDS]
    if few:
        lines.append(f"No rank with fewer than {SEEDS} seeds: {', '.join(few)}.")
    if len(section.front.by) > 1 and section.front.volume is not None:
        lines.append(f"Hypervolume of layer 1: {number(section.front.volume)}.")
    return lines


_COUNTED = {
    "cost": "{} network rows (forward + 2 x backward) in search and fit",
    "reward": "{} reward rows (forward + 2 x backward) in search and fit",
    "seconds": "{} seconds of search and fit",
}


def heading_of(section: Section) -> str:
    """What a table other than the main one is called."""
    if section.budget is not None:
        return f"Training budget: {section.budget}"
    return f"Not comparable: {section.reason}"


def remarks(section: Section) -> list[str]:
    """What a table says about its rows beyond their numbers, one line each."""
    return [*_under_budget(section), *_unplaced(section)]


def _under_budget(section: Section) -> list[str]:
    """What a table under a budget means, and which methods it lacks."""
    if section.budget is None:
        return []
    what = _COUNTED[section.budget.unit].format(f"{section.budget.train:,}")
    lines = [
        f"Training ended after the round that reached {what}, so the training cost may lie above it by a part of a "
        "round. Rows that train nothing are those of the first table."
    ]
    if section.budget.unit == "seconds":
        lines.append(
            "Seconds depend on the machine and on what else it does: these rows are not reproducible, have no rank, "
            "and stand in the order of the alphabet."
        )
    if section.missing:
        lines.append(f"Not run yet: {', '.join(section.missing)}.")
    if section.unfit:
        unfit = "; ".join(f"{m['method']} ({m['reason']})" for m in section.unfit)
        lines.append(f"Cannot run on this task: {unfit}.")
    return lines


def _commands(board: Board) -> list[str]:
    return list(dict.fromkeys(line for s in board.sections for line in s.frame["command"].to_list()))


def _pivot(reference: Iterable[Mapping[str, str]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Published numbers as one table for each source: title, header, lines."""
    tables = []
    rows = list(reference)
    for source in dict.fromkeys(r["source"] for r in rows):
        mine = [r for r in rows if r["source"] == source]
        metrics = list(dict.fromkeys(r["metric"] for r in mine))
        lines = []
        for method in dict.fromkeys(r["method"] for r in mine):
            found = {r["metric"]: r for r in mine if r["method"] == method}
            lines.append([method, *(_published(found.get(m)) for m in metrics)])
        differs = "; ".join(dict.fromkeys(r["differs"] for r in mine if r["differs"]))
        evidence = ", ".join(dict.fromkeys(r["evidence"] for r in mine))
        tables.append(
            (f"{source} (evidence: {evidence}). What differs: {differs}.", ["method", *metrics], lines)
        )
    return tables


def _published(row: Mapping[str, str] | None) -> str:
    if row is None:
        return "–"
    return f"{row['value']} ± {row['error']}" if row["error"] else row["value"]


# -------------------------------------------------------------------------------------- formats


def markdown(board: Board) -> str:
    """GitHub Markdown: the table, its notes, the commands, what stands apart, published numbers."""
    terms = board.terms
    out = [f"# {terms.task}: {terms.title}".rstrip(": "), "", *_grid(*_cells(board.main, board.columns)), ""]
    out += [protocol(board), "", *(f"- {line}" for line in [*notes(board), *remarks(board.main)]), ""]
    out += _overdone_markdown(board.main)
    for section in board.sections[1:]:
        out += [f"## {heading_of(section)}", "", *_grid(*_cells(section, board.columns)), ""]
        if said := remarks(section):
            out += [*(f"- {line}" for line in said), ""]
        out += _overdone_markdown(section)
    out += ["## How each row was made", "", "```", *_commands(board), "```", ""]
    if terms.reference:
        out += [
            "## Published numbers",
            "",
            "Other data, models and judges; never ranked with the rows above.",
            "",
        ]
        for title, header, lines in _pivot(terms.reference):
            grey = [[f"<sub>{text}</sub>" for text in line] for line in lines]
            out += [f"<sub>{title}</sub>", "", *_grid([f"<sub>{h}</sub>" for h in header], grey), ""]
    return "\n".join(out).rstrip() + "\n"


OVERDONE_TITLE = "Train against held-out reward"
"""Heading of the table of over-optimisation."""

OVERDONE_NOTE = (
    "Scaled as the gap, from `pretrained` to the final samples: transfer = held-out gain / train gain. 1: the held-out "
    "reward gains what the training reward does; 0: nothing; below 0: the reward is over-optimised. Peak loss, where "
    "the held-out reward was measured on the way (`eval.every`): how far the final samples lie below the best of "
    "those; noise alone makes it positive."
)
"""What its columns mean."""


def _overdone_markdown(section: Section) -> list[str]:
    header, lines = _overdone(section)
    return [f"### {OVERDONE_TITLE}", "", *_grid(header, lines), "", OVERDONE_NOTE, ""] if lines else []


def _grid(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [[text.replace("|", "\\|") for text in line] for line in (header, *lines)]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;color:#1b1b1b}table{border-collapse:collapse;margin:1rem 0}"
    "th,td{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}.grey,.grey *{color:#888}pre{background:#f6f6f6;padding:1rem}"
)


def page(board: Board) -> str:
    """A page that needs nothing else."""
    terms, esc = board.terms, html.escape
    title = esc(f"{terms.task}: {terms.title}".rstrip(": "))
    out = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    ]
    out += [
        f"<h1>{title}</h1>",
        _html_table(*_cells(board.main, board.columns)),
        f"<p>{esc(protocol(board))}</p>",
    ]
    out += ["<ul>", *(f"<li>{esc(line)}</li>" for line in [*notes(board), *remarks(board.main)]), "</ul>"]
    out += _overdone_html(board.main)
    for section in board.sections[1:]:
        out += [f"<h2>{esc(heading_of(section))}</h2>", _html_table(*_cells(section, board.columns))]
        if said := remarks(section):
            out += ["<ul>", *(f"<li>{esc(line)}</li>" for line in said), "</ul>"]
        out += _overdone_html(section)
    out += ["<h2>How each row was made</h2>", f"<pre>{esc(chr(10).join(_commands(board)))}</pre>"]
    if terms.reference:
        out.append('<div class="grey"><h2>Published numbers</h2>')
        out.append("<p>Other data, models and judges; never ranked with the rows above.</p>")
        for note, header, lines in _pivot(terms.reference):
            out += [f"<p>{esc(note)}</p>", _html_table(header, lines)]
        out.append("</div>")
    return "\n".join(out) + "\n</html>\n"


def _overdone_html(section: Section) -> list[str]:
    header, lines = _overdone(section)
    note = html.escape(OVERDONE_NOTE)
    return [f"<h3>{OVERDONE_TITLE}</h3>", _html_table(header, lines), f"<p>{note}</p>"] if lines else []


def _html_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def tr(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in cells) + "</tr>"

    return "\n".join(["<table>", tr(header, "th"), *(tr(line, "td") for line in lines), "</table>"])


def table_csv(board: Board) -> str:
    """All rows with full precision; `apart` says under which budget, or why a row is not comparable."""
    names = [c for c in board.main.frame.columns if c != "method"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*names, "apart"])
    for section in board.sections:
        apart = f"training budget: {section.budget.text}" if section.budget else section.reason
        for line in section.frame.iter_rows(named=True):
            row = ["" if line[c] is None else line[c] for c in names]
            writer.writerow([repr(v) if isinstance(v, float) else v for v in row] + [apart])
    return out.getvalue()


def document(board: Board) -> str:
    """JSON: terms, columns, rows (comparable ones first), published numbers."""
    terms = json.loads(board.terms.to_json())  # with sorted keys
    value = {
        "schema": 1,
        "task": terms["task"],
        "title": terms["title"],
        "settings": terms["settings"],
        "scales": terms["scales"],
        "columns": [asdict(c) for c in board.columns],
        "rows": _plain(board.main),
        **_ranking(board.main),
        "apart": [{"reason": s.reason, "rows": _plain(s)} for s in board.apart],
        **({"budgets": [_budget(s) for s in board.budgets]} if board.budgets else {}),
        "notes": [*notes(board), *remarks(board.main)],
        "reference": terms["reference"],
    }
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _budget(section: Section) -> dict[str, Any]:
    budget = section.budget
    if budget is None:
        return {}
    held = {"unit": budget.unit, "train": budget.train, "reproducible": budget.unit != "seconds"}
    return held | {
        "rows": _plain(section),
        **_ranking(section),
        "missing": list(section.missing),
        "unfit": [dict(m) for m in section.unfit],
    }


def _ranking(section: Section) -> dict[str, Any]:
    """By what rows are placed, and their over-optimisation; nothing where there is neither."""
    front = section.front
    found: dict[str, Any] = {}
    if front is not None:
        found["front"] = {
            "by": [c.name for c in front.by],
            "reference": dict(front.reference),
            "hypervolume": front.volume,
        }
    if not section.overdone.is_empty():
        found["overdone"] = _plain_frame(section.overdone)
    return found


def _plain(section: Section) -> list[dict[str, Any]]:
    return _plain_frame(section.frame)


def _plain_frame(frame: pl.DataFrame) -> list[dict[str, Any]]:
    return [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        for line in frame.iter_rows(named=True)
    ]


def rich_table(board: Board, section: Section | None = None, mark: bool = False) -> Table:
    """A table for a terminal: a column for each method while they fit, else a row for each.

    Args:
        board: The board.
        section: Which of its tables; None is the main one.
        mark: Say which rows are local.
    """
    from rich.table import Table
    from rich.text import Text

    section = section or board.main
    header, lines = _cells(section, board.columns)
    if not mark:
        lines = [[line[0].removesuffix(" (local)"), *line[1:]] for line in lines]
    if len(lines) <= 6:
        header, *lines = [list(column) for column in zip(header, *lines, strict=True)]
    apart = section.budget is not None or section.reason
    title = heading_of(section) if apart else board.terms.title or board.terms.task
    table = Table(title=Text(title), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="right" if i else "left", no_wrap=not i)
    for line in lines:
        table.add_row(*map(Text, line))
    return table
