"""Rewards of the task `dna`: specificity of chromatin accessibility for HepG2, and the validity check.

The networks read one-hot or relaxed sequences (B, L, 4) and see both strands: their output is the mean over a
sequence and its reverse complement, so it does not change when the strand does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dav_bench.builtin.weights import load

CELLS = ("GM12878", "HepG2", "K562", "hESCT0")
HEPG2 = CELLS.index("HepG2")


def _conv(channels: int, out: int, kernel: int, dilation: int = 1) -> nn.Conv2d:
    """A convolution over positions, as one row in two dimensions with channels last: several times faster on a CPU."""
    conv = nn.Conv2d(
        channels, out, (1, kernel), padding=(0, dilation * (kernel // 2)), dilation=(1, dilation)
    )
    return _channels_last(conv)


def _channels_last(conv: nn.Conv2d) -> nn.Conv2d:
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    return conv


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
            _conv(i, o, k) for i, o, k in zip((4, *widths[:-1]), widths, kernels, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in widths)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(widths[-1], classes)

    def embed(self, x: Tensor) -> Tensor:
        """One strand (B, L, 4) -> what is read out (B, widths[-1])."""
        h = x.transpose(1, 2)[:, :, None]
        for conv, norm, pool in zip(self.convs, self.norms, self.pools, strict=True):
            h = norm(conv(h))
            h = F.relu(F.max_pool2d(h, (1, pool)) if pool > 1 else h)
        return h.amax((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """One strand (B, L, 4) -> logits (B, classes)."""
        return self.out(self.drop(self.embed(x)))

    def fuse(self) -> None:
        """Fold the normalisations into the convolutions, for prediction alone: the same function in less time."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            self.convs[i] = _channels_last(fuse_conv_bn_eval(conv, norm))
            self.norms[i] = nn.Identity()


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
        self.stem = _conv(4, width, kernel)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in dilations)
        self.convs = nn.ModuleList(_conv(width, width, 3, d) for d in dilations)
        self.final = nn.BatchNorm2d(width)
        self.attend = _conv(width, width, 1)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(width, classes)

    def embed(self, x: Tensor) -> Tensor:
        """One strand (B, L, 4) -> what is read out (B, width)."""
        h = F.avg_pool2d(F.relu(self.stem(x.transpose(1, 2)[:, :, None])), (1, 4))
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = h + self.drop(F.relu(conv(norm(h))))
        h = self.final(h)
        return (h * self.attend(h).softmax(3)).sum((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """One strand (B, L, 4) -> logits (B, classes)."""
        return self.out(self.drop(self.embed(x)))


NETWORKS: dict[str, type[nn.Module]] = {"pooled-conv": PooledConv, "dilated-attention": DilatedAttention}


class BothStrands(nn.Module):
    """Mean of a network's output over a sequence and its reverse complement."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Sequences (B, L, 4), bases in the order A C G T -> logits (B, classes)."""
        return self._mean(self.net, x)

    def embed(self, x: Tensor) -> Tensor:
        """Sequences (B, L, 4) -> what is read out (B, width), by a linear map: its mean over strands."""
        return self._mean(self.net.embed, x)

    @staticmethod
    def _mean(of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return of(torch.cat([x, x.flip(1, 2)])).unflatten(0, (2, len(x))).mean(0)


def specificity(logits: Tensor, cell: int = HEPG2) -> Tensor:
    """Log-odds (B,) of one cell type against the others, from logits (B, classes): l_c - logsumexp(l_others)."""
    others = torch.cat([logits[:, :cell], logits[:, cell + 1 :]], 1)
    return logits[:, cell] - others.logsumexp(1)


class Specificity(nn.Module):
    """Log-odds that an open element is open in HepG2 rather than in one of three other cell types (nats).

    Specificity of accessibility, not measured activity.
    """

    domain = "sequence"
    provides = frozenset({"reward.grad", "reward.features"})

    def __init__(self, net: nn.Module):
        super().__init__()
        self.both = BothStrands(net)

    def forward(self, sample: Tensor, cond: Any = None) -> Tensor:
        """Sequences (B, L, 4), one-hot or relaxed -> (B,)."""
        return specificity(self.both(sample))

    def features(self, sample: Tensor) -> Tensor:
        """Sequences (B, L, 4), one-hot or relaxed -> (B, width) what the network reads its logits from."""
        return self.both.embed(sample)

    def head(self, features: Tensor, cond: Any = None) -> Tensor:
        """Features (B, width) -> (B,)."""
        return specificity(self.both.net.out(features))


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
    net.eval().requires_grad_(False)
    if isinstance(net, PooledConv):
        net.fuse()
    return net, meta


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
