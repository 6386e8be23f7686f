"""The looks of an emoji picture: which of four artists drew it, on which of six backgrounds.

One prompt has 24 looks, and the entropy of the looks of its pictures says how much of them an aligned model has kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Looks(nn.Module):
    """Artist and background of pictures (B, 3, 64, 64) in [0, 1]: logits (B, artists) and (B, backgrounds)."""

    def __init__(self, artists: Sequence[str], backgrounds: Sequence[str], width: int = 32) -> None:
        super().__init__()
        self.artists, self.backgrounds = list(artists), list(backgrounds)
        channels = [3, width, 2 * width, 4 * width, 4 * width]
        layers = list[nn.Module]()
        for i, o in pairwise(channels):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.artist = nn.Linear(2 * channels[-1], len(artists))
        self.background = nn.Linear(2 * channels[-1], len(backgrounds))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of artists (B, A) and of backgrounds (B, K)."""
        h = self.body(x * 2 - 1)
        h = torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)
        return self.artist(h), self.background(h)

    @torch.no_grad()
    def classes(self, x: Tensor) -> Tensor:
        """The likeliest look (B,) of each picture, artist times the number of backgrounds plus background."""
        artist, background = self(x)
        return artist.argmax(1) * len(self.backgrounds) + background.argmax(1)

    @property
    def names(self) -> list[str]:
        """Name of each class of `classes`."""
        return [f"{a} on {b}" for a in self.artists for b in self.backgrounds]


def load_looks(folder: Path) -> Looks:
    """The classifier of a folder with config.json and model.safetensors, in fp32 and frozen."""
    config = json.loads((folder / "config.json").read_text())
    net = Looks(config["artists"], config["backgrounds"], config["width"])
    state = load_file(folder / "model.safetensors")
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return net.eval().requires_grad_(False)
