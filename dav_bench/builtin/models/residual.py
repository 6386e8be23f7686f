"""The part of an exact model that training changes."""

from __future__ import annotations

import torch
from torch import nn


def residual(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """A small network that gives 0 until trained; its first layers are the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        last = nn.Linear(hidden, outputs)
        net = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return net
