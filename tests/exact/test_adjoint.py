"""Adjoint matching where the adjoint, the optimal control and what it misses are known."""

import math

import numpy as np
import pytest
import torch
from chains import Chain
from worlds import context, disturb, setting

from dav_bench.builtin.models.mixture import build_mixture
from dav_bench.builtin.rewards.toy import QuadraticReward
from dav_bench.builtin.toy import ToyMixture
from dav_bench.core import (
    AdjointMatching,
    Batch,
    Context,
    Noise,
    NonFinite,
    Pathwise,
    Rollout,
    Seeds,
    Training,
    fit,
)
from dav_bench.core.adjoint import lean_adjoints
from dav_bench.core.fit import gradient, optimizer, parameters


def prepared(ctx: Context, loss: AdjointMatching, n: int = 8, seed: int = 0) -> Batch:
    """A rollout with the columns of the loss."""
    ctx.modules = loss.modules(ctx)
    batch = Rollout()(ctx, Noise.of(seed, n))
    loss.prepare(ctx, batch, Noise.of(seed, 1))
    return batch


def grads(ctx: Context, loss, batch: Batch, micro_batch: int | None = None) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss over all items of a batch."""
    ctx.policy.network.zero_grad()
    gradient(loss, ctx, batch, torch.arange(len(batch)), loss.active(batch), micro_batch)
    return {name: p.grad.clone() for name, p in ctx.policy.trainable().items()}


def shifts(ctx: Context, loss: AdjointMatching, n: int = 8) -> torch.Tensor:
    """(T,) what a bias for each step is fitted to: the quadratic loss is solved in one Newton step."""
    batch, theta = prepared(ctx, loss, n), ctx.policy.network.theta

    def slope(value: float) -> torch.Tensor:
        with torch.no_grad():
            theta.fill_(value)
        return grads(ctx, loss, batch)["theta"]

    low, high = slope(0.0), slope(1.0)
    return -low / (high - low)


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("trained", [False, True])
def test_adjoint_t1_is_minus_the_slope_of_the_soft_value(dim, trained):
    """a_i = −A_i / α, whatever the policy has become: the chain differentiated is the pretrained one."""
    chain = Chain(dim=dim)
    ctx = chain.context("affine")
    if trained:
        with torch.no_grad():
            ctx.policy.network.slope.fill_(0.2)
            ctx.policy.network.theta.fill_(-1.0)
    batch = Rollout()(ctx, Noise.of(0, 5))
    for i, step, after, before in lean_adjoints(ctx, batch, chain.alpha):
        assert torch.allclose(after, (-chain.A[i - 1] / chain.alpha).expand(5, dim), rtol=1e-12)
        assert torch.allclose(before, (-chain.A[i] / chain.alpha).expand(5, dim), rtol=1e-12)
        x = batch.states[20 - i]
        assert torch.allclose(step.mean, chain.k[i - 1] * x + chain.c[i - 1], rtol=1e-12)


def test_adjoint_t1_through_the_policy_would_be_another():
    """The test above can fail: with the trained chain in the place of the pretrained one the adjoint is not lean."""
    chain = Chain()
    ctx = chain.context("affine")
    with torch.no_grad():
        ctx.policy.network.slope.fill_(0.2)
    wrong = Context(ctx.policy, ctx.policy, ctx.reward, ctx.meter)
    last = [before for *_, before in lean_adjoints(wrong, Rollout()(ctx, Noise.of(0, 5)), chain.alpha)][-1]
    assert (last + chain.A[-1] / chain.alpha).abs().min() > 1


@pytest.mark.parametrize("times", ["all", "late", "split"])
def test_adjoint_t2_control_shifts_each_mean_by_the_optimum(times):
    """s² A_{i−1} / α for every step that is fitted; the adjoint before the step would give k_i times that."""
    chain = Chain()
    got = shifts(chain.context("step"), AdjointMatching(alpha=chain.alpha, times=times), n=100)
    assert torch.allclose(got, chain.shifts, rtol=1e-9)
    early = shifts(
        chain.context("step"), AdjointMatching(alpha=chain.alpha, at="departure", times=times), n=100
    )
    assert torch.allclose(early, chain.shifts * chain.k, rtol=1e-9), "a_i in the place of a_{i−1}"
    assert (early - chain.shifts).abs().max() > 0.05


def test_adjoint_t2_is_reached_by_the_loop_of_a_run():
    chain = Chain()
    ctx, loss = chain.context("step"), AdjointMatching(alpha=chain.alpha)
    training = Training(updates=300, minibatch=80, lr=0.1, schedule="linear", clip=1e9)
    opt = optimizer(parameters(ctx), training)
    fit(loss, ctx, Rollout()(ctx, Noise.of(0, 4)), opt, training, Noise.of(1, 1), (0, 1))
    assert (ctx.policy.network.theta - chain.shifts).abs().max() < 2e-3


def test_adjoint_t3_misses_the_target_by_what_the_prior_keeps():
    """This chain remembers x_T, whose law is not tilted: the mean falls short by Π k · A_T / α = .0443."""
    chain = Chain()
    ctx = chain.context("step")
    solved = shifts(ctx, AdjointMatching(alpha=chain.alpha))
    start = Rollout(on="ref")(ctx, Noise.of(0, 5)).states[-1]
    with torch.no_grad():
        ctx.policy.network.theta.copy_(solved)
    gain = Rollout()(ctx, Noise.of(0, 5)).states[-1] - start  # the same noise: no Monte-Carlo error
    reached = chain.marginal[0] + gain.mean()
    assert float(chain.target[0] - reached) == pytest.approx(0.04434, abs=1e-5)


def test_adjoint_t4_first_gradient_is_that_of_the_reward():
    """At the pretrained model 2 Σ a_{i−1} ∂μ_i/∂θ = −(2/α) ∂r/∂θ, sample by sample, but for the step without noise."""
    ctx, alpha, n = setting("mixture", steps=8), 0.3, 10
    ctx.policy.reference().network.load_state_dict(ctx.policy.network.state_dict())
    disturb(ctx.policy)
    ctx.reference.network.load_state_dict(
        ctx.policy.network.state_dict()
    )  # a policy that is its own reference
    loss = AdjointMatching(alpha=alpha)
    batch = prepared(ctx, loss, n)
    assert not batch.per_step["fitted"][-1].any() and batch.per_step["fitted"][:-1].all()
    mine = grads(ctx, loss, batch)
    whole, last = (grads(ctx, Pathwise(last=k), Seeds()(ctx, Noise.of(0, n))) for k in (0, 1))
    for name, grad in mine.items():
        assert torch.allclose(8 * grad, 2 / alpha * (whole[name] - last[name]), rtol=1e-9, atol=1e-12), name
    assert max(float(g.abs().max()) for g in mine.values()) > 1e-3


def mild(steps: int) -> Context:
    """Two Gaussians at −1 and 1 with the peak of the reward at 1: FX1 with little between its modes."""
    world = build_mixture(ToyMixture(hidden=16, means=(-1.0, 1.0)), {"steps": steps})
    world.to("cpu", torch.float64).network.eval()
    return context(world, QuadraticReward())


def fixed_point(steps: int, alpha: float, at: str = "arrival") -> torch.Tensor:
    """(40000,) samples of the policy that adjoint matching cannot improve, from a grid and Gauss-Hermite nodes.

    With b_i(x) = E[a_i | x_i = x] and J the slope of μ_ref: m_i = μ_ref − s² E_{N(m_i, s²)}[b_{i−1}] and
    b_i = J E_{N(m_i, s²)}[b_{i−1}]; the adjoint of departure adds J to the first of these.
    """
    ref, n = mild(steps).reference, 241
    grid = torch.linspace(-6, 6, n, dtype=torch.float64)
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(16))

    def at_points(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        place = ((x + 6) / 12 * (n - 1)).clamp(0, n - 1 - 1e-9)
        low = place.floor().long()
        return values[low] + (place - low) * (values[low + 1] - values[low])

    b, policy = (grid - 1) / alpha, []
    for i in range(1, steps + 1):
        x = grid[:, None].clone().requires_grad_(True)
        step = ref.step(x, i)
        slope = torch.autograd.grad(step.mean.sum(), x)[0][:, 0]
        mean, s = step.mean.detach()[:, 0], float(step.std[0, 0])
        m = mean
        for _ in range(25):
            ahead = (at_points(b, m[:, None] + s * nodes) * weights).sum(1) / weights.sum()
            m = 0.3 * m + 0.7 * (mean - s**2 * (ahead if at == "arrival" else slope * ahead))
        b = slope * ahead
        policy.append((m, s))
    noise = Noise.of(5, 40_000)
    x = noise.fold(steps + 1).normal(dtype=torch.float64)
    for i in range(steps, 0, -1):
        m, s = policy[i - 1]
        x = at_points(m, x) + s * noise.fold(i).normal(dtype=torch.float64)
    return x


def test_adjoint_t5_reaches_its_fixed_point():
    ctx, n = mild(10), 4000
    loss, training = AdjointMatching(alpha=1.0), Training(minibatch=2560, lr=3e-2, schedule="linear")
    opt = optimizer(parameters(ctx), training)
    for r in range(80):
        fit(
            loss,
            ctx,
            Rollout()(ctx, Noise.of(r, 256)),
            opt,
            training,
            Noise.of(r, 1),
            (r / 80, (r + 1) / 80),
        )
    x, best = Rollout()(ctx, Noise.of(999, n)).states[-1][:, 0], fixed_point(10, 1.0)
    for value in (lambda x: x, lambda x: (x > 0).double(), lambda x: (x - 1) ** 2):
        error = math.sqrt(float(value(best).var()) * (1 / n + 1 / len(best)))
        assert float(value(x).mean()) == pytest.approx(float(value(best).mean()), abs=4 * error + 0.01)
    assert Rollout(on="ref")(ctx, Noise.of(999, n)).states[-1].mean() < 0.1


def test_adjoint_t5_fixed_point_tends_to_the_target():
    """Mean .731 under the exact tilt at α = 1; the adjoint of arrival is three times nearer on a coarse grid."""
    target, _ = mild(10).reference.network.law.tilt(1.0, 1.0)
    exact = float((target.weights[:, None] * target.means).sum())
    short = {
        (steps, at): exact - float(fixed_point(steps, 1.0, at).mean())
        for steps, at in ((10, "arrival"), (40, "arrival"), (40, "departure"))
    }
    assert exact == pytest.approx(0.731, abs=1e-3)
    assert short[10, "arrival"] == pytest.approx(0.11, abs=0.02)
    assert short[40, "arrival"] == pytest.approx(0.027, abs=0.016)
    assert short[40, "departure"] > short[40, "arrival"] + 0.015


# ---- what is left out, what it costs


def test_steps_are_chosen_as_the_paper_and_the_release_do():
    ctx = setting("mixture", steps=40)
    late = prepared(ctx, AdjointMatching(times="late"), 200).per_step["fitted"]
    assert late[30:39].all() and not late[39].any(), "the last quarter, but the step without noise"
    assert (late[:30].sum(0) == 10).all()
    share = late[:30].double().mean(1)
    assert (share - 1 / 3).abs().max() < 4 * math.sqrt(2 / 9 / 200)
    split = prepared(ctx, AdjointMatching(times="split"), 200).per_step["fitted"]
    assert (split[:24].sum(0) == 2).all() and (split[24:39].sum(0) <= 2).all()
    assert split[24:39].sum(0).max() == 2 and split[:24].any(1).all()


def test_an_outlier_is_left_out_by_the_quantile_of_the_updates_before():
    chain = Chain()
    loss = AdjointMatching(alpha=chain.alpha, quantile=0.9)
    ctx = chain.context("step")
    batch = prepared(ctx, loss, 4)
    item = batch.items(torch.arange(80), ctx.policy.unpack)
    first = loss(ctx, item).detach()
    assert (first > 0).all(), "no update before, nothing left out"
    loss.updated(ctx)
    level = first.sqrt().quantile(0.9)
    assert float(ctx.modules["threshold"].level) == pytest.approx(float(level))
    again = loss(ctx, item)
    assert torch.equal(again.detach(), torch.where(first.sqrt() <= level, first, torch.zeros_like(first)))
    assert float(torch.cat(batch.notes["dropped"]).mean()) == pytest.approx(0.05), "0 of 80, then 8"
    with torch.no_grad():
        ctx.policy.network.theta.fill_(10.0)  # far off: larger errors, a level that follows them
    loss(ctx, item)
    loss.updated(ctx)
    assert float(ctx.modules["threshold"].level) > float(level)


def test_a_cut_loss_has_no_gradient():
    chain = Chain()
    ctx, plain = chain.context("step"), AdjointMatching(alpha=chain.alpha)
    batch = prepared(ctx, plain, 4)
    item = batch.items(torch.arange(80), ctx.policy.unpack)
    each = plain(ctx, item).detach().view(20, 4)[:, 0].flip(0)  # by step; the same for all samples
    middle = float(each.sort().values[9:11].mean())
    cut = AdjointMatching(alpha=chain.alpha, limit=middle * chain.alpha**2)
    value = cut(ctx, item)
    assert float(value.detach().max()) == pytest.approx(middle)
    (slope,) = torch.autograd.grad(value.sum(), ctx.policy.network.theta)
    (whole,) = torch.autograd.grad(plain(ctx, item).sum(), ctx.policy.network.theta)
    over = each > middle
    assert (slope[over] == 0).all() and torch.equal(slope[~over], whole[~over])
    assert int(over.sum()) == 10


@pytest.mark.parametrize("options", [{}, {"quantile": 0.8}, {"times": "late"}, {"at": "departure"}])
def test_micro_batches_do_not_change_the_update(options):
    def tuned(micro_batch):
        ctx = setting("mixture")
        loss = AdjointMatching(alpha=0.5, **options)
        ctx.modules = loss.modules(ctx)
        ctx.policy.attach(ctx.meter, micro_batch)
        ctx.policy.reference()
        training = Training(minibatch=40, updates=3, lr=1e-3)
        fit(
            loss,
            ctx,
            Rollout()(ctx, Noise.of(0, 12)),
            optimizer(parameters(ctx), training),
            training,
            Noise.of(1, 1),
        )
        return torch.cat([p.detach().flatten() for p in ctx.policy.trainable().values()])

    whole = tuned(None)
    for size in (1, 7):
        assert (tuned(size) - whole).abs().max() < 1e-9


@pytest.mark.parametrize(("at", "back"), [("arrival", 7), ("departure", 8)])
def test_rows_are_those_of_the_formula(at, back):
    n, steps = 6, 8
    ctx, loss = setting("mixture", steps), AdjointMatching(at=at)
    training = Training(minibatch=1000)
    batch = Rollout()(ctx, Noise.of(0, n))
    with ctx.meter.phase("fit"):
        fit(loss, ctx, batch, optimizer(parameters(ctx), training), training, Noise.of(1, 1))
    assert ctx.meter.total("forward", "fit") == n * (steps + steps - 1), "the last step has no noise"
    assert ctx.meter.total("backward", "fit") == n * (back + steps - 1)
    assert ctx.meter.total("reward", "fit") == ctx.meter.total("reward_backward", "fit") == n


def test_an_adjoint_that_explodes_is_an_error():
    chain = Chain(k=torch.full((20,), 1e20).double())
    ctx = chain.context("step")
    batch = Rollout()(Chain().context("step"), Noise.of(0, 3))
    with pytest.raises(NonFinite, match="adjoint"):
        AdjointMatching(alpha=0.5).prepare(ctx, batch, Noise.of(0, 1))


@pytest.mark.parametrize(
    "bad", [{"alpha": 0.0}, {"quantile": 0.0}, {"quantile": 1.5}, {"picked": 0}, {"limit": -1.0}]
)
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="must be above 0"):
        AdjointMatching(**bad)
