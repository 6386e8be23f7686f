"""The M-step on the mean of the tilted step: the same gradient as fitting sampled winners, with less noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dav_bench.core import (
    Context,
    GaussianProcess,
    MaskedProcess,
    MaximumLikelihood,
    Meter,
    MeteredReward,
    Model,
    Noise,
    TreeSearch,
)

LENGTH, VOCAB = 5, 3


class Table(torch.nn.Module):
    """A small network in float64 whose gradient is easy to collect."""

    time_input = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(LENGTH * (VOCAB + 1), LENGTH * VOCAB).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x.flatten(1)).view(-1, LENGTH, VOCAB)


class Pull(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Linear(2, 2).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.7 * x + 0.1 * self.net(x)


def context(process: object, network: torch.nn.Module, constant: bool = False) -> Context:
    meter = Meter()
    model = Model(network, process, "sequence").to("cpu", torch.float64).attach(meter)  # type: ignore[arg-type]

    def reward(sample: Tensor, cond: Tensor | None = None) -> Tensor:
        value = sample[..., 0].reshape(len(sample), -1).sum(1)
        return torch.ones_like(value) if constant else value

    return Context(model, model.reference(), MeteredReward(reward, meter), meter)  # type: ignore[arg-type]


def processes() -> dict[str, tuple[object, torch.nn.Module]]:
    return {
        "parallel": (MaskedProcess(LENGTH, VOCAB, 4), Table()),
        "one at a time": (MaskedProcess(LENGTH, VOCAB, order="random"), Table()),
        "gaussian": (GaussianProcess((2,), 6), Pull()),
    }


def gradients(ctx: Context, target: str, seed: int, n: int, guide: bool = False, groups: int = 8) -> Tensor:
    """(groups, parameters) mean gradient of each group of trajectories."""
    search = TreeSearch(3, 0.5, guide=guide, keep="mean")
    batch = search(ctx, Noise.of(seed, n))
    loss = MaximumLikelihood(target=target)(  # type: ignore[arg-type]
        ctx, batch.items(torch.arange(len(batch)), ctx.policy.unpack)
    )
    parameters = list(ctx.policy.trainable().values())
    each = loss.view(batch.steps, groups, -1).sum(0).mean(1)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(e, parameters, retain_graph=True)]) for e in each
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("kind", list(processes()))
@pytest.mark.parametrize("guide", [False, True])
def test_it_agrees_with_fitting_winners_and_has_less_noise(kind: str, guide: bool) -> None:
    ctx = context(*processes()[kind])
    groups = 75
    winners, means = (gradients(ctx, target, 3, 1500, guide, groups) for target in ("transition", "mean"))
    difference = winners - means  # paired: the same searches
    error = difference.std(0) / groups**0.5
    assert (difference.mean(0).abs() <= 4.5 * error + 1e-12).all()
    assert means.var(0).sum() < 0.6 * winners.var(0).sum()


@pytest.mark.parametrize("kind", list(processes()))
def test_a_reward_that_prefers_nothing_moves_nothing(kind: str) -> None:
    ctx = context(*processes()[kind], constant=True)
    assert gradients(ctx, "mean", 0, 8).abs().max() < 1e-10
    assert gradients(ctx, "transition", 0, 8).abs().max() > 1e-3  # fitting winners would


@pytest.mark.parametrize("kind", list(processes()))
def test_the_expected_log_prob_of_one_state_is_its_log_prob(kind: str) -> None:
    process, network = processes()[kind]
    ctx = context(process, network)
    x = ctx.policy.process.prior(Noise.of(0, 16), torch.float64)
    for i in range(ctx.policy.process.T, 1, -1):
        step = ctx.policy.step(x, i)
        after = step.sample(Noise.of(7, 16).fold(i))
        assert torch.allclose(step.expected_log_prob(after), step.log_prob(after), atol=1e-12)
        x = after


@pytest.mark.parametrize("kind", list(processes()))
def test_the_mean_is_that_of_samples(kind: str) -> None:
    ctx = context(*processes()[kind])
    x = ctx.policy.process.prior(Noise.of(0, 1), torch.float64)
    step = ctx.policy.step(x, ctx.policy.process.T)
    n = 40_000
    drawn = step.take(torch.zeros(n, dtype=torch.long)).sample(Noise.of(1, n))
    error = drawn.std(0) / n**0.5
    assert ((drawn.mean(0) - step.mean[0]).abs() <= 4.5 * error + 1e-9).all()


def test_a_search_that_kept_no_means_is_told_so() -> None:
    ctx = context(*processes()["parallel"])
    batch = TreeSearch(2)(ctx, Noise.of(0, 2))
    with pytest.raises(ValueError, match="keep='mean'"):
        MaximumLikelihood(target="mean")(ctx, batch.items(torch.arange(2), ctx.policy.unpack))
