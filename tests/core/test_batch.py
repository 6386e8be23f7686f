"""What a rollout keeps for a trainer, what a loss sees of a batch, and what it may keep for itself."""

import pytest
import torch
from torch import nn
from worlds import KINDS, setting

from dav_bench.core import Loss, Noise, PosteriorMean, Rollout, Seeds, Training, TreeSearch, fit
from dav_bench.core.fit import optimizer, parameters

N = 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_keeps_the_log_probs_of_its_steps(kind):
    ctx = setting(kind, untrained=False)
    batch = Rollout(log_prob=True)(ctx, Noise.of(0, N))
    assert torch.equal(batch.states, Rollout()(ctx, Noise.of(0, N)).states), "keeping them changes nothing"
    item = batch.items(torch.arange(len(batch)), ctx.policy.unpack)
    again = ctx.policy.step(item.x, item.i).log_prob(item.x_next)
    assert (again - item.columns["log_prob"]).abs().max() < 1e-9
    assert batch.per_step["log_prob"].shape == (batch.steps, N)


@pytest.mark.parametrize("kind", KINDS)
def test_gains_add_up_to_the_reward_and_cost_no_network_row(kind):
    ctx = setting(kind, untrained=False)
    with ctx.meter.phase("search"):
        batch = Rollout(value=PosteriorMean())(ctx, Noise.of(0, N))
    assert ctx.meter.total("forward") + ctx.meter.total("shared") == N * batch.steps
    total = batch.per_step["value"][0] + batch.per_step["gain"].sum(0)
    assert (total - batch.reward).abs().max() < 1e-9
    item = batch.items(torch.arange(len(batch)), ctx.policy.unpack)
    direct = ctx.reward(ctx.policy.decode(ctx.policy.step(item.x, item.i).mode), None)
    assert (direct - item.columns["value"]).abs().max() < 1e-9


def test_a_rollout_may_sample_another_network():
    ctx = setting("random", untrained=False)
    reference = Rollout(on="ref")(ctx, Noise.of(0, 200)).states
    ctx.modules = {"old": ctx.reference.network}
    assert torch.equal(Rollout(on="old")(ctx, Noise.of(0, 200)).states, reference)
    assert not torch.equal(Rollout()(ctx, Noise.of(0, 200)).states, reference)


def test_seeds_are_whole_samples_that_a_loss_draws_and_reports():
    ctx = setting("random")
    batch = Seeds()(ctx, Noise.of(0, N))
    assert (batch.unit, len(batch), batch.steps) == ("sample", N, 1)
    assert batch.reward.isnan().all()
    rollout = Rollout()(ctx, Noise.of(0, N))
    assert torch.equal(batch.states[0], rollout.states[0])
    rows = torch.tensor([4, 1])
    item = batch.items(rows, ctx.policy.unpack)
    assert torch.equal(item.keys.keys, Noise.of(0, N).keys[rows])
    item.report(rollout.states[-1][rows], rollout.reward[rows])
    assert torch.equal(batch.states[-1, rows], rollout.states[-1, rows])
    assert batch.reward.isnan().sum() == N - 2


def test_items_carry_the_columns_of_their_sample_and_step():
    ctx = setting("random")
    batch = TreeSearch(2)(ctx, Noise.of(0, N))
    batch.per_sample["name"] = torch.arange(N)
    batch.per_step["place"] = torch.arange(len(batch)).view(batch.steps, N)
    rows = torch.tensor([0, 7, 2 * N + 3])
    item = batch.items(rows, ctx.policy.unpack, Noise.of(5, len(batch)))
    assert item.columns["name"].tolist() == [0, 1, 3]
    assert item.columns["place"].tolist() == rows.tolist()
    assert torch.equal(item.noise.keys, Noise.of(5, len(batch)).keys[rows])


class Baseline(nn.Module):
    lr_scale = 0.1

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))


class Follow(Loss):
    """Fits a number to the reward; leaves the policy alone."""

    def modules(self, ctx):
        return {"baseline": Baseline()}

    def prepare(self, ctx, batch, noise):
        batch.per_sample["reward"] = batch.reward

    def __call__(self, ctx, item):
        return (ctx.modules["baseline"].level - item.columns["reward"]) ** 2

    def updated(self, ctx):
        ctx.modules["baseline"].steps += 1


def test_a_loss_trains_networks_of_its_own_at_their_own_rate():
    ctx, loss = setting("random"), Follow()
    ctx.modules = loss.modules(ctx)
    training = Training(updates=3, minibatch=9, lr=0.5)
    opt = optimizer(parameters(ctx), training, ctx.modules)
    assert set(parameters(ctx)) == {*ctx.policy.trainable(), "baseline/level"}
    before = {name: p.detach().clone() for name, p in ctx.policy.trainable().items()}
    fit(loss, ctx, Rollout()(ctx, Noise.of(0, N)), opt, training, Noise.of(1, 1))
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.05]
    assert int(ctx.modules["baseline"].steps) == 6
    assert 0.05 < ctx.modules["baseline"].level.item() <= 6 * 0.05 + 1e-9, "six steps of a tenth of the rate"
    assert all(torch.equal(p, before[name]) for name, p in ctx.policy.trainable().items())
