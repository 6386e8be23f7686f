"""Pathwise gradients: samples are drawn with their graph, and the reward is differentiated through the chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from .count import Count
from .noise import Noise
from .process import MaskedProcess
from .protocols import Context, Item, Loss
from .search import _CHILD
from .steps import MaskedStep, Step

_DEPTH, _COPY = 6, 7  # purposes of noise, after those of a search


@dataclass(frozen=True)
class Pathwise(Loss):
    """−r(x_0) + kl Σ_i KL(p_θ(·|x_i) ‖ p_ref(·|x_i)) of samples that the loss draws itself, whole samples as items.

    x_0 is a function of the weights and of noise that does not depend on them: steps are reparameterised, tokens by
    Gumbel-softmax.  Only the last K steps are differentiated; those before run without a graph, which is a stop
    gradient at x_K.  For Gaussian steps the chain is the one that `Rollout` draws from the same streams.

    Rows of each sample: T forward, K backward; a KL adds T forward and up to T backward, checkpoints K forward.
    DRaFT (arXiv 2309.17400), AlignProp (arXiv 2310.03739), DRAKES (arXiv 2410.13643).
    """

    last: int = 1
    """K: steps at the end that are differentiated; 0 is the whole chain."""
    truncate: Literal["fixed", "gaussian", "uniform"] = "fixed"
    """K = `last`, or random for each sample: T − floor(N(.84 T, .1 T)), or uniform, both in 1 … T − 1 (AlignProp)."""
    copies: int = 1
    """More than one: x_0 is noised anew to x_1 that often and the rewards of the last step averaged (DRaFT-LV)."""
    checkpoint: bool = False
    """Keep only the states of differentiated steps, and compute each step again in the backward pass."""
    goal: float | None = None
    """Lower |goal − r| instead of −r (AlignProp's aesthetic reward)."""
    tau: float = 1.0
    """Temperature of the Gumbel-softmax."""
    tau_end: float = 0.1
    """Temperature at the end of annealing."""
    anneal: int = 0
    """Optimiser steps over which the temperature falls geometrically; 0 keeps it."""
    states: Literal["soft", "hard"] = "soft"
    """Tokens between differentiated steps: relaxed (DRAKES), or one-hot with straight-through gradients.  The
    sequence shown to the reward is one-hot, straight through, in both."""
    mask: Literal["relaxed", "drawn"] = "relaxed"
    """Whether to stay masked is one of the relaxed classes (DRAKES), or drawn first, which biases gradients less."""
    kl: float = 0.0
    """Weight of the KL of the path to the pretrained model."""
    kl_form: Literal["exact", "release"] = "exact"
    """KL of the step laws, or the release's sum, which is 0 on one-hot states."""
    kl_steps: Literal["all", "last"] = "all"
    """Steps whose KL counts: all, or those differentiated."""
    warmup: int = 0
    """Optimiser steps over which the weight of the KL rises linearly; 0 starts with all of it."""

    def __post_init__(self) -> None:
        if self.last < 0 or self.copies < 1:
            raise ValueError("last must be 0 or more and copies 1 or more")
        if self.copies > 1 and (self.last != 1 or self.truncate != "fixed" or self.kl):
            raise ValueError("copies of the last step need last=1, truncate=fixed and no KL")
        if self.tau <= 0 or self.tau_end <= 0:
            raise ValueError("a temperature must be above 0")

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        needs = {"sample", "step", "step.rsample", "reward.grad"}
        needs |= {"step.kl", "reference"} if self.kl else set()
        return frozenset(needs | ({"corrupt"} if self.copies > 1 else set()))

    # ---- what changes with time
    def modules(self, ctx: Context) -> dict[str, nn.Module]:
        return {"updates": Count().to(ctx.policy.device)} if self.anneal or self.warmup else {}

    def updated(self, ctx: Context) -> None:
        if "updates" in ctx.modules:
            self._updates(ctx).add()

    @staticmethod
    def _updates(ctx: Context) -> Count:
        count = ctx.modules["updates"]
        assert isinstance(count, Count)
        return count

    def _progress(self, ctx: Context, steps: int, ahead: int) -> float:
        done = int(self._updates(ctx).n) if steps else 0
        return min(1.0, (done + ahead) / steps) if steps else 1.0

    def temperature(self, ctx: Context) -> float:
        """τ of the present optimiser step."""
        return self.tau * (self.tau_end / self.tau) ** (
            self._progress(ctx, self.anneal, 0) if self.anneal else 0
        )

    def weight(self, ctx: Context) -> float:
        """KL weight of the present optimiser step."""
        return self.kl * self._progress(ctx, self.warmup, 1)

    # ---- the chain
    def depth(self, steps: int, keys: Noise) -> Tensor:
        """(b,) number of steps K at the end of each chain that are differentiated."""
        if self.truncate == "fixed":
            return torch.full((len(keys),), min(self.last or steps, steps), device=keys.keys.device)
        u = keys.fold(_DEPTH).uniform(1, dtype=torch.float64)[:, 0]
        if self.truncate == "uniform":
            return 1 + (u * (steps - 1)).long()
        mean, std = 0.84 * steps, 0.1 * steps  # 42 and 5 of 50 steps
        low, high = (torch.special.ndtr(torch.tensor((at - mean) / std).to(u)) for at in (1, steps))
        first = mean + std * torch.special.ndtri(low + u * (high - low))
        return (steps - first.floor().long()).clamp(1, max(1, steps - 1))

    def _leap(
        self, ctx: Context, x: Tensor, i: int, keys: Noise, cond: Tensor | None, live: bool
    ) -> tuple[Tensor, Tensor]:
        """x_{i−1} and the KL of the step, (b,); with the graph of x where `live`, else with that of the KL alone."""
        pulled = bool(self.kl) and (live or self.kl_steps == "all")
        noise = keys.fold(i, _CHILD)
        with torch.set_grad_enabled(live or pulled):
            step = ctx.policy.step(x, i, cond)
            if live:
                soft, drawn = self.states == "soft", self.mask == "drawn"
                after = step.rsample(noise, self.temperature(ctx), soft, drawn)
            else:
                after = step.sample(noise)
            if not pulled:
                return after, x.new_zeros(len(x))
            with torch.set_grad_enabled(x.requires_grad):
                ref = ctx.reference.step(x, i, cond)
            if self.kl_form == "exact":
                return after, step.kl(ref)  # type: ignore[arg-type]
            return after, _release_kl(step, ref, ctx.policy.process.chance(i, x))  # type: ignore[union-attr]

    def _advance(
        self, ctx: Context, x: Tensor, i: int, keys: Noise, cond: Tensor | None, live: bool
    ) -> tuple[Tensor, Tensor]:
        pulled = bool(self.kl) and (live or self.kl_steps == "all")
        if live or pulled:
            ctx.policy.count("backward", len(x) * (2 if pulled and x.requires_grad else 1))
        if not (live and self.checkpoint):
            return self._leap(ctx, x, i, keys, cond, live)
        with set_checkpoint_early_stop(False):  # else the rows computed again might not reach the meter
            return checkpoint(
                self._leap, ctx, x, i, keys, cond, live, use_reentrant=False, preserve_rng_state=False
            )  # type: ignore[no-any-return]

    def _chain(self, ctx: Context, item: Item, keys: Noise, depth: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 and the KL of the path; samples differentiated over more steps come first, so that those are a prefix."""
        order = depth.argsort(descending=True, stable=True)
        steps = torch.arange(1, ctx.policy.process.T + 1, device=depth.device)
        alive = (depth[:, None] >= steps).sum(0).tolist()
        x, keys, cond = item.x[order], keys[order], None if item.cond is None else item.cond[order]
        total = x.new_zeros(len(x))
        for i in range(len(steps), 0, -1):
            parts = [(slice(0, alive[i - 1]), True), (slice(alive[i - 1], len(x)), False)]
            moved = [
                self._advance(
                    ctx, x[c] if live else x[c].detach(), i, keys[c], None if cond is None else cond[c], live
                )
                for c, live in parts
                if c.start < c.stop
            ]
            x = torch.cat([after for after, _ in moved])
            total = total + torch.cat([kl for _, kl in moved])
        back = order.argsort()
        return x[back], total[back]

    def _again(self, ctx: Context, x: Tensor, keys: Noise, cond: Tensor | None) -> Tensor:
        """(b * copies, ...) x_0 from states x_1 that the sample x_0 was noised to."""
        process = ctx.policy.process
        rows = torch.arange(len(x), device=x.device).repeat_interleave(self.copies)
        fresh = keys.fold(_COPY).repeat(self.copies)
        noisy = process.corrupt(process.clean(x).detach()[rows], 1, fresh)
        return self._advance(ctx, noisy, 1, fresh, None if cond is None else cond[rows], True)[0]

    def __call__(self, ctx: Context, item: Item) -> Tensor:
        if item.keys is None or item.report is None:
            raise ValueError("this loss draws its samples itself; its search is Seeds()")
        process, n = ctx.policy.process, self.copies
        depth = self.depth(process.T, item.keys) * (n == 1)
        x, kl = self._chain(ctx, item, item.keys, depth)
        cond = item.cond
        if n > 1:
            x = self._again(ctx, x, item.keys, cond)
            cond = None if cond is None else cond.repeat_interleave(n, 0)
        clean = process.clean(x)
        if isinstance(process, MaskedProcess):
            hard = F.one_hot(clean.argmax(-1), clean.shape[-1]).to(clean)
            clean = hard + (clean - clean.detach())
            x = F.pad(hard, (0, 1))
        reward = ctx.score(ctx.policy, clean, cond)
        ctx.meter.count("reward_backward", len(reward))
        item.report(process.pack(x[::n]), reward[::n])
        if self.kl:
            item.note("kl", kl)
        gain = reward if self.goal is None else -(self.goal - reward).abs()
        return self.weight(ctx) * kl - gain.view(-1, n).mean(1)


def _release_kl(step: Step, ref: Step, chance: Tensor) -> Tensor:
    """(B,) what DRAKES adds for a step: (1 − m) (q − p + p log p/q) / m_t times the state, summed over tokens.

    m is the mask share of a position and m_t the chance of a mask.  Positions whose largest class is a token have
    p = q there (SUBS), and one-hot masked ones have 1 − m = 0: it acts through half-masked relaxed states alone
    (drakes_dna/finetune_reward_bp.py).
    """
    if not isinstance(step, MaskedStep) or not isinstance(ref, MaskedStep):
        raise ValueError("kl_form 'release' is defined for masked diffusion only")
    p, q, x = step.log_probs, ref.log_probs, step.x
    open_ = (x.argmax(-1, keepdim=True) == x.shape[-1] - 1).to(x)
    term = q.exp() - p.exp() + p.exp() * (p - q)
    return (open_ * (1 - step.masked) * term * x[..., :-1] / chance).flatten(1).sum(1)
