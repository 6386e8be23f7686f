"""Searchers on worlds whose optimal kernels are known: what they select, and how far off a finite search is."""

import math

import pytest
import torch
import torch.nn.functional as F
from worlds import disturb, setting

from dav_bench.core import BestOf, ExactValue, Noise, PosteriorMean, Rollout, TreeSearch

EVERY = F.one_hot(torch.cartesian_prod(*[torch.arange(5)] * 3), 5).double()  # all 125 states of the tokens
CODE = torch.tensor([25, 5, 1])


def exact(ctx, alpha: float) -> ExactValue:
    value = ctx.policy.network.soft_value(ctx.reward.reward, alpha)
    return ExactValue(value, by_state=ctx.policy.domain == "sequence")


def kernel(ctx, value, x: torch.Tensor, i: int, scale: float) -> torch.Tensor:
    """(125,) p(x') exp(scale V(x')) / Z over all next states of one state x at i, by enumeration."""
    step = ctx.policy.step(x[None], i).take(torch.zeros(len(EVERY), dtype=torch.long))
    with torch.no_grad():
        p = step.log_prob(EVERY)
        live = p > -math.inf
        pred = ctx.policy.predict(EVERY[live], i - 1) if i > 1 else None
        v = value(ctx, ctx.policy, EVERY[live], i - 1, pred, Noise.of(0, int(live.sum())))
    law = torch.zeros(len(EVERY), dtype=torch.float64)
    law[live] = (p[live] + scale * v).softmax(0)
    return law


def frequencies(states: torch.Tensor) -> torch.Tensor:
    return torch.bincount(states.long() @ CODE, minlength=125).double() / len(states)


def tv(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p - q).abs().sum() / 2)


# ---- one step


VALUES = {"exact": None, "mode": PosteriorMean("mode"), "mean": PosteriorMean("mean")}


@pytest.mark.parametrize("guide", [False, True])
@pytest.mark.parametrize("name", VALUES)
def test_selections_approach_the_tilted_kernel_as_children_grow(name, guide):
    """First step: with the exact soft value the optimal kernel, with a posterior mean the Tweedie-tilted one.

    Guided children are drawn from another law and reach the same kernel, because their weights carry p / q.
    """
    n, alpha, start = 3000, 0.5, EVERY[-1]
    ctx = setting("random", untrained=True)
    value = VALUES[name] or exact(ctx, alpha)
    target = kernel(ctx, value, start, 3, 1 / alpha)
    gaps = []
    for width in (1, 4, 16, 64):
        states = TreeSearch(width, alpha, guide=guide, value=value)(ctx, Noise.of(width, n)).states
        gaps.append(tv(frequencies(states[1]), target))
    noise = float((target * (1 - target) / n).sqrt().sum()) / 2
    assert gaps[-1] < 2 * noise + 0.01
    if not guide:
        assert gaps[0] > gaps[1] > gaps[2] > gaps[3]
        assert gaps[0] > 0.25, "one child is the untilted model"


def test_the_kernels_of_the_values_differ():
    """Otherwise the test above would not tell them apart."""
    ctx, alpha = setting("random"), 0.5
    laws = [kernel(ctx, value or exact(ctx, alpha), EVERY[-1], 3, 1 / alpha) for value in VALUES.values()]
    assert min(tv(laws[a], laws[b]) for a, b in ((0, 1), (0, 2), (1, 2))) > 0.04


@pytest.mark.parametrize(("exponent", "powers"), [("left-1", (2, 1, 0)), ("left", (3, 2, 1))])
def test_discount_scales_the_value_by_the_steps_left(exponent, powers):
    """Each of the three steps from its own state, against the kernel tilted by γ^k V / α (dav.md A1, E4)."""
    n, alpha, gamma = 6000, 0.5, 0.5
    ctx = setting("random")
    value = PosteriorMean("mean")
    states = TreeSearch(96, alpha, gamma, exponent=exponent, value=value)(ctx, Noise.of(0, n)).states
    for k, i in enumerate((3, 2, 1)):
        parents, seen = (states[k].long() @ CODE).unique(return_counts=True)
        parent = parents[seen.argmax()]
        chosen = states[k + 1][states[k].long() @ CODE == parent]
        target = kernel(ctx, value, EVERY[parent], i, gamma ** powers[k] / alpha)
        other = kernel(ctx, value, EVERY[parent], i, gamma ** (powers[k] - 1) / alpha)
        noise = float((target * (1 - target) / len(chosen)).sqrt().sum()) / 2
        assert tv(frequencies(chosen), target) < 2 * noise + 0.01 < tv(target, other)


@pytest.mark.parametrize("guide", [False, True])
def test_mixture_selections_have_the_moments_of_the_optimal_kernel(guide):
    """FX1 at each step of a coarse grid: residuals against the kernel by quadrature are standard."""
    n, alpha, steps = 1500, 1.0, 8
    ctx = setting("mixture", steps)
    value = exact(ctx, alpha)

    def residuals(width: int) -> torch.Tensor:
        states = TreeSearch(width, alpha, guide=guide, value=value)(ctx, Noise.of(0, n)).states
        z = torch.linspace(-9, 9, 1001, dtype=torch.float64)
        out = []
        for k, i in enumerate(range(steps, 1, -1)):  # the last step is deterministic
            step = ctx.policy.step(states[k], i)
            grid = (step.mean + step.std * z).detach()
            v = value.value(grid.reshape(-1, 1), i - 1).view(grid.shape)
            w = (v / alpha - z**2 / 2).softmax(1)
            mean = (w * grid).sum(1)
            std = ((w * grid**2).sum(1) - mean**2).sqrt()
            out.append((states[k + 1][:, 0] - mean) / std)
        return torch.stack(out)

    wide = residuals(64)
    assert (wide.mean(1).abs() < 4 / math.sqrt(n) + 0.03).all()
    assert ((wide**2).mean(1) - 1).abs().max() < 4 * math.sqrt(2 / n) + 0.03
    if not guide:
        assert residuals(1).mean(1).abs().max() > 0.2, "one child is the untilted model"


