"""The suite itself: what it runs, what it sees, and what it says."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest

from dav_bench.errors import DavBenchError
from dav_bench.plugins import catalog
from dav_bench.verify import LAWS, Expectation, check, expectations, verify
from dav_bench.verify.defects import defects, seen
from dav_bench.verify.suite import spec_of

ROWS = expectations()


def find(method: str, world: str, law: str, **settings: object) -> Expectation:
    return next(
        r
        for r in ROWS
        if (r.method, r.world, r.law) == (method, world, law) and settings.items() <= r.settings.items()
    )


def test_every_method_has_an_expectation_but_the_real_samples() -> None:
    named = {row.method for row in ROWS}
    assert {e.name for e in catalog().all("methods")} - named == {"real"}


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.method}-{r.world}-{r.law}")
def test_every_row_can_be_planned_and_told(row: Expectation) -> None:
    assert spec_of(row).method == row.method
    assert row.law in LAWS and "{" not in row.says
    assert all(a.reason and 0 < a.size <= 0.25 for a in row.allow)


FAST = [
    find("pretrained", "toy-tokens", "prior"),
    find("guidance", "toy-tokens", "guided"),
    replace(find("best-of-n", "toy-tokens", "best"), n=2000),
    replace(find("smc", "toy-tokens", "z"), n=1000),
    replace(find("ddpo", "toy-tokens", "maximum"), n=200),
]


@pytest.mark.parametrize("row", FAST, ids=lambda r: f"{r.method}-{r.law}")
def test_a_method_that_does_as_it_should_passes(row: Expectation) -> None:
    result = check(row)
    assert result.passed, result
    assert "as expected" in str(result) and "NOT" not in str(result)


@pytest.mark.parametrize(
    ("row", "change"),
    [
        (FAST[0], {"law": "target"}),
        (FAST[1], {"settings": {"scale": 0.0}}),
        (FAST[2], {"of": {"n": 3}}),
        (FAST[3], {"alpha": 0.8}),
        (FAST[4], {"settings": {**FAST[4].settings, "rounds": 2}}),
    ],
    ids=["law", "setting", "parameter", "temperature", "training"],
)
def test_a_method_that_does_something_else_does_not(row: Expectation, change: dict[str, object]) -> None:
    result = check(replace(row, **change))
    assert not result.error and not result.passed, result
    assert "NOT as expected" in str(result)


def test_the_seed_decides_the_samples() -> None:
    one, two, again = (check(FAST[0], seed).distance for seed in (0, 1, 0))
    assert one == again != two


def test_results_come_in_order_and_are_told_one_by_one() -> None:
    told = []
    rows = [replace(FAST[0], n=100), replace(FAST[1], n=100)]
    results = verify(rows, say=told.append)
    assert told == results and [r.row for r in results] == rows


def test_what_cannot_run_or_be_measured_is_an_error_and_no_verdict() -> None:
    bad = [
        Expectation("real", "toy-tokens", "prior"),
        Expectation("pretrained", "toy-tokens", "z", n=10),
        Expectation("pretrained", "tfbind8", "guided", of={"scale": 1.0}, alpha=0.1, n=10),
        Expectation("pretrained", "toy-tokens", "gided", n=10),
    ]
    for row, message in zip(
        bad, ("needs data", "estimates no Z", "are not known", "did you mean"), strict=True
    ):
        result = check(row)
        assert message in result.error and not result.passed, result
    with pytest.raises(DavBenchError, match="did you mean 'width'"):
        spec_of(Expectation("svdd", "toy-tokens", "target", {"widht": 2}))


PLANTED = {d.name: d for d in defects()}


@pytest.mark.parametrize("name", PLANTED)
def test_every_defect_changes_a_row_of_the_suite(name: str) -> None:
    """By settings that the row does not have, or by a plant."""
    defect = PLANTED[name]
    row = find(defect.method, defect.world, defect.law)
    changed = spec_of(defect.row).params != spec_of(row).params
    assert changed is bool(defect.settings) and (changed or defect.plant is not nullcontext)


@pytest.mark.parametrize(
    "name",
    [
        "proposals are weighed without their normaliser",
        "particles keep the weights they were resampled by",
        "guidance is averaged over the batch",
    ],
)
def test_planted_defects_are_seen_and_gone_afterwards(name: str) -> None:
    defect = PLANTED[name]
    caught, result = seen(defect)
    assert caught, result
    assert check(defect.row).passed, "the plant must not outlive its context"


def test_an_error_is_no_sight_of_a_defect() -> None:
    broken = replace(PLANTED["guidance is averaged over the batch"], settings={"scale": "x"})
    caught, result = seen(broken)
    assert not caught and result.error
