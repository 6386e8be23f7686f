"""Rows that everything else is read against, and searches that train nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dav_bench.builtin import parts
from dav_bench.core.method import Method, Training


@dataclass(frozen=True)
class Real:
    """Real samples of a split no method has seen: the yardstick row."""

    split: str = "test"
    """Split they are drawn from."""


@dataclass(frozen=True)
class Pretrained:
    """The model before any alignment."""


@dataclass(frozen=True)
class BestOfN(parts.BestOf):
    """The best of n samples of the pretrained model."""


@dataclass(frozen=True)
class SVDD(parts.Tree):
    """Tree search on the pretrained model at test time (arXiv 2408.08252, posterior-mean value).

    The paper weighs children by exp(v / alpha); its released code takes the best child (`select=argmax`).
    """

    width: int = 10
    """Candidates per sample and denoising step."""


@dataclass(frozen=True)
class SVDDMC(Training):
    """Tree search on the pretrained model by a value learned from its own samples (arXiv 2408.08252, Monte Carlo)."""

    rounds: int = 10
    """Rounds: one batch of plain samples each, and a fit of the value to their rewards."""
    updates: int = 4
    """Passes over a round's items."""
    lr: float = 1e-3
    """AdamW learning rate of the value."""
    hidden: int = 64
    """Channels of the value's network."""
    width: int = 10
    """Candidates per sample and denoising step."""
    alpha: float = 0.1
    """Temperature: lower searches harder."""
    select: Literal["sample", "argmax"] = "sample"
    """Draw a child by its weight, or take the best (release)."""


def real(c: Real) -> Method:
    from dav_bench.core import RealSamples

    return Method(RealSamples(c.split))


def pretrained(c: Pretrained) -> Method:
    return Method(parts.rollout(parts.Rollout()))


def best_of_n(c: BestOfN) -> Method:
    return Method(parts.best_of(c))


def svdd(c: SVDD) -> Method:
    return Method(parts.tree(c))


def svdd_mc(c: SVDDMC) -> Method:
    from dav_bench.core import Learned, Rollout, TreeSearch, ValueRegression

    value = Learned(c.hidden)
    search = TreeSearch(c.width, c.alpha, select=c.select, value=value)
    return Method(Rollout(), ValueRegression(value), Training.of(c), sampler=search)
