"""Rows computed plus rows shared are what the algorithm needs (dav.md G.1)."""

import pytest
import torch
from worlds import disturb, setting

from dav_bench.core import (
    BestOf,
    Context,
    MaskedProcess,
    Meter,
    Model,
    Noise,
    PosteriorMean,
    Rollout,
    TreeSearch,
)

N, STEPS, M = 6, 12, 4


def spent(kind: str, search, steps: int = STEPS, n: int = N) -> Meter:
    ctx = setting(kind, steps)
    disturb(ctx.policy)
    with ctx.meter.phase("search"):
        search(ctx, Noise.of(0, n))
    return ctx.meter


def rows(meter: Meter, what: str) -> float:
    return meter.total(what, "search")


@pytest.mark.parametrize("kind", ["mixture", "parallel", "random"])
@pytest.mark.parametrize("anchor", ["policy", "ref"])
@pytest.mark.parametrize("guide", [False, True])
def test_tree_search_needs_what_the_formula_says(kind, anchor, guide):
    steps = 3 if kind == "random" else STEPS
    meter = spent(kind, TreeSearch(M, 0.3, guide=guide, anchor=anchor), steps)
    network = (steps if guide else 1) + (steps - 1) * M + (steps if anchor == "ref" else 0)
    rewards = steps * M + (steps if guide else 0)
    assert rows(meter, "forward") + rows(meter, "shared") == N * network
    assert rows(meter, "reward") + rows(meter, "reward_shared") == N * rewards
    if kind == "mixture":
        assert rows(meter, "shared") == 0
        assert rows(meter, "reward_shared") == N * (M - 1), "the last step is deterministic: its children are one"
        assert rows(meter, "backward") == rows(meter, "reward_backward") == (N * steps if guide else 0)
    else:
        assert rows(meter, "shared") > 0
        assert rows(meter, "reward_backward") == rows(meter, "backward") <= N * steps * guide


@pytest.mark.parametrize("kind", ["mixture", "parallel"])
@pytest.mark.parametrize("anchor", ["policy", "ref"])
@pytest.mark.parametrize("guide", [False, True])
def test_an_only_child_is_not_weighed(kind, anchor, guide):
    meter = spent(kind, TreeSearch(1, 0.3, guide=guide, anchor=anchor))
    reference = anchor == "ref"  # of the last step, whose child is clean and scored
    assert rows(meter, "forward") + rows(meter, "shared") == N * (STEPS + reference)
    assert rows(meter, "reward") + rows(meter, "reward_shared") == N * (1 + (STEPS if guide else 0))


@pytest.mark.parametrize(
    ("steps", "width", "guide", "network"), [(50, 4, True, 246), (50, 16, False, 785), (128, 10, False, 1271)]
)
def test_counts_of_the_published_settings(steps, width, guide, network):
    """The minimal counts of dav.md G.1 for images (M = 4 guided, M = 16 not) and DNA (M = 10); one sample."""
    meter = spent("mixture", TreeSearch(width, 0.3, guide=guide), steps, n=1)
    assert rows(meter, "forward") == network
    assert rows(meter, "reward") == (steps - 1) * width + 1 + (steps if guide else 0), "one child of the last step"
    assert rows(meter, "backward") == (steps if guide else 0)


@pytest.mark.parametrize("kind", ["mixture", "parallel"])
def test_other_searchers_need_what_the_formula_says(kind):
    meter = spent(kind, Rollout())
    assert rows(meter, "forward") + rows(meter, "shared") == N * STEPS
    assert rows(meter, "reward") == N
    meter = spent(kind, BestOf(5))
    assert rows(meter, "forward") + rows(meter, "shared") == 5 * N * STEPS
    assert rows(meter, "reward") == 5 * N
    assert rows(meter, "backward") == 0


def test_a_network_told_the_time_shares_nothing():
    ctx = setting("parallel", STEPS)
    ctx.policy.network.time_input = True
    TreeSearch(M, 0.3)(ctx, Noise.of(0, N))
    assert ctx.meter.total("forward") == N * (1 + (STEPS - 1) * M)
    assert ctx.meter.total("shared") == 0


def test_a_random_lookahead_shares_predictions_but_no_rewards():
    meter = spent("parallel", TreeSearch(M, 0.3, value=PosteriorMean("sample")))
    assert rows(meter, "shared") > 0
    assert rows(meter, "reward") == N * STEPS * M


class Flat(torch.nn.Module):
    """Uniform tokens."""

    time_input = False

    def forward(self, x, t):
        return torch.zeros(*x.shape[:2], x.shape[2] - 1, dtype=x.dtype)


@pytest.mark.parametrize(("steps", "share"), [(128, 0.208), (64, 0.04)])
def test_share_of_children_that_revealed_nothing(steps, share):
    """200 positions: a fifth of all children at 128 steps equal their parent and cost nothing."""
    world, meter, n = Model(Flat(), MaskedProcess(200, 4, steps), "sequence"), Meter(), 16
    world.attach(meter)
    ctx = Context(world, world.reference(), lambda x, cond=None: 0 * x[:, 0, 0], meter)
    TreeSearch(M, 1.0)(ctx, Noise.of(0, n))
    assert meter.total("shared") / (n * (1 + (steps - 1) * M)) == pytest.approx(share, abs=0.01)


def test_micro_batches_bound_the_rows_of_a_call_and_cost_the_same():
    sizes = []
    ctx = setting("mixture", STEPS, micro_batch=5)
    ctx.policy.network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    TreeSearch(M, 0.3, guide=True)(ctx, Noise.of(0, N))
    assert max(sizes) == 5
    assert sum(sizes) == ctx.meter.total("forward") == N * (STEPS + (STEPS - 1) * M)
