"""The committed leaderboard: one parquet file per task that holds all its rows, and the md and csv made from it.

Long format, one line per fact: `run`, `label`, `seed`, `kind` (about, spec, meter, set, sample, curve, spent,
text), `name`, `index`, `value`, `text`. The terms of the board lie in the footer, so the file needs nothing else to be
read. Kinds may be added: readers pass over those that they do not know, and files of earlier versions lack curve, spent
and text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dav_bench.errors import DavBenchError
from dav_bench.files import damaged, read_parquet, write_parquet, write_text
from dav_bench.report.board import Board, build, difference
from dav_bench.report.curves import Curve
from dav_bench.report.formats import render
from dav_bench.report.rows import Row, read_row
from dav_bench.report.terms import Terms, default_settings, methods_of, terms_of
from dav_bench.store import RunDir
from dav_bench.tasks import TaskSpec

SCHEMA = {
    "run": pl.String,
    "label": pl.String,
    "seed": pl.Int32,
    "kind": pl.String,
    "name": pl.String,
    "index": pl.Int32,
    "value": pl.Float64,
    "text": pl.String,
}
"""Columns of the file."""

SPENT = ("cost", "reward_rows")
"""What curves run over: by round, once for all curves of a run."""

BESIDE = ("md", "csv")
"""Formats written beside the parquet file."""


@dataclass(frozen=True)
class Published:
    """What `publish` did."""

    board: Board
    """The board as it now stands."""
    added: tuple[str, ...]
    """Runs that went in, as label/run."""
    left_out: tuple[str, ...]
    """Runs that did not, each with the reason."""


def publish(task: TaskSpec, runs: Sequence[RunDir], path: Path) -> Published:
    """Write the board of a task: what it held, and finished runs under the task's own terms in place of the same.

    The same runs give the same bytes. Writes `path` and, from it alone, the md and csv beside it.

    Args:
        task: The task.
        runs: Runs to add; those that are not done or run under other terms are left out.
        path: `results/leaderboards/<task>.parquet`.
    """
    from dav_bench.plugins import catalog

    terms = terms_of(task, catalog(), default_settings(task, catalog()), path.parent.parent)
    terms = replace(terms, methods=methods_of(task, catalog()))
    held = {row.identity: row for row in load_published(path)[0]} if path.exists() else {}
    added, left_out = [], []
    for run in sorted(runs, key=lambda r: r.path.as_posix()):
        name = f"{run.path.parent.name}/{run.path.name}"
        row, reason = _publishable(run, task, terms)
        if row is None:
            left_out.append(f"{name}: {reason}")
        else:
            held[row.identity] = replace(row, source="published")
            added.append(name)
    if not held:
        raise DavBenchError(
            f"there is nothing to publish for {task.name!r}.",
            "\n".join(left_out),
            f"dav-bench run --method dav --task {task.name}",
        )
    save(list(held.values()), terms, path)
    return Published(_write_beside(path), tuple(added), tuple(left_out))


def _publishable(run: RunDir, task: TaskSpec, terms: Terms) -> tuple[Row | None, str]:
    try:
        row = read_row(run, task)
    except DavBenchError as error:
        return None, error.what
    reason = difference(row.settings, terms.settings)
    return (None, reason) if reason else (row, "")


def save(rows: Sequence[Row], terms: Terms, path: Path) -> None:
    """Write rows and terms to a parquet file, in an order that does not depend on the caller."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line for row in sorted(rows, key=_place) for line in _facts(row)]
    write_parquet(path, pl.DataFrame(lines, schema=SCHEMA, orient="row"), {"board": terms.to_json()})


def _place(row: Row) -> tuple[str, str, int]:
    return row.label, row.run_id, row.seed


