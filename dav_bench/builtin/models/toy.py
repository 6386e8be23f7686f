"""Worlds whose every law is known: the pretrained network is the exact posterior, so all else is exact too.

A residual network that starts at 0 is what training changes.  `soft_value` is the exact look-ahead value of the
pretrained model, `target` the law p(x_0) exp(r(x_0) / α) / Z that alignment aims at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dav_bench.builtin.rewards.toy import QuadraticReward
from dav_bench.builtin.toy import ToyModel, ToyTokens
from dav_bench.core import GaussianProcess, MaskedProcess, Model, Reward


def _residual(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """A small network that gives 0 until trained; its first layers are the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        last = nn.Linear(hidden, outputs)
        net = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return net


class MixtureNetwork(nn.Module):
    """E[x_0 | x_i] of a one-dimensional Gaussian mixture, plus the residual."""

    time_input = True

    def __init__(
        self,
        process: GaussianProcess,
        hidden: int = 64,
        weights: tuple[float, ...] = (0.5, 0.5),
        means: tuple[float, ...] = (-2.0, 2.0),
        std: float = 0.5,
    ) -> None:
        super().__init__()
        self.weights: Tensor
        self.means: Tensor
        self.shares: Tensor
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float64))
        self.register_buffer("means", torch.tensor(means, dtype=torch.float64))
        self.register_buffer("shares", process.alphas_bar.clone())
        self.std = std
        self.residual = _residual(3, hidden, 1)

    def posterior(self, x: Tensor, i: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights (B, K), means (B, K) and variance (B, 1) of p(x_0 | x_i), again a mixture; x: (B, 1)."""
        a = self.shares[torch.as_tensor(i, device=x.device).expand(len(x))].to(x)[:, None]
        means, var = self.means.to(x), a * self.std**2 + 1 - a
        gap = x - a.sqrt() * means
        logw = (self.weights.to(x).log() - gap**2 / (2 * var)).log_softmax(-1)
        return logw, means + a.sqrt() * self.std**2 / var * gap, self.std**2 * (1 - a) / var

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, 1) clean predictions of states (B, 1) at times t = i / T."""
        logw, means, var = self.posterior(x, (t * (len(self.shares) - 1)).round().long())
        w = logw.exp()
        mean = (w * means).sum(-1, keepdim=True)
        spread = (w * (means - mean) ** 2).sum(-1, keepdim=True) + var
        # a reward moves the mean by its slope times the variance, so the residual is in units of the variance
        return mean + spread * self.residual(torch.cat([x, t[:, None], mean], -1))

    def soft_value(self, reward: QuadraticReward, alpha: float) -> Callable[[Tensor, int], Tensor]:
        """(x, i) -> (B,) α log E[exp(r(x_0) / α) | x_i] by Gaussian integrals."""
        lam = reward.a / alpha

        def value(x: Tensor, i: int) -> Tensor:
            logw, means, var = self.posterior(x, i)
            logz = -0.5 * (torch.log1p(lam * var) + lam * (means - reward.c) ** 2 / (1 + lam * var))
            return alpha * (logw + logz).logsumexp(-1)

        return value

    def target(self, reward: QuadraticReward, alpha: float) -> tuple[Tensor, Tensor, float]:
        """Weights (K,), means (K,) and variance of p(x_0) exp(r(x_0) / α) / Z, a mixture."""
        lam, var = reward.a / alpha, self.std**2
        logw = self.weights.log() - (self.means - reward.c) ** 2 * lam / (2 * (1 + lam * var))
        narrow = 1 / (1 / var + lam)
        return logw.softmax(0), narrow * (self.means / var + lam * reward.c), narrow


class TokenNetwork(nn.Module):
    """p(x_0^l | x_i) of a short Markov chain by summing over all its sequences, plus the residual.

    Multilinear in the rows of the state before it is normalised, so a relaxed state has a gradient.
    """

    time_input = False
    start = (0.4, 0.3, 0.2, 0.1)
    follow = ((0.4, 0.3, 0.2, 0.1), (0.1, 0.4, 0.3, 0.2), (0.2, 0.1, 0.4, 0.3), (0.3, 0.2, 0.1, 0.4))

    def __init__(self, hidden: int = 64, length: int = 3) -> None:
        super().__init__()
        vocab = len(self.start)
        ids = torch.tensor(list(itertools.product(range(vocab), repeat=length)))
        prior = torch.tensor(self.start, dtype=torch.float64)[ids[:, 0]]
        for left, right in itertools.pairwise(ids.T):
            prior = prior * torch.tensor(self.follow, dtype=torch.float64)[left, right]
        self.ids: Tensor
        self.prior: Tensor
        self.register_buffer("ids", ids)
        self.register_buffer("prior", prior)
        self.residual = _residual(length * (vocab + 1), hidden, length * vocab)

    @property
    def sequences(self) -> Tensor:
        """(N, L, V) all sequences, one-hot."""
        return F.one_hot(self.ids, len(self.start)).to(self.prior)

    def joint(self, x: Tensor) -> Tensor:
        """(B, N) p(sequence, state) up to the chance of the masks; x: (B, L, V + 1)."""
        fits = x[:, torch.arange(x.shape[1], device=x.device), self.ids] + x[:, None, :, -1]
        return self.prior.to(x) * fits.prod(-1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, L, V) logits of states (B, L, V + 1); the time adds nothing to the state."""
        joint = self.joint(x)
        law = (joint @ self.sequences.to(x).flatten(1)) / joint.sum(-1, keepdim=True)
        return (law.clamp_min(1e-30).log() + self.residual(x.flatten(1))).view(len(x), x.shape[1], -1)

    def soft_value(self, reward: Reward, alpha: float) -> Callable[[Tensor, int], Tensor]:
        """(x, i) -> (B,) α log E[exp(r(x_0) / α) | x_i] by enumeration; exact where one token is revealed a step."""
        tilt = (reward(self.sequences) / alpha).exp()

        def value(x: Tensor, i: int) -> Tensor:
            joint = self.joint(x)
            return alpha * ((joint * tilt.to(x)).sum(-1) / joint.sum(-1)).log()

        return value

    def target(self, reward: Reward, alpha: float) -> Tensor:
        """(N,) p(x_0) exp(r(x_0) / α) / Z of each sequence."""
        return (self.prior.log() + reward(self.sequences) / alpha).softmax(0)


def build_mixture(config: ToyModel, sampler: Mapping[str, Any]) -> Model:
    """Two Gaussians at −2 and 2 with variance 1/4 (the fixture FX1 of the tests)."""
    process = GaussianProcess((1,), int(sampler.get("steps", 50)), float(sampler.get("eta", 1.0)))
    return Model(MixtureNetwork(process, config.hidden), process, "vector", name="toy-mixture")


def build_tokens(config: ToyTokens, sampler: Mapping[str, Any]) -> Model:
    """A Markov chain of three tokens over four letters (the fixture FX3 of the tests)."""
    network = TokenNetwork(config.hidden)
    length, vocab = network.ids.shape[1], len(network.start)
    process = MaskedProcess(length, vocab, int(sampler.get("steps", 8)), config.order)
    return Model(network, process, "sequence", name="toy-tokens")
