from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest

from dav_bench.config import Layer, coerce, docs_of, make, resolve, type_name
from dav_bench.errors import DavBenchError


@dataclass(frozen=True)
class Inner:
    lr: float = 1e-3
    """Rate."""
    steps: int = 5
    """Steps."""


@dataclass(frozen=True)
class Base:
    width: int = 4
    """Children of a parent
    at each step."""


@dataclass(frozen=True)
class Config(Base):
    guide: bool = True
    """Use gradients."""
    reduce: Literal["sum", "mean"] = "sum"
    """Reduction."""
    kl: float | None = None
    """Pull."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Moments."""
    inner: Inner = field(default_factory=Inner)
    """Nested."""
    compat: str = "paper"
    """Deviations."""
    COMPAT: ClassVar = {"release": {"sequence": {"guide": False, "kl": 0.5}, "image": {"reduce": "mean"}}}


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("8", int, 8),
        ("1e3", int, 1000),
        ("1_000", int, 1000),
        (4.0, int, 4),
        ("-2", int, -2),
        ("9007199254740993", int, 9007199254740993),
        ("2e-4", float, 2e-4),
        (1, float, 1.0),
        ("inf", float, float("inf")),
        ("Yes", bool, True),
        ("0", bool, False),
        (True, bool, True),
        ("mean", Literal["sum", "mean"], "mean"),
        ("2", Literal[1, 2], 2),
        ("none", float | None, None),
        ("0.5", float | None, 0.5),
        ("0.5,0.9", tuple[float, ...], (0.5, 0.9)),
        ([1, 2], tuple[int, ...], (1, 2)),
        ("3", int | str, 3),
        ("x", int | str, "x"),
        ({"a": 1}, dict, {"a": 1}),
    ],
)
def test_text_becomes_values(text, kind, value):
    got = coerce(text, kind)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1.5", int),
        ("nan", float),
        ("inf", int),
        ("x", float),
        (True, int),
        (True, float),
        (1.0, bool),
        ("maybe", bool),
        (3, str),
        ("men", Literal["sum", "mean"]),
        ("x", float | None),
        ("a,b", tuple[int, ...]),
        (None, float),
        ("x", dict),
    ],
)
def test_bad_values_are_refused(text, kind):
    with pytest.raises(ValueError):
        coerce(text, kind)


def test_a_choice_error_names_choices_and_the_near_one():
    with pytest.raises(ValueError, match=r"'sum' \| 'mean'; did you mean 'mean'\?"):
        coerce("men", Literal["sum", "mean"])


def test_make_reports_everything_at_once():
    with pytest.raises(DavBenchError) as err:
        make(Config, {"widht": 1, "guide": "maybe", "betas": "x"}, "method 'm'")
    assert err.value.why.count("\n") == 2 and "method 'm'" in err.value.what
    assert make(Config, {"inner": {"lr": "0.1"}}).inner == Inner(0.1)


def test_docs_come_from_the_lines_below_fields():
    docs = docs_of(Config)
    assert docs["width"] == "Children of a parent at each step."
    assert docs["guide"] == "Use gradients."
    assert set(docs) == {"width", "guide", "reduce", "kl", "betas", "inner", "compat"}


def test_type_names_read_well():
    assert type_name(float | None) == "float | none"
    assert type_name(Literal["a", 1]) == "'a' | 1"
    assert type_name(tuple[int, ...]) == "list of int"


def layers(*pairs):
    return [Layer(source, sections) for source, sections in pairs]


def test_later_layers_win_and_every_value_keeps_its_source():
    found = resolve(
        Config,
        layers(
            ("task file", {"m": {"width": 6, "kl": 0.1}}),
            ("preset", {"method": {"width": 7}}),
            ("--set", {"m": {"kl": "none"}}),
        ),
        ["method", "m"],
    )
    assert (found.values["width"], found.values["kl"]) == (7, None)
    assert (found.sources["width"], found.sources["kl"], found.sources["guide"]) == (
        "preset",
        "--set",
        "default",
    )


def test_within_a_layer_the_specific_section_wins():
    found = resolve(Config, layers(("--set", {"m": {"width": 9}, "method": {"width": 1}})), ["method", "m"])
    assert found.values["width"] == 9


def test_nested_fields_keep_their_neighbours():
    sets = layers(("task file", {"m": {"inner.lr": 0.5}}), ("--set", {"m": {"inner.steps": "9"}}))
    assert resolve(Config, sets, ["m"]).values["inner"] == Inner(0.5, 9)
    assert "did you mean 'lr'" in resolve(Config, layers(("--set", {"m": {"inner.lrr": 1}})), ["m"]).errors[0]


def test_unknown_keys_are_errors_except_in_loose_sections():
    sets = layers(("--set", {"m": {"widht": 1}, "method": {"other": 1}}))
    found = resolve(Config, sets, ["method", "m"], loose=["method"])
    assert found.errors == ["m.widht (--set): unknown key; did you mean 'width'?"]
    assert ("--set", "method", "other") not in found.used


def test_compat_fills_in_the_fields_of_its_domain_at_its_own_level():
    sets = layers(
        ("task file", {"m": {"guide": True, "width": 5}}),
        ("--set", {"m": {"compat": "release", "kl": "0.25"}}),
    )
    found = resolve(Config, sets, ["m"], "sequence")
    assert found.values["guide"] is False and found.sources["guide"] == "--set (compat=release)"
    assert found.values["kl"] == 0.25 and found.sources["kl"] == "--set"
    assert found.values["width"] == 5 and found.values["reduce"] == "sum"
    assert resolve(Config, sets, ["m"], "image").values["reduce"] == "mean"


def test_a_layer_above_compat_wins():
    sets = layers(("task file", {"m": {"compat": "release"}}), ("--set", {"m": {"guide": "true"}}))
    assert resolve(Config, sets, ["m"], "sequence").values["guide"] is True


def test_compat_can_be_taken_back():
    sets = layers(
        ("task file", {"m": {"compat": "release", "width": 3}}), ("--set", {"m": {"compat": "paper"}})
    )
    found = resolve(Config, sets, ["m"], "sequence")
    assert (found.values["guide"], found.values["kl"], found.values["width"]) == (True, None, 3)


def test_unknown_compat_is_refused():
    found = resolve(Config, layers(("--set", {"m": {"compat": "relase"}})), ["m"], "sequence")
    assert "did you mean 'release'" in found.errors[0]
