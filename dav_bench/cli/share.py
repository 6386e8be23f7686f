"""`dav-bench results bundle | import | migrate | rm`: runs that travel, age and go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dav_bench.errors import DavBenchError, ExitCode

_Out = Annotated[Path, typer.Option(help="Results folder.")]


def bundle(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids or folders of finished runs.")],
    file: Annotated[Path, typer.Option("--file", "-f", help="The zip file to write.")] = Path("runs.zip"),
    weights: Annotated[bool, typer.Option(help="Take tuned weights along.")] = True,
    out: _Out = Path("results"),
) -> None:
    """Pack finished runs into one file with checksums, for others to import."""
    from dav_bench.bundle import bundle as pack
    from dav_bench.scan import find

    if not file.parent.is_dir():
        raise DavBenchError(f"the folder of '{file}' does not exist.", fix=f"mkdir -p {file.parent}")
    names = pack([find(out, name) for name in dict.fromkeys(runs)], file, weights)
    typer.echo(f"wrote {len(names)} runs to {file} ({file.stat().st_size / 2**20:.1f} MB)")


def import_(
    file: Annotated[Path, typer.Argument(help="What `dav-bench results bundle` wrote.")],
    limit_gb: Annotated[float, typer.Option(min=0.001, help="Most that may be unpacked.")] = 16.0,
    out: _Out = Path("results"),
) -> None:
    """Check a bundle and put its runs beside yours, as foreign ones."""
    from dav_bench.bundle import unbundle

    done = unbundle(file, out, int(limit_gb * 2**30))
    for path in done.added:
        typer.echo(f"imported {path}")
    for path in done.held:
        typer.echo(f"here already {path}")


def migrate(out: _Out = Path("results")) -> None:
    """Bring runs that an older version wrote to the present form; what they measured stays as it is."""
    from dav_bench.migrate import migrate as lift
    from dav_bench.scan import scan

    lifted = wrong = current = 0
    for record in scan(out):
        try:
            if record.problem is not None:
                raise DavBenchError(record.problem)
            taken = lift(record.run)
        except DavBenchError as error:
            wrong += 1
            typer.echo(f"{record.path}: {error.what}")
            continue
        lifted, current = lifted + bool(taken), current + (not taken)
    typer.echo(f"{lifted} runs migrated, {current} were in the present form, {wrong} could not be")
    raise typer.Exit(ExitCode.RUN_FAILED if wrong else ExitCode.OK)


def rm(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Ids or folders of runs.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    out: _Out = Path("results"),
) -> None:
    """Delete runs, after asking; one that a process is writing stays."""
    import shutil

    from dav_bench.scan import find

    found = [find(out, name) for name in dict.fromkeys(runs)]
    for run in found:
        if run.status == "running":
            raise DavBenchError(f"run {run.path.name} is being written.", fix="stop it first")
    for run in found:
        typer.echo(str(run.path))
    if not yes and not typer.confirm(f"Delete {len(found)} runs?"):
        raise typer.Exit(ExitCode.USAGE)
    for run in found:
        run.path.joinpath("run.json").unlink()  # first: half a deletion is then a run that never began
        shutil.rmtree(run.path)
    typer.echo(f"deleted {len(found)} runs")
