"""Weighted likelihood: fits to own samples that count by what they are worth (RWR, VIDD)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from .advantage import grouped
from .count import Count
from .noise import Noise
from .protocols import Batch, Context, Item, Loss, NonFinite, Value
from .replay import replay, stochastic
from .value import PosteriorMean

_CORRUPT = 1  # purpose of noise


class Weighting(Protocol):
    """Log-weights (B,) of samples or (T, B) of steps."""

    @property
    def requires(self) -> frozenset[str]: ...

    def __call__(self, ctx: Context, batch: Batch) -> Tensor: ...


def effective(weight: Tensor) -> float:
    """Effective share of weights (n,): 1 where all are equal, 1/n where one has all, 0 where none has any."""
    w = weight.double() / weight.double().max().clamp_min(1e-300)
    return float(w.sum() ** 2 / (w**2).sum().clamp_min(1e-300) / len(w))


@dataclass(frozen=True)
class RewardWeights:
    """exp(r / α) normalised to mean 1 among the samples of each prompt, or the best share of them alone.

    Reward-weighted regression (Peters and Schaal 2007) as the baseline of DDPO (arXiv 2305.13301, section 4.2).
    """

    alpha: float = 1.0
    form: Literal["exp", "sparse"] = "exp"
    keep: float = 0.1
    """Share of samples that `sparse` fits."""

    requires = frozenset[str]()

    def __call__(self, ctx: Context, batch: Batch) -> Tensor:
        """(B,) log-weights; −inf for samples left out."""
        r = batch.reward.double()
        group = torch.zeros_like(r, dtype=torch.long) if batch.cond is None else grouped(batch, 1)
        out = torch.empty_like(r)
        for g in group.unique():
            mine = group == g
            n = int(mine.sum())
            if self.form == "exp":
                out[mine] = (r[mine] / self.alpha).log_softmax(0)
            else:
                least = r[mine].topk(max(1, round(self.keep * n))).values[-1]
                out[mine] = torch.where(r[mine] >= least, 0.0, -torch.inf).to(r).log_softmax(0)
            out[mine] += torch.tensor(float(n), dtype=r.dtype).log()
        return out


@dataclass(frozen=True)
class GainWeights:
    """exp((V(x_{i−1}) − V(x_i)) / α) of each step: the soft-optimal step against the one it was drawn from (VIDD).

    With the soft value the weights of a state have mean 1.  The model that drew the step is the prior of the tilt,
    so that each time it is renewed the next tilt comes on top of the last.  With `prior="ref"` the prior is the
    pretrained model, by the ratio of the two, and so are the values.
    """

    alpha: float = 1.0
    prior: Literal["old", "ref"] = "old"
    value: Value = field(default_factory=PosteriorMean)
    """V where the prior is the pretrained model; else the search keeps them, by the model that drew the steps."""

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"step.log_prob", "reference"}) if self.prior == "ref" else frozenset()

    def __call__(self, ctx: Context, batch: Batch) -> Tensor:
        """(T, B) log-weights."""
        if self.prior == "old":
            if "gain" not in batch.per_step:
                raise ValueError("the search kept no values; use Rollout(value=...)")
            return batch.per_step["gain"].double() / self.alpha
        if "log_prob" not in batch.per_step:
            raise ValueError("the search kept no log-probabilities; use Rollout(log_prob=True)")
        seen = replay(ctx, ctx.reference, batch, self.value)
        assert seen.gain is not None
        ratio = seen.log_prob() - batch.per_step["log_prob"]
        return seen.gain.double() / self.alpha + ratio.double()


@dataclass(frozen=True)
class WeightedLikelihood(Loss):
    """−w log p_θ(x_{i−1} | x_i), or the weighted denoising loss of x_0, over a search's own samples."""

    weights: Weighting = field(default_factory=RewardWeights)
    target: Literal["transition", "denoise"] = "transition"
    """The steps taken, or the final sample corrupted anew: denoising as a single step (DDPO's baselines)."""
    reduce: Literal["sum", "mean"] = "sum"
    """Log-likelihood of steps: summed over dimensions, or averaged."""
    refresh: int | None = None
    """Keep the network `old`, which a search may roll in with, and renew it after so many updates; None: no such."""

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        return self.weights.requires | {"step.log_prob" if self.target == "transition" else "corrupt"}

    def modules(self, ctx: Context) -> dict[str, nn.Module]:
        if self.refresh is None:
            return {}
        old = copy.deepcopy(ctx.policy.network).requires_grad_(False).eval()
        return {"old": old, "updates": Count().to(ctx.policy.device)}

    def updated(self, ctx: Context) -> None:
        if self.refresh is None:
            return
        count = ctx.modules["updates"]
        assert isinstance(count, Count)
        if count.add() % self.refresh == 0:
            ctx.modules["old"].load_state_dict(ctx.policy.network.state_dict())

    def prepare(self, ctx: Context, batch: Batch, noise: Noise) -> None:
        shape = (batch.steps, len(batch.reward))
        live = torch.ones(shape, dtype=torch.bool, device=batch.states.device)
        if self.target == "transition":
            live = live & stochastic(ctx, batch)[:, None]
            if not batch.states.is_floating_point():
                live = live & batch.moved().view(shape)
        weight = torch.where(live, self.weights(ctx, batch).expand(shape).exp(), 0.0)
        if not weight.isfinite().all():
            raise NonFinite("weights", int((~weight.isfinite()).sum()), weight.numel())
        if not weight.any():
            raise ValueError("all weights are 0, so there is nothing to fit; raise alpha")
        batch.per_step["weight"] = weight
        shares = [effective(row[on]) for row, on in zip(weight, live, strict=True) if on.any()]
        batch.stats["ess_share"] = sum(shares) / len(shares)
        batch.stats["weight_max"] = float(weight.max())
        batch.stats["weight_zero"] = float((weight[live] == 0).double().mean())

    def active(self, batch: Batch) -> Tensor:
        return (batch.per_step["weight"] != 0).flatten()

    def __call__(self, ctx: Context, item: Item) -> Tensor:
        weight = item.columns["weight"].to(item.x)
        if self.target == "denoise":
            return weight * self._denoise(ctx, item)
        step = ctx.policy.step(item.x, item.i, item.cond)
        return -weight * step.log_prob(item.x_next) / (step.size if self.reduce == "mean" else 1)

    @staticmethod
    def _denoise(ctx: Context, item: Item) -> Tensor:
        process = ctx.policy.process
        if item.noise is None:
            raise ValueError("the denoising loss draws noise: give the items a stream")
        x0 = process.clean(item.final)
        x = process.corrupt(x0, item.i, item.noise.fold(_CORRUPT))
        return process.loss(ctx.policy.predict(x, item.i, item.cond), x0, x, item.i)
