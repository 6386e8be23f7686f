"""Flow matching as an SDE and consistency sampling: the laws of their steps, on data whose velocity is known."""

import pytest
import torch
from worlds import disturb

from dav_bench.core import (
    ConsistencyProcess,
    Context,
    FlowProcess,
    GaussianProcess,
    Meter,
    Model,
    Noise,
    Rollout,
)
from dav_bench.core.replay import replay, stochastic

VAR = 0.25  # of the data, N(0, 1/4)


def uniform(steps: int) -> torch.Tensor:
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def velocity(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """E[ε − x_0 | x] of the data, linear in x."""
    return (sigma - (1 - sigma) * VAR) / (sigma**2 + (1 - sigma) ** 2 * VAR) * x


def slopes(process: FlowProcess) -> tuple[list[float], list[float]]:
    """Slope and standard deviation of each step of the chain with the exact velocity, from i = T to 1."""
    one = torch.ones(1, 1, dtype=torch.float64)
    steps = [process.step(velocity(process.sigmas[i], one), one, i) for i in range(process.T, 0, -1)]
    return [float(s.mean) for s in steps], [float(s.std) for s in steps]


def variance(process: FlowProcess) -> float:
    total = 1.0
    for slope, std in zip(*slopes(process), strict=True):
        total = slope**2 * total + std**2
    return total


@pytest.mark.parametrize(
    ("steps", "eta", "expected"),
    [
        (10, 0.7, 0.2300),
        (10, 0, 0.1856),
        (40, 0.7, 0.2474),
        (40, 0, 0.2321),
        (200, 0.7, 0.2510),
        (200, 0, 0.2463),
    ],
)
def test_flow_t1_variance_of_the_data_on_a_grid(steps, eta, expected):
    """Closed recursion of the linear chain; by sampling, methods.md 7.1 has .228/.187, .248/.232 and .249/.246."""
    assert variance(FlowProcess((1,), uniform(steps), eta)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("eta", [0, 0.7, 1.4])
def test_flow_t1_marginals_are_those_of_the_data_in_small_steps(eta):
    """At η = 0.7 the variance meets 1/4 at about 70 steps, is .251 at 400 and falls slowly from there."""
    assert abs(variance(FlowProcess((1,), uniform(400), eta)) - VAR) < 0.002


@pytest.mark.parametrize("eta", [0.3, 0.7])
def test_flow_t2_step_is_that_of_flow_grpo(eta):
    """methods.md 0.1 in its own time and signs: t from 1 to 0, dt < 0, g² = η² t / (1 − t)."""
    sigmas = torch.tensor([0, 0.1, 0.45, 0.8, 1.0], dtype=torch.float64)
    process, noise = FlowProcess((3, 2), sigmas, eta), Noise.of(5, 7)
    x, u = (noise.fold(k).normal(3, 2, dtype=torch.float64) for k in (1, 2))
    for i in range(4, 0, -1):
        t, dt = sigmas[i], sigmas[i - 1] - sigmas[i]
        g2 = eta**2 * t / (1 - (sigmas[3] if i == 4 else t))
        mean = x * (1 + g2 * dt / (2 * t)) + u * (1 + g2 * (1 - t) / (2 * t)) * dt
        step = process.step(u, x, i)
        assert torch.allclose(step.mean, mean, atol=1e-12)
        assert torch.allclose(step.std.flatten(), (g2 * -dt).sqrt(), atol=1e-12)
        assert torch.allclose(step.x0, x - t * u)
        law = torch.distributions.Normal(step.mean, step.std)
        after = step.sample(noise.fold(3))
        assert torch.allclose(step.log_prob(after), law.log_prob(after).flatten(1).sum(1))


def test_flow_t3_without_noise_it_is_the_euler_scheduler_and_says_so():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    process = FlowProcess((4,), scheduler.sigmas.flip(0), eta=0)
    x = y = Noise.of(0, 3).normal(4)
    for i, t in zip(range(6, 0, -1), scheduler.timesteps, strict=True):
        assert torch.equal(process.time(i, x) * 1000, t.expand(3))
        pred = (x * (i + 1)).sin()
        step = process.step(pred, x, i)
        assert not step.stochastic
        x, y = step.sample(Noise.of(i, 3)), scheduler.step(pred, t, y, return_dict=False)[0]
        assert torch.allclose(x, y, atol=1e-6)
    assert process.provides == {"continuous"}
    batch = Rollout()(world(process, 0.0), Noise.of(0, 2))
    with pytest.raises(ValueError, match="eta"):
        stochastic(world(process, 0.0), batch)


def test_flow_t4_what_it_gives_depends_on_the_noise():
    noisy, still = FlowProcess((1,), uniform(4), 0.7), FlowProcess((1,), uniform(4), 0)
    assert noisy.provides - still.provides == {"step.log_prob", "step.tilt", "step.kl"}
    full = FlowProcess((1,), uniform(4), 1.0)
    assert "step.memoryless" not in full.provides, "η = 1 is no DDPM here"
    assert "step.memoryless" in GaussianProcess((1,), 4, 1.0).provides


class Linear(torch.nn.Module):
    """The exact velocity plus a trainable constant."""

    time_input = True

    def __init__(self, width: int, shift: float) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.full((width,), shift))

    def forward(self, x, t):
        return velocity(t.view(-1, 1), x) + self.shift


def world(process: FlowProcess, shift: float = 0.1) -> Context:
    model, meter = Model(Linear(process.shape[0], 0.0), process, "vector"), Meter()
    model.attach(meter).reference()
    with torch.no_grad():
        model.network.shift.fill_(shift)
    return Context(model, model.reference(), lambda x, cond=None: x.sum(1), meter)


def test_flow_t5_log_probabilities_computed_again_are_those_of_the_rollout():
    ctx = world(FlowProcess((3,), uniform(8), 0.7))
    batch = Rollout(log_prob=True)(ctx, Noise.of(1, 16))
    own, ref = (replay(ctx, model, batch).log_prob() for model in (ctx.policy, ctx.reference))
    assert torch.equal(own, batch.per_step["log_prob"])
    assert not torch.allclose(ref, own)
    assert stochastic(ctx, batch).all(), "as in the released code, the last step has noise too"


def test_flow_t6_tilted_steps_shift_the_end_by_its_variance_given_the_start():
    """r = a x_0: the soft value of the chain is linear, so tilting each step by it is exact but for the prior."""
    process, a = FlowProcess((1,), uniform(12), 0.9), 0.6
    slope, std = slopes(process)
    after = [1.0]  # products of the slopes from x_{i-1} on to x_0, i = 1 first
    for value in reversed(slope[1:]):
        after.append(after[-1] * value)
    x = torch.zeros(1, 1, dtype=torch.float64)
    for i in range(process.T, 0, -1):
        step = process.step(velocity(process.sigmas[i], x), x, i)
        x = step.tilt(torch.full_like(x, a * after[i - 1])).mean
    memory = (after[-1] * slope[0]) ** 2
    assert float(x) == pytest.approx(a * (variance(process) - memory), rel=1e-9)
    assert memory > 1e-3, "x_0 depends on x_T: not memoryless"
    assert sum(s > 0 for s in std) == process.T


def test_flow_t7_the_loss_is_that_of_conditional_flow_matching():
    process, noise = FlowProcess((3,), uniform(8)), Noise.of(2, 40_000)
    x0 = VAR**0.5 * noise.fold(1).normal(3, dtype=torch.float64)
    x = process.corrupt(x0, 5, noise.fold(2))
    sigma = process.sigmas[5]
    eps = noise.fold(2).normal(3, dtype=torch.float64)
    assert torch.allclose(x, (1 - sigma) * x0 + sigma * eps)
    pred = velocity(sigma, x)
    assert torch.allclose(process.loss(pred, x0, x, 5), ((pred - (eps - x0)) ** 2).mean(1))
    assert process.loss(eps - x0, x0, x, 5).max() < 1e-20
    best = process.loss(pred, x0, x, 5)
    for other in (pred + 0.1, 1.1 * pred):
        worse = process.loss(other, x0, x, 5) - best
        assert worse.mean() > 4 * worse.std() / len(worse) ** 0.5
    clean = [process.step(p, x, 5).x0 for p in (pred, pred + 0.1)]
    assert torch.allclose(process.distance(*clean, x, 5), torch.full((len(x),), 0.01, dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_consistency_t1_the_exact_function_gives_the_exact_law_in_any_number_of_steps(steps):
    """f(x) = x √(VAR / var(x_i)) follows the ODE to its end; noising its value anew keeps every marginal."""
    shares = torch.cat([torch.ones(1), torch.linspace(0.9, 0.001, steps)]).double()
    process = ConsistencyProcess((1,), steps, shares, torch.zeros(steps + 1), torch.ones(steps + 1), "x0")
    spread = float(shares[-1]) * VAR + 1 - float(shares[-1])
    for i in range(steps, 0, -1):
        a, b = shares[i], shares[i - 1]
        x = torch.ones(1, 1, dtype=torch.float64)
        step = process.step((VAR / (a * VAR + 1 - a)).sqrt() * x, x, i)
        spread = float(step.mean) ** 2 * spread + float(step.std) ** 2
        assert spread == pytest.approx(float(b * VAR + 1 - b), rel=1e-9)
        assert step.stochastic == (i > 1)
    assert ("step.log_prob" in process.provides) == (steps > 1)
    assert "step.memoryless" not in process.provides


def test_a_network_of_two_rows_is_counted_as_two():
    """dav.md G.1 with guidance counted: 246 pairs of rows for an image, M = 4 on 50 steps; 50 of them backward."""
    from worlds import setting

    from dav_bench.core import TreeSearch

    ctx = setting("mixture", 50)
    disturb(ctx.policy)
    ctx.policy.network.rows = ctx.reference.network.rows = 2
    ctx.policy.attach(ctx.meter, micro_batch=7)
    assert ctx.policy.micro_batch == 3
    TreeSearch(4, 0.3, guide=True)(ctx, Noise.of(0, 1))
    assert ctx.meter.total("forward") == 2 * 246
    assert ctx.meter.total("backward") == 2 * 50
