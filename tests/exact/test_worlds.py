"""The exact worlds themselves: targets against their tables, laws of chains against sums, distances by hand."""

import importlib.util
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from worlds import disturb, model, reward, setting

from dav_bench.builtin import exact
from dav_bench.builtin.exact import SAME, ExactTarget, Law, log_z, world, world_of
from dav_bench.builtin.metrics import exact as metrics
from dav_bench.builtin.metrics.base import MetricContext, Samples
from dav_bench.builtin.models.mixture import build_mixture, build_ring
from dav_bench.builtin.multilinear import contract, fold, letters, outer
from dav_bench.builtin.rewards.tfbind8 import build as build_binding
from dav_bench.builtin.rewards.toy import QuadraticReward, RingReward, centres
from dav_bench.builtin.toy import ToyMixture, ToyModel
from dav_bench.core import ExactValue, Noise, PosteriorMean, Rollout
from dav_bench.errors import DavBenchError

TFBIND8 = Path(__file__).parents[2] / "tasks" / "tfbind8"


@pytest.fixture(scope="module")
def binding():
    """The world tfbind8."""
    return world_of("tfbind8")


@pytest.fixture(scope="module")
def ring():
    """The world toy-ring."""
    return world_of("toy-ring")


def plane(n: int = 401, reach: float = 6.0) -> tuple[torch.Tensor, float]:
    """Points (n², 2) of a square, and the area of each."""
    axis = torch.linspace(-reach, reach, n, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


# ---- mixtures


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


def test_ring_target():
    """FX4: weights of the clusters under p R by quadrature, as methods.md prints them."""
    x, area = plane()
    law = build_ring(ToyModel(), {}).network.law
    near = (-((x[:, None] - centres()) ** 2).sum(-1)).softmax(-1)
    score = near @ (torch.arange(8, dtype=torch.float64) / 7)
    assert torch.allclose(RingReward()(x), score.log())
    p = law.log_prob(x).exp() * area
    assert float(p.sum()) == pytest.approx(1) and float((p * score).sum()) == pytest.approx(0.5)
    target = p * score / (p * score).sum()
    cluster = torch.cdist(x, centres()).argmin(1)
    weights = torch.zeros(8, dtype=torch.float64).index_add_(0, cluster, target)
    printed = [0.0071, 0.0357, 0.0714, 0.1071, 0.1429, 0.1786, 0.2143, 0.2429]
    assert weights.tolist() == pytest.approx(printed, abs=1e-4)
    assert float((target * score).sum()) == pytest.approx(0.7017, abs=1e-4)


def test_ring_reward_is_finite_far_away():
    x = 1e3 * torch.tensor([[0.0, 1.0], [0.0, -1.0], [1.0, 1.0]], dtype=torch.float64).requires_grad_(True)
    r = RingReward()(x)
    (g,) = torch.autograd.grad(r.sum(), x)
    assert r.isfinite().all() and g.isfinite().all() and (r <= RingReward.bound).all()


@pytest.mark.parametrize("kind", ["ring", "quadratic"])
def test_mixtures_in_the_plane_by_quadrature(kind):
    """Posterior mean and soft value by Bayes' rule on a grid; a denoiser of the wrong law is seen."""
    x0, _ = plane()
    built = build_ring(ToyModel(hidden=8), {"steps": 20}).to("cpu", torch.float64)
    r = RingReward() if kind == "ring" else QuadraticReward(0.7, 0.3)
    alpha, prior = 0.6, built.network.law.log_prob(x0)
    for i in (2, 9, 16, 20):
        a = built.process.alphas_bar[i]
        for at in ((0.3, 1.1), (-1.0, 0.2)):
            x = torch.tensor([at], dtype=torch.float64)
            post = (prior - ((x - a.sqrt() * x0) ** 2).sum(-1) / (2 * (1 - a))).softmax(0)
            assert torch.allclose(built.predict(x, i).detach()[0], post @ x0, atol=1e-6)
            v = alpha * (post * (r(x0) / alpha).exp()).sum().log()
            assert torch.allclose(built.network.soft_value(r, alpha)(x, i)[0], v, atol=1e-6)
            assert not torch.allclose(built.predict(x, i - 1).detach()[0], post @ x0, atol=1e-3)


def test_mixtures_in_three_dimensions():
    """One component in d dimensions is d lines: tilt and denoiser factorise, and so does the log of the integral."""
    config = ToyMixture(weights=(1.0,), means=(-1.0, 0.5, 2.0), std=0.5)
    wide = build_mixture(config, {"steps": 10}).to("cpu", torch.float64)
    lines = [
        build_mixture(ToyMixture(weights=(1.0,), means=(m,), std=0.5), {"steps": 10}).to("cpu", torch.float64)
        for m in config.means
    ]
    r = QuadraticReward(1.5, 0.4)
    target, log_integral = wide.network.law.tilt(r.a / 0.5, r.c)
    parts = [line.network.law.tilt(r.a / 0.5, r.c) for line in lines]
    assert log_integral == pytest.approx(sum(part[1] for part in parts))
    assert torch.allclose(target.means, torch.cat([part[0].means for part in parts], 1))
    x = torch.randn(4, 3, dtype=torch.float64)
    each = torch.cat([line.predict(x[:, k : k + 1], 6) for k, line in enumerate(lines)], 1)
    assert torch.allclose(wide.predict(x, 6), each)
    value = wide.network.soft_value(r, 0.5)(x, 6)
    apart = sum(line.network.soft_value(r, 0.5)(x[:, k : k + 1], 6) for k, line in enumerate(lines))
    assert torch.allclose(value, apart)


def test_the_residual_moves_the_mean_by_the_covariance():
    """x̂_0 + Cov[x_0 | x] s for a slope s: what a linear reward <s, x_0> does to the posterior, to first order."""
    built = build_ring(ToyModel(hidden=8), {"steps": 20}).to("cpu", torch.float64)
    x0, _ = plane()
    x, a = torch.tensor([[0.3, 1.1]], dtype=torch.float64), built.process.alphas_bar[14]
    post = (built.network.law.log_prob(x0) - ((x - a.sqrt() * x0) ** 2).sum(-1) / (2 * (1 - a))).softmax(0)
    slope = torch.tensor([0.4, -0.7], dtype=torch.float64)
    plain = built.predict(x, 14).detach()
    with torch.no_grad():
        built.network.residual[-1].bias.copy_(slope)
    off = x0 - post @ x0
    moved = (built.predict(x, 14) - plain).detach()[0]
    assert torch.allclose(moved, off.T @ (post * (off @ slope)), atol=1e-5)


@pytest.mark.parametrize(
    "bad", [{"weights": (0.5, -0.5)}, {"means": (1.0, 2.0, 3.0)}, {"std": 0.0}, {"weights": ()}]
)
def test_mixtures_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad)) if "weights" not in bad else "weights"):
        ToyMixture(**bad)


