"""The catalogue: what exists under which name, known without importing any of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from dav_bench.errors import DavBenchError, ExitCode, near

KINDS = (
    "methods",
    "models",
    "rewards",
    "searchers",
    "trainers",
    "metrics",
    "tasks",
    "trackers",
    "launchers",
)


@dataclass(frozen=True)
class Entry:
    """One registered component."""

    kind: str
    """One of KINDS."""
    name: str
    """Unique within its kind; `namespace/name` where two plugins would collide."""
    target: str | Callable[..., Any] | Path
    """What builds it: a callable, or a "module:attr" string that stays unimported until used; a task's folder."""
    config: type | None = None
    """Frozen dataclass of its settings, importable without torch."""
    requires: tuple[str, ...] = ()
    """Capabilities it needs, each "name" or "name if field"."""
    provides: tuple[str, ...] = ()
    """Capabilities it gives, in the same form."""
    domain: str | None = None
    """sequence, image, vector, ...; None fits any."""
    summary: str = ""
    """One line for tables."""
    paper: str = ""
    """Where it was published."""
    origin: str = ""
    """The plugin that registered it."""
    tunes: bool = False
    """Methods: trains the model; its samples come from the trained model, not from a search."""
    seeded: bool = True
    """Methods: the result depends on the training seed, so that several seeds mean several runs."""
    search: str | None = None
    """Methods: the searcher that is its E-step, which test-time search uses."""
    role: str = "quality"
    """Metrics: quality, diversity or natural."""
    better: str = "up"
    """Metrics: up or down."""
    unit: str = "sample"
    """Metrics: one value per sample, or one for the set."""
    reduce: str = "median"
    """Metrics by sample: median or mean."""

    def load(self) -> Callable[..., Any]:
        """Import the target and return it."""
        if callable(self.target):
            return self.target
        module, _, attr = str(self.target).partition(":")
        try:
            value = import_module(module)
            for part in attr.split("."):
                value = getattr(value, part)
        except (ImportError, AttributeError) as err:
            raise DavBenchError(
                f"{self.kind[:-1]} {self.name!r} of {self.origin or 'an unknown plugin'} cannot be imported.",
                f"{self.target}: {type(err).__name__}: {err}",
                "install what the message names, or `dav-bench plugins list`",
                code=ExitCode.MISSING,
            ) from err
        return value  # type: ignore[return-value]

    def settings(self, params: Mapping[str, Any] | None = None) -> Any:
        """Build its config from plain values; None where it takes no config."""
        from dav_bench.config import make

        if self.config is None:
            if params:
                raise DavBenchError(
                    f"{self.kind[:-1]} {self.name!r} has no settings.", f"Given: {', '.join(params)}."
                )
            return None
        return make(self.config, params or {}, f"{self.kind[:-1]} {self.name!r}")

    def shared(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What a searcher takes over from a method's settings: the fields that both have.

        A value that the searcher's field could not have belongs to another setting of that name (`drakes.last` is a
        number of steps, `tree.last` a way to end).
        """
        from dav_bench.config import coerce, settings_of

        held = params["searcher"]["params"] if "searcher" in params else params
        fields = settings_of(self.config) if self.config else {}
        found = {}
        for key, value in held.items():
            if key in fields:
                with suppress(ValueError):
                    found[key] = coerce(value, fields[key].type)
        return found

    def build(self, params: Mapping[str, Any] | None = None, *args: Any) -> Any:
        """Build the component: `target(config, *args)`, or `target(*args)` where it takes no config."""
        config = self.settings(params)
        return self.load()(*args) if self.config is None else self.load()(config, *args)


class Catalog:
    """All registered components by kind and name."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}

    def add(self, entry: Entry) -> None:
        """Register one entry; a name already taken is an error."""
        taken = self._entries[entry.kind].get(entry.name)
        if taken is not None:
            raise DavBenchError(
                f"{entry.kind[:-1]} {entry.name!r} of {entry.origin!r} is already registered by {taken.origin!r}.",
                fix=f"register it under a namespace: '{entry.origin}/{entry.name}'",
            )
        self._entries[entry.kind][entry.name] = entry

    def all(self, kind: str) -> list[Entry]:
        """Entries of one kind, by name."""
        return [self._entries[kind][name] for name in sorted(self._entries[kind])]

    def names(self, kind: str) -> list[str]:
        """Names of one kind, sorted."""
        return sorted(self._entries[kind])

    def find(self, kind: str, name: str) -> Entry | None:
        """The entry of that name, or None; `plugin/name` also finds what `plugin` registered as `name`."""
        entry = self._entries[kind].get(name)
        if entry is None and "/" in name:
            origin, _, bare = name.partition("/")
            entry = self._entries[kind].get(bare)
            if entry is not None and entry.origin != origin:
                return None
        return entry

    def get(self, kind: str, name: str) -> Entry:
        """The entry of that name; an unknown name lists the near ones."""
        entry = self.find(kind, name)
        if entry is None:
            raise DavBenchError(
                f"unknown {kind[:-1]} {name!r}{near(name, self._entries[kind])}",
                fix=f"dav-bench list {kind}",
            )
        return entry

    def anywhere(self, name: str) -> list[Entry]:
        """Entries of that name in any kind."""
        return [e for kind in KINDS if (e := self.find(kind, name)) is not None]

    def __iter__(self) -> Iterator[Entry]:
        for kind in KINDS:
            yield from self.all(kind)


