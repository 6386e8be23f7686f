"""What the tests of the science share."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)  # the tests are small, and threads would only fight over cores


@pytest.fixture
def deviation() -> Callable[[Tensor, Tensor], float]:
    """How many standard deviations chi-square is above what counts drawn from `probs` give (below counts as 0)."""

    def measure(counts: Tensor, probs: Tensor) -> float:
        counts, live = counts.double(), probs > 0
        if counts[~live].sum():
            return math.inf  # drew something impossible
        expected = counts.sum() * probs.double()
        stat, df = (((counts - expected) ** 2)[live] / expected[live]).sum(), int(live.sum()) - 1
        return max(0.0, float((stat - df) / math.sqrt(2 * df)))

    return measure
