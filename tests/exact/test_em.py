"""Rounds of EM on the enumerable tokens, and what one M-step keeps of a target."""

import math

import pytest
import torch
import torch.nn.functional as F
from worlds import disturb, setting

from dav_bench.core import ExactValue, Item, MaximumLikelihood, Noise, Training, TreeSearch, fit
from dav_bench.core.fit import optimizer

EVERY = F.one_hot(torch.cartesian_prod(*[torch.arange(5)] * 3), 5).double()  # all 125 states
masks = EVERY[..., -1].sum(1).long()  # left to reveal: the grid index


def kernels(world) -> torch.Tensor:
    """(125, 125) log p_θ(x' | x) of the policy, −inf where impossible or finished."""
    table = torch.full((125, 125), -math.inf, dtype=torch.float64)
    with torch.no_grad():
        for i in (1, 2, 3):
            rows = (masks == i).nonzero()[:, 0]
            step = world.step(EVERY[rows], i)
            for k, row in enumerate(rows):
                table[row] = step.take(torch.full((125,), k)).log_prob(EVERY)
    return table


def e_step(log_p: torch.Tensor, r: torch.Tensor, alpha: float) -> tuple[torch.Tensor, float]:
    """η* = p exp((V(x') − V(x)) / α) by dynamic programming (dav.md A.3, γ = 1), and log Z."""
    v = torch.where(masks == 0, r / alpha, torch.zeros(()).double())
    for i in (1, 2, 3):
        rows = masks == i
        v[rows] = (log_p[rows] + torch.where(masks == i - 1, v, -math.inf)).logsumexp(1)
    tilted = log_p + torch.where(log_p > -math.inf, v, 0.0)
    return torch.where(masks[:, None] > 0, tilted - v[:, None], -math.inf), float(v[-1])


def occupancy(log_eta: torch.Tensor) -> torch.Tensor:
    """(125, 125) probability that a trajectory makes each move."""
    at = torch.zeros(125, dtype=torch.float64)
    at[-1], moves = 1.0, torch.zeros(125, 125, dtype=torch.float64)
    for i in (3, 2, 1):
        rows = masks == i
        moves[rows] = at[rows, None] * log_eta[rows].exp()
        at = at + moves[rows].sum(0)
    return moves


def elbo(log_eta: torch.Tensor, log_p: torch.Tensor, r: torch.Tensor, alpha: float) -> float:
    """J(η, θ) = E_η[r / α + log p − log η] over whole trajectories (dav.md A.2)."""
    moves = occupancy(log_eta)
    live = moves > 0
    value = (moves * torch.where(masks == 0, r / alpha, 0.0)).sum()
    return float(value + (moves[live] * (log_p - log_eta)[live]).sum())


def m_step(ctx, log_eta: torch.Tensor, steps: int = 60) -> None:
    """Maximises the exact expected log-likelihood of η with the loss that a run uses."""
    moves = occupancy(log_eta)
    pairs = (moves > 0).nonzero()
    x, y = EVERY[pairs[:, 0]], EVERY[pairs[:, 1]]
    item = Item(x=x, x_next=y, i=masks[pairs[:, 0]], lookahead=None, mean=None, final=y)
    weight = moves[pairs[:, 0], pairs[:, 1]]
    opt = torch.optim.LBFGS(
        ctx.policy.trainable().values(), max_iter=steps, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        opt.zero_grad()
        loss = (weight * MaximumLikelihood()(ctx, item)).sum()
        loss.backward()
        return loss

    opt.step(closure)


def test_exact_rounds_of_em_never_lower_the_elbo():
    alpha, ctx = 1.0, setting("random")
    r = torch.where(masks == 0, ctx.reward.reward(EVERY[..., :-1]), 0.0)
    log_p = kernels(ctx.policy)
    assert e_step(log_p, r, alpha)[1] == pytest.approx(1.058402, abs=1e-6)
    last, history = -math.inf, []
    for _ in range(3):
        log_eta, log_z = e_step(log_p, r, alpha)
        after_e = elbo(log_eta, log_p, r, alpha)
        assert after_e == pytest.approx(log_z, abs=1e-9), "the bound is tight after the E-step"
        assert elbo(log_p, log_p, r, alpha) < after_e - 0.05, "without a search it is not"
        m_step(ctx, log_eta)
        log_p = kernels(ctx.policy)
        after_m = elbo(log_eta, log_p, r, alpha)
        assert last - 1e-9 <= after_e <= after_m
        last = after_m
        history.append(after_m)
    assert history[-1] > history[0] + 0.3


def test_an_m_step_away_from_the_search_would_lower_the_elbo():
    """The test above can fail: weights that no E-step found make J fall."""
    alpha, ctx = 1.0, setting("random")
    r = torch.where(masks == 0, ctx.reward.reward(EVERY[..., :-1]), 0.0)
    log_eta, log_z = e_step(kernels(ctx.policy), r, alpha)
    disturb(ctx.policy)
    assert elbo(log_eta, kernels(ctx.policy), r, alpha) < log_z


@pytest.mark.parametrize("target", ["transition", "mean"])
def test_a_sampled_round_raises_the_elbo(target):
    """The parts a run uses: tree search with the exact value, then a fit to its trajectories."""
    alpha, ctx = 1.0, setting("random")
    r = torch.where(masks == 0, ctx.reward.reward(EVERY[..., :-1]), 0.0)
    before_p = kernels(ctx.policy)
    log_eta, log_z = e_step(before_p, r, alpha)
    value = ExactValue(ctx.policy.network.soft_value(ctx.reward.reward, alpha), by_state=True)
    keep = "mean" if target == "mean" else ""
    batch = TreeSearch(32, alpha, value=value, keep=keep)(ctx, Noise.of(0, 2000))
    training = Training(updates=20, minibatch=500, lr=3e-3)
    opt = optimizer(ctx.policy.trainable(), training)
    fit(MaximumLikelihood(target=target), ctx, batch, opt, training, Noise.of(1, 1))
    log_p = kernels(ctx.policy)
    best = float((occupancy(log_eta) * torch.where(masks == 0, r / alpha, 0.0)).sum())  # J where p_θ = η*
    after = elbo(log_eta, log_p, r, alpha)
    assert log_z < best - 0.05 < after < best
    assert e_step(log_p, r, alpha)[1] >= after
