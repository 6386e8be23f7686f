"""Masked diffusion language model of short DNA sequences (MDLM, Sahoo et al. 2024), small enough for a CPU.

The network reads a state of one-hot rows (mask last, possibly relaxed) and predicts the clean bases. It is not told
the time: the number of masks shows in the state, and equal states can share a forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dav_bench.builtin.weights import load
from dav_bench.core.model import Model
from dav_bench.core.process import MaskedProcess
from dav_bench.tasks import asset

BASES, LENGTH = "ACGT", 200
DEFAULT = "generator"
"""Weights used unless others are named."""


class Conv(nn.Conv2d):
    """Convolution over positions, (B, P, inputs) -> (B, P, outputs), padded with zeros to keep the length.

    It is two-dimensional with one row and keeps channels last: on a CPU that is almost twice as fast as `Conv1d`.

    Args:
        inputs: channels read.
        outputs: channels written.
        kernel: width of the filters, odd.
        dilation: spacing of the filters' taps.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1):
        super().__init__(
            inputs, outputs, (1, kernel), padding=(0, dilation * (kernel // 2)), dilation=(1, dilation)
        )
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, inputs) -> (B, P, outputs)."""
        return super().forward(x.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)


class Block(nn.Module):
    """Residual dilated convolution whose hidden units also see the mean over all positions.

    Args:
        width: channels.
        kernel: width of the filters, odd.
        dilation: spacing of the filters' taps.
    """

    def __init__(self, width: int, kernel: int, dilation: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = Conv(width, width, kernel, dilation)
        self.whole = nn.Linear(width, width)
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, width) -> (B, P, width)."""
        h = self.norm(x)
        return x + self.mix(F.relu(self.conv(h) + self.whole(h.mean(1, keepdim=True))))


class Memory(nn.Module):
    """Associative memory of words: each word found, if only in part, votes for its own bases where it was found.

    Windows are read every `stride` bases by one filter per word, and the votes of overlapping windows add up. Filters
    and votes are ordinary weights; `remember` starts them from words counted in data.

    Args:
        words: number of words.
        span: bases of a word, a multiple of `stride`, and `span - stride` even.
        stride: distance of the windows; divides the length.
        vocab: number of bases, without the mask.
    """

    def __init__(self, words: int, span: int, stride: int, vocab: int = len(BASES)):
        super().__init__()
        self.span, self.stride, self.vocab = span, stride, vocab
        self.read = nn.Linear((vocab + 1) * span, words)
        self.write = nn.Linear(words, span * vocab, bias=False)

    @torch.no_grad()
    def remember(self, counts: Tensor, prior: float = 7.0) -> None:
        """Read log-odds against uniform bases, masks being no evidence, and vote with them.

        Args:
            counts: bases seen at each place of each word, (words, span, V).
            prior: nats of evidence before a word begins to vote; six more and it votes in full.
        """
        total = counts.sum(-1, keepdim=True)
        rare = 0.25 + 0.02 * total  # one base in fifty differs, and the counts are few
        odds = ((counts + rare) / (total + self.vocab * rare) * self.vocab).log()
        self.read.weight.copy_(F.pad(odds, (0, 1)).transpose(1, 2).flatten(1))
        self.read.bias.fill_(-prior)
        self.write.weight.copy_((odds - odds.mean(-1, keepdim=True)).flatten(1).T)

    def forward(self, x: Tensor) -> Tensor:
        """States (B, L, V+1) -> votes (B, L, V), in nats."""
        b, length, _ = x.shape
        side, parts = (self.span - self.stride) // 2, self.span // self.stride
        windows = F.pad(x, (0, 0, side, side)).unfold(1, self.span, self.stride).flatten(2)
        found = F.relu6(self.read(windows), inplace=True)  # large, so not worth a copy
        votes = self.write(found).view(b, -1, parts, self.stride * self.vocab)
        total = sum(F.pad(votes[:, :, i], (0, 0, i, parts - 1 - i)) for i in range(parts))
        return total.reshape(b, -1, self.vocab)[:, side : side + length] / 6


class Hourglass(nn.Module):
    """Denoiser with a memory of words, a thin single-base stem and read-out, and a wide trunk on patches.

    The trunk holds most parameters at a fraction of their cost on single bases; stem and read-out see every base in
    its own frame, which patches alone do not. The memory's votes enter the stem beside the state, and the logits.

    Args:
        thin: channels of stem and read-out.
        width: channels of the trunk.
        kernel: width of the trunk's filters in patches, odd.
        dilations: one residual block of the trunk each.
        patch: bases that the trunk sees as one position; divides the length.
        stem: width of the stem's filters in bases, odd.
        readout: width of the read-out's filters in bases, odd.
        words: words in memory.
        span: bases of a word.
        stride: distance of the windows compared with words.
        vocab: number of bases, without the mask.
    """

    time_input = False

    def __init__(
        self,
        thin: int = 48,
        width: int = 128,
        kernel: int = 5,
        dilations: tuple[int, ...] = (1, 2, 4, 1),
        patch: int = 4,
        stem: int = 9,
        readout: int = 7,
        words: int = 1024,
        span: int = 28,
        stride: int = 4,
        vocab: int = len(BASES),
    ):
        super().__init__()
        self.patch = patch
        self.memory = Memory(words, span, stride, vocab)
        self.trust = nn.Parameter(torch.tensor(0.3))
        self.stem = Conv(2 * vocab + 1, thin, stem)
        self.down = nn.Linear(patch * thin, width)
        self.blocks = nn.Sequential(*(Block(width, kernel, d) for d in dilations))
        self.norm_wide = nn.LayerNorm(width)
        self.up = nn.Linear(width, patch * thin)
        self.norm_thin = nn.LayerNorm(thin)
        self.readout = Conv(thin, thin, readout)
        self.out = nn.Linear(thin, vocab)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """States (B, L, V+1) -> logits (B, L, V) of the clean bases; the time t (B,) is not used."""
        b, length, _ = x.shape
        votes = self.memory(x)
        h = F.relu(self.stem(torch.cat([x.to(votes.dtype), votes], -1)), inplace=True)
        wide = self.blocks(self.down(h.reshape(b, length // self.patch, -1)))
        h = h + self.up(self.norm_wide(wide)).reshape(b, length, -1)
        return self.out(h + F.relu(self.readout(self.norm_thin(h)))) + self.trust * votes


NETWORKS: dict[str, type[nn.Module]] = {"hourglass": Hourglass}


def network(weights: str) -> tuple[nn.Module, dict[str, Any]]:
    """The denoiser of a weights file (name or path) and the file's metadata."""
    state, meta = load(weights)
    net = NETWORKS[meta["network"]](**meta["config"])
    net.load_state_dict(state)
    return net.eval(), meta


def real(split: str, cell: str = "HepG2") -> Tensor:
    """Real elements of one cell type, (n, L, V) one-hot.

    Args:
        split: "test" (chromosome 1), "validation" (chromosome 2) or "train" (the rest).
        cell: GM12878, HepG2, K562 or hESCT0.
    """
    with np.load(asset("dna", "dhs_200bp.npz")) as d:
        chrom = d["chrom"]
        rows = {"test": chrom == 1, "validation": chrom == 2, "train": chrom > 2}[split]
        names = [str(name).partition("_")[0] for name in d["cells"]]
        bases = d["sequence"][rows & (d["cell"] == names.index(cell))]
    return F.one_hot(torch.from_numpy(bases).long(), len(BASES)).float()


def build(c: Any, sampler: Mapping[str, Any]) -> Model:
    """The model `mdlm-dna`: a generator of all four cell types' elements; its real samples are those of HepG2."""
    net, _ = network(getattr(c, "weights", "") or DEFAULT)
    process = MaskedProcess(LENGTH, len(BASES), steps=int(sampler.get("steps", 64)))
    return Model(net, process, "sequence", data=real, name="mdlm-dna")
