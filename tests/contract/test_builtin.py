"""The built-in components keep the contract of plugins."""

from __future__ import annotations

import os

import pytest

from dav_bench import testing
from dav_bench.plugins import BUILTIN, catalog
from dav_bench.testing.checklist import Check
from dav_bench.testing.imports import LIMIT, measure

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # weights that are not here are named at once


def names(kind: str) -> list[str]:
    return [entry.name for entry in catalog().all(kind) if entry.origin == BUILTIN]


def ran(checks: list[Check]) -> bool:
    return any("it runs on" in check.name and check.status == "ok" for check in checks)


@pytest.mark.parametrize("name", names("methods"))
def test_methods(name: str) -> None:
    checks = testing.check_method(name)
    needs = {need.split(" if ")[0] for need in catalog().get("methods", name).requires}
    assert ran(checks) or "data" in needs  # the toys have no data set


@pytest.mark.parametrize("name", names("searchers"))
def test_searchers(name: str) -> None:
    assert ran(testing.check_searcher(name))


@pytest.mark.parametrize("name", names("trainers"))
def test_trainers(name: str) -> None:
    assert ran(testing.check_trainer(name))


@pytest.mark.parametrize("name", names("models"))
def test_models(name: str) -> None:
    testing.check_model(name)


@pytest.mark.parametrize("name", names("rewards"))
def test_rewards(name: str) -> None:
    testing.check_reward(name)


@pytest.mark.parametrize("name", names("metrics"))
def test_metrics(name: str) -> None:
    testing.check_metric(name)


def test_importing_all_of_them_is_light() -> None:
    seconds, limit, heavy = measure("dav_bench.builtin.plugin")
    assert seconds <= limit and limit >= LIMIT and not heavy
