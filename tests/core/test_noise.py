"""Noise: the numbers look random, and each sample's depend on its own key alone."""

import math

import pytest
import torch

from dav_bench.core import Noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_uniform_within_and_across_keys(dtype, deviation):
    u = Noise.of(0, 512).uniform(256, dtype=dtype)
    assert u.dtype == dtype
    assert u.min() > 0
    assert u.max() < 1
    flat = torch.full((64,), 1 / 64)
    for part in (u.flatten(), u[:, 0], u[0]):
        assert deviation(torch.histc(part.double(), 64, 0, 1), flat) < 4


@pytest.mark.parametrize("other", ["next key", "next number", "fold", "repeat", "seed"])
def test_streams_are_independent(other, deviation):
    """Pairs of numbers fill the unit square evenly, whatever relates their streams."""
    noise = Noise.of(3, 400)
    u = noise.uniform(101)
    v = {
        "next key": u.roll(1, 0),
        "next number": u.roll(1, 1),
        "fold": noise.fold(1).uniform(101),
        "repeat": noise.repeat(2)[torch.arange(0, 800, 2)].uniform(101),
        "seed": Noise.of(4, 400).uniform(101),
    }[other]
    cell = (u * 8).long() * 8 + (v * 8).long()
    counts = torch.bincount(cell.flatten(), minlength=64).double()
    assert deviation(counts, torch.full((64,), 1 / 64)) < 4


@pytest.mark.parametrize("seed", range(5))
def test_no_key_is_twice_another(seed):
    """SplitMix64 maps 2z to twice the hash of z once in 64 times, so counters must not start at 0."""
    keys = Noise.of(seed, 4000).keys
    assert not torch.isin(keys * 2, keys).any()


def test_streams_of_different_purposes_never_coincide():
    noise = Noise.of(0, 50)
    streams = [
        noise,
        noise.fold(1, 2),
        noise.fold(2, 1),
        *(noise.fold(tag) for tag in range(40)),
        noise.repeat(8),
    ]
    keys = torch.cat([s.keys for s in streams])
    assert len(keys.unique()) == len(keys)
    assert torch.equal(noise.fold(1).fold(2).keys, noise.fold(1, 2).keys)


def test_a_sample_does_not_depend_on_its_batch():
    many, few, late = Noise.of(7, 20), Noise.of(7, 5), Noise.of(7, 5, start=10)
    assert torch.equal(many.uniform(3, 2)[:5], few.uniform(3, 2))
    assert torch.equal(many.fold(4).normal(6)[10:15], late.fold(4).normal(6))
    assert torch.equal(many.repeat(4)[:20].keys, few.repeat(4).keys)
    assert torch.equal(many[torch.tensor([3, 1])].uniform(2), many.uniform(2)[[3, 1]])
    assert torch.equal(many.uniform(9)[:, :4], many.uniform(4)), "a longer draw begins with the shorter"


def test_a_value_used_twice_gives_the_same_numbers():
    noise = Noise.of(1, 3)
    assert torch.equal(noise.uniform(4), noise.uniform(4))


def test_numbers_are_the_same_on_every_machine():
    """Runs resume and reproduce from these bits; a change of them needs a new identity version."""
    assert Noise.of(0, 2).keys.tolist() == [-6411193824288604561, -5511663747979980962]
    assert Noise.of(0, 1).fold(5).repeat(1).keys.tolist() == [2558030658606413589]


def test_normal_has_the_moments_and_tails_of_a_normal():
    z = Noise.of(2, 1000).normal(1000, dtype=torch.float64).flatten()
    n = len(z)
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((z**3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float((z.abs() > 3).double().mean()) - 0.0026998) < 4 * math.sqrt(0.0027 / n)
    assert z.isfinite().all()


def test_gumbel_maximum_draws_from_softmax(deviation):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    pick = (Noise.of(5, 40_000).gumbel(4) + logits).argmax(-1)
    counts = torch.bincount(pick, minlength=4).double()
    assert deviation(counts, logits.double().softmax(0)) < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_categorical_draws_from_softmax_and_never_the_impossible(dtype, deviation):
    logits = torch.tensor([-math.inf, 0.3, -2.0, 1.0, -math.inf], dtype=dtype)
    pick = Noise.of(6, 40_000).categorical(logits.expand(40_000, 5))
    counts = torch.bincount(pick, minlength=5).double()
    assert deviation(counts, logits.double().softmax(0)) < 4
