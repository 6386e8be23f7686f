"""Enformer oracles of the Gosai set: activity in three cell lines, open chromatin in seven (dav.md F.4, F.5).

The architecture is gReLU's Enformer at an input of 200 bp (Avsec et al. 2021).  Attribute names are the keys of
the published checkpoints; nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dav_bench.builtin.checkpoints import fill, load_checkpoint, state_dict
from dav_bench.builtin.gosai import ATAC, CELLS, HELDOUT, ORACLE, Artefact, GosaiReward
from dav_bench.errors import DavBenchError

ENFORMER_TYPES = ("EnformerModel", "EnformerPretrainedModel")
ATAC_TASKS, ATAC_HEPG2 = 7, 1


@dataclass(frozen=True)
class EnformerShape:
    """Sizes under the names of gReLU's `model_params`."""

    n_tasks: int = 3
    """Outputs."""
    n_conv: int = 7
    """Convolution blocks, each of which halves the length."""
    channels: int = 1536
    """Channels of the trunk."""
    n_transformers: int = 11
    """Transformer blocks."""
    n_heads: int = 8
    """Attention heads."""
    key_len: int = 64
    """Width of a key."""

    @property
    def widths(self) -> list[int]:
        """Channels after the stem and after each block: geometric from half to full, in multiples of 128."""
        half, steps = self.channels // 2, self.n_conv - 2
        grown = [half * 2 ** (i / steps) for i in range(steps + 1)]
        return [half, *(128 * round(g / 128) for g in grown)]


class Wrapped(nn.Module):
    """gReLU keeps single layers under the name `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class AttentionPool(nn.Module):
    """Weighted mean of neighbouring pairs, the weights from a 1x1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_attn_logits = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) -> (B, C, ceil(L / 2))."""
        odd = x.shape[-1] % 2
        pairs = F.pad(x, (0, odd)).unflatten(-1, (-1, 2))
        logits = self.to_attn_logits(pairs)
        if odd:  # the padded partner of the last position gets no weight
            padded = torch.zeros_like(logits, dtype=torch.bool)
            padded[..., -1, 1] = True
            logits = logits.masked_fill(padded, -torch.finfo(logits.dtype).max)
        return (pairs * logits.softmax(-1)).sum(-1)


def gelu(x: Tensor) -> Tensor:
    """Enformer's approximation x · sigmoid(1.702 x)."""
    return x * (1.702 * x).sigmoid()


