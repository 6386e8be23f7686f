"""What happens during a run: one frozen value for each life hook, which may grow fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dav_bench.spec import RunSpec


@dataclass(frozen=True)
class RunStarted:
    """A run is about to build its model."""

    spec: RunSpec
    """What is run; the same spec gives the same identity."""
    run_dir: Path
    """Where its files go."""
    label: str = ""
    """Method name, with `+search` for test-time search on a tuned model."""
    env: Mapping[str, Any] = field(default_factory=dict)
    """Packages, git state and hardware, as in `env.json`."""
    rounds: int = 0
    """Rounds planned; 0 for a method that does not train."""
    resumed: int = 0
    """Rounds already done by an earlier, interrupted process."""


@dataclass(frozen=True)
class RoundFinished:
    """A training round (E-step and M-step) is done and saved."""

    spec: RunSpec
    """What is run."""
    round: int
    """Number of this round, from 1."""
    rounds: int
    """Rounds planned."""
    metrics: Mapping[str, float]
    """Numbers of this round, `split/name` to value."""
    meter: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Rows and seconds spent so far, by phase."""
    cost: int = 0
    """Network rows forward + 2 * rows backward so far."""
    seconds: float = 0.0
    """Seconds since the run (or its resumption) began."""
    share: float = 0.0
    """Share of all training that is done: of the rounds, or of the budget where that is more."""


@dataclass(frozen=True)
class SamplesReady:
    """The final samples of a run are drawn and scored."""

    spec: RunSpec
    """What is run."""
    run_dir: Path
    """Where `samples.parquet` lies."""
    table: Any = None
    """polars.DataFrame with one row for each sample."""
    load: Callable[[int], Any] | None = None
    """Sample by index, for artefacts that do not fit a table."""


@dataclass(frozen=True)
class RunFinished:
    """A run ended, well or not; what was computed stays readable."""

    spec: RunSpec
    """What was run."""
    run_dir: Path
    """Where its files lie."""
    status: str
    """done | failed | oom | timeout | nan | disk | interrupted."""
    error: str = ""
    """Message of what went wrong, empty when done."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Final metrics by name."""
    seconds: float = 0.0
    """Seconds since the run (or its resumption) began."""
    warnings: tuple[str, ...] = ()
    """What a reader of the numbers should know, such as a budget smaller than one round."""


Event = RunStarted | RoundFinished | SamplesReady | RunFinished
