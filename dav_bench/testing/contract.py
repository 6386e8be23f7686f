"""What every plugin promises, and the functions by which its author checks that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dav_bench.config import docs_of, settings_of
from dav_bench.errors import DavBenchError, near
from dav_bench.plugins import BUILTIN, catalog, plugins
from dav_bench.registry import KINDS, Entry

from . import imports, parts
from .checklist import Check, Checklist, Fail, label_of
from .runs import run

if TYPE_CHECKING:
    from torch import Tensor


def check_plugin(name: str, timed: bool = True) -> list[Check]:
    """Everything that the plugin of this name registers.

    Args:
        name: Of its entry point.
        timed: Measure its import too, in fresh interpreters.

    Raises:
        ContractBroken: naming what failed.
    """
    return examine(name, timed=timed).raise_failures()


def check_method(name: str) -> list[Check]:
    """A method: two rounds on each toy it fits, counted, guarded, repeated, interrupted and resumed."""
    return _one("methods", name)


def check_searcher(name: str) -> list[Check]:
    """A searcher: as the E-step of maximum likelihood, and at test time."""
    return _one("searchers", name)


def check_trainer(name: str) -> list[Check]:
    """A trainer: as the M-step of plain sampling."""
    return _one("trainers", name)


def check_model(name: str, **settings: Any) -> list[Check]:
    """A model: its samples, their independence of neighbours, and what it says it gives."""
    return _one("models", name, settings=settings)


def check_reward(name: str, samples: Tensor | None = None, **settings: Any) -> list[Check]:
    """A reward, on `samples` as the model decodes them; by default on some of the usual shapes of its domain."""
    return _one("rewards", name, samples=samples, settings=settings)


def check_metric(name: str) -> list[Check]:
    """A metric, on samples of a task that uses it or else of the toys."""
    return _one("metrics", name)


def check_task(name: str, run: bool = True) -> list[Check]:
    """A task: everything it names exists, and samples of its pretrained model can be measured."""
    return _one("tasks", name, run=run)


def check_tracker(name: str) -> list[Check]:
    """A tracker: told of a run on a toy, without an error and without files outside the run's directory."""
    return _one("trackers", name)


def examine(name: str, timed: bool = True, say: Callable[[Check], None] = lambda check: None) -> Checklist:
    """The whole contract of one plugin; failures are in the list and nothing is raised for them."""
    checklist = Checklist(say)
    here = plugins()
    broken = [b for b in here.broken if b.name == name]
    loaded = [p for p in here.loaded if p.name == name]
    if not broken and not loaded:
        known = [*(p.name for p in here.loaded), *(b.name for b in here.broken), *here.blocked]
        raise DavBenchError(f"no plugin is called {name!r}{near(name, known)}", fix="dav-bench plugins list")
    for bad in broken:
        with checklist.item("it loads"):
            raise Fail(f"{bad.reason} ({bad.where})" if bad.where else bad.reason, _advice(bad.reason))
    for good in loaded:
        _loaded(checklist, good.name, good.target, good.hooks, timed)
    entries = [e for kind in KINDS for e in catalog().all(kind) if e.origin == name]
    for entry in entries:
        described(checklist, entry)
        _CONTRACTS.get(entry.kind, lambda *_: None)(checklist, entry)
    if loaded and not entries and not set(loaded[0].hooks) & {*parts.LIFE, "register_commands"}:
        with checklist.item("it adds something"):
            raise Fail("it registers no component and hears no event", "call `register` in its hooks")
    return checklist


def _one(kind: str, name: str, **options: Any) -> list[Check]:
    checklist = Checklist()
    entry = catalog().get(kind, name)
    described(checklist, entry)
    _CONTRACTS[kind](checklist, entry, **options)
    return checklist.raise_failures()


def _advice(reason: str) -> str:
    if "already registered" in reason:
        return "choose another name, or register it under a namespace: 'plugin/name'"
    if "unknown hook" in reason or "lacks @hookimpl" in reason or "implements no hook" in reason:
        return "name the hook as in docs/plugins.md and put @hookimpl above it"
    if "made for plugin API" in reason:
        return "install a version of the plugin for this API, or rename its entry-point group"
    if "No module named" in reason:
        return "install what the message names, and add it to the plugin's dependencies"
    return "mend what the message names; DAV_BENCH_TRACEBACK=1 shows more"


# ---- the plugin as such


def _loaded(checklist: Checklist, name: str, target: str, hooks: Sequence[str], timed: bool) -> None:
    with checklist.item("it loads; hooks are known, names are free") as item:
        item.note = ", ".join(hooks)
    module = target.partition(":")[0]
    if timed:
        fix = "name components as 'module:attr' strings; import heavy libraries where they are used"
        with checklist.item(f"import takes less than {imports.LIMIT} s", fix) as item:
            seconds, limit, heavy = imports.measure(module)
            stretched = f", limit {limit:.2f} s on this busy machine" if limit > imports.LIMIT else ""
            item.note = f"{seconds:.3f} s, the least of some fresh interpreters{stretched}"
            if seconds > limit:
                raise Fail(item.note)
        with checklist.item("import brings no heavy library", fix):
            if heavy:
                raise Fail(f"importing {module} imports {', '.join(heavy)}")
    if "register_commands" in hooks and name != BUILTIN:
        _commands(checklist, name)


def _commands(checklist: Checklist, name: str) -> None:
    import typer
    from typer.main import get_command

    from dav_bench.cli import COMMANDS

    with checklist.item("its commands have names of their own") as item:
        app = typer.Typer(add_completion=False)
        app.callback()(lambda: None)
        plugin = plugins().manager.get_plugin(name)
        plugin.register_commands(app)  # type: ignore[union-attr]
        group: Any = get_command(app)
        item.note = ", ".join(sorted(group.commands))
        taken = sorted(set(group.commands) & set(COMMANDS))
        if taken:
            raise Fail(f"{', '.join(taken)}: a command of dav-bench", "choose another name")


def described(checklist: Checklist, entry: Entry) -> None:
    if entry.kind == "tasks":
        return
    with checklist.item(label_of(entry, "it has a summary"), "pass summary='one line' to register"):
        if not entry.summary.strip():
            raise Fail("there is none, so `dav-bench list` has nothing to say of it")
    if entry.config is not None:
        config = entry.config
        with checklist.item(
            label_of(entry, "every setting is documented"), "write one line in quotes below each field"
        ) as item:
            names, docs = list(settings_of(config)), docs_of(config)
            lacking = [name for name in names if not docs.get(name)]
            item.note = f"{len(names)} settings"
            if lacking:
                raise Fail(f"{config.__name__} says nothing of {', '.join(lacking)}")
        with checklist.item(
            label_of(entry, "its settings are a frozen dataclass with defaults"), "@dataclass(frozen=True)"
        ):
            if not config.__dataclass_params__.frozen:  # type: ignore[attr-defined]
                raise Fail(f"{config.__name__} can be changed, and a run's identity would not notice")
            config()
    with checklist.item(label_of(entry, "what it names can be imported"), "'module:attr' must exist"):
        entry.load()


_CONTRACTS: dict[str, Callable[..., None]] = {
    "methods": run,
    "searchers": run,
    "trainers": run,
    "models": parts.model,
    "rewards": parts.reward,
    "metrics": parts.metric,
    "tasks": parts.task,
    "trackers": parts.tracker,
}
