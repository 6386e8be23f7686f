"""Look-ahead values: what a noisy state is worth, in units of the reward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .model import Model, chunks
from .noise import Noise
from .protocols import Context
from .steps import MaskedStep, Step

_FLOOR = 1e-6


@dataclass(frozen=True)
class PosteriorMean:
    """V_i(x_i) ≈ r(x̂_0(x_i)) (dav.md A1): the reward of the clean prediction, exact at i = 0."""

    lookahead: Literal["mode", "mean", "sample"] = "mode"
    """Tokens the reward sees: the likeliest ones (DAV, SVDD), their probabilities, or one draw; images: the mean."""
    relax: Literal["mean", "gumbel", "gumbel-release"] = "mean"
    """Gradient on tokens: through probabilities, a straight-through Gumbel draw, or the release's draw (dav.md E14)."""
    batch: Literal["sum", "mean"] = "sum"
    """The release averages over the batch before differentiating, which scales guidance by 1/B."""

    uses_prediction = True

    @property
    def by_state(self) -> bool:
        return self.lookahead != "sample"

    @property
    def grad_by_state(self) -> bool:
        return self.relax == "mean" and self.batch == "sum"

    def __call__(
        self, ctx: Context, model: Model, x: Tensor, i: int, pred: Tensor | None, noise: Noise,
        cond: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if i == 0:
            return ctx.reward(model.decode(model.process.clean(x)), cond)
        if pred is None:
            raise ValueError("the posterior mean needs the prediction at x_i")
        step = model.process.step(pred, x, i)
        if self.lookahead == "sample" and isinstance(step, MaskedStep):
            x0 = step.clean(noise)
        else:
            x0 = step.x0 if self.lookahead == "mean" else step.mode
        return ctx.reward(model.decode(x0), cond)

    def _relaxed(self, step: Step, noise: Noise) -> Tensor:
        """Differentiable clean prediction."""
        x0 = step.x0
        if self.relax == "mean" or not isinstance(step, MaskedStep):
            return x0
        if self.relax == "gumbel":
            logits = x0.clamp_min(_FLOOR).log()
        else:  # probabilities in place of logits, with the empty mask class among the candidates
            logits = torch.nn.functional.pad(x0, (0, 1))
        soft = (logits + noise.gumbel(*logits.shape[1:], dtype=logits.dtype)).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return (hard + soft - soft.detach())[..., : x0.shape[-1]]

    @torch.enable_grad()
    def grad(
        self, ctx: Context, model: Model, x: Tensor, i: int, noise: Noise, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        grads, preds = [], []
        for c in chunks(len(x), model.micro_batch):
            state = x[c].detach().requires_grad_(True)
            part = None if cond is None else cond[c]
            pred = model.predict(state, i, part)
            value = ctx.reward(
                model.decode(self._relaxed(model.process.step(pred, state, i), noise[c])), part
            )
            (g,) = torch.autograd.grad(value.sum(), state)
            grads.append(g)
            preds.append(pred.detach())
        ctx.meter.count("backward", len(x))
        ctx.meter.count("reward_backward", len(x))
        total = torch.cat(grads)
        return (total / len(x) if self.batch == "mean" else total), torch.cat(preds)


@dataclass(frozen=True)
class ExactValue:
    """A soft value known in closed form (the exact worlds): V_i(x_i) = α log E[exp(r(x_0) / α) | x_i]."""

    value: Callable[[Tensor, int], Tensor]
    """(states, i) -> (B,), differentiable in the states for guidance."""
    by_state: bool = False
    """Whether the index adds nothing to the state, as where one token is revealed in each step."""

    uses_prediction = False

    @property
    def grad_by_state(self) -> bool:
        return self.by_state

    def __call__(
        self, ctx: Context, model: Model, x: Tensor, i: int, pred: Tensor | None, noise: Noise,
        cond: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return self.value(x, i)

    @torch.enable_grad()
    def grad(
        self, ctx: Context, model: Model, x: Tensor, i: int, noise: Noise, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        state = x.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(self.value(state, i).sum(), state)
        return g, model.predict(x, i, cond).detach()
