"""Step laws, by enumeration of all next states: each question against its definition."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from dav_bench.core import GaussianStep, MaskedStep, Noise, SingleRevealStep

L, V = 3, 2
MASK = V
EVERY = torch.tensor(list(itertools.product(range(V + 1), repeat=L)))  # (27, L) all states, the mask being V
STATES = {
    "all masked": [MASK] * 3,
    "part masked": [0, MASK, MASK],
    "one masked": [1, 0, MASK],
    "clean": [1, 0, 1],
}


def onehot(ids) -> torch.Tensor:
    return F.one_hot(torch.as_tensor(ids), V + 1).double()


def masked_step(kind: str, state: str, seed: int = 0, reveal: float = 0.3) -> MaskedStep:
    """A law with unequal tokens, at one state."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(1, L, V, generator=generator, dtype=torch.float64).log_softmax(-1)
    x = onehot([STATES[state]])
    if kind == "single":
        step = SingleRevealStep.uniform(log_probs, x)
        skew = torch.randn(1, L, generator=generator, dtype=torch.float64)
        return SingleRevealStep(log_probs, step.reveal, x, (step.order + skew).log_softmax(-1))
    return MaskedStep(log_probs, torch.full((1, 1, 1), reveal, dtype=torch.float64), x)


def law(step: MaskedStep) -> torch.Tensor:
    """(27,) probability of each next state."""
    return step.take(torch.zeros(len(EVERY), dtype=torch.long)).log_prob(onehot(EVERY)).exp()


def counts(x: torch.Tensor) -> torch.Tensor:
    """(27,) how often each state occurs among (N, L, V + 1)."""
    ids = x.argmax(-1)
    return torch.bincount((ids * torch.tensor([9, 3, 1])).sum(-1), minlength=len(EVERY)).double()


both = pytest.mark.parametrize("kind", ["parallel", "single"])
states = pytest.mark.parametrize("state", STATES)


@both
@states
@pytest.mark.parametrize("reveal", [0.3, 1.0])
def test_probabilities_sum_to_one(kind, state, reveal):
    assert float(law(masked_step(kind, state, reveal=reveal)).sum()) == pytest.approx(1, abs=1e-12)


