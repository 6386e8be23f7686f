"""Processes: how a clean sample becomes noise on a grid of T steps, and what law undoes one step.

Time is a grid index i = T (pure noise) … 0 (clean), an int or a LongTensor (B,); schedules and the direction
of time stay in here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .noise import Noise
from .steps import GaussianStep, MaskedStep, SingleRevealStep


def cosine(steps: int, floor: float = 1e-4) -> Tensor:
    """(T + 1,) signal share cos²(πi/2T), clean first (Nichol and Dhariwal 2021 without the offset)."""
    return (torch.linspace(0, math.pi / 2, steps + 1, dtype=torch.float64).cos() ** 2).clamp(floor, 1.0)


class GaussianProcess:
    """DDPM (eta = 1) and DDIM (eta < 1) on a grid of signal shares (Song et al. 2021, equations 12 and 16)."""

    kind = "gaussian"

    def __init__(
        self,
        shape: tuple[int, ...],
        steps: int = 50,
        eta: float = 1.0,
        alphas_bar: Tensor | None = None,
        prediction: Literal["x0", "eps", "v"] = "x0",
    ) -> None:
        self.shape, self.T, self.eta, self.prediction = tuple(shape), steps, eta, prediction
        self.alphas_bar = cosine(steps) if alphas_bar is None else alphas_bar.double()
        if len(self.alphas_bar) != steps + 1:
            raise ValueError(
                f"alphas_bar has {len(self.alphas_bar)} entries for {steps} steps; it needs {steps + 1}"
            )

    def share(self, i: int | Tensor, x: Tensor) -> Tensor:
        """Signal share at i, (B, 1, ...) in the dtype of x."""
        index = torch.as_tensor(i).expand(len(x)).to("cpu")
        return self.alphas_bar[index].to(x).view(-1, *[1] * (x.ndim - 1))

    def time(self, i: int | Tensor, x: Tensor) -> Tensor:
        """(B,) what the network is told: i / T."""
        return (torch.as_tensor(i, device=x.device).expand(len(x)) / self.T).to(x.dtype)

    def prior(self, noise: Noise, dtype: torch.dtype = torch.float32) -> Tensor:
        return noise.normal(*self.shape, dtype=dtype)

    def clean(self, x: Tensor) -> Tensor:
        """The clean sample a state x_0 stands for."""
        return x

    pack = unpack = staticmethod(lambda x: x)

    def _pair(self, pred: Tensor, x: Tensor, i: int | Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, eps) from what the network predicts."""
        a = self.share(i, x)
        if self.prediction == "x0":
            return pred, (x - a.sqrt() * pred) / (1 - a).clamp_min(1e-12).sqrt()
        if self.prediction == "eps":
            return (x - (1 - a).sqrt() * pred) / a.sqrt(), pred
        return a.sqrt() * x - (1 - a).sqrt() * pred, a.sqrt() * pred + (1 - a).sqrt() * x

    def step(self, pred: Tensor, x: Tensor, i: int | Tensor) -> GaussianStep:
        """p(x_{i-1} | x_i): variance η² (1−b)/(1−a) (1−a/b), mean √b x̂_0 + √(1−b−σ²) ε̂; a, b the shares at i, i−1."""
        a, b = self.share(i, x), self.share(torch.as_tensor(i) - 1, x)
        x0, eps = self._pair(pred, x, i)
        var = (self.eta**2 * (1 - b) / (1 - a) * (1 - a / b)).clamp_min(0)
        return GaussianStep(b.sqrt() * x0 + (1 - b - var).clamp_min(0).sqrt() * eps, var.sqrt(), x0)

    def corrupt(self, x0: Tensor, i: int | Tensor, noise: Noise) -> Tensor:
        """q(x_i | x_0)."""
        a = self.share(i, x0)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise.normal(*x0.shape[1:], dtype=x0.dtype)

    def loss(self, pred: Tensor, x0: Tensor, x: Tensor, i: int | Tensor) -> Tensor:
        """(B,) squared error of the noise, averaged over dimensions (DDPM's simple loss)."""
        a = self.share(i, x)
        eps = (x - a.sqrt() * x0) / (1 - a).clamp_min(1e-12).sqrt()
        return ((self._pair(pred, x, i)[1] - eps) ** 2).flatten(1).mean(1)


