"""What commands print: tables, progress and notices. No logic."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from dav_bench.events import RoundFinished, RunFinished, RunStarted
    from dav_bench.known import Cost
    from dav_bench.launch import Outcome
    from dav_bench.plan import PlannedRun
    from dav_bench.spec import RunSpec


def console(stderr: bool = False) -> Console:
    """A rich console; wide enough for whole lines where output is no terminal."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not made.is_terminal:
        made.width = 160
    return made


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Print rows under columns."""
    from rich.table import Table
    from rich.text import Text

    out = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        out.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in rows:
        out.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console().print(out)


def emit_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def notice(lines: Iterable[str] = ()) -> None:
    """One line on stderr about broken plugins, and any others given."""
    from dav_bench.plugins import plugins

    for line in [plugins().notice(), *lines]:
        if line:
            notice_line(line)


def notice_line(line: str) -> None:
    """One line on stderr."""
    print(f"dav-bench: {line}", file=sys.stderr)


def plan_table(runs: Sequence[PlannedRun], costs: Sequence[Cost | None] = (), jobs: int = 1) -> None:
    """The plan of a command, as --dry-run shows it, and what it should take."""
    from dav_bench.plan import Status

    costs = costs or [None] * len(runs)
    rows = []
    for run, cost in zip(runs, costs, strict=True):
        note = f"{run.reason}; try {run.fix}" if run.fix else run.reason
        spent = ("", "") if run.status in ("cached", "skip") else _expected(cost)
        rows.append((run.spec.task, run.spec.label, run.spec.seed, run.status, run.spec.run_id, *spent, note))
    table(("task", "run", "seed", "status", "id", "rows", "time", "note"), rows)
    counts = {s: n for s in get_args(Status) if (n := sum(r.status == s for r in runs))}
    typer.echo(
        f"{len(runs)} runs: {', '.join(f'{n} {s}' for s, n in counts.items())}{_total(runs, costs, jobs)}"
    )
    for task in {r.task.name: r.task for r in runs}.values():
        if task.expect:
            expect = ", ".join(f"{k} {v}" for k, v in task.expect.items())
            typer.echo(f"expected for the default run of {task.name}: {expect}")


def _expected(cost: Cost | None) -> tuple[str, str]:
    if cost is None:
        return "?", "?"
    return f"{cost.rows:,.0f}", "?" if cost.seconds is None else duration(cost.seconds)


def _total(runs: Sequence[PlannedRun], costs: Sequence[Cost | None], jobs: int) -> str:
    """What is to be done, as far as it is known; seconds are those of the machine that ran the like."""
    todo = [cost for run, cost in zip(runs, costs, strict=True) if run.status not in ("cached", "skip")]
    known = [cost.seconds for cost in todo if cost is not None and cost.seconds is not None]
    if not known:
        return ""
    time = duration(sum(known) / min(jobs, len(known)))
    unknown = f", and {len(todo) - len(known)} of unknown time" if len(known) < len(todo) else ""
    peak = max((cost.memory_mb or 0 for cost in todo if cost is not None), default=0)
    memory = f", up to {peak / 1024:.1f} GB each" if peak else ""
    return f"; about {time} where the like was run{f' with {jobs} jobs' if jobs > 1 else ''}{unknown}{memory}"


def duration(seconds: float) -> str:
    """Seconds as a reader takes them in: 8 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plan_json(runs: Sequence[PlannedRun], costs: Sequence[Cost | None] = ()) -> list[dict[str, Any]]:
    """The plan of a command for scripts."""
    return [
        {
            "task": run.spec.task,
            "label": run.spec.label,
            "seed": run.spec.seed,
            "status": run.status,
            "id": run.spec.run_id,
            "identity": run.spec.identity,
            "path": str(run.path),
            "reason": run.reason,
            "fix": run.fix,
            "expected": None if cost is None else asdict(cost),
            "spec": run.spec.to_dict(),
        }
        for run, cost in zip(runs, costs or [None] * len(runs), strict=True)
    ]


