"""Where settings come from: task file, preset, config file, environment and --set, as layers of one shape.

A layer maps a section to its settings. Sections are `method` (all methods of the command), a method's name,
`sampler`, `eval`, `budget`, `prompts`, `model`, `reward.train`, `reward.heldout`, `search`, `nes`, and `searcher`,
`trainer`, `training` for a pair made on the command line.
"""

from __future__ import annotations

import itertools
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dav_bench.config import Layer, coerce, settings_of
from dav_bench.errors import DavBenchError, near, problems
from dav_bench.registry import Catalog
from dav_bench.tasks import TaskSpec

ENV_PREFIX = "DAV_BENCH_SET_"
"""`DAV_BENCH_SET_DAV__WIDTH=8` is `--set dav.width=8`; a double underscore stands for the dot, a single one for
itself or a hyphen."""

FIXED = (
    "method",
    "sampler",
    "eval",
    "budget",
    "model",
    "reward",
    "search",
    "searcher",
    "trainer",
    "training",
    "nes",
    "prompts",
)


def from_table(source: str, table: Mapping[str, Any], strict: bool = False) -> Layer:
    """A layer from nested tables; `[method.dav]` and `[dav]` are the same section."""
    sections: dict[str, dict[str, Any]] = {}
    errors = []
    for section, values in table.items():
        if not isinstance(values, Mapping):
            errors.append(f"{section}: expected a table of settings, got {values!r}")
            continue
        for key, value in values.items():
            if section == "method" and isinstance(value, Mapping):
                sections.setdefault(key, {}).update(_flat(value))
            elif section == "reward":
                role = value if isinstance(value, Mapping) else {"use": value}
                sections.setdefault(f"reward.{key}", {}).update(_flat(role))
            else:
                sections.setdefault(section, {}).update(_flat({key: value}))
    if errors:
        raise problems(f"the settings of the {source} cannot be used.", errors)
    return Layer(source, sections, strict)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def task_layers(task: TaskSpec, preset: str | None) -> list[Layer]:
    """The task file and, where named, one of its presets."""
    own = {"method": task.methods, "sampler": task.sampler, "eval": task.eval, "budget": task.budget}
    own |= {"model": task.model, "reward": task.rewards, "search": task.search, "prompts": task.prompts}
    if task.target:  # exact samples are those of the task's own target
        own["method"] = {"exact": task.target, **task.methods}
    layers = [from_table("task file", own)]
    if preset is not None:
        if preset not in task.presets:
            hint = near(preset, task.presets) or "; it has none"
            raise DavBenchError(f"task {task.name!r} has no preset {preset!r}{hint}")
        layers.append(from_table(f"preset {preset}", task.presets[preset]))
    return layers


def config_layer(path: Path) -> Layer:
    """A TOML file given with --config."""
    try:
        return from_table(path.name, tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise DavBenchError(f"the config file {path} cannot be read.", str(err)) from err


BUDGETS = ("cost", "reward", "seconds")
"""Units of --budget."""


def budget_layer(text: str) -> Layer:
    """What --budget says: `cost=20000`, `reward=5000`, `seconds=60`, or a number, which is cost."""
    unit, _, amount = text.rpartition("=") if "=" in text else ("cost", "", text)
    unit, amount = unit.strip(), amount.strip()
    fix = "--budget cost=20000, reward=5000 or seconds=60"
    if unit not in BUDGETS:
        raise DavBenchError(f"--budget {text}: unknown unit {unit!r}{near(unit, BUDGETS)}", fix=fix)
    try:
        train = coerce(amount, float if unit == "seconds" else int)
    except ValueError:
        train = 0
    if not 0 < train < float("inf"):
        what = "seconds above 0" if unit == "seconds" else "a whole number of rows above 0"
        raise DavBenchError(f"--budget {text}: expected {what}, got {amount!r}.", fix=fix)
    return Layer("--budget", {"budget": {"unit": unit, "train": train}}, strict=True)


def env_layer(catalog: Catalog, environ: Mapping[str, str] | None = None) -> Layer:
    """Settings from variables that start with DAV_BENCH_SET_."""
    environ = os.environ if environ is None else environ
    names = {n.replace("-", "_"): n for n in [*FIXED, *catalog.names("methods")]}
    sections: dict[str, dict[str, Any]] = {}
    errors = []
    for variable, value in environ.items():
        if not variable.startswith(ENV_PREFIX):
            continue
        section, *keys = variable.removeprefix(ENV_PREFIX).lower().split("__")
        if section not in names or not keys:
            errors.append(f"{variable}: expected {ENV_PREFIX}SECTION__KEY{near(section, names)}")
            continue
        _put(sections, names[section], ".".join(keys), value)
    if errors:
        raise problems("the environment holds settings that cannot be used.", errors)
    return Layer("environment", sections)


def set_layers(items: Sequence[str], catalog: Catalog) -> list[Layer]:
    """One layer of --set for each point of the grid that comma-separated values span; one without any."""
    parsed = []
    errors = []
    for item in items:
        name, equals, value = item.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and section and key):
            errors.append(f"{item!r}: expected section.key=value, such as dav.width=8 or sampler.steps=32")
        parsed.append((section, key, value.strip()))
    if errors:
        raise problems("--set cannot be read.", errors)
    choices = [[(s, k, v) for v in _grid(s, k, value, catalog)] for s, k, value in parsed]
    layers = []
    for point in itertools.product(*choices):
        sections: dict[str, dict[str, Any]] = {}
        for section, key, value in point:
            _put(sections, section, key, value)
        layers.append(Layer("--set", sections, strict=True))
    return layers


def _put(sections: dict[str, dict[str, Any]], section: str, key: str, value: Any) -> None:
    if section == "reward":
        role, _, rest = key.partition(".")
        section, key = f"reward.{role}", rest or "use"
    sections.setdefault(section, {})[key] = value


def _grid(section: str, key: str, value: str, catalog: Catalog) -> list[str]:
    """The values of a grid, or the value itself where its field takes a list or text."""
    parts = [v.strip() for v in value.split(",") if v.strip()]
    if len(parts) < 2:
        return [value]
    kinds = list(_field_types(section, key, catalog))
    if not kinds or any(_fits(value, kind) for kind in kinds):
        return [value] if kinds or section != "sampler" else parts
    return parts


def _field_types(section: str, key: str, catalog: Catalog) -> Iterable[Any]:
    entries = catalog.all("methods") if section == "method" else []
    if (one := catalog.find("methods", section)) is not None:
        entries = [one]
    for entry in entries:
        fields = settings_of(entry.config) if entry.config else {}
        if key in fields:
            yield fields[key].type


def _fits(value: str, kind: Any) -> bool:
    try:
        coerce(value, kind)
    except DavBenchError:
        return False
    except ValueError:
        return False
    return True
