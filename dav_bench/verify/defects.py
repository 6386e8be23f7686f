"""Known defects, planted one at a time: a suite that does not see them sees nothing.

Each is an error that was made in released code or is easy to make.  Where our code has it as an option (to reproduce a
release), it is planted by the option, else by replacing a function while the method runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

from dav_bench.verify.expectations import Expectation, expectations
from dav_bench.verify.suite import Result, check


@dataclass(frozen=True)
class Defect:
    """Something wrong, and the expectation that must not hold any more."""

    name: str
    """What is wrong."""
    method: str
    """Whose expectation."""
    world: str
    """Where."""
    law: str
    """Which."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options that plant it."""
    plant: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Plants it for as long as the context holds."""

    @property
    def row(self) -> Expectation:
        """The expectation of the suite, with the options that plant the defect."""
        same = (
            r for r in expectations() if (r.method, r.world, r.law) == (self.method, self.world, self.law)
        )
        found = next(same)
        return replace(found, settings={**found.settings, **self.settings})


def seen(defect: Defect, seed: int = 0) -> tuple[bool, Result]:
    """Whether the suite sees a defect, and what it saw: the expectation fails by its distance, not by an error."""
    result = check(defect.row, seed, defect.plant)
    return not result.passed and not result.error, result


@contextmanager
def unnormalised_proposal() -> Iterator[None]:
    """Tilted steps draw as they should, and state their density without the normaliser (DRAKES' TDS baseline)."""
    from dav_bench.core.steps import MaskedStep, SingleRevealStep

    def broken(tilt: Callable[..., Any]) -> Callable[..., Any]:
        def tilted(self: Any, g: Any, rate: bool = False) -> Any:
            q = tilt(self, g, rate)

            class Unnormalised(type(q)):  # type: ignore[misc]
                def log_prob(own, x: Any) -> Any:
                    classes = g.shape[-1]
                    return self.log_prob(x) + (g * (x - self.x)[..., :classes]).flatten(1).sum(1)

            return Unnormalised(**vars(q))

        return tilted

    one, all_at_once = (patch.object(c, "tilt", broken(c.tilt)) for c in (SingleRevealStep, MaskedStep))
    with one, all_at_once:
        yield


@contextmanager
def swapped_pairs() -> Iterator[None]:
    """The loser of each pair is handed over as the winner."""
    from dav_bench.core.preference import Pairs

    found = Pairs.__call__

    def swapped(self: Pairs, *args: Any, **kwargs: Any) -> Any:
        batch = found(self, *args, **kwargs)
        batch.states, batch.per_sample["loser"] = batch.per_sample["loser"][None], batch.states[0]
        return batch

    with patch.object(Pairs, "__call__", swapped):
        yield


@contextmanager
def averaged_guidance() -> Iterator[None]:
    """Rewards are averaged over the batch before they are differentiated, so that guidance fades as batches grow."""
    from dav_bench.core.value import PosteriorMean

    found = PosteriorMean.value_and_grad

    def averaged(self: PosteriorMean, ctx: Any, model: Any, x: Any, *args: Any) -> Any:
        value, grad, pred = found(self, ctx, model, x, *args)
        return value, grad / len(x), pred

    with patch.object(PosteriorMean, "value_and_grad", averaged):
        yield


@contextmanager
def forgotten_weights() -> Iterator[None]:
    """Particles are resampled and keep the weights that they were resampled by: each counts twice."""
    from dav_bench.core.particles import SMC

    found = SMC._resample

    def twice(self: SMC, w: Any, *args: Any) -> Any:
        before = w.log.clone()
        index = found(self, w, *args)
        if index is not None:
            w.log = before.flatten()[index].view_as(before)
        return index

    with patch.object(SMC, "_resample", twice):
        yield


def defects() -> list[Defect]:
    """All that are planted."""
    tokens, mixture = "toy-tokens", "toy-mixture"
    mean, half = {"reduce": "mean"}, {"repulsion": 0.5}
    return [
        Defect(
            "proposals are weighed without their normaliser",
            "tds",
            tokens,
            "target",
            plant=unnormalised_proposal,
        ),
        Defect(
            "particles keep the weights they were resampled by",
            "smc",
            tokens,
            "target",
            plant=forgotten_weights,
        ),
        Defect(
            "the release's last correction of max",
            "fk",
            tokens,
            "target",
            {"potential": "max", "terminal": "release"},
        ),
        Defect("weights average over positions", "svdd", tokens, "steered", {"guide": True, **mean}),
        Defect("log-probabilities average over positions", "vmpo", tokens, "target", mean),
        Defect("guidance is averaged over the batch", "guidance", tokens, "guided", plant=averaged_guidance),
        Defect("winner and loser of a pair are swapped", "dpo", tokens, "target", plant=swapped_pairs),
        Defect("half the repulsion", "fav", mixture, "target", half),
        Defect("the released KL, 0 on one-hot states", "drakes", tokens, "target", {"kl_form": "release"}),
    ]