# ---- tokens


@pytest.mark.parametrize("name", ["toy-tokens", "tfbind8"])
def test_the_denoiser_is_the_sum_over_all_sequences(name, binding):
    """Sum-product over blocks against the table, on relaxed states, values and gradients."""
    network = (binding if name == "tfbind8" else world_of(name)).model.network
    length, vocab = network.length, network.vocab
    assert float(network.prior.sum()) == pytest.approx(1)
    x = torch.rand(5, length, vocab + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (x / x.sum(-1, keepdim=True)).requires_grad_(True)
    joint = network.prior * outer(x[..., :-1] + x[..., -1:])
    table = (joint @ network.sequences.flatten(1) / joint.sum(1, keepdim=True)).view(5, length, vocab)
    ours = network.marginals(x)
    assert torch.allclose(ours, table, atol=1e-12)
    weight = torch.rand_like(table)
    g, h = (torch.autograd.grad((f * weight).sum(), x, retain_graph=True)[0] for f in (ours, table))
    assert torch.allclose(g, h, atol=1e-10) and float(g.abs().max()) > 1e-3


def test_conditionals_of_revealed_bases(binding):
    """p(x_l | AC??????) of the chain of order 3 by hand, and a chain that forgets is another law."""
    network = binding.model.network
    x = F.one_hot(torch.tensor([[0, 1, 4, 4, 4, 4, 4, 4]]), 5).double()
    third = network.start[0, 1] / network.start[0, 1].sum()
    fourth = third @ network.follow[0, 1]
    assert torch.allclose(network.marginals(x)[0, 2], third) and torch.allclose(
        network.marginals(x)[0, 3], fourth
    )
    assert not torch.allclose(third, network.start.sum((0, 1)), atol=1e-2)


def test_the_prior_is_the_chain_of_the_recipe():
    """`prior.npz` follows from the elements by the shipped recipe; the chain from its counts."""
    spec = importlib.util.spec_from_file_location("fit_prior", TFBIND8 / "fit_prior.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    with np.load(TFBIND8 / "prior.npz") as held:
        counts, start, follow = held["counts"], held["start"], held["follow"]
    with np.load(TFBIND8.parent / "dna" / "dhs_200bp.npz") as data:
        train = data["sequence"][data["chrom"] > 2]
    assert np.array_equal(recipe.counts(train, 4), counts) and counts.min() > 5000
    assert np.allclose(start.ravel(), counts.reshape(64, 4).sum(1) / counts.sum())
    assert np.allclose(
        follow.reshape(64, 4), counts.reshape(64, 4) / counts.reshape(64, 4).sum(1, keepdims=True)
    )
    both = np.array([[0, 1, 2, 3, 0]], np.uint8)  # ACGTA and its reverse complement TACGT
    words = {int(w) for w in recipe.words(both, 3).ravel()} | {
        int(w) for w in recipe.words(3 - both[:, ::-1], 3).ravel()
    }
    assert set(np.nonzero(recipe.counts(both, 3))[0].tolist()) == words


def test_the_reward_is_the_table_and_its_multilinear_extension(binding):
    with np.load(TFBIND8 / "tfbind8_six6.npz") as held:
        table = torch.from_numpy(held["escore"])
    r, every = build_binding(), binding.prior.x
    assert torch.equal(r(every.float()), table) and "reward.grad" in r.provides
    best = F.one_hot(torch.tensor([["ACGT".index(c) for c in s] for s in ("TGATACCT", "AGGTATCA")]), 4)
    assert r(best.float()).tolist() == pytest.approx([0.49105, 0.49105])
    x = torch.rand(3, 8, 4, dtype=torch.float64).softmax(-1).requires_grad_(True)
    chance = outer(x)  # of each 8-mer when positions are independent
    value = r.double()(x)
    assert torch.allclose(value, chance @ table.double(), atol=1e-12)
    (g,) = torch.autograd.grad(value.sum(), x)
    other = x.detach().clone()
    other[:, 5] = F.one_hot(torch.tensor(2), 4).double()
    assert torch.allclose(r(other), value + (g[:, 5] * (other - x)[:, 5]).sum(-1)), "linear in each row"


def test_halves_of_odd_length_and_single_tokens():
    for length in (1, 2, 3, 5):
        values = torch.rand(3**length, dtype=torch.float64)
        rows = torch.rand(4, length, 3, dtype=torch.float64)
        assert torch.allclose(contract(fold(values, 3, length), rows), outer(rows) @ values)
    assert letters(3, 2).tolist() == [list(s) for s in itertools.product(range(3), repeat=2)]


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


def test_the_soft_value_of_8_mers_is_a_martingale(binding):
    """At states with 5 and 1 masks; a soft value at another temperature is none."""
    value, alpha = binding.soft_value(), binding.alpha
    assert value.by_state
    for ids in ([[0, 4, 3, 4, 4, 1, 4, 4]], [[2, 0, 3, 0, 4, 1, 1, 3]]):
        x = F.one_hot(torch.tensor(ids), 5).double()
        i = int(x[..., -1].sum())
        kids = [(position, base) for position in range(8) if ids[0][position] == 4 for base in range(4)]
        after = x.repeat(len(kids), 1, 1)
        for row, (position, base) in enumerate(kids):
            after[row, position] = F.one_hot(torch.tensor(base), 5).double()
        p = binding.model.step(x, i).take(torch.zeros(len(kids), dtype=torch.long)).log_prob(after).exp()
        assert float(p.sum()) == pytest.approx(1)
        ahead = value.value(after, i - 1)
        assert float(alpha * (p * (ahead / alpha).exp()).sum().log()) == pytest.approx(
            float(value.value(x, i))
        )
        assert abs(float((p * ahead).sum() - value.value(x, i))) > 1e-3


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


# ---- laws of chains


def every_law(world, logw):
    """Law of a chain over the 125 states of toy-tokens, step by step with `log_prob`: kernels p exp(logw) / sum."""
    every = F.one_hot(torch.cartesian_prod(*[torch.arange(5)] * 3), 5).double()
    mass = (every[..., -1].sum(1) == 3).double()
    for i in range(world.process.T, 0, -1):
        after = torch.zeros_like(mass)
        for k in mass.nonzero()[:, 0]:
            step = world.model.step(every[k : k + 1], i).take(torch.zeros(125, dtype=torch.long))
            after += mass[k] * (step.log_prob(every) + logw(every, i - 1)).softmax(0)
        mass = after
    return mass[every[..., -1].sum(1) == 0]


@pytest.mark.parametrize("order", ["random", "parallel"])
def test_laws_of_token_chains(order):
    """One token at a time the chain has the law of its model; in parallel it does not, even in 8 steps."""
    here = world_of("toy-tokens", {"steps": 8}, order=order)
    law = here.law(here.model)
    assert torch.allclose(law.p, every_law(here, lambda x, i: torch.zeros(len(x))), atol=1e-12)
    assert float(law.p.sum()) == pytest.approx(1) and torch.equal(law.x, here.prior.x)
    off = float((law.p - here.model.network.prior).abs().sum()) / 2
    assert off == pytest.approx(0 if order == "random" else 0.0349, abs=1e-4)
    assert torch.allclose(here.prior.p, law.p)


@pytest.mark.parametrize("kind", ["random", "parallel", "mixture"])
def test_laws_of_other_models_are_those_of_their_rollouts(kind):
    policy = model(kind, 12, untrained=False)
    disturb(policy, 0.2)
    here, n = world(policy, reward(kind), 1.0), 20_000
    law = here.law(policy)
    x = Rollout(keep=False)(here.context(policy), Noise.of(1, n)).states[-1]
    x = policy.process.clean(policy.process.unpack(x)).double()
    share = torch.bincount(here.classes(x), minlength=here.count) / n
    p = here.shares(law)
    assert ((share - p).abs() < 4 * (p * (1 - p) / n).sqrt() + 1e-9).all()
    assert here.apart(law, here.prior) > 1e-3, "the pretrained law would have passed"
    if kind == "mixture":
        values = [
            (f(x[:, 0]), f(law.x[:, 0])) for f in (torch.Tensor.abs, torch.square, lambda v: (3 * v).sin())
        ]
        for f, g in values:
            assert float(f.mean()) == pytest.approx(law.mean(g), abs=4 * float(f.std()) / math.sqrt(n))


def test_the_law_of_8_mers_of_another_model(binding):
    """Every probability from one pass over 390,625 states: marginals against rollouts, KL against the definition."""
    policy = binding.policy().to("cpu", torch.float32)
    disturb(policy, 1.0)
    law, n = binding.law(policy), 4000
    assert float(law.p.sum()) == pytest.approx(1, abs=1e-5)
    x = Rollout(keep=False)(binding.context(policy), Noise.of(2, n)).states[-1]
    share = F.one_hot(x.long(), 5)[..., :-1].double().mean(0)
    p = (law.p[:, None, None] * law.x).sum(0)
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / n).sqrt()).all()
    assert float((p - (binding.prior.p[:, None, None] * law.x).sum(0)).abs().max()) > 0.05
    t = binding.target().p
    assert binding.kl() == pytest.approx(float((t * (t / binding.prior.p).log()).sum()))


