"""Losses: weights and forms against dav.md A.8, A.9 and E11."""

import math

import pytest
import torch
import torch.nn.functional as F
from worlds import KINDS, context, setting

from dav_bench.core import (
    Batch,
    GaussianProcess,
    Item,
    MaskedProcess,
    MaximumLikelihood,
    Model,
    Noise,
    TreeSearch,
)


def batch_of(ctx, n: int = 6, **options) -> Batch:
    return TreeSearch(width=3, alpha=0.5, **options)(ctx, Noise.of(0, n))


def item_of(ctx, batch):
    return batch.items(torch.arange(len(batch)), ctx.policy.unpack)


@pytest.mark.parametrize("kind", KINDS)
def test_transition_loss_is_the_log_prob_of_the_steps_taken(kind):
    ctx = setting(kind, untrained=False)
    batch = batch_of(ctx)
    loss = MaximumLikelihood()(ctx, item_of(ctx, batch)).view(batch.steps, -1)
    for k in range(batch.steps):
        x, y = (ctx.policy.unpack(s) for s in batch.states[k : k + 2])
        exact = -ctx.policy.step(x, batch.steps - k).log_prob(y)
        assert torch.allclose(loss[k], exact, atol=1e-6)


def weights(steps: int, weight: str) -> torch.Tensor:
    """(steps,) weight of each step, first to last, read off a model with log-loss 1 at one masked position."""

    class Unit(torch.nn.Module):
        time_input = False

        def forward(self, x, t):
            return torch.tensor([0.0, math.log(math.e - 1)]).double().expand(len(x), 1, 2)

    model = Model(Unit(), MaskedProcess(1, 2, steps), "sequence")
    mask = F.one_hot(torch.tensor([[2]]), 3).double().expand(steps, 1, 3)
    first = F.one_hot(torch.tensor([[0]]), 3).double().expand(steps, 1, 3)
    item = Item(x=mask, x_next=mask, i=torch.arange(steps, 0, -1), lookahead=first, mean=None, final=first)
    return MaximumLikelihood(target="lookahead", weight=weight)(context(model, None), item)


def test_step_weights_are_those_of_the_paper_and_of_the_release():
    """E11: first step 7.80 against .0078, first ten 80 % of the release's weight, last 48 steps .47 against 4.46."""
    paper, release = weights(128, "paper"), weights(128, "release")
    assert float(paper[0]) == pytest.approx(0.0078, abs=5e-5)
    assert float(release[0]) == pytest.approx(7.80, rel=2e-3)
    assert float(release[0] / release.sum()) == pytest.approx(0.60, abs=0.01)
    assert float(release[:10].sum() / release.sum()) == pytest.approx(0.80, abs=0.02)
    assert float(release[80:].sum()) == pytest.approx(0.47, abs=0.005)
    assert float(paper[80:].sum()) == pytest.approx(4.46, abs=0.005)
    assert [float(release[i]) for i in (80, 127)] == pytest.approx([0.0125, 0.0079], abs=1e-4)
    assert [float(paper[i]) for i in (80, 127)] == pytest.approx([0.021, 1.0], abs=2e-4)
    assert torch.allclose(weights(128, "uniform"), torch.ones(128, dtype=torch.float64))


def test_skipped_steps_are_not_fitted():
    ctx = setting("parallel", steps=8)
    batch = batch_of(ctx, keep="lookahead")
    alive = MaximumLikelihood(target="lookahead", skip=5).active(batch).view(8, -1)
    assert not alive[:5].any()
    assert alive[5:].all()
    alive = MaximumLikelihood(target="lookahead", skip=-5).active(batch).view(8, -1)
    assert alive[:3].all()
    assert not alive[3:].any()


@pytest.mark.parametrize("kind", ["parallel", "random"])
def test_items_left_out_have_no_gradient(kind):
    ctx = setting(kind, steps=12, untrained=False)
    batch = batch_of(ctx)
    loss = MaximumLikelihood()
    idle = (~loss.active(batch)).nonzero()[:, 0]
    assert len(idle) if kind == "parallel" else not len(idle)
    if len(idle):
        value = loss(ctx, batch.items(idle, ctx.policy.unpack)).sum()
        grads = torch.autograd.grad(value, list(ctx.policy.trainable().values()), allow_unused=True)
        assert all(g is None or not g.any() for g in grads)
    assert MaximumLikelihood(kl=0.1).active(batch).all(), "a pull acts on every item"


