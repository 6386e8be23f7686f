"""Colourfulness of natural images (Hasler and Süsstrunk 2003, doi:10.1117/12.477378)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dav_bench.images import wide


def _root(x: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0, not infinite."""
    positive = x > 0
    return torch.where(positive, x, 1.0).sqrt().where(positive, 0.0)


class Colourfulness:
    """sqrt(σ_rg² + σ_yb²) + 0.3 sqrt(μ_rg² + μ_yb²) over the pixels, with rg = R − G and yb = (R + G) / 2 − B.

    R, G and B are sRGB values from 0 to 255.  The paper's observers call 15 slightly, 33 moderately, 45 averagely,
    59 quite, 82 highly and 109 extremely colourful.
    """

    domain = "image"
    provides = frozenset({"reward.grad"})
    # σ² + μ² is the mean of rg² + yb² <= 255² · 1.25 (its value at red, green, cyan and magenta), and s + 0.3 m
    # under s² + m² <= c is at most sqrt(1.09 c)
    range = (0.0, round(255 * math.sqrt(1.25 * 1.09), 1))
    unit = "points of Hasler and Süsstrunk"

    def __call__(self, sample: Tensor, cond: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B,)."""
        red, green, blue = (255 * wide(sample)).flatten(2).unbind(1)
        opponent = torch.stack([red - green, (red + green) / 2 - blue])
        spread = opponent.var(-1, correction=0).sum(0)
        mean = opponent.mean(-1).square().sum(0)
        return _root(spread) + 0.3 * _root(mean)
