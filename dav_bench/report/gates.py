"""Conditions that a row must meet to be ranked, such as `kmer-corr = ">= 0.9"` in `[rank] gates` of a task."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

from dav_bench.errors import DavBenchError

_COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Gate:
    """A condition that a row must meet to stand above the line."""

    metric: str
    """What is looked at: the mean over seeds."""
    sign: str
    """>=, <=, > or <."""
    limit: float
    """What it is compared with."""

    @classmethod
    def of(cls, metric: str, text: str) -> Gate:
        """Read a condition such as ">= 0.9"."""
        found = re.fullmatch(r"\s*(>=|<=|>|<)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*", str(text))
        try:
            return cls(metric, found[1], float(found[2]))  # type: ignore[index]
        except (TypeError, ValueError):
            raise DavBenchError(
                f"the gate {metric} {text!r} is no condition.",
                "A gate compares a metric with a number.",
                f'[rank] gates = {{ {metric} = ">= 0.9" }}',
            ) from None

    def passes(self, value: float) -> bool:
        """Whether a value meets it; NaN does not."""
        return bool(_COMPARISONS[self.sign](value, self.limit))

    def __str__(self) -> str:
        return f"{self.metric} {self.sign} {self.limit:g}"
