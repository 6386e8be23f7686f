"""Look-ahead values: what a noisy state is worth, in units of the reward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .model import Model, chunks
from .noise import Noise
from .protocols import Context, Item, Value
from .steps import MaskedStep, Step

_FLOOR = 1e-6


def has_joint_gradient(value: Value, model: Model) -> bool:
    """Whether the value itself is differentiated, so that it comes with its gradient and costs no more rows."""
    joint = getattr(value, "joint", None)
    return bool(joint(model)) if joint is not None else False


def value_and_grad(
    value: Value, ctx: Context, model: Model, x: Tensor, i: int, noise: Noise, cond: Tensor | None = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(values, gradients, predictions); no values where the gradient is not theirs."""
    if has_joint_gradient(value, model):
        return value.value_and_grad(ctx, model, x, i, noise, cond)  # type: ignore[attr-defined,no-any-return]
    return (None, *value.grad(ctx, model, x, i, noise, cond))


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
            return ctx.score(model, model.process.clean(x), cond)
        if pred is None:
            raise ValueError("the posterior mean needs the prediction at x_i")
        step = model.process.step(pred, x, i)
        if self.lookahead == "sample" and isinstance(step, MaskedStep):
            x0 = step.clean(noise)
        else:
            x0 = step.x0 if self.lookahead == "mean" else step.mode
        return ctx.score(model, x0, cond)

    def _relaxed(self, step: Step, noise: Noise) -> Tensor:
        """Differentiable clean prediction."""
        x0 = step.x0
        if self.relax == "mean" or not isinstance(step, MaskedStep):
            return x0
        if self.relax == "gumbel":
            logits = x0.clamp_min(_FLOOR).log()
        else:  # probabilities in place of logits, with the empty mask class among the candidates; what a masked
            # position would itself become has no part in the gradient, only what it does to the others
            own = torch.where(step.masked > 0, step.log_probs.exp(), step.x[..., :-1])
            logits = torch.nn.functional.pad(own, (0, 1))
        soft = (logits + noise.gumbel(*logits.shape[1:], dtype=logits.dtype)).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return (hard + soft - soft.detach())[..., : x0.shape[-1]]

    def grad(
        self, ctx: Context, model: Model, x: Tensor, i: int, noise: Noise, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.value_and_grad(ctx, model, x, i, noise, cond)[1:]

    def joint(self, model: Model) -> bool:
        """Tokens may show the reward something else than what is differentiated."""
        return self.relax == "mean" and (model.process.kind != "masked" or self.lookahead == "mean")

    @torch.enable_grad()
    def value_and_grad(
        self, ctx: Context, model: Model, x: Tensor, i: int, noise: Noise, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(rewards of the relaxed predictions, their gradients, predictions)."""
        grads, preds, values = [], [], []
        for c in chunks(len(x), model.micro_batch):
            state = x[c].detach().requires_grad_(True)
            part = None if cond is None else cond[c]
            pred = model.predict(state, i, part)
            value = ctx.score(model, self._relaxed(model.process.step(pred, state, i), noise[c]), part)
            (g,) = torch.autograd.grad(value.sum(), state)
            grads.append(g)
            preds.append(pred.detach())
            values.append(value.detach())
        model.count("backward", len(x))
        ctx.meter.count("reward_backward", len(x))
        total = torch.cat(grads)
        total = total / len(x) if self.batch == "mean" else total
        return torch.cat(values), total, torch.cat(preds)


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

    def grad(
        self, ctx: Context, model: Model, x: Tensor, i: int, noise: Noise, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.value_and_grad(ctx, model, x, i, noise, cond)[1:]

    def joint(self, model: Model) -> bool:
        return True

    @torch.enable_grad()
    def value_and_grad(
        self, ctx: Context, model: Model, x: Tensor, i: int, noise: Noise, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        state = x.detach().requires_grad_(True)
        value = self.value(state, i)
        (g,) = torch.autograd.grad(value.sum(), state)
        return value.detach(), g, model.predict(x, i, cond).detach()


@dataclass(frozen=True)
class KRollout:
    """V_i(x_i) from the rewards of k samples that the model makes of the state.

    Their mean estimates E[r(x_0) | x_i]; at a temperature, α log mean exp(r / α) estimates the soft value, from
    below on average (SVDD-MC's target; FK steering's text experiments with `jump`).  Draws have no gradient, so
    guidance goes by the posterior mean; it only proposes, and weights make up for it.

    Each state costs k (i − 1) network rows beyond its own prediction, none with `jump`, and k reward rows.
    """

    k: int = 4
    """Samples for each state."""
    alpha: float | None = None
    """Temperature of the soft mean; None: the plain mean."""
    jump: bool = False
    """Draw each x_0 from the prediction at x_i in one step (tokens, independently) instead of by all the steps left."""

    uses_prediction = True
    by_state = False
    grad_by_state = True

    @torch.no_grad()
    def __call__(
        self, ctx: Context, model: Model, x: Tensor, i: int, pred: Tensor | None, noise: Noise,
        cond: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if i == 0:
            return ctx.score(model, model.process.clean(x), cond)
        if pred is None:
            raise ValueError("rollouts start from the prediction at x_i")
        many, rows = noise.repeat(self.k), torch.arange(len(x), device=x.device).repeat_interleave(self.k)
        each = None if cond is None else cond[rows]
        step = model.process.step(pred, x, i).take(rows)
        if self.jump:
            x0 = step.clean(many) if isinstance(step, MaskedStep) else step.x0
        else:
            state = step.sample(many.fold(i))
            for j in range(i - 1, 0, -1):
                state = model.step(state, j, each).sample(many.fold(j))
            x0 = model.process.clean(state)
        rewards = ctx.score(model, x0, each).view(len(x), self.k)
        if self.alpha is None:
            return rewards.mean(1)
        return self.alpha * ((rewards / self.alpha).logsumexp(1) - math.log(self.k))

    def grad(
        self, ctx: Context, model: Model, x: Tensor, i: int, noise: Noise, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return PosteriorMean().grad(ctx, model, x, i, noise, cond)


class ValueNetwork(nn.Module):
    """A small regressor of states and times, 0 before training and the same in every process.

    Vectors (D,) pass through layers; tokens (L, V) and images (C, H, W) through convolutions and a mean over
    positions.
    """

    def __init__(self, shape: tuple[int, ...], hidden: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.dims = len(shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.dims == 1:
                first: nn.Module = nn.Linear(shape[0] + 1, hidden)
                second: nn.Module = nn.Linear(hidden, hidden)
            elif self.dims == 2:
                first = nn.Conv1d(shape[1] + 1, hidden, 9, padding=4)
                second = nn.Conv1d(hidden, hidden, 9, padding=4)
            else:
                first = nn.Conv2d(shape[0] + 1, hidden, 3, stride=2, padding=1)
                second = nn.Conv2d(hidden, hidden, 3, stride=2, padding=1)
            self.body = nn.Sequential(first, nn.SiLU(), second, nn.SiLU())
            self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        nn.init.zeros_(self.head[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.head[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B,) values of states x (B, ...) at times t (B,)."""
        x = x.transpose(1, 2) if self.dims == 2 else x
        time = t.view(-1, *[1] * (x.ndim - 1)).expand(len(x), 1, *x.shape[2:])
        h = self.body(torch.cat([x, time], 1))
        return self.head(h.flatten(2).mean(2) if self.dims > 1 else h)[:, 0]


class Learned:
    """V_i(x_i) by a network regressed on the rewards of plain samples: an estimate of E[r(x_0) | x_i] (SVDD-MC).

    The network is `ctx.modules["value"]` where a loss keeps one, else that of `module(model)`, which is made on
    first use and then kept.  At i = 0 the value is the reward itself.
    """

    uses_prediction = by_state = grad_by_state = False

    def __init__(self, hidden: int = 64, seed: int = 0, network: nn.Module | None = None) -> None:
        self.hidden, self.seed, self.network = hidden, seed, network

    def module(self, model: Model) -> nn.Module:
        """The network, (x, t) -> (B,), made for the states of `model` where it does not exist yet."""
        if self.network is None:
            shape = tuple(model.process.prior(Noise.of(0, 1)).shape[1:])
            self.network = ValueNetwork(shape, self.hidden, self.seed).to(model.device, model.dtype)
        return self.network

    def _value(self, ctx: Context, model: Model, x: Tensor, i: int | Tensor) -> Tensor:
        network, t = ctx.modules.get("value") or self.module(model), model.process.time(i, x)
        ctx.meter.count("value", len(x))
        if torch.is_grad_enabled():  # every value made with a graph is differentiated
            ctx.meter.count("value_backward", len(x))
        return torch.cat([network(x[c], t[c]) for c in chunks(len(x), model.micro_batch)])

    def __call__(
        self, ctx: Context, model: Model, x: Tensor, i: int, pred: Tensor | None, noise: Noise,
        cond: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if i == 0:
            return ctx.score(model, model.process.clean(x), cond)
        with torch.no_grad():
            return self._value(ctx, model, x, i)

    def grad(
        self, ctx: Context, model: Model, x: Tensor, i: int, noise: Noise, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.value_and_grad(ctx, model, x, i, noise, cond)[1:]

    def joint(self, model: Model) -> bool:
        return True

    @torch.enable_grad()
    def value_and_grad(
        self, ctx: Context, model: Model, x: Tensor, i: int, noise: Noise, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        state = x.detach().requires_grad_(True)
        value = self._value(ctx, model, state, i)
        (g,) = torch.autograd.grad(value.sum(), state)
        with torch.no_grad():
            return value.detach(), g, model.predict(x, i, cond)

    def loss(self, ctx: Context, item: Item) -> Tensor:
        """(b,) squared errors of V_i(x_i) against the column `reward`, that of the sample a trajectory ended in."""
        return (self._value(ctx, ctx.policy, item.x, item.i) - item.columns["reward"].to(item.x)) ** 2
