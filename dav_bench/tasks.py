"""Task files: what is optimised, how it is measured, and with which settings."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dav_bench.errors import DavBenchError, ExitCode, near, problems

if TYPE_CHECKING:
    from dav_bench.registry import Catalog

SCHEMA = 1
ROLES = ("quality", "diversity", "natural")
DERIVED = ("reward", "reward-heldout", "gap")
"""Metrics that every task has without registering them."""

_KEYS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "name": str,
    "version": int,
    "title": str,
    "summary": str,
    "paper": str,
    "model": dict,
    "reward": dict,
    "metrics": dict,
    "target": dict,
    "prompts": dict,
    "features": dict,
    "sampler": dict,
    "eval": dict,
    "budget": dict,
    "rank": dict,
    "expect": dict,
    "method": dict,
    "search": dict,
    "preset": dict,
    "assets": list,
    "baselines": list,
}
_LAYERED = ("method", "sampler", "eval", "budget", "model", "reward", "search", "prompts")


@dataclass(frozen=True)
class TaskSpec:
    """One task as its file states it."""

    name: str
    """Name on the command line."""
    version: int
    """Bumped when what is measured changes."""
    folder: Path
    """Where task.toml and its assets lie."""
    title: str = ""
    """One line for tables."""
    summary: str = ""
    """A sentence or two."""
    paper: str = ""
    """Where the task comes from."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """`use` and settings of the generator."""
    rewards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Role (train, heldout) to `use` and settings."""
    exact: bool = False
    """The training reward is the truth (`reward.exact`): nothing is held out and there is no gap."""
    target: Mapping[str, Any] = field(default_factory=dict)
    """`alpha`: temperature of the exact target p(x) exp(r(x) / alpha) / Z of the metrics, the same for all methods."""
    prompts: Mapping[str, Any] = field(default_factory=dict)
    """`train` and `eval` (lists, or files in the folder) and `repeat`, for models that read text."""
    features: Mapping[str, str] = field(default_factory=dict)
    """What metrics of pictures look through: `clip`, and `reference`, `imagereward` where the task has them."""
    metrics: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Role (quality, diversity, natural) to metric names, in the order of the table."""
    sampler: Mapping[str, Any] = field(default_factory=dict)
    """`steps` and whatever else the process takes."""
    eval: Mapping[str, Any] = field(default_factory=dict)
    """`samples`, `seed` and `every`."""
    budget: Mapping[str, Any] = field(default_factory=dict)
    """`unit` and `train`."""
    rank: Mapping[str, Any] = field(default_factory=dict)
    """`by`: metrics of the ranking; `gates`: conditions by metric."""
    expect: Mapping[str, Any] = field(default_factory=dict)
    """`device`, `hours`, `memory_gb` of the default run."""
    methods: Mapping[str, Any] = field(default_factory=dict)
    """Settings for all methods (scalars) and for one (tables)."""
    search: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of searchers at test time, by name: the same search for every tuned model."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Named sets of overrides, such as `paper`."""
    assets: tuple[str, ...] = ()
    """Files the task measures with, relative to its folder; their content is part of the identity."""
    baselines: tuple[str, ...] = ("pretrained",)
    """Methods that a plain `run --method x` shows beside x."""
    origin: str = ""
    """Where it was found: ./tasks, $DAV_BENCH_TASKS, a plugin's name, or shipped."""

    def asset(self, path: str) -> Path:
        """A file of the task; a missing one is named with where it should be."""
        found = self.folder / path
        if not found.exists():
            raise DavBenchError(
                f"task {self.name!r} lacks {path}.",
                f"Looked in {self.folder}.",
                f"see {self.folder / 'README.md'} for how it is made",
                code=ExitCode.MISSING,
            )
        return found

    @cached_property
    def hash(self) -> str:
        """Hash of what is measured: name, version, model, rewards, metrics and the assets' content.

        Settings of methods, prompts, sampler, evaluation and budget are left out: their resolved values are
        part of each run's identity.
        """
        measured = {
            "name": self.name,
            "version": self.version,
            "model": self.model,
            "reward": self.rewards,
            "metrics": self.metrics,
            "assets": self.asset_hashes,
        }
        measured |= {"exact": True} if self.exact else {}
        measured |= {"target": self.target} if self.target else {}
        measured |= {"features": self.features} if self.features else {}
        return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def digest(self) -> str:
        """Hash of the file and the assets: equal copies of a task are one task."""
        return hashlib.sha256((self.folder / "task.toml").read_bytes() + self.hash.encode()).hexdigest()

    @cached_property
    def asset_hashes(self) -> dict[str, str]:
        """sha256 of each file the task measures with, by its path from the folder."""
        return {Path(os.path.relpath(p, self.folder)).as_posix(): _sha256(p) for p in self._asset_files()}

    def _asset_files(self) -> list[Path]:
        found: set[Path] = set()
        for pattern in self.assets:
            hits = [p for p in self.folder.glob(pattern) if p.is_file()]
            if not hits:
                self.asset(pattern)
            found.update(hits)
        return sorted(found)


