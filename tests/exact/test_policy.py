"""DDPO, DPOK and GRPO: gradients against closed forms and enumeration, and each defect seen to fail."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
import torch
from chains import Chain
from paths import backward, disturb, every_path, expected_gradient, law, setting, step_log_probs, tilted
from torch import Tensor, nn
from worlds import KINDS
from worlds import disturb as disturb_world
from worlds import setting as world_setting

from dav_bench.core import (
    Batch,
    Context,
    Item,
    MaskedProcess,
    Meter,
    MeteredReward,
    Model,
    Noise,
    PerGroup,
    PerPrompt,
    PolicyGradient,
    Rollout,
    Scaled,
    Training,
    fit,
)
from dav_bench.core.advantage import PromptStatistics
from dav_bench.core.fit import gradient, optimizer

RAW = Scaled(baseline="none")
SLOPE = 13.17635  # b Σ_i Π_{u < i} k_u
PRECISION = 172.6436  # Σ_i 1 / s_i²


def prepared(loss: PolicyGradient, ctx: Context, batch: Batch) -> Batch:
    loss.prepare(ctx, batch, Noise.of(1, 1))
    return batch


def per_sample(loss: PolicyGradient, ctx: Context, batch: Batch) -> Tensor:
    """(B,) ∂/∂θ of −Σ_i loss for each sample of a chain with one shared bias, in closed form of the score.

    The loss of an item depends on θ through log p alone, so that its derivative is that in log p times the score.
    """
    item = batch.items(torch.arange(len(batch)), ctx.policy.unpack)
    theta = ctx.policy.network.theta
    probe = torch.zeros(len(batch), dtype=torch.float64, requires_grad=True)
    step = ctx.policy.process.step(
        theta.detach() + probe[:, None].expand(-1, item.x.shape[1]), item.x, item.i
    )
    real, ctx.policy.step = ctx.policy.step, lambda *_: step  # type: ignore[method-assign]
    try:
        (g,) = torch.autograd.grad(loss(ctx, item).sum(), probe)
    finally:
        ctx.policy.step = real  # type: ignore[method-assign]
    return -g.view(batch.steps, -1).sum(0)


def within(values: Tensor, exact: float, errors: float = 4.0) -> bool:
    return abs(float(values.mean()) - exact) <= errors * float(values.std()) / math.sqrt(len(values))


# ---- DDPO


@pytest.mark.parametrize("dim", [1, 2])
def test_ddpo_t1_gradient_of_the_reward_in_a_shared_bias(dim):
    chain = Chain(dim=dim)
    ctx = chain.context()
    batch = Rollout(log_prob=True)(ctx, Noise.of(0, 20_000))
    found = {}
    for form in ("sf", "is"):
        loss = PolicyGradient(Scaled(), form, clip=0.2)
        found[form] = per_sample(loss, ctx, prepared(loss, ctx, batch))
        assert within(found[form], dim * SLOPE)
    assert (found["sf"] - found["is"]).abs().max() < 1e-9, "at ratio 1 both forms have one gradient"
    # planted: averaged over dimensions, or the reward with the wrong sign, it is another
    for loss in (PolicyGradient(Scaled(), "sf", reduce="mean"), PolicyGradient(Scaled(-1.0), "sf")):
        wrong = per_sample(loss, ctx, prepared(loss, ctx, batch))
        assert within(wrong, dim * SLOPE) is (loss.reduce == "mean" and dim == 1)


def test_the_loop_sees_the_same_gradient():
    """`gradient` of the mean over items is 1/T of the objective's."""
    ctx = Chain().context()
    batch = Rollout(log_prob=True)(ctx, Noise.of(0, 500))
    loss = PolicyGradient(Scaled())
    each = per_sample(loss, ctx, prepared(loss, ctx, batch))
    gradient(loss, ctx, batch, torch.arange(len(batch)), loss.active(batch), None)
    assert float(ctx.policy.network.theta.grad) == pytest.approx(-float(each.mean()) / batch.steps, rel=1e-10)


