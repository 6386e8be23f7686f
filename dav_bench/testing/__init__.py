"""The contract of plugins: what `dav-bench plugins check` checks, for an author's own tests.

    from dav_bench.testing import check_plugin

    def test_the_contract():
        check_plugin("my-plugin")

Each function returns its checks and raises `ContractBroken`, an AssertionError, which names what failed and how it is
mended.  `check_plugin` checks everything a plugin registers; the others check one component by its name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checklist import Check, Checklist, ContractBroken
    from .contract import (
        check_method,
        check_metric,
        check_model,
        check_plugin,
        check_reward,
        check_searcher,
        check_task,
        check_tracker,
        check_trainer,
        examine,
    )
    from .watch import Undeclared, Watch

_HOME = {
    "checklist": ("Check", "Checklist", "ContractBroken"),
    "contract": (
        "check_method",
        "check_metric",
        "check_model",
        "check_plugin",
        "check_reward",
        "check_searcher",
        "check_task",
        "check_tracker",
        "check_trainer",
        "examine",
    ),
    "watch": ("Undeclared", "Watch"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Check",
    "Checklist",
    "ContractBroken",
    "Undeclared",
    "Watch",
    "check_method",
    "check_metric",
    "check_model",
    "check_plugin",
    "check_reward",
    "check_searcher",
    "check_task",
    "check_tracker",
    "check_trainer",
    "examine",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'dav_bench.testing' has no attribute {name!r}")
    value = getattr(import_module(f"dav_bench.testing.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
