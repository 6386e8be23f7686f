"""Rewards of the toy worlds, differentiable and known in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dav_bench.builtin.toy import Letters, Quadratic


@dataclass(frozen=True)
class QuadraticReward:
    """r(x) = −(a/2) |x − c|²."""

    a: float = 1.0
    c: float = 1.0

    domain = "vector"
    provides = frozenset({"reward.grad"})

    def __call__(self, sample: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B,) of samples (B, D)."""
        return -self.a / 2 * ((sample - self.c) ** 2).sum(-1)


@dataclass(frozen=True)
class LetterReward:
    """Tokens equal to `letter`, plus `bonus` if the ends agree; linear in each row, so it has a gradient."""

    letter: int = 3
    bonus: float = 0.5

    domain = "sequence"
    provides = frozenset({"reward.grad"})

    def __call__(self, sample: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B,) of one-hot or relaxed sequences (B, L, V)."""
        return sample[..., self.letter].sum(-1) + self.bonus * (sample[:, 0] * sample[:, -1]).sum(-1)


def build_mixture(config: Quadratic) -> QuadraticReward:
    return QuadraticReward(config.curvature, config.centre)


def build_tokens(config: Letters) -> LetterReward:
    return LetterReward(config.letter, config.bonus)
