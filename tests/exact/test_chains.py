"""The linear-Gaussian chain against its tabulated numbers and against simulation."""

import math

import pytest
import torch
from chains import Chain

from dav_bench.core import Noise, PosteriorMean, Rollout


def test_tabulated_numbers():
    chain = Chain()
    assert chain.marginal == pytest.approx((0.583272, 1.436015), abs=1e-6)
    assert chain.target[0] == pytest.approx(4.891316, abs=1e-6)
    # KL of the tilt: that of its marginal, and that of the whole path, prior included
    path = 0.5 * chain.prior_shift**2 + 0.5 * float((chain.shifts**2 / chain.s**2).sum())
    assert path == pytest.approx(6.462067, abs=1e-6)
    assert 0.5 * chain.marginal[1] * (chain.b / chain.alpha) ** 2 == pytest.approx(path)
    assert float(chain.gain[-1]) * chain.prior_shift == pytest.approx(0.04434, abs=1e-5)
    assert chain.b * float(chain.gain[:-1].sum()) == pytest.approx(13.17635, abs=1e-5)
    assert float((chain.s**-2.0).sum()) == pytest.approx(172.6436, abs=1e-4)


@pytest.mark.parametrize("dim", [1, 3])
def test_values_are_soft(dim):
    """exp(v_i / α) is a martingale of the chain, and its mean over the prior is Z."""
    chain = Chain(dim=dim)
    x = torch.linspace(-2, 2, 3 * dim, dtype=torch.float64).view(3, dim)
    for i in range(1, 21):
        # E exp(a (m + s e)) = exp(a m + a² s² / 2)
        a = chain.A[i - 1] / chain.alpha
        mean = chain.k[i - 1] * x + chain.c[i - 1]
        after = (a * mean + (a * chain.s[i - 1]) ** 2 / 2).sum(-1) + dim * chain.B[i - 1] / chain.alpha
        assert torch.allclose(after, chain.value(x, i) / chain.alpha)
    at_start = dim * (float(chain.B[-1]) / chain.alpha + (float(chain.A[-1]) / chain.alpha) ** 2 / 2)
    assert at_start == pytest.approx(chain.log_z)


def test_posterior_mean_differs_from_the_value_by_a_constant():
    chain = Chain()
    ctx = chain.context()
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    for i in (1, 7, 20):
        with torch.no_grad():
            r = PosteriorMean()(ctx, ctx.policy, x, i, ctx.policy.predict(x, i), Noise.of(0, 5))
        assert (chain.value(x, i) - r).diff().abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["step", "affine"])
def test_optimal_policy_reaches_the_target(kind):
    """Shifted means and a shifted prior; without the latter the mean falls short by Π k · A_T / α."""
    n = 40_000
    for start, short in ((Chain().prior_shift, 0.0), (0.0, 0.04434)):
        chain = Chain(start=start)
        ctx = chain.context(kind)
        with torch.no_grad():
            ctx.policy.network.theta.copy_(chain.shifts)
        x = Rollout()(ctx, Noise.of(0, n)).states[-1]
        mean, var = Chain().target
        assert float(x.mean()) == pytest.approx(mean - short, abs=4 * math.sqrt(var / n))
        assert float(x.var()) == pytest.approx(var, rel=4 * math.sqrt(2 / n))


def test_a_shared_bias_moves_the_reward_by_its_known_slope():
    """∂E[r]/∂θ = b Σ_i Π_{u < i} k_u, by paired noise."""
    chain = Chain()
    ctx = chain.context("shared")
    before = Rollout()(ctx, Noise.of(0, 10)).reward
    with torch.no_grad():
        ctx.policy.network.theta.fill_(0.01)
    slope = (Rollout()(ctx, Noise.of(0, 10)).reward - before) / 0.01
    assert slope.tolist() == pytest.approx([13.17635] * 10, abs=1e-5)
