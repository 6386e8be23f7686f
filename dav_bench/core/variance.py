"""VMPO: the variance of log importance weights as an objective (arXiv 2602.12229).

Steps of the policy are proposals for intermediate targets π_i(x_i) ∝ p_ref(x_i) exp(ψ_i(x_i)), ψ_0 = r / α.  The log
of the weight of a step is constant exactly where the policy makes the tilted step:

    log w_i = ψ_{i−1}(x_{i−1}) − ψ_i(x_i) + log p_ref(x_{i−1} | x_i) − log p_θ(x_{i−1} | x_i)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .count import Count
from .noise import Noise
from .protocols import Batch, Context, Item, Loss, Value
from .replay import reference_step, replay, stochastic


class StepBaseline(nn.Module):
    """M(i), an estimate of E[log w_i]: one number for each step, 0 at first."""

    def __init__(self, steps: int, lr_scale: float = 1.0) -> None:
        super().__init__()
        self.lr_scale = lr_scale
        self.table = nn.Parameter(torch.zeros(steps + 1))

    def forward(self, i: Tensor) -> Tensor:
        """(b,) estimates at grid indices (b,)."""
        return self.table[i]


@dataclass(frozen=True)
class LogVariance(Loss):
    """(log w_i − M)² for each step, whose mean is the variance of log w_i where M is its mean.

    On-policy its gradient is twice that of the reverse KL to the tilted step (methods of log-variance: Richter et
    al. 2020), so anything that depends on x_i alone, M and ψ_i(x_i) included, is a control variate.
    """

    form: Literal["diff", "r2g"] = "diff"
    """ψ from look-ahead values, log w as above; or reward-to-go: ψ_i = 0 for i > 0, all of r / α and the log-ratios
    of the steps still to come, which is exact but has more noise."""
    value: Value | None = None
    """V_i of the pretrained model, ψ_i = V_i / α; None takes the column `gain` a search kept, by the policy's own
    predictions (release), which move with the policy and need not settle."""
    scale: float = 10.0
    """1/α."""
    warmup: int = 0
    """Rounds over which the scale rises linearly to its value."""
    baseline: Literal["learned", "batch"] = "learned"
    """M: a number for each step regressed on log w, or the mean over the other samples of the batch."""
    baseline_weight: float = 0.01
    """Weight of the regression."""
    baseline_lr: float = 1.0
    """Learning rate of M in units of the policy's."""
    kl: float = 0.0
    """λ of an extra λ KL(p_θ ‖ p_ref), which moves the optimum of a step to exp(2 ψ / (2 + λ))."""
    reduce: Literal["sum", "mean"] = "sum"
    """Log-probabilities and KL: summed over dimensions, which is exact, or averaged (release)."""

    requires = frozenset({"step.log_prob", "step.kl", "reference"})

    def modules(self, ctx: Context) -> dict[str, nn.Module]:
        held: dict[str, nn.Module] = {"rounds": Count().to(ctx.policy.device)} if self.warmup else {}
        if self.baseline == "learned":
            table = StepBaseline(ctx.policy.process.T, self.baseline_lr)
            held["baseline"] = table.to(ctx.policy.device, ctx.policy.dtype)
        return held

    def _scale(self, ctx: Context) -> float:
        if not self.warmup:
            return self.scale
        rounds = ctx.modules["rounds"]
        assert isinstance(rounds, Count)
        return self.scale * min(1.0, rounds.add() / self.warmup)

    @torch.no_grad()
    def prepare(self, ctx: Context, batch: Batch, noise: Noise) -> None:
        if "log_prob" not in batch.per_step:
            raise ValueError("the search kept no log-probabilities; use Rollout(log_prob=True)")
        live = stochastic(ctx, batch)
        seen = replay(ctx, ctx.reference, batch, self.value if self.form == "diff" else None)
        size = seen.steps[0].size if self.reduce == "mean" else 1
        ref, old = seen.log_prob() / size, batch.per_step["log_prob"] / size
        scale = self._scale(ctx)
        if self.form == "diff":
            gain = batch.per_step.get("gain") if seen.gain is None else seen.gain
            if gain is None:
                raise ValueError("there are no values; use LogVariance(value=...) or Rollout(value=...)")
            drive = scale * gain.to(ref)
        else:
            later = (ref - old).flip(0).cumsum(0).flip(0) - (ref - old)
            drive = scale * batch.reward.to(ref) + later
        logw = drive + ref - old
        if self.baseline == "batch":
            others = logw.sum(1, keepdim=True) - logw
            batch.per_step["baseline"] = others / max(1, logw.shape[1] - 1)
        batch.per_step["drive"], batch.per_step["live"] = drive + ref, live[:, None].expand_as(ref)
        batch.stats["scale"] = scale
        batch.stats["log_weight_std"] = float(logw[live].double().std(1, correction=0).mean())
        if self.kl:
            batch.per_step["reference"] = seen.preds

    def active(self, batch: Batch) -> Tensor:
        return batch.per_step["live"].flatten()

    def __call__(self, ctx: Context, item: Item) -> Tensor:
        step = ctx.policy.step(item.x, item.i, item.cond)
        size = step.size if self.reduce == "mean" else 1
        logw = item.columns["drive"] - step.log_prob(item.x_next) / size
        item.note("log_weight", logw)
        if self.baseline == "batch":
            loss = (logw - item.columns["baseline"]) ** 2
        else:
            m = ctx.modules["baseline"](item.i).to(logw)
            loss = (logw - m.detach()) ** 2 + self.baseline_weight * (logw.detach() - m) ** 2
        if not self.kl:
            return loss
        pull = step.kl(reference_step(ctx, item)) / size  # type: ignore[arg-type]
        item.note("kl", pull)
        return loss + self.kl * pull
