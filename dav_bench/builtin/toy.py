"""Settings of the worlds whose every law is known exactly. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ToyModel:
    """An exact pretrained model with a residual network to train."""

    hidden: int = 64
    """Units of each hidden layer of the residual, which is 0 before training."""


@dataclass(frozen=True)
class ToyMixture(ToyModel):
    """Gaussians of one width, in any number of dimensions."""

    weights: tuple[float, ...] = (0.5, 0.5)
    """Share of each component."""
    means: tuple[float, ...] = (-2.0, 2.0)
    """Means of the components, one after the other; as many numbers for each as there are dimensions."""
    std: float = 0.5
    """Standard deviation of every component in every dimension."""

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights) <= 0:
            raise ValueError(f"weights: expected positive numbers, got {self.weights}")
        if not self.means or len(self.means) % len(self.weights):
            raise ValueError(f"means: {len(self.means)} numbers for {len(self.weights)} components")
        if self.std <= 0:
            raise ValueError(f"std: expected a positive number, got {self.std}")


@dataclass(frozen=True)
class ToyTokens(ToyModel):
    """Three tokens over four letters, a Markov chain."""

    order: Literal["random", "parallel"] = "random"
    """Reveal one token at a time, which is exact, or all at independent times in `sampler.steps` steps."""


@dataclass(frozen=True)
class TFBind8(ToyTokens):
    """Eight bases of human regulatory DNA, a Markov chain of order 3."""

    hidden: int = 128
    """Units of each hidden layer of the residual, which is 0 before training."""


@dataclass(frozen=True)
class Quadratic:
    """Minus half the squared distance to a point."""

    curvature: float = 1.0
    """Second derivative, negated."""
    centre: float = 1.0
    """Where the reward is 0, in every dimension; between the modes of the mixture, where no data live."""


@dataclass(frozen=True)
class Letters:
    """Number of one letter, and a bonus where the first and the last token agree."""

    letter: int = 3
    """The letter counted; 3 is the rarest first token."""
    bonus: float = 0.5
    """Reward of equal ends."""


@dataclass(frozen=True)
class Exact:
    """Exact samples of the target p(x) exp(r(x) / alpha) / Z: the yardstick of tasks that know it."""

    alpha: float = 1.0
    """Temperature of the target; the task's own (`target.alpha`) unless set."""
