"""Processes: schedules, corruption and the bound."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dav_bench.core import GaussianProcess, MaskedProcess, Noise


def stable_diffusion(eta: float = 1.0) -> GaussianProcess:
    """The image release's grid: scaled-linear betas, 50 "leading" steps with offset 1, final share that of t = 0."""
    shares = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    return GaussianProcess((4,), 50, eta, torch.cat([shares[:1], shares[1:1000:20]]), prediction="eps")


@pytest.mark.parametrize(
    ("t", "variance", "weight"),
    [(981, 0.2065, 0.13), (741, 0.1425, None), (501, 0.0869, 0.07), (261, 0.0431, None), (101, 0.0204, 0.16),
     (41, None, 0.52), (21, 0.00156, 5.36), (1, 0.00043, 0.50)],
)  # fmt: skip
def test_ddim_step_has_the_numbers_of_stable_diffusion(t, variance, weight):
    """Variances of dav.md A.6, and the weight c²/(2σ²) of the noise error in the likelihood (A.8)."""
    process, i = stable_diffusion(), (t - 1) // 20 + 1
    x = torch.zeros(2, 4, dtype=torch.float64)
    step = process.step(torch.stack([x[0], x[0] + 1]), x, i)
    if variance:
        assert float(step.std[0, 0] ** 2) == pytest.approx(variance, rel=0.01, abs=5e-6)
    if weight:
        slope = float(step.mean[1, 0] - step.mean[0, 0])  # c, since the predicted noise differs by 1
        assert slope**2 / (2 * float(step.std[0, 0]) ** 2) == pytest.approx(weight, rel=0.01, abs=0.005)


@pytest.mark.parametrize("i", [1, 2, 25, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_formula(i, eta):
    process = stable_diffusion(eta)
    a, b = process.alphas_bar[i], process.alphas_bar[i - 1]
    x, eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    step = process.step(eps, x, i)
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    var = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
    assert torch.allclose(step.x0, x0)
    assert torch.allclose(step.std**2, var.expand(3, 1))
    assert torch.allclose(step.mean, b.sqrt() * x0 + (1 - b - var).sqrt() * eps)
    for prediction, value in (("x0", x0), ("v", a.sqrt() * eps - (1 - a).sqrt() * x0)):
        other = GaussianProcess((4,), 50, eta, process.alphas_bar, prediction).step(value, x, i)
        assert torch.allclose(other.mean, step.mean)
        assert torch.allclose(other.x0, x0)


def test_a_step_with_the_true_noise_keeps_the_marginal():
    """Ancestral steps from q(x_i | x_0) with the true x_0 give q(x_{i−1} | x_0), whatever eta."""
    n, x0 = 200_000, 1.3
    for eta in (0.0, 0.7, 1.0):
        process = GaussianProcess((1,), 20, eta)
        clean = torch.full((n, 1), x0, dtype=torch.float64)
        x = process.corrupt(clean, 12, Noise.of(0, n))
        y = process.step(clean, x, 12).sample(Noise.of(1, n))
        b = process.alphas_bar[11]
        assert float(y.mean()) == pytest.approx(float(b.sqrt()) * x0, abs=4 * math.sqrt(float(1 - b) / n))
        assert float(y.var()) == pytest.approx(float(1 - b), rel=4 * math.sqrt(2 / n))


def test_gaussian_rows_may_be_at_different_steps():
    process = GaussianProcess((2,), 10)
    x = torch.randn(3, 2, dtype=torch.float64)
    index = torch.tensor([10, 4, 1])
    mixed = process.step(x, x, index)
    for row, i in enumerate(index.tolist()):
        alone = process.step(x[row : row + 1], x[row : row + 1], i)
        assert torch.equal(mixed.mean[row], alone.mean[0])
        assert torch.equal(mixed.std[row], alone.std[0])
    assert mixed.std[2] == 0, "the last step of a grid that ends clean is deterministic"
    noisy = process.corrupt(x, index, Noise.of(0, 3))
    assert torch.allclose(process.loss(x, x, noisy, index), torch.zeros(3, dtype=torch.float64), atol=1e-12)


def test_gaussian_grid_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="51"):
        GaussianProcess((1,), 50, alphas_bar=torch.ones(50))


# ---- masked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_last_masked_step_reveals_all_on_every_grid(dtype):
    """Also where (1 / T) T rounds to less than 1, as on 41 and 49 steps."""
    for steps in range(1, 257):
        process = MaskedProcess(2, 3, steps)
        step = process.step(torch.zeros(1, 2, 3, dtype=dtype), process.prior(Noise.of(0, 1), dtype), 1)
        assert (step.reveal == 1).all(), f"{steps} steps"


@pytest.mark.parametrize("i", [1, 5, 16])
def test_masks_appear_with_the_chance_of_the_schedule(i):
    n, process = 4000, MaskedProcess(10, 4, 16)
    x0 = F.one_hot(torch.arange(10) % 4, 4).double().expand(n, 10, 4)
    x = process.corrupt(x0, i, Noise.of(i, n))
    share, chance = float(x[..., -1].mean()), i / 16
    assert share == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / (10 * n)) + 1e-12)
    shown = x[..., -1] == 0
    assert torch.equal(x[..., :-1][shown], x0[shown])
    assert torch.equal(x.sum(-1), torch.ones(n, 10, dtype=torch.float64))


