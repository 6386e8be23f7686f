"""DRaFT and DRAKES: gradients through the chain against their closed forms, laws of relaxed tokens, KL of paths."""

import math

import pytest
import torch
import torch.nn.functional as F
from chains import Chain
from worlds import KINDS, Saved, disturb, setting

from dav_bench.core import (
    Batch,
    Context,
    MaskedProcess,
    MaskedStep,
    Meter,
    MeteredReward,
    Model,
    Noise,
    Pathwise,
    Rollout,
    Seeds,
    Training,
    fit,
)
from dav_bench.core.fit import gradient, optimizer, parameters
from dav_bench.core.pathwise import _release_kl

SLOPES = {1: 1.0, 3: 2.710, 20: 8.78423, 0: 8.78423}  # Σ_{t < K} Π_{u ≤ t} k_u
EVERY = F.one_hot(torch.cartesian_prod(*[torch.arange(4)] * 3), 4).double()  # the 64 sequences of FX3


def draw(ctx: Context, loss: Pathwise, n: int, seed: int = 0) -> tuple[Batch, torch.Tensor]:
    """Samples of the loss, and its values (n,) with their graph."""
    batch = Seeds()(ctx, Noise.of(seed, n))
    return batch, loss(ctx, batch.items(torch.arange(n), ctx.policy.unpack))


def slopes(ctx: Context, loss: Pathwise, n: int = 10, seed: int = 0) -> torch.Tensor:
    """∂E[r]/∂θ of a chain's bias, by the loop that a run uses."""
    ctx.policy.network.zero_grad()
    batch = Seeds()(ctx, Noise.of(seed, n))
    gradient(loss, ctx, batch, torch.arange(n), loss.active(batch), None)
    return -ctx.policy.network.theta.grad


