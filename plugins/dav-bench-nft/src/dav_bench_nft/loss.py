"""The loss of DiffusionNFT.

With q in [0, 1] the chance that a sample x_0 of the lagged model is good, predictions of x_0 by the lagged model o
and the trained one p at a noised x_i, and

    good = (1 - beta) o + beta p,      bad = (1 + beta) o - beta p,

it minimises E[q |good - x_0|^2 + (1 - q) |bad - x_0|^2].  Setting the derivative in p to 0 at one x_i gives
beta (p - o) = E[(2 q - 1) (x_0 - o) | x_i], and where the lagged model is exact, o = E[x_0 | x_i], so that

    p - o = (2 / beta) Cov(q, x_0 | x_i):                                                   (1)

a step of the posterior mean in the direction in which a tilt by q moves it, d/ds of the mean under p(x_0) exp(s q).
Velocities, noise and x_0 are linear in each other at fixed x_i, so (1) is the paper's optimum in any of them.
Rounds go on from there: with a fixed q and small steps the law after K rounds is p(x_0) exp(2 K q / beta), and no
temperature ends it.  `pull` does: there the fixed point has p - ref = (2 beta / pull) Cov(q, x_0 | x_i).
"""

import copy

import torch
from torch import nn

from dav_bench.core import Loss, NonFinite

_CORRUPT = 1  # purpose of noise


class Lag(nn.Module):
    """Counts optimiser steps and rounds: the lagged model follows when a round ends."""

    def __init__(self):
        super().__init__()
        self.register_buffer("left", torch.zeros((), dtype=torch.long))
        self.register_buffer("rounds", torch.zeros((), dtype=torch.long))


def contrast(x0, old, new, q, beta, adaptive=False):
    """(b,) q |good - x_0|^2 + (1 - q) |bad - x_0|^2, averaged over dimensions.

    Args:
        x0: (b, ...) samples.
        old: (b, ...) predictions of the lagged model, without a graph.
        new: (b, ...) predictions of the trained model.
        q: (b,) chance that a sample is good.
        beta: how far the two implicit models lie apart.
        adaptive: each squared error over its own mean absolute error, held constant.
    """

    def error(prediction):
        off = (prediction - x0).flatten(1)
        scale = off.detach().abs().mean(1).clamp_min(1e-5) if adaptive else 1.0
        return (off**2).mean(1) / scale

    return q * error((1 - beta) * old + beta * new) + (1 - q) * error((1 + beta) * old - beta * new)


class NegativeAware(Loss):
    """Fits samples of the network `old`, which follows the trained one round by round."""

    def __init__(self, config):
        self.config = config
        self.requires = frozenset({"step", "corrupt"} | ({"reference"} if config.pull else set()))

    def modules(self, ctx):
        old = copy.deepcopy(ctx.policy.network).requires_grad_(False).eval()
        return {"old": old, "lag": Lag().to(ctx.policy.device)}

    def prepare(self, ctx, batch, noise):
        q = self._reward(batch) if self.config.quality == "reward" else self._advantage(batch)
        batch.per_sample["quality"] = q
        batch.stats["quality_mean"] = float(q.mean())
        batch.stats["quality_ends"] = float(((q == 0) | (q == 1)).double().mean())
        samples, plan = len(batch.reward), self.config
        used = max(1, round(plan.subset * samples)) if plan.subset < 1 else samples
        ctx.modules["lag"].left.fill_(plan.updates * -(-used * batch.steps // plan.minibatch))

    def _reward(self, batch):
        q = batch.reward
        if bool(((q < 0) | (q > 1)).any()):
            raise ValueError("quality='reward' needs rewards in [0, 1]; use quality='advantage'")
        return q

    def _advantage(self, batch):
        """Half, more by the advantage over samples of the same prompt, in [0, 1]."""
        r = batch.reward.double()
        if not r.isfinite().all():
            raise NonFinite("the reward", int((~r.isfinite()).sum()), len(r))
        mean = r.mean().expand_as(r)
        if batch.cond is not None:
            _, prompt = batch.cond.unique(dim=0, return_inverse=True)
            total = torch.zeros(int(prompt.max()) + 1, dtype=r.dtype, device=r.device).index_add(0, prompt, r)
            mean = (total / prompt.bincount())[prompt]
        gap = (r - mean) / (r.std(unbiased=False) + 1e-4)
        return (0.5 + gap / (2 * self.config.reach)).clamp(0, 1).to(batch.reward)

    def __call__(self, ctx, item):
        process, config = ctx.policy.process, self.config
        x0 = process.clean(item.final)
        x = process.corrupt(x0, item.i, item.noise.fold(_CORRUPT))
        new = ctx.policy.step(x, item.i, item.cond).x0
        with torch.no_grad():
            old = ctx.model("old").step(x, item.i, item.cond).x0
        q = item.columns["quality"].to(new)
        value = contrast(x0, old, new, q, config.beta, config.weight == "adaptive")
        if config.pull:
            with torch.no_grad():
                ref = ctx.reference.step(x, item.i, item.cond).x0
            value = value + config.pull * ((new - ref) ** 2).flatten(1).mean(1)
        return value

    def updated(self, ctx):
        lag = ctx.modules["lag"]
        lag.left -= 1
        if int(lag.left) > 0:
            return
        kept = min(self.config.lag_rise * int(lag.rounds), self.config.lag_max)
        lag.rounds += 1
        with torch.no_grad():
            pairs = zip(ctx.modules["old"].parameters(), ctx.policy.network.parameters(), strict=True)
            for old, new in pairs:
                old.lerp_(new, 1 - kept)
