"""The meter: counts by phase."""

import pytest

from dav_bench.core import Meter
from dav_bench.core.meter import COUNTS


def test_counts_go_to_the_phase_they_are_made_in():
    meter = Meter()
    meter.count("forward", 1)
    with meter.phase("search"):
        meter.count("forward", 5)
        with meter.phase("sample"):
            meter.count("forward", 7)
        meter.count("backward", 2)
    meter.count("forward", 1)
    assert meter.total("forward", "search") == 5
    assert meter.total("forward", "sample") == 7
    assert meter.total("forward", "other") == 2
    assert meter.total("forward") == 14
    assert meter.total("forward", "search", "sample") == 12
    assert meter.phases["search"]["seconds"] > 0


def test_cost_is_forward_plus_twice_backward():
    meter = Meter()
    for phase, (forward, backward) in {"search": (10, 3), "fit": (4, 4)}.items():
        with meter.phase(phase):
            meter.count("forward", forward)
            meter.count("backward", backward)
            meter.count("shared", 1000)
    assert meter.cost("search") == 16
    assert meter.cost() == 16 + 12


def test_a_phase_ends_when_an_exception_leaves_it():
    meter = Meter()
    with pytest.raises(RuntimeError), meter.phase("search"):
        raise RuntimeError
    meter.count("reward", 1)
    assert meter.total("reward", "search") == 0


def test_state_continues_in_another_process():
    meter = Meter()
    with meter.phase("fit"):
        meter.count("backward", 3)
    again = Meter(meter.state())
    with again.phase("fit"):
        again.count("backward", 4)
    assert again.total("backward", "fit") == 7
    assert meter.total("backward", "fit") == 3, "a copy, not a view"
    assert set(again.state()["fit"]) == {*COUNTS, "seconds"}