def test_ddpo_t3_probabilities_of_all_trajectories_and_their_gradient():
    ctx = setting()
    batch = every_path(ctx)
    log_p = step_log_probs(ctx.policy, batch)
    p = log_p.sum(0).exp()
    assert float(p.detach().sum()) == pytest.approx(1, abs=1e-12)
    (exact,) = torch.autograd.grad((p * batch.reward).sum(), ctx.policy.network.logits)
    batch.per_step["log_prob"] = log_p.detach()
    p = p.detach()
    for form in ("sf", "is"):
        for advantage in (RAW, Scaled()):  # a constant baseline changes nothing
            loss = PolicyGradient(advantage, form)
            found = -expected_gradient(loss, ctx, prepared(loss, ctx, batch), p)
            share = 1 if advantage is RAW else 384 / 383  # of the samples that are not the sample itself
            assert (found - share * exact).abs().max() < 1e-12
    assert exact.abs().max() > 1e-2
    # planted: the final tokens' probability at masked positions is not that of the step
    loss = PolicyGradient(RAW, ratio="clean")
    assert (-expected_gradient(loss, ctx, prepared(loss, ctx, batch), p) - exact).abs().max() > 1e-2


@pytest.mark.parametrize("form", ["sf", "is"])
def test_a_sampled_gradient_on_tokens_agrees_with_enumeration(form):
    ctx = setting()
    paths = every_path(ctx)
    p = step_log_probs(ctx.policy, paths).sum(0).exp()
    (exact,) = torch.autograd.grad((p * paths.reward).sum(), ctx.policy.network.logits)
    groups, n = 40, 500
    loss = PolicyGradient(Scaled(), form)
    rows = []
    for k in range(groups):
        batch = prepared(loss, ctx, Rollout(log_prob=True)(ctx, Noise.of(k, n)))
        rows.append(-expected_gradient(loss, ctx, batch, torch.full((n,), 1 / n)).flatten())
    found = torch.stack(rows)
    error = found.std(0) / groups**0.5
    z = ((found.mean(0) - exact.flatten()) / error)[error > 1e-9]
    assert float((z**2).mean()) < 1.25 and float(z.abs().max()) < 5.5  # of some hundred numbers


def items(log_ratio: list[float], advantage: list[float]) -> tuple[Context, Item]:
    """One-dimensional Gaussian steps whose new log-probability differs from the old by `log_ratio`."""
    ctx = Chain().context()
    n = len(log_ratio)
    x, i = torch.zeros(n, 1, dtype=torch.float64), torch.full((n,), 3)
    step = ctx.policy.step(x, i)
    x_next = (step.mean + step.std).detach()
    old = step.log_prob(x_next).detach() - torch.tensor(log_ratio, dtype=torch.float64)
    columns = {"advantage": torch.tensor(advantage, dtype=torch.float64), "log_prob": old}
    return ctx, Item(x, x_next, i, None, None, x_next, columns=columns)


def test_ddpo_t4_clipped_ratios_have_no_gradient():
    """A > 0 and ρ > 1 + ε, or A < 0 and ρ < 1 − ε: nothing.  The other way round the gradient stays."""
    far = math.log(1.3)
    cases = [(far, 1.0, False), (-far, -1.0, False), (far, -1.0, True), (-far, 1.0, True), (0.0, 1.0, True)]
    for log_ratio, advantage, moves in cases:
        ctx, item = items([log_ratio], [advantage])
        seen = {}
        item.note = lambda name, values, seen=seen: seen.update({name: values.detach()})
        loss = PolicyGradient(RAW, clip=0.2)(ctx, item)
        (g,) = torch.autograd.grad(loss.sum(), ctx.policy.network.theta)
        assert (float(g) != 0) is moves
        assert bool(seen["ratio_clipped"]) is not moves
        assert float(seen["ratio_max"]) == pytest.approx(math.exp(log_ratio))
        if moves:  # −A ρ ∂ log p / ∂θ, the score being 1/s at one standard deviation
            s = float(Chain().s[2])
            assert float(g) == pytest.approx(-advantage * math.exp(log_ratio) / s)
    # planted: a clip meant for means is none for sums
    ctx, item = items([far], [1.0])
    loss = PolicyGradient(RAW, clip=0.5)(ctx, item)
    assert float(torch.autograd.grad(loss.sum(), ctx.policy.network.theta)[0]) != 0


