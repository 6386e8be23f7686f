"""The exact worlds themselves: targets against their tables, soft values against their definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from worlds import model, reward, setting

from dav_bench.core import Noise, Rollout


@pytest.mark.parametrize(
    ("alpha", "weights", "means", "var", "log_z", "mean", "variance"),
    [(1, (0.039166, 0.960834), (-1.4, 1.8), 0.2, -1.164766, 1.67467, 0.585349),
     (0.25, (0.000335, 0.999665), (-0.5, 1.5), 0.125, -2.039385, 1.499329, 0.126341)],
)  # fmt: skip
def test_mixture_target(alpha, weights, means, var, log_z, mean, variance):
    network = model("mixture", 200).network
    target, integral = network.law.tilt(1 / alpha, 1.0)
    assert torch.equal(target.means, network.target(reward("mixture"), alpha).means)
    w, mu, s2 = target.weights, target.means[:, 0], target.var
    assert w.tolist() == pytest.approx(weights, abs=1e-6)
    assert mu.tolist() == pytest.approx(means)
    assert s2 == pytest.approx(var)
    assert integral == pytest.approx(log_z, abs=1e-6)
    assert float((w * mu).sum()) == pytest.approx(mean, abs=1e-5)
    assert float((w * (mu**2 + s2)).sum() - (w * mu).sum() ** 2) == pytest.approx(variance, abs=1e-5)
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    p = 0.5 * sum(torch.exp(-2 * (x - m) ** 2) / math.sqrt(math.pi / 2) for m in (-2, 2))
    z = torch.trapezoid(p * (reward("mixture")(x[:, None]) / alpha).exp(), x)
    assert float(z.log()) == pytest.approx(log_z, abs=1e-6)


def test_mixture_soft_value_and_posterior_are_integrals():
    """v_i(x) = α log ∫ p(x_0 | x) exp(r / α), the posterior by Bayes' rule on a fine grid."""
    world, r, alpha = model("mixture", 20), reward("mixture"), 0.5
    x0 = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    prior = sum(torch.exp(-2 * (x0 - m) ** 2) for m in (-2, 2))
    value = world.network.soft_value(r, alpha)
    for i in (1, 5, 12, 20):
        a = world.process.alphas_bar[i]
        for x in (-2.5, -0.3, 0.0, 1.7):
            post = prior * torch.exp(-((x - a.sqrt() * x0) ** 2) / (2 * (1 - a)))
            post = post / post.sum()
            state = torch.tensor([[x]], dtype=torch.float64)
            exact = alpha * float((post * (r(x0[:, None]) / alpha).exp()).sum().log())
            assert float(value(state, i)) == pytest.approx(exact, abs=1e-6)
            assert float(world.predict(state, i).detach()) == pytest.approx(
                float((post * x0).sum()), abs=1e-6
            )
    clean = torch.tensor([[0.3], [-2.0]], dtype=torch.float64)
    assert torch.allclose(value(clean, 0), r(clean))


@pytest.mark.parametrize(("alpha", "log_z", "mean"), [(1, 1.058402, 1.579732), (0.5, 3.308478, 2.848125)])
def test_token_target(alpha, log_z, mean):
    network, r = model("random").network, reward("random")
    rewards = r(network.sequences)
    assert float(network.prior.sum()) == pytest.approx(1)
    assert float((network.prior * rewards).sum()) == pytest.approx(0.67)
    assert float((network.prior * (rewards / alpha).exp()).sum().log()) == pytest.approx(log_z, abs=1e-6)
    assert float((network.target(r, alpha) * rewards).sum()) == pytest.approx(mean, abs=1e-6)
    every = F.pad(network.sequences, (0, 1))
    assert torch.allclose(network.soft_value(r, alpha)(every, 0), rewards)


def test_token_soft_value_is_a_martingale():
    """exp(v_i(x) / α) = E[exp(v_{i−1} / α)] over every next state: the chain of single reveals is exact."""
    world, r, alpha = model("random"), reward("random"), 0.7
    value = world.network.soft_value(r, alpha)
    every = F.one_hot(torch.cartesian_prod(*[torch.arange(5)] * 3), 5).double()  # all 125 states
    left = every[..., -1].sum(1).long()
    for i in (3, 2, 1):
        for x in every[left == i]:
            after = every[left == i - 1]
            step = world.step(x[None], i).take(torch.zeros(len(after), dtype=torch.long))
            p = step.log_prob(after).exp().detach()
            assert float(p.sum()) == pytest.approx(1)
            assert float((p * (value(after, i - 1) / alpha).exp()).sum().log()) == pytest.approx(
                float(value(x[None], i)) / alpha, abs=1e-9
            )


def test_rewards_have_a_gradient_on_relaxed_samples():
    for kind, shape in (("mixture", (3, 1)), ("random", (3, 3, 4))):
        x = torch.rand(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(reward(kind), (x,))
        assert "reward.grad" in reward(kind).provides
        assert reward(kind).domain == model(kind).domain


@pytest.mark.parametrize("steps", [50, 200])
def test_rollouts_of_the_pretrained_mixture_have_its_moments(steps):
    x = Rollout()(setting("mixture", steps), Noise.of(0, 20_000)).states[-1][:, 0]
    assert float((x < 0).double().mean()) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(20_000))
    assert float(x.var()) == pytest.approx(4.25, rel=0.04), "the grid costs about 2 % at 100 steps"


def test_rollouts_of_the_pretrained_tokens_have_its_law():
    world = setting("random")
    n, network = 20_000, world.policy.network
    ids = Rollout()(world, Noise.of(0, n)).states[-1].long() @ torch.tensor([16, 4, 1])
    freq = torch.bincount(ids, minlength=64) / n
    assert ((freq - network.prior).abs() < 4 * (network.prior * (1 - network.prior) / n).sqrt()).all()
