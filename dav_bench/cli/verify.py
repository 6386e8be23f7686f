"""`dav-bench verify`: every method against the law it should reach, in worlds where that is known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dav_bench.errors import DavBenchError, ExitCode, near

if TYPE_CHECKING:
    from dav_bench.verify import Expectation

DOC = Path("docs/verification.md")


def verify(
    method: Annotated[list[str] | None, typer.Option(help="Only these methods, comma-separated.")] = None,
    world: Annotated[list[str] | None, typer.Option(help="Only these worlds, comma-separated.")] = None,
    defects: Annotated[
        bool, typer.Option("--defects", help="Plant known defects instead, each of which must be seen.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of training and sampling.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one CPU thread each.")] = 2,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; known defects are planted on the CPU.")
    ] = "cpu",
    write: Annotated[bool, typer.Option("--write", help=f"Run all of it and write {DOC}.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check each method against the law it should reach."""
    from dav_bench.cli import render
    from dav_bench.cli.run import names
    from dav_bench.verify import report

    chosen = names(method), names(world)
    if write and (any(chosen) or defects):
        raise DavBenchError(f"--write makes the whole of {DOC}.", fix="leave out the other options")
    if write and not DOC.parent.is_dir():
        raise DavBenchError(f"there is no folder {DOC.parent} here.", fix="run it at the root of a checkout")
    planted, held = [], []
    if defects or write:
        from dav_bench.verify.defects import defects as known

        todo = [d for d in known() if _among(d.method, chosen[0]) and _among(d.world, chosen[1])]
        planted = report.plant(todo, seed, jobs, render.notice_line)
    if not defects:
        from dav_bench.runner import Machine, Options

        where = Machine.choose(Options(device=device), {}).device
        held = report.run(_chosen(*chosen), seed, jobs, render.notice_line, where)
    if write:
        DOC.write_text(report.markdown(held, planted), encoding="utf-8")
        typer.echo(f"wrote {DOC}")
    elif json:
        render.emit_json([*map(report.facts, held), *(report.defect_facts(*p) for p in planted)])
    else:
        for columns, lines in report.tables(held, planted):
            render.table(columns, lines)
    good = all(r.passed for r in held) and all(found for _, found, _ in planted)
    raise typer.Exit(ExitCode.OK if good else ExitCode.RUN_FAILED)


def _among(name: str, chosen: Sequence[str]) -> bool:
    return not chosen or name in chosen


def _chosen(methods: Sequence[str], worlds: Sequence[str]) -> list[Expectation]:
    """The rows asked for; a method or world without any is an error."""
    from dav_bench.plugins import catalog
    from dav_bench.verify import expectations

    rows = expectations()
    for name in methods:
        if name not in {row.method for row in rows}:
            catalog().get("methods", name)  # an unknown name is told by its near ones
            raise DavBenchError(
                f"nothing is written down of what {name!r} should reach.",
                fix="state it as dav_bench.verify.Expectation and call verify([...])",
            )
    known = {row.world for row in rows}
    for name in worlds:
        if name not in known:
            raise DavBenchError(f"there is no world {name!r}{near(name, known)}")
    found = [row for row in rows if _among(row.method, methods) and _among(row.world, worlds)]
    if not found:
        raise DavBenchError(
            f"{', '.join(methods)} and {', '.join(worlds)} have no expectation together.",
            fix="dav-bench verify --method " + ",".join(methods),
        )
    return found
