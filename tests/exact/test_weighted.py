"""RWR and VIDD: weighted fits that reach the tilt they should, by enumeration of all trajectories."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from paths import backward, disturb, every_path, expected_gradient, law, setting, step_log_probs, tilted
from torch import Tensor
from worlds import KINDS
from worlds import setting as world_setting

from dav_bench.core import (
    Batch,
    Context,
    ExactValue,
    GainWeights,
    Noise,
    PosteriorMean,
    RewardWeights,
    Rollout,
    Training,
    WeightedLikelihood,
    fit,
)
from dav_bench.core.fit import optimizer
from dav_bench.core.weighted import effective

ALPHA = 1.0


def total_variation(a: Tensor, b: Tensor) -> float:
    return 0.5 * float((a - b).abs().sum())


def soft_value(ctx: Context) -> ExactValue:
    return ExactValue(
        world_setting("random").policy.network.soft_value(ctx.reward.reward, ALPHA), by_state=True
    )


# ---- RWR


def exact_fit(loss: WeightedLikelihood, ctx: Context, batch: Batch, p: Tensor) -> None:
    """Fits the table where path n was drawn with probability p[n]: shares of weighted moves, which is where the
    gradient of the loss vanishes."""
    weight, place = batch.per_step["weight"] * p, 5 ** torch.arange(2, -1, -1)
    counts = torch.zeros(125, 3, 4, dtype=torch.float64)
    for k in range(batch.steps):
        now, after = batch.states[k].long(), batch.states[k + 1].long()
        position = (now != after).long().argmax(1)
        token = after.gather(1, position[:, None])[:, 0]
        counts.index_put_(((now * place).sum(1), position, token), weight[k], accumulate=True)
    with torch.no_grad():
        ctx.policy.network.logits.copy_(counts.clamp_min(1e-300).log())
    assert expected_gradient(loss, ctx, batch, p).abs().max() < 1e-12


def test_rwr_one_exact_fit_reaches_the_tilt_and_k_rounds_the_kth():
    ctx = setting(0.0)
    loss = WeightedLikelihood(RewardWeights(ALPHA))
    for k in (1, 2, 3):
        batch = every_path(ctx)
        with torch.no_grad():
            p = step_log_probs(ctx.policy, batch).sum(0).exp()
        loss.prepare(ctx, batch, Noise.of(0, 1))
        exact_fit(loss, ctx, batch, p)
        assert total_variation(law(ctx), tilted(ctx, ALPHA, k)) < 1e-12
        assert total_variation(law(ctx), tilted(ctx, ALPHA, k - 1)) > 0.01
    # planted: the reward with the wrong sign, its square root, or no weight at all
    for weights in (RewardWeights(-ALPHA), RewardWeights(2 * ALPHA), RewardWeights(math.inf)):
        ctx = setting(0.0)
        batch = every_path(ctx)
        p = step_log_probs(ctx.policy, batch).detach().sum(0).exp()
        loss = WeightedLikelihood(weights)
        loss.prepare(ctx, batch, Noise.of(0, 1))
        exact_fit(loss, ctx, batch, p)
        assert total_variation(law(ctx), tilted(ctx, ALPHA)) > 0.1


def test_rwr_gradient_is_that_of_the_forward_kl_to_the_tilt():
    ctx = setting()
    batch = every_path(ctx)
    log_p = step_log_probs(ctx.policy, batch).sum(0)
    target = (log_p.detach() + batch.reward / ALPHA).softmax(0)
    (exact,) = torch.autograd.grad(-(target * log_p).sum(), ctx.policy.network.logits)
    loss = WeightedLikelihood(RewardWeights(ALPHA))
    loss.prepare(ctx, batch, Noise.of(0, 1))
    p = log_p.detach().exp()
    p = p / (p * batch.per_step["weight"][0]).sum()  # paths in place of samples: weights of mean 1 under p
    assert (expected_gradient(loss, ctx, batch, p) - exact).abs().max() < 1e-12 < exact.abs().max()


def test_rwr_one_step_form_agrees_with_the_tilt_it_denoises():
    """Fresh corruptions of weighted samples: no gradient at the tilt, within 4 standard errors, and elsewhere one."""
    z = {}
    for place in ("tilt", "prior"):
        ctx = setting(0.0)
        if place == "tilt":
            backward(ctx, ALPHA)
        loss = WeightedLikelihood(RewardWeights(ALPHA), "denoise")
        rows = []
        for k in range(30):
            batch = Rollout(on="ref")(ctx, Noise.of(k, 400))
            loss.prepare(ctx, batch, Noise.of(k, 1))
            item = batch.items(torch.arange(len(batch)), ctx.policy.unpack, Noise.of(100 + k, len(batch)))
            (g,) = torch.autograd.grad(loss(ctx, item).mean(), ctx.policy.network.logits)
            rows.append(g.flatten())
        g = torch.stack(rows)
        seen = g.abs().sum(0) > 1e-9
        z[place] = float(((g.mean(0) / (g.std(0) / 30**0.5))[seen] ** 2).mean())
    assert z["tilt"] < 1.6 < 10 < z["prior"]


@pytest.mark.parametrize("target", ["transition", "denoise"])
def test_rwr_trained_on_samples_reaches_the_tilt(target):
    """The parts that a run uses."""
    ctx = setting(0.0)
    loss, training = (
        WeightedLikelihood(RewardWeights(ALPHA), target),
        Training(updates=12, minibatch=1000, lr=0.05),
    )
    batch = Rollout()(ctx, Noise.of(0, 4000))
    before = total_variation(law(ctx), tilted(ctx, ALPHA))
    fit(loss, ctx, batch, optimizer(ctx.policy.trainable(), training), training, Noise.of(1, 1))
    assert before > 0.3
    assert total_variation(law(ctx), tilted(ctx, ALPHA)) < 0.1


def test_rwr_weights_have_mean_one_for_each_prompt_and_are_the_best_ones_where_sparse():
    ctx = world_setting("random")
    r = torch.tensor([0.0, 1.0, 2.0, 900.0, 901.0], dtype=torch.float64)
    batch = Batch(torch.zeros(2, 5, 3, dtype=torch.uint8), r, cond=torch.tensor([3, 3, 3, 1, 1]))
    w = RewardWeights(0.5)(ctx, batch).exp()
    assert torch.allclose(w[:3], 3 * (r[:3] / 0.5).softmax(0)) and torch.allclose(
        w[3:], 2 * (r[3:] / 0.5).softmax(0)
    )
    batch.cond = None
    assert torch.allclose(RewardWeights(0.5)(ctx, batch).exp(), 5 * (r / 0.5).softmax(0))
    sparse = RewardWeights(form="sparse", keep=0.4)(ctx, batch).exp()
    assert sparse.tolist() == pytest.approx([0, 0, 0, 2.5, 2.5])
    assert RewardWeights(form="sparse", keep=0.01)(ctx, batch).exp().tolist() == pytest.approx(
        [0, 0, 0, 0, 5]
    )


def test_samples_without_weight_cost_nothing():
    ctx = world_setting("mixture", 6)
    batch = Rollout()(ctx, Noise.of(0, 20))
    loss, training = WeightedLikelihood(RewardWeights(form="sparse", keep=0.25)), Training()
    with ctx.meter.phase("fit"):
        fit(loss, ctx, batch, optimizer(ctx.policy.trainable(), training), training, Noise.of(1, 1))
    assert ctx.meter.total("backward", "fit") == ctx.meter.total("forward", "fit") == 5 * 5
    assert batch.stats["weight_zero"] == 0.75
    assert batch.stats["ess_share"] == pytest.approx(0.25)


def test_the_effective_share_of_weights():
    assert effective(torch.ones(5)) == pytest.approx(1)
    assert effective(torch.tensor([0.0, 7.0, 0, 0])) == pytest.approx(0.25)
    assert effective(torch.tensor([1e-200, 1e-200], dtype=torch.float64)) == pytest.approx(1)
    assert effective(torch.zeros(3)) == 0


def test_weights_that_are_all_zero_or_overflow_are_errors():
    ctx = world_setting("random")
    batch = Rollout(value=PosteriorMean())(ctx, Noise.of(0, 4))
    for gain, error in ((-1e6, "all weights are 0"), (1e6, "not finite"), (math.nan, "not finite")):
        batch.per_step["gain"] = torch.full_like(batch.per_step["gain"], gain)
        with pytest.raises((ValueError, RuntimeError), match=error):
            WeightedLikelihood(GainWeights()).prepare(ctx, batch, Noise.of(0, 1))


# ---- VIDD


def lagged(ctx: Context, seed: int | None) -> Context:
    """A context whose lagged model differs from both the policy and the pretrained one."""
    old = copy.deepcopy(ctx.reference.network)
    ctx.modules = {"old": old}
    if seed is not None:
        disturb(ctx.model("old"), 0.7, seed)
    return ctx


def by_old(ctx: Context, batch: Batch, value=None) -> Tensor:
    """Probabilities of the paths under the lagged model, with the columns a rollout of it keeps."""
    with torch.no_grad():
        log_p = step_log_probs(ctx.model("old"), batch)
        batch.per_step["log_prob"] = log_p
        if value is not None:
            old = ctx.model("old")
            rows = []
            for k in range(3):
                x, i = ctx.policy.unpack(batch.states[k]), 3 - k
                rows.append(value(ctx, old, x, i, old.predict(x, i), Noise.of(0, len(x))))
            v = torch.stack([*rows, batch.reward])
            batch.per_step["gain"] = v[1:] - v[:-1]
    return log_p.sum(0).exp()


@pytest.mark.parametrize("kind", ["exact", "posterior mean"])
def test_vidd_fixed_point_is_the_pretrained_step_tilted_by_the_value(kind):
    """With the pretrained model as prior it does not matter who rolled in: exact with the soft value, else its own."""
    ctx = lagged(setting(0.0), seed=3)
    value = soft_value(ctx) if kind == "exact" else PosteriorMean("mean")

    def potential(x: Tensor, i: int) -> Tensor:
        pred = ctx.reference.predict(x, i) if i else None
        return value(ctx, ctx.reference, x, i, pred, Noise.of(0, len(x)))

    backward(ctx, ALPHA, potential)
    off = total_variation(law(ctx), tilted(ctx, ALPHA))
    assert off < 1e-12 if kind == "exact" else off > 0.02
    for weights, settled in (
        (GainWeights(ALPHA, "ref", value), True),
        (GainWeights(ALPHA, "old"), False),  # planted: tilts the lagged model instead
        (GainWeights(-ALPHA, "ref", value), False),
        (GainWeights(2 * ALPHA, "ref", value), False),
    ):
        batch = every_path(ctx)
        p = by_old(ctx, batch, value)
        loss = WeightedLikelihood(weights)
        loss.prepare(ctx, batch, Noise.of(0, 1))
        g = expected_gradient(loss, ctx, batch, p).abs().max()
        assert bool(g < 1e-10) is settled


def test_vidd_weights_of_the_exact_value_have_mean_one_in_each_state():
    ctx = lagged(setting(0.0), seed=None)
    batch = every_path(ctx)
    p = by_old(ctx, batch, soft_value(ctx))
    w = GainWeights(ALPHA)(ctx, batch).exp()
    assert (w * p).sum(1).tolist() == pytest.approx([1, 1, 1], abs=1e-9)
    total = GainWeights(ALPHA)(ctx, batch).sum(0)
    log_z = 1.058402
    assert torch.allclose(total, batch.reward / ALPHA - log_z, atol=1e-6), (
        "over a path they add up to r/α − log Z"
    )


def test_vidd_each_refresh_of_the_release_tilts_again():
    """The lagged model is its own prior: two exact fits with a refresh between them reach the second tilt."""
    ctx = lagged(setting(0.0), seed=None)
    loss = WeightedLikelihood(GainWeights(ALPHA))
    value = soft_value(ctx)
    for k in (1, 2):
        if k == 2:  # the soft value under the tilted model
            table = soft_table(ctx)
            value = ExactValue(
                lambda x, i, table=table: table[(x.argmax(-1) * torch.tensor([25, 5, 1])).sum(-1)]
            )
        batch = every_path(ctx)
        p = by_old(ctx, batch, value)
        loss.prepare(ctx, batch, Noise.of(0, 1))
        exact_fit(loss, ctx, batch, p)
        ctx.modules["old"].load_state_dict(ctx.policy.network.state_dict())
        assert total_variation(law(ctx), tilted(ctx, ALPHA, k)) < 1e-12


def soft_table(ctx: Context) -> Tensor:
    """(125,) α log E[exp(r / α) | x] under the policy."""
    batch = every_path(ctx)
    with torch.no_grad():
        steps = step_log_probs(ctx.policy, batch)
    place = torch.tensor([25, 5, 1])
    table = torch.full((125,), -math.inf, dtype=torch.float64)
    ids = (batch.states.long() * place).sum(-1)
    table[ids[-1]] = batch.reward
    for k in (2, 1, 0):
        # every path gives its move's probability once for each way on; divide by how many share the move
        total, seen = torch.zeros(125, dtype=torch.float64), set()
        for n in range(ids.shape[1]):
            move = (int(ids[k, n]), int(ids[k + 1, n]))
            if move not in seen:
                seen.add(move)
                total[move[0]] += (steps[k, n] + table[move[1]] / ALPHA).exp()
        rows = ids[k].unique()
        table[rows] = ALPHA * total[rows].log()
    return table


def test_vidd_the_lagged_model_follows_every_so_many_updates():
    ctx = world_setting("random")
    loss, training = WeightedLikelihood(GainWeights(), refresh=3), Training(minibatch=8, lr=1e-2)
    ctx.modules = loss.modules(ctx)
    opt = optimizer(ctx.policy.trainable(), training, ctx.modules)
    assert not any(p.requires_grad for p in ctx.modules["old"].parameters())

    def same() -> bool:
        pairs = zip(ctx.modules["old"].parameters(), ctx.policy.network.parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    for r in range(7):  # one update each: 8 items
        batch = Rollout(on="old", value=PosteriorMean())(ctx, Noise.of(r, 8))
        batch.states, batch.per_step = batch.states[-2:], {k: v[-1:] for k, v in batch.per_step.items()}
        fit(loss, ctx, batch, opt, training, Noise.of(r, 1))
        assert same() is (r % 3 == 2)
        again = loss.modules(ctx)  # as a checkpoint restores them
        for name, module in again.items():
            module.load_state_dict(ctx.modules[name].state_dict())
        ctx.modules = again
    assert int(ctx.modules["updates"].n) == 7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prior", ["old", "ref"])
def test_vidd_cost_of_a_round(kind, prior):
    ctx = world_setting(kind, 6, untrained=False)
    loss, training = WeightedLikelihood(GainWeights(1.0, prior), refresh=5), Training(minibatch=1000)
    ctx.modules = loss.modules(ctx)
    search = Rollout(on="old", log_prob=prior == "ref", value=None if prior == "ref" else PosteriorMean())
    with ctx.meter.phase("search"):
        batch = search(ctx, Noise.of(0, 10))
    with ctx.meter.phase("fit"):
        opt = optimizer(ctx.policy.trainable(), training)
        fit(loss, ctx, batch, opt, training, Noise.of(1, 1))
    items, meter = 10 * batch.steps, ctx.meter
    assert meter.total("forward", "search") + meter.total("shared", "search") == items
    live = int(loss.active(batch).sum())
    assert live <= items - (10 if kind == "mixture" else 0)
    assert meter.total("backward", "fit") == live
    rows = meter.total("forward", "fit") + meter.total("shared", "fit")
    assert rows == live + (items if prior == "ref" else 0)
    phase = "fit" if prior == "ref" else "search"
    seen = meter.total("reward", phase) + meter.total("reward_shared", phase)
    assert seen == items + (10 if prior == "old" else 0)
    assert {"ess_share", "weight_max", "weight_zero"} <= batch.stats.keys()
