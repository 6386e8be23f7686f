"""Settings: text into typed values, layers over layers, and the source of every value."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dav_bench.errors import near, problems

_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


@dataclass(frozen=True)
class Setting:
    """One field of a config class."""

    name: str
    type: Any
    default: Any
    doc: str = ""


def settings_of(cls: type) -> dict[str, Setting]:
    """Fields of a config dataclass by name, with types resolved."""
    if not is_dataclass(cls):
        raise TypeError(f"{cls!r} is no dataclass")
    hints = get_type_hints(cls)
    out = {}
    for f in fields(cls):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        out[f.name] = Setting(f.name, hints[f.name], None if default is MISSING else default)
    return out


def docs_of(cls: type) -> dict[str, str]:
    """The docstring written under each field, by field name, inherited fields included."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = getattr(tree.body[0], "body", [])
        for item, after in pairwise(body):
            named = isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if named and text and isinstance(after.value.value, str):
                docs[item.target.id] = " ".join(after.value.value.split())
    return docs


def type_name(kind: Any) -> str:
    """How a type reads in messages and tables: `int`, `'sum' | 'mean'`, `float | none`."""
    origin = get_origin(kind)
    if origin is Literal:
        return " | ".join(repr(a) for a in get_args(kind))
    if origin in (Union, UnionType):
        return " | ".join(type_name(a) for a in get_args(kind))
    if kind is NoneType:
        return "none"
    if origin is tuple:
        return "list of " + type_name(get_args(kind)[0])
    return getattr(kind, "__name__", str(kind))


