"""What finished runs say about planned ones: whether their numbers are published, and what they should cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dav_bench.errors import DavBenchError

if TYPE_CHECKING:
    from dav_bench.plan import PlannedRun
    from dav_bench.spec import RunSpec

_TRAINING = ("search", "fit")
"""Phases that a test-time search takes over from the run it builds on."""


@dataclass(frozen=True)
class Cost:
    """What a run takes."""

    rows: float
    """Network rows, forward + 2 x backward, evaluation included."""
    seconds: float | None = None
    """On the machine that ran the like; None where none did."""
    memory_mb: float | None = None
    """Peak resident memory there."""
    source: str = ""
    """Where this is known from: published, local, or budget (then training alone is counted)."""


@dataclass(frozen=True)
class Board:
    """The committed leaderboard of a task, as far as plans need it."""

    runs: Mapping[str, Mapping[str, Any]]
    """Meter and peak memory by identity."""
    settings: Mapping[str, Mapping[str, Any]]
    """The same by id, of one of the seeds."""
    problem: str = ""
    """Why it cannot be read."""


def board_path(results: Path | str, task: str) -> Path:
    """Where the committed board of a task lies in a results folder."""
    return Path(results) / "leaderboards" / f"{task.replace('/', '~')}.parquet"


def board(results: Path, task: str) -> Board:
    """The committed board of a task in a results folder; empty where there is none."""
    path = board_path(results, task)
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError:
        return Board({}, {})


@lru_cache(maxsize=64)
def _read(path: Path, _: int) -> Board:
    import polars as pl

    from dav_bench.files import check_schema

    try:
        check_schema(pl.read_parquet_metadata(path).get("dav_bench.schema", "1"), path)
        facts = pl.scan_parquet(path).filter(pl.col("kind").is_in(["about", "meter"]))
        lines = facts.select("run", "kind", "text").collect().rows()
        runs: dict[str, dict[str, Any]] = {}
        for run, kind, text in lines:
            runs.setdefault(run, {})[kind] = json.loads(text)
        by_identity = {
            held["about"]["identity"]: {"meter": held["meter"], "peak_mb": held["about"]["peak_mb"]}
            for held in runs.values()
        }
    except DavBenchError as err:
        return Board({}, {}, err.what)
    except (OSError, KeyError, TypeError, ValueError, pl.exceptions.PolarsError) as err:
        return Board({}, {}, f"{path} cannot be read ({' '.join(str(err).split())[:80]})")
    by_id = {run.rpartition("-s")[0]: held for run, held in zip(runs, by_identity.values(), strict=True)}
    return Board(by_identity, by_id)


def expected(runs: Sequence[PlannedRun], results: Path) -> list[Cost | None]:
    """What each planned run should still cost, from the same run elsewhere or another seed of its setting.

    None where nothing alike was run and no budget says it; 0 for a run that is finished or skipped.
    """
    return [_expected(run, results) for run in runs]


def _expected(run: PlannedRun, results: Path) -> Cost | None:
    if run.status in ("cached", "skip"):
        return Cost(0, 0.0)
    published = board(results, run.spec.task)
    held, source = (
        published.runs.get(run.spec.identity) or published.settings.get(run.spec.run_id),
        "published",
    )
    if held is None:
        held, source = _sibling(run), "local"
    if held is not None:
        known = _cost(run.spec, held, source)
        return _rest(known, run) if run.status == "resumable" else known
    limit = run.spec.budget.get("train")
    if isinstance(limit, int | float) and run.spec.budget.get("unit") == "cost" and run.base is None:
        return Cost(float(limit), source="budget")
    return None


def _sibling(run: PlannedRun) -> Mapping[str, Any] | None:
    """run.json of a finished seed of the same setting in the results folder."""
    from dav_bench.files import read_json

    for path in sorted(run.path.parent.glob(f"{run.spec.run_id}-s*/run.json")):
        try:
            meta = read_json(path)
        except DavBenchError:
            continue
        if meta.get("status") == "done":
            return meta
    return None


def _cost(spec: RunSpec, held: Mapping[str, Any], source: str) -> Cost:
    taken_over = _TRAINING if spec.search else ()
    phases = [phase for name, phase in held.get("meter", {}).items() if name not in taken_over]
    rows = sum(p.get("forward", 0) + 2 * p.get("backward", 0) for p in phases)
    return Cost(rows, sum(p.get("seconds", 0.0) for p in phases), held.get("peak_mb"), source)


def _rest(known: Cost, run: PlannedRun) -> Cost:
    """What is left of a run that an earlier process began."""
    from dav_bench.files import read_json

    try:
        spent = _cost(run.spec, read_json(run.path / "run.json"), "")
    except DavBenchError:
        return known
    left = max(0.0, (known.seconds or 0.0) - (spent.seconds or 0.0))
    return Cost(max(0.0, known.rows - spent.rows), left, known.memory_mb, known.source)