def test_ratios_beyond_the_range_of_floats_are_counted_and_stay_finite():
    ctx, item = items([900.0, -900.0, 0.0], [1.0, -1.0, 1.0])
    seen = {}
    item.note = lambda name, values: seen.update({name: values})
    loss = PolicyGradient(RAW)(ctx, item)
    (g,) = torch.autograd.grad(loss.sum(), ctx.policy.network.theta)
    assert loss.isfinite().all() and g.isfinite().all()
    assert seen["ratio_overflow"].tolist() == [True, True, False]


def test_each_reduction_has_its_own_clip():
    assert PolicyGradient(reduce="sum").epsilon == 0.2
    assert PolicyGradient(reduce="mean").epsilon == 1e-4
    assert PolicyGradient(reduce="mean", clip=0.3).epsilon == 0.3


def test_ddpo_t5_tracker_arithmetic():
    """Against deques: fallback to the batch below `min_count`, forgetting beyond `window`."""
    rng = np.random.default_rng(0)
    advantage = PerPrompt(window=6, min_count=4, prompts=16, clip=None)
    ctx = world_setting("random")
    ctx.modules = advantage.modules(ctx)
    deques: dict[int, deque[float]] = {}
    fallbacks = 0
    for _ in range(8):
        prompts = rng.integers(0, 5, 7)
        rewards = rng.normal(size=7) + prompts
        expected = np.empty(7)
        missing = 0
        for c in np.unique(prompts):
            mine = prompts == c
            held = deques.setdefault(int(c), deque(maxlen=6))
            held.extend(rewards[mine])
            source = held if len(held) >= 4 else rewards
            missing += int(mine.sum()) * (len(held) < 4)
            expected[mine] = (rewards[mine] - np.mean(source)) / (np.std(source) + 1e-6)
        batch = Batch(torch.zeros(1, 7, 3), torch.tensor(rewards), cond=torch.tensor(prompts))
        assert np.abs(advantage(ctx, batch).numpy() - expected).max() < 1e-9
        assert batch.stats["prompt_fallback"] == pytest.approx(missing / 7)
        fallbacks += missing > 0
        # a checkpoint holds all of it
        restored = advantage.modules(ctx)
        restored["statistics"].load_state_dict(ctx.modules["statistics"].state_dict())
        ctx.modules = restored
    assert 0 < fallbacks < 8


def test_a_full_tracker_forgets_the_prompt_not_seen_for_longest():
    table = PromptStatistics(2, 4)
    keys = torch.tensor([11, 12, 13])
    for key in (keys[0], keys[1], keys[0]):
        assert table.row(key)[1] is False
        table.push(table.row(key)[0], torch.ones(1))
    row, forgot = table.row(keys[2])
    assert forgot and row == table.row(keys[2])[0]
    assert table.push(row, torch.tensor([5.0])).tolist() == [5.0]
    assert table.row(keys[0])[1] is False, "the one seen lately is still there"
    assert table.row(keys[1])[1] is True


def test_more_rewards_than_the_window_leave_the_last_ones():
    table = PromptStatistics(1, 3)
    assert sorted(table.push(0, torch.arange(8.0)).tolist()) == [5, 6, 7]
    assert sorted(table.push(0, torch.tensor([8.0])).tolist()) == [6, 7, 8]


