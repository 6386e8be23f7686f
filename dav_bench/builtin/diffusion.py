"""Settings of latent diffusion models read from pipeline folders of diffusers. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Tuning:
    """What of a pipeline is trained."""

    adapter: Literal["lora", "full"] = "lora"
    """Train low-rank adapters of the attention layers, or every weight of the denoiser."""
    rank: int = 4
    """Rank of the adapters (DDPO, DAV: 4)."""
    alpha: float | None = None
    """Adapters are scaled by alpha / rank; none is their rank, which leaves them as they are."""
    gradient_checkpointing: bool = False
    """Compute activations of denoiser and decoder again in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        if self.rank < 1 or (self.alpha is not None and self.alpha <= 0):
            raise ValueError("rank must be 1 or more and alpha above 0")


@dataclass(frozen=True)
class EmojiDiffusion(Tuning):
    """The embedded text-to-image model."""


@dataclass(frozen=True)
class Pipeline(Tuning):
    """Stable Diffusion 1 and 2, SDXL, Stable Diffusion 3 or a latent consistency model."""

    path: str = ""
    """Folder of a diffusers pipeline, or the id of one on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Variant of the files, such as fp16; weights are computed with in the dtype of the run."""
    size: int | None = None
    """Side of the images in pixels; none is what the model was trained for."""
    process: Literal["auto", "ddim", "flow", "lcm"] = "auto"
    """Sampler, which the pipeline's scheduler decides; stated, it is checked, and plans know what it gives."""
