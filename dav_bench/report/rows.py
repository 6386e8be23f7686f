"""What a board is made of: one `Row` per finished run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dav_bench.errors import DavBenchError
from dav_bench.plugins import catalog
from dav_bench.report.curves import Curve, curves_of
from dav_bench.report.terms import arguments, compared
from dav_bench.spec import RunSpec
from dav_bench.tasks import find_task

if TYPE_CHECKING:
    import polars as pl

    from dav_bench.store import RunDir
    from dav_bench.tasks import TaskSpec


TEXTS = 16
"""Samples of a run that a row keeps as text, in the order of evaluation: enough to look at, few enough to commit."""
ENV = ("python", "platform", "packages", "git", "hardware", "cuda", "execution", "plugins")
"""What a row keeps of env.json; not the arguments, which name paths of a machine."""


@dataclass(frozen=True)
class Row:
    """One finished run, as a board sees it."""

    spec: Mapping[str, Any]
    """The whole run specification."""
    identity: str
    """Its hash."""
    run_id: str
    """The part all seeds share."""
    label: str
    """Name of the row."""
    seed: int
    """Training seed."""
    meter: Mapping[str, Mapping[str, float]]
    """Phase to counts and seconds."""
    metrics: Mapping[str, float]
    """Set metrics by name."""
    samples: Mapping[str, np.ndarray]
    """Per-sample values (n,) by column: reward.train, reward.heldout, metric.<name>."""
    peak_mb: float | None = None
    """Peak memory in MB."""
    version: str = ""
    """Version of dav-bench that ran it."""
    arguments: tuple[str, ...] = ()
    """Options of `dav-bench run` that make it, besides --task and --seeds."""
    source: str = "local"
    """local or published."""
    curves: tuple[Curve, ...] = ()
    """Metrics round by round, over cost."""
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The first samples as text, by column: sequence and prompt."""
    env: Mapping[str, Any] = field(default_factory=dict)
    """Where it ran: versions, git state and hardware."""

    @property
    def settings(self) -> dict[str, Any]:
        """The part of the specification that must agree between comparable rows."""
        return compared(self.spec)

    @property
    def n(self) -> int:
        """Number of samples."""
        return max((len(v) for v in self.samples.values()), default=0)


def read_row(run: RunDir, task: TaskSpec | None = None) -> Row:
    """The row of a finished run.

    Args:
        run: Its directory.
        task: Its task, to say which options make it; None looks it up.

    Raises:
        DavBenchError: the run is not done, or one of its files is missing or damaged.
    """
    meta = run.meta
    if meta.get("status") != "done":
        raise DavBenchError(
            f"run {run.path.name} is not done but {run.status}.", fix="repeat its command to resume"
        )
    spec = RunSpec.from_dict(run.spec)
    table = run.samples()
    samples = {
        name: table[name].to_numpy().astype(np.float64)
        for name in sorted(table.columns)
        if name.startswith(("reward.", "metric."))
    }
    metrics = run.metrics()
    final = {m: v for split, m, v in metrics.select("split", "metric", "value").rows() if split == "final"}
    return Row(
        spec=spec.to_dict(),
        identity=meta["identity"]["hash"],
        run_id=spec.run_id,
        label=meta["label"],
        seed=spec.seed,
        meter=meta["meter"],
        metrics=dict(sorted(final.items())),
        samples=samples,
        peak_mb=meta.get("peak_mb"),
        version=str(run.env.get("packages", {}).get("dav-bench", "")),
        arguments=options_of(spec, task),
        curves=curves_of(metrics, final),
        texts=_texts(table),
        env={key: run.env[key] for key in ENV if run.env.get(key)},
    )


def _texts(table: pl.DataFrame) -> dict[str, tuple[str, ...]]:
    first = table.sort("index").head(TEXTS) if "index" in table.columns else table.head(TEXTS)
    return {name: tuple(first[name]) for name in ("sequence", "prompt") if name in first.columns}


def options_of(spec: RunSpec, task: TaskSpec | None = None) -> tuple[str, ...]:
    """The options that make a run; none where its task is not installed here."""
    try:
        return arguments(spec, task or find_task(spec.task), catalog())
    except DavBenchError:
        return ()
