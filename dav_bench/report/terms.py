"""Under which terms rows compare: metrics, settings, scales of the rewards and the published numbers beside them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dav_bench.errors import DavBenchError
from dav_bench.files import read_json
from dav_bench.layers import BUDGETS, budget_layer
from dav_bench.tasks import DERIVED, ROLES, TaskSpec

if TYPE_CHECKING:
    from dav_bench.registry import Catalog
    from dav_bench.spec import RunSpec

SCALES = "scales.json"
"""Asset of a task: `{"of": text, "train": {"median":, "q90":}, "heldout": {...}}` of its real elements."""

REFERENCE = ("method", "metric", "value", "error", "evidence", "source", "differs")
"""Columns of the published numbers in results/reference/<task>/*.csv."""

COMPARED = ("task_version", "task_hash", "model", "sampler", "rewards", "eval", "heldout")
"""Fields of a run's specification that must agree before two rows stand in one table."""


@dataclass(frozen=True)
class Column:
    """One number of a board."""

    name: str
    """Name of the metric."""
    title: str
    """Heading."""
    role: str
    """quality, diversity, natural or cost."""
    better: str
    """up or down; empty where neither is."""
    unit: str = "set"
    """sample (one value per sample, reduced) or set."""
    reduce: str = "median"
    """median or mean, for unit sample."""
    summary: str = ""
    """What it is, for the notes under the table."""


@dataclass(frozen=True, order=True)
class Budget:
    """What training might spend; rows under different budgets stand in different tables."""

    rank: int
    """Place of the unit in `BUDGETS`."""
    train: float
    """The amount."""

    @classmethod
    def of(cls, budget: Mapping[str, Any]) -> Budget | None:
        """That of a run's specification; None without one."""
        train = budget.get("train")
        if not isinstance(train, int | float):
            return None
        return cls(BUDGETS.index(budget.get("unit", BUDGETS[0])), train)

    @property
    def unit(self) -> str:
        """cost, reward or seconds."""
        return BUDGETS[self.rank]

    @property
    def text(self) -> str:
        """As --budget takes it."""
        return f"{self.unit}={self.train}"

    def __str__(self) -> str:
        return f"{self.unit} {self.train:,}"


@dataclass(frozen=True)
class Terms:
    """Everything a board needs besides its rows; stored with published rows, so that they suffice."""

    task: str
    """Name of the task."""
    title: str = ""
    """Its title."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values of `COMPARED` that the rows of the main table have."""
    metrics: tuple[Column, ...] = ()
    """Metrics of the task in the order of the table, without those of `DERIVED`."""
    scales: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Reward role to `median` and `q90` of real elements; empty to take them from the row "real"."""
    scale_of: str = ""
    """Which real elements, for the notes."""
    reduce: str = "median"
    """How rewards are reduced over samples."""
    reference: tuple[Mapping[str, str], ...] = ()
    """Published numbers of others: method, metric, value, error, evidence, source, differs."""
    methods: tuple[Mapping[str, str], ...] = ()
    """Every method there was when the board was published: `method`, and `reason` why it cannot run on the task."""
    rank: Mapping[str, Any] = field(default_factory=dict)
    """`by`, `gates` and `reference` of the task's ranking; empty on boards that know no order but the reward's."""

    def to_json(self) -> str:
        """As text with sorted keys; without a ranking as it was before there were any."""
        return json.dumps({k: v for k, v in asdict(self).items() if k != "rank" or v}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Terms:
        """Inverse of `to_json`."""
        values = json.loads(text)
        values["metrics"] = tuple(Column(**c) for c in values["metrics"])
        for key in ("reference", "methods"):
            values[key] = tuple(values.get(key, ()))
        return cls(**values)


def terms_of(
    task: TaskSpec, catalog: Catalog, settings: Mapping[str, Any], results: Path | str | None = None
) -> Terms:
    """The terms of a task as its file states them.

    Args:
        task: The task.
        catalog: Where its metrics are registered.
        settings: Values of `COMPARED` in the main table, such as those of the task's default run.
        results: Folder with `reference/<task>/*.csv`; None shows no published numbers.
    """
    columns = tuple(
        Column(name, name, role, entry.better, entry.unit, entry.reduce, entry.summary)
        for role in ROLES
        for name in task.metrics.get(role, ())
        if name not in DERIVED
        for entry in (catalog.get("metrics", name),)
    )
    scales, of = _scales(task)
    published = read_reference(Path(results) / "reference" / task.name) if results else ()
    return Terms(
        task.name, task.title, dict(settings), columns, scales, of, reference=published, rank=dict(task.rank)
    )


def _scales(task: TaskSpec) -> tuple[dict[str, dict[str, float]], str]:
    path = task.folder / SCALES
    if not path.exists():
        return {}, ""
    held = read_json(path)
    try:
        roles = [str(role) for role in ("train", "heldout") if role in held]
        scales = {role: {k: float(held[role][k]) for k in ("median", "q90")} for role in roles}
    except (KeyError, TypeError, ValueError) as error:
        raise DavBenchError(f"{path} states no scale.", f"It lacks or misstates {error}.") from error
    return scales, str(held.get("of", "real elements"))


def read_reference(folder: Path) -> tuple[dict[str, str], ...]:
    """Published numbers from the csv files of a folder, file by file; none where there is no folder."""
    rows: list[dict[str, str]] = []
    for path in sorted(folder.glob("*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != REFERENCE:
                raise DavBenchError(
                    f"{path} has other columns than expected.", f"Expected {','.join(REFERENCE)}."
                )
            rows += [{key: (row[key] or "").strip() for key in REFERENCE} for row in reader]
    return tuple(rows)


# ------------------------------------------------------------------- what the defaults of a task are


def default_settings(task: TaskSpec, catalog: Catalog) -> dict[str, Any]:
    """Values of `COMPARED` of a run without any option: the terms of the main table."""
    method = task.baselines[-1] if task.baselines else "pretrained"
    (spec, *_) = _specs(task, catalog, methods=(method,))
    return compared(spec.to_dict())


def methods_of(task: TaskSpec, catalog: Catalog) -> tuple[dict[str, str], ...]:
    """Every registered method with the reason why it cannot run on a task, empty where it can."""
    from dav_bench.plan import fits

    return tuple({"method": e.name, "reason": fits(e, task, catalog)[0]} for e in catalog.all("methods"))


def compared(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a specification that must agree between comparable rows."""
    held = {key: spec.get(key) for key in COMPARED}
    held["eval"] = {k: v for k, v in (held["eval"] or {}).items() if k != "every"}  # how often it is watched
    if spec.get("prompts"):
        held["prompts"] = spec["prompts"]
    return held


def arguments(spec: RunSpec, task: TaskSpec, catalog: Catalog) -> tuple[str, ...]:
    """Options of `dav-bench run` that make a run, besides --task and --seeds: the shortest way over the presets.

    Empty when the task or the method has changed so much that no options lead there; its spec.toml still does.
    """
    choices: dict[str, Any] = {"seeds": (spec.seed,), "heldout": spec.heldout}
    if {"searcher", "trainer"} <= spec.params.keys():
        choices["pair"] = (spec.params["searcher"]["name"], spec.params["trainer"]["name"])
        given = ["--searcher", choices["pair"][0], "--trainer", choices["pair"][1]]
    else:
        choices["methods"] = (spec.method,)
        given = ["--method", spec.method]
    own = catalog.find("methods", spec.method)
    if spec.search and (own is None or spec.search["name"] != own.search):
        choices["search"] = spec.search["name"]
        given += ["--search", spec.search["name"]]
    train = spec.rewards["train"]["use"]
    if train != task.rewards["train"]["use"]:
        choices["reward"] = train
        given += ["--reward", train]
    if not spec.heldout and "heldout" in task.rewards:
        given.append("--no-heldout")
    if (budget := Budget.of(spec.budget)) and budget != Budget.of(task.budget):
        choices["layers"] = [budget_layer(budget.text)]
        given += ["--budget", budget.text]
    found = []
    for preset in (None, *task.presets):
        try:
            specs = _specs(task, catalog, preset=preset, **choices)
        except DavBenchError:
            continue
        changed = [_changes(spec, s) for s in specs if s.label == spec.label]
        named = ["--preset", preset] if preset else []
        found += [(*given, *named, *sets) for sets in changed if sets is not None]
    return min(found, key=len, default=())


def _specs(task: TaskSpec, catalog: Catalog, methods: Sequence[str] = (), **choices: Any) -> list[RunSpec]:
    """What a command plans, without a look at the disk."""
    from dav_bench.plan import Request, plan

    request = Request(methods, [task], baselines=False, **choices)
    return [run.spec for run in plan(request, catalog, Path("no-results"), fresh=True)]


def _changes(spec: RunSpec, default: RunSpec) -> tuple[str, ...] | None:
    """`--set` options that lead from one spec to the other; None where --set cannot."""
    ours, theirs = (_settable(s) for s in (spec, default))
    if spec.task_version != default.task_version or not ours.keys() <= theirs.keys() | _OPTIONAL:
        return None
    changed = (f"{k}={_text(v)}" for k, v in sorted(ours.items()) if theirs.get(k) != v)
    return tuple(word for change in changed for word in ("--set", change))


_OPTIONAL = {"budget.train"}


def _settable(spec: RunSpec) -> dict[str, Any]:
    held = spec.to_dict()
    pair = {"searcher", "trainer"} <= spec.params.keys()
    found = {} if pair else flat(held["params"], spec.method)
    if pair:
        for part in ("searcher", "trainer"):
            found |= flat(held["params"][part]["params"], part)
        found |= flat(held["params"].get("training", {}), "training")
    for section in ("model", "sampler", "eval", "budget", "prompts"):
        found |= flat(held.get(section, {}), section)
    for role, reward in held["rewards"].items():
        found |= flat({k: v for k, v in reward.items() if k not in ("sha256", "text")}, f"reward.{role}")
    return found | flat((spec.search or {}).get("params", {}), "search")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)
