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

DENSITY = frozenset({"step.log_prob", "step.tilt", "step.kl"})
"""What a step gives that has noise of its own."""


def cosine(steps: int, floor: float = 1e-4) -> Tensor:
    """(T + 1,) signal share cos²(πi/2T), clean first (Nichol and Dhariwal 2021 without the offset)."""
    return (torch.linspace(0, math.pi / 2, steps + 1, dtype=torch.float64).cos() ** 2).clamp(floor, 1.0)


class GaussianProcess:
    """DDPM (eta = 1) and DDIM (eta < 1) on a grid of signal shares (Song et al. 2021, equations 12 and 16).

    Args:
        shape: of a state.
        steps: T.
        eta: share of DDPM's noise in a step; 0 is an ODE.
        alphas_bar: (T + 1,) signal shares, clean first; those of the cosine schedule by default.
        prediction: what the network predicts.
        times: (T + 1,) what the network is told at each index; i / T by default.
    """

    kind = "gaussian"

    def __init__(
        self,
        shape: tuple[int, ...],
        steps: int = 50,
        eta: float = 1.0,
        alphas_bar: Tensor | None = None,
        prediction: Literal["x0", "eps", "v"] = "x0",
        times: Tensor | None = None,
    ) -> None:
        self.shape, self.T, self.eta, self.prediction = tuple(shape), steps, eta, prediction
        self.alphas_bar = cosine(steps) if alphas_bar is None else alphas_bar.double()
        self.times = torch.arange(steps + 1) / steps if times is None else times
        for name, table in (("alphas_bar", self.alphas_bar), ("times", self.times)):
            if len(table) != steps + 1:
                raise ValueError(f"{name} has {len(table)} entries for {steps} steps; it needs {steps + 1}")

    @property
    def provides(self) -> frozenset[str]:
        """Capabilities beyond those of any chain: a deterministic chain has no densities, and only with all the
        noise of DDPM does x_0 not depend on x_T."""
        noisy = DENSITY if self.eta else frozenset()
        return noisy | {"continuous"} | ({"step.memoryless"} if self.eta == 1 else set())

    @staticmethod
    def _at(table: Tensor, i: int | Tensor, x: Tensor) -> Tensor:
        """(B, 1, ...) entries i of a table, in the dtype of x."""
        index = torch.as_tensor(i).expand(len(x)).to(table.device)
        return table[index].to(x).view(-1, *[1] * (x.ndim - 1))

    def share(self, i: int | Tensor, x: Tensor) -> Tensor:
        """Signal share at i, (B, 1, ...) in the dtype of x."""
        return self._at(self.alphas_bar, i, x)

    def time(self, i: int | Tensor, x: Tensor) -> Tensor:
        """(B,) what the network is told: i / T, or the entry of `times`."""
        return self._at(self.times, i, x).flatten()

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

    def distance(self, x0: Tensor, other: Tensor, x: Tensor, i: int | Tensor) -> Tensor:
        """(B,) the error that `loss` measures, between two clean predictions from x_i."""
        a = self.share(i, x)
        eps = (a.sqrt() / (1 - a).clamp_min(1e-12).sqrt()) * (x0 - other)
        return (eps**2).flatten(1).mean(1)