def _facts(row: Row) -> Iterator[tuple[Any, ...]]:
    key = (f"{row.run_id}-s{row.seed}", row.label, row.seed)
    about = {
        "identity": row.identity,
        "peak_mb": row.peak_mb,
        "version": row.version,
        "arguments": list(row.arguments),
        **({"env": dict(row.env)} if row.env else {}),
    }
    for kind, facts in (("about", about), ("spec", row.spec), ("meter", row.meter)):
        yield (*key, kind, "", None, None, json.dumps(facts, sort_keys=True))
    for name, texts in sorted(row.texts.items()):
        for index, text in enumerate(texts):
            yield (*key, "text", name, index, None, text)
    for name, value in sorted(row.metrics.items()):
        yield (*key, "set", name, None, float(value), None)
    for name, values in sorted(row.samples.items()):
        for index, value in enumerate(values):
            yield (*key, "sample", name, index, float(value), None)
    for curve in row.curves:
        for r, value in zip(curve.round, curve.value, strict=True):
            yield (*key, "curve", f"{curve.split}/{curve.metric}", int(r), float(value), None)
    for name in SPENT:
        spent = {int(r): float(v) for c in row.curves for r, v in zip(c.round, c.over(name), strict=True)}
        for r, value in sorted(spent.items()):
            yield (*key, "spent", name, r, value, None)


def load_published(path: Path) -> tuple[list[Row], Terms]:
    """Rows and terms of a published board."""
    frame = read_parquet(path)
    try:
        terms = Terms.from_json(pl.read_parquet_metadata(path)["dav_bench.board"])
        runs = frame.partition_by("label", "run", "seed", maintain_order=True)
        return [_row(run) for run in runs], terms
    except (KeyError, TypeError, ValueError, pl.exceptions.PolarsError) as error:
        raise damaged(path, error) from error


def _row(frame: pl.DataFrame) -> Row:
    said = frame.filter(pl.col("kind").is_in(["about", "spec", "meter"])).select("kind", "text")
    text = {kind: json.loads(t) for kind, t in said.rows()}
    shown = frame.filter(pl.col("kind") == "text").sort("index").partition_by("name", as_dict=True)
    facts = frame.filter(pl.col("kind") == "set").select("name", "value")
    samples: dict[str, np.ndarray] = {
        str(part["name"][0]): part.sort("index")["value"].to_numpy()
        for part in frame.filter(pl.col("kind") == "sample").partition_by("name", maintain_order=True)
    }
    about = text["about"]
    rounds = frame.filter(pl.col("kind").is_in(["curve", "spent"]))
    series = {
        (str(part["kind"][0]), str(part["name"][0])): part.sort("index").select("index", "value")
        for part in rounds.partition_by("kind", "name", maintain_order=True)
    }
    return Row(
        spec=text["spec"],
        identity=about["identity"],
        run_id=frame["run"][0].rpartition("-s")[0],
        label=frame["label"][0],
        seed=int(frame["seed"][0]),
        meter=text["meter"],
        metrics=dict(facts.rows()),
        samples=samples,
        peak_mb=about["peak_mb"],
        version=about["version"],
        arguments=tuple(about["arguments"]),
        source="published",
        curves=_curves(series),
        texts={str(name): tuple(part["text"]) for (name,), part in shown.items()},
        env=about.get("env", {}),
    )


def _curves(series: Mapping[tuple[str, str], pl.DataFrame]) -> tuple[Curve, ...]:
    spent = {name: dict(series["spent", name].rows()) for name in SPENT if ("spent", name) in series}
    found = []
    for (kind, name), frame in series.items():
        if kind == "curve":
            split, _, metric = name.partition("/")
            rounds = frame["index"].to_numpy().astype(np.int64)
            cost, rows = (np.array([spent[s][int(r)] for r in rounds]) for s in SPENT)
            found.append(Curve(split, metric, rounds, cost, rows, frame["value"].to_numpy()))
    return tuple(found)


def _write_beside(path: Path) -> Board:
    board = build(*load_published(path))
    for fmt in BESIDE:
        write_text(path.with_suffix(f".{fmt}"), render(board, fmt))
    return board


def check(path: Path) -> list[str]:
    """Rebuild the md and csv of a published board and name those that are missing or differ from it."""
    board = build(*load_published(path))
    wrong = []
    for fmt in BESIDE:
        beside = path.with_suffix(f".{fmt}")
        if not beside.exists():
            wrong.append(f"{beside.name} is missing")
        elif beside.read_bytes() != render(board, fmt).encode():
            wrong.append(f"{beside.name} differs from what {path.name} gives")
    return wrong


def with_local(published: Sequence[Row], local: Iterable[Row]) -> list[Row]:
    """Published rows, and local ones that are not among them."""
    held = {row.identity for row in published}
    return [*published, *(row for row in local if row.identity not in held)]