def per_sample(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """(n,) gradient of each value in one direction of a parameter, by differentiating the weighted sum twice."""
    weights = torch.ones_like(values, requires_grad=True)
    (grad,) = torch.autograd.grad((weights * values).sum(), parameter, create_graph=True)
    return torch.autograd.grad(grad.sum(), weights)[0]


def trained(ctx: Context, loss: Pathwise, training: Training, rounds: int, samples: int) -> None:
    ctx.modules = loss.modules(ctx)
    opt = optimizer(parameters(ctx), training, ctx.modules)
    for r in range(rounds):
        fit(
            loss,
            ctx,
            Seeds()(ctx, Noise.of(r, samples)),
            opt,
            training,
            Noise.of(r, 1),
            (r / rounds, (r + 1) / rounds),
        )


# ---- DRaFT


@pytest.mark.parametrize("last", SLOPES)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_draft_t1_gradient_of_a_bias_that_all_steps_share(last, checkpoint):
    chain = Chain()
    got = slopes(chain.context("shared"), Pathwise(last=last, checkpoint=checkpoint)) / chain.b
    assert float(got) == pytest.approx(SLOPES[last], abs=5e-6)


@pytest.mark.parametrize("last", [1, 3, 0])
def test_draft_t1_gradient_is_the_difference_with_frozen_noise(last):
    """A bias in the last K steps alone moves the reward of each sample by what the gradient says."""
    chain, h = Chain(), 1e-3
    got = slopes(chain.context("shared"), Pathwise(last=last))
    rewards = []
    for sign in (1, -1):
        ctx = chain.context("step")
        with torch.no_grad():
            ctx.policy.network.theta[: last or 20] = sign * h
        rewards.append(draw(ctx, Pathwise(last=last), 10)[0].reward)
    assert ((rewards[0] - rewards[1]) / (2 * h)).tolist() == pytest.approx([float(got)] * 10, rel=1e-9)


@pytest.mark.parametrize("last", [1, 3, 7])
def test_draft_t2_no_gradient_before_the_cut(last):
    chain = Chain()
    got = slopes(chain.context("step"), Pathwise(last=last))
    assert torch.equal(got[last:], torch.zeros(20 - last).double()), "exactly 0"
    assert torch.allclose(got[:last], chain.b * chain.gain[:last])


@pytest.mark.parametrize("truncate", ["gaussian", "uniform"])
def test_draft_t2_random_truncation_cuts_each_sample_where_it_says(truncate):
    chain, loss, n = Chain(), Pathwise(truncate=truncate), 300
    depth = loss.depth(20, Noise.of(0, n))
    got = slopes(chain.context("step"), loss, n)
    share = (depth[:, None] > torch.arange(20)).double().mean(0)
    assert torch.allclose(got, chain.b * chain.gain[:20] * share)
    assert got[-1] == 0 != got[0], "the first step is never differentiated, the last one always"


def test_draft_t2_depths_have_the_law_of_the_release():
    """50 steps: 50 − int(N(42, 5)) and 50 − randint(0, 50), both drawn again outside 1 … 49."""
    n = 20_000
    edge = (torch.arange(1, 51).double() - 42) / 5
    mass = torch.special.ndtr(edge).diff()  # the first differentiated step is 1, 2, … 49
    laws = {"gaussian": (mass / mass.sum()).flip(0), "uniform": torch.full((49,), 1 / 49).double()}
    for truncate, law in laws.items():
        depth = Pathwise(truncate=truncate).depth(50, Noise.of(1, n))
        assert depth.min() >= 1 and depth.max() <= 49
        seen = torch.bincount(depth - 1, minlength=49).double()
        cells = law * n > 5
        chi = ((seen - law * n) ** 2 / (law * n))[cells].sum()
        assert chi < cells.sum() + 4 * math.sqrt(2 * cells.sum()), truncate
    assert float((laws["gaussian"] * torch.arange(1, 50)).sum()) == pytest.approx(9.09, abs=0.01)


def test_draft_t3_copies_keep_the_mean_and_divide_the_variance():
    """One step from pure noise: each copy is a fresh sample, so that n of them have 1/n of the variance."""
    ctx, n, moments = setting("mixture", steps=1, untrained=False), 4000, {}
    last = ctx.policy.network.residual[-1].weight
    for copies in (1, 2, 4):
        _, values = draw(ctx, Pathwise(copies=copies), n, seed=copies)
        g = per_sample(values, last)
        moments[copies] = float(g.mean()), float(g.var()), float(((g - g.mean()) ** 2).std())
    mean, var, spread = moments[1]
    for copies in (2, 4):
        other, less, its = moments[copies]
        assert other == pytest.approx(mean, abs=4 * math.sqrt((var + less) / n))
        assert copies * less == pytest.approx(var, abs=4 * math.sqrt((spread**2 + (copies * its) ** 2) / n))
        assert less < 0.8 * var


def test_draft_t5_without_a_kl_all_samples_move_to_the_peak():
    """The pretrained modes are at −2 and 2, the peak of the reward at 1 in between: variance goes to 0 there."""
    ctx = setting("mixture", steps=8)
    assert Rollout()(ctx, Noise.of(9, 1000)).states[-1].var() > 3
    trained(ctx, Pathwise(last=0), Training(minibatch=64, lr=3e-2, schedule="linear"), rounds=150, samples=64)
    x = Rollout()(ctx, Noise.of(9, 1000)).states[-1]
    assert float(x.mean()) == pytest.approx(1, abs=0.1)
    assert float(x.var()) < 0.1, "the tilted target has .585 at α = 1"


def test_draft_on_tokens_finds_the_best_sequence():
    ctx = setting("random")
    trained(ctx, Pathwise(last=0), Training(minibatch=64, lr=1e-2), rounds=60, samples=64)
    assert float(Rollout()(ctx, Noise.of(9, 1000)).reward.mean()) > 3.4  # of 3.5; E_ref r = .67


def test_the_chain_is_the_one_a_rollout_draws():
    """On Gaussian steps training sees what the tuned model samples from the same noise."""
    ctx = setting("mixture", untrained=False)
    for loss in (Pathwise(last=1), Pathwise(last=0), Pathwise(truncate="uniform")):
        batch, _ = draw(ctx, loss, 20)
        rollout = Rollout()(ctx, Noise.of(0, 20))
        assert torch.allclose(batch.states[-1], rollout.states[-1], rtol=0, atol=1e-12)
        assert torch.allclose(batch.reward, rollout.reward, rtol=0, atol=1e-12)


# ---- what must not change an update, what it costs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "loss",
    [
        Pathwise(truncate="uniform"),
        Pathwise(copies=3),
        Pathwise(last=4, kl=0.3),
        Pathwise(last=0, kl=0.3, checkpoint=True, states="hard"),
    ],
)
def test_micro_batches_and_order_do_not_change_the_gradient(kind, loss):
    def grads(micro_batch, order):
        ctx = setting(kind, untrained=False)
        batch = Seeds()(ctx, Noise.of(0, 12))
        gradient(loss, ctx, batch, order, loss.active(batch), micro_batch)
        return torch.cat([p.grad.flatten() for p in ctx.policy.trainable().values()])

    whole = grads(None, torch.arange(12))
    assert whole.abs().max() > 1e-3
    for size, order in ((1, torch.arange(12)), (5, torch.arange(12).flip(0))):
        assert (grads(size, order) - whole).abs().max() < 1e-9 * whole.abs().max()