def coerce(value: Any, kind: Any) -> Any:
    """Turn text or a TOML value into a field's type; ValueError says what was expected."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        for choice in args:
            if value == choice or (isinstance(value, str) and value == str(choice)):
                return choice
        raise ValueError(f"{value!r} is none of {type_name(kind)}{_hint(str(value), args)}")
    if origin in (Union, UnionType):
        return _coerce_union(value, kind, args)
    if origin is tuple or kind is tuple:
        items = [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            items = [items]
        return tuple(coerce(v, args[0]) for v in items) if args else tuple(items)
    if kind in (bool, int, float, str):
        return _coerce_scalar(value, kind)
    if is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return make(kind, value, kind.__name__)
        raise ValueError(f"expected a table of settings, got {value!r}")
    if kind is dict or origin in (dict, Mapping):
        if isinstance(value, Mapping):
            return dict(value)
        raise ValueError(f"expected a table, got {value!r}")
    return value


def _coerce_union(value: Any, kind: Any, args: tuple[Any, ...]) -> Any:
    empty = value is None or (isinstance(value, str) and value.lower() in ("none", "null"))
    if NoneType in args and empty:
        return None
    for arg in args:
        if arg is NoneType:
            continue
        try:
            return coerce(value, arg)
        except ValueError:
            continue
    raise ValueError(f"expected {type_name(kind)}, got {value!r}")


def _coerce_scalar(value: Any, kind: type) -> Any:
    fail = ValueError(f"expected {kind.__name__}, got {value!r}")
    if kind is str:
        if not isinstance(value, str):
            raise fail
        return value
    if kind is bool:
        text = str(value).lower()
        if text in _TRUE | _FALSE and not isinstance(value, float):
            return text in _TRUE
        raise fail
    if isinstance(value, bool):
        raise fail
    try:
        number = float(value) if isinstance(value, (int, float, str)) else None
    except ValueError:
        number = None
    if number is None or number != number:
        raise fail
    if kind is float:
        return number
    if isinstance(value, int):
        return value
    if abs(number) == float("inf") or number != int(number):
        raise fail
    digits = isinstance(value, str) and value.replace("_", "").lstrip("+-").isdigit()
    return int(value if digits else number)


def _hint(text: str, choices: Iterable[Any]) -> str:
    hint = near(text, [str(c) for c in choices])
    return hint if "did you mean" in hint else ""


def make(cls: type, values: Mapping[str, Any], owner: str = "") -> Any:
    """Build a config from plain values, reporting every unknown key and bad value together."""
    known, ready, errors = settings_of(cls), {}, []
    for key, value in values.items():
        if key not in known:
            errors.append(f"unknown key {key!r}{near(key, known)}")
            continue
        try:
            ready[key] = coerce(value, known[key].type)
        except ValueError as err:
            errors.append(f"{key}: {err}")
    if not errors:
        try:
            return cls(**ready)
        except (ValueError, TypeError) as err:
            errors.append(str(err))
    raise problems(f"the settings of {owner or cls.__name__} cannot be used.", errors)


@dataclass(frozen=True)
class Layer:
    """Settings from one source, by section: `{"dav": {"width": "8"}, "sampler": {...}}`."""

    source: str
    """Where they come from, as shown to the user: "task file", "--set", ..."""
    sections: Mapping[str, Mapping[str, Any]]
    """Values by section and key; text or TOML values."""
    strict: bool = False
    """Typed by the user for this command: a section that fits nothing is an error."""


@dataclass
class Resolved:
    """Values after all layers, with the source of each."""

    values: dict[str, Any] = field(default_factory=dict)
    """Typed values by field, in the order of the class."""
    sources: dict[str, str] = field(default_factory=dict)
    """Where each value comes from."""
    errors: list[str] = field(default_factory=list)
    """Everything wrong, for one report."""
    used: set[tuple[str, str, str]] = field(default_factory=set)
    """(source, section, key) of each setting that found its field, or whose error is reported here."""


def resolve(
    cls: type | None,
    layers: Sequence[Layer],
    sections: Sequence[str],
    domain: str | None = None,
    loose: Sequence[str] = (),
) -> Resolved:
    """Lay layers over the defaults of a config class; later layers win, and so does the later section.

    Args:
        cls: Frozen dataclass of the settings; None takes no setting.
        layers: From weakest to strongest.
        sections: Names whose settings apply, general to specific, such as ("method", "dav").
        domain: Selects the entry of `cls.COMPAT`: a layer that sets `compat` fills in that entry's
            fields at its own level, except those it sets itself.
        loose: Sections in which keys unknown to this class are left to others.
    """
    known = settings_of(cls) if cls is not None else {}
    out = Resolved({k: s.default for k, s in known.items()}, dict.fromkeys(known, "default"))
    for layer in layers:
        found: dict[str, Any] = {}
        for section in sections:
            for key, raw in layer.sections.get(section, {}).items():
                head = key.split(".")[0]
                if head not in known:
                    if section not in loose:
                        out.used.add((layer.source, section, key))
                        out.errors.append(f"{section}.{key} ({layer.source}): unknown key{near(key, known)}")
                    continue
                out.used.add((layer.source, section, key))
                try:
                    found[head] = _value(key, raw, known[head].type, found.get(head, out.values[head]))
                except ValueError as err:
                    out.errors.append(f"{section}.{key} ({layer.source}): {err}")
        if "compat" in found:
            _apply_compat(cls, found, domain, layer.source, known, out)
        for key, value in found.items():
            out.values[key], out.sources[key] = value, layer.source
    return out


def _value(key: str, raw: Any, kind: Any, current: Any) -> Any:
    """Coerce one setting; `a.b` changes field b of the nested config a."""
    head, _, rest = key.partition(".")
    if not rest:
        return coerce(raw, kind)
    if not is_dataclass(current):
        raise ValueError(f"{head} has no fields")
    inner = settings_of(type(current))
    name = rest.split(".")[0]
    if name not in inner:
        raise ValueError(f"unknown key{near(name, inner)}")
    value = _value(rest, raw, inner[name].type, getattr(current, name))
    return replace(current, **{name: value})  # type: ignore[type-var]


def _apply_compat(
    cls: Any, found: dict[str, Any], domain: str | None, source: str, known: dict[str, Setting], out: Resolved
) -> None:
    """Fill in the fields that a `compat` name selects, or undo an earlier selection."""
    name, table = found["compat"], getattr(cls, "COMPAT", {})
    plain = known["compat"].default
    if name != plain and name not in table:
        known_names = [plain, *table]
        out.errors.append(f"compat ({source}): unknown name {name!r}{near(str(name), map(str, known_names))}")
        return
    for key, old in out.sources.items():
        if " (compat=" in old and key not in found:
            out.values[key], out.sources[key] = known[key].default, "default"
    for key, value in table.get(name, {}).get(domain or "", {}).items():
        if key not in found:
            out.values[key] = coerce(value, known[key].type)
            out.sources[key] = f"{source} (compat={name})"
