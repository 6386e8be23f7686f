"""LAION's aesthetic predictor: a linear map, in five layers, of the embedding of CLIP ViT-L/14.

Layout of christophschuhmann/improved-aesthetic-predictor (simple_inference.py); prompts are not read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dav_bench.builtin import image_rewards
from dav_bench.builtin.image_rewards import AESTHETIC, CLIP_L
from dav_bench.images import Pixels, TransformersTowers, embeddings


class ScoreLayers(nn.Module):
    """Layers 1024-128-64-16-1 with dropout and no activation, as published (`layers.0.weight`, ...)."""

    def __init__(self, width: int = 768):
        super().__init__()
        drop = nn.Dropout
        self.layers = nn.Sequential(
            nn.Linear(width, 1024), drop(0.2), nn.Linear(1024, 128), drop(0.2), nn.Linear(128, 64), drop(0.1),
            nn.Linear(64, 16), nn.Linear(16, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B,)."""
        return self.layers(x)[:, 0]


class Aesthetic(nn.Module):
    """Mean rating that people would give the image, predicted.

    Args:
        clip: the encoder; its text tower is not used.
        layers: the predictor.
        pixels: prepares images.
        batch: most images encoded at once.
    """

    domain = "image"
    provides = frozenset({"reward.grad", "reward.features"})
    range = (float("-inf"), float("inf"))
    unit = "points of a rating from 1 to 10, not bounded to it"

    def __init__(self, clip: TransformersTowers, layers: ScoreLayers, pixels: Pixels, batch: int = 32):
        super().__init__()
        self.clip, self.layers, self.pixels, self.batch = clip, layers, pixels, batch

    @classmethod
    def load(cls, c: image_rewards.Aesthetic) -> Aesthetic:
        """The reward `aesthetic`."""
        from transformers import CLIPModel

        if not c.path:
            raise AESTHETIC.missing("it is not shipped")
        tensors = AESTHETIC.tensors(c.path, "sac+logos+ava1-l14-linearMSE.pth")
        clip = CLIP_L.model(CLIPModel, c.clip)
        del clip.text_model, clip.text_projection
        layers = ScoreLayers(clip.config.projection_dim)
        AESTHETIC.fill(layers, tensors)
        pixels = Pixels(clip.config.vision_config.image_size, resize=c.resize, depth=c.depth)
        reward = cls(TransformersTowers(clip.to(getattr(torch, c.dtype))), layers, pixels, c.batch)
        return reward.eval().requires_grad_(False)

    def features(self, sample: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, F) embeddings of unit length."""
        return embeddings(self.clip, self.pixels, sample, self.batch)

    def head(self, features: Tensor, cond: Any = None) -> Tensor:
        """Features (B, F) -> (B,)."""
        return self.layers(features)

    def forward(self, sample: Tensor, cond: Any = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B,)."""
        return self.head(self.features(sample))
