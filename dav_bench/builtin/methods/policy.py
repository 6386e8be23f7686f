"""Policy gradients on the model's own rollouts: DDPO, DPOK and GRPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dav_bench.core.method import Method, Training

_TOKENS = {"reduce": "mean", "ratio": "clean", "old": "lagged", "tracker": False, "clip_advantage": None}


def _everywhere(**deviations: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """The same deviations of released code in every domain."""
    return {"release": {domain: deviations for domain in ("image", "vector", "sequence")}}


@dataclass(frozen=True)
class PolicyTraining(Training):
    """Training on the model's own rollouts, and what all policy gradients share."""

    form: Literal["is", "sf", "clamp"] = "is"
    """Clipped importance-sampled surrogate, score function (one optimiser step a round, else it is biased), or the
    clipped ratio alone, which has no way back from beyond the clip (DPOK's release)."""
    clip_ratio: float | None = None
    """Largest change of a step's probability that is rewarded; none is 0.2 for reduce=sum, 0.0001 for reduce=mean."""
    reduce: Literal["sum", "mean"] = "sum"
    """Log-probabilities and KL: summed over dimensions, which is exact, or averaged (releases)."""
    kl: float = 0.0
    """Weight of KL(model || pretrained) for each step."""

    def __post_init__(self) -> None:
        if self.form == "sf" and self.updates > 1:
            raise ValueError(
                f"form = sf is a gradient of the model that drew the samples: set updates to 1, not {self.updates}"
            )
        if self.clip_ratio is not None and self.clip_ratio <= 0:
            raise ValueError(
                f"clip_ratio = {self.clip_ratio} lets no ratio change: set it above 0, or to none"
            )


@dataclass(frozen=True)
class DDPO(PolicyTraining):
    """Denoising diffusion policy optimisation (arXiv 2305.13301): rewards standardised for each prompt.

    Settings of the released code (kvablack/ddpo-pytorch, config/base.py and dgx.py).
    """

    rounds: int = 100
    """Rounds: one batch of rollouts and its fit each."""
    samples: int = 256
    """Rollouts in each round."""
    minibatch: int = 3200
    """(sample, step) items of one optimiser step: 64 trajectories of 50 steps, four updates a round."""
    lr: float = 3e-4
    """AdamW learning rate."""
    weight_decay: float = 1e-4
    """AdamW weight decay."""
    tracker: bool = True
    """Standardise by the last rewards of each prompt; false, or without prompts: by those of the batch."""
    window: int = 32
    """Rewards remembered of each prompt."""
    min_count: int = 16
    """Rewards of a prompt below which the batch's statistics stand in."""
    prompts: int = 1024
    """Most prompts remembered."""
    clip_advantage: float | None = 5.0
    """Largest size of an advantage; none is no limit."""
    floor: float = 1e-6
    """Added to the spread of rewards before dividing by it."""
    ratio: Literal["exact", "clean"] = "exact"
    """Probability ratio of the step taken, or on tokens of the final tokens at masked positions (VIDD repository)."""
    old: Literal["sampler", "lagged"] = "sampler"
    """Ratio against the model that drew the batch, or that of one round before (VIDD repository)."""
    compat: Literal["paper", "release"] = "paper"
    """`release` selects all deviations of released code for the domain of the task."""

    COMPAT: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "release": {**_everywhere(reduce="mean")["release"], "sequence": _TOKENS}
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_count > self.window:
            raise ValueError(
                f"min_count = {self.min_count} is never reached in a window of {self.window}: prompts would have no "
                "statistics of their own; set tracker=false for that"
            )


