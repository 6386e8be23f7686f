"""`dav-bench plot`: pictures of runs and boards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dav_bench.errors import DavBenchError

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