def held(kind: str, steps: int, loss: Pathwise) -> int:
    ctx = setting(kind, steps=steps)
    batch = Seeds()(ctx, Noise.of(0, 16))
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda handle: handle.tensor):
        gradient(loss, ctx, batch, torch.arange(16), loss.active(batch), None)
    assert saved.now == 0
    return saved.peak


@pytest.mark.parametrize("kind", ["mixture", "parallel"])
def test_memory_of_a_truncated_chain_does_not_grow_with_its_length(kind):
    few, many = held(kind, 8, Pathwise(last=3)), held(kind, 64, Pathwise(last=3))
    assert few == many > 0
    assert held(kind, 64, Pathwise(last=6)) > 1.5 * many, "it grows with K"
    assert held(kind, 64, Pathwise(last=0)) > 10 * many, "a graph of the whole chain would show"
    last = Pathwise(last=3, kl=1.0, kl_steps="last")
    assert held(kind, 8, last) == held(kind, 64, last)


@pytest.mark.parametrize("kind", ["mixture", "parallel"])
def test_rows_are_those_of_the_formula(kind):
    n, steps, last = 6, 8, 3
    cases = {
        Pathwise(last=last): (steps, last, 1),
        Pathwise(last=last, checkpoint=True): (steps + last, last, 1),
        Pathwise(copies=4): (steps + 4, 4, 4),
        Pathwise(last=last, kl=1.0): (2 * steps, steps + last - 1, 1),
        Pathwise(last=last, kl=1.0, kl_steps="last"): (steps + last, 2 * last - 1, 1),
        Pathwise(last=last, kl=1.0, checkpoint=True): (2 * steps + 2 * last, steps + last - 1, 1),
    }
    for loss, (forward, backward, rewards) in cases.items():
        ctx = setting(kind, steps)
        batch = Seeds()(ctx, Noise.of(0, n))
        gradient(loss, ctx, batch, torch.arange(n), loss.active(batch), None)
        assert ctx.meter.total("forward") == n * forward, loss
        assert ctx.meter.total("backward") == n * backward, loss
        assert ctx.meter.total("reward") == ctx.meter.total("reward_backward") == n * rewards, loss


# ---- DRAKES


def chi_square(batch: Batch, law: torch.Tensor) -> tuple[float, float]:
    """Statistic of the sequences drawn against a law of all sequences, and its mean plus 4 standard deviations."""
    ids = batch.states[-1].long()
    width = law.numel() ** (1 / ids.shape[1])
    index = sum(ids[:, k] * round(width) ** (ids.shape[1] - 1 - k) for k in range(ids.shape[1]))
    expected = law.flatten() * len(ids)
    seen = torch.bincount(index, minlength=len(expected)).double()
    free = len(expected) - 1
    return float(((seen - expected) ** 2 / expected).sum()), free + 4 * math.sqrt(2 * free)