def read_task(folder: Path, origin: str = "") -> TaskSpec:
    """Read `folder/task.toml`; everything wrong with it is reported at once."""
    path = folder / "task.toml"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise DavBenchError(f"{path} cannot be read.", str(err)) from err
    found = _shape_errors(data)
    if found:
        raise problems(f"{path} is not a valid task file.", found)
    rewards = {role: _use(value) for role, value in data["reward"].items() if role != "exact"}
    return TaskSpec(
        name=data["name"],
        version=data["version"],
        folder=folder.resolve(),
        title=data.get("title", ""),
        summary=data.get("summary", ""),
        paper=data.get("paper", ""),
        model=_use(data["model"]),
        rewards=rewards,
        exact=data["reward"].get("exact", False),
        target=data.get("target", {}),
        prompts=data.get("prompts", {}),
        features=data.get("features", {}),
        metrics={role: tuple(data.get("metrics", {}).get(role, ())) for role in ROLES},
        sampler=data.get("sampler", {}),
        eval=data.get("eval", {}),
        budget=data.get("budget", {}),
        rank=data.get("rank", {}),
        expect=data.get("expect", {}),
        methods=data.get("method", {}),
        search=data.get("search", {}),
        presets=data.get("preset", {}),
        assets=tuple(data.get("assets", ())),
        baselines=tuple(data.get("baselines", ("pretrained",))),
        origin=origin,
    )


def _use(value: Any) -> dict[str, Any]:
    return {"use": value} if isinstance(value, str) else dict(value)


def _shape_errors(data: Mapping[str, Any]) -> list[str]:
    found = []
    if data.get("schema") != SCHEMA:
        found.append(f"schema must be {SCHEMA}, got {data.get('schema')!r}")
    for key, value in data.items():
        if key not in _KEYS:
            found.append(f"unknown key {key!r}{near(key, _KEYS)}")
        elif not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            found.append(f"{key}: expected {_KEYS[key].__name__}, got {value!r}")  # type: ignore[union-attr]
    found += [f"missing key {key!r}" for key in ("name", "version", "model", "reward") if key not in data]
    if isinstance(data.get("name"), str) and not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", data["name"]):
        found.append(f"name {data['name']!r}: use small letters, digits, dot, dash and underscore")
    if isinstance(data.get("model"), dict) and not isinstance(data["model"].get("use"), str):
        found.append("model.use must name a model")
    found += _reward_errors(data.get("reward"))
    found += _target_errors(data.get("target", {}))
    found += _feature_errors(data.get("features", {}))
    metrics = data.get("metrics", {})
    for role in metrics if isinstance(metrics, dict) else ():
        if role not in ROLES:
            found.append(f"metrics.{role}: unknown role{near(role, ROLES)}")
        elif not _texts(metrics[role]):
            found.append(f"metrics.{role}: expected a list of names")
        elif _exact(data.get("reward")):
            found += [
                f"metrics.{role}: {m!r} needs a held-out reward, and reward.exact says that there is none to need"
                for m in metrics[role]
                if m in ("reward-heldout", "gap")
            ]
    found += [
        f"{k}: expected a list of names" for k in ("assets", "baselines") if not _texts(data.get(k, []))
    ]
    search = data.get("search", {})
    for name, settings in search.items() if isinstance(search, dict) else ():
        if not isinstance(settings, dict):
            found.append(f"search.{name}: expected a table of settings of that searcher, got {settings!r}")
    presets = data.get("preset", {})
    for name, preset in presets.items() if isinstance(presets, dict) else ():
        if not isinstance(preset, dict):
            found.append(f"preset.{name}: expected tables such as [preset.{name}.sampler]")
            continue
        found += [
            f"preset.{name}.{k}: unknown section{near(k, _LAYERED)}" for k in preset if k not in _LAYERED
        ]
    return found


def _reward_errors(reward: Any) -> list[str]:
    if not isinstance(reward, dict):
        return []
    found = [
        f"reward.{r}: unknown role{near(r, ('train', 'heldout'))}"
        for r in reward
        if r not in ("train", "heldout", "exact")
    ]
    if not isinstance(reward.get("exact", False), bool):
        found.append(f"reward.exact: expected true or false, got {reward['exact']!r}")
    if _exact(reward) and "heldout" in reward:
        found.append("reward.heldout: nothing can be held out of a reward that is the truth (reward.exact)")
    for role, value in reward.items():
        named = isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("use"), str))
        if role != "exact" and not named:
            found.append(f"reward.{role} must name a reward")
    return found if "train" in reward else [*found, "reward.train must name a reward"]


def _exact(reward: Any) -> bool:
    return isinstance(reward, dict) and reward.get("exact") is True


def _target_errors(target: Any) -> list[str]:
    if not isinstance(target, dict) or not target:
        return []
    found = [f"target.{k}: unknown key{near(k, ('alpha',))}" for k in target if k != "alpha"]
    alpha = target.get("alpha")
    number = alpha if isinstance(alpha, int | float) and not isinstance(alpha, bool) else 0
    if not 0 < number < float("inf"):
        found.append(f"target.alpha: expected a temperature above 0, got {alpha!r}")
    return found


