"""Statistics of the recipes of the task `dna`: shuffles keep what they promise, Markov models and AUROC count right."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

TASK = Path(__file__).resolve().parents[2] / "tasks" / "dna"


@pytest.fixture
def dhs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module beside the recipes."""
    monkeypatch.syspath_prepend(str(TASK))
    monkeypatch.delitem(sys.modules, "dhs", raising=False)
    import dhs

    return dhs


def pairs(x: np.ndarray) -> np.ndarray:
    return np.bincount(4 * x[:-1] + x[1:], minlength=16)


def test_a_shuffle_keeps_every_dinucleotide(dhs: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        x = rng.choice(4, 60, p=(0.6, 0.1, 0.25, 0.05))
        y = dhs.dinucleotide_shuffle(x, rng)
        assert (pairs(x) == pairs(y)).all() and y[0] == x[0] and y[-1] == x[-1]


def test_a_shuffle_draws_every_walk_equally_often(dhs: ModuleType) -> None:
    """ACAGATA: A goes to C, G, T in any order, each of the six once."""
    rng, x = np.random.default_rng(1), np.array([0, 1, 0, 2, 0, 3, 0])
    seen = [tuple(dhs.dinucleotide_shuffle(x, rng)) for _ in range(1200)]
    counts = [seen.count(walk) for walk in set(seen)]
    assert len(counts) == 6
    assert sum((c - 200) ** 2 / 200 for c in counts) < 20.5  # chi-square, 5 degrees of freedom, p = .001


def test_markov_bits_are_a_normalised_law(dhs: ModuleType) -> None:
    model = dhs.Markov(torch.randint(0, 4, (40, 30), generator=torch.Generator().manual_seed(0)), order=2)
    every = torch.cartesian_prod(*[torch.arange(4)] * 4)
    assert (2 ** (-4 * model.bits(every))).sum().item() == pytest.approx(1.0)


def test_markov_samples_follow_the_model(dhs: ModuleType) -> None:
    model = dhs.Markov(torch.tensor([[0, 3] * 20]), order=1, weight=0.0)
    x = model.sample(5, 12, seed=0)
    assert set((x[:, 1:] - x[:, :-1]).abs().flatten().tolist()) == {3}
    assert torch.equal(x, model.sample(5, 12, seed=0))


def test_auroc_counts_ties_half(dhs: ModuleType) -> None:
    score, positive = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([False, True, False, True])
    assert dhs.auroc(score, positive) == pytest.approx(3.5 / 4)


def test_a_recurring_word_is_found_on_both_strands(dhs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word planted in 20 of 200 random elements, half of them reversed, comes first, with the bases around it."""
    monkeypatch.delitem(sys.modules, "repeats", raising=False)
    from repeats import recurring

    g = torch.Generator().manual_seed(0)
    x, word = torch.randint(0, 4, (200, 60), generator=g), torch.randint(0, 4, (20,), generator=g)
    for i in range(20):
        x[i, 15 + i : 35 + i] = word if i % 2 else dhs.reverse_complement(word[None])[0]
    counts = recurring(x, 2, span=20, seed=16)
    assert {tuple(w.argmax(-1).tolist()) for w in counts} == {
        tuple(word.tolist()),
        tuple(dhs.reverse_complement(word[None])[0].tolist()),
    }
    assert torch.equal(counts[0], counts[1].flip(0, 1))
    assert (counts[:, 2:18].max(-1).values == 20).all()  # the seed and, on both sides, most of the word
    with pytest.raises(ValueError, match="only 2 words recur"):
        recurring(x, 4, span=20, seed=16)  # the word's other seeds lie too near, on either strand
