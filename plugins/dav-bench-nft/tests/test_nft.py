"""DiffusionNFT against what is known: the optimum of its loss, the law its rounds lead to, and the contract."""

import math

import pytest
import torch
from dav_bench_nft import NFT
from dav_bench_nft.loss import NegativeAware, contrast

from dav_bench import catalog
from dav_bench.core import Batch, Context, Meter, Noise, Rollout, Training, fit
from dav_bench.core.fit import optimizer, parameters
from dav_bench.testing import check_plugin

torch.set_num_threads(1)
GRID = torch.linspace(-6, 6, 1201, dtype=torch.float64)
MEANS, STD, STEPS = (-2.0, 2.0), 0.5, 16


def density(x):
    """The pretrained law of toy-mixture, up to a constant."""
    return sum(torch.exp(-((x - m) ** 2) / (2 * STD**2)) for m in MEANS)


def quality(x):
    """A chance that x is good: highest at 1."""
    return torch.exp(-((x - 1) ** 2) / 2)


def world(reward=quality, steps=STEPS):
    model = catalog().get("models", "toy-mixture").build({"hidden": 32}, {"steps": steps}).to("cpu", torch.float64)
    meter = Meter()
    model.attach(meter)
    return Context(model, model.reference(), lambda sample, cond=None: reward(sample[:, 0]), meter)


def posterior(model, x, i):
    """(n,) E[x_0 | x_i] and Cov(q, x_0 | x_i) of the pretrained law, by quadrature."""
    share = float(model.process.share(i, x)[0])
    noise = torch.exp(-((x - math.sqrt(share) * GRID) ** 2) / (2 * (1 - share)))
    weight = density(GRID) * noise
    weight = weight / weight.sum(1, keepdim=True)
    mean, good = weight @ GRID, weight @ quality(GRID)
    return mean, weight @ (quality(GRID) * GRID) - good * mean


def train(ctx, config, rounds, seed=0):
    loss, plan = NegativeAware(config), Training.of(config)
    ctx.modules = loss.modules(ctx)
    opt = optimizer(parameters(ctx), plan, ctx.modules)
    for r in range(rounds):
        batch = Rollout(on="old")(ctx, Noise.of(100 * seed + r, plan.samples))
        stats = fit(loss, ctx, batch, opt, plan, Noise.of(1000 + r, 1), (r / rounds, (r + 1) / rounds))
        stats |= batch.stats
    return stats


def test_two_points_and_the_formula():
    """u = 1 or -1 with chances .3 and .7, good with .9 or .2: Delta = (2 / beta) E[q] (E[q u] / E[q] - E[u])."""
    u, chance = torch.tensor([[1.0], [-1.0]]), torch.tensor([0.3, 0.7])
    q, beta = torch.tensor([0.9, 0.2]), 0.5
    old = (chance @ u).expand(2, 1)
    delta = torch.zeros(1, requires_grad=True)
    opt = torch.optim.SGD([delta], lr=0.1)
    for _ in range(2000):
        opt.zero_grad()
        (chance * contrast(u, old, old + delta, q, beta)).sum().backward()
        opt.step()
    good = float(chance @ q)
    formula = 2 / beta * good * (float(chance @ (q * u[:, 0])) / good - float(old[0]))
    assert formula == pytest.approx(1.176, abs=1e-3) and delta.item() == pytest.approx(formula, abs=1e-4)


@pytest.mark.parametrize("i", [2, 6, 11, 15])
def test_the_optimum_on_the_mixture_is_the_covariance(i):
    """The mean derivative along the formula is 0 there, within 4 standard errors, and not elsewhere."""
    ctx, n, beta = world(), 20_000, 0.7
    noise = Noise.of(i, n)
    side = torch.where(noise.fold(1).uniform(1) < 0.5, MEANS[0], MEANS[1]).double()
    x0 = side + STD * noise.fold(2).normal(1, dtype=torch.float64)
    x = ctx.policy.process.corrupt(x0, i, noise.fold(3))
    mean, covariance = posterior(ctx.reference, x, i)
    with torch.no_grad():
        old = ctx.reference.step(x, i).x0
    assert torch.allclose(old[:, 0], mean, atol=1e-6)  # the pretrained model is exact

    def slope(size, q):
        length = torch.full((n, 1), size, dtype=torch.float64, requires_grad=True)
        value = contrast(x0, old, old + length * (2 / beta) * covariance[:, None], q, beta)
        (each,) = torch.autograd.grad(value.sum(), length)
        return float(each.mean() / (each.std() / math.sqrt(n)))

    q = quality(x0[:, 0])
    assert abs(slope(1.0, q)) < 4
    assert slope(0.5, q) < -8 and slope(1.5, q) > 8
    assert abs(slope(1.0, torch.ones_like(q))) > 8  # without the negative half it is another optimum