def test_the_chain_of_a_mixture_by_quadrature():
    """The chain is narrower than the mixture it comes from (variance 4.25, log Z −1.1648), less so with more steps."""
    off = []
    for steps in (25, 50, 100):
        here = world_of("toy-mixture", {"steps": steps})
        x = here.prior.x[:, 0]
        assert abs(here.prior.mean(x)) < 1e-9
        off.append((4.25 - here.prior.mean(x**2), here.log_z() - here.model.network.law.tilt(1.0, 1.0)[1]))
    assert off[1] == pytest.approx((0.0918, 0.01344), abs=1e-4)
    for wide, narrow in itertools.pairwise(off):
        assert all(1.8 < a / b < 2.2 for a, b in zip(wide, narrow, strict=True)), "of first order in the step"
    assert here.kl() == pytest.approx(float((here.target().p * (here.target().p / here.prior.p).log()).sum()))


def test_grids_are_fine_enough(monkeypatch):
    """Twice the nodes change nothing; a sum over the full matrix of each step gives the same law."""
    coarse = world_of("toy-mixture", {"steps": 30})
    flat = coarse.steered(ExactValue(lambda x, i: torch.zeros(len(x), dtype=x.dtype)))
    assert coarse.apart(flat, coarse.prior) == pytest.approx(0, abs=1e-4)
    assert flat.tilt(coarse.reward(flat.x))[1] == pytest.approx(coarse.log_z(), abs=1e-6)
    monkeypatch.setattr(exact, "NODES", {1: 2048, 2: 128})
    fine = exact.GaussianWorld(coarse.model, coarse.reward, 1.0)
    assert fine.log_z() == pytest.approx(coarse.log_z(), abs=1e-7)
    assert fine.best() == pytest.approx(coarse.best(), abs=1e-6)


