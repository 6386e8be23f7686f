"""Adjoint matching: the reward gradient is carried back through the pretrained chain and regressed onto its steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .model import chunks
from .noise import Noise
from .protocols import Batch, Context, Item, Loss, NonFinite
from .steps import GaussianStep


def _finite(what: str, value: Tensor) -> Tensor:
    if not value.isfinite().all():
        raise NonFinite(what, int((~value.isfinite()).sum()), value.numel())
    return value


def reward_gradient(ctx: Context, batch: Batch) -> Tensor:
    """(B, ...) ∂r/∂x_0 of each sample; one reward row forward and backward each."""
    x0, parts = ctx.policy.unpack(batch.states[-1]), []
    for c in chunks(len(x0), ctx.policy.micro_batch):
        with torch.enable_grad():
            x = x0[c].detach().requires_grad_(True)
            cond = None if batch.cond is None else batch.cond[c]
            value = ctx.score(ctx.policy, ctx.policy.process.clean(x), cond)
            parts.append(torch.autograd.grad(value.sum(), x)[0])
    ctx.meter.count("reward_backward", len(x0))
    return _finite("the reward gradient", torch.cat(parts))


def lean_adjoints(
    ctx: Context, batch: Batch, alpha: float, first: bool = True
) -> Iterator[tuple[int, GaussianStep, Tensor, Tensor]]:
    """(i, p_ref(·|x_i), a_{i−1}, a_i) from the last step, i = 1, to the first.

    a_0 = −∂r/∂x_0 / α and a_i = (∂μ_ref(x_i)/∂x_i)ᵀ a_{i−1}, all (B, ...): "lean" because the chain is
    differentiated as if it were the pretrained one, whose network is the only one run backwards, a step at a time
    (arXiv 2409.08861, section 5.2).  Without `first`, a_T is not computed and given as a_{T−1}.
    """
    after = reward_gradient(ctx, batch) / -alpha
    for i in range(1, batch.steps + 1):
        x = ctx.reference.unpack(batch.states[batch.steps - i])
        back = first or i < batch.steps
        steps, befores = [], []
        for c in chunks(len(x), ctx.policy.micro_batch):
            with torch.set_grad_enabled(back):
                here = x[c].detach().requires_grad_(back)
                step = ctx.reference.step(here, i, None if batch.cond is None else batch.cond[c])
                if back:
                    befores.append(torch.autograd.grad(step.mean, here, after[c])[0])
            steps.append((step.mean.detach(), step.std, step.x0.detach()))  # type: ignore[union-attr]
        before = torch.cat(befores) if back else after
        if back:
            ctx.reference.count("backward", len(x))
        yield i, GaussianStep(*(torch.cat(part) for part in zip(*steps, strict=True))), after, before
        after = _finite("the adjoint", before)


class Threshold(nn.Module):
    """A running quantile of what the updates before this one saw."""

    def __init__(self) -> None:
        super().__init__()
        self.level: Tensor
        self.updates: Tensor
        self.register_buffer("level", torch.full((), torch.inf, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.seen: list[Tensor] = []

    def follow(self, quantile: float) -> None:
        """Takes in what was seen: the first value, the mean of two, then a moving average of rate 0.1 (release)."""
        now = torch.cat(self.seen).double().quantile(quantile).to(self.level.device)
        rate = (1.0, 0.5)[int(self.updates)] if self.updates < 2 else 0.1
        self.level.copy_(now if rate == 1 else self.level + rate * (now - self.level))
        self.updates += 1
        self.seen = []


@dataclass(frozen=True)
class AdjointMatching(Loss):
    """|(μ_θ(x_i) − μ_ref(x_i)) / s_i + s_i a_{i−1}|² of the steps of a rollout, s_i the standard deviation.

    The minimiser shifts each mean by −s² E[a_{i−1} | x_i], which is the tilt of the pretrained step by the lean
    adjoint.  Where x_0 does not depend on x_T ("memoryless": DDPM, η = 1) its fixed point in small steps is
    p_ref exp(r / α) / Z; elsewhere the law of x_T would have to be tilted too.  Steps without noise cannot be
    controlled and are left out.

    Rows of each sample: T of the rollout, T of the pretrained model forward and T − 1 backward, and the steps
    that are fitted forward and backward (Domingo-Enrich et al. 2025, arXiv 2409.08861).
    """

    alpha: float = 0.01
    """Temperature of the target; 1/α is the paper's λ."""
    at: Literal["arrival", "departure"] = "arrival"
    """The adjoint of a step: a_{i−1}, which is exact for linear chains, or a_i, as on a grid of continuous time
    (paper, release)."""
    times: Literal["all", "late", "split"] = "all"
    """Steps fitted: all; the last quarter and as many of the rest, drawn for each sample (paper, as FAV's port has
    it); or `picked`, half of them from the last 40 % (release)."""
    picked: int = 4
    """Steps fitted with times="split"."""
    quantile: float = 1.0
    """Below 1: leave out items whose error exceeds a running quantile of the updates before (release: 0.9)."""
    limit: float = 0.0
    """Above 0: cut the loss of an item at `limit` / α², beyond which it has no gradient (FAV's port: 1.6)."""

    requires = frozenset({"step", "continuous", "step.memoryless", "reference", "reward.grad"})

    def __post_init__(self) -> None:
        if self.alpha <= 0 or not 0 < self.quantile <= 1 or self.picked < 1 or self.limit < 0:
            raise ValueError("alpha must be above 0, quantile in (0, 1], picked 1 or more, limit 0 or more")

    def modules(self, ctx: Context) -> dict[str, nn.Module]:
        return {"threshold": Threshold().to(ctx.policy.device)} if self.quantile < 1 else {}

    def _chosen(self, steps: int, noise: Noise) -> Tensor:
        """(T, B) True for the steps of each sample that are fitted, first step first."""
        u = noise.uniform(steps)
        if self.times == "all":
            return torch.ones_like(u, dtype=torch.bool).T

        def some(part: Tensor, count: int) -> Tensor:
            return part.argsort(1).argsort(1) < count

        if self.times == "late":
            border = max(1, 3 * steps // 4)
            rest = torch.ones_like(u[:, border:], dtype=torch.bool)
            return torch.cat([some(u[:, :border], max(1, steps // 4)), rest], 1).T
        border, half = round(0.6 * steps), self.picked // 2
        return torch.cat([some(u[:, :border], half), some(u[:, border:], self.picked - half)], 1).T

    def prepare(self, ctx: Context, batch: Batch, noise: Noise) -> None:
        """Adds the columns `target` (T, B, ...), means of the tilted steps, and `fitted` (T, B); all steps known."""
        targets, noisy, largest = [], [], batch.reward.new_zeros(())
        for _, step, after, before in lean_adjoints(ctx, batch, self.alpha, first=self.at == "departure"):
            a = after if self.at == "arrival" else before
            targets.append(step.tilt(-a).mean)
            noisy.append((step.std > 0).flatten(1).all(1))
            largest = torch.maximum(largest, after.flatten(1).norm(dim=1).max().to(largest))
        batch.per_step["target"] = torch.stack(targets[::-1])
        batch.per_step["fitted"] = torch.stack(noisy[::-1]) & self._chosen(batch.steps, noise.repeat(len(a)))
        batch.stats["adjoint_max"] = float(largest)

    def active(self, batch: Batch) -> Tensor:
        return batch.per_step["fitted"].flatten()

    def __call__(self, ctx: Context, item: Item) -> Tensor:
        step = ctx.policy.step(item.x, item.i, item.cond)
        std = torch.where(step.std > 0, step.std, torch.inf)  # type: ignore[union-attr]
        value = (((step.mean - item.columns["target"]) / std) ** 2).flatten(1).sum(1)
        if self.limit:
            cut = self.limit / self.alpha**2
            item.note("clipped", (value > cut).to(value))
            value = value.clamp(max=cut)
        if self.quantile < 1:
            held: Threshold = ctx.modules["threshold"]  # type: ignore[assignment]
            error = value.detach().sqrt()
            held.seen.append(error)
            keep = error <= held.level
            item.note("dropped", (~keep).to(value))
            value = value * keep
        return value

    def updated(self, ctx: Context) -> None:
        if "threshold" in ctx.modules and ctx.modules["threshold"].seen:
            ctx.modules["threshold"].follow(self.quantile)  # type: ignore[operator]
