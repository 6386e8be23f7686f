"""DPO: its optimum where everything can be summed, its gradient at the start, and what the masked form aims at."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from worlds import disturb, setting

from dav_bench.builtin.methods import DPO
from dav_bench.builtin.methods.preference import build, read_pairs
from dav_bench.core import (
    Context,
    GaussianProcess,
    Item,
    MaskedProcess,
    Meter,
    MeteredReward,
    Model,
    Noise,
    Pairs,
    Preference,
    Training,
    fit,
)
from dav_bench.core.fit import gradient, noted, optimizer
from dav_bench.core.preference import preference_loss, preferred
from dav_bench.errors import DavBenchError


def solve(parameters: list[Tensor], loss, steps: int = 200) -> None:
    """Minimises an exact loss."""
    opt = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    opt.step(closure)


# ---- T1: exact DPO on all sequences of three tokens


def three_tokens() -> tuple[Tensor, Tensor]:
    """p_ref (64,) and rewards (64,)."""
    ctx = setting("random")
    return ctx.policy.network.prior, ctx.reward.reward(ctx.policy.network.sequences)


def exact_dpo(beta: float, swap: bool = False, drop_ties: bool = False) -> float:
    """Total variation between the minimiser of DPO over tables and p_ref exp(r / β) / Z."""
    prior, r = three_tokens()
    wins = preferred(r[:, None], r[None], 1.0)
    weight = prior[:, None] * prior[None] * wins
    if drop_ties:
        weight = weight * (r[:, None] != r[None])
    table = torch.zeros(64, dtype=torch.float64, requires_grad=True)

    def loss():
        ratio = beta * (table.log_softmax(0) - prior.log())
        logit = ratio[:, None] - ratio[None]
        return (weight * preference_loss(-logit if swap else logit)).sum()

    solve([table], loss, 150)
    target = (prior.log() + r / beta).softmax(0)
    return float((table.detach().softmax(0) - target).abs().sum() / 2)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_dpo_t1_exact_dpo_reaches_the_tilt(beta):
    assert exact_dpo(beta) < 1e-3
    assert exact_dpo(beta, drop_ties=True) < 1e-3, "ties say nothing about the optimum"
    assert exact_dpo(beta, swap=True) > 0.3, "planted: winners and losers swapped"


# ---- T2: the masked form


class Table(nn.Module):
    """Logits of one token, whatever the state."""

    time_input = False

    def __init__(self, probs: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(probs.log().clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.logits.expand(len(x), 1, -1)


ONE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARD = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)


def one_token(steps: int = 1) -> Context:
    """FX6."""
    meter = Meter()
    model = Model(Table(ONE), MaskedProcess(1, 4, steps), "sequence").to("cpu", torch.float64).attach(meter)
    return Context(model, model.reference(), MeteredReward(lambda x, c: x[:, 0] @ REWARD, meter), meter)


def every_pair() -> tuple[Tensor, Tensor, Tensor]:
    """Winners and losers (16, 1, 4), one-hot, and their probability."""
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    weight = ONE[first] * ONE[second] * preferred(REWARD[first], REWARD[second], 1.0)
    one_hot = F.one_hot(torch.arange(4), 4)[:, None].double()
    return one_hot[first], one_hot[second], weight


def optimum(ctx: Context, loss: Preference) -> Tensor:
    """(4,) where the loss over every pair, time and mask, each with its probability, is least."""
    winner, loser, weight = every_pair()
    T = ctx.policy.process.T
    i = torch.arange(1, T + 1).repeat_interleave(16)
    clean = (winner.repeat(T, 1, 1), loser.repeat(T, 1, 1))
    hidden = F.one_hot(torch.full((16 * T, 1), 4), 5).double()
    chance = torch.arange(1, T + 1).double()[:, None] / T  # unmasked, a token says nothing: logit 0

    def value() -> Tensor:
        logit = loss.logits(ctx, clean, (hidden, hidden), i)[0].view(T, 16)
        if loss.average == "logit":
            return (weight * preference_loss((chance * logit).mean(0))).sum()
        return (weight * (chance * preference_loss(logit) + (1 - chance) * math.log(2))).sum(1).mean()

    solve(list(ctx.policy.trainable().values()), value)
    return ctx.policy.network.logits.detach().softmax(0)


TILTED = torch.tensor([0.341347, 0.256010, 0.170673, 0.231969], dtype=torch.float64)


@pytest.mark.parametrize(("steps", "average"), [(1, "loss"), (1, "logit"), (16, "logit")])
def test_dpo_t2_one_token_reaches_the_tilt(steps, average):
    found = optimum(one_token(steps), Preference(average=average))
    assert (found - TILTED).abs().max() < 2e-6


def test_dpo_t2_a_time_inside_the_sigmoid_has_its_own_optimum():
    found = optimum(one_token(1000), Preference(average="loss"))
    ratio = (found / ONE).log()
    assert float(ratio[3] - ratio[0]) == pytest.approx(0.3736, abs=2e-3)
    assert float(found[3]) == pytest.approx(0.139, abs=1e-3)


def test_dpo_t2_the_loss_itself_reaches_the_tilt():
    """As a run computes it: draws of times and masks, labels by probability."""
    winner, loser, weight = every_pair()
    pad = ctx_pack = one_token(8).policy.process
    columns = {"loser": ctx_pack.pack(F.pad(loser, (0, 1))), "weight": weight * 16}
    item = Item(
        x=winner, x_next=winner, i=torch.zeros(16).long(), lookahead=None, mean=None,
        final=pad.unpack(pad.pack(F.pad(winner, (0, 1))), torch.float64), columns=columns, noise=Noise.of(0, 16),
    )  # fmt: skip
    found = {}
    for average in ("loss", "logit"):
        ctx = one_token(8)
        loss = Preference(draws=1024, times="stratified", average=average)
        solve(list(ctx.policy.trainable().values()), lambda ctx=ctx, loss=loss: loss(ctx, item).mean(), 30)
        found[average] = ctx.policy.network.logits.detach().softmax(0)
    assert (found["logit"] - TILTED).abs().max() < 0.01
    assert found["loss"][3] < 0.2


class Every(nn.Module):
    """p(x_0^l | x_i) of a trainable law of all 64 sequences: all its conditionals belong together."""

    time_input = False

    def __init__(self, prior: Tensor, sequences: Tensor) -> None:
        super().__init__()
        self.sequences, self.table = sequences, nn.Parameter(prior.log().clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        fits = torch.einsum("blv,nlv->bnl", x[..., :-1] + x[..., -1:], self.sequences).prod(-1)
        joint = fits * self.table.softmax(0)
        law = torch.einsum("bn,nlv->blv", joint, self.sequences) / joint.sum(1)[:, None, None]
        return law.clamp_min(1e-30).log()


def elbo_dpo(average: str, swap: bool = False) -> Tensor:
    """(64,) law that minimises the masked loss over all pairs, times and masks of three tokens."""
    prior, r = three_tokens()
    x0 = setting("random").policy.network.sequences
    meter = Meter()
    model = Model(Every(prior, x0), MaskedProcess(3, 4, order="random"), "sequence").attach(meter)
    ctx = Context(model, model.reference(), MeteredReward(lambda x, c: x[:, 0, 0], meter), meter)
    mask, shown, states = F.one_hot(torch.tensor(4), 5).double(), F.pad(x0, (0, 1)), []
    for pattern in torch.cartesian_prod(*[torch.arange(2)] * 3)[1:]:
        i = int(pattern.sum())  # each i, then each of its masks, equally likely
        states.append((i, 1 / 3 / math.comb(3, i), torch.where(pattern[None, :, None] > 0, mask, shown)))
    weight = prior[:, None] * prior[None] * preferred(r[:, None], r[None], 1.0)
    weight = weight.T if swap else weight

    def value() -> Tensor:
        mean, total = 0.0, 0.0
        for i, chance, noisy in states:  # a pair shares its mask
            gain = Preference().logits(ctx, (x0, x0), (noisy, noisy), torch.full((64,), i))[1]
            mean = mean + chance * gain
            total = total + chance * preference_loss(gain[:, None] - gain[None])
        return (weight * (preference_loss(mean[:, None] - mean[None]) if average == "logit" else total)).sum()

    solve([model.network.table], value, 60)
    return model.network.table.detach().softmax(0)


def test_dpo_t2_three_tokens_reach_the_tilt_where_the_elbo_is_tight():
    """Revealing one token at a time in any order, the ELBO of a law's own conditionals is its likelihood."""
    prior, r = three_tokens()
    target = (prior.log() + r).softmax(0)

    def distance(*options):
        return float((elbo_dpo(*options) - target).abs().sum() / 2)

    assert distance("logit") < 1e-4
    assert distance("loss") > 0.02, "one draw inside the sigmoid has another optimum"
    assert distance("logit", True) > 0.3, "planted: winners and losers swapped"