def test_without_prompts_the_batch_is_the_group():
    ctx = world_setting("random")
    r = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    batch = Batch(torch.zeros(1, 4, 3), r)
    advantage = PerPrompt()
    ctx.modules = advantage.modules(ctx)
    expected = (r - r.mean()) / (r.std(correction=0) + 1e-6)
    assert torch.allclose(advantage(ctx, batch), expected)
    assert torch.allclose(PerPrompt(clip=1.0, tracker=False)(ctx, batch), expected.clamp(-1, 1))
    assert batch.stats["advantage_clipped"] == 0.25
    assert PerPrompt(tracker=False).modules(ctx) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_ddpo_t6_the_first_update_has_ratio_one(kind, reduce, record_property):
    for dtype, allowed in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        ctx = world_setting(kind, dtype=dtype, untrained=False)
        batch = Rollout(log_prob=True)(ctx, Noise.of(0, 64))
        ctx.policy.attach(ctx.meter, 7)  # other batches than those of the search
        loss = PolicyGradient(reduce=reduce)
        ctx.modules = loss.modules(ctx)
        prepared(loss, ctx, batch)
        gradient(loss, ctx, batch, torch.arange(len(batch)), loss.active(batch), 7)
        worst = max(float((v - 1).abs().max()) for v in batch.notes["ratio_max"])
        if dtype == torch.float32:
            record_property("float32_largest_deviation_of_the_ratio", worst)
            print(f"\nfloat32, {kind}, {reduce}: ratios are within {worst:.1e} of 1")
        assert worst < allowed
    # planted: another policy than the one that sampled
    disturb_world(ctx.policy, seed=1)
    batch.notes.clear()
    gradient(loss, ctx, batch, torch.arange(len(batch)), loss.active(batch), 7)
    assert max(float((v - 1).abs().max()) for v in batch.notes["ratio_max"]) > 1e-2


def test_a_batch_without_old_log_probs_is_refused():
    ctx = world_setting("random")
    with pytest.raises(ValueError, match="log_prob=True"):
        PolicyGradient(RAW).prepare(ctx, Rollout()(ctx, Noise.of(0, 4)), Noise.of(1, 1))


def test_a_deterministic_chain_is_refused():
    ctx = world_setting("mixture")
    ctx.policy.process.eta = 0.0
    with pytest.raises(ValueError, match=r"sampler\.eta=1"):
        PolicyGradient(RAW).prepare(ctx, Rollout(log_prob=True)(ctx, Noise.of(0, 4)), Noise.of(1, 1))


def test_idle_items_cost_nothing_and_change_nothing():
    """Copied states, deterministic steps and advantages of 0 are left out of the network, not of the mean."""
    for kind in KINDS:
        ctx = world_setting(kind, untrained=False)
        batch = Rollout(log_prob=True)(ctx, Noise.of(0, 32))
        batch.reward[:8] = batch.reward.mean()  # hits the mean of the group exactly where all are equal
        loss = PolicyGradient(PerGroup(8))
        prepared(loss, ctx, batch)
        assert (batch.per_sample["advantage"][:8] == 0).all()
        every, alive = torch.arange(len(batch)), loss.active(batch)
        assert alive.sum() <= 24 * (batch.steps - (kind == "mixture"))
        grads = []
        for live in (alive, torch.ones_like(alive)):
            ctx.policy.network.zero_grad()
            gradient(loss, ctx, batch, every, live, None)
            grads.append(torch.cat([p.grad.flatten() for p in ctx.policy.trainable().values()]))
        assert (grads[0] - grads[1]).abs().max() < 1e-12 < grads[0].abs().max()


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_cost_of_a_round(kl):
    """One row forward and backward for each live item and update, and one of the reference for each item; the old
    log-probabilities are those of the search."""
    ctx = world_setting("mixture", 6, untrained=False)
    with ctx.meter.phase("search"):
        batch = Rollout(log_prob=True)(ctx, Noise.of(0, 10))
    loss, training = PolicyGradient(PerPrompt(), kl=kl), Training(updates=3, minibatch=25)
    ctx.modules = loss.modules(ctx)
    with ctx.meter.phase("fit"):
        fit(loss, ctx, batch, optimizer(ctx.policy.trainable(), training), training, Noise.of(1, 1))
    assert ctx.meter.total("forward", "search") == 60
    live = 50  # the last of the 6 steps is deterministic
    assert ctx.meter.total("backward", "fit") == 3 * live
    assert ctx.meter.total("forward", "fit") == 3 * live + (60 if kl else 0)
    assert ctx.meter.total("reward", "fit") == 0
    assert {"ratio_min", "ratio_max", "ratio_clipped", "zero_variance"} <= batch.stats.keys()
    assert ("kl" in batch.stats) is bool(kl)


