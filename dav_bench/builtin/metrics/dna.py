"""Metrics of the task `dna` that need a trained network."""

from __future__ import annotations

import numpy as np
import torch

from dav_bench.builtin.metrics.base import MetricContext, Samples
from dav_bench.builtin.rewards.dna import build_accessibility

CHUNK = 256


@torch.no_grad()
def accessibility(samples: Samples, ctx: MetricContext) -> np.ndarray:
    """(n,) 1 where a sample is called open chromatin in HepG2, else 0; the mean is the share called open.

    Called by the accessibility model of the task, which learned real elements against shuffled elements and
    Markov samples; its threshold lets 5 % of such negatives of chromosome 2 through.  A reward for one cell
    type says nothing about sequences that are open in none, so junk can score high; here it does not.
    """
    model = build_accessibility().to(ctx.device)
    margin = [model(part.to(ctx.device, torch.float32)) for part in samples.x.split(CHUNK)]
    return (torch.cat(margin) > 0).double().cpu().numpy()