def _feature_errors(features: Any) -> list[str]:
    known = ("clip", "imagereward", "reference")
    held = features if isinstance(features, dict) else {}
    found = [f"features.{k}: unknown key{near(k, known)}" for k in held if k not in known]
    return found + [f"features.{k}: expected a name, got {v!r}" for k, v in held.items() if not isinstance(v, str)]


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_task(task: TaskSpec, catalog: Catalog) -> None:
    """Check the names a task uses against what is registered; all errors at once."""
    from dav_bench.report.gates import Gate

    found = []
    names = [("models", "model.use", task.model["use"])]
    names += [("rewards", f"reward.{role}", reward["use"]) for role, reward in task.rewards.items()]
    names += [
        ("metrics", f"metrics.{role}", m) for role in ROLES for m in task.metrics[role] if m not in DERIVED
    ]
    names += [("methods", "baselines", b) for b in task.baselines]
    names += [("searchers", "search", s) for s in task.search]
    for kind, where, name in names:
        if catalog.find(kind, name) is None:
            known = [*catalog.names(kind), *(DERIVED if kind == "metrics" else ())]
            found.append(f"{where}: unknown {kind[:-1]} {name!r}{near(name, known)}")
    for role in ROLES if not task.target else ():
        for m in task.metrics[role]:
            metric = catalog.find("metrics", m)
            if metric and "target" in metric.requires:
                found.append(f"metrics.{role}: {m!r} needs target.alpha, the temperature of the exact target")
    keys = ("by", "gates", "reference")
    found += [f"rank.{key}: unknown key{near(key, keys)}" for key in task.rank if key not in keys]
    for m, text in task.rank.get("gates", {}).items():
        try:
            Gate.of(m, text)
        except DavBenchError as error:
            found.append(f"rank.gates: {error.what}")
    ranked = [name for key in keys for name in task.rank.get(key, ())]
    listed = [*DERIVED, *(m for role in ROLES for m in task.metrics[role])]
    found += [f"rank: {m!r} is no metric of this task{near(m, listed)}" for m in ranked if m not in listed]
    if found:
        raise problems(
            f"{task.folder / 'task.toml'} names what does not exist.", found, "dav-bench plugins list"
        )


def shipped_tasks() -> Path:
    """Folder of the tasks that come with the package, installed or in a checkout."""
    inside = Path(__file__).parent / "_tasks"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "tasks"


def _folders(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from sorted(p.parent for p in root.glob("*/task.toml"))


@dataclass(frozen=True)
class Tasks:
    """All tasks in sight, with what was wrong on the way."""

    found: Mapping[str, TaskSpec]
    """Task by name."""
    broken: Mapping[Path, str]
    """Folders whose file is not valid, with the reason."""
    notices: tuple[str, ...]
    """One line for each copy in ./tasks that differs from the task it shadows."""


@cache
def _scan(cwd: Path, extra: str, plugins: tuple[tuple[str, Path], ...]) -> Tasks:
    places = [("./tasks", p) for p in _folders(cwd / "tasks")]
    for root in filter(None, extra.split(os.pathsep)):
        places += [("$DAV_BENCH_TASKS", p) for p in _folders(Path(root))]
    places += plugins
    places += [("shipped", p) for p in _folders(shipped_tasks())]
    found: dict[str, TaskSpec] = {}
    broken, notices, seen = {}, [], set()
    for origin, folder in places:
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        try:
            task = read_task(folder, origin)
        except DavBenchError as err:
            broken[folder] = str(err)
            continue
        first = found.setdefault(task.name, task)
        if first is not task and not _same(first, task):
            notices.append(f"task {task.name!r} of {first.origin} shadows a different one of {task.origin}")
    return Tasks(found, broken, tuple(notices))


def _same(a: TaskSpec, b: TaskSpec) -> bool:
    try:
        return a.digest == b.digest
    except DavBenchError:
        return False


def all_tasks() -> Tasks:
    """Tasks in ./tasks, $DAV_BENCH_TASKS, plugins and the package; the first of a name wins."""
    from dav_bench.plugins import catalog

    plugins = tuple((e.origin, Path(str(e.target))) for e in catalog().all("tasks"))
    return _scan(Path.cwd(), os.environ.get("DAV_BENCH_TASKS", ""), plugins)


def find_task(name: str) -> TaskSpec:
    """The task of that name; an unknown or broken one is explained."""
    tasks = all_tasks()
    if name in tasks.found:
        return tasks.found[name]
    for folder, reason in tasks.broken.items():
        if folder.name == name:
            raise DavBenchError(f"task {name!r} cannot be used.", reason)
    raise DavBenchError(f"unknown task {name!r}{near(name, tasks.found)}", fix="dav-bench list tasks")


def asset(task: str, path: str) -> Path:
    """A file in a task's folder, for builders: `asset("dna", "weights/generator.safetensors")`."""
    return find_task(task).asset(path)