@pytest.mark.parametrize(("states", "tau"), [("hard", 1.0), ("soft", 1e-3)])
def test_drakes_t4_samples_have_the_exact_law_as_tau_goes_to_zero(states, tau):
    ctx = setting("random")
    with torch.no_grad():
        law = ctx.policy.network.target(lambda x: torch.zeros(len(x)), 1.0)
    found, limit = chi_square(draw(ctx, Pathwise(last=0, tau=tau, states=states), 10_000)[0], law)
    assert found < limit


def test_drakes_t4_warm_relaxed_states_have_another_law():
    """The gap between training and sampling: the network reads blends of tokens that it never meets at test time."""
    ctx = setting("random")
    with torch.no_grad():
        law = ctx.policy.network.target(lambda x: torch.zeros(len(x)), 1.0)
    found, limit = chi_square(draw(ctx, Pathwise(last=0, tau=1.0, states="soft"), 10_000)[0], law)
    assert found > 2 * limit


class OneToken(torch.nn.Module):
    """A law of one token, the same for each state."""

    time_input = False

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor([0.4, 0.3, 0.2, 0.1]).double().log())

    def forward(self, x, t):
        return self.logits.expand(*x.shape[:2], 4)


def one_token(steps: int = 5) -> Context:
    """FX6: the policy (.1, .2, .3, .4) and the pretrained (.4, .3, .2, .1)."""
    world, meter = Model(OneToken(), MaskedProcess(1, 4, steps), "sequence"), Meter()
    world.attach(meter)
    ctx = Context(
        world, world.reference(), MeteredReward(lambda x, cond=None: 0 * x.sum((1, 2)), meter), meter
    )
    with torch.no_grad():
        world.network.logits.copy_(world.network.logits.flip(0))
    return ctx


def test_drakes_t4_one_token_is_drawn_by_its_law():
    ctx = one_token()
    law = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    for loss in (
        Pathwise(last=0, states="hard"),
        Pathwise(last=0, states="hard", mask="drawn"),
        Pathwise(last=0, tau=1e-3, mask="drawn"),
        Pathwise(last=0, tau=1e-3),
        Pathwise(last=2, states="hard"),
    ):
        found, limit = chi_square(draw(ctx, loss, 10_000)[0], law)
        assert found < limit, loss


@pytest.mark.parametrize(
    "options",
    [
        {"last": 0, "states": "hard"},
        {"last": 0, "mask": "drawn"},
        {"last": 2, "states": "hard"},
        {"last": 1, "states": "soft"},
    ],
)
def test_drakes_t4_kl_of_the_path_of_one_token_is_that_of_its_law(options):
    """Σ_i P(masked at i) (1 − m_{i−1}/m_i) KL = KL, and so are their gradients: the mask does not depend on θ."""
    ctx, n = one_token(), 10_000
    p, q = ctx.policy.network.logits.log_softmax(0), ctx.reference.network.logits
    exact = (p.exp() * (p - q)).sum()
    (slope,) = torch.autograd.grad(exact, ctx.policy.network.logits)
    _, kl = draw(ctx, Pathwise(kl=1.0, **options), n)
    (got,) = torch.autograd.grad(kl.mean(), ctx.policy.network.logits)
    kl, exact = kl.detach(), float(exact.detach())
    assert float(kl.mean()) == pytest.approx(exact, abs=4 * float(kl.std()) / math.sqrt(n))
    assert kl.std() > 0
    noise = float(kl.std() / exact) / math.sqrt(n)  # each sample has a share of the same gradient
    assert (got - slope).abs().max() < 4 * noise * slope.abs().max()


