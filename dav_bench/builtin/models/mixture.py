"""Gaussian mixtures, whose posterior under noise is again a mixture: the denoiser is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dav_bench.builtin.models.residual import residual
from dav_bench.builtin.rewards.toy import QuadraticReward, centres
from dav_bench.builtin.toy import ToyMixture, ToyModel
from dav_bench.core import GaussianProcess, Model, Noise, Reward
from dav_bench.errors import DavBenchError

NODES = 24
"""Gauss-Hermite nodes for each dimension of a soft value."""


@dataclass(frozen=True)
class Mixture:
    """Σ_k w_k N(μ_k, var I)."""

    weights: Tensor
    """(K,)."""
    means: Tensor
    """(K, d)."""
    var: float
    """Of each component and dimension."""

    def log_prob(self, x: Tensor) -> Tensor:
        """(B,) log-density at points (B, d)."""
        d2 = ((x[:, None] - self.means.to(x)) ** 2).sum(-1)
        scale = 0.5 * x.shape[1] * math.log(2 * math.pi * self.var)
        return (self.weights.to(x).log() - d2 / (2 * self.var)).logsumexp(-1) - scale

    def sample(self, noise: Noise) -> Tensor:
        """(n, d) float64 draws."""
        k = noise.fold(1).categorical(self.weights.log().expand(len(noise), -1))
        return self.means[k] + math.sqrt(self.var) * noise.fold(2).normal(
            self.means.shape[1], dtype=torch.float64
        )

    def tilt(self, lam: float, centre: float) -> tuple[Mixture, float]:
        """The law proportional to p(x) exp(−λ |x − c|² / 2), and the log of its integral (methods.md FX1)."""
        d2, shrink = ((self.means - centre) ** 2).sum(-1), 1 + lam * self.var
        logw = self.weights.log() - 0.5 * self.means.shape[1] * math.log(shrink) - lam * d2 / (2 * shrink)
        means = (self.means + lam * self.var * centre) / shrink
        return Mixture(logw.softmax(0), means, self.var / shrink), float(logw.logsumexp(0))


class MixtureNetwork(nn.Module):
    """E[x_0 | x_i] of a Gaussian mixture, plus a residual that starts at 0."""

    time_input = True

    def __init__(self, process: GaussianProcess, law: Mixture, hidden: int = 64) -> None:
        super().__init__()
        self.law = law
        self.weights: Tensor
        self.means: Tensor
        self.shares: Tensor
        self.register_buffer("weights", law.weights.double())
        self.register_buffer("means", law.means.double())
        self.register_buffer("shares", process.alphas_bar.clone())
        dim = law.means.shape[1]
        self.residual = residual(2 * dim + 1, hidden, dim)

    def posterior(self, x: Tensor, i: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights (B, K), means (B, K, d) and variance (B, 1) of p(x_0 | x_i), again a mixture; x: (B, d)."""
        a = self.shares[torch.as_tensor(i, device=x.device).expand(len(x))].to(x)[:, None]
        s2 = self.law.var
        var = a * s2 + 1 - a
        gap = x[:, None] - a.sqrt()[..., None] * self.means.to(x)
        logw = (self.weights.to(x).log() - (gap**2).sum(-1) / (2 * var)).log_softmax(-1)
        return logw, self.means.to(x) + (a.sqrt() * s2 / var)[..., None] * gap, s2 * (1 - a) / var

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, d) clean predictions of states (B, d) at times t = i / T."""
        logw, means, var = self.posterior(x, (t * (len(self.shares) - 1)).round().long())
        w = logw.exp()[..., None]
        mean = (w * means).sum(1)
        # a reward moves the mean by the covariance times its slope, so the residual is in units of the covariance
        slope = self.residual(torch.cat([x, t[:, None], mean], -1))
        off = means - mean[:, None]
        return mean + (w * off * (off * slope[:, None]).sum(-1, keepdim=True)).sum(1) + var * slope

    def soft_value(self, reward: Reward, alpha: float) -> Callable[[Tensor, int], Tensor]:
        """(x, i) -> (B,) α log E[exp(r(x_0) / α) | x_i] of the forward process.

        Closed for a quadratic reward; else by Gauss-Hermite nodes for each component, in one or two dimensions.
        The chain of T steps has a soft value of its own, which differs by the error of its grid.
        """
        if isinstance(reward, QuadraticReward):
            return self._quadratic_value(reward, alpha)
        dim = self.means.shape[1]
        if dim > 2:
            raise DavBenchError(
                "this soft value is not known in closed form.",
                f"The reward is not quadratic and the samples have {dim} dimensions; quadrature takes 1 or 2.",
            )
        points, logs = _nodes(dim)

        def value(x: Tensor, i: int) -> Tensor:
            logw, means, var = self.posterior(x, i)
            spread = var.sqrt()[:, None, None] * points.to(x)  # (B, 1, Q, d)
            x0 = means[:, :, None] + spread
            r = reward(x0.reshape(-1, dim)).view(x0.shape[:3]) / alpha
            return alpha * (logw[..., None] + logs.to(x) + r).flatten(1).logsumexp(-1)

        return value

    def _quadratic_value(self, reward: QuadraticReward, alpha: float) -> Callable[[Tensor, int], Tensor]:
        lam, dim = reward.a / alpha, self.means.shape[1]

        def value(x: Tensor, i: int) -> Tensor:
            logw, means, var = self.posterior(x, i)
            d2 = ((means - reward.c) ** 2).sum(-1)
            logz = -0.5 * (dim * torch.log1p(lam * var) + lam * d2 / (1 + lam * var))
            return alpha * (logw + logz).logsumexp(-1)

        return value

    def target(self, reward: QuadraticReward, alpha: float) -> Mixture:
        """p(x_0) exp(r(x_0) / α) / Z of the mixture itself, again a mixture; the chain of T steps has its own."""
        return self.law.tilt(reward.a / alpha, reward.c)[0]


def _nodes(dim: int) -> tuple[Tensor, Tensor]:
    """Points (Q, dim) and log-weights (Q,) of a standard normal."""
    x, w = np.polynomial.hermite_e.hermegauss(NODES)
    grid = [torch.from_numpy(a) for a in np.meshgrid(*[x] * dim, indexing="ij")]
    logs = [torch.from_numpy(np.log(a)) for a in np.meshgrid(*[w / w.sum()] * dim, indexing="ij")]
    return torch.stack([g.flatten() for g in grid], -1), torch.stack(logs).sum(0).flatten()


def _build(law: Mixture, hidden: int, sampler: Mapping[str, Any], name: str) -> Model:
    process = GaussianProcess(
        (law.means.shape[1],), int(sampler.get("steps", 50)), float(sampler.get("eta", 1.0))
    )
    return Model(MixtureNetwork(process, law, hidden), process, "vector", name=name)


def build_mixture(config: ToyMixture, sampler: Mapping[str, Any]) -> Model:
    """Gaussians of one width; by default two, at −2 and 2 with variance 1/4 (the fixture FX1 of the tests)."""
    weights = torch.tensor(config.weights, dtype=torch.float64)
    means = torch.tensor(config.means, dtype=torch.float64).view(len(weights), -1)
    return _build(
        Mixture(weights / weights.sum(), means, config.std**2), config.hidden, sampler, "toy-mixture"
    )


def build_ring(config: ToyModel, sampler: Mapping[str, Any]) -> Model:
    """Eight Gaussians on a circle of radius 4/√2 (the fixture FX4 of the tests; FAV's toy)."""
    law = Mixture(torch.full((8,), 1 / 8, dtype=torch.float64), centres(), 0.5**2 / 2)
    return _build(law, config.hidden, sampler, "toy-ring")
