"""What search selects depends on each sample's own noise and on reward differences, on nothing else.

Proven in float64, where a tie broken otherwise by rounding has no chance to occur; in float32 the share of samples
that differ is recorded as a property of the test.
"""

import pytest
import torch
from worlds import KINDS, context, disturb, model, reward

from dav_bench.core import BestOf, Noise, PosteriorMean, Rollout, TreeSearch

N, STEPS = 24, 10
SEARCHES = {
    "plain": TreeSearch(4, 0.3),
    "guided": TreeSearch(4, 0.3, guide=True),
    "gumbel": TreeSearch(4, 0.3, guide=True, value=PosteriorMean(relax="gumbel")),
    "drawn look-ahead": TreeSearch(4, 0.3, value=PosteriorMean("sample")),
    "mean look-ahead": TreeSearch(4, 0.3, gamma=0.9, value=PosteriorMean("mean")),
    "anchored": TreeSearch(4, 0.3, guide=True, anchor="ref", reduce="mean", exponent="left"),
    "greedy": TreeSearch(4, 0.3, select="argmax", last="greedy", on="ref"),
    "means": TreeSearch(4, 0.3, guide=True, keep="mean"),
    "tree value": TreeSearch(4, 0.3, advance="tree-value"),
}
OTHERS = {"rollout": Rollout(), "best of 3": BestOf(3)}
everywhere = pytest.mark.parametrize("kind", KINDS)


def run(kind, search, noise, shift=0.0, micro_batch=None, dtype=torch.float64, shares=True):
    """(T + 1, B, ...) trajectories found."""
    world = model(kind, STEPS, dtype=dtype)
    disturb(world, scale=1.0)
    if not shares:
        world.network.time_input = world.reference().network.time_input = True
    r = reward(kind)
    ctx = context(world, lambda x, cond=None: r(x) + shift, micro_batch)
    return search(ctx, noise).states


@everywhere
@pytest.mark.parametrize("name", [*SEARCHES, *OTHERS])
def test_batch_order_size_and_micro_batch_change_nothing(kind, name):
    search, noise = {**SEARCHES, **OTHERS}[name], Noise.of(11, N)
    states = run(kind, search, noise)
    order = Noise.of(0, N).uniform(1)[:, 0].argsort()
    same = torch.equal if states.dtype == torch.uint8 else lambda a, b: torch.allclose(a, b, atol=1e-9)
    assert same(run(kind, search, noise[order]), states[:, order]), "order"
    assert same(run(kind, search, noise[:7]), states[:, :7]), "size"
    assert same(run(kind, search, Noise.of(11, 3, start=5)), states[:, 5:8]), "a part of the stream"
    for size in (1, 5):
        assert same(run(kind, search, noise, micro_batch=size), states), "micro-batch"
    assert not same(run(kind, search, Noise.of(12, N)), states), "other noise"


@everywhere
@pytest.mark.parametrize("name", [*(s for s in SEARCHES if s != "tree value"), *OTHERS])
@pytest.mark.parametrize("shift", [-100.0, 1000.0])
def test_a_constant_added_to_the_reward_changes_nothing(kind, name, shift):
    search, noise = {**SEARCHES, **OTHERS}[name], Noise.of(11, N)
    assert torch.allclose(
        run(kind, search, noise, shift).double(), run(kind, search, noise).double(), atol=1e-9
    )


@everywhere
def test_the_releases_move_depends_on_the_sign_of_rewards(kind):
    """E3, planted: moving to the largest accumulated value follows the draw for positive rewards alone."""
    noise = Noise.of(11, N)
    release, paper = SEARCHES["tree value"], SEARCHES["plain"]
    assert torch.equal(run(kind, release, noise, 100.0), run(kind, paper, noise, 100.0))
    assert not torch.equal(run(kind, release, noise, -100.0), run(kind, release, noise, 100.0))


@pytest.mark.parametrize("kind", ["parallel", "random"])
@pytest.mark.parametrize("relax", ["mean", "gumbel", "gumbel-release"])
def test_discrete_guidance_does_not_see_its_batch_and_the_releases_does(kind, relax):
    """E14, planted: a mean over the batch before differentiation divides guidance by the batch size."""
    noise = Noise.of(11, N)
    for batch, invariant in (("sum", True), ("mean", False)):
        # a low temperature and one child: the proposal alone decides
        search = TreeSearch(1, 0.1, guide=True, value=PosteriorMean(relax=relax, batch=batch))
        alone = torch.cat([run(kind, search, noise[k : k + 1]) for k in range(N)], 1)
        assert torch.equal(run(kind, search, noise), alone) is invariant


@pytest.mark.parametrize("name", SEARCHES)
def test_sharing_equal_states_changes_nothing(name):
    noise = Noise.of(11, N)
    shared = run("parallel", SEARCHES[name], noise)
    assert torch.equal(run("parallel", SEARCHES[name], noise, shares=False), shared)


@everywhere
def test_no_global_randomness(kind):
    """A resumed run has no generator to restore: the same keys give the same trajectories in any process."""
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        states.append(run(kind, SEARCHES["gumbel"], Noise.of(11, N)))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*states)


@everywhere
@pytest.mark.parametrize("name", ["plain", "guided"])
@pytest.mark.parametrize("change", ["constant", "size", "micro-batch"])
def test_deviation_in_float32_is_logged(kind, name, change, record_property):
    n, search, noise = 200, SEARCHES[name], Noise.of(11, 200)
    states = run(kind, search, noise, dtype=torch.float32)
    if change == "constant":
        other = run(kind, search, noise, 100.0, dtype=torch.float32)
    elif change == "size":
        other = torch.cat(
            [run(kind, search, noise[k : k + 50], dtype=torch.float32) for k in range(0, n, 50)], 1
        )
    else:
        other = run(kind, search, noise, micro_batch=7, dtype=torch.float32)
    gap = (states.double() - other.double()).abs().flatten(2).amax(-1)
    differ = float((gap.amax(0) > 1e-2).double().mean())
    record_property("float32_samples_that_differ", differ)
    print(f"\nfloat32, {kind}, {name}, {change}: {differ:.2%} of samples differ")
    assert differ < 0.1