def test_the_chain_of_the_ring(ring):
    """By symmetry E R = 1/2; weights are near those of the mixture itself."""
    assert ring.log_z() == pytest.approx(math.log(0.5), abs=1e-4)
    assert ring.shares(ring.prior).tolist() == pytest.approx([1 / 8] * 8, abs=1e-5)
    printed = [0.0071, 0.0357, 0.0714, 0.1071, 0.1429, 0.1786, 0.2143, 0.2429]
    assert ring.shares().tolist() == pytest.approx(printed, abs=5e-4)


def test_no_grid_in_three_dimensions_and_no_table_in_parallel():
    r = QuadraticReward()
    deep = build_mixture(ToyMixture(weights=(1.0,), means=(0.0, 0.0, 0.0)), {"steps": 5})
    with pytest.raises(DavBenchError, match="3 dimensions is not integrated"):
        world(deep, r, 1.0).log_z()
    with pytest.raises(DavBenchError, match="not tabulated") as err:
        world_of("tfbind8", order="parallel").log_z()
    assert "model.order=random" in err.value.fix
    with pytest.raises(DavBenchError, match="states no temperature"):
        world_of("dna")


# ---- steered chains


def test_steps_tilted_by_the_soft_value_lead_to_the_target():
    here = world_of("toy-tokens", alpha=0.5)
    assert torch.allclose(here.steered(here.soft_value()).p, here.target().p, atol=1e-12)
    wrong = ExactValue(lambda x, i: 0.5 * here.soft_value().value(x, i))
    assert here.apart(here.steered(wrong), here.target()) > 0.01


