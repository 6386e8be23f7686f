"""A reward from a plain function: tried from a file, without a package around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dav_bench.errors import DavBenchError

LETTERS = "ACGT"


class FunctionReward:
    """Wraps `fn(sample, cond) -> (B,)`, or a black box `fn(sequences: list[str]) -> list of floats`."""

    def __init__(self, fn: Callable[..., Any], domain: str, text: bool, name: str = "reward"):
        self.fn, self.domain, self.text, self.name = fn, domain, text, name
        self.provides = frozenset() if text else frozenset({"reward.grad"})

    def __call__(self, sample: Tensor, cond: Tensor | None = None) -> Tensor:
        """Reward (B,) of samples (B, L, V) or (B, 3, H, W)."""
        if not self.text:
            value = self.fn(sample, cond)
        else:
            value = self.fn(["".join(LETTERS[i] for i in row) for row in sample.argmax(-1).tolist()])
        value = torch.as_tensor(value, device=sample.device)
        if value.shape != (len(sample),):
            raise ValueError(
                f"{self.name} returned shape {tuple(value.shape)} for {len(sample)} samples; expected ({len(sample)},)"
            )
        if not self.text and torch.is_grad_enabled() and sample.requires_grad and not value.requires_grad:
            raise DavBenchError(
                f"the reward {self.name!r} has no gradient, and this method follows it.",
                "Its value does not depend on the samples through torch operations alone.",
                "--reward-wrap nes estimates one on continuous samples; `dav-bench list methods` says what needs none",
            )
        return value if value.is_floating_point() else value.to(sample.dtype)