@pytest.mark.parametrize("kind", KINDS)
def test_kl_pull_is_the_kl_of_the_steps_and_pulls_back(kind):
    ctx = setting(kind, untrained=False)
    item = item_of(ctx, batch_of(ctx))
    pull = MaximumLikelihood(kl=1.0)(ctx, item) - MaximumLikelihood()(ctx, item)
    exact = ctx.policy.step(item.x, item.i).kl(ctx.reference.step(item.x, item.i))
    assert torch.allclose(pull, exact)
    assert (pull >= 0).all()
    assert pull.sum() > 0
    same = setting(kind)
    item = item_of(same, batch_of(same))
    none = same.policy.step(item.x, item.i).kl(same.reference.step(item.x, item.i))
    assert none.abs().max() < 1e-12


def test_mse_pull_is_the_kl_without_the_likelihood_weight():
    """dav.md A8: KL = w |Δε|² summed, the release's is the mean of |Δε|² alone."""
    ctx = setting("mixture", steps=10, untrained=False)
    ctx.policy.process.alphas_bar[0] = 0.999  # a density at the last step too
    item = item_of(ctx, batch_of(ctx))
    base = MaximumLikelihood()(ctx, item)
    exact = MaximumLikelihood(kl=1.0)(ctx, item) - base
    mse = MaximumLikelihood(kl=1.0, kl_form="mse")(ctx, item) - base
    process: GaussianProcess = ctx.policy.process
    a, b = process.alphas_bar[item.i], process.alphas_bar[item.i - 1]
    var = (1 - b) / (1 - a) * (1 - a / b)
    c = (1 - b - var).sqrt() - (b * (1 - a) / a).sqrt()
    assert torch.allclose(exact, c**2 / (2 * var) * mse, rtol=1e-6)


def test_release_fits_the_clean_prediction_of_the_winner():
    """E17: target of a step is the argmax at masked positions of x_{i−1}, its tokens elsewhere; revealed ones add 0."""
    ctx = setting("parallel", steps=8, untrained=False)
    batch = batch_of(ctx, keep="lookahead")
    item = item_of(ctx, batch)
    for k in range(len(batch)):
        i = int(item.i[k])
        ids = item.x_next[k].argmax(-1)
        if i > 1:
            step = ctx.policy.step(item.x_next[k : k + 1], i - 1)
            ids = torch.where(ids == 4, step.log_probs[0].argmax(-1), ids)
        assert torch.equal(item.lookahead[k].argmax(-1), ids)
    loss = MaximumLikelihood(target="lookahead", weight="uniform")(ctx, item)
    log_probs = ctx.policy.step(item.x, item.i).log_probs
    nll = -log_probs.gather(-1, item.lookahead.argmax(-1, keepdim=True))[..., 0] * item.x[..., -1]
    assert torch.allclose(loss, nll.sum(1))
    mean = MaximumLikelihood(target="lookahead", weight="uniform", reduce="mean")(ctx, item)
    assert torch.allclose(mean, nll.mean(1))


def test_fitting_the_final_sample_is_on_average_fitting_the_transitions():
    """With weight (m_i − m_{i−1}) / m_i, for trajectories that reveal a sample of any law at random times."""
    n, steps = 40_000, 4
    ctx = setting("parallel", steps=steps, untrained=False)
    u, law = Noise.of(0, n).uniform(3), torch.tensor([0.1, 0.1, 0.1, 0.7]).log()
    ids = torch.stack([Noise.of(1, n).fold(k).categorical(law.expand(n, 4)) for k in range(3)], 1)
    states = torch.stack([torch.where(u < i / steps, 4, ids) for i in range(steps, -1, -1)])
    batch = Batch(states, torch.zeros(n))

    def gradient(target: str) -> torch.Tensor:
        value = MaximumLikelihood(target=target)(ctx, item_of(ctx, batch)).sum() / n
        return torch.autograd.grad(value, ctx.policy.network.residual[-1].bias)[0]

    step, final = gradient("transition"), gradient("final")
    assert step.abs().max() > 0.2
    assert (step - final).abs().max() < 0.02


def test_clean_targets_need_tokens_and_a_lookahead():
    ctx = setting("mixture")
    with pytest.raises(ValueError, match="masked"):
        MaximumLikelihood(target="final")(ctx, item_of(ctx, batch_of(ctx)))
    ctx = setting("parallel")
    with pytest.raises(ValueError, match="lookahead"):
        MaximumLikelihood(target="lookahead")(ctx, item_of(ctx, batch_of(ctx)))
    with pytest.raises(ValueError, match="Gaussian"):
        MaximumLikelihood(kl=1.0, kl_form="mse")(ctx, item_of(ctx, batch_of(ctx)))
