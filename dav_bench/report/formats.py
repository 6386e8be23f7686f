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

from dav_bench.report.board import Board, Section
from dav_bench.report.terms import Column, flat

if TYPE_CHECKING:
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
    half = line[f"{column.name} ±"]
    if column.role == "cost":
        return amount(line[column.name])
    if half is None:
        return number(line[column.name])
    return f"{number(line[column.name])} ± {number(half)}"


def heading(column: Column) -> str:
    """Title with the better direction."""
    return column.title + _ARROW.get(column.better, "")


def _cells(section: Section, columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """Header and text of one table; versions are shown, and "local" marks what is not published."""
    header = ["method", "seeds", *map(heading, columns), "version"]
    lines = []
    for line in section.frame.iter_rows(named=True):
        name = line["label"] + ("" if line["source"] == "published" else " (local)")
        lines.append([name, line["seeds"], *(cell(line, c) for c in columns), line["version"] or "–"])
    return header, lines


# ---------------------------------------------------------------------------------------- notes


def protocol(board: Board) -> str:
    """One sentence: how the rows of the main table were measured."""
    settings = flat(board.terms.settings)
    told = [f"{key} {value}" for key, value in sorted(settings.items()) if key not in _FREE and value != ""]
    return f"Measured with: {', '.join(told)}."


def notes(board: Board) -> list[str]:
    """What the numbers mean, one line each."""
    terms, names = board.terms, {c.name for c in board.columns}
    order = "by held-out reward (train reward where there is none)"
    if "target-distance" in names:
        order = "by their distance to the exact target"
    lines = [
        f"Rows after `real` and `pretrained` are ordered {order}, "
        "which is no rank: with fewer than 3 seeds, or where intervals overlap, the order says nothing.",
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
    """What a table under a budget means, and which methods it lacks, one line each."""
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
    out += [protocol(board), "", *(f"- {line}" for line in notes(board)), ""]
    for section in board.sections[1:]:
        out += [f"## {heading_of(section)}", "", *_grid(*_cells(section, board.columns)), ""]
        if said := remarks(section):
            out += [*(f"- {line}" for line in said), ""]
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
    out += ["<ul>", *(f"<li>{esc(line)}</li>" for line in notes(board)), "</ul>"]
    for section in board.sections[1:]:
        out += [f"<h2>{esc(heading_of(section))}</h2>", _html_table(*_cells(section, board.columns))]
        if said := remarks(section):
            out += ["<ul>", *(f"<li>{esc(line)}</li>" for line in said), "</ul>"]
    out += ["<h2>How each row was made</h2>", f"<pre>{esc(chr(10).join(_commands(board)))}</pre>"]
    if terms.reference:
        out.append('<div class="grey"><h2>Published numbers</h2>')
        out.append("<p>Other data, models and judges; never ranked with the rows above.</p>")
        for note, header, lines in _pivot(terms.reference):
            out += [f"<p>{esc(note)}</p>", _html_table(header, lines)]
        out.append("</div>")
    return "\n".join(out) + "\n</html>\n"


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
        "apart": [{"reason": s.reason, "rows": _plain(s)} for s in board.apart],
        **({"budgets": [_budget(s) for s in board.budgets]} if board.budgets else {}),
        "notes": notes(board),
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
        "missing": list(section.missing),
        "unfit": [dict(m) for m in section.unfit],
    }


def _plain(section: Section) -> list[dict[str, Any]]:
    return [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        for line in section.frame.iter_rows(named=True)
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