# ---- the ratio of the VIDD repository's DDPO


def clean_log_prob(world: Model, batch: Batch) -> Tensor:
    """(T, B) mean over all positions of log p(x_0^l | x_i) at masked ones."""
    x = [world.unpack(s) for s in batch.states]
    out = []
    for k in range(batch.steps):
        law = world.predict(x[k], batch.steps - k).log_softmax(-1)
        out.append(((x[-1][..., :-1] * law).sum(-1) * x[k][..., -1]).mean(1))
    return torch.stack(out)


def test_ddpo_clean_ratio_is_that_of_the_final_tokens():
    ctx = world_setting("parallel", untrained=False)
    loss = PolicyGradient(RAW, reduce="mean", ratio="clean", clip=10.0)
    batch = prepared(loss, ctx, Rollout()(ctx, Noise.of(0, 20)))
    old = clean_log_prob(ctx.policy, batch).detach()
    with torch.no_grad():
        ctx.policy.network.residual[-1].bias.add_(torch.linspace(-1, 1, 12, dtype=torch.float64))
    ratio = (clean_log_prob(ctx.policy, batch) - old).exp()
    found = loss(ctx, batch.items(torch.arange(len(batch)), ctx.policy.unpack))
    assert torch.allclose(found, (-batch.reward * ratio).flatten())
    assert (ratio - 1).abs().max() > 0.05
    with pytest.raises(ValueError, match="masked diffusion only"):
        mixture = world_setting("mixture")
        loss.prepare(mixture, Rollout()(mixture, Noise.of(0, 4)), Noise.of(1, 1))


def test_ddpo_lagged_ratio_is_against_the_policy_one_round_before_the_sampler():
    """methods.md 3.3: 1 in the first round only, since the old model always lags by one update."""
    ctx = setting(0.0)
    loss = PolicyGradient(RAW, reduce="mean", ratio="clean", old="lagged")
    ctx.modules = loss.modules(ctx)
    assert not any(p.requires_grad for p in ctx.modules["old"].parameters())
    before = None
    for k in range(3):
        batch = prepared(loss, ctx, Rollout()(ctx, Noise.of(k, 16)))
        expected = clean_log_prob(ctx.policy if before is None else before, batch).detach()
        assert torch.allclose(batch.per_step["log_prob"] / 3, expected, atol=1e-12)
        now = clean_log_prob(ctx.policy, batch)
        assert bool((now - expected).abs().max() < 1e-12) is (k == 0)
        before = ctx.policy.with_network(type(ctx.policy.network)(ctx.policy.network))
        disturb(ctx.policy, 0.3, seed=k + 1)


# ---- DPOK


def test_dpok_t2_optimum_in_a_shared_bias():
    """θ* = 13.17635 / (b Σ 1/s²): the gradient is linear in θ, so one Newton step from anywhere reaches it."""
    chain, weight = Chain(), 2.0
    exact = SLOPE / (weight * PRECISION)
    assert exact == pytest.approx(0.0763211 / weight, rel=1e-5)
    for start in (0.0, 0.1):
        ctx = chain.context()
        ctx.policy.network.theta.data.fill_(start)
        batch = Rollout(log_prob=True)(ctx, Noise.of(0, 20_000))
        for kl, reached in ((weight, True), (0.0, False), (2 * weight, False)):
            loss = PolicyGradient(Scaled(), kl=kl)
            g = per_sample(loss, ctx, prepared(loss, ctx, batch))
            assert within(start + g / (weight * PRECISION), exact) is (reached or start == 0)


