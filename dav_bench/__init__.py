"""dav-bench: align diffusion models to rewards, and measure what that costs and breaks.

Everything a plugin needs is importable from here; names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "API_VERSION": "hookspecs",
    "Broken": "plugins",
    "Catalog": "registry",
    "DavBenchError": "errors",
    "Entry": "registry",
    "ExitCode": "errors",
    "Options": "runner",
    "PlannedRun": "plan",
    "Published": "pretrained",
    "Request": "plan",
    "RoundFinished": "events",
    "RunDir": "store",
    "RunFinished": "events",
    "RunRecord": "scan",
    "RunSpec": "spec",
    "RunStarted": "events",
    "SamplesReady": "events",
    "TaskSpec": "tasks",
    "all_tasks": "tasks",
    "asset": "tasks",
    "catalog": "plugins",
    "execute": "runner",
    "find_task": "tasks",
    "hookimpl": "hookspecs",
    "stream": "seeds",
}

if TYPE_CHECKING:
    from dav_bench.errors import DavBenchError, ExitCode
    from dav_bench.events import RoundFinished, RunFinished, RunStarted, SamplesReady
    from dav_bench.hookspecs import API_VERSION, hookimpl
    from dav_bench.plan import PlannedRun, Request
    from dav_bench.plugins import Broken, catalog
    from dav_bench.pretrained import Published
    from dav_bench.registry import Catalog, Entry
    from dav_bench.runner import Options, execute
    from dav_bench.scan import RunRecord
    from dav_bench.seeds import stream
    from dav_bench.spec import RunSpec
    from dav_bench.store import RunDir
    from dav_bench.tasks import TaskSpec, all_tasks, asset, find_task

__all__ = [
    "API_VERSION",
    "Broken",
    "Catalog",
    "DavBenchError",
    "Entry",
    "ExitCode",
    "Options",
    "PlannedRun",
    "Published",
    "Request",
    "RoundFinished",
    "RunDir",
    "RunFinished",
    "RunRecord",
    "RunSpec",
    "RunStarted",
    "SamplesReady",
    "TaskSpec",
    "__version__",
    "all_tasks",
    "asset",
    "catalog",
    "execute",
    "find_task",
    "hookimpl",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dav_bench' has no attribute {name!r}")
    value = getattr(import_module(f"dav_bench.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
