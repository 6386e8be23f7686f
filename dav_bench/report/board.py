"""A board: rows of one task side by side, with what each number means. Same rows, same board."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from dav_bench.report.curves import find_curve, overdone
from dav_bench.report.order import FIRST, PLACES, Front, objectives, place, short, standing
from dav_bench.report.rows import Row
from dav_bench.report.stats import interval, reduced, scaled
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
OVERDONE = ("train gain", "heldout gain", "transfer", "peak loss")
"""What `curves.overdone` measures."""

_DRAWING = "sample"  # the phase of the meter that draws the final samples
_UNCHARGED = ("eval",)  # the phase that every method has alike
_TRAINING = ("search", "fit")


@dataclass(frozen=True)
class Section:
    """One table: rows that may be compared with each other."""

    frame: pl.DataFrame
    """label, source, seeds, n, the places (`order.PLACES`) where the task ranks, each column and "<column> ±",
    version, command."""
    reason: str = ""
    """Why these rows do not compare with those of the other tables; empty where they do."""
    budget: Budget | None = None
    """What training might spend, where the command said so."""
    missing: tuple[str, ...] = ()
    """Methods that could stand here and were not run yet."""
    unfit: tuple[Mapping[str, str], ...] = ()
    """Methods that cannot run on the task: `method` and `reason`."""
    runs: Mapping[tuple[str, str, str], tuple[Row, ...]] = field(default_factory=dict)
    """The runs behind each line of the frame, by its `method`, `id` and `source`, in the order of their seeds."""
    front: Front | None = None
    """By what rows are placed; None where the task does not say, or nothing has an order."""
    overdone: pl.DataFrame = field(default_factory=pl.DataFrame)
    """label, method, id, source, seeds and `OVERDONE` with "<name> ±"; empty without a held-out reward."""


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
    main = _section(ours.pop(None), columns, terms)
    budgets = tuple(
        _budget_section(b, [*untrained, *ours[b]], columns, terms) for b in sorted(filter(None, ours))
    )
    apart = tuple(_section(groups[reason], columns, terms, reason) for reason in sorted(groups))
    return Board(terms, columns, main, budgets, apart)


def trained(row: Row) -> bool:
    """Whether anything was spent before the final samples; rows that spent nothing stand in every section."""
    return any(count for name, phase in row.meter.items() if name in _TRAINING for count in phase.values())


def _budget_section(budget: Budget, rows: Sequence[Row], columns: Sequence[Column], terms: Terms) -> Section:
    """One budget with the rows that it does not touch; what the clock ended has no order but the alphabet's."""
    made = _section(rows, columns, terms, ranked=budget.unit != "seconds")
    frame = made.frame.sort("label", "id", "source") if budget.unit == "seconds" else made.frame
    held = {row.spec["method"] for row in rows}
    missing = tuple(m["method"] for m in terms.methods if not m["reason"] and m["method"] not in held)
    unfit = tuple(m for m in terms.methods if m["reason"])
    return replace(made, frame=frame, budget=budget, missing=missing, unfit=unfit)


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
    if ends := _scaled(row, terms):
        found["gap"] = ends["train"] - ends["heldout"]
    for column in terms.metrics:
        sample = row.samples.get(f"metric.{column.name}")
        if column.unit == "sample" and sample is not None:
            found[column.name] = reduced(sample, column.reduce)
        elif column.name in row.metrics:
            found[column.name] = row.metrics[column.name]
    return found | costs(row)


def costs(row: Row) -> dict[str, float]:
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


