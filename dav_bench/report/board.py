"""A board: rows of one task side by side, with what each number means. Same rows, same board."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from dav_bench.report.rows import Row
from dav_bench.report.stats import Interval, interval, reduced, scaled
from dav_bench.report.terms import Budget, Column, Terms, flat

REWARD = Column("reward", "train reward", "quality", "up", "sample", summary="the reward that methods see")
HELDOUT = Column(
    "reward-heldout", "held-out reward", "quality", "up", "sample", summary="a reward no method ever sees"
)
GAP = Column("gap", "gap", "quality", "down", summary="scaled train reward minus scaled held-out reward")
COSTS = (
    Column("train-cost", "training cost", "cost", "down", summary="network rows, forward + 2 x backward"),
    Column("sample-cost", "cost per sample", "cost", "down", summary="the same, to draw one final sample"),
    Column("reward-rows", "reward rows", "cost", "down", summary="forward + 2 x backward"),
    Column("seconds", "seconds", "cost", "down", summary="training and drawing the final samples"),
    Column("peak-mb", "peak MB", "cost", "down", summary="largest resident memory"),
)
FIRST = ("real", "exact", "pretrained")
"""Rows that open every board; the others follow by held-out reward, or nearest first where the target is known."""

_DRAWING = "sample"  # the phase of the meter that draws the final samples
_UNCHARGED = ("eval",)  # the phase that every method has alike
_TRAINING = ("search", "fit")


@dataclass(frozen=True)
class Section:
    """One table: rows that may be compared with each other."""

    frame: pl.DataFrame
    """label, source, seeds, n, each column and "<column> ±", version, command."""
    reason: str = ""
    """Why these rows do not compare with those of the other tables; empty where they do."""
    budget: Budget | None = None
    """What training might spend, where the command said so."""
    missing: tuple[str, ...] = ()
    """Methods that could stand here and were not run yet."""
    unfit: tuple[Mapping[str, str], ...] = ()
    """Methods that cannot run on the task: `method` and `reason`."""


@dataclass(frozen=True)
class Board:
    """Rows of one task, ready to be written as md, html, csv or json (`dav_bench.report.formats`)."""

    terms: Terms
    """What is measured, and how."""
    columns: tuple[Column, ...]
    """Columns with a role; those without a value in any row are left out."""
    main: Section
    """Rows under the task's own terms, trained as the task or the command says."""
    budgets: tuple[Section, ...] = ()
    """The same terms, with training ended by a budget: a table for each."""
    apart: tuple[Section, ...] = ()
    """Rows under other terms, with the reason."""

    @property
    def sections(self) -> tuple[Section, ...]:
        """All tables."""
        return (self.main, *self.budgets, *self.apart)


def build(rows: Sequence[Row], terms: Terms) -> Board:
    """Sort rows into comparable tables and reduce each to means and intervals over seeds."""
    terms = _with_scales(terms, rows)
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: (r.label, r.run_id, r.source, r.seed)):
        groups[difference(row.settings, terms.settings)].append(row)
    columns = _present((REWARD, HELDOUT, GAP, *terms.metrics, *COSTS), rows, terms)
    ours: dict[Budget | None, list[Row]] = {None: []}
    for row in groups.pop("", []):
        ours.setdefault(Budget.of(row.spec.get("budget", {})), []).append(row)
    untrained = [row for row in ours[None] if not trained(row)]
    main = Section(_table(ours.pop(None), columns, terms))
    budgets = tuple(
        _budget_section(b, [*untrained, *ours[b]], columns, terms) for b in sorted(filter(None, ours))
    )
    apart = tuple(Section(_table(groups[reason], columns, terms), reason) for reason in sorted(groups))
    return Board(terms, columns, main, budgets, apart)


def trained(row: Row) -> bool:
    """Whether anything was spent before the final samples; rows that spent nothing stand in every section."""
    return any(count for name, phase in row.meter.items() if name in _TRAINING for count in phase.values())


def _budget_section(budget: Budget, rows: Sequence[Row], columns: Sequence[Column], terms: Terms) -> Section:
    """One budget with the rows that it does not touch; what the clock ended has no order but the alphabet's."""
    frame = _table(rows, columns, terms)
    if budget.unit == "seconds":
        frame = frame.sort("label", "id", "source")
    held = {row.spec["method"] for row in rows}
    missing = tuple(m["method"] for m in terms.methods if not m["reason"] and m["method"] not in held)
    return Section(frame, "", budget, missing, tuple(m for m in terms.methods if m["reason"]))


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """What keeps a row out of the main table, such as "eval.samples 640 instead of 256"; empty if nothing."""
    a, b = flat(ours), flat(theirs)
    keys = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    if "heldout" in keys:  # which held-out reward is not read matters no more
        keys = [key for key in keys if not key.startswith("rewards.heldout")]
    return "; ".join(f"{key} {shown(a.get(key))} instead of {shown(b.get(key))}" for key in keys)


def shown(value: Any) -> str:
    """A setting as notes tell it."""
    return "unset" if value is None else str(value) or "default"


def values(row: Row, terms: Terms) -> dict[str, float]:
    """All numbers of one run by column; what was not measured is absent."""
    found: dict[str, float] = {}
    for name, key in (("reward", "reward.train"), ("reward-heldout", "reward.heldout")):
        if key in row.samples:
            found[name] = reduced(row.samples[key], terms.reduce)
    if {"reward", "reward-heldout"} <= found.keys() and {"train", "heldout"} <= terms.scales.keys():
        train, heldout = (scaled(found[name], **terms.scales[role]) for name, role in
                          (("reward", "train"), ("reward-heldout", "heldout")))  # fmt: skip
        found["gap"] = train - heldout
    for column in terms.metrics:
        sample = row.samples.get(f"metric.{column.name}")
        if column.unit == "sample" and sample is not None:
            found[column.name] = reduced(sample, column.reduce)
        elif column.name in row.metrics:
            found[column.name] = row.metrics[column.name]
    return found | _costs(row)


