"""The trained rewards of the task `dna`: strands, gradients, and what they say of real elements."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dav_bench.builtin.models.mdlm import real
from dav_bench.builtin.rewards.dna import (
    NETWORKS,
    BothStrands,
    build_accessibility,
    build_heldout,
    build_specificity,
    specificity,
)
from dav_bench.tasks import asset

BUILDERS = {"reward": build_specificity, "heldout": build_heldout, "accessibility": build_accessibility}


def junk(n: int, seed: int = 0) -> Tensor:
    """Random sequences (n, 200, 4) of even base composition."""
    return F.one_hot(torch.randint(0, 4, (n, 200), generator=torch.Generator().manual_seed(seed)), 4).float()


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_give_one_row_of_logits(name: str) -> None:
    assert NETWORKS[name]()(junk(3)).shape == (3, 4)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_sequence_and_its_reverse_complement_score_alike(name: str) -> None:
    reward, x = BUILDERS[name](), junk(5)
    assert torch.allclose(reward(x), reward(x.flip(1, 2)), atol=1e-5)
    assert not torch.allclose(reward(x), reward(x.flip(1)), atol=1e-2)


@pytest.mark.parametrize("name", BUILDERS)
def test_relaxed_sequences_carry_gradients(name: str) -> None:
    reward = BUILDERS[name]()
    x = (0.9 * junk(4) + 0.025).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x).sum(), x)
    assert "reward.grad" in reward.provides and reward.domain == "sequence"
    assert gradient.isfinite().all() and (gradient.abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("name", BUILDERS)
def test_features_read_out_are_the_score(name: str) -> None:
    reward, x = BUILDERS[name](), junk(5).requires_grad_()
    if "reward.features" not in reward.provides:
        return
    features = reward.features(x)
    assert features.ndim == 2 and torch.allclose(reward.head(features), reward(x), atol=1e-5)
    (gradient,) = torch.autograd.grad(features.sum(), x)
    assert bool((gradient.abs().amax((1, 2)) > 0).all())


@pytest.mark.parametrize("name", BUILDERS)
def test_a_score_does_not_depend_on_the_batch(name: str) -> None:
    reward, x = BUILDERS[name](), junk(6)
    assert torch.allclose(reward(x)[2:4], reward(x[2:4]), atol=1e-5)
    assert reward(x, None).shape == (6,)


def test_specificity_is_the_log_odds_of_the_softmax() -> None:
    logits = torch.randn(7, 4, dtype=torch.float64)
    p = logits.softmax(-1)[:, 1]
    assert torch.allclose(specificity(logits), p.log() - (-p).log1p())
    assert torch.allclose(specificity(logits + 3.0), specificity(logits))


def test_both_strands_averages_logits() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0]

    x = junk(2)
    assert torch.equal(BothStrands(First())(x), (x[:, 0] + x[:, -1].flip(1)) / 2)


@pytest.mark.parametrize("name", ["reward", "heldout"])
def test_real_hepg2_elements_score_above_those_of_other_cells(name: str) -> None:
    reward = BUILDERS[name]()
    own, other = reward(real("validation")[:200]), reward(real("validation", "GM12878")[:200])
    better = (own[:, None] > other[None]).float().mean()
    assert better > 0.9


def test_reward_and_heldout_are_different_networks() -> None:
    a, b = build_specificity(), build_heldout()
    assert type(a.both.net) is not type(b.both.net)
    assert not any(p.requires_grad for p in [*a.parameters(), *b.parameters()])


def test_accessibility_tells_elements_from_junk() -> None:
    model = build_accessibility()
    open_real = (model(real("validation")[:300]) > 0).float().mean().item()
    open_junk = (model(junk(300)) > 0).float().mean().item()
    assert math.isfinite(model.threshold)
    assert open_real > open_junk + 0.25
    assert open_junk < 0.1


@pytest.mark.parametrize(("name", "role"), [("reward", "train"), ("heldout", "heldout")])
def test_shipped_rewards_reproduce_the_recorded_scale(name: str, role: str) -> None:
    """scales.json was written from these weights: their quantiles on the HepG2 elements of chromosome 2."""
    recorded = json.loads(asset("dna", "scales.json").read_text(encoding="utf-8"))[role]
    values = torch.cat([BUILDERS[name]()(part) for part in real("validation").split(256)])
    for key, q in (("q10", 0.1), ("median", 0.5), ("q90", 0.9)):
        assert values.quantile(q).item() == pytest.approx(recorded[key], abs=0.005)
