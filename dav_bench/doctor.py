"""What is wrong with this installation, where, and what to type: plugins, requirements, tasks, torch and runs."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, Literal

from dav_bench.errors import DavBenchError, ExitCode
from dav_bench.plugins import BLOCK, BUILTIN, REQUIRE, Broken, catalog, demanded, plugins, reason_of, where_of


@dataclass(frozen=True)
class Finding:
    """One thing found."""

    area: str
    """plugins | requirements | tasks | torch | runs."""
    status: Literal["problem", "note", "ok"]
    """A problem should be mended; a note need not."""
    what: str
    """What was found, with its place."""
    fix: str = ""
    """What to type or change."""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def diagnose(out: Path = Path("results"), build: bool = False) -> list[Finding]:
    """Everything found, area by area.

    Args:
        out: Results folder whose runs are looked at.
        build: Build the model and the rewards of every task, too, which names the weights that lack.
    """
    areas: Mapping[str, Iterator[Finding]] = {
        "plugins": _plugins(),
        "requirements": _requirements(),
        "tasks": _tasks(build),
        "torch": _torch(),
        "runs": _runs(out),
    }
    found = []
    for area, findings in areas.items():
        mine = list(findings)
        found += mine
        if not any(f.status == "problem" for f in mine):
            found.append(Finding(area, "ok", _fine(area, out)))
    return found


def _fine(area: str, out: Path) -> str:
    if area == "plugins":
        return f"{len(plugins().loaded) - 1} installed plugins work"
    if area == "runs":
        from dav_bench.scan import scan

        return f"{len(scan(out))} runs in {out} are readable, none is dead"
    return {
        "requirements": "all are installed",
        "tasks": "all can be read",
        "torch": "it matches this machine",
    }[area]


# ---- plugins


def _plugins() -> Iterator[Finding]:
    here = plugins()
    for bad in here.broken:
        place = f" ({bad.where})" if bad.where else ""
        dist = f" of {bad.dist}" if bad.dist else ""
        yield Finding("plugins", "problem", f"{bad.name}{dist}: {bad.reason}{place}", advice(bad))
    for name in here.blocked:
        yield Finding("plugins", "note", f"{name} is left out by {BLOCK}", f"unset {BLOCK}")
    for name in demanded():
        why = f"{name} is demanded by {REQUIRE} and does not work here"
        yield Finding("plugins", "problem", why, "install it, or `dav-bench plugins list`")


def advice(bad: Broken) -> str:
    """What mends a broken plugin."""
    lacking = re.search(r"No module named '([\w.]+)'", bad.reason)
    name = bad.dist.rpartition(" ")[0]
    if lacking:
        module = lacking[1].split(".")[0]
        if module == bad.target.partition(":")[0].split(".")[0]:
            return f"pip install --force-reinstall {name or bad.name}: its entry point names a module that is not there"
        return f"pip install {_package(module, name)}"
    if "made for plugin API" in bad.reason:
        return f"pip install --upgrade {name or bad.name}, or a dav-bench for that API"
    if "already registered" in bad.reason or "already called" in bad.reason:
        return f"uninstall one of the two, or {BLOCK}=-{bad.name}"
    if "hook" in bad.reason:
        return "the hooks are in docs/plugins.md; `dav-bench plugins check` tells the author more"
    return f"report it to its author, or leave it out: {BLOCK}=-{bad.name}"


def _package(module: str, dist: str) -> str:
    """The package that gives a module: one that the plugin says it needs, or else of the module's name."""
    with suppress(PackageNotFoundError):
        for line in distribution(dist).requires or [] if dist else []:
            found = re.match(r"[\w.-]+", line)
            if found and found[0].lower().replace("-", "_") == module.lower():
                extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", line)
                return f"'{dist}[{extra[1]}]'" if extra else found[0]
    return module


# ---- requirements


def _requirements() -> Iterator[Finding]:
    names = dict.fromkeys([BUILTIN, *(p.dist.rpartition(" ")[0] for p in plugins().loaded if p.dist)])
    for name in names:
        try:
            dist = distribution(name)
        except PackageNotFoundError:
            continue
        yield from _lacking(dist)