def test_a_round_learns_the_covariance():
    ctx = world()
    plan = NFT(samples=2048, updates=12, minibatch=1024, lr=2e-2, schedule="linear", beta=1.0, quality="reward",
               pull=0.0, weight="plain", clip=10.0)  # fmt: skip
    train(ctx, plan, 1)
    step, exact = [], []
    for i in (4, 8, 12):
        x = Noise.of(7, 400).normal(1, dtype=torch.float64) * 1.5
        with torch.no_grad():
            step.append((ctx.policy.step(x, i).x0 - ctx.reference.step(x, i).x0)[:, 0])
        exact.append(2 * posterior(ctx.reference, x, i)[1])
    step, exact = torch.cat(step), torch.cat(exact)
    assert float((step @ exact) / (exact @ exact)) == pytest.approx(1, abs=0.15)
    assert float(torch.corrcoef(torch.stack([step, exact]))[0, 1]) > 0.95


def test_small_rounds_tilt_the_law():
    """K rounds of step 2 / beta with a fixed q: p(x) exp(2 K q / beta), here exp(2 q)."""
    rounds, beta = 6, 6.0
    ctx = world()
    plan = NFT(samples=2048, updates=6, minibatch=1024, lr=1e-2, beta=beta, quality="reward", pull=0.0,
               weight="plain", lag_rise=0.0, clip=10.0)  # fmt: skip
    train(ctx, plan, rounds)
    x = Rollout(keep=False)(ctx, Noise.of(5, 4096)).states[-1][:, 0]

    def law(lam):
        weight = density(GRID) * torch.exp(lam * quality(GRID))
        return weight / weight.sum()

    target = law(2 * rounds / beta)
    right, good = float(target[GRID > 0].sum()), float(target @ quality(GRID))
    before = float(law(0.0) @ quality(GRID))
    assert float((x > 0).double().mean()) == pytest.approx(right, abs=0.04)
    assert float(quality(x).mean()) == pytest.approx(good, abs=0.25 * (good - before))


def test_the_lagged_model_follows_when_a_round_ends():
    ctx = world()
    plan = NFT(samples=8, updates=2, minibatch=40, lag_rise=0.25, lag_max=0.4)
    loss, schedule = NegativeAware(plan), Training.of(plan)
    ctx.modules = loss.modules(ctx)
    opt = optimizer(parameters(ctx), schedule, ctx.modules)
    old, new = (dict(n.named_parameters()) for n in (ctx.modules["old"], ctx.policy.network))
    for r, kept in enumerate((0.0, 0.25, 0.4)):
        before = {name: p.clone() for name, p in old.items()}
        batch = Rollout(on="old")(ctx, Noise.of(r, 8))
        assert -(-len(batch) // 40) * 2 > 1
        fit(loss, ctx, batch, opt, schedule, Noise.of(9, 1))
        for name in old:
            assert torch.allclose(old[name], kept * before[name] + (1 - kept) * new[name], atol=1e-12)
        assert int(ctx.modules["lag"].rounds) == r + 1


def test_quality_compares_samples_of_one_prompt():
    loss, ctx = NegativeAware(NFT(reach=1.0)), world()
    ctx.modules = loss.modules(ctx)
    batch = Batch(torch.zeros(2, 4, 1), torch.tensor([0.0, 1.0, 10.0, 11.0]), cond=torch.tensor([0, 0, 1, 1]))
    loss.prepare(ctx, batch, None)
    q = batch.per_sample["quality"]
    assert q[0] == q[2] < 0.5 < q[1] == q[3]
    flat = Batch(torch.zeros(2, 4, 1), torch.ones(4))
    loss.prepare(ctx, flat, None)
    assert flat.per_sample["quality"].tolist() == [0.5] * 4
    with pytest.raises(ValueError, match=r"rewards in \[0, 1\]"):
        NegativeAware(NFT(quality="reward")).prepare(ctx, batch, None)


@pytest.mark.parametrize("bad", [{"beta": 0}, {"lag_max": 1.0}, {"pull": -1}, {"quality": "score"}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(Exception, match="settings of method 'nft'"):
        catalog().get("methods", "nft").settings(bad)


def test_the_contract():
    checks = {c.name: c for c in check_plugin("nft")}
    assert checks["method nft: it runs on toy-mixture"].status == "ok"
    assert "continuous" in checks["method nft: it runs on toy-tokens"].note  # tokens have no such contrast
