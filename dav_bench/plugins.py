"""Plugins: found by entry point, loaded one by one, and kept from breaking each other."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from dav_bench import hookspecs
from dav_bench.errors import DavBenchError, ExitCode, near
from dav_bench.events import Event
from dav_bench.hookspecs import API_VERSION, GROUP
from dav_bench.registry import KINDS, Catalog, Registrar

BUILTIN = "dav-bench"
"""Origin of the components that come with the package."""

BLOCK = "DAV_BENCH_PLUGINS"
"""Environment variable: names of the plugins to load, comma-separated; empty loads none but the built-in;
names with a leading minus are left out."""

REQUIRE = "DAV_BENCH_REQUIRE_PLUGINS"
"""Environment variable: names of plugins, comma-separated, without which nothing runs."""

_HOOKS = {"RunStarted": "run_started", "RoundFinished": "round_finished"}
_HOOKS |= {"SamplesReady": "samples_ready", "RunFinished": "run_finished"}


@dataclass(frozen=True)
class Loaded:
    """A plugin that works."""

    name: str
    """Name of its entry point."""
    target: str
    """Module it loads."""
    dist: str = ""
    """Distribution and version."""
    seconds: float = 0.0
    """Time its import took."""
    hooks: tuple[str, ...] = ()
    """Hooks it implements."""


@dataclass(frozen=True)
class Broken:
    """A plugin that was left out, and why."""

    name: str
    """Name of its entry point."""
    target: str
    """Module it names."""
    reason: str
    """What is wrong, in one line."""
    dist: str = ""
    """Distribution and version."""
    where: str = ""
    """File and line of the failure, where there is one."""


@dataclass
class Plugins:
    """The plugin manager with what it loaded, what it left out, and the catalogue that results."""

    manager: pluggy.PluginManager
    catalog: Catalog = field(default_factory=Catalog)
    loaded: list[Loaded] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)
    complained: set[str] = field(default_factory=set)
    strict: bool = False

    def add(self, plugin: Any, name: str, target: str = "", dist: str = "", seconds: float = 0.0) -> None:
        """Register one plugin with its components: all of it, or none of it and a `Broken` record."""
        try:
            hooks = self._register(plugin, name)
        except (Exception, SystemExit) as err:
            if self.manager.get_plugin(name) is plugin:
                self.manager.unregister(name=name)
            self._break(name, target, err, dist)
            return
        self.loaded.append(Loaded(name, target, dist, seconds, tuple(hooks)))

    def _register(self, plugin: Any, name: str) -> list[str]:
        specs = [n for n in dir(hookspecs) if self.manager.parse_hookspec_opts(hookspecs, n)]
        marked = [n for n in dir(plugin) if self.manager.parse_hookimpl_opts(plugin, n) is not None]
        unknown = [f"unknown hook {n!r}{near(n, specs)}" for n in marked if n not in specs]
        if unknown:
            raise DavBenchError("; ".join(unknown), fix="see dav_bench/hookspecs.py for the hooks")
        if not marked:
            bare = [n for n in dir(plugin) if n in specs]
            hint = f"; {bare[0]!r} lacks @hookimpl" if bare else ""
            raise DavBenchError(f"it implements no hook{hint}")
        if self.manager.get_plugin(name) is not None:
            raise DavBenchError(f"another plugin is already called {name!r}")
        self.manager.register(plugin, name=name)
        self.manager.check_pending()
        registrars = [self._collect(plugin, name, kind) for kind in KINDS if f"register_{kind}" in marked]
        for registrar in registrars:
            for entry in registrar.entries:
                self.catalog.add(entry)
        return marked

    def _collect(self, plugin: Any, name: str, kind: str) -> Registrar:
        registrar = Registrar(kind, name, self.catalog)
        others = [p for p in self.manager.get_plugins() if p is not plugin]
        self.manager.subset_hook_caller(f"register_{kind}", others)(register=registrar)
        return registrar

    def load(self, point: EntryPoint, current: bool) -> None:
        """Load one entry point; another API version is reported without being imported."""
        dist = f"{point.dist.name} {point.dist.version}" if point.dist else ""
        if not current:
            reason = f"made for plugin API {point.group.rsplit('.', 1)[-1]}; this is v{API_VERSION}"
            self.broken.append(Broken(point.name, point.value, reason, dist))
            return
        start = time.perf_counter()
        try:
            plugin = point.load()
        except (Exception, SystemExit) as err:
            self._break(point.name, point.value, err, dist)
            return
        self.add(plugin, point.name, point.value, dist, time.perf_counter() - start)

    def _break(self, name: str, target: str, err: BaseException, dist: str) -> None:
        if self.strict:
            raise DavBenchError(
                f"plugin {name!r} is broken.", reason_of(err), "leave out --strict-plugins"
            ) from err
        self.broken.append(Broken(name, target, reason_of(err), dist, where_of(err)))

    def emit(self, event: Event, extra: Iterable[Any] = ()) -> None:
        """Call a life hook of every plugin and of `extra` objects (trackers of this run).

        An exception is reported once for each plugin and hook and never fails a run, unless plugins
        are strict.
        """
        hook = _HOOKS[type(event).__name__]
        names = {id(p): n for n, p in self.manager.list_name_plugin()}
        for plugin in [*self.manager.get_plugins(), *extra]:
            call = getattr(plugin, hook, None)
            if call is None or (
                id(plugin) in names and self.manager.parse_hookimpl_opts(plugin, hook) is None
            ):
                continue
            try:
                call(event)
            except Exception as err:
                if self.strict:
                    raise
                who = f"{names.get(id(plugin), type(plugin).__name__)}.{hook}"
                if who not in self.complained:
                    self.complained.add(who)
                    print(f"dav-bench: plugin {who} failed: {reason_of(err)}", file=sys.stderr)

    def commands(self, app: Any) -> None:
        """Let every plugin add its commands to `app`; one that raises is left out."""
        for loaded in list(self.loaded):
            if "register_commands" not in loaded.hooks:
                continue
            plugin = self.manager.get_plugin(loaded.name)
            others = [p for p in self.manager.get_plugins() if p is not plugin]
            try:
                self.manager.subset_hook_caller("register_commands", others)(app=app)
            except Exception as err:
                self._break(loaded.name, loaded.target, err, loaded.dist)

    def notice(self) -> str:
        """One line about plugins left out, or an empty string."""
        if not self.broken:
            return ""
        names = ", ".join(dict.fromkeys(b.name for b in self.broken))
        plural = "s" if len(self.broken) > 1 else ""
        return f"{len(self.broken)} broken plugin{plural} left out ({names}); see `dav-bench plugins list`"


def reason_of(err: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(err, DavBenchError):
        return " ".join(str(err).split())
    if isinstance(err, pluggy.PluginValidationError):
        return " ".join(str(err).split())
    return f"{type(err).__name__}: {' '.join(str(err).split())}".rstrip(": ")


def where_of(err: BaseException) -> str:
    """File and line of the innermost frame that raised, outside of import machinery."""
    frames = [f for f in traceback.extract_tb(err.__traceback__) if not f.filename.startswith("<frozen")]
    inner = [f for f in frames if f"{os.sep}importlib{os.sep}" not in f.filename and f.filename != __file__]
    return f"{inner[-1].filename}:{inner[-1].lineno}" if inner else ""


def _wanted(name: str) -> bool:
    chosen = os.environ.get(BLOCK)
    if chosen is None:
        return True
    names = [n.strip() for n in chosen.split(",") if n.strip()]
    keep = [n for n in names if not n.startswith("-")]
    if names and not keep:
        return f"-{name}" not in names
    return name in keep


def load_plugins(strict: bool = False) -> Plugins:
    """Load the built-in components and every installed plugin, each on its own."""
    from dav_bench.builtin import plugin as builtin

    manager = pluggy.PluginManager("dav_bench")
    manager.add_hookspecs(hookspecs)
    if os.environ.get("DAV_BENCH_TRACE_PLUGINS") == "1":
        manager.trace.root.setwriter(lambda text: print(text, end="", file=sys.stderr))
        manager.enable_tracing()
    plugins = Plugins(manager, strict=strict)
    plugins.add(builtin, BUILTIN, "dav_bench.builtin.plugin")
    if plugins.broken:  # a bug of this package, not of a plugin
        raise RuntimeError(f"built-in components: {plugins.broken[0].reason} ({plugins.broken[0].where})")
    everything = entry_points()
    for group in sorted(g for g in everything.groups if re.fullmatch(r"dav_bench\.v\d+", g)):
        for point in sorted(everything.select(group=group), key=lambda p: (p.name, p.value)):
            if _wanted(point.name):
                plugins.load(point, current=group == GROUP)
            else:
                plugins.blocked.append(point.name)
    return plugins


def demanded() -> list[str]:
    """Plugins that the environment demands and that do not work."""
    wanted = [n.strip() for n in os.environ.get(REQUIRE, "").split(",") if n.strip()]
    return [name for name in wanted if name not in {p.name for p in plugins().loaded}]


def require() -> None:
    """Raises DavBenchError where a demanded plugin does not work: runs without it would be other runs."""
    lacking = demanded()
    if lacking:
        whys = [f"{b.name}: {b.reason}" for b in plugins().broken if b.name in lacking]
        names = ", ".join(lacking)
        raise DavBenchError(f"{REQUIRE} demands {names}.", "\n".join(whys) or "It is not installed.",
                            "dav-bench plugins doctor", code=ExitCode.MISSING)  # fmt: skip


_current: Plugins | None = None
_strict = False


def plugins() -> Plugins:
    """The plugins of this process, loaded on first use."""
    global _current
    if _current is None:
        _current = load_plugins(_strict)
    return _current


def reset(strict: bool = False) -> None:
    """Forget the loaded plugins, so that the next use loads them anew."""
    global _current, _strict
    _current, _strict = None, strict


def catalog() -> Catalog:
    """Everything registered, by kind and name."""
    return plugins().catalog


def emit(event: Event, extra: Iterable[Any] = ()) -> None:
    """Tell plugins, and the trackers in `extra`, what happened."""
    plugins().emit(event, extra)