def _lacking(dist: Distribution) -> Iterator[Finding]:
    """Requirements of one distribution that are not met, and extras that are not installed."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        return
    extras: dict[str, list[str]] = {}
    for line in dist.requires or []:
        try:
            need = Requirement(line)
        except InvalidRequirement:
            yield Finding("requirements", "note", f"{dist.name} requires {line!r}, which cannot be read")
            continue
        extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", line)
        wanted = need.marker is None or need.marker.evaluate({"extra": extra[1] if extra else ""})
        if not wanted:
            continue
        held = _version(need.name)
        met = held is not None and need.specifier.contains(held, prereleases=True)
        if met or (extra and extra[1] in ("dev", "test", "tests", "docs")):
            continue
        state = (
            f"{need.name} is not installed"
            if held is None
            else f"{need.name} is {held}, not {need.specifier}"
        )
        if extra:
            extras.setdefault(extra[1], []).append(state)
        else:
            yield Finding(
                "requirements", "problem", f"{dist.name} needs it: {state}", f"pip install '{need}'"
            )
    for extra_name, states in extras.items():
        why = f"extra {extra_name!r} of {dist.name}: {', '.join(states)}"
        yield Finding("requirements", "note", why, f"pip install '{dist.name}[{extra_name}]'")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# ---- tasks


def _tasks(build: bool) -> Iterator[Finding]:
    from dav_bench.tasks import all_tasks, check_task

    tasks = all_tasks()
    for folder, why in tasks.broken.items():
        yield Finding(
            "tasks", "problem", f"{folder}: {' '.join(why.split())}", "mend the file, or move it away"
        )
    for notice in tasks.notices:
        yield Finding("tasks", "note", notice, "move the copy in ./tasks away if that is not meant")
    for task in tasks.found.values():
        try:
            check_task(task, catalog())
            task.hash  # noqa: B018 (reads every asset)
        except DavBenchError as err:
            yield Finding("tasks", "problem", f"{task.name}: {err.what} {' '.join(err.why.split())}", err.fix)
            continue
        if build:
            yield from _parts(task)


def _parts(task: Any) -> Iterator[Finding]:
    """Whether a task's model and rewards can be built: a file that is not shipped is a note."""
    parts: list[tuple[str, Mapping[str, Any], tuple[Any, ...]]] = [("models", task.model, (dict(task.sampler),))]
    parts += [("rewards", reward, ()) for reward in task.rewards.values()]
    for kind, settings, extra in parts:
        params = dict(settings)
        name = params.pop("use")
        try:
            catalog().get(kind, name).build(params, *extra)
        except DavBenchError as err:
            status: Literal["note", "problem"] = "note" if err.code == ExitCode.MISSING else "problem"
            why = f"{task.name}: {kind[:-1]} {name}: {err.what} {' '.join(err.why.split())}"
            yield Finding("tasks", status, why, err.fix)
        except Exception as err:
            yield Finding(
                "tasks", "problem", f"{task.name}: {kind[:-1]} {name}: {reason_of(err)} ({where_of(err)})"
            )


# ---- torch


def _torch() -> Iterator[Finding]:
    driver = driver_version()
    try:
        import torch
    except Exception as err:  # a broken installation can fail in any way
        fix = "pip install --force-reinstall torch"
        yield Finding("torch", "problem", f"torch cannot be imported: {reason_of(err)}", fix)
        return
    built = torch.version.cuda
    yield from torch_findings(torch.__version__, built, driver, torch.cuda.is_available())


def torch_findings(torch: str, built: str | None, driver: str, available: bool) -> Iterator[Finding]:
    """What does not fit: a torch without CUDA beside a driver, or a CUDA that the driver is too old for.

    Args:
        torch: Version of torch.
        built: CUDA it was built with, None without.
        driver: Version of the NVIDIA kernel driver, empty without.
        available: Whether torch can use a GPU.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not driver:
        if built and not available:
            yield Finding(
                "torch", "note", f"torch {torch} is built for CUDA {built}; there is no NVIDIA driver"
            )
        return
    if built is None:
        why = f"an NVIDIA driver ({driver}) is here, and torch {torch} is built without CUDA"
        yield Finding(
            "torch", "problem", why, "install torch for CUDA: https://pytorch.org/get-started/locally/"
        )
    elif not available and hidden == "":
        yield Finding(
            "torch", "note", "CUDA_VISIBLE_DEVICES is empty: no GPU is used", "unset CUDA_VISIBLE_DEVICES"
        )
    elif not available:
        why = f"torch {torch} for CUDA {built} finds no GPU with driver {driver}: most often the driver is too old"
        fix = (
            "a newer driver, or a torch for an older CUDA: https://pytorch.org/get-started/previous-versions/"
        )
        yield Finding("torch", "problem", why, fix)


def driver_version(proc: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Version of the NVIDIA kernel driver on Linux; empty where there is none."""
    try:
        found = re.search(
            r"Kernel Module.*?\s(\d+\.[\d.]+)", proc.read_text(encoding="utf-8", errors="replace")
        )
    except OSError:
        return ""
    return found[1] if found else "unknown"


# ---- runs


def _runs(out: Path) -> Iterator[Finding]:
    from dav_bench.files import SCHEMA
    from dav_bench.scan import scan

    for record in scan(out):
        where = f"{record.task}/{record.label}/{record.name}"
        if record.problem is not None:
            newer = "newer dav-bench" in record.problem
            fix = (
                "pip install --upgrade dav-bench"
                if newer
                else f"move {record.path} away; its command makes it anew"
            )
            yield Finding("runs", "problem", f"{where}: {record.problem}", fix)
            continue
        schema = record.meta.get("schema")
        if isinstance(schema, int) and schema < SCHEMA:
            why = f"{where}: schema {schema}, now {SCHEMA}"
            yield Finding("runs", "problem", why, f"dav-bench results migrate --out {out}")
        if record.status == "killed":
            last = record.meta.get("heartbeat", "?")
            why = f"{where}: dead; it says it is running, nobody runs it, its last sign of life was at {last}"
            fix = f"dav-bench run --spec {record.path / 'spec.toml'} --out {out} goes on with it"
            yield Finding("runs", "problem", why, fix)


def header() -> str:
    """One line: what this installation is."""
    return f"dav-bench {_version('dav-bench') or '?'}, Python {platform.python_version()}, {sys.platform}"
