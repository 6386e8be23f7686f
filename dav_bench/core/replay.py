"""What losses learn of a batch before it is fitted: predictions of another model, and which steps have a density."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import Model
from .noise import Noise
from .protocols import Batch, Context, Item
from .search import evaluate
from .steps import Step


@torch.no_grad()
def predictions(ctx: Context, model: Model, batch: Batch) -> Tensor:
    """(T, B, ...) predictions of a model at the states of a batch: one row each, equal states of a step once."""
    rows = []
    for k in range(batch.steps):
        x = ctx.policy.unpack(batch.states[k])
        noise = Noise.of(0, len(x), device=x.device)  # a prediction draws nothing
        held = evaluate(ctx, model, None, x, batch.steps - k, noise, cond=batch.cond)
        assert held.pred is not None
        rows.append(held.pred)
    return torch.stack(rows)


@torch.no_grad()
def log_probs(ctx: Context, batch: Batch, preds: Tensor) -> Tensor:
    """(T, B) log p(x_{i−1} | x_i) of the steps taken, under the model that predicts `preds`."""
    states, T = [ctx.policy.unpack(s) for s in batch.states], batch.steps
    process = ctx.policy.process
    return torch.stack([process.step(preds[k], states[k], T - k).log_prob(states[k + 1]) for k in range(T)])


def reference_step(ctx: Context, item: Item) -> Step:
    """The pretrained model's law at x_i, from the column `reference` of its predictions."""
    return ctx.reference.process.step(item.columns["reference"], item.x, item.i)


def stochastic(ctx: Context, batch: Batch) -> Tensor:
    """(T,) False for steps without a density, such as the last one of DDPM: their log-probabilities teach nothing."""
    T, process = batch.steps, ctx.policy.process
    if process.kind != "gaussian":
        return torch.ones(T, dtype=torch.bool, device=batch.states.device)
    x = batch.states[
        0, :1
    ]  # the spread of a step is a matter of the schedule: any state and prediction will do
    flags = [process.step(x, x, i).stochastic for i in range(T, 0, -1)]
    return torch.tensor(flags, device=batch.states.device)