@dataclass
class MaskedProcess:
    """Absorbing-state diffusion of tokens (MDLM, Sahoo et al. 2024) with the log-linear schedule.

    A position is masked at i with chance m_i = i / T: log-linear noise σ(t) = −log(1 − t) on an even grid.  A
    reverse step reveals a masked position with chance 1 − m_{i−1}/m_i = 1/i and copies the rest; m_0 = 0, so the
    last step reveals all that is left and needs no separate noise removal.  Revealing one position at a time
    (`order="random"`, T = length) makes the chain exact; the default reveals them independently.
    """

    length: int
    vocab: int
    steps: int = 64
    order: Literal["parallel", "random"] = "parallel"
    kind = "masked"

    def __post_init__(self) -> None:
        self.T = self.length if self.order == "random" else self.steps

    @staticmethod
    def _index(i: int | Tensor, x: Tensor) -> Tensor:
        """(B, 1, 1) grid index in the dtype of x."""
        return torch.as_tensor(i, device=x.device).expand(len(x)).to(x.dtype).view(-1, 1, 1)

    def chance(self, i: int | Tensor, x: Tensor) -> Tensor:
        """(B, 1, 1) mask probability m_i."""
        return self._index(i, x) / self.T

    def time(self, i: int | Tensor, x: Tensor) -> Tensor:
        """(B,) what the network is told: the mask probability."""
        return self.chance(i, x).flatten()

    def prior(self, noise: Noise, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.zeros(len(noise), self.length, self.vocab + 1, dtype=dtype, device=noise.keys.device)
        x[..., -1] = 1
        return x

    def clean(self, x: Tensor) -> Tensor:
        """(B, L, V) of a fully revealed state."""
        return x[..., :-1]

    def pack(self, x: Tensor) -> Tensor:
        """(B, L) token ids, the mask being V: what trajectories are stored as."""
        return x.argmax(-1).to(torch.uint8 if self.vocab < 256 else torch.int32)

    def unpack(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return F.one_hot(ids.long(), self.vocab + 1).to(dtype)

    def step(self, pred: Tensor, x: Tensor, i: int | Tensor) -> MaskedStep:
        """`pred`: (B, L, V) token logits; the mask gets no probability and revealed tokens are kept (SUBS)."""
        log_probs = pred.log_softmax(-1)
        if self.order == "random":
            return SingleRevealStep.uniform(log_probs, x)
        return MaskedStep(log_probs, 1 / self._index(i, x), x)  # 1 / (m_i T) rounds to more than 1 at i = 1

    def corrupt(self, x0: Tensor, i: int | Tensor, noise: Noise) -> Tensor:
        """(B, L, V + 1): x0, (B, L, V), with each position masked with chance m_i (`random`: exactly i of them)."""
        u = noise.uniform(self.length, 1, dtype=x0.dtype)
        if self.order == "random":
            hide = u.argsort(1).argsort(1) < self._index(i, x0)
        else:
            hide = u < self.chance(i, x0)
        x = F.pad(x0, (0, 1))
        mask = F.one_hot(torch.tensor(self.vocab, device=x0.device), self.vocab + 1).to(x)
        return torch.where(hide, mask, x)

    def loss(self, pred: Tensor, x0: Tensor, x: Tensor, i: int | Tensor) -> Tensor:
        """(B,) one term of the negative ELBO in nats; its mean over i uniform in 1 … T is the bound (MDLM, eq. 10)."""
        nll = -(x0 * pred.log_softmax(-1)).sum(-1) * x[..., -1]
        return nll.sum(1) / self.chance(i, x)[:, 0, 0]


Process = GaussianProcess | MaskedProcess
