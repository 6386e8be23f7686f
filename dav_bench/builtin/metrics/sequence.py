"""Metrics of sets of DNA sequences: diversity, and likeness to real elements.

Definitions with sources and values of real elements: `docs/metrics.md`.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from torch import Tensor

from dav_bench.builtin.metrics.base import MetricContext, Samples
from dav_bench.builtin.metrics.motifs import score_matrix, threshold
from dav_bench.core.model import Model
from dav_bench.core.noise import Noise

K = 3
LIKELIHOOD_STREAM = 0x11E5
"""Names the noise of `log_likelihood`."""


def levenshtein(samples: Samples, ctx: MetricContext) -> float:
    """Mean edit distance over all unordered pairs, in edits, not normalised by length (DRAKES, DAV).

    Unit: edits (insertions, deletions, substitutions); 0 for fewer than two samples.
    """
    text = samples.sequences or []
    n = len(text)
    if n < 2:
        return 0.0
    return float(cdist(text, text, scorer=Levenshtein.distance, dtype=np.int32).sum() / (n * (n - 1)))


def kmer_counts(ids: Tensor, k: int = K) -> np.ndarray:
    """(4^k,) counts of all overlapping k-mers in (n, L) bases, first base most significant."""
    length = ids.shape[1] - k + 1
    code = sum(ids[:, j : j + length].long() * 4 ** (k - 1 - j) for j in range(k))
    return torch.bincount(torch.as_tensor(code).flatten(), minlength=4**k).double().numpy()


def kmer_corr(samples: Samples, ctx: MetricContext) -> float:
    """Pearson correlation of 3-mer counts with real HepG2 elements of chromosome 2.

    Over all 64 overlapping 3-mers of one strand (DRAKES: over those observed, which are all for hundreds of
    sequences).  Counts of sets of different size compare, since the correlation ignores scale.
    """
    return pearson(kmer_counts(samples.ids), kmer_counts(real_elements(ctx)))


def motif_corr(samples: Samples, ctx: MetricContext) -> float:
    """Spearman correlation, over motifs, of JASPAR hit counts with real HepG2 elements of chromosome 2.

    Hits as in `motif_hits`; 25 motifs, of factors of liver cells and of other cells (`motifs.json`).  DRAKES
    scans all JASPAR motifs with gReLU and p at most 1e-3.  0 where all counts are equal.
    """
    motifs = ctx.asset("motifs.json")
    return spearman(motif_hits(samples.ids, motifs).sum(0), motif_hits(real_elements(ctx), motifs).sum(0))


def log_likelihood(samples: Samples, ctx: MetricContext) -> np.ndarray:
    """(n,) approximate log-likelihood under the pretrained model, in nats (DRAKES's App-Log-Lik).

    Sum over the grid of (m_i - m_{i-1}) / m_i times the log-probabilities of the true bases at the masked
    positions of one draw x_i ~ q(x_i | x_0); m_i is the mask probability.  An unbiased estimate of the bound
    on the grid, noisy for one sample: its median over samples is reported.  The draws depend on the
    evaluation seed and the sample's place alone, so methods meet the same masks.
    """
    noise = Noise.of(ctx.seed, len(samples), device=ctx.device).fold(LIKELIHOOD_STREAM)
    model = ctx.reference()
    return grid_log_likelihood(model, samples.x.to(ctx.device, model.dtype), noise).cpu().double().numpy()


@torch.no_grad()
def grid_log_likelihood(model: Model, x0: Tensor, noise: Noise) -> Tensor:
    """(B,) the estimate of `log_likelihood` for clean sequences (B, L, V); costs T network rows for each."""
    total = x0.new_zeros(len(x0))
    for i in range(model.process.T, 0, -1):
        x = model.process.corrupt(x0, i, noise.fold(i))
        log_probs = model.predict(x, i).log_softmax(-1)
        weight = 1 - model.process.time(i - 1, x) / model.process.time(i, x)
        total += weight * ((x0 * log_probs).sum(-1) * x[..., -1]).sum(1)
    return total


# ---- real elements


def real_elements(ctx: MetricContext) -> Tensor:
    """(n, L) bases of the real HepG2 elements on chromosome 2, the validation set of the task `dna`."""
    return _elements(ctx.asset("dhs_200bp.npz"), "HepG2", 2)


@lru_cache(maxsize=4)
def _elements(path: Path, cell: str, chromosome: int) -> Tensor:
    with np.load(path) as data:
        index = [str(name).startswith(cell) for name in data["cells"]].index(True)
        return torch.from_numpy(
            data["sequence"][(data["cell"] == index) & (data["chrom"] == chromosome)]
        ).long()


# ---- motifs


@lru_cache(maxsize=4)
def scoring(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """What a motif file says, ready to scan: weights (2 M, 4, W), thresholds (M,) and widths (M,).

    A weight is log2(p / 0.25) in 1/100 bit with p from the counts and the pseudocount; the second M are the
    reverse complements.  Shorter motifs are padded with 0 on the right.
    """
    matrices = [score_matrix(np.array(m["counts"], float)) for m in json.loads(path.read_text())["motifs"]]
    widths = [m.shape[1] for m in matrices]
    both = [*matrices, *(m[::-1, ::-1] for m in matrices)]
    weights = np.stack([np.pad(m, ((0, 0), (0, max(widths) - m.shape[1]))) for m in both])
    thresholds = [threshold(m) for m in matrices]
    return torch.from_numpy(weights).float(), torch.tensor(thresholds).float(), torch.tensor(widths)


def motif_hits(ids: Tensor, path: Path, chunk: int = 256) -> np.ndarray:
    """(n, M) number of windows of (n, L) bases that a motif matches on either strand.

    A window that matches on both strands counts once, as palindromes do.
    """
    weights, thresholds, widths = scoring(path)
    count, last = len(widths), ids.shape[1] - widths  # (M,) last place where a motif still fits
    fits = torch.arange(ids.shape[1]) <= last[:, None]
    hits = []
    for part in ids.split(chunk):
        x = F.pad(F.one_hot(part.long(), 4).float().transpose(1, 2), (0, weights.shape[2] - 1))
        best = F.conv1d(x, weights).unflatten(1, (2, count)).amax(1)
        hits.append(((best >= thresholds[:, None]) & fits).sum(-1))
    return torch.cat(hits).numpy()


# ---- correlations


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; 0 where one side is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else 0.0


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation of ranks, ties sharing their mean rank."""
    return pearson(_ranks(a), _ranks(b))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    return (size.cumsum() - (size - 1) / 2)[group]