def test_drakes_t4_gradients_do_not_shrink_with_the_number_of_steps_where_the_mask_is_drawn_first():
    """The slope of E[x_0 = 0] in its logit is p (1 − p) = .09; a relaxed mask competes with the token for it."""
    n, seen = 4000, {}
    for mask in ("relaxed", "drawn"):
        for steps in (2, 20):
            ctx = one_token(steps)
            ctx.reward.reward = lambda x, cond=None: x[:, 0, 0]
            _, values = draw(ctx, Pathwise(last=0, states="hard", mask=mask), n)
            unit = torch.tensor([1.0, 0, 0, 0]).double()
            weights = torch.ones(n, dtype=torch.float64, requires_grad=True)
            (grad,) = torch.autograd.grad(
                (weights * values).sum(), ctx.policy.network.logits, create_graph=True
            )
            each = -torch.autograd.grad(grad @ unit, weights)[0]
            seen[mask, steps] = float(each.mean()), 4 * float(each.std()) / math.sqrt(n)
    few, many = seen["drawn", 2], seen["drawn", 20]
    assert few[0] == pytest.approx(many[0], abs=few[1] + many[1])
    assert 0.04 < many[0] < 0.12
    assert seen["relaxed", 20][0] < 0.5 * many[0]


def path_kl(ctx: Context) -> float:
    """Σ_i E KL of the steps by enumeration of all moves, one token at a time."""
    every = F.one_hot(torch.cartesian_prod(*[torch.arange(5)] * 3), 5).double()
    left = every[..., -1].sum(1).long()
    at = torch.zeros(125).double()
    at[-1], total = 1.0, 0.0
    for i in (3, 2, 1):
        rows = (left == i).nonzero()[:, 0]
        step, ref = ctx.policy.step(every[rows], i), ctx.reference.step(every[rows], i)
        mine, theirs = (
            torch.stack([s.take(torch.full((125,), k)).log_prob(every) for k in range(len(rows))])
            for s in (step, ref)
        )
        move = at[rows, None] * mine.exp()
        total += float(torch.where(move > 0, move * (mine - theirs), torch.zeros_like(move)).sum())
        at = at + move.sum(0)
    return total


@pytest.mark.parametrize("last", [0, 1])
def test_drakes_t4_kl_of_the_path_is_its_enumeration(last):
    ctx, n = setting("random"), 5_000
    disturb(ctx.policy, scale=2.0)
    ctx.reward.reward = lambda x, cond=None: 0 * x.sum((1, 2))
    with torch.no_grad():
        exact = path_kl(ctx)
    assert exact > 0.05
    kl = draw(ctx, Pathwise(last=last, states="hard", kl=2.0), n)[1].detach() / 2
    assert float(kl.mean()) == pytest.approx(exact, abs=4 * float(kl.std()) / math.sqrt(n))
    assert float(kl.std()) / math.sqrt(n) < 0.01 * exact


@pytest.mark.parametrize("kind", ["random", "parallel"])
def test_drakes_t4_the_released_kl_is_zero_on_one_hot_states(kind):
    ctx = setting(kind)
    disturb(ctx.policy, scale=2.0)
    ctx.reward.reward = lambda x, cond=None: 0 * x.sum((1, 2))
    release, exact = (Pathwise(last=0, states="hard", kl=1.0, kl_form=form) for form in ("release", "exact"))
    for loss in (release, Pathwise(last=1, kl=1.0, kl_form="release")):
        assert draw(ctx, loss, 200)[1].abs().max() == 0
    kl = draw(ctx, exact, 200)[1].detach()
    assert kl.min() >= 0 and kl.mean() > 0.2
    if kind == "parallel":
        relaxed = draw(ctx, Pathwise(last=0, kl=1.0, kl_form="release"), 200)[1]
        assert relaxed.abs().max() > 0, "half-masked states are all it acts through"


def relaxed(share: float) -> tuple[MaskedStep, MaskedStep]:
    """One position, masked to a share, and the same all masked; tokens by (.1, .2, .3, .4), revealed with 1/4."""
    law = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]).double().log()
    reveal = torch.full((1, 1, 1), 0.25).double()
    state = torch.tensor([[[0.75 * (1 - share), 0.25 * (1 - share), 0.0, 0.0, share]]]).double()
    whole = F.one_hot(torch.tensor([[4]]), 5).double()
    return MaskedStep(law, reveal, state), MaskedStep(law, reveal, whole)


