"""The linear-Gaussian chain FX2: every value, shift and law of it is a short sum.

x_T ~ N(0, 1), x_{i−1} = k_i x_i + c_i + s_i e with e ~ N(0, 1), and r(x_0) = b x_0 at temperature α.  The soft value
is linear, v_i(x) = A_i x + B_i, so the optimal kernel adds s_i² A_{i−1} / α to each mean and the optimal prior adds
A_T / α to its own.  Tensors over steps have index 0 at the last step, x_1 to x_0: step i stands at i − 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from dav_bench.core import Context, ExactValue, GaussianStep, Meter, MeteredReward, Model, Noise

STEPS = 20


def _row(start: float, end: float, steps: int = STEPS) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float64)


class Bias(nn.Module):
    """What a policy adds to the means of the chain: one number, one for each step, or a line for each step."""

    time_input = True

    def __init__(self, steps: int, dim: int, kind: Literal["shared", "step", "affine"] = "shared") -> None:
        super().__init__()
        self.steps, self.dim, self.kind = steps, dim, kind
        self.theta = nn.Parameter(torch.zeros(1 if kind == "shared" else steps, dtype=torch.float64))
        """(1,) or (T,) added to the means."""
        if kind == "affine":
            self.slope = nn.Parameter(torch.zeros(steps, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, D) shifts of the means at states x (B, D) and times t = i / T."""
        index = (t * self.steps).round().long() - 1
        shift = self.theta.expand(self.steps)[index][:, None].expand_as(x)
        return shift + self.slope[index][:, None] * x if self.kind == "affine" else shift


class LinearProcess:
    """The process of a chain; the network predicts what is added to a mean."""

    kind, eta = "gaussian", 1.0

    def __init__(self, chain: Chain) -> None:
        self.chain, self.T, self.shape = chain, len(chain.k), (chain.dim,)

    pack = unpack = clean = staticmethod(lambda x: x)

    def time(self, i: int | Tensor, x: Tensor) -> Tensor:
        """(B,) i / T."""
        return (torch.as_tensor(i).expand(len(x)) / self.T).to(x.dtype)

    def prior(self, noise: Noise, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.chain.start + self.chain.spread * noise.normal(*self.shape, dtype=dtype)

    def step(self, pred: Tensor, x: Tensor, i: int | Tensor) -> GaussianStep:
        """N(k_i x + c_i + pred, s_i²); `x0` is E[x_0 | x_i] where later steps are those of the chain."""
        at = torch.as_tensor(i).expand(len(x))
        k, c, s = (part.to(x)[at - 1, None] for part in (self.chain.k, self.chain.c, self.chain.s))
        mean = k * x + c + pred
        gain, rest = self.chain.gain[at - 1, None].to(x), self.chain.rest[at - 1, None].to(x)
        return GaussianStep(mean, s, gain * mean + rest)


@dataclass(frozen=True)
class Chain:
    """One chain with its reward and temperature, and all that is exact about it; `dim` independent copies."""

    k: Tensor = field(default_factory=lambda: _row(0.9, 0.9))
    c: Tensor = field(default_factory=lambda: _row(0.05, 0.1))
    s: Tensor = field(default_factory=lambda: _row(0.6, 0.2))
    b: float = 1.5
    alpha: float = 0.5
    dim: int = 1
    start: float = 0.0
    """Mean of the prior."""
    spread: float = 1.0
    """Standard deviation of the prior; 0 starts all in one state, as masks do."""

    def reward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B,) b Σ_d x_d of (B, D)."""
        return self.b * x.sum(-1)

    reward.domain, reward.provides = "vector", frozenset({"reward.grad"})  # type: ignore[attr-defined]

    @property
    def gain(self) -> Tensor:
        """(T + 1,) ∂E[x_0 | x_i]/∂x_i = Π_{u ≤ i} k_u."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.k.cumprod(0)])

    @property
    def rest(self) -> Tensor:
        """(T + 1,) E[x_0 | x_i = 0]."""
        return torch.cat([torch.zeros(1, dtype=torch.float64), (self.gain[:-1] * self.c).cumsum(0)])

    @property
    def A(self) -> Tensor:
        """(T + 1,) slopes of the soft values: A_0 = b, A_i = k_i A_{i−1}."""
        return self.b * self.gain

    @property
    def B(self) -> Tensor:
        """(T + 1,) v_i(0) of one dimension: B_i = B_{i−1} + A_{i−1} c_i + A_{i−1}² s_i² / 2α."""
        before = self.A[:-1]
        terms = before * self.c + before**2 * self.s**2 / (2 * self.alpha)
        return torch.cat([torch.zeros(1, dtype=torch.float64), terms.cumsum(0)])

    def value(self, x: Tensor, i: int) -> Tensor:
        """(B,) soft value v_i(x_i), exact."""
        return self.A[i] * x.sum(-1) + self.dim * self.B[i]

    @property
    def exact(self) -> ExactValue:
        """The soft value as searches take it."""
        return ExactValue(self.value)

    @property
    def shifts(self) -> Tensor:
        """(T,) what the optimal policy adds to the means: s_i² A_{i−1} / α."""
        return self.s**2 * self.A[:-1] / self.alpha

    @property
    def prior_shift(self) -> float:
        """What it adds to the mean of the prior: A_T / α at spread 1."""
        return self.spread**2 * float(self.A[-1]) / self.alpha

    @property
    def marginal(self) -> tuple[float, float]:
        """Mean and variance of x_0 in one dimension under the reference."""
        mean = float(self.gain[-1] * self.start + self.rest[-1])
        return mean, float(self.spread**2 * self.gain[-1] ** 2 + (self.gain[:-1] ** 2 * self.s**2).sum())

    @property
    def target(self) -> tuple[float, float]:
        """Mean and variance of x_0 in one dimension under p exp(r / α) / Z."""
        mean, var = self.marginal
        return mean + var * self.b / self.alpha, var

    @property
    def log_z(self) -> float:
        """log E[exp(r / α)]."""
        mean, var = self.marginal
        return self.dim * (mean * self.b / self.alpha + var * (self.b / self.alpha) ** 2 / 2)

    def model(self, kind: Literal["shared", "step", "affine"] = "shared") -> Model:
        """The pretrained model, with a trainable bias that is 0, and its reference taken."""
        model = Model(Bias(len(self.k), self.dim, kind), LinearProcess(self), "vector", name="chain")  # type: ignore[arg-type]
        model.reference()
        return model

    def context(
        self, kind: Literal["shared", "step", "affine"] = "shared", micro_batch: int | None = None
    ) -> Context:
        """A metered context, as a run makes it."""
        meter, model = Meter(), self.model(kind)
        model.attach(meter, micro_batch)
        return Context(model, model.reference(), MeteredReward(self.reward, meter, micro_batch), meter)  # type: ignore[arg-type]
