"""Rewards of the task `dna`: specificity of chromatin accessibility for HepG2, and the validity check.

The networks read one-hot or relaxed sequences (B, L, 4) and see both strands: their output is the mean over a
sequence and its reverse complement, so it does not change when the strand does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dav_bench.builtin.weights import load

CELLS = ("GM12878", "HepG2", "K562", "hESCT0")
HEPG2 = CELLS.index("HepG2")


class PooledConv(nn.Module):
    """Convolutions with pooling between them, then the maximum over positions: small and fast.

    Args:
        widths: channels of each layer.
        kernels: width of each layer's filters, odd.
        pools: positions pooled after each layer.
        classes: number of outputs.
        dropout: share of pooled features dropped in training.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (96, 64, 64),
        kernels: tuple[int, ...] = (15, 7, 5),
        pools: tuple[int, ...] = (4, 2, 1),
        classes: int = len(CELLS),
        dropout: float = 0.3,
    ):
        super().__init__()
        self.pools = tuple(pools)
        self.convs = nn.ModuleList(
            nn.Conv1d(i, o, k, padding=k // 2) for i, o, k in zip((4, *widths), widths, kernels, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(o) for o in widths)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """One strand (B, L, 4) -> logits (B, classes)."""
        h = x.transpose(1, 2)
        for conv, norm, pool in zip(self.convs, self.norms, self.pools, strict=True):
            h = F.relu(norm(conv(h)))
            h = F.max_pool1d(h, pool) if pool > 1 else h
        return self.out(self.drop(h.amax(2)))


class DilatedAttention(nn.Module):
    """Residual dilated convolutions on averages of four positions, read out by attention: unlike `PooledConv` in kind.

    Args:
        width: channels.
        kernel: width of the first filters, odd.
        dilations: spacing of the three-wide filters of each residual block.
        classes: number of outputs.
        dropout: share of features dropped in training.
    """

    def __init__(
        self,
        width: int = 96,
        kernel: int = 19,
        dilations: tuple[int, ...] = (1, 2, 4, 8),
        classes: int = len(CELLS),
        dropout: float = 0.3,
    ):
        super().__init__()
        self.stem = nn.Conv1d(4, width, kernel, padding=kernel // 2)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in dilations)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, padding=d, dilation=d) for d in dilations)
        self.final = nn.BatchNorm1d(width)
        self.attend = nn.Conv1d(width, width, 1)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """One strand (B, L, 4) -> logits (B, classes)."""
        h = F.avg_pool1d(F.relu(self.stem(x.transpose(1, 2))), 4)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = h + self.drop(F.relu(conv(norm(h))))
        h = self.final(h)
        return self.out(self.drop((h * self.attend(h).softmax(2)).sum(2)))


NETWORKS: dict[str, type[nn.Module]] = {"pooled-conv": PooledConv, "dilated-attention": DilatedAttention}


class BothStrands(nn.Module):
    """Mean of a network's output over a sequence and its reverse complement."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Sequences (B, L, 4), bases in the order A C G T -> logits (B, classes)."""
        return self.net(torch.cat([x, x.flip(1, 2)])).unflatten(0, (2, len(x))).mean(0)


def specificity(logits: Tensor, cell: int = HEPG2) -> Tensor:
    """Log-odds (B,) of one cell type against the others, from logits (B, classes): l_c - logsumexp(l_others)."""
    others = torch.cat([logits[:, :cell], logits[:, cell + 1 :]], 1)
    return logits[:, cell] - others.logsumexp(1)


class Specificity(nn.Module):
    """Log-odds that an open element is open in HepG2 rather than in one of three other cell types (nats).

    Specificity of accessibility, not measured activity.
    """

    domain = "sequence"
    provides = frozenset({"reward.grad"})

    def __init__(self, net: nn.Module):
        super().__init__()
        self.both = BothStrands(net)

    def forward(self, sample: Tensor, cond: Any = None) -> Tensor:
        """Sequences (B, L, 4), one-hot or relaxed -> (B,)."""
        return specificity(self.both(sample))


class Accessibility(nn.Module):
    """Log-odds that a sequence is open chromatin in HepG2 at all, minus the threshold of the model card.

    Positive means open. The threshold lets through 5 % of the negatives of chromosome 2.
    """

    domain = "sequence"
    provides = frozenset({"reward.grad"})

    def __init__(self, net: nn.Module, threshold: float):
        super().__init__()
        self.both = BothStrands(net)
        self.threshold = threshold

    def forward(self, sample: Tensor, cond: Any = None) -> Tensor:
        """Sequences (B, L, 4), one-hot or relaxed -> (B,)."""
        return self.both(sample)[:, HEPG2] - self.threshold


def _network(c: Any, default: str) -> tuple[nn.Module, dict[str, Any]]:
    state, meta = load(getattr(c, "weights", "") or default)
    net = NETWORKS[meta["network"]](**meta["config"])
    net.load_state_dict(state)
    return net.eval().requires_grad_(False), meta


def build_specificity(c: Any = None) -> Specificity:
    """The reward `hepg2-specificity`."""
    return Specificity(_network(c, "specificity")[0])


def build_heldout(c: Any = None) -> Specificity:
    """The held-out reward `hepg2-specificity-heldout`: other architecture, seed and chromosomes."""
    return Specificity(_network(c, "specificity-heldout")[0])


def build_accessibility(c: Any = None) -> Accessibility:
    """The validity check `accessibility`."""
    net, meta = _network(c, "accessibility")
    return Accessibility(net, float(meta["threshold"]))
