"""`dav-bench compare`: two rows of a board against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dav_bench.errors import DavBenchError, near

if TYPE_CHECKING:
    from dav_bench.report.board import Board, Section
    from dav_bench.report.compare import Comparison
    from dav_bench.report.rows import Row


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A row: its name on the board, or its id.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    task: Annotated[str, typer.Option(help="Task.")],
    metric: Annotated[str | None, typer.Option(help="What the sentence is about.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Table of this training budget, such as cost=1000000, or none.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[Path, typer.Option(help="Results folder.")] = Path("results"),
) -> None:
    """Compare two rows seed by seed: difference, interval, p, and the sentence a paper could use."""
    from dav_bench.cli import render
    from dav_bench.cli.results import gather
    from dav_bench.known import board_path
    from dav_bench.report.compare import compare as compared

    board = gather(task, board_path(out, task), out, None)
    mine, theirs = find_pair(board, a, b, budget)
    found = compared(mine[1], theirs[1], board.terms, board.columns, (mine[0], theirs[0]), metric)
    if json:
        render.emit_json(document(found))
        return
    render.table(*_table(found))
    typer.echo(f"\n{found.sentence}\n")
    for note in found.notes:
        typer.echo(f"- {note}")


def find_pair(
    board: Board, a: str, b: str, budget: str | None = None
) -> tuple[tuple[str, list[Row]], tuple[str, list[Row]]]:
    """Name and runs of two rows that stand in one table of a board.

    Raises:
        DavBenchError: a name fits no row or several, or no table holds both.
    """
    sections = [s for s in board.sections if not s.reason and _wanted(s, budget)]
    if not sections:
        has = ", ".join(s.budget.text for s in board.budgets if s.budget) or "no budget"
        raise DavBenchError(f"the board of {board.terms.task} has no table {budget!r}.", f"It has {has}.")
    found: dict[Any, Any] = {}
    for section in sections:
        pair = [_match(section, name) for name in (a, b)]
        if all(pair):
            for name, keys in zip((a, b), pair, strict=True):
                _single(name, keys)
            found.setdefault(tuple(tuple(sorted(p)) for p in pair), (section, pair))
    if len(found) > 1:
        texts = [s.budget.text if s.budget else "none" for s, _ in found.values()]
        raise DavBenchError(
            f"{a} and {b} stand in {len(found)} tables.",
            "What training might spend differs between them.",
            " or ".join(f"--budget {t}" for t in texts),
        )
    if not found:
        raise _absent(board, sections, a, b)
    ((section, (mine, theirs)),) = found.values()
    if set(mine) == set(theirs):
        raise DavBenchError(f"{a} and {b} are one and the same row.", fix="name two rows")
    return _runs(section, mine), _runs(section, theirs)


def _wanted(section: Section, budget: str | None) -> bool:
    if budget is None:
        return True
    return budget == (section.budget.text if section.budget else "none")


def _match(section: Section, name: str) -> Mapping[tuple[str, str, str], str]:
    """Key and name of the rows that a name means: published and local seeds of one setting are one row."""
    found = {}
    for line in section.frame.iter_rows(named=True):
        if name in (line["label"], line["method"], line["id"], f"{line['method']}/{line['id']}"):
            found[line["method"], line["id"], line["source"]] = str(line["label"])
    exact = {key: label for key, label in found.items() if name in (label, key[1])}
    return exact or found


def _single(name: str, found: Mapping[tuple[str, str, str], str]) -> None:
    """Refuse a name that means several settings."""
    if len({key[:2] for key in found}) > 1:
        raise DavBenchError(
            f"{name!r} means {len(found)} rows.",
            "They are " + ", ".join(f"{label}: {key[1]}" for key, label in found.items()) + ".",
            "one of these names or ids",
        )


def _absent(board: Board, sections: Sequence[Section], a: str, b: str) -> DavBenchError:
    known = sorted({str(label) for s in sections for label in s.frame["label"]})
    for name in (a, b):
        if not any(_match(s, name) for s in sections):
            apart = [s.reason for s in board.apart if name in {*s.frame["label"], *s.frame["id"]}]
            why = f"It stands apart: {apart[0]}." if apart else ""
            return DavBenchError(
                f"the board of {board.terms.task} has no row {name!r}{near(name, known)}",
                why,
                f"dav-bench leaderboard --task {board.terms.task}",
            )
    return DavBenchError(
        f"no table holds both {a} and {b}: what their training might spend differs.",
        fix="run both with the same --budget",
    )


def _runs(section: Section, keys: Mapping[tuple[str, str, str], str]) -> tuple[str, list[Row]]:
    by_seed: dict[int, Row] = {}
    for key in sorted(keys, key=lambda k: k[2] == "published"):  # what is published wins
        by_seed |= {row.seed: row for row in section.runs[key]}
    return next(iter(keys.values())), [by_seed[s] for s in sorted(by_seed)]


def _table(found: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and lines; columns that no line fills are left out."""
    from dav_bench.report.formats import heading, number

    def ranged(mean: float, half: float | None, form: Any = number) -> str:
        return form(mean) if half is None else f"{form(mean)} ± {form(half)}"

    header = ["metric", found.a, found.b, "A - B", "A better", "p", "Holm"]
    lines = []
    for d in found.lines:
        wins = "" if d.wins is None else ranged(d.wins.mean, d.wins.half, lambda v: f"{100 * v:.0f} %")
        tests = ["" if p is None else f"{p:.2g}" for p in (d.p, d.holm)]
        lines.append(
            [heading(d.column), number(d.a), number(d.b), ranged(d.paired.mean, d.paired.half), wins, *tests]
        )
    kept = [i for i in range(len(header)) if any(line[i] for line in lines)]
    return tuple(header[i] for i in kept), [tuple(line[i] for i in kept) for line in lines]


def document(found: Comparison) -> dict[str, Any]:
    """The comparison as plain values."""

    def plain(d: Any) -> dict[str, Any]:
        held = asdict(d)
        column = held.pop("column")
        paired, wins = held.pop("paired"), held.pop("wins")
        return {
            "metric": column["name"],
            "better": column["better"],
            **held,
            "difference": paired["mean"],
            "half": paired["half"],
            "pairs": paired["n"],
            "wins": wins and wins["mean"],
            "wins half": wins and wins["half"],
        }

    return {
        "a": found.a,
        "b": found.b,
        "seeds": list(found.seeds),
        "metrics": [plain(d) for d in found.lines],
        "main": found.main.column.name,
        "sentence": found.sentence,
        "notes": list(found.notes),
    }
