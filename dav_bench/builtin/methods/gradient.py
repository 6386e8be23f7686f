"""Methods that follow the gradient of the reward: DRaFT and AlignProp, DRAKES."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dav_bench.core.method import Method, Training


@dataclass(frozen=True)
class Relaxed:
    """How tokens are made differentiable; images need none of it."""

    tau: float = 1.0
    """Temperature of the Gumbel-softmax (tokens)."""
    tau_end: float = 0.1
    """Temperature after annealing (tokens)."""
    anneal: int = 0
    """Optimiser steps in which the temperature falls from tau to tau_end; 0 keeps it (tokens)."""
    states: Literal["soft", "hard"] = "soft"
    """Tokens between differentiated steps: relaxed, or one-hot with straight-through gradients."""


@dataclass(frozen=True)
class Draft(Training, Relaxed):
    """Reward gradients through the last steps of sampling (DRaFT, arXiv 2309.17400; AlignProp, arXiv 2310.03739).

    There is no KL: it stops at the reward's maximum, not at a tilted model.
    """

    rounds: int = 50
    """Rounds of sampling and fitting."""
    minibatch: int = 16
    """Samples of one optimiser step (DRaFT: 16; AlignProp: 128)."""
    lr: float = 4e-4
    """AdamW learning rate (DRaFT: 4e-4; AlignProp: 1e-3)."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW moments (DRaFT)."""
    weight_decay: float = 0.1
    """AdamW weight decay (DRaFT: 0.1; AlignProp: 1e-4)."""
    last: int = 1
    """K: last steps that are differentiated (DRaFT-K); 0 is the whole chain (DRaFT)."""
    truncate: Literal["fixed", "gaussian", "uniform"] = "fixed"
    """K as set by `last`, or random for each sample: 9 of 50 steps on average, or 1 to T - 1 evenly (AlignProp)."""
    copies: int = 1
    """Copies of x_0 noised anew for the last step, whose gradients are averaged (DRaFT-LV: 2)."""
    goal: float | None = None
    """Reward to approach, |goal - r| in place of -r (AlignProp, aesthetic score: 10)."""
    checkpoint: bool = False
    """Compute differentiated steps again in the backward pass instead of keeping them: memory for time."""


@dataclass(frozen=True)
class Drakes(Training, Relaxed):
    """Reward gradients through relaxed tokens, and a KL of the whole path (DRAKES, arXiv 2410.13643)."""

    rounds: int = 100
    """Rounds of one optimiser step each (release: 1,000)."""
    samples: int = 128
    """Samples of a round (release: 4 times 32)."""
    minibatch: int = 128
    """Samples of one optimiser step (release: 4 times 32)."""
    last: int = 50
    """Last steps that are differentiated (release: 50 of 128); 0 is the whole chain."""
    alpha: float = 0.128
    """Weight of the KL of the path, the temperature of the target: the release's 0.001 in units of this KL."""
    kl_form: Literal["exact", "release"] = "exact"
    """KL of the path, or the release's sum, which is 0 on one-hot states (release: alpha 0.001)."""
    kl_steps: Literal["all", "last"] = "all"
    """Steps whose KL counts: all, or those differentiated (release option `truncate_kl`)."""
    warmup: int = 0
    """Optimiser steps in which the weight of the KL rises from 0."""
    checkpoint: bool = False
    """Compute differentiated steps again in the backward pass instead of keeping them: memory for time."""
    compat: Literal["paper", "release"] = "paper"
    """`release` selects the released form and weight of the KL."""

    COMPAT: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "release": {"sequence": {"kl_form": "release", "alpha": 0.001}}
    }


def draft(c: Draft) -> Method:
    from dav_bench.core import Pathwise, Seeds

    loss = Pathwise(
        last=c.last,
        truncate=c.truncate,
        copies=c.copies,
        checkpoint=c.checkpoint,
        goal=c.goal,
        tau=c.tau,
        tau_end=c.tau_end,
        anneal=c.anneal,
        states=c.states,
    )
    return Method(Seeds(), loss, Training.of(c))


def drakes(c: Drakes) -> Method:
    from dav_bench.core import Pathwise, Seeds

    loss = Pathwise(
        last=c.last,
        checkpoint=c.checkpoint,
        tau=c.tau,
        tau_end=c.tau_end,
        anneal=c.anneal,
        states=c.states,
        kl=c.alpha,
        kl_form=c.kl_form,
        kl_steps=c.kl_steps,
        warmup=c.warmup,
    )
    return Method(Seeds(), loss, Training.of(c))
