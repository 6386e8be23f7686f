"""The optimiser loop: what must not change an update, what it costs and what it remembers."""

import math

import pytest
import torch
from worlds import KINDS, Saved, setting

from dav_bench.core import Batch, MaximumLikelihood, Noise, NonFinite, Training, TreeSearch, fit
from dav_bench.core.fit import gradient, optimizer


def search(ctx, n: int = 12) -> Batch:
    return TreeSearch(width=3, alpha=0.5)(ctx, Noise.of(0, n))


def tuned(kind: str, micro_batch: int | None, kl: float = 0.1, **options) -> torch.Tensor:
    """All weights after a fit to the same trajectories."""
    ctx = setting(kind)
    batch = search(ctx)
    ctx.policy.attach(ctx.meter, micro_batch)
    training = Training(**{"updates": 2, "minibatch": 40, "lr": 1e-3, **options})
    fit(
        MaximumLikelihood(kl=kl),
        ctx,
        batch,
        optimizer(ctx.policy.trainable(), training),
        training,
        Noise.of(1, 1),
    )
    return torch.cat([p.detach().flatten() for p in ctx.policy.trainable().values()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_micro_batch_does_not_change_the_update(kind, kl):
    whole = tuned(kind, None, kl)
    for size in (1, 7, 40, 1000):
        assert (tuned(kind, size, kl) - whole).abs().max() < 1e-9
    assert (tuned(kind, None, kl, minibatch=20) - whole).abs().max() > 1e-6, (
        "another minibatch is another update"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_are_that_of_the_whole(kind):
    ctx = setting(kind, untrained=False)
    batch, loss = search(ctx), MaximumLikelihood()
    everything, alive = torch.arange(len(batch)), loss.active(batch)

    def grad(micro_batch):
        ctx.policy.network.zero_grad()
        mean = gradient(loss, ctx, batch, everything, alive, micro_batch)
        return mean, torch.cat([p.grad.flatten() for p in ctx.policy.trainable().values()])

    mean, whole = grad(None)
    for size in (1, 5):
        again, parts = grad(size)
        assert again == pytest.approx(mean, rel=1e-12)
        assert (parts - whole).abs().max() < 1e-12
    items = batch.items(everything, ctx.policy.unpack)
    # all at once, idle items included
    direct = torch.autograd.grad(loss(ctx, items).mean(), list(ctx.policy.trainable().values()))
    assert (torch.cat([g.flatten() for g in direct]) - whole).abs().max() < 1e-12


def peak(kind: str, steps: int, micro_batch: int | None, minibatch: int = 64) -> int:
    ctx = setting(kind, steps=steps)
    batch = search(ctx)
    ctx.policy.attach(ctx.meter, micro_batch)
    saved, training = Saved(), Training(minibatch=minibatch)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda handle: handle.tensor):
        # the target keeps all items alive, whatever their number of reveals
        loss = MaximumLikelihood() if kind == "mixture" else MaximumLikelihood(target="final")
        fit(loss, ctx, batch, optimizer(ctx.policy.trainable(), training), training, Noise.of(1, 1))
    assert saved.now == 0
    return saved.peak


@pytest.mark.parametrize("kind", ["mixture", "parallel"])
def test_memory_of_a_fit_does_not_grow_with_the_number_of_steps(kind):
    few, many = peak(kind, 8, 16), peak(kind, 128, 16)
    assert few == many > 0
    assert peak(kind, 128, 32) > 1.5 * many, "it grows with the micro-batch"
    assert peak(kind, 128, None, minibatch=10_000) > 20 * many, "a graph of all steps would show"


def test_first_pass_sees_the_log_probs_of_the_search_even_with_dropout():
    ctx = setting("parallel")
    ctx.policy.network.residual.insert(4, torch.nn.Dropout(0.5))
    ctx.policy.network.eval()
    batch, loss = search(ctx), MaximumLikelihood()
    alive = loss.active(batch)
    with torch.no_grad():
        expected = loss(ctx, batch.items(alive.nonzero()[:, 0], ctx.policy.unpack)).sum() / len(batch)
    training = Training(minibatch=len(batch))
    before = torch.get_rng_state()
    stats = fit(loss, ctx, batch, optimizer(ctx.policy.trainable(), training), training, Noise.of(1, 1))
    assert stats["loss"] == pytest.approx(float(expected), rel=1e-12)
    assert torch.equal(before, torch.get_rng_state()), "a resume has no global generator to restore"


@pytest.mark.parametrize("kind", KINDS)
def test_cost_of_a_fit_is_counted(kind):
    ctx = setting(kind)
    batch = search(ctx)
    alive = int(MaximumLikelihood().active(batch).sum())
    training = Training(updates=3, minibatch=25)
    for kl, rows in ((0.0, alive), (0.1, len(batch))):
        opt = optimizer(ctx.policy.trainable(), training)
        with ctx.meter.phase(f"fit {kl}"):
            fit(MaximumLikelihood(kl=kl), ctx, batch, opt, training, Noise.of(1, 1))
        assert ctx.meter.total("backward", f"fit {kl}") == 3 * rows
        assert ctx.meter.total("forward", f"fit {kl}") == 3 * rows * (2 if kl else 1), (
            "a pull adds reference rows"
        )


def test_a_subset_takes_whole_trajectories():
    """E12: the release fits one quarter of the samples of a round."""
    ctx = setting("mixture")
    batch = search(ctx, 20)
    training = Training(subset=0.25, updates=2)
    with ctx.meter.phase("fit"):
        opt = optimizer(ctx.policy.trainable(), training)
        fit(MaximumLikelihood(), ctx, batch, opt, training, Noise.of(1, 1))
    assert ctx.meter.total("backward", "fit") == 2 * 5 * batch.steps


def test_same_noise_gives_the_same_fit_and_another_does_not():
    assert torch.equal(tuned("parallel", None), tuned("parallel", None))


def test_the_gradient_is_clipped():
    ctx = setting("mixture")
    batch = search(ctx)
    training = Training(clip=1e-3, minibatch=10_000)
    norms = []
    opt = optimizer(ctx.policy.trainable(), training)
    step = opt.step
    opt.step = lambda: (norms.append(math.sqrt(sum(float((p.grad**2).sum()) for p in ctx.policy.trainable().values()))),
                        step())  # fmt: skip
    stats = fit(MaximumLikelihood(), ctx, batch, opt, training, Noise.of(1, 1))
    assert stats["grad_norm"] > 1e-3
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)


def test_nan_is_an_error_that_says_what():
    ctx = setting("parallel")
    batch = search(ctx)
    training = Training()
    with torch.no_grad():
        ctx.policy.network.residual[-1].bias.fill_(float("nan"))
    with pytest.raises(NonFinite, match="loss"):
        fit(
            MaximumLikelihood(),
            ctx,
            batch,
            optimizer(ctx.policy.trainable(), training),
            training,
            Noise.of(1, 1),
        )


def test_a_minibatch_without_gradient_is_no_update():
    ctx = setting("parallel")
    batch = search(ctx)
    still = Batch(batch.states[:1].expand(4, -1, -1).contiguous(), batch.reward)
    before = [p.clone() for p in ctx.policy.trainable().values()]
    training = Training()
    stats = fit(
        MaximumLikelihood(), ctx, still, optimizer(ctx.policy.trainable(), training), training, Noise.of(1, 1)
    )
    assert stats["loss"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, ctx.policy.trainable().values(), strict=True))