@both
@states
def test_histogram_of_samples_is_log_prob(kind, state):
    n, step = 20_000, masked_step(kind, state)
    p = law(step)
    freq = counts(step.take(torch.zeros(n, dtype=torch.long)).sample(Noise.of(1, n))) / n
    assert ((freq - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 1e-12).all()


@both
@states
@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_rsample_is_a_valid_draw_with_a_gradient(kind, state, tau, deviation):
    n, step = 20_000, masked_step(kind, state)
    logits = step.log_probs.clone().requires_grad_(True)
    live = type(step)(**{**step.__dict__, "log_probs": logits.log_softmax(-1)}).take(
        torch.zeros(n, dtype=torch.long)
    )
    x = live.rsample(Noise.of(2, n), tau)
    hard = onehot(x.argmax(-1))
    assert torch.allclose(x.detach(), hard, atol=1e-12), "forward is one-hot"
    if state == "clean":
        assert torch.equal(hard, live.x)
        return
    assert deviation(counts(hard), law(step)) < 4
    x[..., 0].sum().backward()
    masked = torch.tensor(STATES[state]) == MASK
    assert logits.grad[0, masked].abs().min() > 0
    assert not logits.grad[0, ~masked].any()


def test_a_relaxed_position_whose_largest_class_is_a_token_counts_as_revealed():
    """Its share of the mask goes to that token or stays, by Gumbel-softmax of their two chances (DRAKES)."""
    x = torch.tensor([[[0.7, 0.1, 0.2], [0.1, 0.3, 0.6], [0.0, 0.0, 1.0]]], dtype=torch.float64)
    step = MaskedStep(masked_step("parallel", "all masked").log_probs, torch.full((1, 1, 1), 0.3), x)
    noise, tau = Noise.of(3, 1), 0.5
    drawn = (step.rsample(noise, tau, soft=True) - (1 - x[..., -1:]) * x) / x[..., -1:]
    gumbel = noise.gumbel(L, V + 1, dtype=torch.float64)[0]
    chance = torch.tensor([0.3, 0.0, 0.7], dtype=torch.float64)  # token 0 is kept if revealed
    assert torch.allclose(drawn[0, 0], ((chance.log() + gumbel[0]) / tau).softmax(-1), atol=1e-7)
    assert torch.allclose(drawn.sum(-1), torch.ones(1, L, dtype=torch.float64), atol=1e-12)
    assert (drawn[0, 1:] > 0).all(), "a position that is mostly masked draws from all tokens"


@both
@pytest.mark.parametrize("mask_channel", [True, False])
def test_full_tilt_is_the_exponential_tilt(kind, mask_channel):
    """rate=True: p(x) exp<g, x> / Z, where g without a mask channel is 0 there."""
    g = torch.randn(1, L, V + mask_channel, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for state in STATES:
        step = masked_step(kind, state)
        weight = law(step) * (F.pad(g, (0, 1 - mask_channel)) * onehot(EVERY)).sum((1, 2)).exp()
        assert torch.allclose(law(step.tilt(g, rate=True)), weight / weight.sum(), atol=1e-12)


@both
def test_token_tilt_leaves_the_rate_of_reveal(kind):
    """rate=False: within each set of revealed positions the exponential tilt; the chance of the set is kept."""
    g = torch.randn(1, L, V, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    tokens = (F.pad(g, (0, 1)) * onehot(EVERY)).sum((1, 2)).exp()
    where_masked = ((EVERY == MASK) * torch.tensor([4, 2, 1])).sum(1)
    for state in STATES:
        step = masked_step(kind, state)
        before, after = law(step), law(step.tilt(g))
        for which in where_masked.unique():
            rows = where_masked == which
            assert float(after[rows].sum()) == pytest.approx(float(before[rows].sum()), abs=1e-12)
            if before[rows].sum() > 0:
                weight = before[rows] * tokens[rows]
                assert torch.allclose(after[rows], weight / weight.sum() * before[rows].sum(), atol=1e-12)


@both
@states
def test_kl_is_its_sum_over_all_states(kind, state):
    for seed in range(5):
        p, q = masked_step(kind, state, seed, reveal=0.3), masked_step(kind, state, seed + 50, reveal=0.6)
        p_law, q_law = law(p), law(q)
        live = p_law > 0
        exact = (p_law * (p_law / q_law).log())[live].sum()
        assert float(p.kl(q)) == pytest.approx(float(exact), abs=1e-12)
        assert float(p.kl(q)) >= 0
        assert float(p.kl(p)) == pytest.approx(0, abs=1e-12)


def test_kl_of_the_last_step_where_all_is_revealed():
    p, q = (
        masked_step("parallel", "part masked", 0, reveal=1.0),
        masked_step("parallel", "part masked", 9, reveal=1.0),
    )
    assert p.kl(q).isfinite().all()
    p_law, q_law = law(p), law(q)
    live = p_law > 0
    assert float(p.kl(q)) == pytest.approx(float((p_law * (p_law / q_law).log())[live].sum()), abs=1e-12)


def test_clean_draws_all_positions_at_once(deviation):
    n = 20_000
    for kind in ("parallel", "single"):
        step = masked_step(kind, "part masked")
        x = step.take(torch.zeros(n, dtype=torch.long)).clean(Noise.of(8, n))
        assert x.shape == (n, L, V)
        exact = law(MaskedStep(step.log_probs, torch.ones_like(step.reveal), step.x))
        assert deviation(counts(F.pad(x, (0, 1))), exact) < 4


def test_clean_predictions_keep_what_is_revealed():
    step = masked_step("parallel", "part masked")
    assert torch.allclose(step.x0.sum(-1), torch.ones(1, L, dtype=torch.float64))
    assert step.x0[0, 0].tolist() == [1, 0]
    assert torch.allclose(step.x0[0, 1:], step.log_probs[0, 1:].exp())
    assert step.mode[0, 0].tolist() == [1, 0]
    assert torch.equal(step.mode[0, 1:].argmax(-1), step.log_probs[0, 1:].argmax(-1))


@both
def test_take_picks_rows(kind):
    steps = [masked_step(kind, "all masked", seed) for seed in range(3)]
    cat = type(steps[0])(**{k: torch.cat([getattr(s, k) for s in steps]) for k in steps[0].__dict__})
    assert torch.equal(law(cat.take(torch.tensor([2]))), law(steps[2]))


# ---- Gaussian


def gaussian(seed: int, std=(0.7, 0.3)) -> GaussianStep:
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return GaussianStep(z, torch.tensor(std, dtype=torch.float64)[:, None], z)


def test_gaussian_log_prob_and_kl_are_those_of_torch():
    p, q = gaussian(0), gaussian(1, (0.5, 0.9))
    x = gaussian(2).mean
    assert torch.allclose(p.log_prob(x), Normal(p.mean, p.std).log_prob(x).sum(1))
    assert torch.allclose(p.kl(q), kl_divergence(Normal(p.mean, p.std), Normal(q.mean, q.std)).sum(1))
    assert torch.allclose(p.kl(p), torch.zeros(2, dtype=torch.float64))


def test_gaussian_tilt_is_the_exponential_tilt():
    """log q(x) − log p(x) − <g, x> is the same for all x."""
    p, g = gaussian(0), gaussian(3).mean
    q = p.tilt(g)
    rest = torch.stack(
        [q.log_prob(x) - p.log_prob(x) - (g * x).sum(1) for x in (gaussian(s).mean for s in range(9))]
    )
    assert (rest - rest[0]).abs().max() < 1e-12


def test_gaussian_samples_have_the_mean_and_spread():
    n, p = 40_000, gaussian(0)
    for row in range(2):
        x = p.take(torch.full((n,), row)).sample(Noise.of(row, n))
        assert ((x.mean(0) - p.mean[row]).abs() < 4 * p.std[row] / math.sqrt(n)).all()
        assert ((x.std(0) / p.std[row] - 1).abs() < 4 / math.sqrt(2 * n)).all()


def test_deterministic_rows_have_no_density():
    p, q = gaussian(0, (0.7, 0.0)), gaussian(1, (0.7, 0.0))
    assert not p.stochastic
    assert gaussian(0).stochastic
    assert p.log_prob(q.mean)[1] == 0
    assert p.kl(q)[1] == 0
    assert torch.equal(p.sample(Noise.of(0, 2))[1], p.mean[1])
    mean = p.mean.clone().requires_grad_(True)
    GaussianStep(mean, p.std, mean).log_prob(q.mean).sum().backward()
    assert mean.grad.isfinite().all(), "no NaN gradient through the row without density"
    assert not mean.grad[1].any()


def test_log_prob_of_half_precision_sums_in_float32():
    mean = torch.zeros(1, 4096, dtype=torch.bfloat16)
    step = GaussianStep(mean, torch.ones(1, 1, dtype=torch.bfloat16), mean)
    assert step.log_prob(mean).dtype == torch.float32
    assert float(step.log_prob(mean)) == pytest.approx(-2048 * math.log(2 * math.pi), rel=5e-3)
