"""M-steps: what a model is fitted to, as a loss for each (sample, step) item."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .model import Model
from .noise import Noise
from .process import GaussianProcess, MaskedProcess
from .protocols import Batch, Context, Item, Loss
from .steps import GaussianStep, MaskedStep, Step
from .value import Learned


@dataclass(frozen=True)
class MaximumLikelihood(Loss):
    """Forward KL to the search, dav.md (A5): −log p_θ(x_{i−1} | x_i) of the steps it chose, + λ KL(p_θ ‖ p_ref) (A6).

    The mean over items is the M-step's objective up to a constant; fitting samples of a target by maximum
    likelihood covers its modes.
    """

    kl: float = 0.0
    """λ: 0 is DAV, more is DAV-KL."""
    target: Literal["transition", "mean", "lookahead", "final"] = "transition"
    """Fit the step taken (paper), the mean of the tilted step over all children (the same expectation with less
    noise), the winner's clean prediction (release, tokens) or the final sample."""
    weight: Literal["paper", "release", "uniform"] = "paper"
    """Weight of a step towards a clean target: (m_i − m_{i−1})/m_i, the release's (m_i − m_{i−1})/(1 − m_i), or 1."""
    skip: int = 0
    """Leave out the first n steps of each trajectory (the release skips 80 of 128), or with −n the last n."""
    kl_form: Literal["exact", "mse"] = "exact"
    """The KL of the step laws, or the release's squared error of the noise predictions (Gaussian only)."""
    reduce: Literal["sum", "mean"] = "sum"
    """Over dimensions: the likelihood itself, or its mean (release)."""
    time_input: Literal["zero", "sigma"] = "zero"
    """The DNA release tells a network that was trained without time the real one, in the fit alone (dav.md E13)."""

    requires = frozenset({"step.log_prob", "step.kl", "reference"})

    def active(self, batch: Batch) -> Tensor:
        """Items with a gradient: nothing to fit where a masked state was copied and there is no KL."""
        alive = torch.ones(len(batch), dtype=torch.bool, device=batch.states.device)
        if self.target == "transition" and not self.kl and not batch.states.is_floating_point():
            alive &= batch.moved()
        rows = self.skip * batch.states.shape[1]
        if rows > 0:
            alive[:rows] = False
        elif rows < 0:
            alive[rows:] = False
        return alive

    def __call__(self, ctx: Context, item: Item) -> Tensor:
        model = ctx.policy
        with _timed(model) if self.time_input == "sigma" else nullcontext():
            step = model.step(item.x, item.i, item.cond)
        size = step.size if self.reduce == "mean" else 1
        loss = self._fit(model, step, item) / size
        if not self.kl:
            return loss
        with torch.no_grad():
            ref = ctx.reference.step(item.x, item.i, item.cond)
        if self.kl_form == "exact":
            pull = step.kl(ref) / size  # type: ignore[arg-type]
        else:
            pull = noise_error(model, step, ref, item)
        return loss + self.kl * pull

    def _fit(self, model: Model, step: Step, item: Item) -> Tensor:
        if self.target == "transition":
            return -step.log_prob(item.x_next)
        if self.target == "mean":
            if item.mean is None:
                raise ValueError("the search kept no means; use TreeSearch(keep='mean')")
            return -step.expected_log_prob(item.mean)
        if not isinstance(step, MaskedStep):
            raise ValueError(f"target '{self.target}' is defined for masked diffusion only")
        clean = item.final if self.target == "final" else item.lookahead
        if clean is None:
            raise ValueError("the search kept no look-ahead predictions; use TreeSearch(keep='lookahead')")
        nll = -(clean[..., :-1] * step.log_probs).sum(-1) * step.masked[..., 0]
        return self._weight(model.process, item) * nll.sum(1)

    def _weight(self, process: object, item: Item) -> Tensor:
        if not isinstance(process, MaskedProcess) or self.weight == "uniform":
            return torch.ones_like(item.i, dtype=item.x.dtype)
        m, before = process.chance(item.i, item.x)[:, 0, 0], process.chance(item.i - 1, item.x)[:, 0, 0]
        # the release starts at m_T = .999, which keeps its first weight finite
        return (m - before) / (m if self.weight == "paper" else (1 - m).clamp_min(1e-3))


@dataclass(frozen=True)
class ValueRegression(Loss):
    """(V_i(x_i) − r(x_0))² over plain samples: what a learned look-ahead value is fitted to (SVDD-MC).

    The policy stays as it is; the value's network is kept as `value` beside it.
    """

    value: Learned

    requires = frozenset({"sample"})
    trains_policy = False

    def modules(self, ctx: Context) -> dict[str, nn.Module]:
        return {"value": self.value.module(ctx.policy)}

    def prepare(self, ctx: Context, batch: Batch, noise: Noise) -> None:
        batch.per_sample["reward"] = batch.reward
        batch.stats["reward_std"] = float(batch.reward.double().std(correction=0))

    def __call__(self, ctx: Context, item: Item) -> Tensor:
        loss = self.value.loss(ctx, item)
        item.note("value_error", loss.sqrt())
        return loss


def noise_error(model: Model, step: Step, ref: Step, item: Item) -> Tensor:
    """(b,) mean squared difference of the two noise predictions, or velocities (dav.md A8)."""
    if not isinstance(step, GaussianStep) or not isinstance(model.process, GaussianProcess):
        raise ValueError("kl_form 'mse' is defined for Gaussian steps only")
    return model.process.distance(step.x0, ref.x0, item.x, item.i)


@contextmanager
def _timed(model: Model) -> Iterator[None]:
    """Tells the network the time while inside, if it has an input for it."""
    had = getattr(model.network, "time_input", False)
    model.network.time_input = True  # type: ignore[assignment]
    try:
        yield
    finally:
        model.network.time_input = had  # type: ignore[assignment]
