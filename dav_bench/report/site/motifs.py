"""Where known motifs match in DNA, so that a page can colour them: the definition of `motif-corr`, hit by hit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from dav_bench.builtin.metrics.motifs import score_matrix, threshold

BASES = "ACGT"


@dataclass(frozen=True)
class Hit:
    """One window that a motif matches."""

    start: int
    """First base, from 0."""
    end: int
    """One past the last base."""
    name: str
    """Name of the factor."""
    group: str
    """liver or other."""
    strand: str
    """+, - or both."""
    score: float
    """Log-odds in bits."""


@lru_cache(maxsize=4)
def _motifs(path: Path) -> tuple[tuple[str, str, np.ndarray, int], ...]:
    held = json.loads(path.read_text())["motifs"]
    scores = [score_matrix(np.array(m["counts"], float)) for m in held]
    return tuple((m["name"], m["group"], s, threshold(s)) for m, s in zip(held, scores, strict=True))


def hits(sequence: str, path: Path) -> list[Hit]:
    """All windows of a sequence that a motif of the file matches on either strand, by position.

    Args:
        sequence: Letters A, C, G, T.
        path: A motif file such as tasks/dna/motifs.json.
    """
    ids = np.array([BASES.find(base) for base in sequence.upper()])
    if (ids < 0).any():
        return []
    found = []
    for name, group, scores, least in _motifs(path):
        width = scores.shape[1]
        windows = np.lib.stride_tricks.sliding_window_view(ids, width) if len(ids) >= width else ids[:0, None]
        place = np.arange(width)
        forward, backward = (s[windows, place].sum(1) for s in (scores, scores[::-1, ::-1]))
        for start in np.flatnonzero(np.maximum(forward, backward) >= least):
            strands = (forward[start] >= least, backward[start] >= least)
            strand = "both" if all(strands) else "+" if strands[0] else "-"
            best = float(max(forward[start], backward[start])) / 100
            found.append(Hit(int(start), int(start) + width, name, group, strand, best))
    return sorted(found, key=lambda h: (h.start, h.end, h.name))


def pieces(sequence: str, found: Sequence[Hit]) -> list[tuple[str, list[Hit]]]:
    """The sequence cut wherever the set of matching motifs changes: text and the hits that cover it."""
    cuts = sorted({0, len(sequence), *(h.start for h in found), *(h.end for h in found)})
    return [(sequence[a:b], [h for h in found if h.start <= a and h.end >= b]) for a, b in pairwise(cuts)]
