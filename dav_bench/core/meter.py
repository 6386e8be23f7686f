"""What a run costs, counted where it is spent: network rows, reward rows and seconds for each phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

COUNTS = ("forward", "backward", "shared", "reward", "reward_backward", "reward_shared")
"""What every phase counts; `value` and `value_backward`, rows of a learned look-ahead value, where there is one."""


class Meter:
    """Counts for each phase (`search`, `fit`, `sample`, ...).

    `forward` and `backward` are network rows computed (a pair of classifier-free guidance is two), `shared` rows
    whose result was already held; rewards likewise.  Shared rows cost nothing; with the computed ones they give
    the formula of the algorithm (dav.md G.1).
    """

    def __init__(self, phases: Mapping[str, Mapping[str, float]] | None = None) -> None:
        self.phases: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys((*COUNTS, "seconds"), 0))
        for name, counts in (phases or {}).items():
            self.phases[name].update(counts)
        self._phase = "other"

    def count(self, what: str, rows: int) -> None:
        counts = self.phases[self._phase]
        counts[what] = counts.get(what, 0) + int(rows)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything counted inside belongs to `name`; phases do not nest, the inner one wins while it lasts."""
        outer, self._phase, start = self._phase, name, time.perf_counter()
        try:
            yield
        finally:
            self.phases[name]["seconds"] += time.perf_counter() - start
            self._phase = outer

    def total(self, what: str, *phases: str) -> float:
        return sum(counts.get(what, 0) for name, counts in self.phases.items() if not phases or name in phases)

    def cost(self, *phases: str) -> float:
        """Network rows forward + 2 * backward."""
        return self.total("forward", *phases) + 2 * self.total("backward", *phases)

    def reward_rows(self, *phases: str) -> float:
        """Reward rows forward + 2 * backward."""
        return self.total("reward", *phases) + 2 * self.total("reward_backward", *phases)

    def spent(self, unit: str, *phases: str) -> float:
        """What a budget counts: `cost`, `reward` (rows) or `seconds`."""
        if unit == "seconds":
            return self.total("seconds", *phases)
        return self.reward_rows(*phases) if unit == "reward" else self.cost(*phases)

    def state(self) -> dict[str, dict[str, float]]:
        return {name: dict(counts) for name, counts in self.phases.items()}