class ConvBlock(nn.Module):
    """Batch norm, gelu, convolution; `pool` makes it residual and halves the length."""

    def __init__(self, inside: int, outside: int, kernel: int = 1, pool: bool = False) -> None:
        super().__init__()
        self.norm = Wrapped(nn.BatchNorm1d(inside))
        self.conv = nn.Conv1d(inside, outside, kernel, padding=kernel // 2)
        if pool:
            self.pool = Wrapped(AttentionPool(outside))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(gelu(self.norm(x)))
        return self.pool(x + h) if hasattr(self, "pool") else h


def relative_features(length: int, count: int, like: Tensor) -> Tensor:
    """(2 length − 1, count) features of the distances −length + 1 … length − 1.

    A sixth each: exponential decay, central mask and gamma density of the distance, then each times its sign.
    """
    n = count // 6
    position = torch.arange(-length + 1, length, device=like.device)
    away = position.abs().to(like.dtype)[:, None]
    half_life = 2 ** torch.linspace(3.0, math.log2(length), n, device=like.device, dtype=like.dtype)
    width = 2 ** torch.arange(1, n + 1, device=like.device).to(like.dtype) - 1
    mean = torch.linspace(length / n, length, n, device=like.device, dtype=like.dtype)
    spread = length / (2 * n)
    shape, rate = (mean / spread) ** 2, mean / spread**2
    density = torch.xlogy(shape - 1, away) - rate * away - (shape.lgamma() - shape * rate.log())
    gamma = density.exp() + 1e-8
    even = torch.cat(
        [torch.exp(-math.log(2.0) / half_life * away), width > away, gamma / gamma.amax(-1, keepdim=True)], -1
    )
    return torch.cat([even, position.sign()[:, None] * even], -1)


class RelativeAttention(nn.Module):
    """Multi-head attention with a term for the relative position (Transformer-XL)."""

    def __init__(self, width: int, heads: int, key: int) -> None:
        super().__init__()
        self.heads, self.features = heads, width // heads
        self.to_q = nn.Linear(width, key * heads, bias=False)
        self.to_k = nn.Linear(width, key * heads, bias=False)
        self.to_v = nn.Linear(width, width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.to_rel_k = nn.Linear(self.features, key * heads, bias=False)
        self.rel_content_bias = nn.Parameter(torch.zeros(1, heads, 1, key))
        self.rel_pos_bias = nn.Parameter(torch.zeros(1, heads, 1, key))

    def _split(self, x: Tensor) -> Tensor:
        """(..., L, heads * d) -> (..., heads, L, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        length = x.shape[1]
        q, k, v = self._split(self.to_q(x)), self._split(self.to_k(x)), self._split(self.to_v(x))
        q = q * k.shape[-1] ** -0.5
        away = self._split(self.to_rel_k(relative_features(length, self.features, x)))
        place = torch.arange(length, device=x.device)
        index = place[None, :] - place[:, None] + length - 1  # row of the distance j − i
        by_distance = (q + self.rel_pos_bias) @ away.transpose(-1, -2)
        by_place = by_distance.gather(-1, index.expand(*by_distance.shape[:2], -1, -1))
        weight = ((q + self.rel_content_bias) @ k.transpose(-1, -2) + by_place).softmax(-1)
        return self.to_out((weight @ v).transpose(1, 2).flatten(2))


class Dense(nn.Module):
    """A linear layer after an optional layer norm."""

    def __init__(self, inside: int, outside: int, norm: bool) -> None:
        super().__init__()
        self.norm = Wrapped(nn.LayerNorm(inside)) if norm else nn.Identity()
        self.linear = nn.Linear(inside, outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class TransformerBlock(nn.Module):
    """Attention and two dense layers, each added to its input; dropout of training is left out."""

    def __init__(self, shape: EnformerShape) -> None:
        super().__init__()
        width = shape.channels
        self.norm = Wrapped(nn.LayerNorm(width))
        self.mha = RelativeAttention(width, shape.n_heads, shape.key_len)
        self.ffn = nn.ModuleDict(
            {"dense1": Dense(width, 2 * width, True), "dense2": Dense(2 * width, width, False)}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mha(self.norm(x))
        return x + self.ffn["dense2"](F.relu(self.ffn["dense1"](x)))


def _blocks(*blocks: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks)})


class Enformer(nn.Module):
    """Sequences (B, 4, L) in the order A C G T -> outputs (B, tasks, 1), before the activation of the task.

    229,854,723 parameters at full size.
    """

    def __init__(self, shape: EnformerShape) -> None:
        super().__init__()
        widths, width, self.tasks = shape.widths, shape.channels, shape.n_tasks
        stem = nn.Sequential(
            nn.Conv1d(4, widths[0], 15, padding=7), ConvBlock(widths[0], widths[0], pool=True)
        )
        tower = [nn.Sequential(ConvBlock(i, o, 5), ConvBlock(o, o, pool=True)) for i, o in pairwise(widths)]
        self.embedding = nn.ModuleDict(
            {
                "conv_tower": _blocks(stem, *tower),
                "transformer_tower": _blocks(*(TransformerBlock(shape) for _ in range(shape.n_transformers))),
                "pointwise_conv": ConvBlock(width, 2 * width),
            }
        )
        conv = Wrapped(nn.Conv1d(2 * width, shape.n_tasks, 1))
        self.head = nn.ModuleDict({"channel_transform": nn.ModuleDict({"conv": conv})})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.embedding["conv_tower"]["blocks"]:  # type: ignore[index]
            x = block(x)
        x = x.transpose(1, 2)
        for block in self.embedding["transformer_tower"]["blocks"]:  # type: ignore[index]
            x = block(x)
        x = gelu(self.embedding["pointwise_conv"](x.transpose(1, 2)))
        return self.head["channel_transform"]["conv"](x).mean(-1, keepdim=True)  # type: ignore[index]


def read_shape(content: Mapping[str, Any], path: Path, artefact: Artefact) -> EnformerShape:
    """The sizes in a gReLU checkpoint's `hyper_parameters`; a type that is no Enformer is refused by name."""
    hyper = content.get("hyper_parameters")
    params = hyper.get("model_params") if isinstance(hyper, dict) else None
    if not isinstance(params, dict) or "model_type" not in params:
        raise DavBenchError(
            f"{path} is no gReLU checkpoint",
            "it has no hyper_parameters.model_params.model_type",
            artefact.fix,
        )
    kind = params["model_type"]
    if kind not in ENFORMER_TYPES:
        raise DavBenchError(
            f"{path} holds a model of type {kind!r}, which cannot be loaded",
            f"supported are {' and '.join(ENFORMER_TYPES)}",
            artefact.fix,
        )
    sizes = {name: params[name] for name in EnformerShape.__dataclass_fields__ if name in params}
    if "n_tasks" not in sizes or not all(type(size) is int and size > 0 for size in sizes.values()):
        raise DavBenchError(f"{path} states no usable sizes", f"model_params: {params}", artefact.fix)
    if params.get("crop_len", 0) or params.get("final_pool_func", "avg") != "avg":
        raise DavBenchError(
            f"{path} crops or pools its output as is not supported", str(params), artefact.fix
        )
    return EnformerShape(**sizes)


def load_enformer(path: Path, artefact: Artefact) -> tuple[Enformer, str]:
    """The network, frozen, and its task: "regression" or "binary"."""
    content = load_checkpoint(path, artefact.what, artefact.fix)
    with torch.device("meta"):  # 0.9 GB at full size: the tensors of the file take its place
        network = Enformer(read_shape(content, path, artefact))
    fill(network, state_dict(content, "model.", artefact.what), artefact.what, artefact.fix, assign=True)
    train = content["hyper_parameters"].get("train_params")
    task = train.get("task") if isinstance(train, dict) else None
    return network.float().requires_grad_(False), str(task)


class Activity(nn.Module):
    """Predicted activity (log2 fold change of MPRA) in one cell line."""

    domain = "sequence"
    provides = frozenset({"reward.grad"})

    def __init__(self, network: nn.Module, cell: str = "hepg2") -> None:
        super().__init__()
        self.network, self.column = network, CELLS.index(cell)

    def forward(self, sample: Tensor, cond: Any = None) -> Tensor:
        """Sequences (B, L, 4), one-hot or relaxed -> (B,)."""
        return self.network(sample.transpose(1, 2))[:, self.column, 0]


class OpenChromatin(nn.Module):
    """Probability (B, 7) of open chromatin in seven cell lines; HepG2 is column 1."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor) -> Tensor:
        return self.network(sample.transpose(1, 2))[..., 0].sigmoid()


def _activity(c: GosaiReward, artefact: Artefact) -> Activity:
    path = artefact.locate(c.path)
    network, task = load_enformer(path, artefact)
    if task != "regression" or network.tasks != len(CELLS):
        raise DavBenchError(
            f"{path} is no activity oracle",
            f"it has {network.tasks} outputs of task {task!r}; {len(CELLS)} of a regression are needed",
            artefact.fix,
        )
    return Activity(network, c.cell).eval()


def build(c: GosaiReward) -> Activity:
    """The reward `gosai-hepg2`, a Gosai-2023 activity oracle."""
    return _activity(c, ORACLE)


def build_heldout(c: GosaiReward) -> Activity:
    """The reward `gosai-hepg2-heldout`: the oracle trained on the other chromosomes."""
    return _activity(c, HELDOUT)


def load_atac(path: str = "") -> OpenChromatin:
    """The classifier of open chromatin: an Enformer with 7 sigmoid outputs; any other is refused."""
    found = ATAC.locate(path)
    network, task = load_enformer(found, ATAC)
    if task != "binary" or network.tasks != ATAC_TASKS:
        raise DavBenchError(
            f"{found} is not the ATAC classifier",
            f"it has {network.tasks} outputs of task {task!r}; {ATAC_TASKS} binary ones are needed",
            ATAC.fix,
        )
    return OpenChromatin(network).eval()
