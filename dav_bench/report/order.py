"""In which order rows stand: yardsticks, Pareto layers, what fails a gate; and which of them have a rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dav_bench.report import pareto
from dav_bench.report.gates import Gate
from dav_bench.report.terms import Column, Terms

FIRST = ("real", "exact", "pretrained")
"""Yardsticks: rows that open every board and have no rank."""

PLACES = ("layer", "rank low", "rank high", "hypervolume", "below")
"""Columns of a table whose task says by what it ranks."""


@dataclass(frozen=True)
class Front:
    """By what the rows of a table are placed."""

    by: tuple[Column, ...]
    """Objectives."""
    reference: Mapping[str, float] = field(default_factory=dict)
    """Where the hypervolume begins, by objective; empty where nothing says so."""
    volume: float | None = None
    """Hypervolume of the first layer."""


def objectives(columns: Sequence[Column], terms: Terms) -> tuple[Column, ...]:
    """The columns a task ranks by; none where one of them was not measured at all."""
    held = {c.name: c for c in columns}
    by = tuple(terms.rank.get("by", ()))
    return tuple(held[name] for name in by) if by and set(by) <= held.keys() else ()


def place(
    lines: Sequence[dict[str, Any]],
    seeds: Sequence[Sequence[Mapping[str, float]]],
    by: Sequence[Column],
    terms: Terms,
) -> Front:
    """Give each line its layer, hypervolume, rank interval, and the reason why it stands below the line.

    Args:
        lines: Rows of a table with the mean of each column; `PLACES` are added.
        seeds: For each line the values of its runs by column.
        by: What counts.
        terms: Where gates and the reference point stand.
    """
    gates = [Gate.of(m, text) for m, text in sorted(terms.rank.get("gates", {}).items())]
    pretrained = next((line for line in lines if line["method"] == "pretrained"), {})
    known = {c.name: pretrained[c.name] for c in by if _finite(pretrained.get(c.name))}
    reference = pareto.reference_point(
        [(c.name, c.role, c.better) for c in by], terms.rank.get("reference", {}), known
    )
    sign = np.array([-1.0 if c.better == "down" else 1.0 for c in by])
    origin = sign * [reference[c.name] for c in by] if len(reference) == len(by) else None
    placed, ranked = [], []
    for i, (line, runs) in enumerate(zip(lines, seeds, strict=True)):
        line |= dict.fromkeys(PLACES) | {"below": ""}
        if line["method"] in FIRST:
            continue
        line["below"] = _below(line, by, gates)
        if not line["below"]:
            placed.append(i)
            if len(runs) >= pareto.SEEDS:
                ranked.append(i)
    if placed:
        points = sign * np.array([[lines[i][c.name] for c in by] for i in placed])
        for i, layer, point in zip(placed, pareto.layers(points), points, strict=True):
            lines[i]["layer"] = layer
            lines[i]["hypervolume"] = None if origin is None else short(pareto.box(point, origin))
    if len(ranked) > 1:
        values = [sign * np.array([[run[c.name] for c in by] for run in seeds[i]]) for i in ranked]
        keys = [f"{lines[i]['method']}/{lines[i]['id']}" for i in ranked]
        for i, (low, high) in zip(ranked, pareto.ranks(values, keys), strict=True):
            lines[i] |= {"rank low": low, "rank high": high}
    if origin is None:
        return Front(tuple(by))
    return Front(tuple(by), reference, short(pareto.volume(points, origin) if placed else 0.0))


def _below(line: Mapping[str, Any], by: Sequence[Column], gates: Sequence[Gate]) -> str:
    """Why a row is not placed; empty if it is."""
    missing = [c.title for c in by if not _finite(line[c.name])]
    if missing:
        return f"{', '.join(missing)} not measured"
    failed = []
    for gate in gates:
        value = line.get(gate.metric)
        if value is None:
            failed.append(f"{gate.metric} not measured")
        elif not gate.passes(value):
            failed.append(f"{gate.metric} {value:.4g} is not {gate.sign} {gate.limit:g}")
    return "; ".join(failed)


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def short(value: float | None) -> float | None:
    """Ten digits: what lies below differs between machines."""
    return None if value is None else float(f"{value:.10g}")


def standing(line: Mapping[str, Any], by: Sequence[Column] = ()) -> tuple[Any, ...]:
    """Sort key: yardsticks; then by layer and hypervolume; then what is not placed, by its reward.

    Without a ranking: nearest to the exact target, or by held-out reward, or else by the reward.
    """
    first = FIRST.index(line["method"]) if line["method"] in FIRST else len(FIRST)
    names = (line["label"], line["id"], line["source"])
    if line.get("layer") is not None:
        better = -line[by[0].name] if by[0].better != "down" else line[by[0].name]
        return (first, 0, line["layer"], -(line["hypervolume"] or 0.0), better, *names)
    best = line.get("reward-heldout")
    best = line.get("reward") if best is None else best
    best = -line["target-distance"] if line.get("target-distance") is not None else best
    worth = float(best) if best is not None and _finite(best) else None
    return (first, 1, worth is None, -(worth or 0.0), 0.0, *names)
