"""Size of an image as a JPEG file, the black-box rewards of DDPO (arXiv:2305.13301, ddpo_pytorch/rewards.py)."""

from __future__ import annotations

import io

import torch
from torch import Tensor

QUALITY = 95


def kilobytes(images: Tensor) -> Tensor:
    """(B,) size in kB (1,000 bytes) of images (B, 3, H, W) in [0, 1], saved by Pillow at quality 95.

    NaN where a pixel is not finite, which no file could hold.
    """
    from PIL import Image

    pixels = (images.detach().float() * 255).round().clamp(0, 255).nan_to_num().to(torch.uint8)
    sizes = []
    for image in pixels.permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=QUALITY)
        sizes.append(file.tell() / 1000)
    size = torch.tensor(sizes, device=images.device)
    return size.where(images.isfinite().flatten(1).all(1), torch.nan)


class Incompressibility:
    """Size in kB: detail and noise raise it."""

    domain = "image"
    provides: frozenset[str] = frozenset()
    range = (0.0, float("inf"))
    unit = "kB as JPEG of quality 95"

    def __call__(self, sample: Tensor, cond: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B,)."""
        return kilobytes(sample)


class Compressibility:
    """Minus the size in kB: plain images have most."""

    domain = "image"
    provides: frozenset[str] = frozenset()
    range = (float("-inf"), 0.0)
    unit = "kB as JPEG of quality 95, negative"

    def __call__(self, sample: Tensor, cond: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B,)."""
        return -kilobytes(sample)
