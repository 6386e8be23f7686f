from dataclasses import dataclass

import pytest

from dav_bench.errors import DavBenchError, ExitCode
from dav_bench.registry import Catalog, Entry, Registrar, active


@dataclass(frozen=True)
class Config:
    width: int = 4
    """Children."""


def build(c):
    return ("built", c.width)


@pytest.fixture
def catalog():
    made = Catalog()
    made.add(Entry("rewards", "gc", lambda: 1, origin="acme"))
    made.add(Entry("methods", "dav", build, Config, origin="core"))
    return made


def test_an_unknown_name_lists_the_near_ones(catalog):
    with pytest.raises(DavBenchError, match=r"unknown method 'dva'; did you mean 'dav'\?"):
        catalog.get("methods", "dva")


def test_a_namespace_names_the_origin(catalog):
    assert catalog.find("rewards", "acme/gc") is catalog.get("rewards", "gc")
    assert catalog.find("rewards", "other/gc") is None


def test_build_coerces_settings_and_reports_all_errors(catalog):
    entry = catalog.get("methods", "dav")
    assert entry.build({"width": "8"}) == ("built", 8)
    with pytest.raises(DavBenchError) as err:
        entry.build({"width": "x", "widht": 1})
    assert "expected int" in err.value.why and "did you mean 'width'?" in err.value.why


def test_a_component_without_settings_refuses_some(catalog):
    with pytest.raises(DavBenchError, match="has no settings"):
        catalog.get("rewards", "gc").build({"a": 1})


def test_a_lazy_target_that_cannot_be_imported_is_a_missing_asset():
    with pytest.raises(DavBenchError) as err:
        Entry("models", "m", "dav_bench.nothing:build", origin="acme").load()
    assert err.value.code == ExitCode.MISSING
    with pytest.raises(DavBenchError, match="cannot be imported"):
        Entry("models", "m", "dav_bench.errors:nothing").load()
    assert Entry("models", "m", "dav_bench.errors:DavBenchError").load() is DavBenchError


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (("a b", "m:f"), {}, "no usable name"),
        (("a.b", "m:f"), {}, "no usable name"),
        (("a", "nocolon"), {}, "callable or 'module:attr'"),
        (("a", "m:f"), {"config": dict}, "frozen dataclass"),
        (("a", "m:f"), {"sumary": "x"}, "did you mean 'summary'"),
        (("a", "m:f"), {"requires": {"reward grad"}}, "capability if field"),
        (("gc", "m:f"), {}, "already registered by 'acme'"),
    ],
)
def test_registration_is_checked_at_once(catalog, args, options, message):
    with pytest.raises(DavBenchError, match=message):
        Registrar("rewards", "me", catalog)(*args, **options)


def test_a_plugin_that_registers_a_name_twice_is_refused(catalog):
    register = Registrar("rewards", "me", catalog)
    register("new", "m:f")
    with pytest.raises(DavBenchError, match="already registered by 'me'"):
        register("new", "m:f")


@pytest.mark.parametrize(
    ("condition", "values", "holds"),
    [
        ("a", {}, True),
        ("a if guide", {"guide": True}, True),
        ("a if guide", {"guide": False}, False),
        ("a if kl", {"kl": 0.0}, False),
        ("a if kl", {"kl": 0.1}, True),
        ("a if not guide", {"guide": False}, True),
        ("a if anchor=ref", {"anchor": "ref"}, True),
        ("a if anchor=ref", {"anchor": "policy"}, False),
        ("a if missing", {}, False),
        ("a if b=1 and c", {"b": 1.0, "c": "x"}, True),
        ("a if b=1 and c", {"b": 1.0, "c": ""}, False),
        ("a if b=1 and c", {"b": 2, "c": "x"}, False),
    ],
)
def test_conditional_capabilities(condition, values, holds):
    assert active([condition], values) == ({"a"} if holds else set())
