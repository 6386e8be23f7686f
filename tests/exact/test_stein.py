"""FAV: its drift against derivatives, its fixed point against the tilted Gaussian, and eight Gaussians on a ring."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from worlds import disturb, setting

from dav_bench.builtin.methods.fav import FAV, build
from dav_bench.builtin.models.mixture import build_ring
from dav_bench.builtin.rewards.toy import RingReward, centres
from dav_bench.builtin.toy import ToyModel
from dav_bench.core import (
    Context,
    GaussianProcess,
    Meter,
    MeteredReward,
    Model,
    Noise,
    NonFinite,
    Rollout,
    Seeds,
    Stein,
    Training,
    fit,
)
from dav_bench.core.fit import gradient, optimizer
from dav_bench.core.stein import drift, kde_score

# ---- T1: FX5, a one-step generator x = m + s z

TAU, A, B = 0.5, 0.5, 1.0
VAR = 1 / (1 / (1 + TAU / 2) + A)  # of N(0, 1) blurred by the kernel, times exp(B x - A x^2 / 2)


class Line(nn.Module):
    """x = m + s z, at N(0, 1)."""

    time_input = True

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.s = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.m + self.s * x


def line(micro_batch: int | None = None) -> Context:
    """A generator without densities: one deterministic step from noise to sample."""
    meter = Meter()
    model = Model(Line(), GaussianProcess((1,), 1, eta=0.0), "vector").attach(meter, micro_batch)
    reward = MeteredReward(lambda x, c: (B * x - A / 2 * x**2)[:, 0], meter, micro_batch)
    return Context(model, model.reference(), reward, meter)


def particles(repulsion: float, n: int = 200) -> tuple[float, float]:
    """Mean and variance where SVGD with the exact score of the blurred law comes to rest."""
    x, tau = torch.linspace(-2, 2, n, dtype=torch.float64)[:, None], torch.tensor([TAU], dtype=torch.float64)
    for _ in range(600):
        score = -x / (1 + TAU / 2) + B - A * x
        x = x + drift(x, score, tau, repulsion)[0]
    return float(x.mean()), float(x.var())


def test_fav_t1_particles_rest_at_the_tilted_law():
    assert particles(1.0) == pytest.approx((B * VAR, VAR), rel=0.01)
    assert particles(0.5) == pytest.approx((B * VAR, VAR / 2), rel=0.01), "half repulsion targets q^2"


def generator(repulsion: float, rounds: int = 160) -> tuple[float, float]:
    """Mean and variance of the trained generator, averaged over the last rounds."""
    ctx = line()
    assert not {"step.log_prob", "step.kl", "step.tilt"} & ctx.policy.provides
    loss = Stein(taus=(TAU,), repulsion=repulsion, references=400)
    assert loss.requires <= ctx.policy.provides | {"reward.grad"}
    training = Training(lr=6e-2, clip=10, minibatch=200, schedule="linear")
    opt, seen = optimizer(ctx.policy.trainable(), training), []
    for r in range(rounds):
        batch = Seeds()(ctx, Noise.of(r, 200))
        fit(loss, ctx, batch, opt, training, Noise.of(10**6 + r, 1), (r / rounds, (r + 1) / rounds))
        net = ctx.policy.network
        seen.append((float(net.m.detach()), float(net.s.detach()) ** 2))
    mean, var = torch.tensor(seen[rounds // 2 :]).mean(0).tolist()
    return mean, var


def test_fav_t1_a_one_step_generator_learns_the_tilted_law():
    assert generator(1.0) == pytest.approx((B * VAR, VAR), rel=0.04)
    assert generator(0.5)[1] < 0.6 * VAR, "planted: half repulsion"


# ---- T2: the drift by autograd


@pytest.mark.parametrize("taus", [(0.3,), (0.1, 0.7, 2.0)])
def test_fav_t2_repulsion_and_score_are_derivatives(taus):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (7, 11))
    tau = torch.tensor(taus, dtype=torch.float64)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return sum((-((a[:, None] - b[None]) ** 2).sum(-1) / t).exp() for t in taus)

    def slope(k, at: Tensor) -> Tensor:
        point = at.clone().requires_grad_(True)
        return torch.autograd.grad(k(point).sum(), point)[0]

    zero = torch.zeros_like(x)
    # Σ_j ∇_{x_j} k(x_j, x_i) = −∇ of Σ k in both its arguments, halved
    both = -slope(lambda p: kernel(p, p), x) / (2 * len(x))
    one = -slope(lambda p: kernel(p, x), x) / (2 * len(x))
    assert (drift(x, zero, tau)[0] - both).abs().max() < 1e-12
    assert (drift(x, zero, tau, 0.5)[0] - one).abs().max() < 1e-12, (
        "one side detached, as the image code has it"
    )
    assert both.abs().max() > 1e-2

    score, log_z = kde_score(x, y, tau)
    assert (score - slope(lambda p: kernel(p, y).sum(1).log(), x)).abs().max() < 1e-12
    assert (log_z - kernel(x, y).sum(1).log()).abs().max() < 1e-12
    phi, k = drift(x, score, tau)
    assert (phi - both - kernel(x, x) @ score / len(x)).abs().max() < 1e-12
    assert (k - kernel(x, x)).abs().max() < 1e-12


# ---- T3 and T4: chunks, order, groups


def prepared(
    kind: str, loss: Stein, micro_batch: int | None = None, n: int = 12, order: Tensor | None = None
):
    ctx = line(micro_batch) if kind == "line" else setting(kind, steps=4, untrained=False)
    ctx.policy.attach(ctx.meter, micro_batch)
    ctx.reward.micro_batch = micro_batch
    noise = Noise.of(0, n)
    batch = Seeds()(ctx, noise if order is None else noise[order])
    loss.prepare(ctx, batch, Noise.of(1, 1))
    return ctx, batch


def slopes(kind: str, loss: Stein, micro_batch: int | None = None) -> Tensor:
    ctx, batch = prepared(kind, loss, micro_batch)
    gradient(loss, ctx, batch, torch.arange(len(batch)), loss.active(batch), micro_batch)
    return torch.cat([p.grad.flatten() for p in ctx.policy.trainable().values()])


@pytest.mark.parametrize(
    ("kind", "options"),
    [("line", {}), ("mixture", {"particles": 4, "bandwidth": "median"}), ("random", {"features": "reward"})],
)
def test_fav_t3_chunks_change_nothing(kind, options):
    loss = Stein(taus=(0.5,), **options)
    whole = slopes(kind, loss)
    assert whole.abs().max() > 1e-4
    for size in (1, 5):
        assert (slopes(kind, loss, size) - whole).abs().max() < 1e-12


def test_fav_t3_the_gradient_is_that_of_the_drift():
    ctx, batch = prepared("line", loss := Stein(taus=(0.5,)))
    gradient(loss, ctx, batch, torch.arange(len(batch)), loss.active(batch), None)
    phi, z = batch.per_sample["drift"], batch.states[0]
    net = ctx.policy.network
    assert float(net.m.grad) == pytest.approx(float(-2 * phi.mean()), abs=1e-12)
    assert float(net.s.grad) == pytest.approx(float(-2 * (phi * z).mean()), abs=1e-12)


def test_fav_t4_particles_may_be_in_any_order():
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    # the reference particles belong to the group's first stream, so that one stays first
    order = torch.cat([torch.zeros(1).long(), order[order != 0]])
    loss = Stein(taus=(0.5,))
    plain, mixed = (prepared("mixture", loss, order=o)[1] for o in (None, order))
    assert (plain.per_sample["drift"][order] - mixed.per_sample["drift"]).abs().max() < 1e-12
    assert not torch.equal(plain.per_sample["drift"], mixed.per_sample["drift"])


def test_fav_t4_groups_do_not_meet():
    loss = Stein(taus=(0.5,), particles=4)
    together = prepared("mixture", loss)[1]
    ctx = setting("mixture", steps=4, untrained=False)
    for g in range(3):
        alone = Seeds()(ctx, Noise.of(0, 12)[4 * g : 4 * g + 4])
        loss.prepare(ctx, alone, Noise.of(1, 1))
        part = together.per_sample["drift"][4 * g : 4 * g + 4]
        assert (alone.per_sample["drift"] - part).abs().max() < 1e-12
    one = prepared("mixture", Stein(taus=(0.5,)))[1]
    assert (one.per_sample["drift"] - together.per_sample["drift"]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="groups of 5"):
        prepared("mixture", Stein(particles=5))


# ---- T5: FX4


def energy(x: Tensor, y: Tensor) -> float:
    """Energy distance, unbiased."""
    within = (torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y))
    return float(2 * torch.cdist(x, y).mean() - sum(within))


def test_fav_t5_clusters_of_the_ring_have_their_law():
    """Energy distance within clusters, by their weight in the target; the weights of clusters are not identified."""
    tau, rounds = 0.05, 110
    model = build_ring(ToyModel(64), {"steps": 4, "eta": 0.0}).to("cpu", torch.float32)
    meter = Meter()
    model.attach(meter).reference()
    ctx = Context(model, model.reference(), MeteredReward(RingReward(), meter), meter)
    disturb(model, 0.2)  # a policy away from the reference: within clusters p R is close to p

    drawn = Rollout(keep=False, on="ref")(ctx, Noise.of(7, 40_000)).states[-1].double()
    blurred = drawn + math.sqrt(tau / 2) * Noise.of(8, len(drawn)).normal(2, dtype=torch.float64)
    near, weight = torch.cdist(blurred, centres()).argmin(1), RingReward()(blurred).exp()
    share = torch.stack([weight[near == k].sum() for k in range(8)]) / weight.sum()
    exact = torch.tensor([0.0071, 0.0357, 0.0714, 0.1071, 0.1429, 0.1786, 0.2143, 0.2429])
    assert (share - exact).abs().max() < 0.02, "four steps of the chain and the blur change the ring a little"

    def target(k: int) -> Tensor:
        inside, generator = near == k, torch.Generator().manual_seed(k)
        return blurred[inside][torch.multinomial(weight[inside], 1500, True, generator=generator)]

    def distance() -> float:
        x = Rollout(keep=False)(ctx, Noise.of(9, 3000)).states[-1].double()
        mine = torch.cdist(x, centres()).argmin(1)
        return sum(float(share[k]) * energy(x[mine == k], target(k)) for k in range(8))

    loss = Stein(taus=(tau,))
    training = Training(lr=2e-3, clip=2, betas=(0.9, 0.95), minibatch=640, schedule="linear")
    opt, start = optimizer(model.trainable(), training), distance()
    for r in range(rounds):
        batch = Seeds()(ctx, Noise.of(r, 640))
        fit(loss, ctx, batch, opt, training, Noise.of(10**6 + r, 1), (r / rounds, (r + 1) / rounds))
    end = distance()
    assert end < 0.012 and start > 0.04, (start, end)


# ---- T6 and what a run is told


def test_fav_t6_the_softmax_score_never_underflows():
    x = torch.tensor([[0.0], [1000.0]])
    y = torch.tensor([[0.0], [1.0]])
    for tau in (torch.tensor([0.3]), torch.tensor([0.3, 1.0])):
        score, log_z = kde_score(x, y, tau)
        assert bool(score.isfinite().all()) and bool(log_z.isfinite().all())
        assert float(score[1]) == pytest.approx(
            -2 / float(tau.max()) * 999, rel=1e-4
        )  # the widest kernel leads
        clamped, _ = kde_score(x, y, tau, "clamp")
        assert float(clamped[1]) == 0 and float(clamped[0]) == pytest.approx(float(score[0]), rel=1e-6)


def test_fav_t6_far_particles_are_reported():
    ctx, batch = prepared("mixture", Stein(taus=(1e-4,)))
    assert batch.stats["log_z_min"] < -10 and batch.stats["kernel"] < 0.1
    near = prepared("mixture", Stein(taus=(1e3,)))[1].stats
    assert near["kernel"] > 0.9 and near["log_z_min"] > 0 and near["reward_pull"] > 1
    ctx.reward.reward = lambda x, c=None: (x / 0).sum(1)
    with pytest.raises(NonFinite):
        Stein().prepare(ctx, Seeds()(ctx, Noise.of(0, 4)), Noise.of(1, 1))


@pytest.mark.parametrize("kind", ["mixture", "line"])
def test_particles_are_what_a_rollout_draws(kind):
    ctx, batch = prepared(kind, Stein())
    drawn = Rollout()(ctx, Noise.of(0, 12))
    assert torch.equal(batch.states[-1], drawn.states[-1])
    assert torch.allclose(batch.reward, drawn.reward.to(batch.reward))


@pytest.mark.parametrize(
    ("kind", "options", "reward"), [("mixture", {}, (12, 12)), ("random", {"features": "reward"}, (42, 12))]
)
def test_rows_are_counted(kind, options, reward):
    ctx = setting(kind, steps=4)
    T, loss = ctx.policy.process.T, Stein(references=9, particles=6, **options)
    training = Training(minibatch=100)
    batch = Seeds()(ctx, Noise.of(0, 12))
    with ctx.meter.phase("fit"):
        fit(loss, ctx, batch, optimizer(ctx.policy.trainable(), training), training, Noise.of(1, 1))
    assert ctx.meter.total("forward", "fit") == T * (2 * 12 + 18)
    assert ctx.meter.total("backward", "fit") == T * 12
    assert (ctx.meter.total("reward", "fit"), ctx.meter.total("reward_backward", "fit")) == reward


def test_tokens_move_in_the_features_of_their_reward():
    ctx = setting("random")
    method = build(FAV(features="reward", bandwidth="median", alpha=0.5, lr=3e-3, samples=128))
    assert "reward.features" in method.requires and "continuous" not in method.requires
    opt = optimizer(ctx.policy.trainable(), method.training)
    before = float(Rollout()(ctx, Noise.of(5, 1000)).reward.mean())
    for r in range(30):
        batch = method.search(ctx, Noise.of(r, 128))
        fit(method.loss, ctx, batch, opt, method.training, Noise.of(100 + r, 1))
    assert float(Rollout()(ctx, Noise.of(5, 1000)).reward.mean()) > before + 0.2


def test_only_continuous_models_are_particles_themselves():
    ctx = setting("random")
    assert "continuous" in Stein().requires and "reward.features" in ctx.reward.reward.provides
    assert "continuous" not in ctx.policy.provides and "continuous" in setting("mixture").policy.provides
