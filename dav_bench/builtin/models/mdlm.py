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
DEFAULT = "generator-fast"
"""Weights used unless others are named: the generator that a CPU samples in minutes."""


class Block(nn.Module):
    """Residual dilated convolution whose hidden units also see the mean over all positions.

    The convolution is two-dimensional with one row and keeps channels last: on a CPU that runs at almost twice the
    speed of `Conv1d`.

    Args:
        width: channels.
        kernel: width of the filters, odd.
        dilation: spacing of the filters' taps.
    """

    def __init__(self, width: int, kernel: int, dilation: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv2d(
            width, width, (1, kernel), padding=(0, dilation * (kernel // 2)), dilation=(1, dilation)
        )
        self.whole = nn.Linear(width, width)
        self.mix = nn.Linear(width, width)
        self.conv.weight.data = self.conv.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, width) -> (B, P, width)."""
        h = self.norm(x)
        local = self.conv(h.transpose(1, 2)[:, :, None])[:, :, 0].transpose(1, 2)
        return x + self.mix(F.relu(local + self.whole(h.mean(1, keepdim=True))))


class ConvDenoiser(nn.Module):
    """Convolutional denoiser that works on patches of neighbouring bases, which divides its cost per parameter.

    Args:
        width: channels.
        kernel: width of the filters in patches, odd.
        dilations: one residual block each.
        patch: bases read and written together; divides the length.
        vocab: number of bases, without the mask.
    """

    time_input = False

    def __init__(
        self,
        width: int = 96,
        kernel: int = 7,
        dilations: tuple[int, ...] = (1, 2, 4, 1),
        patch: int = 2,
        vocab: int = len(BASES),
    ):
        super().__init__()
        self.patch, self.vocab = patch, vocab
        self.embed = nn.Linear(patch * (vocab + 1), width, bias=False)
        self.blocks = nn.Sequential(*(Block(width, kernel, d) for d in dilations))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, patch * vocab)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """States (B, L, V+1) -> logits (B, L, V) of the clean bases; the time t (B,) is not used."""
        b, length, _ = x.shape
        h = self.embed(x.reshape(b, length // self.patch, -1))
        return self.out(self.norm(self.blocks(h))).reshape(b, length, self.vocab)


NETWORKS: dict[str, type[nn.Module]] = {"conv-denoiser": ConvDenoiser}


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
