"""Fits to own samples by what they are worth: reward-weighted regression, VIDD and VMPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dav_bench.core.method import Method, Training

if TYPE_CHECKING:
    from dav_bench.core import Loss


def _above_zero(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} = {getattr(config, name)}: set it above 0")


@dataclass(frozen=True)
class RewardWeighted:
    """Maximum likelihood of the samples found, weighted by their reward: a trainer for any search."""

    alpha: float = 1.0
    """Temperature of the weights exp(r / alpha)."""
    weighting: Literal["exp", "sparse"] = "exp"
    """Weigh all samples by exp(r / alpha), or fit the best ones alike."""
    best: float = 0.1
    """Share of samples that `sparse` fits."""
    target: Literal["transition", "denoise"] = "transition"
    """Fit the steps taken, or denoise the final sample corrupted anew (one-step form, DDPO's baseline)."""
    reduce: Literal["sum", "mean"] = "sum"
    """Log-likelihood of steps: summed over dimensions, or averaged."""

    def __post_init__(self) -> None:
        _above_zero(self, "alpha", "best")


@dataclass(frozen=True)
class RWR(Training, RewardWeighted):
    """Reward-weighted regression: maximum likelihood of own samples weighted by exp(r / alpha).

    The baseline of DDPO (arXiv 2305.13301), which fits 10,240 samples in each round with alpha = 5.
    """

    samples: int = 256
    """Rollouts in each round."""
    updates: int = 5
    """Passes over a round's items (release: 5)."""


@dataclass(frozen=True)
class VIDD(Training):
    """Iterative distillation of the soft-optimal step (arXiv 2507.00445), rolled in with a lagged model.

    Settings of the released DNA script (divelab/VIDD, scripts/dna.sh).
    """

    rounds: int = 100
    """Rounds: one batch of rollouts and its fit each."""
    samples: int = 128
    """Rollouts in each round."""
    minibatch: int = 16384
    """(sample, step) items of one optimiser step: all of 128 sequences of 128 steps, one update a round."""
    lr: float = 1e-4
    """AdamW learning rate."""
    alpha: float = 1.0
    """Temperature of each refresh: lower moves further."""
    refresh: int = 5
    """Updates after which the model that rolls in and weighs is renewed."""
    prior: Literal["old", "ref"] = "old"
    """Prior of the tilt: that model, so that each refresh tilts again (release), or the pretrained one."""
    lookahead: Literal["mode", "mean", "sample"] = "mode"
    """What the reward sees of a noisy sequence: its likeliest tokens, their probabilities, or one draw."""
    reduce: Literal["sum", "mean"] = "sum"
    """Log-likelihood of steps: summed over dimensions, or averaged."""

    def __post_init__(self) -> None:
        _above_zero(self, "alpha", "refresh")


@dataclass(frozen=True)
class VMPO(Training):
    """Least variance of log importance weights (arXiv 2602.12229).

    Settings of the released code (SamsungLabs/VMPO, config/vmpo.py), whose deviations are `compat=release`.
    """

    rounds: int = 100
    """Rounds: one batch of rollouts and its fit each."""
    samples: int = 256
    """Rollouts in each round."""
    minibatch: int = 1280
    """(sample, step) items of one optimiser step: 128 trajectories of 10 steps, two updates a round."""
    lr: float = 3e-4
    """AdamW learning rate."""
    weight_decay: float = 1e-4
    """AdamW weight decay."""
    alpha: float = 0.1
    """Temperature of the target: 1 / alpha is the release's reward scale."""
    warmup: int = 50
    """Rounds over which 1 / alpha rises linearly to its value."""
    form: Literal["diff", "r2g"] = "diff"
    """Differences of look-ahead rewards, or reward-to-go: exact, with more noise."""
    potential: Literal["ref", "policy"] = "ref"
    """Look-ahead by the pretrained model, whose targets stand still, or by the model being trained (release)."""
    lookahead: Literal["mode", "mean", "sample"] = "mode"
    """What the reward sees of a noisy sequence: its likeliest tokens, their probabilities, or one draw."""
    baseline: Literal["learned", "batch"] = "learned"
    """Mean log-weight of a step: a learned number, or the mean over the other samples of the round."""
    baseline_weight: float = 0.01
    """Weight of the loss of the learned baseline."""
    baseline_lr: float = 30.0
    """Its learning rate in units of the model's (0.1 for the release's network; this is one number for each step)."""
    kl: float = 0.0
    """Weight of an extra KL(model || pretrained): with k the target of a step is that of alpha (2 + k) / 2."""
    reduce: Literal["sum", "mean"] = "sum"
    """Log-probabilities and KL: summed over dimensions, which is exact, or averaged (release)."""
    compat: Literal["paper", "release"] = "paper"
    """`release` averages log-probabilities over dimensions, adds the KL and looks ahead by the model itself."""

    COMPAT: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "release": {
            domain: {"reduce": "mean", "kl": 1.0, "potential": "policy"}
            for domain in ("image", "vector", "sequence")
        }
    }

    def __post_init__(self) -> None:
        _above_zero(self, "alpha")


def reward_weighted(c: RewardWeighted) -> Loss:
    from dav_bench.core.weighted import RewardWeights, WeightedLikelihood

    return WeightedLikelihood(RewardWeights(c.alpha, c.weighting, c.best), c.target, c.reduce)


def rwr(c: RWR) -> Method:
    from dav_bench.core.search import Rollout

    return Method(Rollout(), reward_weighted(c), Training.of(c))


def vidd(c: VIDD) -> Method:
    from dav_bench.core.search import Rollout
    from dav_bench.core.value import PosteriorMean
    from dav_bench.core.weighted import GainWeights, WeightedLikelihood

    value, anchored = PosteriorMean(c.lookahead), c.prior == "ref"
    search = Rollout(on="old", log_prob=anchored, value=None if anchored else value)
    loss = WeightedLikelihood(GainWeights(c.alpha, c.prior, value), "transition", c.reduce, c.refresh)
    return Method(search, loss, Training.of(c))


def vmpo(c: VMPO) -> Method:
    from dav_bench.core.search import Rollout
    from dav_bench.core.value import PosteriorMean
    from dav_bench.core.variance import LogVariance

    value = PosteriorMean(c.lookahead) if c.form == "diff" else None
    loss = LogVariance(
        form=c.form,
        value=value if c.potential == "ref" else None,
        scale=1 / c.alpha,
        warmup=c.warmup,
        baseline=c.baseline,
        baseline_weight=c.baseline_weight,
        baseline_lr=c.baseline_lr,
        kl=c.kl,
        reduce=c.reduce,
    )
    search = Rollout(log_prob=True, value=value if c.potential == "policy" else None)
    return Method(search, loss, Training.of(c))
