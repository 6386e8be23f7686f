"""`dav-bench results` and `dav-bench leaderboard`: what was run, and how it compares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dav_bench.cli import share
from dav_bench.errors import DavBenchError, ExitCode, near

if TYPE_CHECKING:
    from dav_bench.report.board import Board
    from dav_bench.report.rows import Row
    from dav_bench.scan import RunRecord
    from dav_bench.store import RunDir
    from dav_bench.tasks import TaskSpec

app = typer.Typer(add_completion=False, no_args_is_help=True, help="List and show runs.")

_Out = Annotated[Path, typer.Option(help="Results folder.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def _results() -> None:
    """List and show runs."""


app.command("bundle")(share.bundle)
app.command("import")(share.import_)
app.command("migrate")(share.migrate)
app.command("rm")(share.rm)


@app.command("ls")
def ls(
    task: Annotated[str | None, typer.Option(help="Only runs of this task.")] = None,
    json: _Json = False,
    out: _Out = Path("results"),
) -> None:
    """List all runs with their status; damaged folders are named with the reason."""
    from dav_bench.cli import render
    from dav_bench.scan import runs_frame, scan

    records = scan(out, task)
    if json:
        render.emit_json(runs_frame(records).to_dicts())
        return
    if not records:
        typer.echo(f"no runs in {out}")
        return
    columns = ("task", "run", "id", "seed", "status", "reward", "started", "note")
    render.table(columns, [_line(r) for r in records])


def _line(record: RunRecord) -> tuple[Any, ...]:
    if record.problem is not None:
        return record.task, record.label, record.name, "", record.status, "", "", record.problem
    reward, note = "", str(record.meta.get("error") or "")
    if record.status == "done":
        try:
            reward = f"{_final(record.run)['reward']:.3f}"
        except (DavBenchError, KeyError) as error:
            note = str(error)
    note = " · ".join(filter(None, ("foreign" if record.foreign else "", note)))
    started = str(record.meta.get("started", ""))[:16].replace("T", " ")
    return record.task, record.label, record.name, record.seed, record.status, reward, started, note


def _final(run: RunDir, of: str = "final") -> dict[str, float]:
    """Final metrics by name, or what the final search noticed (`search`); empty before the end."""
    rows = run.metrics().select("split", "metric", "value").rows()
    return {metric: value for split, metric, value in rows if split == of}


@app.command("show")
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder, <id>-s<seed>, or the start of it.")],
    json: _Json = False,
    out: _Out = Path("results"),
) -> None:
    """Show one run: specification, status, final metrics, cost, files, and the command that makes it."""
    from dav_bench.cli import render
    from dav_bench.scan import find

    facts = _facts(find(out, run))
    if json:
        render.emit_json(facts)
        return
    typer.echo(f"{facts['task']} {facts['label']} seed {facts['seed']}: {facts['status']}  ({facts['path']})")
    if facts["error"]:
        typer.echo(f"  {facts['error']}")
    if facts["metrics"]:
        render.table(
            ("metric", "value"), [(k, f"{v:.4g}") for k, v in facts["metrics"].items()], "final metrics"
        )
    if facts["search"]:
        noticed = [(k, f"{v:.4g}") for k, v in facts["search"].items()]
        render.table(("what", "value"), noticed, "what the search of the samples noticed")
    counted = list(dict.fromkeys(what for counts in facts["meter"].values() for what in counts))
    phases = [
        (name, *(f"{counts.get(what, 0):,.6g}" for what in counted)) for name, counts in facts["meter"].items()
    ]
    if phases:
        render.table(("phase", *counted), phases, "cost")
    render.table(("setting", "value"), facts["settings"].items(), "specification")
    render.table(("file", "bytes"), [(f, f"{n:,}") for f, n in facts["files"].items()], "files")
    typer.echo(f"command: {facts['command']}")


def _facts(run: RunDir) -> dict[str, Any]:
    from dav_bench.report.rows import options_of
    from dav_bench.report.terms import flat
    from dav_bench.spec import RunSpec

    meta, spec = run.meta, RunSpec.from_dict(run.spec)
    try:
        metrics, noticed = _final(run), _final(run, "search")
    except DavBenchError:
        metrics, noticed = {}, {}
    given = options_of(spec)
    made = (
        [*given, "--task", spec.task, "--seeds", str(spec.seed)]
        if given
        else ["--spec", str(run.path / "spec.toml")]
    )
    files = sorted(p for p in run.path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {
        "task": spec.task,
        "label": meta["label"],
        "seed": spec.seed,
        "status": run.status,
        "error": meta.get("error"),
        "path": str(run.path),
        "started": meta.get("started"),
        "ended": meta.get("ended"),
        "peak_mb": meta.get("peak_mb"),
        "metrics": metrics,
        "search": noticed,
        "meter": meta.get("meter", {}),
        "settings": flat(spec.to_dict()),
        "identity": spec.identity,
        "env": run.env,
        "files": {p.relative_to(run.path).as_posix(): p.stat().st_size for p in files},
        "command": " ".join(["dav-bench", "run", *made]),
    }


def leaderboard(
    task: Annotated[str, typer.Option(help="Task.")],
    format: Annotated[str | None, typer.Option(help="md, html, csv or json; a table without.")] = None,
    only: Annotated[str | None, typer.Option(help="Only these labels or ids, comma-separated.")] = None,
    publish: Annotated[bool, typer.Option("--publish", help="Write the committed board.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail if the committed md or csv is stale.")] = False,
    out: _Out = Path("results"),
) -> None:
    """Show, publish or check the leaderboard of a task."""
    from dav_bench.known import board_path
    from dav_bench.report.formats import FORMATS, render

    if format is not None and format not in FORMATS:
        raise DavBenchError(f"unknown format {format!r}{near(format, FORMATS)}", fix="--format md")
    path = board_path(out, task)
    chosen = {o.strip() for o in only.split(",")} if only else None
    if check:
        raise typer.Exit(_check(path))
    board = _publish(task, path, out, chosen) if publish else gather(task, path, out, chosen)
    if format is not None:
        typer.echo(render(board, format), nl=False)
    else:
        _print(board)


def _check(path: Path) -> int:
    """Rebuild the committed md and csv and report; the exit code."""
    from dav_bench.report.published import check

    if not path.exists():
        raise DavBenchError(
            f"there is no published board at {path}.",
            fix=f"dav-bench leaderboard --task {path.stem} --publish",
        )
    wrong = check(path)
    for line in wrong:
        typer.echo(line)
    typer.echo(
        f"{path}: {'stale; repeat --publish' if wrong else 'md and csv are what the parquet file gives'}"
    )
    return ExitCode.RUN_FAILED if wrong else ExitCode.OK


def _publish(name: str, path: Path, out: Path, only: set[str] | None) -> Board:
    from dav_bench.cli import render
    from dav_bench.report.published import publish
    from dav_bench.scan import scan
    from dav_bench.tasks import find_task

    records = [r for r in scan(out, name) if only is None or only & {r.label, r.name.partition("-")[0]}]
    render.notice(f"{r.path}: {r.problem}" for r in records if r.problem)
    mine = [r for r in records if not r.foreign]  # a board is what was run here
    done = publish(find_task(name), [r.run for r in mine if r.status == "done"], path)
    for line in done.left_out:
        render.notice_line(f"not published: {line}")
    render.notice_line(f"{len(done.added)} runs published in {path}")
    return done.board


def gather(name: str, path: Path, out: Path, only: set[str] | None) -> Board:
    """Published rows and local runs side by side; only what cannot be read is left out, with a line."""
    from dav_bench.cli import render
    from dav_bench.plugins import catalog
    from dav_bench.report.board import build
    from dav_bench.report.published import load_published, with_local
    from dav_bench.report.rows import read_row
    from dav_bench.report.terms import default_settings, terms_of
    from dav_bench.scan import scan
    from dav_bench.tasks import find_task

    task: TaskSpec = find_task(name)
    terms = terms_of(task, catalog(), default_settings(task, catalog()), out)
    published = load_published(path)[0] if path.exists() else []
    local: list[Row] = []
    problems = []
    for record in scan(out, name):
        try:
            if record.problem is not None:
                problems.append(f"{record.path}: {record.problem}")
            elif record.status == "done":
                source = "foreign" if record.foreign else "local"
                local.append(replace(read_row(record.run, task), source=source))
        except DavBenchError as error:
            problems.append(f"{record.path}: {error.what}")
    render.notice(problems)
    rows = [r for r in with_local(published, local) if only is None or only & {r.label, r.run_id}]
    if not rows:
        raise DavBenchError(
            f"there is no finished run of {name!r} in {out}.", fix=f"dav-bench run --method dav --task {name}"
        )
    return build(rows, terms)


def _print(board: Board) -> None:
    from dav_bench.cli import render
    from dav_bench.report import formats

    out = render.console()
    if board.main.frame.is_empty():
        out.print(f"no row under the terms of {board.terms.task} itself yet", markup=False)
    else:
        out.print(formats.rich_table(board, mark=True))
    for section in board.sections[1:]:
        out.print(formats.rich_table(board, section, mark=True))
        for line in formats.remarks(section):
            out.print(line, markup=False, style="dim")
    for line in (formats.protocol(board), *formats.notes(board), *formats.remarks(board.main)):
        out.print(line, markup=False, style="dim")
