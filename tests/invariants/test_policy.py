"""What must not change an update on own rollouts: memory, accumulation, and the order of samples that do not meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from worlds import KINDS, setting

from dav_bench.core import (
    Batch,
    Context,
    GainWeights,
    LogVariance,
    Loss,
    Noise,
    PerGroup,
    PerPrompt,
    PolicyGradient,
    PosteriorMean,
    RewardWeights,
    Rollout,
    Scaled,
    Training,
    WeightedLikelihood,
    fit,
)
from dav_bench.core.fit import gradient, optimizer

N, GROUP = 12, 4
LOSSES: dict[str, Loss] = {
    "ddpo": PolicyGradient(PerPrompt()),
    "ddpo sf": PolicyGradient(PerPrompt(), "sf"),
    "ddpo means": PolicyGradient(PerPrompt(), reduce="mean"),
    "dpok": PolicyGradient(Scaled(2.0), kl=0.3),
    "grpo": PolicyGradient(PerGroup(GROUP), kl=0.1),
    "grpo batch": PolicyGradient(PerGroup(GROUP, "batch")),
    "grpo plain": PolicyGradient(PerGroup(GROUP, "none"), kl=0.1),
    "vmpo": LogVariance(scale=2.0, value=PosteriorMean(), kl=0.1),
    "vmpo own": LogVariance(scale=2.0),
    "vmpo r2g": LogVariance("r2g", scale=2.0, baseline="batch"),
    "rwr": WeightedLikelihood(RewardWeights(0.5)),
    "rwr sparse": WeightedLikelihood(RewardWeights(form="sparse", keep=0.25)),
    "rwr denoise": WeightedLikelihood(RewardWeights(0.5), "denoise"),
    "vidd": WeightedLikelihood(GainWeights(1.0), refresh=2),
    "vidd ref": WeightedLikelihood(GainWeights(1.0, "ref"), refresh=2),
}
TOKENS = {
    "token ratio": PolicyGradient(PerPrompt(tracker=False), reduce="mean", ratio="clean", old="lagged"),
}


def rollout(ctx: Context, prompts: Tensor | None = None) -> Batch:
    """Trajectories of the policy with all that any of the losses reads."""
    batch = Rollout(log_prob=True, value=PosteriorMean())(ctx, Noise.of(3, N))
    batch.cond = prompts
    return batch


def cases() -> list[tuple[str, str]]:
    return [(kind, name) for kind in KINDS for name in LOSSES] + [(k, n) for k in KINDS[1:] for n in TOKENS]


def grad(ctx: Context, loss: Loss, batch: Batch, micro_batch: int | None = None) -> Tensor:
    ctx.modules = loss.modules(ctx)
    loss.prepare(ctx, batch, Noise.of(5, 1))
    ctx.policy.network.zero_grad()
    fresh = Noise.of(9, N).fold(1).repeat(batch.steps)  # by sample, so that it moves with it
    order = torch.arange(len(batch)).view(N, batch.steps).T.flatten()
    gradient(
        loss, ctx, batch, torch.arange(len(batch)), loss.active(batch), micro_batch, fresh[order.argsort()]
    )
    parameters = [*ctx.policy.trainable().values()]
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    )


@pytest.mark.parametrize(("kind", "name"), cases())
def test_micro_batches_and_accumulation_change_nothing(kind, name):
    """All weights after two rounds of two updates each."""
    loss, ends = {**LOSSES, **TOKENS}[name], []
    for micro_batch in (None, 5):
        ctx = setting(kind, 6, untrained=False)
        ctx.modules = loss.modules(ctx)
        ctx.policy.attach(ctx.meter, micro_batch)
        training = Training(updates=2, minibatch=40, lr=1e-2)
        opt = optimizer(ctx.policy.trainable(), training, ctx.modules)
        for r in range(2):
            fit(loss, ctx, rollout(ctx), opt, training, Noise.of(r, 1))
        ends.append(torch.cat([p.detach().flatten() for p in ctx.policy.trainable().values()]))
    start = torch.cat(
        [p.detach().flatten() for p in setting(kind, 6, untrained=False).policy.trainable().values()]
    )
    assert (ends[0] - start).abs().max() > 1e-3
    assert max(float((end - ends[0]).abs().max()) for end in ends[1:]) < 1e-7


@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [n for n in LOSSES if n != "rwr denoise"])
def test_the_order_of_independent_groups_changes_nothing(kind, name, prompts):
    """Groups of four in a row, or samples of three prompts in any order; the toy networks read no prompt."""
    loss = LOSSES[name]
    cond = torch.arange(N) % 3 if prompts else None
    ctx = setting(kind, 6, untrained=False)
    for model in (ctx.policy, ctx.reference):
        forward = model.network.forward
        model.network.forward = lambda x, t, cond=None, forward=forward: forward(x, t)
    batch = rollout(ctx, cond)
    whole = grad(ctx, loss, batch)
    if prompts:
        rows = Noise.of(1, N).uniform(1)[:, 0].argsort()
    else:
        rows = Noise.of(1, N // GROUP).uniform(1)[:, 0].argsort()[:, None] * GROUP + torch.arange(GROUP)
        rows = rows.flatten()
    moved = Batch(batch.states[:, rows], batch.reward[rows], cond=None if cond is None else cond[rows])
    moved.keys = batch.keys[rows]
    moved.per_step = {k: batch.per_step[k][:, rows] for k in ("log_prob", "gain", "value")}
    assert (grad(ctx, loss, moved) - whole).abs().max() < 1e-9 < 1e-6 < whole.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_other_groups_are_another_update(kind):
    """The test above can fail: a shuffle that mixes groups."""
    ctx = setting(kind, 6, untrained=False)
    batch = rollout(ctx)
    whole = grad(ctx, LOSSES["grpo"], batch)
    rows = Noise.of(1, N).uniform(1)[:, 0].argsort()
    moved = Batch(batch.states[:, rows], batch.reward[rows], keys=batch.keys[rows])
    moved.per_step = {"log_prob": batch.per_step["log_prob"][:, rows]}
    assert (grad(ctx, LOSSES["grpo"], moved) - whole).abs().max() > 1e-4


def test_the_order_of_prompts_and_their_number_in_a_batch_leave_the_statistics_as_they_are():
    """Statistics of a prompt depend on the order of its own rewards alone."""
    advantage, ctx = PerPrompt(window=4, min_count=2, prompts=8), setting("random")
    reward, cond = Noise.of(2, 12).normal(1, dtype=torch.float64)[:, 0], torch.arange(12) % 3
    held = []
    for rows in (torch.arange(12), torch.cat([(cond == c).nonzero()[:, 0] for c in (2, 0, 1)])):
        ctx.modules = advantage.modules(ctx)
        batch = Batch(torch.zeros(1, 12, 3), reward[rows], cond=cond[rows])
        value = torch.empty(12, dtype=torch.float64)
        value[rows] = advantage(ctx, batch)
        held.append(value)
    assert (held[0] - held[1]).abs().max() < 1e-12