@pytest.mark.parametrize("look", ["mean", "mode"])
@pytest.mark.parametrize("order", ["random", "parallel"])
def test_steps_tilted_by_the_posterior_mean(look, order):
    """Against kernels written out over 125 states; discounted too."""
    here, value = world_of("toy-tokens", {"steps": 3}, order=order), PosteriorMean(look)

    def logw(x, i, gamma=1.0):
        pred = here.model.predict(x, i) if i else None
        step = here.model.process.step(pred, x, i) if i else None
        shown = x[..., :-1] if i == 0 else step.x0 if look == "mean" else step.mode
        return gamma**i * here.reward(shown) / here.alpha

    law = here.steered(value)
    assert torch.allclose(law.p, every_law(here, logw), atol=1e-12)
    assert here.apart(law, here.target()) > 0.005
    discounted = here.steered(value, 0.5)
    assert torch.allclose(discounted.p, every_law(here, lambda x, i: logw(x, i, 0.5)), atol=1e-12)


def test_steps_of_the_mixture_tilted_by_its_soft_value_nearly_lead_to_its_target():
    """The soft value is that of the process, not of the chain: what is left falls with the grid of time."""
    off = []
    for steps in (12, 50):
        here = world_of("toy-mixture", {"steps": steps})
        off.append(here.apart(here.steered(here.soft_value()), here.target()))
    assert off[1] < off[0] < 0.02
    assert here.apart(here.steered(PosteriorMean()), here.target()) > 5 * off[1]


# ---- exact samples and distances


