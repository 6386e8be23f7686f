"""Settings of the toy worlds, whose every law is known exactly. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ToyModel:
    """An exact pretrained model with a residual network to train."""

    hidden: int = 64
    """Units of each hidden layer of the residual, which is 0 before training."""


@dataclass(frozen=True)
class ToyTokens(ToyModel):
    """Three tokens over four letters, a Markov chain."""

    order: Literal["random", "parallel"] = "random"
    """Reveal one token at a time, which is exact, or all at independent times in `sampler.steps` steps."""


@dataclass(frozen=True)
class Quadratic:
    """Minus half the squared distance to a point."""

    curvature: float = 1.0
    """Second derivative, negated."""
    centre: float = 1.0
    """Where the reward is 0; between the modes of the mixture, where no data live."""


@dataclass(frozen=True)
class Letters:
    """Number of one letter, and a bonus where the first and the last token agree."""

    letter: int = 3
    """The letter counted; 3 is the rarest first token."""
    bonus: float = 0.5
    """Reward of equal ends."""