def test_drakes_relaxed_states_are_drawn_to_their_masked_share_and_copied_to_the_rest():
    most, whole = relaxed(0.6)
    drawn = whole.rsample(Noise.of(3, 1), 0.7, soft=True)
    assert drawn.min() > 0 and float(drawn.sum()) == pytest.approx(1)
    assert torch.allclose(most.rsample(Noise.of(3, 1), 0.7, soft=True), 0.6 * drawn + 0.4 * most.x)
    less, _ = relaxed(0.4)  # leans to a token, which is drawn again or masked
    after = less.rsample(Noise.of(3, 1), 0.7, soft=True)
    assert float(after.sum()) == pytest.approx(1) and after[0, 0, 0] > 0.6 * 0.45
    assert torch.allclose(after[0, 0, 1:4], 0.6 * less.x[0, 0, 1:4])
    cold = whole.rsample(Noise.of(3, 1), 1e-3, soft=True)
    assert torch.allclose(cold, whole.rsample(Noise.of(3, 1), 1e-3)), "hard as tau goes to 0"


def test_drakes_t4_forms_of_the_kl_on_a_relaxed_state():
    """(1 − m) Σ_v x_v (q − p + p log p/q) / m_t of the release, and m · 1/4 · KL(p‖q) of the path."""
    (step, _), q = relaxed(0.6), torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    ref = MaskedStep(q.log().expand(1, 1, 4), step.reveal, step.x)
    p = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    term = q - p + p * (p / q).log()
    chance = torch.full((1, 1, 1), 0.8).double()
    by_hand = 0.4 * float(term @ step.x[0, 0, :4]) / 0.8
    assert float(_release_kl(step, ref, chance)) == pytest.approx(by_hand)
    assert float(step.kl(ref)) == pytest.approx(0.6 * 0.25 * float((p * (p / q).log()).sum()))
    (open_, _) = relaxed(0.3)  # its largest class is a token: the release takes p = q there
    assert float(_release_kl(open_, MaskedStep(ref.log_probs, open_.reveal, open_.x), chance)) == 0


def test_drakes_t5_stops_near_the_tilt_by_the_kl_of_the_path_and_not_by_the_released_one():
    """FX3 at α = 1: E r − KL is at most log Z = 1.0584, reached at E r = 1.5797."""
    reached = {}
    for form in ("exact", "release"):
        ctx = setting("random")
        loss = Pathwise(last=0, tau=0.3, states="hard", kl=1.0, kl_form=form)
        trained(ctx, loss, Training(minibatch=128, lr=1e-2, schedule="linear"), rounds=120, samples=128)
        with torch.no_grad():
            kl = path_kl(ctx)
        r = Rollout()(ctx, Noise.of(9, 5000)).reward
        reached[form] = float(r.mean()), kl, 4 * float(r.std()) / math.sqrt(5000)
    r, kl, error = reached["exact"]
    assert r == pytest.approx(1.5797, abs=error + 0.1)
    assert 1.0584 - 0.03 - error < r - kl < 1.0584 + error
    r, kl, _ = reached["release"]
    assert r > 3.4 and kl > 3, "nothing holds it"


def test_drakes_weight_and_temperature_follow_the_updates():
    ctx = setting("random")
    loss = Pathwise(last=0, kl=0.8, warmup=4, tau=1.0, tau_end=0.25, anneal=2)
    ctx.modules = loss.modules(ctx)
    seen = []
    for _ in range(5):
        seen.append((loss.weight(ctx), loss.temperature(ctx)))
        loss.updated(ctx)
    assert [w for w, _ in seen] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert [t for _, t in seen] == pytest.approx([1.0, 0.5, 0.25, 0.25, 0.25])
    steady = Pathwise(kl=0.8, tau=0.7)
    assert not steady.modules(ctx) and (steady.weight(ctx), steady.temperature(ctx)) == (0.8, 0.7)


@pytest.mark.parametrize("bad", [{"copies": 2, "last": 3}, {"copies": 0}, {"tau": 0.0}, {"last": -1}])
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError, match=r"must be|need"):
        Pathwise(**bad)
