"""Suites: named grids of runs, such as the one that makes every committed leaderboard."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dav_bench.errors import DavBenchError, near, problems
from dav_bench.tasks import shipped_tasks

SCHEMA = 1
FILE = "suites.toml"


@dataclass(frozen=True)
class Grid:
    """One command of a suite: the options of `dav-bench run` under their own names."""

    task: tuple[str, ...]
    """Tasks."""
    method: tuple[str, ...] = ()
    """Methods; empty with a pair."""
    seeds: str = "0"
    """Training seeds, such as 0-2."""
    set: tuple[str, ...] = ()
    """section.key=value; commas make a grid."""
    preset: str | None = None
    """Preset of the task file."""
    search: str = "auto"
    """Searcher applied to tuned models at test time, auto or none."""
    searcher: str | None = None
    """With trainer: a method made of these two."""
    trainer: str | None = None
    """With searcher: a method made of these two."""
    reward: str | None = None
    """Training reward instead of the task's."""
    reward_wrap: str | None = None
    """nes: estimate the gradient of a black-box training reward."""
    heldout: bool = True
    """Read the held-out reward."""
    baselines: bool = True
    """Add the task's baselines."""
    budget: str | None = None
    """What training may spend, such as cost=20000."""


@dataclass(frozen=True)
class Suite:
    """A named list of grids."""

    name: str
    """As --suite takes it."""
    title: str = ""
    """One line for tables."""
    threads: int | None = None
    """CPU threads of each run unless --threads says otherwise: bits depend on them."""
    grids: tuple[Grid, ...] = ()
    """In the order of execution."""
    origin: str = ""
    """Where it was found: ./tasks, $DAV_BENCH_TASKS or shipped."""
    tasks: tuple[str, ...] = field(init=False)
    """All its tasks."""

    def __post_init__(self) -> None:
        names = dict.fromkeys(name for grid in self.grids for name in grid.task)
        object.__setattr__(self, "tasks", tuple(names))


def read_suites(path: Path, origin: str = "") -> dict[str, Suite]:
    """Read a `suites.toml`; everything wrong with it is reported at once."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise DavBenchError(f"{path} cannot be read.", str(err)) from err
    found: list[str] = []
    if (schema := data.pop("schema", None)) != SCHEMA:
        found.append(f"schema must be {SCHEMA}, got {schema!r}")
    suites = {name: _suite(name, value, origin, found) for name, value in data.items()}
    if found:
        raise problems(f"{path} is not a valid file of suites.", found)
    return suites


def _suite(name: str, value: Any, origin: str, found: list[str]) -> Suite:
    if not isinstance(value, Mapping):
        found.append(f"{name}: expected a table with `title` and [[{name}.grid]], got {value!r}")
        return Suite(name)
    known = {"title": str, "threads": int, "grid": list}
    for key, held in value.items():
        if key not in known:
            found.append(f"{name}.{key}: unknown key{near(key, known)}")
        elif not isinstance(held, known[key]) or isinstance(held, bool):
            found.append(f"{name}.{key}: expected {known[key].__name__}, got {held!r}")
    grids = value.get("grid", [])
    if not isinstance(grids, list) or not grids:
        found.append(f"{name}: no [[{name}.grid]]")
        grids = []
    made = tuple(_grid(f"{name}.grid {i}", grid, found) for i, grid in enumerate(grids, 1))
    threads = value.get("threads")
    return Suite(name, str(value.get("title", "")), threads, made, origin)


def _grid(where: str, value: Any, found: list[str]) -> Grid:
    if not isinstance(value, Mapping):
        found.append(f"{where}: expected a table of options, got {value!r}")
        return Grid(())
    defaults = {f.name: f.default for f in fields(Grid)}
    ready: dict[str, Any] = {}
    for key, held in value.items():
        if key not in defaults:
            found.append(f"{where}: unknown option {key!r}{near(key, defaults)}")
        elif key in ("task", "method", "set"):
            ready[key] = tuple([held] if isinstance(held, str) else held)
        elif isinstance(held, bool) is isinstance(defaults[key], bool) and isinstance(held, str | bool):
            ready[key] = held
        else:
            found.append(f"{where}.{key}: cannot be {held!r}")
    if not ready.get("task"):
        found.append(f"{where}: no task")
    if not (ready.get("method") or {"searcher", "trainer"} <= ready.keys()):
        found.append(f"{where}: no method, nor searcher and trainer")
    return Grid(**{"task": (), **ready})


def all_suites() -> dict[str, Suite]:
    """Suites of ./tasks, $DAV_BENCH_TASKS and the package; the first of a name wins."""
    places = [("./tasks", Path.cwd() / "tasks")]
    extra = os.environ.get("DAV_BENCH_TASKS", "")
    places += [("$DAV_BENCH_TASKS", Path(root)) for root in filter(None, extra.split(os.pathsep))]
    places.append(("shipped", shipped_tasks()))
    found: dict[str, Suite] = {}
    for origin, root in places:
        if (root / FILE).is_file():
            for name, suite in read_suites(root / FILE, origin).items():
                found.setdefault(name, suite)
    return found


def find_suite(name: str) -> Suite:
    """The suite of that name; an unknown one lists the near ones."""
    suites = all_suites()
    if name not in suites:
        raise DavBenchError(f"unknown suite {name!r}{near(name, suites)}", fix="dav-bench list suites")
    return suites[name]