def test_dpo_t2_along_a_path_logits_are_log_ratios():
    """Any order of unmasking multiplies to the law itself, so that no draw of it is left in a logit."""
    prior, _ = three_tokens()
    x0 = setting("random").policy.network.sequences
    model = Model(Every(prior, x0), MaskedProcess(3, 4, order="random"), "sequence").attach(Meter())
    ctx = Context(model, model.reference(), lambda x, c: x[:, 0, 0], model.meter)
    with torch.no_grad():
        model.network.table += torch.randn(
            64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
    ratio = model.network.table.detach().log_softmax(0) - prior.log()
    winner, loser = torch.arange(64), torch.arange(64).flip(0)
    states = F.pad(x0, (0, 1))
    item = Item(
        x=states, x_next=states, i=torch.zeros(64).long(), lookahead=None, mean=None, final=states[winner],
        columns={"loser": model.process.pack(states[loser]), "weight": torch.ones(64)}, noise=Noise.of(3, 64),
    )  # fmt: skip
    for beta in (1.0, 0.3):
        expected = preference_loss(beta * (ratio[winner] - ratio[loser]))
        assert (Preference(beta, times="path")(ctx, item) - expected).abs().max() < 1e-12
        even = Preference(beta, draws=3, times="stratified", average="logit")(ctx, item)
        assert (even - expected).abs().max() > 1e-2, "the ELBO by draws is noisy"


# ---- T3 and T4: at the start


def pairs_of(kind: str, n: int = 12, seed: int = 0, **options):
    ctx = setting(kind, **options)
    return ctx, Pairs()(ctx, Noise.of(seed, n))


def item_of(ctx: Context, batch, noise: Noise | None = None) -> Item:
    return batch.items(torch.arange(len(batch)), ctx.policy.unpack, noise or Noise.of(5, len(batch)))


@pytest.mark.parametrize("kind", ["mixture", "parallel", "random"])
@pytest.mark.parametrize("options", [{}, {"draws": 3, "times": "antithetic", "average": "logit"}])
def test_dpo_t3_start_and_gradient(kind, options):
    ctx, batch = pairs_of(kind)
    batch.per_sample["weight"] = torch.ones(len(batch), dtype=torch.float64)
    loss = Preference(beta=3.0, **options)
    item = item_of(ctx, batch)
    value = loss(ctx, item)
    assert (value - math.log(2)).abs().max() < 1e-12, "logit 0"
    parameters = list(ctx.policy.trainable().values())
    found = torch.autograd.grad(value.mean(), parameters)

    # + (B / 4) (∇ e_winner − ∇ e_loser), by the errors themselves
    process, d = ctx.policy.process, loss.draws
    i = loss.levels(item.noise.fold(1), process.T).flatten()
    error = []
    for x in (item.final, ctx.policy.unpack(item.columns["loser"])):
        x0 = process.clean(x).repeat_interleave(d, 0)
        noisy = process.corrupt(x0, i, item.noise.fold(2).repeat(d))
        error.append(process.loss(ctx.policy.predict(noisy, i), x0, noisy, i).mean())
    factor = 3.0 / 4 if kind == "mixture" else 3.0 / 2  # tokens have no half in front of b
    expected = torch.autograd.grad(factor * (error[0] - error[1]), parameters)
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["mixture", "parallel", "random"])
def test_dpo_t4_swapping_a_pair_negates_its_logit(kind):
    ctx, batch = pairs_of(kind, untrained=False)
    loss, n, process = Preference(), len(batch), ctx.policy.process
    item = item_of(ctx, batch)
    i = torch.arange(n) % process.T + 1
    clean = [process.clean(x) for x in (item.final, ctx.policy.unpack(item.columns["loser"]))]
    noisy = [process.corrupt(x, i, item.noise) for x in clean]
    ahead = loss.logits(ctx, tuple(clean), tuple(noisy), i)[0]
    back = loss.logits(ctx, tuple(clean[::-1]), tuple(noisy[::-1]), i)[0]
    assert ahead.abs().max() > 1e-3
    assert (ahead + back).abs().max() < 1e-9 * ahead.abs().max()