@dataclass(frozen=True)
class DPOK(PolicyTraining):
    """Reward less a KL to the pretrained model, both for each step (arXiv 2305.16381)."""

    rounds: int = 100
    """Rounds: one batch of rollouts and its fit each."""
    updates: int = 5
    """Passes over a round's items (release: p_step)."""
    lr: float = 1e-5
    """AdamW learning rate."""
    kl: float = 0.01
    """Weight of KL(model || pretrained) for each step."""
    kl_form: Literal["exact", "mse"] = "exact"
    """The KL of the step laws, or the squared error of the noise predictions (release, images)."""
    weight: float = 10.0
    """Weight of the reward (the released script's default is 100)."""
    baseline: Literal["mean", "none"] = "mean"
    """Reward minus the mean of the other samples, or as it is; the release learns a value of x_i instead."""
    clip: float = 0.1
    """Largest norm of the gradient."""
    compat: Literal["paper", "release"] = "paper"
    """`release` averages log-probabilities over dimensions, clips without a way back, pulls by the squared error of
    the noise (on tokens by the averaged KL) and has the release's weight."""

    COMPAT: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "release": {
            **_everywhere(reduce="mean", form="clamp", weight=100.0, kl_form="mse")["release"],
            "sequence": {"reduce": "mean", "form": "clamp", "weight": 100.0},
        }
    }


@dataclass(frozen=True)
class GRPO(PolicyTraining):
    """Group-relative policy optimisation (Flow-GRPO, arXiv 2505.05470): each reward against others of its prompt."""

    rounds: int = 100
    """Rounds: one batch of rollouts and its fit each."""
    samples: int = 192
    """Rollouts in each round, a multiple of `group`."""
    minibatch: int = 4800
    """(sample, step) items of one optimiser step."""
    lr: float = 3e-4
    """AdamW learning rate."""
    kl: float = 0.04
    """Weight of KL(model || pretrained) for each step."""
    group: int = 8
    """Samples compared with each other where there are no prompts (SEPO, on tokens, has 8 and Flow-GRPO 24); with
    prompts a group is the samples of one prompt."""
    std: Literal["group", "batch", "none"] = "group"
    """Spread rewards are divided by: the group's (paper), the batch's (release), or none (kl is a temperature then)."""
    clip_advantage: float | None = 5.0
    """Largest size of an advantage; none is no limit."""
    floor: float = 1e-4
    """Added to the spread of rewards before dividing by it."""
    compat: Literal["paper", "release"] = "paper"
    """`release` averages log-probabilities and KL over dimensions and divides by the spread of the batch."""

    COMPAT: ClassVar[dict[str, dict[str, dict[str, Any]]]] = _everywhere(reduce="mean", std="batch")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 2 or self.samples % self.group:
            raise ValueError(
                f"samples = {self.samples} does not fall into groups of {self.group}: set samples to a multiple of "
                "group, and group to 2 or more"
            )


def ddpo(c: DDPO) -> Method:
    from dav_bench.core.advantage import PerPrompt
    from dav_bench.core.policy import PolicyGradient
    from dav_bench.core.search import Rollout

    known = PerPrompt(c.window, c.min_count, c.prompts, c.floor, c.clip_advantage, tracker=c.tracker)
    loss = PolicyGradient(known, c.form, c.clip_ratio, c.kl, reduce=c.reduce, ratio=c.ratio, old=c.old)
    kept = c.form != "sf" and c.ratio == "exact" and c.old == "sampler"
    return Method(Rollout(log_prob=kept), loss, Training.of(c))


def dpok(c: DPOK) -> Method:
    from dav_bench.core.advantage import Scaled
    from dav_bench.core.policy import PolicyGradient
    from dav_bench.core.search import Rollout

    loss = PolicyGradient(Scaled(c.weight, c.baseline), c.form, c.clip_ratio, c.kl, c.kl_form, c.reduce)
    return Method(Rollout(log_prob=c.form != "sf"), loss, Training.of(c))


def grpo(c: GRPO) -> Method:
    from dav_bench.core.advantage import PerGroup
    from dav_bench.core.policy import PolicyGradient
    from dav_bench.core.search import Rollout

    loss = PolicyGradient(
        PerGroup(c.group, c.std, c.floor, c.clip_advantage), c.form, c.clip_ratio, c.kl, reduce=c.reduce
    )
    return Method(Rollout(log_prob=c.form != "sf"), loss, Training.of(c))
