"""Metrics against brute force, counts by hand and a denoiser whose likelihood is known."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from dav_bench.builtin.metrics import motifs, sequence
from dav_bench.builtin.metrics.base import MetricContext, Samples
from dav_bench.builtin.metrics.dna import accessibility
from dav_bench.builtin.metrics.sequence import (
    grid_log_likelihood,
    kmer_corr,
    kmer_counts,
    levenshtein,
    log_likelihood,
    motif_corr,
    motif_hits,
    pearson,
    score_matrix,
    spearman,
    threshold,
)
from dav_bench.builtin.rewards.dna import build_accessibility
from dav_bench.core.model import Model
from dav_bench.core.noise import Noise
from dav_bench.core.process import MaskedProcess

DNA = Path(__file__).parents[2] / "tasks" / "dna"
MOTIFS = DNA / "motifs.json"


def one_hot(sequences: list[str]) -> Tensor:
    return F.one_hot(torch.tensor([["ACGT".index(c) for c in s] for s in sequences]), 4).float()


def context(pretrained: Any = None, seed: int = 0) -> MetricContext:
    task: Any = SimpleNamespace(asset=lambda path: DNA / path)
    return MetricContext(task, pretrained, seed=seed)


def random_bases(n: int, length: int = 200, seed: int = 0) -> Tensor:
    return torch.randint(0, 4, (n, length), generator=torch.Generator().manual_seed(seed))


def edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def test_samples_as_text() -> None:
    samples = Samples(one_hot(["ACGT", "TTGA"]))
    assert (len(samples), samples.sequences) == (2, ["ACGT", "TTGA"])
    assert Samples(torch.zeros(5, 2)).sequences is None


def test_levenshtein_is_the_mean_over_unordered_pairs() -> None:
    samples = Samples(F.one_hot(random_bases(7, 40), 4).float())
    pairs = [edit_distance(a, b) for a, b in combinations(samples.sequences or [], 2)]
    assert levenshtein(samples, context()) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    assert levenshtein(Samples(one_hot(["AAAA", "AAAT", "TAAA"])), context()) == pytest.approx(4 / 3)
    assert levenshtein(Samples(one_hot(["ACGT"])), context()) == 0


def test_kmer_counts_by_hand() -> None:
    ids = one_hot(["AACG", "AACT"]).argmax(-1)
    counts = kmer_counts(ids)
    assert counts.sum() == 4
    assert counts[0 * 16 + 0 * 4 + 1] == 2  # AAC
    assert counts[0 * 16 + 1 * 4 + 2] == counts[0 * 16 + 1 * 4 + 3] == 1  # ACG, ACT


def test_kmer_corr_tells_real_elements_from_noise() -> None:
    real = sequence.real_elements(context())
    assert real.shape == (1177, 200)
    assert kmer_corr(Samples(F.one_hot(real, 4).float()), context()) == pytest.approx(1)
    assert abs(kmer_corr(Samples(F.one_hot(random_bases(256), 4).float()), context())) < 0.4
    poly_a = torch.zeros(8, 200, dtype=torch.long)
    assert kmer_corr(Samples(F.one_hot(poly_a, 4).float()), context()) < 0.6


def naive_hits(text: str, counts: list[list[int]]) -> int:
    """Windows whose log-odds reach the threshold on the strand as read or on its complement."""
    scores = score_matrix(np.array(counts, float))
    width, least = scores.shape[1], threshold(scores)
    complement = str.maketrans("ACGT", "TGCA")
    hits = 0
    for start in range(len(text) - width + 1):
        window = text[start : start + width]
        both = (window, window.translate(complement)[::-1])
        hits += any(sum(scores["ACGT".index(c), j] for j, c in enumerate(w)) >= least for w in both)
    return hits


def test_motif_hits_equal_a_naive_scan() -> None:
    motifs = json.loads(MOTIFS.read_text())["motifs"]
    ids = random_bases(6, 300)
    planted = [np.array(m["counts"]).argmax(0) for m in motifs]
    for k, site in enumerate(planted):  # so that every motif has a hit, some on the other strand
        site = site if k % 2 else 3 - site[::-1]
        ids[k % 6, 20 * (k // 6) : 20 * (k // 6) + len(site)] = torch.from_numpy(site.copy())
    texts = Samples(F.one_hot(ids, 4).float()).sequences
    expected = np.array([[naive_hits(t, m["counts"]) for m in motifs] for t in texts])
    assert (motif_hits(ids, MOTIFS, chunk=4) == expected).all()
    assert (expected.sum(0) > 0).all()


def test_motif_at_either_end_is_seen_and_a_cut_one_is_not() -> None:
    motifs = json.loads(MOTIFS.read_text())["motifs"]
    index = next(k for k, m in enumerate(motifs) if m["name"] == "HNF4A")
    site = torch.from_numpy(np.array(motifs[index]["counts"]).argmax(0))
    blank = torch.zeros(3, 60, dtype=torch.long)
    blank[0, : len(site)], blank[1, -len(site) :], blank[2, -len(site) + 2 :] = site, site, site[:-2]
    assert motif_hits(blank, MOTIFS)[:, index].tolist() == [1, 1, 0]


def test_threshold_is_exact() -> None:
    scores = score_matrix(np.array([[8, 1, 0, 5], [0, 1, 9, 2], [1, 7, 0, 2], [1, 1, 1, 1]], float))
    least = threshold(scores, pvalue=0.02)
    grid = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1)
    sums = scores[grid, np.arange(4)[:, None]].sum(0)
    assert (sums >= least).mean() <= 0.02 < (sums >= least - 1).mean()
    assert threshold(scores, pvalue=1e-9) == sums.max()


def test_a_motif_too_short_to_be_rare_counts_where_it_matches_best(tmp_path: Path) -> None:
    counts = [[9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 5], [0, 0, 0, 4]]  # ACGG, sometimes ACGT
    (tmp_path / "motifs.json").write_text(json.dumps({"motifs": [{"counts": counts}]}))
    ids = one_hot(["TTACGGTT", "TTACGTTT", "TTCCGTTT"]).argmax(-1)  # as written, a near miss, complement
    assert motif_hits(ids, tmp_path / "motifs.json")[:, 0].tolist() == [1, 0, 1]


def test_hits_are_as_rare_as_the_threshold_says() -> None:
    hits = motif_hits(random_bases(2000, 200, seed=3), MOTIFS).sum(0)
    windows = 2000 * 190 * 2
    assert (hits < 1.3 * windows * motifs.PVALUE).all()
    assert hits.mean() > 0.6 * windows * motifs.PVALUE


def test_motif_file_holds_both_groups_with_licence_and_versions() -> None:
    content = json.loads(MOTIFS.read_text())
    assert "MIT" in content["licence"] and "JASPAR" in content["source"]
    groups = [m["group"] for m in content["motifs"]]
    assert (groups.count("liver"), groups.count("other")) == (12, 13)
    for m in content["motifs"]:
        assert m["id"].startswith("MA") and m["version"] >= 1
        assert len(m["counts"]) == 4 and len({len(row) for row in m["counts"]}) == 1


def test_motif_corr_tells_hepg2_from_other_cells() -> None:
    with np.load(DNA / "dhs_200bp.npz") as data:
        other = data["sequence"][(data["chrom"] == 2) & (data["cell"] == 2)]
    real = sequence.real_elements(context())
    assert motif_corr(Samples(F.one_hot(real, 4).float()), context()) == pytest.approx(1)
    assert motif_corr(Samples(F.one_hot(torch.from_numpy(other).long(), 4).float()), context()) < 0.6
    assert motif_corr(Samples(F.one_hot(torch.zeros(4, 200).long(), 4).float()), context()) == 0


def test_correlations_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 40).astype(float), rng.normal(size=40)
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b)[0], abs=1e-12)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0], abs=1e-12)
    assert pearson(np.ones(4), b[:4]) == 0


class Independent(nn.Module):
    """Predicts the same law at every position, whatever it is shown: its likelihood is known."""

    time_input = False

    def __init__(self, p: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(p, dtype=torch.float64).log())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.logits.expand(*x.shape[:2], -1)


P = [0.5, 0.25, 0.15, 0.1]


def independent(length: int, steps: int) -> Model:
    return Model(Independent(P), MaskedProcess(length, 4, steps), "sequence")


def test_log_likelihood_is_unbiased_where_it_is_known() -> None:
    x0 = F.one_hot(random_bases(1, 20), 4).double().expand(4000, -1, -1)
    exact = float((x0[0] * torch.tensor(P).double().log()).sum())
    values = grid_log_likelihood(independent(20, 16), x0, Noise.of(1, 4000))
    error = float(values.std() / math.sqrt(len(values)))
    assert error < 0.15
    assert abs(float(values.mean()) - exact) < 4 * error


def test_log_likelihood_of_one_step_is_exact() -> None:
    x0 = F.one_hot(random_bases(5, 20), 4).double()
    values = grid_log_likelihood(independent(20, 1), x0, Noise.of(0, 5))  # m_1 = 1: all is masked
    assert torch.allclose(values, (x0 * torch.tensor(P).double().log()).sum((1, 2)), rtol=1e-6)


def test_log_likelihood_weighs_each_draw_by_its_step() -> None:
    x0 = F.one_hot(random_bases(3, 30), 4).double()
    model, noise = independent(30, 8), Noise.of(5, 3)
    by_hand = torch.zeros(3, dtype=torch.float64)
    for i in range(8, 0, -1):
        masked = model.process.corrupt(x0, i, noise.fold(i))[..., -1]
        by_hand += ((i / 8 - (i - 1) / 8) / (i / 8)) * (
            masked * (x0 * torch.tensor(P).double().log()).sum(-1)
        ).sum(1)
    assert torch.allclose(grid_log_likelihood(model, x0, noise), by_hand)


def test_log_likelihood_metric_is_fixed_by_the_seed_and_costs_one_row_per_step() -> None:
    model = independent(20, 16)
    samples = Samples(F.one_hot(random_bases(6, 20), 4).float())
    first = log_likelihood(samples, context(lambda: model, seed=3))
    assert first.shape == (6,)
    assert model.meter.total("forward") == 6 * 16
    assert (first == log_likelihood(samples, context(lambda: model, seed=3))).all()
    assert (first != log_likelihood(samples, context(lambda: model, seed=4))).any()
    fewer = log_likelihood(Samples(samples.x[:2]), context(lambda: model, seed=3))
    assert (fewer == first[:2]).all()


def test_accessibility_is_the_call_of_the_model_at_its_threshold() -> None:
    real = F.one_hot(sequence.real_elements(context())[:300], 4).float()
    junk = F.one_hot(random_bases(300), 4).float()
    called = accessibility(Samples(torch.cat([real, junk])), context())
    with torch.no_grad():
        margin = build_accessibility()(junk)
    assert called.shape == (600,) and set(called) <= {0.0, 1.0}
    assert called[300:].tolist() == (margin > 0).double().tolist()
    assert called[:300].mean() > 0.3 > 0.1 > called[300:].mean()