# ---- T5: a shift along the line


class Shift(nn.Module):
    """E[x_0 | x_i] of N(0, 1), plus one number."""

    time_input = True

    def __init__(self, process: GaussianProcess) -> None:
        super().__init__()
        self.process, self.shift = process, nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.process.share((t * self.process.T).round().long(), x).sqrt() * x + self.shift


def shifted(swap: bool = False, **options) -> float:
    """What a policy adds to clean predictions after learning that the right of two samples wins."""
    process, meter = GaussianProcess((1,), 20), Meter()
    model = Model(Shift(process), process, "vector").to("cpu", torch.float64).attach(meter)
    reward = MeteredReward(lambda x, c: x[:, 0], meter)
    ctx = Context(model, model.reference(), reward, meter)
    batch = Pairs(label="hard")(ctx, Noise.of(0, 200))
    assert bool((batch.states[-1] > batch.per_sample["loser"]).all())
    if swap:
        winner = batch.states
        batch.states = batch.per_sample["loser"][None]
        batch.per_sample["loser"] = winner[-1]
    loss = Preference(**{"beta": 10.0, **options})
    training = Training(updates=10, minibatch=50, lr=1e-2)
    fit(loss, ctx, batch, optimizer(model.trainable(), training), training, Noise.of(1, 1))
    return float(model.network.shift.detach())


