"""Rewards of the toy worlds, differentiable and known in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dav_bench.builtin.toy import Letters, Quadratic


@dataclass(frozen=True)
class QuadraticReward:
    """r(x) = −(a/2) |x − (c, ..., c)|²."""

    a: float = 1.0
    c: float = 1.0

    domain = "vector"
    provides = frozenset({"reward.grad"})
    bound = 0.0
    """No sample has more."""

    def __call__(self, sample: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B,) of samples (B, D)."""
        return -self.a / 2 * ((sample - self.c) ** 2).sum(-1)


def centres() -> Tensor:
    """(8, 2) float64 centres of the ring: radius 4/√2, from the top, against the clock."""
    angle = math.pi / 2 + torch.arange(8, dtype=torch.float64) * math.pi / 4
    return 4 / math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], -1)


class RingReward:
    """r(x) = log R(x), R = Σ_k (k/7) softmax_k(−|x − c_k|²): cluster k is worth k/7 (FAV, fav-toy/utils_2d.py).

    At α = 1 the target is p R, whose cluster weights are near k/28.  R is smooth, so the first cluster is not empty.
    """

    domain = "vector"
    provides = frozenset({"reward.grad"})
    bound = 0.0
    """No sample has more."""

    def __call__(self, sample: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B,) of samples (B, 2)."""
        near = -((sample[:, None] - centres().to(sample)) ** 2).sum(-1)
        worth = torch.arange(1, 8, device=sample.device, dtype=sample.dtype) / 7
        return (near[:, 1:] + worth.log()).logsumexp(-1) - near.logsumexp(-1)


@dataclass(frozen=True)
class LetterReward:
    """Tokens equal to `letter`, plus `bonus` if the ends agree; linear in each row, so it has a gradient."""

    letter: int = 3
    bonus: float = 0.5

    domain = "sequence"
    provides = frozenset({"reward.grad", "reward.features"})

    def __call__(self, sample: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B,) of one-hot or relaxed sequences (B, L, V)."""
        return self.head(self.features(sample))

    def features(self, sample: Tensor) -> Tensor:
        """(B, 2) number of the letter, and whether the ends agree."""
        return torch.stack([sample[..., self.letter].sum(-1), (sample[:, 0] * sample[:, -1]).sum(-1)], -1)

    def head(self, features: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B,) of features (B, 2)."""
        return features[:, 0] + self.bonus * features[:, 1]


def build_mixture(config: Quadratic) -> QuadraticReward:
    return QuadraticReward(config.curvature, config.centre)


def build_ring() -> RingReward:
    return RingReward()


def build_tokens(config: Letters) -> LetterReward:
    return LetterReward(config.letter, config.bonus)