class Progress:
    """Shows a command's runs while they last: a bar for each on a terminal, plain lines elsewhere.

    It is a listener: an object with some of the life hooks, and two that `launch` calls.
    """

    def __init__(self, runs: int, jobs: int = 1):
        self.runs, self.jobs, self.out = runs, jobs, console(stderr=True)
        self.bar: Any = None
        self.done: set[str] = set()
        self.tasks: dict[str, TaskID] = {}
        self.shown: dict[str, int] = {}  # twentieths of the training of each run at work
        self.errors: set[str] = set()
        if self.out.is_terminal:
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(24),
                TextColumn("{task.fields[at]}"),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.out,
                transient=True,
            )

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, line: str) -> None:
        """Print a line without disturbing the bar."""
        self.out.print(line, markup=False)

    def reused(self, run: PlannedRun) -> None:
        """Say that a finished run is used as it is."""
        self.done.add(run.spec.dirname)
        self.say(f"[{len(self.done)}/{self.runs}] {_name(run.spec)}: "
                 f"finished before, reused ({run.path}; --fresh reruns)")  # fmt: skip

    def run_started(self, event: RunStarted) -> None:
        resumed = f", resumed after round {event.resumed}" if event.resumed else ""
        key = event.spec.dirname
        self.shown[key] = 0
        if self.bar:
            note = "searching" if event.rounds else "drawing samples"
            done = event.resumed / max(event.rounds, 1)
            self.tasks[key] = self.bar.add_task(
                _name(event.spec), total=1.0, completed=done, at=resumed, note=note
            )
        else:
            place = min(len(self.done) + len(self.shown), self.runs)
            self.say(f"[{place}/{self.runs}] {_name(event.spec)}{resumed}")

    def round_finished(self, event: RoundFinished) -> None:
        note, share = _numbers(event.metrics), max(event.share, event.round / event.rounds)
        at = f"{event.round}/{event.rounds}"
        if "train" in event.spec.budget:
            at = f"{event.round} ({100 * share:.0f} %)"
        key = event.spec.dirname
        if self.bar and key in self.tasks:
            self.bar.update(self.tasks[key], completed=share, at=at, note=note)
        elif event.rounds <= 25 or int(20 * share + 1e-9) > self.shown.get(key, 0):
            left = event.metrics.get("train/seconds", 0.0) * event.round * (1 / share - 1)
            who = f"{_name(event.spec)}: " if self.jobs > 1 else ""
            self.say(f"  {who}round {at}  {note}  {event.seconds:.0f} s, about {left:.0f} s left")
        self.shown[key] = int(20 * share + 1e-9)

    def run_finished(self, event: RunFinished) -> None:
        self._close(event.spec)
        who = _name(event.spec) if self.jobs > 1 else f"{event.spec.label} seed {event.spec.seed}"
        what = f"{who}: {event.status} in {event.seconds:.0f} s"
        numbers = _numbers(event.metrics)
        self.say(f"  {what}{'  ' + numbers if numbers else ''}{'  ' + event.error if event.error else ''}")
        for warning in event.warnings:
            self.say(f"  {who}: {warning}")

    def ended(self, run: PlannedRun, outcome: Outcome) -> None:
        """A run that could not say so itself; what many runs lack is told once."""
        self._close(run.spec)
        if outcome.error in self.errors:
            self.say(f"  {_name(run.spec)}: {outcome.status}, as before")
            return
        self.errors.add(outcome.error)
        if outcome.status == "failed":
            self.say(f"Error: {_name(run.spec)}: {outcome.error}")
        else:
            self.say(f"  {_name(run.spec)}: {outcome.status}: {outcome.error}")

    def _close(self, spec: RunSpec) -> None:
        self.done.add(spec.dirname)
        self.shown.pop(spec.dirname, None)
        if spec.dirname in self.tasks:
            self.bar.remove_task(self.tasks.pop(spec.dirname))


def _name(spec: RunSpec) -> str:
    return f"{spec.task} {spec.label} seed {spec.seed}"


def summary(runs: Sequence[PlannedRun], outcomes: Mapping[Path, Outcome], out: Path, json: bool) -> None:
    """The table that a command ends with, for each task, what did not come so far, and where the results lie."""
    from dav_bench.plugins import catalog
    from dav_bench.report import board, formats
    from dav_bench.report.rows import read_row
    from dav_bench.report.terms import terms_of
    from dav_bench.store import RunDir

    status = {run.path: outcomes[run.path].status if run.path in outcomes else run.status for run in runs}
    done = [r for r in runs if status[r.path] == "done"]
    if json:
        metrics = [(r, read_row(RunDir.open(r.path)).metrics if r in done else {}) for r in runs]
        emit_json([{"label": r.spec.label, "task": r.spec.task, "seed": r.spec.seed, "path": str(r.path),
                    "status": status[r.path], "error": outcomes[r.path].error if r.path in outcomes else "",
                    "metrics": m} for r, m in metrics])  # fmt: skip
        return
    for task in {r.task.name: r.task for r in done}.values():
        rows = [read_row(RunDir.open(r.path)) for r in done if r.task.name == task.name]
        terms = terms_of(task, catalog(), rows[-1].settings, out)
        made = board.build(rows, terms)
        for section in made.budgets or (made.main,):
            console().print(formats.rich_table(made, section))
    left = [r for r in runs if r.path in outcomes and status[r.path] != "done"]
    if left and len(runs) > 1:
        first = {r.path: outcomes[r.path].error.split("\n")[0] for r in left}
        rows_left = [(r.spec.task, r.spec.label, r.spec.seed, status[r.path], first[r.path]) for r in left]
        table(
            ("task", "run", "seed", "status", "why"),
            rows_left,
            f"{len(left)} of {len(runs)} runs did not finish",
        )
    for run in left:
        if (run.path / "log.txt").exists():
            notice_line(
                f"{run.spec.label} seed {run.spec.seed}: {status[run.path]}; see {run.path / 'log.txt'}"
            )
    places = sorted({str(r.path.parent.parent) for r in runs})
    typer.echo(f"results: {', '.join(places)}")


_SHOWN = ("reward", "reward-heldout", "diversity", "levenshtein", "kmer-corr", "accessibility")


def _numbers(metrics: Any) -> str:
    short = {k.rpartition("/")[2]: v for k, v in metrics.items()}
    return "  ".join(f"{k} {short[k]:.3g}" for k in _SHOWN if k in short)
