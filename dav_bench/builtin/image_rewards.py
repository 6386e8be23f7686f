"""Settings of the rewards on images, and who publishes the weights that are not shipped.  Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dav_bench.pretrained import Published

CLIP_L = Published(
    "image encoder CLIP ViT-L/14",
    "openai/clip-vit-large-patch14",
    "MIT",
    "clip",
)
AESTHETIC = Published(
    "aesthetic predictor",
    "github.com/christophschuhmann/improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE.pth)",
    "Apache-2.0",
    "path",
    "the file",
)
IMAGEREWARD = Published(
    "reward model ImageReward-v1.0", "THUDM/ImageReward", "Apache-2.0", "path", "the file"
)
BERT = Published("tokenizer of BERT (uncased)", "google-bert/bert-base-uncased", "Apache-2.0", "tokenizer")

Dtype = Literal["float32", "bfloat16", "float16"]
Depth = Literal["pillow", "tensor", "float"]


@dataclass(frozen=True)
class EmojiClip:
    """Settings of the rewards `emoji-clip` and `emoji-clip-heldout`."""

    weights: str = ""
    """Folder of a CLIP model in open_clip's format; empty is the shipped one."""
    tokenizer: str = ""
    """Folder of its tokenizer; empty is that of the shipped generator."""
    scale: float = 100.0
    """Factor of the cosine similarity."""


@dataclass(frozen=True)
class Aesthetic:
    """Settings of the reward `aesthetic`."""

    path: str = ""
    """The predictor's file, sac+logos+ava1-l14-linearMSE.pth or the same as safetensors; it has no place on the hub."""
    clip: str = "openai/clip-vit-large-patch14"
    """Folder or hub id of the image encoder, in the format of transformers."""
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter: that of CLIP, or that of the released training code of DAV."""
    depth: Depth = "pillow"
    """Round as for a saved image resized by Pillow, before resizing alone (tensor), or nowhere (float; DAV)."""
    dtype: Dtype = "float32"
    """The encoder computes in it; its gradients are coarse in 16 bits."""
    batch: int = 32
    """Most images encoded at once."""


@dataclass(frozen=True)
class ImageReward:
    """Settings of the reward `imagereward`."""

    path: str = "THUDM/ImageReward"
    """ImageReward.pt or the same tensors as safetensors, its folder, or a hub id."""
    tokenizer: str = "google-bert/bert-base-uncased"
    """Folder or hub id of the tokenizer."""
    standardised: bool = True
    """Subtract the mean and divide by the deviation of the authors' data, as their package does; DAS does not."""
    depth: Depth = "pillow"
    """Round as for a saved image resized by Pillow, before resizing alone (tensor), or nowhere (float)."""
    dtype: Dtype = "float32"
    """The encoders compute in it; their gradients are coarse in 16 bits."""
    batch: int = 32
    """Most images encoded at once."""
