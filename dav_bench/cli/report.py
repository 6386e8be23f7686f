"""`dav-bench report`: boards, charts, samples and runs as a website that opens from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dav_bench.errors import DavBenchError, ExitCode


def report(
    task: Annotated[str | None, typer.Option(help="Only these tasks, comma-separated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the pages.")] = Path("report"),
    results: Annotated[Path, typer.Option(help="Results folder.")] = Path("results"),
    published: Annotated[
        bool, typer.Option("--published", help="Only published boards, without local runs.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if the pages show other numbers than the boards.")
    ] = False,
) -> None:
    """Write the boards, charts, samples and runs as a website that opens from disk."""
    from dav_bench.cli import render
    from dav_bench.report.site import build_site, is_current
    from dav_bench.report.site.gather import gather

    only = [name.strip() for name in task.split(",") if name.strip()] if task else []
    materials = gather(results, only, published)
    for material in materials:
        render.notice(f"{r.path}: {r.problem}" for r in material.unfinished if r.status == "damaged")
    if check:
        raise typer.Exit(_check(out, is_current(out, materials)))
    built = build_site(materials, out, "published boards" if published else "published boards and local runs")
    size = sum(built.files.values()) / 1e6
    typer.echo(f"{built.index}: {len(built.files)} files, {size:.1f} MB, {built.seconds:.1f} s")


def _check(out: Path, current: bool) -> int:
    if not (out / "report.json").exists():
        raise DavBenchError(f"there is no report in {out}.", fix=f"dav-bench report --out {out}")
    typer.echo(f"{out}: {'shows what the boards say' if current else 'stale; write it again'}")
    return ExitCode.OK if current else ExitCode.RUN_FAILED
