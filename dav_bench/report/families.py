"""Families of methods: the hue that a method has in every table and chart.

The hues follow Okabe and Ito's palette for colour-blind readers (jfly.uni-koeln.de/color), its lightness moved so that
each keeps a contrast of 3 to 1 against white and against the dark ground of the report: one palette for both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dav_bench.registry import Catalog


@dataclass(frozen=True)
class Family:
    """Methods that share an idea."""

    name: str
    """Short name, used as a CSS class."""
    title: str
    """What readers see."""
    colour: str
    """Its hue, #rrggbb."""
    methods: tuple[str, ...] = ()
    """Names of the methods in it."""


FAMILIES = (
    Family("yardstick", "yardstick", "#7d7d7d", ("real", "exact", "pretrained")),
    Family(
        "search",
        "search only",
        "#0b77bd",
        ("best-of-n", "svdd", "svdd-mc", "smc", "tds", "das", "fk", "guidance"),
    ),
    Family("distil", "search, then fit", "#d55e00", ("dav", "dav-kl")),
    Family("policy", "policy gradient", "#009267", ("ddpo", "dpok", "grpo")),
    Family("weighted", "weighted likelihood", "#a67c00", ("rwr", "vidd", "vmpo")),
    Family("gradient", "reward gradient", "#c0569a", ("draft", "drakes", "adjoint")),
    Family("preference", "preference", "#7a68c8", ("dpo",)),
    Family("few", "few steps", "#1f8f9c", ("fav",)),
    Family("other", "other", "#8a6f5c"),
)
"""All families in the order of legends; `other` takes methods of plugins that train."""

_OF = {method: family for family in FAMILIES for method in family.methods}
_BY_NAME = {family.name: family for family in FAMILIES}


def family_of(method: str, catalog: Catalog | None = None) -> Family:
    """The family of a method or of a row such as `dav+tree`; one of a plugin that trains nothing is a search."""
    name = method.partition("+")[0]
    if name in _OF:
        return _OF[name]
    if "/" in name and name.partition("/")[0] == "tree":
        return _BY_NAME["distil"]
    entry = catalog.find("methods", name) if catalog is not None else None
    return _BY_NAME["other" if entry is None or entry.tunes else "search"]
