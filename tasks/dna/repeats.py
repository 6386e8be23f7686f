"""Words that recur in the elements: pieces of interspersed repeats, which a small network finds too slowly by itself.

One element in ten lies in a repeat (LTR7 of HERV-H, Alu, ...), and there a base costs far fewer bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dhs import Markov, reverse_complement
from torch import Tensor


def recurring(x: Tensor, n: int, span: int, seed: int = 16, apart: int = 8, least: int = 6) -> Tensor:
    """Counts (n, span, 4) of the bases in and around the words that recur most in bases (N, L), most frequent first.

    Greedy: the seed found most often is taken with its reverse complement, the bases around all its places are
    counted, and seeds that start less than `apart` bases from one of these places no longer count there.

    Args:
        x: bases.
        n: words, even: each comes with its reverse complement.
        span: bases of a word; `span - seed` is even.
        seed: bases that must agree exactly.
        apart: distance of the words that cover one repeat.
        least: places that make a seed worth taking.

    Raises:
        ValueError: fewer than n words recur.
    """
    both, side = torch.cat([x, reverse_complement(x)]), (span - seed) // 2
    codes = Markov.words(both, seed)
    rows, places = codes.shape
    _, kind, count = codes.flatten().unique(return_inverse=True, return_counts=True)
    often = count >= least
    kind = torch.where(often, often.cumsum(0) - 1, -1)[kind]  # rare seeds are -1
    count = count[often]
    found = (kind >= 0).nonzero()[:, 0]
    found = found[kind[found].argsort(stable=True)].split(count.tolist())
    # A word's ends may lie outside an element, where nothing is counted.
    bases = F.pad(both[..., None] == torch.arange(4), (0, 0, side, side))
    open_, words = kind >= 0, list[Tensor]()
    while len(words) < n:
        best = int(count.argmax())
        if not count[best]:
            raise ValueError(f"only {len(words)} words recur {least} times")
        at = found[best][open_[found[best]]]
        row, place = at // places, at % places
        word = bases[row[:, None], place[:, None] + torch.arange(span)].sum(0)
        words += [word, word.flip(0, 1)]
        mirrored = (row + len(x)) % rows, places - 1 - place
        for r, p in ((row, place), mirrored):
            near = (p[:, None] + torch.arange(1 - apart, apart)).clamp(0, places - 1)
            near = (r[:, None] * places + near).unique()
            near = near[open_[near]]
            open_[near] = False
            count -= torch.bincount(kind[near], minlength=len(count))
    return torch.stack(words[:n]).float()