class Registrar:
    """The `register` callable handed to one plugin for one kind: checks at once, keeps the entries apart."""

    def __init__(self, kind: str, origin: str, catalog: Catalog):
        self.kind, self.origin, self.catalog = kind, origin, catalog
        self.entries: list[Entry] = []

    def __call__(self, name: str, target: Any = None, *, config: type | None = None, **options: Any) -> None:
        if self.kind == "tasks":
            name, target = self._task(name)
        self._check(name, target, config)
        known = set(Entry.__dataclass_fields__) - {"kind", "name", "target", "config", "origin"}
        for option in options:
            if option not in known:
                raise DavBenchError(
                    f"{self.kind[:-1]} {name!r} of {self.origin!r}: unknown option {option!r}{near(option, known)}"
                )
        for key in ("requires", "provides"):
            if key in options:
                options[key] = _names(options[key], key, name)
        entry = Entry(self.kind, name, target, config, origin=self.origin, **options)
        taken = {e.name: e for e in self.entries}.get(name) or self.catalog._entries[self.kind].get(name)
        if taken is not None:
            raise DavBenchError(
                f"{self.kind[:-1]} {name!r} of {self.origin!r} is already registered by {taken.origin!r}.",
                fix=f"register it under a namespace: '{self.origin}/{name}'",
            )
        self.entries.append(entry)

    def _check(self, name: str, target: Any, config: type | None) -> None:
        if not isinstance(name, str) or not name or set(name) & set(" .:+\\\t\n"):
            raise DavBenchError(f"{self.origin!r}: {name!r} is no usable name for one of the {self.kind}.")
        lazy = isinstance(target, str) and target.count(":") == 1 and not target.endswith(":")
        if not (lazy or callable(target) or self.kind == "tasks"):
            raise DavBenchError(
                f"{self.kind[:-1]} {name!r} of {self.origin!r}: the target must be a callable or 'module:attr'.",
                f"Got {target!r}.",
            )
        if config is not None and not (isinstance(config, type) and is_dataclass(config)):
            raise DavBenchError(
                f"{self.kind[:-1]} {name!r} of {self.origin!r}: config must be a frozen dataclass, got {config!r}."
            )

    def _task(self, path: Any) -> tuple[str, Path]:
        folder = Path(path)
        folder = folder.parent if folder.name == "task.toml" else folder
        if not (folder / "task.toml").is_file():
            raise DavBenchError(f"{self.origin!r} registers a task at {folder}, where there is no task.toml.")
        from dav_bench.tasks import read_task

        return read_task(folder, self.origin).name, folder


def _names(value: str | Iterable[str], key: str, name: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value)
    for n in names:
        if not isinstance(n, str) or (" " in n and " if " not in n):
            raise DavBenchError(f"{name!r}: {key} holds {n!r}; write 'capability' or 'capability if field'.")
    return tuple(sorted(names))


def active(conditions: Iterable[str], values: Mapping[str, Any]) -> set[str]:
    """Capabilities whose condition holds: "reward.grad if guide" counts when `values["guide"]` is truthy.

    "a if not b" negates; "a if field=value" and "a if field!=value" compare as text, or as numbers where both are;
    "a if b and c" needs both.
    """
    return {c.split(" if ")[0] for c in conditions if _holds(c, values)}


def _holds(condition: str, values: Mapping[str, Any]) -> bool:
    _, _, tests = condition.partition(" if ")
    return not tests or all(_passes(test, values) for test in tests.split(" and "))


def _passes(test: str, values: Mapping[str, Any]) -> bool:
    if "!=" in test:
        key, _, wanted = test.partition("!=")
        return not _same(values.get(key.strip()), wanted.strip())
    if "=" in test:
        key, _, wanted = test.partition("=")
        return _same(values.get(key.strip()), wanted.strip())
    if test.startswith("not "):
        return not values.get(test[4:].strip())
    return bool(values.get(test.strip()))


def _same(value: Any, text: str) -> bool:
    try:
        return float(value) == float(text)
    except (TypeError, ValueError):
        return str(value) == text