def test_one_at_a_time_hides_any_i_positions_equally_often(deviation):
    n, process = 20_000, MaskedProcess(4, 3, order="random")
    x0 = F.one_hot(torch.zeros(4, dtype=torch.long), 3).double().expand(n, 4, 3)
    for i in range(5):
        hidden = process.corrupt(x0, i, Noise.of(i, n))[..., -1]
        assert (hidden.sum(1) == i).all()
        subset = (hidden * torch.tensor([8, 4, 2, 1])).sum(1).long()
        legal = torch.tensor([bin(s).count("1") == i for s in range(16)]).double()
        if legal.sum() > 1:
            assert deviation(torch.bincount(subset, minlength=16), legal / legal.sum()) < 4


def test_pack_is_undone_by_unpack():
    process = MaskedProcess(6, 4, 8)
    x = process.corrupt(F.one_hot(torch.arange(6) % 4, 4).float().expand(9, 6, 4), 4, Noise.of(0, 9))
    assert process.pack(x).dtype == torch.uint8
    assert torch.equal(process.unpack(process.pack(x)), x)


def bound(process: MaskedProcess, logits, x0: torch.Tensor) -> float:
    """Exact −ELBO of one sequence: the mean over i of the loss, expected over all sets of masked positions."""
    length, total = process.length, 0.0
    for i in range(1, process.T + 1):
        for hidden in itertools.product([0.0, 1.0], repeat=length):
            k, m = int(sum(hidden)), i / process.T
            if process.order == "random":
                p = (k == i) / math.comb(length, i)
            else:
                p = m**k * (1 - m) ** (length - k)
            if not p:
                continue
            h = torch.tensor(hidden, dtype=torch.float64)[None, :, None]
            x = F.pad(x0, (0, 1)) * (1 - h) + F.one_hot(torch.tensor(process.vocab), process.vocab + 1) * h
            total += p * float(process.loss(logits(x), x0, x, i)[0]) / process.T
    return total


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_bound_of_one_token_is_its_likelihood(steps):
    """With one token the bound is tight on any grid (fixture FX6)."""
    process, law = MaskedProcess(1, 4, steps), torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    for token in range(4):
        x0 = F.one_hot(torch.tensor([[token]]), 4).double()
        assert bound(process, lambda x: law.log().expand(1, 1, 4), x0) == pytest.approx(-math.log(law[token]))


def test_bound_one_at_a_time_is_exact_for_exact_conditionals():
    """The chain of single reveals has the law of the model, so the bound of the exact model is −log p."""
    joint = torch.tensor([[0.4, 0.1], [0.05, 0.45]], dtype=torch.float64)

    def logits(x):
        first, second = x[0, 0, :2] + x[0, 0, 2], x[0, 1, :2] + x[0, 1, 2]
        p = joint * first[:, None] * second
        return (torch.stack([p.sum(1), p.sum(0)]) / p.sum()).clamp_min(1e-30).log()[None]

    for a, b in itertools.product(range(2), repeat=2):
        x0 = F.one_hot(torch.tensor([[a, b]]), 2).double()
        assert bound(MaskedProcess(2, 2, order="random"), logits, x0) == pytest.approx(-math.log(joint[a, b]))
        # independent reveals in 400 steps rarely reveal two at once, which is what a coarse grid pays for
        assert bound(MaskedProcess(2, 2, 400), logits, x0) == pytest.approx(-math.log(joint[a, b]), abs=0.01)


def test_sampled_bound_is_unbiased():
    """Mean loss at random steps and masks is the enumerated bound, within 4 standard errors."""
    n, process = 60_000, MaskedProcess(3, 2, 5)
    table = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = F.one_hot(torch.tensor([[0, 1, 1]]), 2).double()
    i = (Noise.of(0, n).uniform(1)[:, 0] * 5).long() + 1
    many = x0.expand(n, 3, 2)
    term = process.loss(table.expand(n, 3, 2), many, process.corrupt(many, i, Noise.of(1, n)), i)
    exact = bound(process, lambda x: table[None], x0)
    assert float(term.mean()) == pytest.approx(exact, abs=4 * float(term.std()) / math.sqrt(n))
