"""Look-ahead values: what the reward is shown, and the gradient that guides."""

import math

import pytest
import torch
from worlds import disturb, setting

from dav_bench.core import ExactValue, MaskedStep, Noise, PosteriorMean
from dav_bench.core.value import PosteriorMean as Value


def states(ctx, i: int, n: int = 6) -> torch.Tensor:
    """Some states at i, by corrupting samples."""
    process = ctx.policy.process
    if process.kind == "gaussian":
        return process.corrupt(2 * Noise.of(5, n).normal(1, dtype=torch.float64), i, Noise.of(0, n))
    ids = (Noise.of(5, n).uniform(3) * 4).long()
    return process.corrupt(torch.nn.functional.one_hot(ids, 4).double(), i, Noise.of(0, n))


@pytest.mark.parametrize("kind", ["mixture", "parallel"])
@pytest.mark.parametrize("lookahead", ["mode", "mean"])
def test_value_is_the_reward_of_the_clean_prediction(kind, lookahead):
    ctx = setting(kind)
    x = states(ctx, 5)
    pred = ctx.policy.predict(x, 5).detach()
    step = ctx.policy.process.step(pred, x, 5)
    value = PosteriorMean(lookahead)(ctx, ctx.policy, x, 5, pred, Noise.of(0, 6))
    assert torch.equal(value, ctx.reward(step.x0 if lookahead == "mean" else step.mode))
    with pytest.raises(ValueError, match="prediction"):
        PosteriorMean()(ctx, ctx.policy, x, 5, None, Noise.of(0, 6))


def test_value_of_a_clean_state_is_its_reward():
    ctx = setting("parallel")
    x = states(ctx, 0)
    assert torch.equal(PosteriorMean()(ctx, ctx.policy, x, 0, None, Noise.of(0, 6)), ctx.reward(x[..., :-1]))


def test_a_drawn_lookahead_is_unbiased_for_one_reveal():
    """Mean over draws is E r under independent positions, which for this reward is r of the probabilities."""
    n, ctx = 20_000, setting("parallel")
    x = states(ctx, 5)[:1].expand(n, -1, -1)
    pred = ctx.policy.predict(x[:1], 5).detach().expand(n, -1, -1)
    drawn = PosteriorMean("sample")(ctx, ctx.policy, x, 5, pred, Noise.of(3, n))
    mean = PosteriorMean("mean")(ctx, ctx.policy, x[:1], 5, pred[:1], Noise.of(3, 1))
    assert float(drawn.mean()) == pytest.approx(float(mean), abs=4 * float(drawn.std()) / math.sqrt(n))


@pytest.mark.parametrize("kind", ["mixture", "parallel"])
def test_gradient_is_that_of_each_value_in_its_own_state(kind):
    """Central differences of r(x̂_0(x)) through the network."""
    ctx = setting(kind)
    disturb(ctx.policy)
    x = states(ctx, 5)
    got, pred = PosteriorMean("mean").grad(ctx, ctx.policy, x, 5, Noise.of(0, 6))
    assert torch.allclose(pred, ctx.policy.predict(x, 5))

    def value(y):
        with torch.no_grad():
            step = ctx.policy.step(y, 5)
        return ctx.reward(step.x0)

    for place in range(x[0].numel()):
        e = torch.zeros_like(x[0]).flatten()
        e[place] = 1e-6
        slope = (value(x + e.view(x[0].shape)) - value(x - e.view(x[0].shape))) / 2e-6
        assert torch.allclose(got.flatten(1)[:, place], slope, atol=1e-5)


def test_guidance_needs_no_graph_of_the_weights_and_counts_its_rows():
    ctx = setting("mixture", micro_batch=4)
    with torch.no_grad():
        PosteriorMean().grad(ctx, ctx.policy, states(ctx, 5), 5, Noise.of(0, 6))
    assert all(p.grad is None for p in ctx.policy.network.parameters())
    counts = {k: ctx.meter.total(k) for k in ("forward", "backward", "reward", "reward_backward")}
    assert counts == dict.fromkeys(counts, 6)


def test_the_releases_mean_over_the_batch_divides_guidance():
    ctx = setting("parallel")
    x = states(ctx, 5)
    whole, _ = PosteriorMean().grad(ctx, ctx.policy, x, 5, Noise.of(0, 6))
    release, _ = PosteriorMean(batch="mean").grad(ctx, ctx.policy, x, 5, Noise.of(0, 6))
    assert torch.allclose(release * 6, whole)


def relaxed(probabilities: list[float], relax: str, n: int = 40_000) -> torch.Tensor:
    """(n, V) hard draws of one masked position."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    x = torch.zeros(1, 1, 5, dtype=torch.float64)
    x[..., -1] = 1
    step = MaskedStep(p.log().view(1, 1, 4), torch.full((1, 1, 1), 0.5), x)
    step = step.take(torch.zeros(n, dtype=torch.long))
    return Value(relax=relax)._relaxed(step, Noise.of(1, n))[:, 0]


def test_gumbel_draws_the_clean_prediction(deviation):
    law = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    assert deviation(relaxed(law.tolist(), "gumbel").round().sum(0), law) < 4
    assert torch.allclose(relaxed(law.tolist(), "mean")[0], law)


def test_the_releases_gumbel_draws_noise():
    """E14: probabilities in place of logits keep a sure token with .405 only and drop a uniform one at 16 %."""
    sure = relaxed([1 - 3e-12, 1e-12, 1e-12, 1e-12], "gumbel-release")
    assert (
        float(sure[:, 0].mean())
        == pytest.approx(math.e / (math.e + 4), abs=0.01)
        == pytest.approx(0.405, abs=0.01)
    )
    uniform = relaxed([0.25] * 4, "gumbel-release")
    assert float((uniform.sum(-1) < 0.5).double().mean()) == pytest.approx(0.16, abs=0.01)


@pytest.mark.parametrize(("relax", "kept"), [("mean", True), ("gumbel", True), ("gumbel-release", False)])
def test_the_release_forgets_what_a_masked_position_becomes(relax, kept):
    """With a network that looks at no context, a letter at a masked position matters to itself alone."""
    ctx = setting("parallel")
    law = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    ctx.policy.network.forward = lambda x, t: law.expand(*x.shape[:2], 4) + 0 * x[..., :1]
    x = states(ctx, 5)
    g, _ = PosteriorMean(relax=relax).grad(ctx, ctx.policy, x, 5, Noise.of(0, 6))
    masked = x[..., -1] > 0
    assert bool(g[..., :-1][masked].any()) == kept
    assert g[..., :-1][~masked].any()


def test_exact_value_and_its_gradient():
    ctx = setting("mixture")
    value = ExactValue(lambda x, i: i * (x**3).sum(-1))
    x = states(ctx, 4)
    assert torch.equal(value(ctx, ctx.policy, x, 4, None, Noise.of(0, 6)), 4 * (x**3).sum(-1))
    g, pred = value.grad(ctx, ctx.policy, x, 4, Noise.of(0, 6))
    assert torch.allclose(g, 12 * x**2)
    assert torch.allclose(pred, ctx.policy.predict(x, 4))