def test_dpok_kl_is_exact_and_its_gradient_goes_through_the_current_step():
    ctx = setting()
    batch = every_path(ctx)
    batch.per_step["log_prob"] = step_log_probs(ctx.policy, batch).detach()
    p = batch.per_step["log_prob"].sum(0).exp()
    loss = PolicyGradient(Scaled(0.0, "none"), kl=0.7)
    found = expected_gradient(loss, ctx, prepared(loss, ctx, batch), p)
    at, total = torch.ones_like(p), torch.zeros(())
    for k in range(3):  # Σ over states of occupancy (fixed) times KL
        x = ctx.policy.unpack(batch.states[k])
        total = total + (p * at * ctx.policy.step(x, 3 - k).kl(ctx.reference.step(x, 3 - k))).sum()
    (exact,) = torch.autograd.grad(0.7 * total, ctx.policy.network.logits)
    assert (found - exact).abs().max() < 1e-12 < exact.abs().max()


def test_the_release_of_dpok_clips_without_a_way_back():
    """−A clip(ρ): no gradient beyond the clip on either side, the clipped surrogate's within."""
    for log_ratio, advantage in ((0.3, 1.0), (0.3, -1.0), (-0.3, 1.0), (-0.3, -1.0), (0.1, 1.0), (0.0, -1.0)):
        grads = []
        for form in ("clamp", "is"):
            ctx, item = items([log_ratio], [advantage])
            seen = {}
            item.note = lambda name, values, seen=seen: seen.update({name: values.detach()})
            loss = PolicyGradient(RAW, form, clip=0.2)(ctx, item)
            grads.append(float(torch.autograd.grad(loss.sum(), ctx.policy.network.theta)[0]))
            if form == "clamp":
                assert bool(seen["ratio_clipped"]) is (abs(log_ratio) == 0.3)
        assert grads[0] == (0.0 if abs(log_ratio) == 0.3 else grads[1])


def test_the_release_of_dpok_pulls_by_the_squared_error_of_the_noise():
    ctx = world_setting("mixture", untrained=False)
    batch = Rollout(log_prob=True)(ctx, Noise.of(0, 6))
    losses = []
    for loss in (PolicyGradient(RAW, kl=0.5, kl_form="mse"), PolicyGradient(RAW)):
        loss.prepare(ctx, batch, Noise.of(1, 1))
        losses.append(loss(ctx, batch.items(torch.arange(len(batch)), ctx.policy.unpack)))
    for k in range(batch.steps - 1):
        x, i = ctx.policy.unpack(batch.states[k]), batch.steps - k
        a = ctx.policy.process.share(i, x)
        noise = [(x - a.sqrt() * m.step(x, i).x0) / (1 - a).sqrt() for m in (ctx.policy, ctx.reference)]
        error = ((noise[0] - noise[1]) ** 2).flatten(1).mean(1)
        assert torch.allclose((losses[0] - losses[1]).view(batch.steps, -1)[k], 0.5 * error)
    with pytest.raises(ValueError, match="Gaussian"):
        tokens = world_setting("parallel")
        batch = prepared(loss, tokens, Rollout(log_prob=True)(tokens, Noise.of(0, 4)))
        broken = PolicyGradient(RAW, kl=0.5, kl_form="mse")
        broken.prepare(tokens, batch, Noise.of(1, 1))
        broken(tokens, batch.items(torch.arange(4), tokens.policy.unpack))


# ---- GRPO