@pytest.mark.parametrize(
    ("name", "n"), [("toy-tokens", 2000), ("tfbind8", 2000), ("toy-mixture", 2000), ("toy-ring", 1000)]
)
def test_exact_samples_lie_in_the_null_interval_and_others_do_not(name, n, binding, ring):
    here = {"tfbind8": binding, "toy-ring": ring}.get(name) or world_of(name)
    low, high = here.null(n, draws=200)
    x = here.sample(Noise.of(3, n))
    assert low <= here.distance(x) <= high and low < 0 < high
    assert torch.equal(here.sample(Noise.of(3, 5)), x[:5]), "a sample does not depend on its neighbours"
    half = torch.cat([x[n // 10 :], here.prior.x[here.prior.index(Noise.of(4, n // 10))]])
    assert (
        here.distance(half) > here.distance(x)
        and here.distance(here.target(2).x[here.target(2).index(Noise.of(5, n))]) > high
    )
    plain = here.prior.x[here.prior.index(Noise.of(6, n))]
    assert here.distance(plain) == pytest.approx(1, abs=0.3)


def test_the_distance_has_no_bias_and_the_null_holds_its_share():
    here, n = world_of("toy-tokens"), 50
    sets = here.sample(Noise.of(7, 2000 * n)).view(2000, n, 3, 4)
    found = torch.tensor([here.distance(x) for x in sets])
    assert abs(float(found.mean())) < 4 * float(found.std()) / math.sqrt(2000)
    low, high = here.null(n)
    assert float(((found >= low) & (found <= high)).double().mean()) == pytest.approx(0.99, abs=0.012)
    plug_in = torch.tensor([
        here.apart(Law(here.prior.x, torch.bincount(here.classes(x), minlength=64).double() / n), here.target())
        for x in sets[:200]
    ])  # fmt: skip
    assert float(plug_in.mean()) > 4 * float(found.std()) / math.sqrt(200), "with its bias it would be seen"


def test_distances_by_hand():
    here = world_of("toy-tokens")
    x = here.prior.x[[0, 5, 5, 62]]
    same = (x[:, None] * x).sum((-1, -2))  # equal positions of each pair
    k = SAME ** (3 - same)
    every = SAME ** (3 - (x[:, None] * here.prior.x).sum((-1, -2)))
    pairs = SAME ** (3 - (here.prior.x[:, None] * here.prior.x).sum((-1, -2)))
    t, p = here.target().p, here.prior.p
    unit = (p - t) @ pairs @ (p - t)
    value = (k.sum() - 4) / 12 - 2 * (every @ t).mean() + t @ pairs @ t
    assert here.distance(x) == pytest.approx(float(value / unit))
    line = world_of("toy-mixture", {"steps": 10})
    x = torch.tensor([[0.1], [-2.0], [1.5]], dtype=torch.float64)
    y, q = line.target().x, line.target().p
    gaps, d = 2.1 + 1.4 + 3.5, line.prior.p - q
    value = 2 * float((torch.cdist(x, y) @ q).mean()) - gaps / 3 - float(q @ torch.cdist(y, y) @ q)
    assert line.distance(x) == pytest.approx(value / -float(d @ torch.cdist(y, y) @ d))


def test_exact_sampling_needs_a_bound():
    class Slope:
        domain, provides = "vector", frozenset()

        def __call__(self, sample, cond=None):
            return sample[:, 0]

    here = world(model("mixture"), Slope(), 1.0)
    assert here.log_z() > 0
    with pytest.raises(DavBenchError, match="bound"):
        here.sample(Noise.of(0, 2))
    with pytest.raises(DavBenchError, match="not known exactly"):
        world(SimpleNamespace(reference=lambda: SimpleNamespace(network=None, name="net")), None, 1.0)


@pytest.mark.parametrize("kind", ["mixture", "random"])
def test_the_yardstick_row_is_drawn_from_the_target(kind):
    ctx = setting(kind)
    batch = ExactTarget(0.5)(ctx, Noise.of(0, 3000))
    here = world(ctx.reference, reward(kind), 0.5)
    x = ctx.policy.process.clean(ctx.policy.process.unpack(batch.states[-1]))
    low, high = here.null(3000, draws=200)
    assert low <= here.distance(x) <= high and torch.allclose(batch.reward.double(), reward(kind)(x).double())
    assert batch.states.shape[0] == 1 and ctx.meter.total("forward") == 0


# ---- metrics


def measured(here, x):
    """Context and samples of a run in a world, as metrics get them."""
    task = SimpleNamespace(target={"alpha": here.alpha})
    return MetricContext(task, here.model.reference, reward=here.reward), Samples(x)


@pytest.mark.parametrize("name", ["toy-tokens", "toy-mixture"])
def test_metrics_of_exact_samples(name):
    here, n = world_of(name, {"steps": 20}), 2000
    x = here.sample(Noise.of(8, n))
    ctx, samples = measured(here, x)
    assert metrics.target_distance(samples, ctx) == pytest.approx(here.distance(x))
    assert abs(metrics.target_gap(samples, ctx)) < 4 * float(here.reward(x).std()) / math.sqrt(n)
    p = here.shares()
    typical = float((2 * p * (1 - p) / (math.pi * n)).sqrt().sum()) / 2
    assert 0 < metrics.target_tv(samples, ctx) < 2.5 * typical
    assert metrics.entropy(samples, ctx) == pytest.approx(here.entropy(), abs=0.1)
    assert metrics.log_prob(samples, ctx).mean() == pytest.approx(
        here.target().mean(torch.from_numpy(metrics.log_prob(Samples(here.target().x), ctx))), abs=0.1
    )
    assert metrics.target_kl(samples, ctx) is None, "nobody said that these are plain samples of a model"
    assert name == "toy-mixture" or log_z(name) == pytest.approx(here.log_z())


def test_metrics_by_hand():
    here = world_of("toy-tokens")
    x = here.prior.x[[0, 0, 0, 63]]
    ctx, samples = measured(here, x)
    r = here.reward(x)
    assert metrics.target_gap(samples, ctx) == pytest.approx(float(r.mean()) - here.best())
    assert metrics.entropy(samples, ctx) == pytest.approx(math.log(6 / 3))
    t = here.target().p
    assert metrics.target_tv(samples, ctx) == pytest.approx(
        1 - float(t[0].clamp(max=0.75) + t[63].clamp(max=0.25))
    )
    assert metrics.log_prob(samples, ctx).tolist() == pytest.approx(
        [math.log(0.4**3)] * 3 + [math.log(0.1 * 0.4**2)]
    )
    assert metrics.entropy(Samples(here.prior.x[:4]), ctx) == pytest.approx(math.log(6)), (
        "no pair: as for one"
    )


def test_the_kl_metric_is_that_of_the_model():
    policy = model("random", untrained=False)
    here = world(policy, reward("random"), 1.0)
    task = SimpleNamespace(target={"alpha": 1.0})
    ctx = MetricContext(task, policy.reference, reward=reward("random"), policy=lambda: policy)
    t, q = here.target().p, here.law(policy).p
    assert metrics.target_kl(Samples(here.prior.x[:2]), ctx) == pytest.approx(
        float((t * (t / q).log()).sum())
    )
    plain = MetricContext(task, policy.reference, reward=reward("random"), policy=policy.reference)
    assert metrics.target_kl(Samples(here.prior.x[:2]), plain) == pytest.approx(0.521330, abs=1e-5)


def test_bound_8_mers(binding):
    share = float((binding.target().p * (binding.rewards > 0.45)).sum())
    assert share == pytest.approx(0.272, abs=1e-3)
    hit = metrics.bound(Samples(binding.prior.x), None)
    assert int(hit.sum()) == 222


def test_metrics_of_exact_worlds_are_left_out_elsewhere():
    ctx = MetricContext(
        SimpleNamespace(target={"alpha": 1.0}), lambda: SimpleNamespace(network=None), reward=reward("random")
    )
    x = Samples(torch.eye(4)[torch.randint(0, 4, (6, 200))])
    for metric in (
        metrics.target_distance,
        metrics.target_gap,
        metrics.target_tv,
        metrics.target_kl,
        metrics.log_prob,
    ):
        assert metric(x, ctx) is None
    assert metrics.entropy(x, ctx) == pytest.approx(math.log(15))


def test_the_numbers_the_documents_state(binding, ring):
    assert (binding.log_z(), binding.best(), binding.kl()) == pytest.approx(
        (4.5036, 0.39528, 3.4020), abs=1e-4
    )
    assert binding.prior.mean(binding.rewards) == pytest.approx(-0.03851, abs=1e-5)
    assert (binding.entropy(), binding.entropy(binding.prior)) == pytest.approx((7.171, 10.549), abs=1e-3)
    assert (ring.best(), ring.kl()) == pytest.approx((-0.4492, 0.2439), abs=2e-4)