def test_dpo_t5_winners_on_the_right_move_the_model_right():
    assert shifted() > 0.05
    assert shifted(draws=4, times="stratified", average="logit") > 0.05
    assert shifted(swap=True) < -0.05, "planted: winners and losers swapped"


# ---- what a run does with it


def trained(swap: bool = False, rounds: int = 40, **options) -> tuple[float, float]:
    """Total variation to the tilt, by enumeration, of the chain of three tokens before and after a run of `dpo`."""
    ctx = setting("random")
    method = build(DPO(**{"lr": 1e-2, "schedule": "linear", "updates": 4, "samples": 256, **options}))
    target = ctx.policy.network.target(ctx.reward.reward, 1.0)
    opt = optimizer(ctx.policy.trainable(), method.training)
    before = chain_law(ctx.policy)
    for r in range(rounds):
        batch = method.search(ctx, Noise.of(r, 256))
        if swap:
            batch.states, batch.per_sample["loser"] = batch.per_sample["loser"][None], batch.states[-1]
        fit(
            method.loss,
            ctx,
            batch,
            opt,
            method.training,
            Noise.of(1000 + r, 1),
            (r / rounds, (r + 1) / rounds),
        )
    assert batch.stats["accuracy"] > 0.55, "on the pairs it fits, swapped or not"
    return tuple(float((law - target).abs().sum() / 2) for law in (before, chain_law(ctx.policy)))


@torch.no_grad()
def chain_law(model: Model) -> Tensor:
    """(64,) law of x_0 of the chain that reveals one of three tokens at a time."""
    ids = torch.cartesian_prod(*[torch.arange(5)] * 3)
    every = F.one_hot(ids, 5).double()
    masks = (ids == 4).sum(1)
    mass = torch.zeros(125, dtype=torch.float64)
    mass[-1] = 1
    for i in (3, 2, 1):
        rows = (masks == i).nonzero()[:, 0]
        step = model.step(every[rows], i)
        moves = torch.stack(
            [step.take(torch.full((125,), k)).log_prob(every).exp() for k in range(len(rows))]
        )
        mass = mass.index_fill(0, rows, 0.0) + mass[rows] @ moves
    return mass[masks == 0]


def test_dpo_trains_three_tokens_to_the_tilt():
    before, after = trained(times="path", label="soft")
    assert after < 0.07 < 0.3 < before
    assert trained(swap=True, rounds=10, times="path", label="soft")[1] > before + 0.05, (
        "planted: pairs swapped"
    )


def test_dpo_with_draws_stays_short_of_the_tilt():
    """Six draws inside the sigmoid are not yet the ELBO: their noise leaves a total variation of about .1."""
    before, after = trained(draws=6, times="stratified", average="logit", rounds=20)
    assert 0.07 < after < 0.6 * before


@pytest.mark.parametrize("kind", ["mixture", "parallel", "random"])
def test_dpo_update_is_free_of_micro_batch(kind):
    def grads(micro_batch):
        ctx, batch = pairs_of(kind, untrained=False)
        ctx.policy.attach(ctx.meter, micro_batch)
        loss = Preference(beta=1.0, draws=2, times="antithetic")
        loss.prepare(ctx, batch, Noise.of(2, 1))
        noise = Noise.of(3, len(batch))
        gradient(loss, ctx, batch, torch.arange(len(batch)), loss.active(batch), micro_batch, noise)
        return torch.cat([p.grad.flatten() for p in ctx.policy.trainable().values()])

    whole = grads(None)
    assert whole.abs().max() > 1e-4
    for size in (1, 5):
        assert (grads(size) - whole).abs().max() < 1e-12