def test_exact_kernels_compose_to_the_target():
    """FX3: with many children the final sequences have the law p exp(r / α) / Z."""
    n, alpha = 4000, 1.0
    ctx = setting("random")
    states = TreeSearch(64, alpha, value=exact(ctx, alpha))(ctx, Noise.of(0, n)).states
    freq = torch.bincount(states[-1].long() @ torch.tensor([16, 4, 1]), minlength=64) / n
    target = ctx.policy.network.target(ctx.reward.reward, alpha)
    assert tv(freq, target) < float((target * (1 - target) / n).sqrt().sum()) / 2 + 0.02


# ---- finite searches


@pytest.mark.parametrize(
    ("width", "select", "mean", "distance"),
    [
        (1, "sample", 0.67, 0.37),
        (4, "sample", 1.20, 0.15),
        (32, "sample", 1.51, 0.06),
        (32, "argmax", 3.48, 0.80),
    ],
)
def test_svdd_is_biased_as_it_should_be(width, select, mean, distance):
    """FX3 with exact values (methods.md 6.2): only many children with sampling reach E r = 1.58."""
    n = 8000
    ctx = setting(
        "random", untrained=False
    )  # the search runs on the reference, whatever became of the policy
    value = ExactValue(ctx.reference.network.soft_value(ctx.reward.reward, 1.0), by_state=True)
    batch = TreeSearch(width, 1.0, select=select, on="ref", value=value)(ctx, Noise.of(0, n))
    error = float(batch.reward.std()) / math.sqrt(n)
    assert float(batch.reward.mean()) == pytest.approx(mean, abs=4 * error + 0.015)
    freq = torch.bincount(batch.states[-1].long() @ torch.tensor([16, 4, 1]), minlength=64) / n
    target = ctx.reference.network.target(ctx.reward.reward, 1.0)
    assert tv(freq, target) == pytest.approx(distance, abs=0.03)


def test_one_child_is_a_sample_of_the_model():
    n = 20_000
    ctx = setting("random")
    ids = TreeSearch(1, 0.01)(ctx, Noise.of(0, n)).states[-1].long() @ torch.tensor([16, 4, 1])
    prior = ctx.policy.network.prior
    freq = torch.bincount(ids, minlength=64) / n
    assert ((freq - prior).abs() < 4 * (prior * (1 - prior) / n).sqrt()).all()


@pytest.mark.parametrize(("n", "mean"), [(4, 1.46424), (16, 2.28568)])
def test_best_of_n_has_its_exact_law(n, mean):
    """P(reward = v) = F(v)^N − F(v⁻)^N with F the reference's distribution of rewards (methods.md 6.1)."""
    runs = 20_000 // n
    ctx = setting("random")
    got = BestOf(n)(ctx, Noise.of(0, runs)).reward
    rewards = ctx.reward.reward(ctx.policy.network.sequences)
    levels = rewards.unique()
    cdf = torch.stack([ctx.policy.network.prior[rewards <= v].sum() for v in levels])
    law = (cdf**n).diff(prepend=torch.zeros(1, dtype=torch.float64))
    assert float((law * levels).sum()) == pytest.approx(mean, abs=1e-5)
    freq = torch.stack([(got == v).double().mean() for v in levels])
    assert ((freq - law).abs() <= 4 * (law * (1 - law) / runs).sqrt()).all()


class OfAnother:
    """The look-ahead value of another context's policy, whoever asks."""

    uses_prediction, by_state, grad_by_state = False, True, False

    def __init__(self, ctx, value) -> None:
        self.ctx, self.value = ctx, value

    def __call__(self, ctx, model, x, i, pred, noise, cond=None):
        own = self.ctx.policy.predict(x, i) if i > 0 else None
        return self.value(self.ctx, self.ctx.policy, x, i, own, noise)


@pytest.mark.parametrize("kind", ["parallel", "random"])
def test_reference_anchor_weighs_against_the_reference(kind):
    """With p_ref in the weights a tuned policy is only a proposal: selections are those of the reference's kernel."""
    n, alpha, i = 3000, 1.0, 3
    plain, ctx = setting(kind, steps=3), setting(kind, steps=3)
    disturb(ctx.policy, scale=2.0)
    value = PosteriorMean("mean")
    target = kernel(plain, value, EVERY[-1], i, 1 / alpha)
    gaps = {}
    for anchor in ("ref", "policy"):
        search = TreeSearch(64, alpha, anchor=anchor, value=OfAnother(plain, value))
        gaps[anchor] = tv(frequencies(search(ctx, Noise.of(0, n)).states[1]), target)
    assert gaps["ref"] < 0.07
    assert gaps["policy"] > 0.15


def test_plain_rollouts_follow_the_policy():
    ctx = setting("random", untrained=False)
    n = 10_000
    first = frequencies(Rollout()(ctx, Noise.of(0, n)).states[1])
    step = ctx.policy.step(EVERY[-1:], 3).take(torch.zeros(125, dtype=torch.long))
    law = step.log_prob(EVERY).exp().detach()
    assert ((first - law).abs() <= 4 * (law * (1 - law) / n).sqrt()).all()