def test_grpo_gradient_is_that_of_the_expected_group_advantage():
    """All pairs of paths as groups of two, against a table of advantages by pairs of rewards."""
    ctx = setting()
    batch = every_path(ctx)
    log_p = step_log_probs(ctx.policy, batch)
    p, r = log_p.sum(0).exp(), batch.reward
    n = len(r)
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    for std in ("group", "none"):
        half = (r[:, None] - r[None]) / 2  # r less the mean of the two
        size = half.abs()  # which is also their spread
        table = half / (size + 1e-4) if std == "group" else 2 * half
        expected = (table * p.detach()).sum(1)
        (exact,) = torch.autograd.grad((p * expected).sum(), ctx.policy.network.logits, retain_graph=True)
        advantage = PerGroup(2, std, clip=None)
        made = advantage(ctx, Batch(batch.states[:, pairs.flatten()], r[pairs.flatten()]))
        mean = (made.view(n, n, 2)[..., 0] * p.detach()).sum(1)
        loss = PolicyGradient(RAW, "sf")
        batch.reward = mean
        found = -expected_gradient(loss, ctx, prepared(loss, ctx, batch), p.detach())
        batch.reward = r
        assert (found - exact).abs().max() < 1e-12 < exact.abs().max()
        if std == "none":  # the mean of the others is a baseline: the gradient is that of the reward itself
            (plain,) = torch.autograd.grad((p * r).sum(), ctx.policy.network.logits, retain_graph=True)
            assert (found - plain).abs().max() < 1e-12
        # planted: groups that mix the wrong samples
        wrong = advantage(ctx, Batch(batch.states[:, pairs.T.flatten()], r[pairs.T.flatten()]))
        assert (wrong.view(n, n, 2)[..., 0] * p.detach()).sum(1).sub(mean).abs().max() > 1e-3


def test_grpo_counts_and_skips_groups_without_variance():
    ctx = world_setting("random")
    third = 0.1 + 0.2  # whose mean of three is not itself in floating point
    r = torch.tensor([third] * 3 + [1.0, 2.0, 3.0], dtype=torch.float64)
    batch = Batch(torch.zeros(4, 6, 3, dtype=torch.uint8), r)
    a = PerGroup(3)(ctx, batch)
    assert (a[:3] == 0).all() and batch.stats["zero_variance"] == 0.5
    sd = math.sqrt(2 / 3)
    assert torch.allclose(a[3:], torch.tensor([-1, 0, 1], dtype=torch.float64) / (sd + 1e-4))
    spread = float(r.std(correction=0))
    assert torch.allclose(PerGroup(3, "batch")(ctx, batch)[3:], (r[3:] - 2) / (spread + 1e-4))
    assert torch.allclose(PerGroup(3, "none")(ctx, batch)[3:], torch.tensor([-1.5, 0, 1.5]).double())
    # tiny differences are bounded by the floor, and counted
    near = Batch(batch.states, torch.tensor([0, 1e-6, 2e-6, 1, 2, 3], dtype=torch.float64))
    assert PerGroup(3)(ctx, near)[:3].abs().max() < 0.011
    assert near.stats["advantage_floored"] == 0.5
    with pytest.raises(ValueError, match="multiple of group"):
        PerGroup(4)(ctx, batch)


def test_grpo_groups_are_prompts_where_there_are_any():
    ctx = world_setting("random")
    r = torch.tensor([1.0, 10.0, 3.0, 30.0, 20.0], dtype=torch.float64)
    for cond in (torch.tensor([4, 7, 4, 7, 7]), torch.tensor([[0.5], [-2.0], [0.5], [-2.0], [-2.0]])):
        a = PerGroup(2, "none")(ctx, Batch(torch.zeros(1, 5, 3), r, cond=cond))
        assert a.tolist() == [-2, -15, 2, 15, 0]


class OneToken(nn.Module):
    """Logits of a single token."""

    time_input = False

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.logits.expand(len(x), 1, 4)


def one_token() -> Context:
    """FX6: one masked token, so that a step is the whole path."""
    meter = Meter()
    world = Model(OneToken(), MaskedProcess(1, 4, 1), "sequence").attach(meter)
    reference = world.reference()
    return Context(world, reference, MeteredReward(lambda x, c=None: x[:, 0, 3], meter), meter)  # type: ignore[arg-type]


