"""Prints what real and random sequences get in the set metrics of the task `dna`; docs/metrics.md quotes it.

    python tasks/dna/measure_metrics.py

Sets of 256 as in the evaluation, 20 draws each: mean and standard deviation between draws.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dav_bench.builtin.metrics.base import MetricContext, Samples
from dav_bench.builtin.metrics.sequence import kmer_corr, levenshtein, motif_corr
from dav_bench.core.model import Model
from dav_bench.tasks import read_task

SIZE, DRAWS, TEST = 256, 20, 1
METRICS = {"levenshtein": levenshtein, "kmer-corr": kmer_corr, "motif-corr": motif_corr}


def pools(path: Path) -> dict[str, Callable[[np.random.Generator], np.ndarray]]:
    """A sampler of (256, 200) bases for each kind of sequence, on the test chromosome."""

    def of(rows: np.ndarray) -> Callable[[np.random.Generator], np.ndarray]:
        return lambda rng: rows[rng.choice(len(rows), SIZE, replace=False)]

    with np.load(path) as data:
        rows = data["sequence"][data["chrom"] == TEST]
        cell = data["cell"][data["chrom"] == TEST]
        names = [str(name).partition("_")[0] for name in data["cells"]]
    kinds = {f"{name} elements": of(rows[cell == i]) for i, name in enumerate(names)}
    hepg2 = kinds["HepG2 elements"]
    kinds["elements of all four cells"] = of(rows)
    kinds["HepG2 elements, bases shuffled"] = lambda rng: rng.permuted(hepg2(rng), axis=1)
    kinds["uniform random bases"] = lambda rng: rng.integers(0, 4, (SIZE, 200))
    return kinds


def _no_model() -> Model:
    raise RuntimeError("these metrics need no model")


def main() -> None:
    here = Path(__file__).resolve().parent
    ctx = MetricContext(read_task(here), _no_model)
    print("| sequences | " + " | ".join(METRICS) + " |\n|---|" + "---|" * len(METRICS))
    for name, draw in pools(here / "dhs_200bp.npz").items():
        rng = np.random.default_rng(0)
        sets = [Samples(F.one_hot(torch.from_numpy(draw(rng)).long(), 4).float()) for _ in range(DRAWS)]
        values = {key: np.array([fn(s, ctx) for s in sets]) for key, fn in METRICS.items()}
        digits = {"levenshtein": 1}
        cells = [
            f"{v.mean():.{digits.get(key, 3)}f} ± {v.std(ddof=1):.{digits.get(key, 3)}f}"
            for key, v in values.items()
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
