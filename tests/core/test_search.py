"""Searchers: what they hand on, weights in detail, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from worlds import KINDS, context, disturb, model, setting

from dav_bench.core import (
    BestOf,
    ExactValue,
    GaussianProcess,
    Model,
    Noise,
    NonFinite,
    RealSamples,
    Rollout,
    TreeSearch,
)
from dav_bench.core.search import Known, evaluate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", [Rollout(), TreeSearch(3, 0.5), TreeSearch(3, 0.5, guide=True), BestOf(3)])
def test_trajectories_begin_at_the_prior_and_end_in_their_reward(kind, search):
    ctx = setting(kind)
    batch = search(ctx, Noise.of(0, 7))
    process = ctx.policy.process
    assert batch.states.shape[:2] == (process.T + 1, 7)
    last = ctx.policy.unpack(batch.states[-1])
    assert torch.equal(batch.reward, ctx.reward(process.clean(last)))
    if kind != "mixture":
        masks = (batch.states == 4).sum(-1)
        assert (masks[0] == 3).all()
        assert not masks[-1].any()
        assert (masks.diff(dim=0) <= 0).all()


def test_best_of_n_keeps_the_best_of_its_own_samples():
    ctx = setting("parallel")
    noise = Noise.of(0, 9)
    every = Rollout()(ctx, noise.repeat(5)).reward.view(9, 5)
    assert torch.equal(BestOf(5)(ctx, noise).reward, every.amax(1))


def test_rollout_may_keep_the_last_state_alone():
    ctx = setting("parallel")
    whole, last = (Rollout(keep)(ctx, Noise.of(0, 5)).states for keep in (True, False))
    assert torch.equal(last, whole[-1:])


@pytest.mark.parametrize("kind", ["parallel", "random"])
def test_evaluate_computes_equal_states_once_and_takes_what_parents_have(kind):
    ctx = setting(kind)
    disturb(ctx.policy)
    with torch.no_grad():
        ids = torch.tensor([[4, 4, 4], [0, 4, 4], [4, 4, 4]])
        x = F.one_hot(ids, 5).double()
        parents = evaluate(ctx, ctx.policy, None, x, 3, Noise.of(0, 3))
        assert ctx.meter.total("forward") == 2
        kids = F.one_hot(torch.tensor([[0, 4, 4], [0, 1, 4], [0, 1, 4], [4, 4, 4]]), 5).double()
        known = evaluate(ctx, ctx.policy, parents, kids, 2, Noise.of(0, 4), TreeSearch().value)
        assert ctx.meter.total("forward") == 3, "one new state"
        assert ctx.meter.total("shared") == 1 + 3
        assert ctx.meter.total("reward") == 3, "parents without values give none"
        assert torch.allclose(known.pred, ctx.policy.predict(kids, 2), atol=1e-12)


def test_put_replaces_rows():
    a = Known(torch.zeros(4, 1), torch.zeros(4, 2), torch.zeros(4))
    b = Known(torch.ones(2, 1), torch.ones(2, 2), torch.ones(2))
    c = a.put(torch.tensor([1, 3]), b)
    assert c.x[:, 0].tolist() == c.value.tolist() == c.pred[:, 1].tolist() == [0, 1, 0, 1]


class Affine(torch.nn.Module):
    """Posterior mean of x_0 ~ N(0, 1): linear in the state."""

    time_input = True

    def __init__(self, process) -> None:
        super().__init__()
        self.shares = process.alphas_bar
        self.one = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t):
        return self.one * self.shares[(t * 40).round().long()].sqrt()[:, None] * x


def test_guided_weights_of_a_linear_reward_are_linear():
    """dav.md, check 1: with r = a x and x̂_0 = c_i x, log w has slope (a / α)(c_{i−1} − c_i) in the child."""
    a, alpha, process = 3.0, 0.5, GaussianProcess((1,), 40)
    world = Model(Affine(process), process, "vector")
    ctx = context(world, lambda x, cond=None: a * x[:, 0])
    search = TreeSearch(16, alpha, guide=True)
    for i in (40, 23, 7, 2):
        x = Noise.of(i, 4).normal(1, dtype=torch.float64)
        with torch.no_grad():
            found = search._expand(ctx, world, Known(x), i, Noise.of(0, 4), None)
        child, logw = found.kids.x.view(4, 16), found.logw
        slope = (logw - logw[:, :1])[:, 1:] / (child - child[:, :1])[:, 1:]
        c, before = process.alphas_bar[i].sqrt(), process.alphas_bar[i - 1].sqrt()
        assert torch.allclose(slope, (a / alpha * (before - c)).expand_as(slope), rtol=1e-6, atol=1e-9)
        mean = world.step(x, i).tilt(torch.full_like(x, a / alpha * float(c))).mean
        assert (child.mean(1, keepdim=True) - mean).abs().max() < 4 * float(
            process.step(x, x, i).std[0, 0]
        ) / 4


def test_rewards_are_centred_before_they_are_scaled():
    """In float32 a large constant would eat the digits of reward / α; here both rewards are exact, so weights agree."""
    world = model("random", dtype=torch.float32)
    x, found = world.process.prior(Noise.of(0, 6)), []
    for shift in (0.0, 2.0**14):
        ctx = context(world, lambda s, cond=None, shift=shift: s[..., 3].sum(-1) + shift)
        with torch.no_grad():
            parents = evaluate(ctx, world, None, x, 3, Noise.of(0, 6))
            found.append(TreeSearch(8, 0.003)._expand(ctx, world, parents, 3, Noise.of(1, 6), None).logw)
    assert found[0].any()
    assert torch.equal(*found)


def test_mean_of_the_weights_divides_by_dimensions():
    """E2: the release averages log-probabilities over dimensions; for tokens these are positions."""
    for kind, size in (("parallel", 3), ("mixture", 1)):
        ctx = setting(kind)
        x = ctx.policy.process.prior(Noise.of(0, 3), torch.float64)
        value = ExactValue(lambda s, i: s.flatten(1).sum(1) * 0 + (s.flatten(1) * 0.3).sum(1) ** 2)
        logw = {}
        with torch.no_grad():
            for reduce in ("sum", "mean"):
                search = TreeSearch(6, 0.1, guide=True, reduce=reduce, value=value)
                found = search._expand(ctx, ctx.policy, Known(x), ctx.policy.process.T, Noise.of(1, 3), None)
                v = value.value(found.kids.x, 0).view(3, 6)
                logw[reduce] = found.logw - (v - v.amax(1, keepdim=True)) / 0.1
        assert torch.allclose(logw["mean"] * size, logw["sum"])


def test_equal_weights_leave_the_mean_of_the_proposal():
    """The control variate: with a constant reward the mean over children has no noise."""
    for kind in KINDS:
        world = model(kind)
        ctx = context(world, lambda x, cond=None: x.flatten(1).sum(1) * 0)
        batch = TreeSearch(3, 0.5, keep="mean")(ctx, Noise.of(0, 5))
        x = world.unpack(batch.states[2])
        step = world.step(x, batch.steps - 2)
        assert torch.allclose(batch.mean[2], step.mean.detach(), atol=1e-12)


def test_the_last_step_may_be_greedy_over_twice_the_children():
    ctx = setting("parallel")
    TreeSearch(4, 0.5, last="greedy")(ctx, Noise.of(0, 5))
    assert ctx.meter.total("reward") + ctx.meter.total("reward_shared") == 5 * (7 * 4 + 8)


def test_capabilities_follow_the_options():
    assert TreeSearch().requires == {"step"}
    assert "reward.grad" in TreeSearch(guide=True).requires
    assert "reference" in TreeSearch(anchor="ref").requires


def test_what_is_not_finite_is_refused_by_name():
    world = model("mixture")
    ctx = context(world, lambda x, cond=None: torch.sqrt(x[:, 0] * 0))
    with pytest.raises(NonFinite, match="gradient"):
        TreeSearch(2, 0.5, guide=True)(ctx, Noise.of(0, 3))
    ctx = context(world, lambda x, cond=None: x[:, 0] / 0)
    with pytest.raises(NonFinite, match="reward"):
        TreeSearch(2, 0.5)(ctx, Noise.of(0, 3))


def test_real_samples_are_drawn_without_replacement():
    world = model("parallel")
    real = F.one_hot(torch.cartesian_prod(*[torch.arange(4)] * 3), 4).double()
    with pytest.raises(ValueError, match="no real data"):
        RealSamples()(context(world, None), Noise.of(0, 5))
    world.data = {"test": real}.__getitem__
    ctx = setting("parallel")
    ctx.policy.data = world.data
    batch = RealSamples()(ctx, Noise.of(0, 40))
    assert len(batch.states[-1].unique(dim=0)) == 40
    assert torch.equal(batch.reward, ctx.reward(ctx.policy.unpack(batch.states[-1])[..., :-1]))
    assert torch.equal(RealSamples()(ctx, Noise.of(0, 10)).states, batch.states[:, :10])