def flow(ctx: Context, loss: PolicyGradient, advantage, steps: int = 250, rate: float = 2.0) -> Tensor:
    """(4,) where the exact expected gradient of one token leads; `advantage(p, r)` is that of each outcome."""
    states = torch.tensor([[[4]] * 4, [[0], [1], [2], [3]]], dtype=torch.uint8)
    r, logits = torch.tensor([0.0, 0, 0, 1]).double(), ctx.policy.network.logits
    for _ in range(steps):
        p = logits.detach().softmax(0)
        batch = Batch(states, advantage(p, r))
        batch.per_step["log_prob"] = p.log()[None]
        prepared(loss, ctx, batch)
        values = loss(ctx, batch.items(torch.arange(4), ctx.policy.unpack))
        (g,) = torch.autograd.grad((values * p).sum(), logits)
        with torch.no_grad():
            logits -= rate * g
    return logits.detach().softmax(0)


def test_grpo_with_kl_reaches_the_tilt():
    """Of one step the KL-regularised optimum is p_ref exp(A / λ): the tilt at temperature λ, or at λ times the
    spread where advantages are divided by it."""
    target = torch.tensor([0.341347, 0.256010, 0.170673, 0.231969]).double()

    def none(p, r):  # E[A] of a group with the mean of the others
        return r - (p * r).sum()

    def spread(p, r):  # many in a group: standardised
        mean = (p * r).sum()
        return (r - mean) / (p * (r - mean) ** 2).sum().sqrt()

    loss = PolicyGradient(RAW, kl=1.0)
    assert (flow(one_token(), loss, none) - target).abs().max() < 1e-5
    # divided by the spread s of its own fixed point, the temperature is λ s
    p = flow(one_token(), loss, spread)
    s = float((p[3] * (1 - p[3])).sqrt())
    prior = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    assert torch.allclose(p, (prior.log() + torch.tensor([0, 0, 0, 1 / s]).double()).softmax(0), atol=1e-5)
    # planted: without KL it collapses, with half of it it is twice as cold
    assert float(flow(one_token(), PolicyGradient(RAW), none)[3]) > 0.95
    assert (flow(one_token(), PolicyGradient(RAW, kl=0.5), none) - target).abs().max() > 0.05


def test_grpo_trained_on_samples_reaches_the_tilt():
    """The parts that a run uses: rollouts, groups, the loop."""
    ctx = one_token()
    loss, training = PolicyGradient(PerGroup(8, "none"), kl=1.0), Training(minibatch=4096, lr=0.03)
    opt = optimizer(ctx.policy.trainable(), training)
    for k in range(120):
        for group in opt.param_groups:
            group["scale"] = 1.0 if k < 60 else 0.1
        batch = Rollout(log_prob=True)(ctx, Noise.of(k, 1024))
        fit(loss, ctx, batch, opt, training, Noise.of(k, 1))
    p = ctx.policy.network.logits.detach().softmax(0)
    assert abs(float(p[3]) - 0.231969) < 0.02


def test_many_steps_with_a_local_kl_have_their_own_fixed_point():
    """The KL of later steps does not enter the return of earlier ones, so at λ = α the law is not the tilt.

    Each step's fixed point is p_ref exp(Q / λ) with Q = E_p[r | x_{i−1}] under the policy itself.
    """
    ctx = setting(0.0)
    loss = PolicyGradient(RAW, "sf", kl=1.0)
    gradients = {}
    for soft in (False, True):
        backward(ctx, 1.0, soft=soft)
        batch = every_path(ctx)
        with torch.no_grad():
            p = step_log_probs(ctx.policy, batch).sum(0).exp()
        gradients[soft] = expected_gradient(loss, ctx, prepared(loss, ctx, batch), p).abs().max()
        off = 0.5 * float((law(ctx) - tilted(ctx, 1.0)).abs().sum())
        assert (off < 1e-12) is soft
        assert soft or off > 0.02
    assert gradients[False] < 1e-12 and gradients[True] > 1e-2
