"""Gradients of black-box rewards, estimated from their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .noise import Noise


@dataclass(frozen=True, eq=False)
class NES:
    """A reward with an estimated gradient: antithetic evolution strategies around each sample.

    g = (1 / n) Σ_k [r(x + σ u_k) − r(x − σ u_k)] / (2 σ) u_k with u_k ~ N(0, I) estimates the gradient of r blurred
    by σ, without bias where r is quadratic, from 2 n rows of the reward for each sample.  It lies in n directions:
    for a linear reward in D dimensions its root mean square norm is √((D + n + 1) / n) times that of the gradient,
    and its cosine with it about the inverse.  (Wierstra et al. 2014; as in FAV, arXiv 2605.26552.)

    Directions are a function of the sample itself, so that neither its neighbours nor earlier calls matter.
    """

    reward: Callable[[Tensor, Tensor | None], Tensor]
    """Metered reward of continuous samples."""
    n: int = 16
    """Directions."""
    sigma: float = 0.01
    """Size of a step along each."""

    def __post_init__(self) -> None:
        if self.n < 1 or not self.sigma > 0:
            raise ValueError(f"NES needs n >= 1 and sigma > 0, not n = {self.n} and sigma = {self.sigma}")

    @property
    def domain(self) -> str:
        return getattr(self.reward, "domain", "")

    def __call__(self, sample: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B,) the reward itself; where its gradient is asked for, that is estimated in the backward pass."""
        if torch.is_grad_enabled() and sample.requires_grad:
            return _Estimated.apply(sample, cond, self)  # type: ignore[no-any-return]
        return self.reward(sample, cond)

    @torch.no_grad()
    def grad(self, sample: Tensor, cond: Tensor | None = None, keys: Noise | None = None) -> Tensor:
        """(B, ...) estimates at samples (B, ...)."""
        keys = _keys(sample) if keys is None else keys
        total, many = torch.zeros_like(sample), None if cond is None else torch.cat([cond, cond])
        for k in range(self.n):
            u = keys.fold(k).normal(*sample.shape[1:], dtype=sample.dtype)
            up, down = self.reward(torch.cat([sample + self.sigma * u, sample - self.sigma * u]), many).chunk(
                2
            )
            slope = ((up - down) / (2 * self.sigma)).to(sample)
            total += slope.view(-1, *[1] * (sample.ndim - 1)) * u
        return total / self.n


def _keys(sample: Tensor) -> Noise:
    """One stream for each sample, named by its numbers."""
    bits = sample.detach().double().contiguous().view(torch.int64).flatten(1)
    weights = Noise.of(0, bits.shape[1], device=bits.device).keys
    return Noise((bits * weights).sum(1)).fold(0)


class _Estimated(torch.autograd.Function):
    """The value of a reward with the gradient that `NES.grad` estimates."""

    @staticmethod
    def forward(ctx: Any, sample: Tensor, cond: Tensor | None, nes: NES) -> Tensor:
        ctx.save_for_backward(sample)
        ctx.cond, ctx.nes = cond, nes
        return nes.reward(sample.detach(), cond).detach()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (sample,) = ctx.saved_tensors
        g = ctx.nes.grad(sample.detach(), ctx.cond)
        return outer[0].view(-1, *[1] * (sample.ndim - 1)).to(g) * g, None, None
