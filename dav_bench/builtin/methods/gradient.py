"""Methods that follow the gradient of the reward: DRaFT and AlignProp, DRAKES, adjoint matching."""

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
    mask: Literal["relaxed", "drawn"] = "relaxed"
    """Relax tokens and mask together (DRAKES), or draw first what is revealed and relax the token (less bias)."""

    def __post_init__(self) -> None:
        if self.tau <= 0 or self.tau_end <= 0:
            raise ValueError(f"temperatures must be above 0, got tau={self.tau} and tau_end={self.tau_end}")
        if self.anneal < 0:
            raise ValueError(f"anneal must be 0 or more, got {self.anneal}")


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last < 0 or self.copies < 1:
            raise ValueError(
                f"last must be 0 or more and copies 1 or more, got {self.last} and {self.copies}"
            )
        if self.copies > 1 and (self.last != 1 or self.truncate != "fixed"):
            raise ValueError("copies of the last step need last=1 and truncate=fixed")


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last < 0 or self.alpha < 0 or self.warmup < 0:
            raise ValueError("last, alpha and warmup must be 0 or more")

    COMPAT: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "release": {"sequence": {"kl_form": "release", "alpha": 0.001}}
    }


@dataclass(frozen=True)
class Adjoint(Training):
    """Reward gradients carried back through the pretrained model, and each step regressed onto them (2409.08861).

    For images and vectors with the noise of DDPM; aims at the tilted model at temperature alpha.
    """

    rounds: int = 50
    """Rounds of one rollout and one fit each."""
    samples: int = 128
    """Trajectories of a round (release: 5 times 25)."""
    minibatch: int = 1600
    """(sample, step) items of one optimiser step: 32 trajectories of 50 steps."""
    lr: float = 1e-4
    """AdamW learning rate (release, all weights of an image model: 3e-6)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moments (release)."""
    alpha: float = 0.01
    """Temperature of the target, 1 / lambda (release, ImageReward: lambda = 100)."""
    at: Literal["arrival", "departure"] = "arrival"
    """Adjoint that a step is fitted to: after it, which is exact on linear chains, or before it (paper, release)."""
    times: Literal["all", "late", "split"] = "all"
    """Steps fitted: all; the last quarter and as many of the rest (paper); `picked` of them, half late (release)."""
    picked: int = 4
    """Steps fitted of each trajectory with times=split (release: 4 of 50)."""
    quantile: float = 1.0
    """Leave out items whose error is above this running quantile; 1 leaves out none (release: 0.9)."""
    limit: float = 0.0
    """Cut the loss of an item at limit / alpha^2, without gradient beyond; 0 never (FAV's port: 1.6)."""
    compat: Literal["paper", "release"] = "paper"
    """`release` selects the released choice of adjoint, steps and quantile."""

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise ValueError(
                f"alpha must be above 0, got {self.alpha}; draft has no pull to the pretrained model"
            )
        if not 0 < self.quantile <= 1 or self.picked < 1 or self.limit < 0:
            raise ValueError("quantile must be in (0, 1], picked 1 or more and limit 0 or more")

    COMPAT: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "release": {
            domain: {"at": "departure", "times": "split", "quantile": 0.9, "lr": 3e-6}
            for domain in ("image", "vector")
        }
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
        mask=c.mask,
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
        mask=c.mask,
        kl=c.alpha,
        kl_form=c.kl_form,
        kl_steps=c.kl_steps,
        warmup=c.warmup,
    )
    return Method(Seeds(), loss, Training.of(c))


def adjoint(c: Adjoint) -> Method:
    from dav_bench.core import AdjointMatching, Rollout

    loss = AdjointMatching(
        alpha=c.alpha, at=c.at, times=c.times, picked=c.picked, quantile=c.quantile, limit=c.limit
    )
    return Method(Rollout(), loss, Training.of(c))
