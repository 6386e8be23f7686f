"""FAV: few-step alignment by amortised Stein variational gradient descent (arXiv 2605.26552)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dav_bench.core.method import Method, Training


@dataclass(frozen=True)
class FAV(Training):
    """Samples move one Stein step towards p exp(r / alpha) / Z, and the model is regressed onto the moved samples.

    Defaults are those of the image configurations of Jaewoopudding/FAV; its toy has tau 0.05.
    """

    rounds: int = 200
    """Rounds of one optimiser step each (release: 200)."""
    samples: int = 128
    """Samples of a round, and as many of the pretrained model (release: 256 in all, 16 of each for a prompt)."""
    minibatch: int = 4096
    """Samples of one optimiser step: a whole round, since the drift holds for particles that have not moved yet."""
    lr: float = 5e-4
    """AdamW learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moments."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    clip: float = 2.0
    """Largest norm of the gradient."""
    alpha: float = 1.0
    """Temperature of the target, 1 / beta (release: 2 for few-step models, 1 for one-step ones and for the toy)."""
    taus: tuple[float, ...] = (0.3,)
    """Widths tau of the kernels exp(-d2 / tau), whose variance is tau / 2; the density of the pretrained model is
    known up to this much blur."""
    bandwidth: Literal["fixed", "median"] = "fixed"
    """Widths as they are, or in units of the median squared distance between samples of the pretrained model."""
    repulsion: float = 1.0
    """1 is Stein's; 0.5 is the released image code, which targets the square of the density."""
    score: Literal["softmax", "clamp"] = "softmax"
    """Score of the pretrained density: never 0, or with the released floor of 1e-6 that fades far from its samples."""
    particles: int | None = None
    """Samples that move together, those of one prompt (release: 16); none is the whole round."""
    references: int | None = None
    """Samples of the pretrained model for each group of particles; none is as many."""
    features: Literal["identity", "reward"] = "identity"
    """Space of the particles: the sample itself (continuous models), or the features that the reward looks at."""

    def __post_init__(self) -> None:
        if not self.alpha > 0 or not self.taus or not min(self.taus) > 0 or self.repulsion < 0:
            raise ValueError("alpha and every one of taus must be above 0, repulsion not below")
        if self.particles is not None and (self.particles < 1 or self.samples % self.particles):
            raise ValueError(
                f"{self.samples} samples cannot be split into groups of {self.particles} particles"
            )
        if self.references is not None and self.references < 1:
            raise ValueError(f"references must be 1 or more, not {self.references}")


def build(c: FAV) -> Method:
    from dav_bench.core import Seeds, Stein

    loss = Stein(
        beta=1 / c.alpha,
        taus=c.taus,
        bandwidth=c.bandwidth,
        repulsion=c.repulsion,
        score=c.score,
        particles=c.particles,
        references=c.references,
        features=c.features,
    )
    return Method(Seeds(), loss, Training.of(c))
