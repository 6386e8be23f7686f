"""Policy gradients: denoising as a decision process whose actions are steps and whose reward comes at the end.

DDPO, DPOK, GRPO and the token-ratio baseline of the VIDD repository are settings of one loss
(docs/methods/policy-gradient.md).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from .advantage import Advantage, PerPrompt
from .losses import noise_error
from .noise import Noise
from .protocols import Batch, Context, Item, Loss
from .replay import reference_step, replay, stochastic
from .steps import MaskedStep, Step

CLIPS = {"sum": 0.2, "mean": 1e-4}
"""Ratio clips for each reduction: PPO's (arXiv 1707.06347) for ratios of whole steps; for ratios of per-dimension
means that of the DDPO, DPOK and Flow-GRPO releases, exp(±1.6) of the whole on 16,384 dimensions."""
_FAR = (
    30.0  # log-ratios beyond this are held there: exp would overflow, and inf · 0 is NaN in the backward pass
)


@dataclass(frozen=True)
class PolicyGradient(Loss):
    """Score-function or clipped surrogate loss of each step, and λ KL(p_θ ‖ p_ref) of its law.

    With A the advantage of the sample and ρ = p_θ / p_old of the step taken (DDPO, arXiv 2305.13301):

        sf:  −A log p_θ(x_{i−1} | x_i)            is:  max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε))

    The mean over items is the objective's sum over steps divided by T.  The KL is exact and differentiated through
    the step's law at the x_i visited (DPOK, arXiv 2305.16381, equation 5), not through how x_i came about.
    """

    advantage: Advantage = field(default_factory=PerPrompt)
    form: Literal["is", "sf", "clamp"] = "is"
    """`clamp` is −A clip(ρ) alone (DPOK's release): beyond the clip no gradient leads back."""
    clip: float | None = None
    """ε; None is the default of the reduction, `CLIPS`."""
    kl: float = 0.0
    """λ."""
    kl_form: Literal["exact", "mse"] = "exact"
    """The KL of the step laws, or the squared error of the noise predictions (DPOK's release, Gaussian only)."""
    reduce: Literal["sum", "mean"] = "sum"
    """Log-probabilities and KL: summed over dimensions, which is exact, or averaged (releases)."""
    ratio: Literal["exact", "clean"] = "exact"
    """ρ of the step taken, or on tokens exp of Σ_{l masked} log p_θ(x_0^l | x_i) less that of the old model: the
    final tokens in place of the step (VIDD repository, losses/rl_loss.py)."""
    old: Literal["sampler", "lagged"] = "sampler"
    """p_old: what drew the batch, or the policy one round before that (VIDD repository, finetune_reward.py)."""

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"step.log_prob"} | ({"step.kl", "reference"} if self.kl else set()))

    @property
    def epsilon(self) -> float:
        return CLIPS[self.reduce] if self.clip is None else self.clip

    def modules(self, ctx: Context) -> dict[str, nn.Module]:
        lagged = {"old": copy.deepcopy(ctx.policy.network).requires_grad_(False)}
        return self.advantage.modules(ctx) | (lagged if self.old == "lagged" else {})

    def prepare(self, ctx: Context, batch: Batch, noise: Noise) -> None:
        live = stochastic(ctx, batch)[:, None].expand(-1, len(batch.reward))
        if not self.kl and self.ratio == "exact" and not batch.states.is_floating_point():
            live = live & batch.moved().view_as(live)  # a copied state was no choice
        batch.per_step["live"] = live
        batch.per_sample["advantage"] = self.advantage(ctx, batch)
        if self.form != "sf" and (self.ratio == "clean" or self.old == "lagged"):
            old = ctx.model("old" if self.old == "lagged" else "policy")
            seen = replay(ctx, old, batch)
            taken = zip(seen.steps, seen.states[1:], strict=True)
            rows = [self._log_prob(step, x_next, seen.states[-1]) for step, x_next in taken]
            batch.per_step["log_prob"] = torch.stack(rows)
        elif self.form != "sf" and "log_prob" not in batch.per_step:
            raise ValueError("the search kept no log-probabilities; use Rollout(log_prob=True)")
        if self.old == "lagged":  # what drew this batch is old to the next
            ctx.modules["old"].load_state_dict(ctx.policy.network.state_dict())
        if self.kl:
            batch.per_step["reference"] = replay(ctx, ctx.reference, batch).preds

    def active(self, batch: Batch) -> Tensor:
        live = batch.per_step["live"]
        return (live if self.kl else live & (batch.per_sample["advantage"] != 0)).flatten()

    def _log_prob(self, step: Step, x_next: Tensor, final: Tensor) -> Tensor:
        if self.ratio == "exact":
            return step.log_prob(x_next)
        if not isinstance(step, MaskedStep):
            raise ValueError("ratio 'clean' is defined for masked diffusion only; use ratio=exact")
        return ((final[..., :-1] * step.log_probs).sum(-1) * step.masked[..., 0]).sum(1)

    def __call__(self, ctx: Context, item: Item) -> Tensor:
        step = ctx.policy.step(item.x, item.i, item.cond)
        size = step.size if self.reduce == "mean" else 1
        log_prob = self._log_prob(step, item.x_next, item.final)
        loss = self._surrogate(item, log_prob / size, size)
        if not self.kl:
            return loss
        ref = reference_step(ctx, item)
        if self.kl_form == "exact":
            pull = step.kl(ref) / size  # type: ignore[arg-type]
        else:
            pull = noise_error(ctx.policy, step, ref, item)
        item.note("kl", pull)
        return loss + self.kl * pull

    def _surrogate(self, item: Item, log_prob: Tensor, size: int) -> Tensor:
        """(b,) losses whose gradient, at ρ = 1, is that of −A log p."""
        advantage = item.columns["advantage"].to(log_prob)
        if self.form == "sf":
            return -advantage * log_prob
        far = log_prob - item.columns["log_prob"].to(log_prob) / size
        ratio = far.clamp(-_FAR, _FAR).exp()
        kept = ratio.clamp(1 - self.epsilon, 1 + self.epsilon)
        for name in ("ratio_min", "ratio_max"):
            item.note(name, ratio)
        clipped = torch.where(advantage > 0, ratio > kept, (ratio < kept) & (advantage < 0))
        item.note("ratio_clipped", ratio != kept if self.form == "clamp" else clipped)
        item.note("ratio_overflow", far.abs() > _FAR)
        surrogate = -advantage * kept
        return surrogate if self.form == "clamp" else torch.maximum(-advantage * ratio, surrogate)