def _section(
    rows: Sequence[Row], columns: Sequence[Column], terms: Terms, reason: str = "", ranked: bool = True
) -> Section:
    """One table: a line for all seeds of a setting, in order."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.label, row.run_id, row.source].append(row)
    names, searched = _names(groups), {_base(row) for row in rows if row.spec.get("search")}
    lines, numbers = [], []
    for key, seeds in groups.items():
        numbers.append([values(row, terms) for row in seeds])
        line: dict[str, Any] = {"label": names[key], "method": key[0], "id": key[1], "source": key[2]}
        line |= {"seeds": span([row.seed for row in seeds]), "n": len(seeds)}
        for column in columns:
            line |= _summary(column.name, [n.get(column.name) for n in numbers[-1]])
        line |= {"version": ", ".join(sorted({row.version for row in seeds}))}
        lines.append(line | {"command": command(seeds, bare=_fitted(seeds[0]) and _base(seeds[0]) not in searched)})
    by = objectives(columns, terms)
    front = place(lines, numbers, by, terms) if by and ranked else None
    lines.sort(key=lambda line: standing(line, by))
    frame = pl.DataFrame(lines, schema=_schema(columns, places=bool(by)), orient="row")
    runs = {key: tuple(groups[key]) for key in map(_key, lines)}
    return Section(frame, reason, runs=runs, front=front, overdone=_overdone(lines, runs, terms))


def _key(line: Mapping[str, Any]) -> tuple[str, str, str]:
    return line["method"], line["id"], line["source"]


def _summary(name: str, each: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and half-width over seeds; empty where one of them was not measured."""
    found = [v for v in each if v is not None]
    if not found or len(found) < len(each):
        return {name: None, f"{name} ±": None}
    whole = interval(found)
    return {name: short(whole.mean), f"{name} ±": short(whole.half)}


def _overdone(
    lines: Sequence[Mapping[str, Any]], runs: Mapping[tuple[str, str, str], Sequence[Row]], terms: Terms
) -> pl.DataFrame:
    """Over-optimisation of each row against the row "pretrained", on the scale of real elements."""
    start = next(
        (_scaled(runs[_key(line)][0], terms) for line in lines if line["method"] == "pretrained"), {}
    )
    found = []
    for line in lines if start else ():
        seeds = runs[_key(line)]
        ends = [_scaled(row, terms) for row in seeds]
        if line["method"] in FIRST or not all(ends):
            continue
        each = [overdone(start, end, _way(row, terms)) for row, end in zip(seeds, ends, strict=True)]
        said = {name: line[name] for name in ("label", "method", "id", "source", "seeds")}
        for name in OVERDONE:
            said |= _summary(name, [e.get(name) for e in each])
        found.append(said)
    text = dict.fromkeys(("label", "method", "id", "source", "seeds"), pl.String)
    numbers = {f"{name}{end}": pl.Float64 for name in OVERDONE for end in ("", " ±")}
    return pl.DataFrame(found, schema={**text, **numbers}, orient="row") if found else pl.DataFrame()


def _scaled(row: Row, terms: Terms) -> dict[str, float]:
    """Scaled train and held-out reward of a run; empty where one is not known."""
    if not {"train", "heldout"} <= terms.scales.keys():
        return {}
    if not {"reward.train", "reward.heldout"} <= row.samples.keys():
        return {}
    return {
        role: scaled(reduced(row.samples[f"reward.{role}"], terms.reduce), **terms.scales[role])
        for role in ("train", "heldout")
    }


def _way(row: Row, terms: Terms) -> list[float]:
    """Scaled held-out rewards of the evaluations while training."""
    found = find_curve(row.curves, "reward-heldout", "eval")
    return [] if found is None else [scaled(float(v), **terms.scales["heldout"]) for v in found.value]


def _schema(columns: Sequence[Column], places: bool) -> dict[str, Any]:
    text = dict.fromkeys(("label", "method", "id", "source", "seeds"), pl.String)
    numbers = {f"{c.name}{end}": pl.Float64 for c in columns for end in ("", " ±")}
    types = (pl.Int32, pl.Int32, pl.Int32, pl.Float64, pl.String)
    held = dict(zip(PLACES, types, strict=True)) if places else {}
    return {**text, "n": pl.Int32, **held, **numbers, "version": pl.String, "command": pl.String}


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


def _base(row: Row) -> str:
    """What was trained: the specification without test-time search."""
    return json.dumps({k: v for k, v in row.spec.items() if k != "search"}, sort_keys=True)


def _fitted(row: Row) -> bool:
    """Whether something was fitted, and is sampled without test-time search."""
    return not row.spec.get("search") and any(row.meter.get("fit", {}).values())


def command(rows: Sequence[Row], bare: bool = False) -> str:
    """The command that makes a row; its options are stored with it.

    Args:
        rows: Its seeds.
        bare: No test-time search stands beside it: the command leaves out the one that it would add.
    """
    row = rows[0]
    if not row.arguments:
        return f"dav-bench run --spec (of {row.label}/{row.run_id}-s{row.seed})"
    return shlex.join(
        [
            "dav-bench",
            "run",
            *row.arguments,
            *(("--search", "none") if bare else ()),
            "--task",
            row.spec["task"],
            "--seeds",
            span([r.seed for r in rows]),
        ]
    )
