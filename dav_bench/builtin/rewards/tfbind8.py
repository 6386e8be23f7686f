"""Measured binding of the transcription factor SIX6 to every DNA 8-mer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dav_bench.builtin.multilinear import contract, fold
from dav_bench.tasks import asset

LENGTH, BASES = 8, 4


class BindingReward(nn.Module):
    """E-score of an 8-mer, from −0.5 to 0.5; of a relaxed one, the expectation under independent positions.

    The table is the measurement itself, so nothing is left for a method to exploit: equal to it on one-hot rows,
    linear in each row between them.
    """

    domain = "sequence"
    provides = frozenset({"reward.grad"})

    def __init__(self, escore: Tensor) -> None:
        """`escore`, (65536,): by number of the 8-mer, first base most significant, A C G T = 0 1 2 3."""
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", fold(escore, BASES, LENGTH))

    def forward(self, sample: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B,) of one-hot or relaxed 8-mers (B, 8, 4)."""
        return contract(self.table.to(sample.dtype), sample)


def build() -> BindingReward:
    with np.load(asset("tfbind8", "tfbind8_six6.npz")) as held:
        return BindingReward(torch.from_numpy(held["escore"]))
