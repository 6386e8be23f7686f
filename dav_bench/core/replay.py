"""What losses learn of a batch before it is fitted: what another model makes of its states, and which steps count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .model import Model
from .noise import Noise
from .protocols import Batch, Context, Item, Value
from .search import Known, evaluate
from .steps import Step

_VALUE = 1  # purpose of noise


@dataclass(frozen=True)
class Replay:
    """A batch through the eyes of a model."""

    preds: Tensor
    """(T, B, ...) predictions at the states x_T … x_1."""
    gain: Tensor | None
    """(T, B) V_{i−1}(x_{i−1}) − V_i(x_i), the last one from the reward itself."""
    steps: tuple[Step, ...]
    """T laws of a step, each of (B, ...)."""
    states: tuple[Tensor, ...]
    """T + 1 states (B, ...), x_T first."""

    def log_prob(self) -> Tensor:
        """(T, B) log p(x_{i−1} | x_i) of the steps that were taken."""
        return torch.stack([s.log_prob(x) for s, x in zip(self.steps, self.states[1:], strict=True)])


@torch.no_grad()
def replay(ctx: Context, model: Model, batch: Batch, value: Value | None = None) -> Replay:
    """One row of `model` for each item, equal states once, and a value of each state where one is asked for."""
    states, T = tuple(ctx.policy.unpack(s) for s in batch.states), batch.steps
    noise = Noise.of(0, len(states[0]), device=states[0].device) if batch.keys is None else batch.keys
    here: Known | None = None
    preds, values, steps = [], [], []
    for x, i in zip(states[:-1], range(T, 0, -1), strict=True):
        here = evaluate(ctx, model, here, x, i, noise.fold(i, _VALUE), value, batch.cond, steps=True)
        preds.append(here.pred)
        values.append(here.value)
        steps.append(here.step(model, i))
    held = None if value is None else torch.stack([*values, batch.reward.to(values[-1])])  # type: ignore
    gain = None if held is None else held[1:] - held[:-1]
    return Replay(torch.stack(preds), gain, tuple(steps), states)  # type: ignore[arg-type]


def reference_step(ctx: Context, item: Item) -> Step:
    """The pretrained model's law at x_i, from the column `reference` of its predictions."""
    return ctx.reference.process.step(item.columns["reference"], item.x, item.i)


def stochastic(ctx: Context, batch: Batch) -> Tensor:
    """(T,) False for steps without a density, such as the last one of DDPM: their log-probabilities teach nothing.

    Raises:
        ValueError: no step has one.
    """
    T, process = batch.steps, ctx.policy.process
    if process.kind != "gaussian":
        return torch.ones(T, dtype=torch.bool, device=batch.states.device)
    x = batch.states[
        0, :1
    ]  # the spread of a step is a matter of the schedule: any state and prediction will do
    flags = [process.step(x, x, i).stochastic for i in range(T, 0, -1)]
    if not any(flags):
        raise ValueError("every step is deterministic: there are no log-probabilities; set sampler.eta=1")
    return torch.tensor(flags, device=batch.states.device)
