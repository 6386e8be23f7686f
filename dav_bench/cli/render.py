"""What commands print: tables, progress and notices. No logic."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from dav_bench.events import RoundFinished, RunFinished, RunStarted
    from dav_bench.plan import PlannedRun


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


def plan_table(runs: Sequence[PlannedRun]) -> None:
    """The plan of a command, as --dry-run shows it."""
    rows = []
    for run in runs:
        note = f"{run.reason}; try {run.fix}" if run.fix else run.reason
        rows.append((run.spec.task, run.spec.label, run.spec.seed, run.status, run.spec.run_id, note))
    table(("task", "run", "seed", "status", "id", "note"), rows)
    for task in {r.task.name: r.task for r in runs}.values():
        if task.expect:
            expect = ", ".join(f"{k} {v}" for k, v in task.expect.items())
            typer.echo(f"expected for the default run of {task.name}: {expect}")


def plan_json(runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
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
            "spec": run.spec.to_dict(),
        }
        for run in runs
    ]


class Progress:
    """Shows a command's runs while they last: a bar on a terminal, plain lines elsewhere.

    It is a listener: an object with some of the life hooks.
    """

    def __init__(self, runs: int):
        self.runs, self.done, self.out = runs, 0, console(stderr=True)
        self.bar: Any = None
        self.task: TaskID | None = None
        self.shown = 0
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
        self.done += 1
        self.say(f"[{self.done}/{self.runs}] {run.spec.task} {run.spec.label} seed {run.spec.seed}: "
                 f"finished before, reused ({run.path}; --fresh reruns)")  # fmt: skip

    def run_started(self, event: RunStarted) -> None:
        name = f"{event.spec.task} {event.label} seed {event.spec.seed}"
        resumed = f", resumed after round {event.resumed}" if event.resumed else ""
        self.shown = 0
        if self.bar:
            note = "searching" if event.rounds else "drawing samples"
            done = event.resumed / max(event.rounds, 1)
            self.task = self.bar.add_task(name, total=1.0, completed=done, at=resumed, note=note)
        else:
            self.say(f"[{self.done + 1}/{self.runs}] {name}{resumed}")

    def round_finished(self, event: RoundFinished) -> None:
        note, share = _numbers(event.metrics), max(event.share, event.round / event.rounds)
        at = f"{event.round}/{event.rounds}"
        if "train" in event.spec.budget:
            at = f"{event.round} ({100 * share:.0f} %)"
        if self.bar and self.task is not None:
            self.bar.update(self.task, completed=share, at=at, note=note)
        elif event.rounds <= 25 or int(20 * share + 1e-9) > self.shown:
            left = event.metrics.get("train/seconds", 0.0) * event.round * (1 / share - 1)
            self.say(f"  round {at}  {note}  {event.seconds:.0f} s, about {left:.0f} s left")
        self.shown = int(20 * share + 1e-9)

    def run_finished(self, event: RunFinished) -> None:
        self.done += 1
        if self.bar and self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None
        what = f"{event.spec.label} seed {event.spec.seed}: {event.status} in {event.seconds:.0f} s"
        numbers = _numbers(event.metrics)
        self.say(f"  {what}{'  ' + numbers if numbers else ''}{'  ' + event.error if event.error else ''}")


def summary(runs: Sequence[PlannedRun], outcomes: Mapping[Path, str], out: Path, json: bool) -> None:
    """The table that a command ends with, for each task, and where the results lie."""
    from dav_bench.plugins import catalog
    from dav_bench.report import board, formats
    from dav_bench.report.rows import read_row
    from dav_bench.report.terms import terms_of
    from dav_bench.store import RunDir

    done = [r for r in runs if outcomes.get(r.path) == "done"]
    if json:
        metrics = [(r, read_row(RunDir.open(r.path)).metrics if r in done else {}) for r in runs]
        emit_json([{"label": r.spec.label, "task": r.spec.task, "seed": r.spec.seed, "path": str(r.path),
                    "status": outcomes.get(r.path, r.status), "metrics": m} for r, m in metrics])  # fmt: skip
        return
    for task in {r.task.name: r.task for r in done}.values():
        rows = [read_row(RunDir.open(r.path)) for r in done if r.task.name == task.name]
        terms = terms_of(task, catalog(), rows[-1].settings, out)
        made = board.build(rows, terms)
        for section in made.budgets or (made.main,):
            console().print(formats.rich_table(made, section))
    for run in runs:
        if outcomes.get(run.path) not in (None, "done"):
            notice_line(
                f"{run.spec.label} seed {run.spec.seed}: {outcomes[run.path]}; see {run.path / 'log.txt'}"
            )
    places = sorted({str(r.path.parent.parent) for r in runs})
    typer.echo(f"results: {', '.join(places)}")


_SHOWN = ("reward", "reward-heldout", "diversity", "levenshtein", "kmer-corr", "accessibility")


def _numbers(metrics: Any) -> str:
    short = {k.rpartition("/")[2]: v for k, v in metrics.items()}
    return "  ".join(f"{k} {short[k]:.3g}" for k in _SHOWN if k in short)
