"""PickScore, HPSv2 and CLIPScore as rewards: their settings and where their weights come from."""

from dataclasses import dataclass
from typing import Literal

from dav_bench import Published, hookimpl

PICKSCORE = Published("CLIP model PickScore v1", "yuvalkirstain/PickScore_v1", "MIT", "path")
CLIP_H = Published("tokenizer of CLIP ViT-H/14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "MIT", "tokenizer")
HPS = Published("CLIP model HPS v2", "xswu/HPSv2", "Apache-2.0", "path", "the file")
CLIP_B = Published("CLIP model ViT-B/32", "openai/clip-vit-base-patch32", "MIT", "path")
CLIP_B_WORDS = Published("tokenizer of CLIP ViT-B/32", "openai/clip-vit-base-patch32", "MIT", "tokenizer")

Dtype = Literal["float32", "bfloat16", "float16"]
Depth = Literal["pillow", "tensor", "float"]


@dataclass(frozen=True)
class PickScore:
    """Settings of the reward `pickscore`."""

    path: str = "yuvalkirstain/PickScore_v1"
    """Folder or hub id of the model, in the format of transformers."""
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Folder or hub id of its tokenizer."""
    depth: Depth = "pillow"
    """Round as for a saved image resized by Pillow, before resizing alone (tensor), or nowhere (float)."""
    dtype: Dtype = "float32"
    """The encoders compute in it; their gradients are coarse in 16 bits."""
    batch: int = 32
    """Most images encoded at once."""


@dataclass(frozen=True)
class HPSv2:
    """Settings of the reward `hpsv2`."""

    path: str = "xswu/HPSv2"
    """The checkpoint, its folder, or the hub id."""
    version: Literal["2.1", "2.0"] = "2.1"
    """Which checkpoint a folder or the hub gives; the released function takes 2.0 unless told."""
    model: str = "ViT-H-14"
    """Architecture, by its name in open_clip."""
    depth: Depth = "tensor"
    """Round before resizing alone as the original (tensor), after it too as Pillow does, or nowhere (float)."""
    dtype: Dtype = "float32"
    """The encoders compute in it; their gradients are coarse in 16 bits."""
    batch: int = 32
    """Most images encoded at once."""


@dataclass(frozen=True)
class CLIPScore:
    """Settings of the reward `clipscore`."""

    path: str = "openai/clip-vit-base-patch32"
    """Folder or hub id of the model, in the format of transformers."""
    tokenizer: str = ""
    """Folder or hub id of its tokenizer; empty is `path`."""
    form: Literal["paper", "percent"] = "paper"
    """2.5 times the cosine, 0 where it is negative (paper), or 100 times the cosine."""
    prefix: str = "A photo depicts "
    """Put before each prompt, as in the paper."""
    depth: Depth = "pillow"
    """Round as for a saved image resized by Pillow, before resizing alone (tensor), or nowhere (float)."""
    dtype: Dtype = "float32"
    """The encoders compute in it; their gradients are coarse in 16 bits."""
    batch: int = 32
    """Most images encoded at once."""


@hookimpl
def register_rewards(register):
    at = "dav_bench_preference.rewards:"
    gives = ("reward.grad", "reward.features")
    register("pickscore", at + "PickReward.load", config=PickScore, provides=gives, domain="image",
             paper="arXiv:2305.01569", summary="preference by PickScore (weights not shipped)")  # fmt: skip
    register("hpsv2", at + "HPSReward.load", config=HPSv2, provides=gives, domain="image",
             paper="arXiv:2306.09341", summary="preference by HPS v2.1 (weights not shipped)")  # fmt: skip
    register("clipscore", at + "CLIPScoreReward.load", config=CLIPScore, provides=gives, domain="image",
             paper="arXiv:2104.08718", summary="agreement by CLIP ViT-B/32 (weights not shipped)")  # fmt: skip
