"""Old results in the present form: one step for each schema that was ever left behind.

Readers of schema n read every schema up to n; a migration rewrites the files of a run so that the next version may stop
reading the oldest.  Steps change how a run is stored and never what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dav_bench.errors import DavBenchError
from dav_bench.files import SCHEMA, read_json, write_json
from dav_bench.store import RunDir

STEPS: Mapping[int, Callable[[Path], None]] = {}
"""Schema to the step that rewrites a run directory of it as the next schema; schema 1 is the first."""


def migrate(run: RunDir, steps: Mapping[int, Callable[[Path], None]] = STEPS, to: int = SCHEMA) -> int:
    """Bring one run to schema `to`; returns how many steps that took.

    Each step ends with the schema in run.json, so a killed migration goes on where it was.

    Raises:
        DavBenchError: no step leads on from the run's schema, or a process is writing the run.
    """
    path = run.path / "run.json"
    if run.status == "running":
        raise DavBenchError(f"run {run.path.name} is being written.", fix="migrate it when it is done")
    held, taken = int(run.meta["schema"]), 0
    while held < to:
        if held not in steps:
            raise DavBenchError(
                f"{run.path} has schema {held}, which this version cannot bring up to {to}.",
                fix="migrate it with the version that came after the one that wrote it",
            )
        steps[held](run.path)
        held, taken = held + 1, taken + 1
        write_json(path, {**read_json(path), "schema": held})
    return taken