class ConsistencyProcess(GaussianProcess):
    """Multistep consistency sampling: predict x_0, then noise it anew to the next level (Song et al. 2023,
    algorithm 1; latent consistency models, Luo et al. 2023).

    p(x_{i−1} | x_i) = N(√b f(x_i), 1 − b), b the share at i − 1, so that every step has a density but the last
    one, which is f itself: share 1 at index 0.  f(x_i) = c_skip x_i + c_out x̂_0.

    Args:
        shape: as of a Gaussian process, and so are steps, alphas_bar, prediction and times.
        skip: (T + 1,) c_skip at each index.
        out: (T + 1,) c_out.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        steps: int,
        alphas_bar: Tensor,
        skip: Tensor,
        out: Tensor,
        prediction: Literal["x0", "eps", "v"] = "eps",
        times: Tensor | None = None,
    ) -> None:
        super().__init__(shape, steps, 1.0, alphas_bar, prediction, times)
        self.skip, self.out = skip, out

    @property
    def provides(self) -> frozenset[str]:
        """x_0 depends on x_T through every prediction, whatever the noise."""
        return frozenset({"continuous"}) | (DENSITY if self.T > 1 else frozenset())

    def step(self, pred: Tensor, x: Tensor, i: int | Tensor) -> GaussianStep:
        x0 = self._at(self.skip, i, x) * x + self._at(self.out, i, x) * self._pair(pred, x, i)[0]
        b = self.share(torch.as_tensor(i) - 1, x)
        return GaussianStep(b.sqrt() * x0, (1 - b).clamp_min(0).sqrt(), x0)


class FlowProcess(GaussianProcess):
    """Flow matching on straight paths x_i = (1 − σ) x_0 + σ ε, σ from 1 to 0, as an SDE with the same marginals
    (Flow-GRPO, arXiv 2505.05470, equation 9; `sde_step_with_logprob` of its code).

    The network predicts the velocity u ≈ E[ε − x_0 | x_i].  With g² = η² σ / (1 − σ) and d = σ_i − σ_{i−1},

        p(x_{i−1} | x_i) = N(x_i − (u + g² / (2σ) (x_i + (1 − σ) u)) d, g² d)

    which is Euler-Maruyama of the reverse SDE, x_i + (1 − σ) u being E[ε | x_i]: exact marginals in small steps, an
    exact density in any.  At σ = 1 the next level stands in for it in 1 − σ, as in the released code.  η = 0 is the
    ODE of `FlowMatchEulerDiscreteScheduler`, which has no densities.

    Args:
        shape: of a state.
        sigmas: (T + 1,) noise levels, clean first: sigmas[0] = 0.
        eta: noise level of the SDE; Flow-GRPO trains at 0.7.
        times: (T + 1,) what the network is told; σ by default.
    """

    def __init__(
        self, shape: tuple[int, ...], sigmas: Tensor, eta: float = 0.7, times: Tensor | None = None
    ) -> None:
        self.sigmas = sigmas.double()
        times = self.sigmas if times is None else times
        super().__init__(shape, len(sigmas) - 1, eta, (1 - self.sigmas) ** 2, "v", times)
        # where σ = 1 the share of signal of the next level; a single step from noise has none, and takes a half
        level = self.sigmas.clamp(max=float(self.sigmas[-2]) or 0.5)
        self.spread = eta * (self.sigmas / (1 - level)).sqrt()

    @property
    def provides(self) -> frozenset[str]:
        """Noise near σ = 1 stays finite, so that x_0 keeps some memory of x_T at any η."""
        return super().provides - {"step.memoryless"}

    def _pair(self, pred: Tensor, x: Tensor, i: int | Tensor) -> tuple[Tensor, Tensor]:
        sigma = self._at(self.sigmas, i, x)
        return x - sigma * pred, x + (1 - sigma) * pred

    def step(self, pred: Tensor, x: Tensor, i: int | Tensor) -> GaussianStep:
        sigma, after = (self._at(self.sigmas, at, x) for at in (i, torch.as_tensor(i) - 1))
        g, d = self._at(self.spread, i, x), sigma - after
        x0, eps = self._pair(pred, x, i)
        return GaussianStep(x - (pred + g**2 / (2 * sigma) * eps) * d, g * d.sqrt(), x0)

    def corrupt(self, x0: Tensor, i: int | Tensor, noise: Noise) -> Tensor:
        sigma = self._at(self.sigmas, i, x0)
        return (1 - sigma) * x0 + sigma * noise.normal(*x0.shape[1:], dtype=x0.dtype)

    def loss(self, pred: Tensor, x0: Tensor, x: Tensor, i: int | Tensor) -> Tensor:
        """(B,) squared error of the velocity, averaged over dimensions (conditional flow matching)."""
        return self.distance(x - self._at(self.sigmas, i, x) * pred, x0, x, i)

    def distance(self, x0: Tensor, other: Tensor, x: Tensor, i: int | Tensor) -> Tensor:
        return (((x0 - other) / self._at(self.sigmas, i, x)) ** 2).flatten(1).mean(1)


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
    provides = DENSITY | {"tokens"}

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
