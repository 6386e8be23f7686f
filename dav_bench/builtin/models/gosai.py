"""The masked diffusion model of 200-bp enhancers that SVDD, DRAKES and DAV start from (dav.md F.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dav_bench.builtin.checkpoints import fill, load_checkpoint, state_dict
from dav_bench.builtin.gosai import DENOISER, GosaiModel
from dav_bench.core.model import Model
from dav_bench.core.process import MaskedProcess
from dav_bench.errors import DavBenchError

LENGTH, BASES = 200, 4


class FourierFeatures(nn.Module):
    """sin and cos of 2πσW with fixed random frequencies W."""

    def __init__(self, width: int, scale: float = 30.0) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(width // 2) * scale, requires_grad=False)

    def forward(self, sigma: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        angle = 2 * math.pi * sigma[:, None] * self.W
        return torch.cat([angle.sin(), angle.cos()], -1)


class DnaConv(nn.Module):
    """Twenty residual convolutions of width 9, dilated by 1, 4, 16 and 64 (MDLM's `dnaconv`).

    The dilations are grouped, not cycled: two stacks of 1, then one of each other.  Attribute names are the keys
    of the published checkpoint.

    Args:
        hidden: channels.
        stacks: layers for each of the five kinds of convolution.
        time_input: whether the noise level is fed; the published model was trained with 0.
    """

    def __init__(self, hidden: int = 128, stacks: int = 4, time_input: bool = False) -> None:
        super().__init__()
        self.time_input = time_input
        dilations = [d for d in (1, 1, 4, 16, 64) for _ in range(stacks)]
        self.linear = nn.Conv1d(BASES + 1, hidden, 9, padding=4)
        self.time_embedder = nn.Sequential(FourierFeatures(hidden), nn.Linear(hidden, hidden))
        self.convs = nn.ModuleList(nn.Conv1d(hidden, hidden, 9, padding=4 * d, dilation=d) for d in dilations)
        self.time_layers = nn.ModuleList(
            nn.ModuleDict({"dense": nn.Linear(hidden, hidden)}) for _ in dilations
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in dilations)
        self.final_conv = nn.Sequential(
            nn.Conv1d(hidden, hidden, 1), nn.ReLU(), nn.Conv1d(hidden, BASES + 1, 1)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """States (B, L, 5), one-hot or relaxed, at mask probabilities t (B,) -> base logits (B, L, 4).

        The fifth output is the mask, to which SUBS gives no probability.
        """
        # 1 − e^−σ is the mask probability, at most .999 in training
        sigma = -torch.log1p(-t.clamp(max=0.999)) if self.time_input else torch.zeros_like(t)
        time = F.relu(self.time_embedder(sigma))
        h = F.relu(self.linear(x.transpose(1, 2)))
        for conv, dense, norm in zip(self.convs, self.time_layers, self.norms, strict=True):
            shifted = h.transpose(1, 2) + dense["dense"](time)[:, None]  # type: ignore[index]
            h = h + F.relu(conv(norm(shifted).transpose(1, 2)))
        return self.final_conv(h).transpose(1, 2)[..., :BASES]


def load_dnaconv(path: Path, weights: str = "raw", time_input: bool = False) -> DnaConv:
    """Read a Lightning checkpoint or a bare state dict; `weights="ema"` takes the average beside it.

    The release loads the raw weights: its average is restored but never copied in (dav.md E19).
    """
    content = load_checkpoint(path, DENOISER.what, DENOISER.fix)
    network = DnaConv(time_input=time_input)
    fill(network, state_dict(content, "backbone.", DENOISER.what), DENOISER.what, DENOISER.fix)
    if weights == "ema":
        _average(network, content, path)
    return network


def _average(network: DnaConv, content: Mapping[str, Any], path: Path) -> None:
    """Copy `ema.shadow_params`, a list of the trainable parameters in order."""
    ema = content.get("ema")
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    own = [p for p in network.parameters() if p.requires_grad]
    if not isinstance(shadow, list) or [getattr(s, "shape", None) for s in shadow] != [p.shape for p in own]:
        raise DavBenchError(
            f"{path} holds no average of the weights",
            f"ema.shadow_params must list {len(own)} tensors of the network's shapes",
            "--set model.weights=raw",
        )
    with torch.no_grad():
        for parameter, value in zip(own, shadow, strict=True):
            parameter.copy_(value)


def build(c: GosaiModel, sampler: Mapping[str, Any]) -> Model:
    """The model `gosai`: `dnaconv` with published weights in a masked process over 200 bases."""
    network = load_dnaconv(DENOISER.locate(c.path), c.weights, c.time_input).eval()
    process = MaskedProcess(LENGTH, BASES, steps=int(sampler.get("steps", 128)))
    return Model(network, process, "sequence", name="gosai")
