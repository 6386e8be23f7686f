"""Stein variational gradient descent, amortised: particles are moved towards the tilted law and the model follows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Model, chunks
from .noise import Noise
from .process import MaskedProcess
from .protocols import Batch, Context, Item, Loss, NonFinite
from .search import _CHILD, _PRIOR

_REFERENCE = 8  # purpose of noise, after those of searches and of other losses


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(..., K, M) of points (..., K, D) and (..., M, D), from differences: products would cancel far from 0."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2


def kde_score(
    x: Tensor, data: Tensor, taus: Tensor, form: Literal["softmax", "clamp"] = "softmax"
) -> tuple[Tensor, Tensor]:
    """(..., K, D) ∇ log Z(x) and (..., K) log Z(x), Z = Σ_h Σ_m exp(−|x − y_m|² / τ_h), of data y (..., M, D).

    With kernel weights k_hm the score is Σ (2 / τ_h) k_hm (y_m − x) / Z: a softmax over data and kernels, which
    never underflows.  `clamp` is the released form on images, whose Z is at least 1e-6, so that it fades far from all
    data; the released toy has this Z in the numerator too, where it is a pull of −2x/τ to the origin.
    """
    logits = -squared_distances(x, data)[..., None] / taus  # (..., K, M, H)
    log_z = logits.flatten(-2).logsumexp(-1)
    below = log_z if form == "softmax" else log_z.clamp_min(math.log(1e-6))
    weight = ((logits - below[..., None, None]).exp() * (2 / taus)).sum(-1)
    return weight @ data - weight.sum(-1, keepdim=True) * x, log_z


def drift(x: Tensor, score: Tensor, taus: Tensor, repulsion: float = 1.0) -> tuple[Tensor, Tensor]:
    """(..., K, D) SVGD velocity of particles (..., K, D) and their kernel (..., K, K).

    φ(x_i) = (1/K) Σ_j [k(x_j, x_i) S(x_j) + ∇_{x_j} k(x_j, x_i)], k(x, y) = Σ_h exp(−|x − y|² / τ_h); the last term
    is Σ_h (2 / τ_h) (x_i − x_j) k_h, a repulsion.  Scaled by c it has the stationary density q^{1/c} in the limit
    of many particles, where S is the score of q.
    """
    kernels = (-squared_distances(x, x)[..., None] / taus).exp()
    kernel, push = kernels.sum(-1), (kernels * (2 / taus)).sum(-1)
    centred = x - x.mean(-2, keepdim=True)
    away = push.sum(-1, keepdim=True) * centred - push @ centred
    return (kernel @ score + repulsion * away) / x.shape[-2], kernel


@dataclass(frozen=True)
class Stein(Loss):
    """Regression of samples onto themselves moved by one SVGD step to p_ref exp(β r) (FAV, arXiv 2605.26552).

    Whole samples are items, drawn by the loss itself.  `prepare` draws K particles and M reference particles of each
    group without graph, and their drift φ.  The loss draws the same particles from the same streams again,
    differentiably through all steps of the chain, and is the mean over dimensions of (f − sg(f + φ))², so that its
    gradient is −(2 / D) φ ∂f/∂θ; its value says nothing.  f is the sample itself or features of the reward.

    No density and no noise schedule is used: a one-step generator, which is a Gaussian process of one step with
    η = 0, is trained like a chain.  On tokens the chain is differentiated straight through.

    Rows of each sample: 2 T + T M / K forward, T backward; one of the reward with its gradient, or with features
    2 + M / K.
    """

    beta: float = 1.0
    """β = 1 / α."""
    taus: tuple[float, ...] = (0.3,)
    """Widths of the kernels, of variance τ / 2; the score is that of p_ref made wider by this variance."""
    bandwidth: Literal["fixed", "median"] = "fixed"
    """Widths as they are, or in units of the median squared distance between reference particles of a group."""
    repulsion: float = 1.0
    """1 is SVGD; released image code has a half, whose target is (p_ref exp(β r))²."""
    score: Literal["softmax", "clamp"] = "softmax"
    """Score of the reference density: as a softmax, or with the released floor of 1e-6 under its kernels."""
    particles: int | None = None
    """K: samples of a group (one prompt), in the order of the batch; None: all of the batch."""
    references: int | None = None
    """M: reference particles of a group; None: as many as particles."""
    features: Literal["identity", "reward"] = "identity"
    """Where particles live: samples of a continuous model, or the features a reward looks at."""

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        space = "continuous" if self.features == "identity" else "reward.features"
        return frozenset({"sample", "step.rsample", "reference", "reward.grad", space})

    # ---- samples and where they live
    @staticmethod
    def sample(model: Model, x: Tensor, keys: Noise, cond: Tensor | None) -> Tensor:
        """x_0 from x_T as a function of the weights; on continuous spaces what `Rollout` draws from these streams."""
        for i in range(model.process.T, 0, -1):
            x = model.step(x, i, cond).rsample(keys.fold(i, _CHILD))
            if torch.is_grad_enabled():
                model.count("backward", len(x))
        return x

    def embed(self, ctx: Context, x: Tensor) -> Tensor:
        """(B, D) particles of states x_0."""
        clean = ctx.policy.process.clean(x)
        if self.features == "identity":
            return clean.flatten(1)
        if isinstance(ctx.policy.process, MaskedProcess):  # one-hot, straight through
            hard = F.one_hot(clean.argmax(-1), clean.shape[-1]).to(clean)
            clean = hard + (clean - clean.detach())
        return ctx.reward.features(ctx.shown(ctx.policy, clean)).flatten(1)  # type: ignore[attr-defined]

    def reward(self, ctx: Context, f: Tensor, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B,) rewards of particles f (B, D) of states x, and their gradients (B, D)."""
        values, grads = [], []
        for c in chunks(len(f), ctx.policy.micro_batch):
            part = f[c].detach().requires_grad_(True)
            some = None if cond is None else cond[c]
            with torch.enable_grad():
                if self.features == "identity":
                    value = ctx.score(ctx.policy, part.view_as(ctx.policy.process.clean(x[c])), some)
                    ctx.meter.count("reward_backward", len(value))
                else:
                    value = ctx.reward.head(part, some)  # type: ignore[attr-defined]
                (g,) = torch.autograd.grad(value.sum(), part)
            values.append(value.detach())
            grads.append(g)
        return torch.cat(values), torch.cat(grads)

    # ---- pass 1
    @torch.no_grad()
    def prepare(self, ctx: Context, batch: Batch, noise: Noise) -> None:
        if batch.keys is None or batch.unit != "sample":
            raise ValueError("this loss draws its samples itself; its search is Seeds()")
        K = self.particles or len(batch)
        if len(batch) % K:
            raise ValueError(f"{len(batch)} samples cannot be split into groups of {K} particles")
        keys, cond, groups = batch.keys, batch.cond, len(batch) // K
        x = self.sample(ctx.policy, ctx.policy.unpack(batch.states[0]), keys, cond)
        f = self.embed(ctx, x)
        y = self._reference(ctx, keys[::K], None if cond is None else cond[::K], self.references or K)
        reward, grad = self.reward(ctx, f, x, cond)
        f, y, grad = (
            (v if v.dtype == torch.float64 else v.float()).view(groups, -1, v.shape[1]) for v in (f, y, grad)
        )
        taus = f.new_tensor(self.taus) * self._unit(y)
        score, log_z = kde_score(f, y, taus, self.score)
        phi, kernel = drift(f, score + self.beta * grad, taus, self.repulsion)
        if not phi.isfinite().all():
            raise NonFinite("the drift of the particles", int((~phi.isfinite()).sum()), phi.numel())
        batch.per_sample["drift"] = phi.flatten(0, 1)
        batch.states[-1] = ctx.policy.process.pack(x)
        batch.reward = reward
        apart = (kernel.sum() / len(self.taus) - len(batch)) / max(1, len(batch) * (K - 1))
        pull, hold = (v.norm(dim=-1).mean() for v in (self.beta * grad, score))
        batch.stats |= {
            "log_z_min": float(log_z.min()),  # far below 0 no reference is near
            "kernel": float(
                apart
            ),  # mean between two particles: near 0 they do not meet, near 1 they are one
            "reward_pull": float(pull / hold.clamp_min(1e-30)),  # |β ∇r| over |score of the reference|
            "drift": float(phi.norm(dim=-1).mean()),
        }

    def _reference(self, ctx: Context, first: Noise, cond: Tensor | None, M: int) -> Tensor:
        """(groups * M, D) particles of the frozen model, from streams of their own."""
        keys = first.fold(_REFERENCE).repeat(M)
        many = None if cond is None else cond.repeat_interleave(M, 0)
        x = ctx.reference.process.prior(keys.fold(_PRIOR), dtype=ctx.reference.dtype)
        return self.embed(ctx, self.sample(ctx.reference, x, keys, many))

    def _unit(self, y: Tensor) -> Tensor:
        """(groups or 1, 1, 1, 1) what the widths are multiples of."""
        if self.bandwidth == "fixed":
            return y.new_ones(1, 1, 1, 1)
        M = y.shape[1]
        above = torch.ones(M, M, dtype=torch.bool, device=y.device).triu(1)
        return squared_distances(y, y)[:, above].median(1).values.clamp_min(1e-12).view(-1, 1, 1, 1)

    # ---- pass 2
    def __call__(self, ctx: Context, item: Item) -> Tensor:
        if item.keys is None or "drift" not in item.columns:
            raise ValueError("this loss draws its samples again; its search is Seeds()")
        f = self.embed(ctx, self.sample(ctx.policy, item.x, item.keys, item.cond))
        if self.features == "reward":
            ctx.meter.count("reward_backward", len(f))
        moved = (f + item.columns["drift"].to(f)).detach()
        return ((f - moved) ** 2).mean(1)
