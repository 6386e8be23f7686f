"""Metrics of the task `dna-gosai`, as DRAKES defines them (dav.md C.2), and its dataset."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from dav_bench.builtin.gosai import CELLS, DATASET
from dav_bench.builtin.metrics.base import BASES, MetricContext, Samples
from dav_bench.builtin.metrics.sequence import kmer_counts, motif_hits, pearson, spearman
from dav_bench.builtin.rewards.gosai import ATAC_HEPG2, load_atac
from dav_bench.errors import DavBenchError
from dav_bench.tasks import asset

COLUMNS = ("seq", *CELLS, "chrom")
TOP = 0.999
"""Quantile of measured HepG2 activity above which elements are the reference set."""
CHUNK = 64


@torch.no_grad()
def accessibility(samples: Samples, ctx: MetricContext) -> np.ndarray:
    """(n,) 1 where the ATAC classifier gives HepG2 more than 0.5, else 0; the mean is ATAC-Acc.

    HepG2's column alone, as DRAKES has it; DAV's release averages over all seven cell lines.
    """
    model = load_atac().to(ctx.device)
    p = torch.cat([model(part.to(ctx.device, torch.float32)) for part in samples.x.split(CHUNK)])
    return (p[:, ATAC_HEPG2] > 0.5).double().cpu().numpy()


def kmer_corr(samples: Samples, ctx: MetricContext) -> float:
    """Pearson correlation of 3-mer counts with the 0.1 % of the dataset most active in HepG2."""
    return pearson(kmer_counts(samples.ids), kmer_counts(most_active()))


def motif_corr(samples: Samples, ctx: MetricContext) -> float:
    """Spearman correlation of motif hits with the 0.1 % most active, with the motifs and hits of task `dna`.

    DRAKES scans all of JASPAR 2022 with gReLU, so its numbers do not compare.
    """
    motifs = asset("dna", "motifs.json")
    return spearman(motif_hits(samples.ids, motifs).sum(0), motif_hits(most_active(), motifs).sum(0))


def most_active() -> Tensor:
    """(n, 200) bases of the elements above the 99.9 % quantile of measured HepG2 activity."""
    return _most_active(DATASET.locate())


@lru_cache(maxsize=2)
def _most_active(path: Path) -> Tensor:
    data = read_dataset(path)
    activity = data["hepg2"].to_numpy()
    return encode(data.filter(activity > np.quantile(activity, TOP))["seq"].to_list())


def read_dataset(path: Path) -> pl.DataFrame:
    """The columns seq, hepg2, k562, sknsh and chrom of `dataset.csv` or `dataset.csv.gz`."""
    try:
        data = pl.read_csv(path, columns=list(COLUMNS))
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        raise DavBenchError(
            f"{path} is not the dataset",
            f"the columns {', '.join(COLUMNS)} are needed: {error}",
            DATASET.fix,
        ) from error
    odd = data.filter(~pl.col("seq").str.contains("^[ACGT]{200}$"))
    if len(odd):
        raise DavBenchError(
            f"{path} is not the dataset",
            f"{len(odd)} of {len(data)} sequences are not 200 letters A C G T, such as {odd['seq'][0]!r:.40}",
            DATASET.fix,
        )
    return data.with_columns(pl.col(CELLS).cast(pl.Float64))


def encode(sequences: list[str]) -> Tensor:
    """(n, L) bases of equally long sequences of A C G T."""
    table = np.full(256, 255, np.uint8)
    table[np.frombuffer(BASES.encode(), np.uint8)] = range(len(BASES))
    letters = np.frombuffer("".join(sequences).encode(), np.uint8)
    return torch.from_numpy(table[letters].reshape(len(sequences), -1)).long()
