"""SVDD with a learned value: the regression finds E[r(x_0) | x_i], and the search selects by it."""

import torch
import torch.nn.functional as F
from worlds import setting

from dav_bench.core import Learned, Noise, Rollout, Training, TreeSearch, ValueRegression, fit
from dav_bench.core.fit import optimizer, parameters

EVERY = F.one_hot(torch.cartesian_prod(*[torch.arange(5)] * 3), 5).double()
left = EVERY[..., -1].sum(1).long()


def learned(shuffle: bool = False, n: int = 2000):
    """A context whose value was fitted to rewards of plain samples of FX3, and that value."""
    ctx = setting("random")
    value = Learned()
    loss = ValueRegression(value)
    ctx.modules = loss.modules(ctx)
    batch = Rollout()(ctx, Noise.of(0, n))
    if shuffle:
        batch.reward = batch.reward.flip(0)
    for rate, updates in ((1e-2, 3), (1e-3, 1)):
        training = Training(lr=rate, updates=updates, minibatch=200)
        fit(loss, ctx, batch, optimizer(parameters(ctx), training, ctx.modules), training, Noise.of(1, 1))
    return ctx, value


def joint(ctx, x: torch.Tensor) -> torch.Tensor:
    """(B, 64) p(sequence, state) up to the chance of the masks."""
    fits = torch.einsum("blv,nlv->bnl", x[..., :-1] + x[..., -1:], ctx.policy.network.sequences)
    return ctx.policy.network.prior * fits.prod(-1)


def error(ctx, value) -> float:
    """Largest root mean square error over the steps, states weighted by how often they are met."""
    worst = 0.0
    for i in (1, 2, 3):
        x = EVERY[left == i]
        law = joint(ctx, x)
        weight = law.sum(1)
        exact = (law * ctx.reward.reward(ctx.policy.network.sequences)).sum(1) / weight
        got = value(ctx, ctx.policy, x, i, None, Noise.of(0, len(x)))
        worst = max(worst, float(((got - exact) ** 2 * weight).sum().div(weight.sum()).sqrt()))
    return worst


def test_svdd_mc_t1_the_value_is_the_expected_reward():
    ctx, value = learned()
    assert error(ctx, value) < 0.16, "a fit to 2,000 samples, whose rewards have a spread of .74"
    clean = EVERY[left == 0]
    assert torch.equal(
        value(ctx, ctx.policy, clean, 0, None, Noise.of(0, len(clean))), ctx.reward(clean[..., :-1], None)
    )


def test_svdd_mc_t1_rewards_of_other_samples_teach_nothing():
    ctx, value = learned(shuffle=True)
    assert error(ctx, value) > 0.3


def test_svdd_mc_t2_the_search_reaches_the_tilt_by_that_value():
    """With many children each step is p(x' | x) exp(V(x') / α): against the same by enumeration."""
    ctx, value = learned()
    alpha, n = 0.5, 2000
    states = TreeSearch(48, alpha, value=value)(ctx, Noise.of(2, n)).states
    code = torch.tensor([25, 5, 1])
    law = torch.zeros(125, dtype=torch.float64)
    law[-1] = 1
    for i in (3, 2, 1):
        after = EVERY[left == i - 1]
        worth = value(ctx, ctx.policy, after, i - 1, None, Noise.of(0, len(after))) / alpha
        moved = torch.zeros(125, dtype=torch.float64)
        with torch.no_grad():
            for k in (law > 0).nonzero()[:, 0]:
                step = ctx.policy.step(EVERY[k : k + 1], i).take(torch.zeros(len(after), dtype=torch.long))
                moved[left == i - 1] += law[k] * (step.log_prob(after) + worth).softmax(0)
        law = moved
    found = torch.bincount(states[-1].long() @ code, minlength=125) / n
    noise = float((law * (1 - law) / n).sqrt().sum()) / 2
    plain = torch.bincount(Rollout()(ctx, Noise.of(2, n)).states[-1].long() @ code, minlength=125) / n
    assert (found - law).abs().sum() / 2 < 2 * noise + 0.02 < (plain - law).abs().sum() / 2


def test_svdd_mc_costs_no_row_of_the_policy_to_fit():
    ctx = setting("random")
    value = Learned()
    loss = ValueRegression(value)
    ctx.modules = loss.modules(ctx)
    batch = Rollout()(ctx, Noise.of(0, 8))
    spent = ctx.meter.cost()
    before = {name: p.detach().clone() for name, p in ctx.policy.trainable().items()}
    training = Training(minibatch=8)
    fit(loss, ctx, batch, optimizer(parameters(ctx), training, ctx.modules), training, Noise.of(1, 1))
    assert ctx.meter.cost() == spent
    assert all(torch.equal(p, before[name]) for name, p in ctx.policy.trainable().items())
    assert value.network is ctx.modules["value"]
    assert value.network.head[-1].weight.abs().sum() > 0, "the value itself was fitted"


def test_rows_of_the_value_are_counted_apart_from_those_of_the_model():
    ctx = setting("random")
    value = Learned()
    loss = ValueRegression(value)
    ctx.modules = loss.modules(ctx)
    batch = Rollout()(ctx, Noise.of(0, 10))
    before = ctx.meter.cost()
    training = Training(updates=2, minibatch=15)
    fit(loss, ctx, batch, optimizer(parameters(ctx), training, ctx.modules), training, Noise.of(1, 1))
    assert ctx.meter.total("value") == ctx.meter.total("value_backward") == 10 * 3 * 2
    assert ctx.meter.cost() == before
    TreeSearch(4, 0.1, value=value)(ctx, Noise.of(2, 10))
    assert ctx.meter.total("value") == 60 + 10 * 4 * 2, "four children at each of two steps; at the last, the reward"
    assert ctx.meter.total("value_backward") == 60
