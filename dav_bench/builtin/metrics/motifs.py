"""When a motif matches: scores and thresholds of count matrices, without torch."""

from __future__ import annotations

import numpy as np

PSEUDOCOUNT = 0.8
"""Added to each column of a count matrix, shared by the bases."""
PVALUE = 1e-4
"""A window is a hit if a random one (even bases) scores as high with at most this probability."""
RESOLUTION = 100
"""Scores are rounded to 1/100 bit, which makes the threshold exact."""


def score_matrix(counts: np.ndarray) -> np.ndarray:
    """(4, w) whole-number scores, in 1/100 bit, of a (4, w) count matrix."""
    p = (counts + PSEUDOCOUNT / 4) / (counts.sum(0) + PSEUDOCOUNT)
    return np.rint(RESOLUTION * np.log2(4 * p)).astype(int)


def threshold(scores: np.ndarray, pvalue: float = PVALUE) -> int:
    """Smallest score that a window of even, independent bases reaches with at most `pvalue`, exactly."""
    steps = scores - scores.min(0)
    law = np.ones(1)  # of the sum over the columns so far, above its minimum
    for column in steps.T:
        longer = np.zeros(len(law) + column.max())
        for step in column:
            longer[step : step + len(law)] += law / 4
        law = longer
    reached = law[::-1].cumsum()[::-1] <= pvalue
    # a motif too short to be that rare counts only where it is matched best
    above = int(np.argmax(reached)) if reached.any() else len(law) - 1
    return above + int(scores.min(0).sum())
