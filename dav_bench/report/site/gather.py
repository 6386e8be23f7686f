"""What a report is made of: published boards, local runs, and the files that only runs on this machine have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dav_bench.errors import DavBenchError, near
from dav_bench.known import board_path
from dav_bench.plugins import catalog
from dav_bench.report.board import Board, build
from dav_bench.report.published import load_published, with_local
from dav_bench.report.rows import Row, read_row
from dav_bench.report.terms import Terms, default_settings, terms_of
from dav_bench.scan import RunRecord, scan
from dav_bench.tasks import TaskSpec, find_task

if TYPE_CHECKING:
    from dav_bench.store import RunDir


@dataclass(frozen=True)
class Material:
    """Everything about one task."""

    name: str
    """Name of the task."""
    board: Board
    """Its board: published rows and local ones."""
    task: TaskSpec | None = None
    """Its task, where it is installed here."""
    runs: Mapping[str, RunDir] = field(default_factory=dict)
    """Local run directories by identity."""
    unfinished: Sequence[RunRecord] = ()
    """Runs without a row, with the reason."""

    def local(self, rows: Iterable[Row]) -> list[RunDir]:
        """The run directories of rows, as far as they lie here."""
        return [self.runs[row.identity] for row in rows if row.identity in self.runs]


def tasks_in(results: Path, published: bool) -> list[str]:
    """Tasks with a published board or, unless `published`, with runs."""
    names = {p.stem.replace("~", "/") for p in (results / "leaderboards").glob("*.parquet")}
    if not published:
        names |= {p.name.replace("~", "/") for p in (results / "runs").glob("*") if p.is_dir()}
    return sorted(names)


def gather(results: Path, only: Sequence[str] = (), published: bool = False) -> list[Material]:
    """Read all tasks of a results folder, or some of them.

    Args:
        results: Results folder.
        only: Names of tasks; none means all.
        published: Leave local runs out, so that the committed boards alone speak.

    Raises:
        DavBenchError: a task is asked for that has neither a board nor runs, or there is nothing at all.
    """
    there = tasks_in(results, published)
    for name in only:
        if name not in there:
            raise DavBenchError(
                f"there is nothing to report on {name!r}{near(name, there)}",
                f"{results} holds neither a published board nor a run of it.",
                f"dav-bench run --method dav --task {name}",
            )
    found = [_material(results, name, published) for name in only or there]
    kept = [m for m in found if m is not None]
    if not kept:
        raise DavBenchError(
            f"there is nothing to report in {results}.",
            "It holds neither a published board nor a finished run.",
            "dav-bench run --method dav --task dna",
        )
    return kept


def _material(results: Path, name: str, published: bool) -> Material | None:
    path = board_path(results, name)
    rows, terms = load_published(path) if path.exists() else ([], None)
    task = _installed(name)
    records = [] if published else scan(results, name)
    local, runs, unfinished = [], {}, []
    for record in records:
        try:
            if record.status != "done":
                raise DavBenchError(record.problem or str(record.meta.get("error") or record.status))
            row = read_row(record.run, task)
        except DavBenchError as error:
            unfinished.append(_without_row(record, error))
            continue
        local.append(row)
        runs[row.identity] = record.run
    if local and (task is not None or terms is None):
        terms = _terms(task, local, results)
    if terms is None or not (rows or local or unfinished):
        return None
    return Material(name, build(with_local(rows, local), terms), task, runs, unfinished)


def _without_row(record: RunRecord, error: DavBenchError) -> RunRecord:
    from dataclasses import replace

    return replace(record, problem=" ".join(str(error.what).split()))


def _installed(name: str) -> TaskSpec | None:
    try:
        return find_task(name)
    except DavBenchError:
        return None


def _terms(task: TaskSpec | None, local: Sequence[Row], results: Path) -> Terms | None:
    """The terms of the task as it stands here, or those of its runs where it is not installed."""
    if task is not None:
        return terms_of(task, catalog(), default_settings(task, catalog()), results)
    return Terms(local[-1].spec["task"], settings=local[-1].settings) if local else None


def texts(rows: Sequence[Row], runs: Sequence[RunDir], limit: int) -> list[dict[str, Any]]:
    """The first samples of a row: sequence or picture with its rewards, in the order of evaluation, none picked.

    Taken from the first seed: a local run, or what the published board holds.
    """
    for run in runs:
        try:
            table = run.samples().sort("index").head(limit)
        except DavBenchError:
            continue
        kept = [
            c for c in ("sequence", "prompt", "file", "reward.train", "reward.heldout") if c in table.columns
        ]
        if {"sequence", "file"} & set(kept):
            return [{**line, "run": run} for line in table.select(kept).to_dicts()]
    for row in rows:
        held = row.texts
        if "sequence" in held:
            lines: list[dict[str, Any]] = [{"sequence": text} for text in held["sequence"][:limit]]
            for i, line in enumerate(lines):
                line |= {
                    k: float(row.samples[k][i])
                    for k in ("reward.train", "reward.heldout")
                    if k in row.samples
                }
            return lines
    return []
