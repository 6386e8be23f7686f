"""Finding runs on disk: what lies under a results folder, with damaged folders named instead of raised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dav_bench.errors import DavBenchError
from dav_bench.store import RunDir

if TYPE_CHECKING:
    import polars as pl


FOREIGN = "foreign"
"""Folder of imported runs in a results folder, beside `runs`."""


@dataclass(frozen=True)
class RunRecord:
    """What a scan knows of one run directory without opening its tables."""

    path: Path
    """Folder of the run."""
    label: str = ""
    """Row name: the method, with "+search" for a test-time search on a tuned model."""
    task: str = ""
    """Name of the task."""
    seed: int = 0
    """Training seed."""
    identity: str = ""
    """Hash of everything that defines the run."""
    status: str = "damaged"
    """One of `STATUSES`, "killed", or "damaged" when `problem` says what is wrong with the folder."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """run.json."""
    problem: str | None = None
    """Why the folder could not be read; None for a readable run."""
    foreign: bool = False
    """Imported from a bundle: somebody else's run."""

    @property
    def name(self) -> str:
        """Folder name, `<id>-s<seed>`."""
        return self.path.name

    @property
    def run(self) -> RunDir:
        """The run directory, for reading."""
        return RunDir(self.path)


def scan(root: Path | str, task: str | None = None) -> list[RunRecord]:
    """All runs in a results folder (`<root>/runs/<task>/<label>/<run>`), by path, then imported ones.

    Damaged folders are named.
    """
    below = f"{task.replace('/', '~') if task else '*'}/*/*"
    found = []
    for kind in ("runs", FOREIGN):
        folders = (p for p in Path(root).glob(f"{kind}/{below}") if p.is_dir() and not p.name.startswith("."))
        found += [replace(_record(folder), foreign=kind == FOREIGN) for folder in sorted(folders)]
    return found


def _record(folder: Path) -> RunRecord:
    label, task = folder.parent.name, folder.parent.parent.name
    try:
        run = RunDir.open(folder)
        meta = run.meta
        label, task, identity = str(meta["label"]), str(meta["task"]), str(meta["identity"]["hash"])
        return RunRecord(folder, label, task, int(meta["seed"]), identity, run.status, meta)
    except DavBenchError as error:
        return RunRecord(folder, label, task, problem=" ".join(str(error).split()))
    except (KeyError, TypeError, ValueError, OSError) as error:
        return RunRecord(folder, label, task, problem=f"run.json lacks or misstates {error}")


def find(root: Path | str, name: str) -> RunDir:
    """Open a run by its path, by `<id>-s<seed>`, or by the start of that name.

    Raises:
        DavBenchError: nothing or more than one run matches.
    """
    if (Path(name) / "run.json").exists():
        return RunDir.open(name)
    records = scan(root)
    hits = [r for r in records if r.name == name] or [r for r in records if r.name.startswith(name)]
    hits = [r for r in hits if not r.foreign] or hits
    if len(hits) == 1:
        return RunDir.open(hits[0].path)
    if hits:
        raise DavBenchError(
            f"{name!r} means {len(hits)} runs.",
            "They are " + ", ".join(f"{r.label}/{r.name}" for r in hits[:6]) + ".",
            "more of the name, or the folder",
        )
    raise DavBenchError(
        f"no run is called {name!r}.", f"{len(records)} runs lie under {root}.", "dav-bench results ls"
    )


def runs_frame(records: Sequence[RunRecord]) -> pl.DataFrame:
    """The records as a table, one row per run."""
    import polars as pl

    columns = ("task", "label", "run", "seed", "status", "started", "ended", "problem", "foreign", "path")
    rows = [
        (
            r.task,
            r.label,
            r.name,
            r.seed,
            r.status,
            *map(r.meta.get, ("started", "ended")),
            r.problem,
            r.foreign,
            str(r.path),
        )
        for r in records
    ]
    types = {"seed": pl.Int64, "foreign": pl.Boolean}
    schema = {c: types.get(c, pl.String) for c in columns}
    return pl.DataFrame(rows, schema=schema, orient="row")
