"""Counters that a loss keeps between rounds."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Count(nn.Module):
    """How often something happened, kept in checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.n: Tensor
        self.register_buffer("n", torch.zeros((), dtype=torch.int64))

    def add(self) -> int:
        self.n += 1
        return int(self.n)
