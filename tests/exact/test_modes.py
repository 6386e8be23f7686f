"""FX1 at α = 1: the mass on the minor mode, by search and after one M-step fitted to it.

The reward peaks between the modes, so a biased look-ahead shows at once: the target has .039 of its mass there.
"""

import pytest
import torch
from worlds import context, model, reward

from dav_bench.builtin.rewards.toy import QuadraticReward
from dav_bench.core import (
    ExactValue,
    MaximumLikelihood,
    Noise,
    PosteriorMean,
    Rollout,
    Training,
    TreeSearch,
    fit,
)
from dav_bench.core.fit import optimizer

STEPS = 200


def world(r=None, steps: int = STEPS):
    return context(model("mixture", steps, dtype=torch.float32), r or reward("mixture"))


def search(ctx, width: int, n: int, tweedie: bool = False, keep: str = ""):
    value = PosteriorMean() if tweedie else ExactValue(ctx.policy.network.soft_value(ctx.reward.reward, 1.0))
    return TreeSearch(width, 1.0, value=value, keep=keep)(ctx, Noise.of(0, n))


def minor(states: torch.Tensor) -> float:
    """Share of final samples at the mode at −2."""
    return float((states[-1] < 0).float().mean())


def tune(ctx, batch, target: str, minibatch: int, passes: tuple[tuple[float, int], ...]) -> float:
    """One M-step, its learning rate lowered once; the share of the minor mode among fresh samples."""
    for rate, updates in passes:
        training = Training(updates=updates, minibatch=minibatch, lr=rate)
        opt = optimizer(ctx.policy.trainable(), training)
        fit(MaximumLikelihood(target=target), ctx, batch, opt, training, Noise.of(1, 1))
    return minor(Rollout()(ctx, Noise.of(2, 16_000)).states)


def test_many_children_with_the_exact_value_and_one_m_step_keep_the_minor_mode():
    """.045 ± .005 with 64 children (the continuous limit is .039), and what is fitted to it keeps it within .01."""
    ctx = world()
    batch = search(ctx, 64, 4096, keep="mean")
    assert minor(batch.states) == pytest.approx(0.045, abs=0.005)
    assert tune(ctx, batch, "mean", 8192, ((1e-2, 3), (1e-3, 1))) == pytest.approx(
        minor(batch.states), abs=0.01
    )
    # the paper's own target has the same limit and more noise, so it takes larger batches
    after = tune(world(), batch, "transition", 16_384, ((2e-2, 6), (2e-3, 4)))
    assert after == pytest.approx(minor(batch.states), abs=0.01)


def test_few_children_leave_too_much():
    assert minor(search(world(), 4, 8192).states) == pytest.approx(0.11, abs=0.012)


def test_posterior_means_leave_too_little():
    share = minor(search(world(), 16, 2048, tweedie=True).states)
    assert 0.002 < share < 0.02


def test_an_m_step_keeps_both_modes_of_a_symmetric_target():
    """Forward KL covers: with the reward's peak half-way both modes stay equal, where reward-seeking picks one."""
    ctx = world(QuadraticReward(c=0.0), 50)
    batch = search(ctx, 16, 2000)
    share = tune(ctx, batch, "transition", 4096, ((1e-2, 4), (1e-3, 2)))
    assert share == pytest.approx(0.5, abs=0.04)
    x = Rollout()(ctx, Noise.of(3, 8000)).states[-1]
    found = float(batch.states[-1].abs().mean())
    assert found < 1.75, "the search moved both from ±2 towards the target's ±1.6"
    assert float(x.abs().mean()) == pytest.approx(found, abs=0.08), "and the fit followed"
