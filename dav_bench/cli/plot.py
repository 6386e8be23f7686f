"""`dav-bench plot`: pictures of runs and boards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dav_bench.errors import DavBenchError, near

if TYPE_CHECKING:
    from dav_bench.report.board import Board, Section

app = typer.Typer(add_completion=False, no_args_is_help=True)

FORMS = (".png", ".webp", ".jpg", ".jpeg", ".pdf")


@app.callback()
def _plot() -> None:
    """Draw pictures of runs and boards."""


@app.command("samples")
def samples(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder, <id>-s<seed>, or the start of it.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File: " + ", ".join(FORMS))] = Path("samples.png"),
    prompts: Annotated[
        str, typer.Option(help="all, eval (those that are measured), or names, comma-separated.")
    ] = "all",
    size: Annotated[int | None, typer.Option(min=8, max=1024, help="Pixels of one picture.")] = None,
    results: Annotated[Path, typer.Option(help="Results folder.")] = Path("results"),
) -> None:
    """Pretrained and aligned pictures of a finished run side by side, a row for each prompt."""
    if out.suffix.lower() not in FORMS:
        raise DavBenchError(f"'{out}' has no form that pictures are written in.", fix="--out samples.png")
    if not out.parent.is_dir():
        raise DavBenchError(f"the folder of '{out}' does not exist.", fix=f"mkdir -p {out.parent}")
    from dav_bench.files import replacing
    from dav_bench.report.pictures import grid, load_grid
    from dav_bench.scan import find

    found = find(results, run)
    only: list[str] = []
    if prompts == "eval":
        only = list(dict.fromkeys(found.samples()["prompt"]))
    elif prompts != "all":
        only = [name.strip() for name in prompts.split(",") if name.strip()]
    before, after, texts = load_grid(found.path / "artifacts", only)
    image = grid(before, after, texts, size)
    with replacing(out) as temporary:
        image.save(temporary, format=_FORMAT.get(out.suffix.lower(), out.suffix[1:].upper()))
    typer.echo(f"wrote {len(after)} pictures of {len(set(texts))} prompts to {out}")


_FORMAT = {".jpg": "JPEG"}

PICTURES = (".svg", ".png", ".json", ".html")
"""Endings of charts; .json is the Vega-Lite specification."""

_Task = Annotated[str, typer.Option(help="Task.")]
_Figure = Annotated[Path, typer.Option("--out", "-o", help="File: " + ", ".join(PICTURES))]
_Budget = Annotated[
    str | None,
    typer.Option(
        help="Table of this training budget, such as cost=1000000, or none. The fullest table without."
    ),
]
_Results = Annotated[Path, typer.Option(help="Results folder.")]


@app.command("pareto")
def pareto(
    task: _Task,
    out: _Figure = Path("pareto.svg"),
    x: Annotated[str | None, typer.Option(help="Column across; the diversity without.")] = None,
    y: Annotated[str | None, typer.Option(help="Column upwards; the held-out reward without.")] = None,
    budget: _Budget = None,
    results: _Results = Path("results"),
) -> None:
    """Quality against diversity, or any two columns: rows with intervals, and the front."""
    _ending(out)
    from dav_bench.report.charts import save
    from dav_bench.report.figures import pareto_figure

    board, section = _table(task, results, budget)
    save(pareto_figure(board, section, x, y), out)
    typer.echo(f"wrote {section.frame.height} rows of {task} to {out}")


@app.command("curves")
def curves(
    task: _Task,
    out: _Figure = Path("curves.svg"),
    metric: Annotated[str, typer.Option(help="Such as reward, reward-heldout or levenshtein.")] = "reward",
    split: Annotated[
        str,
        typer.Option(help="train: what the search of a round found; eval: evaluation samples on the way."),
    ] = "train",
    over: Annotated[str, typer.Option(help="cost (network rows) or reward_rows.")] = "cost",
    budget: _Budget = None,
    results: _Results = Path("results"),
) -> None:
    """A metric over the cost of training: mean over seeds and its interval, for each row that trains."""
    _ending(out)
    for name, value, known in (
        ("--split", split, ("train", "eval")),
        ("--over", over, ("cost", "reward_rows")),
    ):
        if value not in known:
            raise DavBenchError(
                f"{name} {value!r} is not known{near(value, known)}", fix=f"{name} {known[0]}"
            )
    from dav_bench.report.charts import save
    from dav_bench.report.figures import curves_figure

    board, section = _table(task, results, budget)
    save(curves_figure(board, section, metric, split, over), out)  # type: ignore[arg-type]
    typer.echo(f"wrote curves of {task} to {out}")


def _ending(out: Path) -> None:
    if out.suffix not in PICTURES:
        raise DavBenchError(
            f"'{out}' has no form that charts are written in.",
            f"There are {', '.join(PICTURES)}.",
            "--out figure.svg",
        )


def _table(task: str, results: Path, budget: str | None) -> tuple[Board, Section]:
    """The board of a task, and the table that is drawn: that of the budget, or the one with most rows."""
    from dav_bench.cli.results import gather
    from dav_bench.known import board_path

    board = gather(task, board_path(results, task), results, None)
    tables = [board.main, *board.budgets]
    names = [section.budget.text if section.budget else "none" for section in tables]
    if budget is None:
        return board, max(tables, key=lambda section: section.frame.height)
    if budget not in names:
        raise DavBenchError(f"the board of {task} has no table {budget!r}.", f"It has {', '.join(names)}.")
    return board, tables[names.index(budget)]