# ---- pairs


def test_bradley_terry_labels_have_their_law():
    ctx = setting("random")
    n = 4000
    batch = Pairs(scale=0.5)(ctx, Noise.of(0, n))
    gap = batch.per_sample["gap"]
    told = gap != 0
    # E[1{first wins}] given the pair: winners beat losers with chance σ(|gap| / s)
    chance = preferred(gap.abs(), torch.zeros_like(gap), 0.5)[told]
    wins = (gap[told] > 0).double()
    error = float((chance * (1 - chance)).sum() ** 0.5)
    assert abs(float((wins - chance).sum())) < 4 * error
    hard = Pairs(label="hard")(ctx, Noise.of(0, n))
    assert float(hard.per_sample["gap"].min()) == 0 and hard.stats["flipped"] == 0
    assert batch.stats["flipped"] > 0.05


def test_soft_labels_are_the_expectation_of_drawn_ones():
    ctx = setting("mixture", untrained=False)
    batch = Pairs(label="soft", scale=2.0)(ctx, Noise.of(0, 16))
    chance = batch.per_sample.pop("chance")
    assert (
        torch.equal(chance, preferred(batch.per_sample["gap"], torch.zeros(16), 2.0))
        and float(chance.min()) > 0.5
    )
    loss = Preference(beta=1.0)
    first = loss(ctx, item_of(ctx, batch))
    winner = batch.states[-1]
    batch.states, batch.per_sample["loser"] = batch.per_sample["loser"][None], winner
    second = loss(ctx, item_of(ctx, batch))
    batch.states, batch.per_sample["loser"] = batch.per_sample["loser"][None], batch.states[-1]
    batch.per_sample["chance"] = chance
    both = loss(ctx, item_of(ctx, batch))
    assert (both - chance * first - (1 - chance) * second).abs().max() < 1e-12


def test_ties_are_counted_and_have_no_weight():
    ctx = setting("random")
    batch = Pairs()(ctx, Noise.of(0, 200))
    told = batch.per_sample["gap"] != 0
    assert batch.stats["ties"] == float((~told).sum()) > 0
    assert torch.equal(Preference().active(batch), told)
    assert float(batch.per_sample["weight"].mean()) == pytest.approx(1.0)
    same = setting("random")
    same.reward.reward = lambda x, c=None: torch.zeros(len(x))
    tied = Pairs()(same, Noise.of(0, 10))
    before = [p.clone() for p in same.policy.trainable().values()]
    training = Training()
    stats = fit(
        Preference(), same, tied, optimizer(same.policy.trainable(), training), training, Noise.of(1, 1)
    )
    assert tied.stats["ties"] == 10 and stats["loss"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, same.policy.trainable().values(), strict=True))


def test_groups_make_all_pairs_or_best_and_worst():
    ctx = setting("mixture")
    assert len(Pairs(n=4)(ctx, Noise.of(0, 3))) == 18
    best = Pairs(n=8, label="best-worst")(ctx, Noise.of(0, 5))
    assert len(best) == 5
    drawn = ctx.reward.reward(best.states[-1])
    assert torch.equal(drawn, best.reward)
    lost = ctx.reward.reward(best.per_sample["loser"])
    every = Pairs(n=8, label="hard")(ctx, Noise.of(0, 5))
    assert torch.equal(every.reward.view(5, -1).amax(1), drawn)
    assert torch.equal(ctx.reward.reward(every.per_sample["loser"]).view(5, -1).amin(1), lost)


def test_online_pairs_come_from_the_policy():
    ctx = setting("mixture", untrained=False)
    old, new = (Pairs(on=on)(ctx, Noise.of(0, 4)).states for on in ("ref", "policy"))
    assert not torch.equal(old, new)


@pytest.mark.parametrize("kind", ["mixture", "parallel", "random"])
def test_rows_of_policy_and_reference_are_counted(kind):
    ctx, batch = pairs_of(kind, n=20, steps=4)
    live = int(Preference().active(batch).sum())
    training = Training(updates=2, minibatch=7)
    with ctx.meter.phase("fit"):
        opt = optimizer(ctx.policy.trainable(), training)
        fit(Preference(draws=3), ctx, batch, opt, training, Noise.of(1, 1))
    forward, backward, shared = (ctx.meter.total(name, "fit") for name in ("forward", "backward", "shared"))
    assert forward == 2 * backward
    assert forward + shared == 2 * 2 * 2 * 3 * live
    assert (shared > 0) == (kind != "mixture"), "a pair that is all masked is one state"


