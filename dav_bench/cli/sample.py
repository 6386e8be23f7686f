"""`dav-bench sample`: more samples of a finished run, in the form a user works with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dav_bench.errors import DavBenchError

FORMS = (".fasta", ".fa", ".csv", ".parquet")
"""How sequences are written; pictures go into a folder."""


def sample(
    run: Annotated[str, typer.Argument(help="Id or folder of a finished run (see `dav-bench results ls`).")],
    n: Annotated[int, typer.Option("-n", "--number", min=1, help="How many samples.")] = 100,
    search: Annotated[str, typer.Option(help="Searcher applied at test time, such as tree or best-of.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the sampling noise.")] = 0,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw, for text-to-image; repeatable.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="designs.fasta, .csv or .parquet; for pictures a folder.")
    ] = None,
    results: Annotated[Path, typer.Option(help="Results folder.")] = Path("results"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Draw more samples from a finished run and write them with their training reward, best first."""
    from dav_bench.build import search_settings
    from dav_bench.plugins import catalog
    from dav_bench.runner import Options, draw
    from dav_bench.scan import find
    from dav_bench.spec import RunSpec

    found = find(results, run)
    spec = RunSpec.from_dict(found.spec)
    pictures = catalog().get("models", spec.model["use"]).domain == "image"
    out = out or Path("pictures" if pictures else "designs.fasta")
    _check(out, pictures)
    settings = search_settings(search, spec.params) if search else None
    samples, reward = draw(found, n, Options(out=results, device=device), settings, seed, prompt or (),
                           lambda line: typer.echo(line, err=True))  # fmt: skip
    if pictures:
        from dav_bench.report.pictures import save_images

        save_images(out, samples.x, samples.prompts)
    else:
        title = f"{spec.task} {spec.label}{'+' + search if search else ''} {found.path.name}"
        write(out, samples.sequences, reward, title)
    typer.echo(f"wrote {n} samples to {out} (median training reward {sorted(reward)[n // 2]:.3f})")


def _check(out: Path, pictures: bool) -> None:
    """Refuse a place that cannot be written before anything is drawn."""
    if pictures and (out.suffix or (out.exists() and not out.is_dir())):
        raise DavBenchError(f"pictures go into a folder, and '{out}' is none.", fix=f"--out {out.stem or 'pictures'}")
    if not pictures and out.suffix.lower() not in FORMS:
        raise DavBenchError(
            f"'{out}' has no form that sequences are written in.",
            fix=f"--out designs{FORMS[0]}  (or {', '.join(FORMS[2:])})",
        )
    if not out.parent.is_dir():
        raise DavBenchError(f"the folder of '{out}' does not exist.", fix=f"mkdir -p {out.parent}")


def write(path: Path, sequences: list[str] | None, reward: Any, title: str) -> None:
    """Sequences and rewards, best first, atomically."""
    if sequences is None:
        raise DavBenchError(
            "these samples are no sequences.", fix="--out designs.parquet is for sequences only"
        )
    import polars as pl

    from dav_bench.files import replacing

    frame = pl.DataFrame({"sequence": sequences, "reward": reward}).sort("reward", descending=True)
    with replacing(path) as temporary:
        if path.suffix.lower() == ".parquet":
            frame.write_parquet(temporary)
        elif path.suffix.lower() == ".csv":
            frame.write_csv(temporary)
        else:
            rows = enumerate(frame.iter_rows())
            temporary.write_text("".join(f">{k} reward={r:.4f} {title}\n{s}\n" for k, (s, r) in rows))
