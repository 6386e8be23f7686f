"""The data of the task `dna` and the small statistics its recipes share."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
CELLS = ("GM12878", "HepG2", "K562", "hESCT0")
HEPG2 = CELLS.index("HepG2")
TEST, VALIDATION = 1, 2
"""Chromosomes held out: 1 is reported once at the end, 2 selects."""


class Elements:
    """All 200-bp elements.

    Attributes:
        x: (N, 200) int64 bases, A C G T = 0 1 2 3.
        y: (N,) int64 cell type, index into `CELLS`.
        chrom: (N,) int64 chromosome, X = 23, Y = 24.
    """

    def __init__(self, path: Path = HERE / "dhs_200bp.npz"):
        with np.load(path) as d:
            self.x = torch.from_numpy(d["sequence"]).long()
            self.y = torch.from_numpy(d["cell"]).long()
            self.chrom = torch.from_numpy(d["chrom"]).long()

    @property
    def train(self) -> Tensor:
        """(N,) bool, all chromosomes but 1 and 2."""
        return self.chrom > VALIDATION

    def half(self, parity: int) -> Tensor:
        """(N,) bool, training chromosomes with an even (0) or odd (1) number."""
        return self.train & (self.chrom % 2 == parity)

    def on(self, chrom: int) -> Tensor:
        """(N,) bool, elements of one chromosome."""
        return self.chrom == chrom


def one_hot(x: Tensor, classes: int = 4) -> Tensor:
    """Bases (B, L) -> (B, L, classes) float."""
    return F.one_hot(x, classes).float()


def reverse_complement(x: Tensor) -> Tensor:
    """The other strand of bases (B, L)."""
    return 3 - x.flip(1)


def either_strand(x: Tensor) -> Tensor:
    """Each sequence of (B, L) as it is or reverse-complemented, by a fair coin."""
    return torch.where(torch.rand(len(x), 1) < 0.5, reverse_complement(x), x)


def shifted(x: Tensor, reach: int) -> Tensor:
    """One-hot (B, L, 4) moved by up to `reach` bases, rows of zeros moved in."""
    b, length, _ = x.shape
    start = torch.randint(0, 2 * reach + 1, (b, 1))
    rows = start + torch.arange(length)
    return F.pad(x, (0, 0, reach, reach)).gather(1, rows[..., None].expand(-1, -1, 4))


def auroc(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve with ties counted half; score (N,), positive (N,) bool."""
    from scipy.stats import rankdata

    rank, n1, n0 = rankdata(score.numpy()), int(positive.sum()), int((~positive).sum())
    return float((rank[positive.numpy()].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


class Markov:
    """Markov model of a given order with reverse complements and add-half smoothing backed off to lower orders.

    The law of a base given its context is (count + weight * law one order lower) / (total + weight).
    """

    def __init__(self, x: Tensor, order: int, weight: float = 64.0):
        both = torch.cat([x, reverse_complement(x)])
        self.order = order
        self.laws = [torch.full((1, 4), 0.25, dtype=torch.float64)]
        for k in range(order + 1):
            words = (
                torch.bincount(self.words(both, k + 1).flatten(), minlength=4 ** (k + 1)).view(-1, 4).double()
            )
            lower = (
                self.laws[-1].repeat(4, 1) if k else self.laws[-1]
            )  # the context one base shorter: drop the first
            self.laws.append((words + weight * lower) / (words.sum(1, keepdim=True) + weight))

    @staticmethod
    def words(x: Tensor, k: int) -> Tensor:
        """Codes (B, L-k+1) of the k-mers of bases (B, L), first base most significant."""
        return sum(x[:, i : x.shape[1] - k + 1 + i] * 4 ** (k - 1 - i) for i in range(k))

    def bits(self, x: Tensor) -> Tensor:
        """Bits per base (B,) of bases (B, L); the first bases use the shorter contexts."""
        total = torch.zeros(len(x), dtype=torch.float64)
        for k in range(self.order + 1):
            words = self.words(x, k + 1)
            words = words[:, :1] if k < self.order else words
            total -= self.laws[k + 1].flatten()[words].log2().sum(1)
        return total / x.shape[1]

    def sample(self, n: int, length: int, seed: int) -> Tensor:
        """Bases (n, length) drawn from the model."""
        g = torch.Generator().manual_seed(seed)
        x = torch.zeros(n, 0, dtype=torch.long)
        for i in range(length):
            k = min(i, self.order)
            context = self.words(x[:, i - k :], k)[:, 0] if k else torch.zeros(n, dtype=torch.long)
            x = torch.cat([x, torch.multinomial(self.laws[k + 1][context], 1, generator=g)], 1)
        return x


def dinucleotide_shuffle(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shuffle bases (L,) keeping every dinucleotide count (Altschul and Erickson 1985).

    A uniformly random Eulerian walk with the same ends: a random tree of last exits towards the last base is drawn
    (by rejection; with four bases a few tries suffice), all other exits are permuted, and the walk is read off.
    """
    exits = [list(rng.permutation(x[1:][x[:-1] == b])) for b in range(4)]
    end = int(x[-1])
    while True:
        last = {b: int(rng.choice(exits[b])) for b in range(4) if exits[b] and b != end}
        if all(_leads(b, last, end) for b in last):
            break
    for b, to in last.items():
        exits[b].remove(to)
        exits[b].append(to)
    out, at = [int(x[0])], [0, 0, 0, 0]
    for _ in range(len(x) - 1):
        b = out[-1]
        out.append(int(exits[b][at[b]]))
        at[b] += 1
    return np.array(out, dtype=x.dtype)


def _leads(base: int, last: dict[int, int], end: int) -> bool:
    """Whether following the last exits from `base` arrives at `end`."""
    for _ in range(4):
        if base == end:
            return True
        base = last[base]
    return base == end


def save(net: nn.Module, name: str, meta: dict[str, str], half: bool = True) -> Path:
    """Write weights/<name>.safetensors (fp16 when `half`) with the network's configuration as metadata."""
    state = {k: v.detach().clone().contiguous() for k, v in net.state_dict().items()}
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    path = HERE / "weights" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary, metadata=meta)
    temporary.chmod(0o644)
    os.replace(temporary, path)
    return path


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.time()

    def __call__(self) -> float:
        return time.time() - self.start