def test_times_of_the_draws():
    noise = Noise.of(0, 500)
    even = Preference(draws=8, times="stratified").levels(noise, 8)
    assert all(sorted(row) == list(range(1, 9)) for row in even.tolist())
    mirrored = Preference(draws=4, times="antithetic").levels(noise, 10)
    assert torch.equal(mirrored[:, :2] + mirrored[:, 2:], torch.full((500, 2), 11))
    for times in ("uniform", "antithetic", "stratified"):
        count = torch.bincount(Preference(draws=3, times=times).levels(noise, 5).flatten(), minlength=6)
        assert count[0] == 0 and (count[1:] - 300).abs().max() < 75


def test_logits_can_be_clipped_and_winners_held():
    ctx, batch = pairs_of("mixture", untrained=False)
    loss = Preference(beta=1e4, clip=0.5)
    loss.prepare(ctx, batch, Noise.of(0, 1))
    value = loss(ctx, item_of(ctx, batch))
    low, high = (float(preference_loss(torch.tensor(v))) for v in (0.5, -0.5))
    value = value.detach()[loss.active(batch)]
    assert low - 1e-6 <= float(value.min()) and float(value.max()) <= high + 1e-6
    stats = noted(batch)
    assert 0 < stats["clipped"] <= 1 and 0 < stats["accuracy"] < 1
    plain = Preference(beta=1e4)(ctx, item_of(ctx, batch))
    held = Preference(beta=1e4, sft=0.1)(ctx, item_of(ctx, batch))
    assert bool((held > plain).all())


# ---- a file of pairs

GOOD = "winner,loser\nACG,ACT\nAAA,CCC\nGGG,GGG\n"


def test_a_file_of_pairs_trains(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(GOOD)
    ctx = setting("random")
    values = DPO.complete(vars(DPO(pairs=str(path))))
    method = build(DPO(**values))
    batch = method.search(ctx, Noise.of(0, 8))
    assert len(batch) == 2 and batch.stats["ties"] == 1 and bool(batch.reward.isnan().all())
    assert {tuple(x) for x in batch.states[-1].tolist()} == {(0, 1, 2), (0, 0, 0)}
    fit(method.loss, ctx, batch, optimizer(ctx.policy.trainable(), Training()), Training(), Noise.of(1, 1))
    assert ctx.meter.total("reward") == 0
    path.write_text(GOOD + "TTT,AAA\n")
    with pytest.raises(DavBenchError, match="changed since"):
        build(DPO(**values))
    with pytest.raises(ValueError, match="sequences of 3 tokens"):
        method.search(setting("mixture"), Noise.of(0, 8))


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("p.txt", GOOD, "ends in '.txt'"),
        ("p.csv", "win,loser\nA,C\n", "no column 'winner'"),
        ("p.csv", "winner,loser\n", "no rows"),
        ("p.csv", "winner,loser\nACG,AC\n", "Row 1, loser: 'AC'"),
        ("p.csv", "winner,loser\nACG,ACG\nACX,ACG\n", "Row 2, winner: 'ACX'"),
        ("p.csv", "winner,loser,prompt\nA,C,x\nA,G,y\n", "whole numbers"),
        ("p.parquet", GOOD, "cannot be read"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path, name, text, what):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DavBenchError) as caught:
        DPO.complete(vars(DPO(pairs=str(path))))
    assert what in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_and_parquet_and_prompts(tmp_path):
    import polars as pl

    with pytest.raises(DavBenchError, match="cannot be read"):
        read_pairs(str(tmp_path / "none.csv"))
    path = tmp_path / "p.parquet"
    pl.DataFrame({"winner": ["A", "C"], "loser": ["C", "G"], "prompt": [0, 1]}).write_parquet(path)
    assert read_pairs(str(path))[:3] == (["A", "C"], ["C", "G"], [0, 1])
    pl.DataFrame({"winner": ["A", "C"], "loser": ["C", "G"], "prompt": ["x", "x"]}).write_parquet(path)
    assert read_pairs(str(path))[2] is None


def test_disturbed_policies_differ_from_their_reference():
    """The guard of the tests above: `untrained=False` is a policy that has moved."""
    ctx = setting("random")
    disturb(ctx.policy)
    x = ctx.policy.process.prior(Noise.of(0, 1), torch.float64)
    assert (ctx.policy.predict(x, 3) - ctx.reference.predict(x, 3)).abs().max() > 1e-2
