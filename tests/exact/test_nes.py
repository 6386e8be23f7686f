"""Estimated gradients of black-box rewards: their mean, their size, and what they cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from worlds import context, model

from dav_bench.core import Meter, MeteredReward, Noise, Seeds, Stein
from dav_bench.core.nes import NES

DIM = 6


def black_box(fn, meter: Meter | None = None) -> MeteredReward:
    """A reward that gives numbers and no graph."""

    def values(x: Tensor, cond: Tensor | None = None) -> Tensor:
        return fn(x.detach())

    return MeteredReward(values, meter or Meter())  # type: ignore[arg-type]


def estimates(fn, x: Tensor, rows: int, **options) -> Tensor:
    """(rows, DIM) independent estimates at one point."""
    return NES(black_box(fn), **options).grad(x.expand(rows, -1), keys=Noise.of(3, rows))


def quadratic(x: Tensor) -> Tensor:
    weights = torch.linspace(-1, 2, DIM, dtype=x.dtype)
    return (weights * x**2).sum(1) + x[:, 0] * x[:, 1] + x.sum(1)


def test_nes_is_unbiased_on_a_quadratic():
    x = torch.linspace(-1, 1, DIM, dtype=torch.float64)
    point = x[None].clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(quadratic(point).sum(), point)
    for sigma in (0.01, 3.0):  # antithetic differences of a quadratic are exact at any width
        found = estimates(quadratic, x, 20_000, n=2, sigma=sigma)
        error = found.std(0) / len(found) ** 0.5
        assert bool(((found.mean(0) - exact[0]).abs() <= 4 * error).all())
    cubic = estimates(lambda x: (x**3).sum(1), x, 20_000, n=2, sigma=2.0)
    # the gradient of the blurred reward: 3 x² + 3 σ²
    error = cubic.std(0) / len(cubic) ** 0.5
    assert bool(((cubic.mean(0) - 3 * x**2 - 12).abs() <= 4 * error).all())
    assert bool(((cubic.mean(0) - 3 * x**2).abs() > 4 * error).all()), "a wide step is another reward"


@pytest.mark.parametrize("n", [1, 16])
def test_nes_norm_is_inflated_as_its_formula_says(n):
    slope = torch.zeros(DIM, dtype=torch.float64)
    slope[0] = 2.0
    found = estimates(lambda x: x @ slope.to(x), torch.zeros(DIM, dtype=torch.float64), 20_000, n=n)
    square = (found**2).sum(1) / 4
    error = float(square.std()) / len(found) ** 0.5
    assert abs(float(square.mean()) - (DIM + n + 1) / n) < 4 * error


def test_nes_gives_autograd_its_estimate():
    meter = Meter()
    nes = NES(black_box(quadratic, meter), n=8, sigma=0.1)
    x = Noise.of(0, 5).normal(DIM, dtype=torch.float64).requires_grad_(True)
    value = nes(x)
    assert torch.equal(value.detach(), quadratic(x.detach())) and meter.total("reward") == 5
    weights = torch.arange(5, dtype=torch.float64)
    (found,) = torch.autograd.grad((weights * value).sum(), x)
    assert meter.total("reward") == 5 + 5 * 2 * 8
    assert torch.equal(found, weights[:, None] * nes.grad(x.detach()))
    assert not nes(x.detach()).requires_grad
    with torch.no_grad():
        assert not nes(x).requires_grad


def test_nes_of_a_sample_does_not_depend_on_others():
    nes = NES(black_box(quadratic))
    x = Noise.of(0, 5).normal(DIM, dtype=torch.float64)
    whole = nes.grad(x)
    assert torch.equal(nes.grad(x), whole), "nor on earlier calls"
    assert torch.equal(nes.grad(x[2:4]), whole[2:4])
    assert not torch.equal(nes.grad(x + 1e-9)[0], whole[0])


def test_nes_through_a_chain_follows_the_gradient():
    """FAV on the mixture with the reward as a black box: the drift is that of the gradient, up to noise."""
    plain, wrapped = (context(model("mixture", 4), quadratic_reward) for _ in range(2))
    wrapped.reward = NES(black_box(quadratic_reward, wrapped.meter), n=400, sigma=0.05)
    drifts = []
    for ctx in (plain, wrapped):
        batch = Seeds()(ctx, Noise.of(0, 50))
        Stein(taus=(0.5,)).prepare(ctx, batch, Noise.of(1, 1))
        drifts.append(batch.per_sample["drift"])
    scale = float(drifts[0].norm())
    assert float((drifts[0] - drifts[1]).norm()) < 0.2 * scale
    # one dimension: the estimate varies by √(2 / n) of the slope, which β ∇r is far from all of
    assert float((drifts[0] - drifts[1]).norm()) > 1e-6 * scale
    assert wrapped.meter.total("reward") == 50 * (1 + 2 * 400)
    assert math.isfinite(scale)


def quadratic_reward(x: Tensor, cond: Tensor | None = None) -> Tensor:
    return -0.5 * ((x - 1) ** 2).sum(1)


def test_nes_refuses_what_it_cannot_use():
    for options in ({"n": 0}, {"sigma": 0.0}, {"sigma": math.nan}):
        with pytest.raises(ValueError, match="NES needs"):
            NES(black_box(quadratic), **options)