def _costs(row: Row) -> dict[str, float]:
    """What a run cost; a test-time search on a tuned model carries the training of that model in its own meter."""
    found = {} if row.peak_mb is None else {"peak-mb": float(row.peak_mb)}
    if not row.meter:
        return found
    training = [phase for name, phase in row.meter.items() if name not in (_DRAWING, *_UNCHARGED)]
    drawing = row.meter.get(_DRAWING, {})
    phases = [*training, drawing]
    found["train-cost"] = float(sum(_cost(p) for p in training))
    if row.n:
        found["sample-cost"] = _cost(drawing) / row.n
    found["reward-rows"] = float(sum(p.get("reward", 0) + 2 * p.get("reward_backward", 0) for p in phases))
    found["seconds"] = float(sum(p.get("seconds", 0.0) for p in phases))
    return found


def _cost(phase: Mapping[str, float]) -> float:
    return phase.get("forward", 0) + 2 * phase.get("backward", 0)


def _with_scales(terms: Terms, rows: Sequence[Row]) -> Terms:
    """Scales of the rewards: the task's, or else those of the row "real"."""
    real = next((r for r in rows if r.label == "real" and not difference(r.settings, terms.settings)), None)
    if terms.scales or real is None:
        return terms
    scales = {}
    for role in ("train", "heldout"):
        sample = real.samples.get(f"reward.{role}")
        if sample is not None:
            q90 = pl.Series(sample).quantile(0.9, "linear")
            scales[role] = {"median": reduced(sample, "median"), "q90": float(q90 or 0.0)}
    scales = {role: scale for role, scale in scales.items() if scale["q90"] > scale["median"]}
    return replace(terms, scales=scales, scale_of=f"the {real.n} real samples of the row `real`")


def _present(columns: Sequence[Column], rows: Sequence[Row], terms: Terms) -> tuple[Column, ...]:
    held = {name for row in rows for name in values(row, terms)}
    return tuple(c for c in columns if c.name in held)


def _table(rows: Sequence[Row], columns: Sequence[Column], terms: Terms) -> pl.DataFrame:
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.label, row.run_id, row.source].append(row)
    names = _names(groups)
    lines = []
    for key, seeds in groups.items():
        numbers = [values(row, terms) for row in seeds]
        line: dict[str, Any] = {"label": names[key], "method": key[0], "id": key[1], "source": key[2]}
        line |= {"seeds": span([row.seed for row in seeds]), "n": len(seeds)}
        for column in columns:
            found = [n[column.name] for n in numbers if column.name in n]
            whole = interval(found) if len(found) == len(seeds) else Interval(float("nan"), None, 0)
            mean = whole.mean if whole.n else None
            line |= {column.name: _short(mean), f"{column.name} ±": _short(whole.half)}
        line |= {"version": ", ".join(sorted({row.version for row in seeds}))}
        lines.append(line | {"command": command(seeds)})
    lines.sort(key=_order)
    return pl.DataFrame(lines, schema=_schema(columns), orient="row")


def _short(value: float | None) -> float | None:
    """Ten digits: what lies below differs between machines."""
    return None if value is None else float(f"{value:.10g}")


def _schema(columns: Sequence[Column]) -> dict[str, Any]:
    text = dict.fromkeys(("label", "method", "id", "source", "seeds"), pl.String)
    numbers = {f"{c.name}{end}": pl.Float64 for c in columns for end in ("", " ±")}
    return {**text, "n": pl.Int32, **numbers, "version": pl.String, "command": pl.String}


def _order(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """Real, exact, pretrained, then nearest to the exact target, or by held-out reward, or else by the reward."""
    first = FIRST.index(line["method"]) if line["method"] in FIRST else len(FIRST)
    best = line.get("reward-heldout")
    best = line.get("reward") if best is None else best
    best = -line["target-distance"] if line.get("target-distance") is not None else best
    worth = 0.0 if best is None or best != best else float(best)
    return (first, best is None or best != best, -worth, line["label"], line["id"], line["source"])


def _names(groups: Mapping[tuple[str, str, str], Sequence[Row]]) -> dict[tuple[str, str, str], str]:
    """Row names: the label, with what differs where several settings share it."""
    names = {}
    for key, rows in groups.items():
        others = [r[0].spec for k, r in groups.items() if k[0] == key[0]]
        tables = [flat({n: s.get(n) for n in ("params", "budget", "search")}) for s in others]
        mine = flat({n: rows[0].spec.get(n) for n in ("params", "budget", "search")})
        differs = sorted(
            k for k in {k for t in tables for k in t} if len({str(t.get(k)) for t in tables}) > 1
        )
        note = ", ".join(f"{k.removeprefix('params.')}={mine[k]}" for k in differs if k in mine)
        names[key] = f"{key[0]} ({note})" if note else key[0]
    return names


def span(seeds: Sequence[int]) -> str:
    """Seeds as the command line takes them: 0-2, or 0,2,5."""
    parts: list[list[int]] = []
    for seed in sorted(set(seeds)):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def command(rows: Sequence[Row]) -> str:
    """The command that makes a row; its options are stored with it."""
    row = rows[0]
    if not row.arguments:
        return f"dav-bench run --spec (of {row.label}/{row.run_id}-s{row.seed})"
    return shlex.join(
        [
            "dav-bench",
            "run",
            *row.arguments,
            "--task",
            row.spec["task"],
            "--seeds",
            span([r.seed for r in rows]),
        ]
    )
