"""What rewards and metrics on images are built from: pixels as an encoder reads them, and CLIP in its two formats."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dav_bench.errors import DavBenchError, ExitCode

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Depth = Literal["pillow", "tensor", "float"]


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()  # Keys' kernel with a = -1/2
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2).where(
        x < 2, 0.0
    )


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


_KERNELS = {"bicubic": _cubic, "bilinear": _triangle}


@cache
def resampling(n: int, size: int, kernel: str) -> Tensor:
    """(size, n) float64 weights that resize a line of n pixels, the kernel widened where it shrinks (antialiasing).

    As Pillow has it (src/libImaging/Resample.c), and torch with `antialias=True`.
    """
    scale = n / size
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    away = torch.arange(n, dtype=torch.float64) + 0.5 - centre[:, None]
    weights = _KERNELS[kernel](away / max(scale, 1.0))
    return weights / weights.sum(1, keepdim=True)


def _through(x: Tensor, value: Tensor) -> Tensor:
    """`value` with the gradient of x: rounding lets it pass."""
    return x + (value - x).detach()


class Pixels(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> what an encoder reads (B, 3, size, size): resized, cropped, normalised.

    The short side becomes `size`, the centre is kept, as `Resize` and `CenterCrop` of torchvision have it.

    Args:
        size: side of the encoder's input.
        mean, std: of each channel.
        resize: kernel, bicubic or bilinear, antialiased.
        depth: what is rounded; the gradient is that without rounding.  "pillow" is an image saved with 8 bits and
            resized by Pillow, bit for bit; "tensor" is one saved with 8 bits and resized as floats; "float" rounds
            nothing.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        resize: str = "bicubic",
        depth: Depth = "pillow",
    ):
        super().__init__()
        if resize not in _KERNELS:
            raise DavBenchError(
                f"images cannot be resized by {resize!r} here.", f"Known: {', '.join(_KERNELS)}."
            )
        self.size, self.resize, self.depth = size, resize, depth
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, size, size)."""
        x = wide(images)
        if self.depth != "float":
            x = _through(x, (x * 255).round().clamp(0, 255) / 255)
        height, width = x.shape[-2:]
        short = min(height, width)
        if short != self.size:
            height, width = (int(self.size * side / short) for side in (height, width))
            x = (self._pillow if self.depth == "pillow" else self._float)(x, height, width)
        top, left = (round((side - self.size) / 2) for side in (height, width))
        x = x[..., top : top + self.size, left : left + self.size]
        return (x - self.mean) / self.std

    def _float(self, x: Tensor, height: int, width: int) -> Tensor:
        rows, columns = self._weights(x, height, width)
        return rows.to(x) @ (x @ columns.T.to(x))

    def _pillow(self, x: Tensor, height: int, width: int) -> Tensor:
        """Weights of 22 bits; whole numbers after the horizontal and after the vertical pass."""
        rows, columns = ((w * 2**22).round() / 2**22 for w in self._weights(x, height, width))
        y = (x * 255).double()
        y = _through(y, y.round())
        for line in (lambda y: y @ columns.T, lambda y: rows @ y):
            exact = line(y)
            y = _through(exact, (exact + 0.5).floor().clamp(0, 255))
        return (y / 255).to(x.dtype)

    def _weights(self, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        sides = ((x.shape[-2], height), (x.shape[-1], width))
        rows, columns = (resampling(n, size, self.resize).to(x.device) for n, size in sides)
        return rows, columns


Tokens = Callable[[Sequence[str]], Tensor]
"""Texts -> (P, context) token ids."""


def say_cut(who: str, length: int, kept: str) -> None:
    """Warn that a prompt is longer than a text encoder reads."""
    warnings.warn(f"{who} reads {length} tokens: the prompt is cut after {kept!r}.", stacklevel=3)


def tokenizer(hf: Any, length: int, who: str) -> Callable[[Sequence[str]], Any]:
    """A tokenizer of transformers as a function of texts: `input_ids` and `attention_mask` (P, length), padded.

    A longer text is cut, with a warning that says where.
    """

    def tokens(texts: Sequence[str]) -> Any:
        for ids in hf(list(texts), verbose=False)["input_ids"]:
            if len(ids) > length:
                say_cut(who, length, hf.decode(ids[: length - 1], skip_special_tokens=True))
        return hf(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")

    return tokens


def rows(table: Tensor | None, cond: Tensor | None, who: str) -> Tensor:
    """Rows `cond` (B,) of a table of encoded prompts; without prompts there is nothing to judge by."""
    if table is None or not len(table) or cond is None:
        raise DavBenchError(
            f"{who} scores images by their prompts, and there are none.",
            "The task's model is asked for nothing.",
            "a task with a section [prompts], or a reward that ignores them",
        )
    return table[cond]


class TransformersTowers(nn.Module):
    """A `CLIPModel` of transformers under the names of open_clip."""

    def __init__(self, clip: Any):
        super().__init__()
        self.clip = clip

    def encode_image(self, image: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) -> (B, F)."""
        return self.clip.visual_projection(self.clip.vision_model(pixel_values=image).pooler_output)

    def encode_text(self, text: Tensor) -> Tensor:
        """Token ids (P, L), padded after their end -> (P, F)."""
        return self.clip.text_projection(self.clip.text_model(input_ids=text).pooler_output)


def dtype_of(network: nn.Module) -> torch.dtype:
    """What a network computes in."""
    return next(p.dtype for p in network.parameters() if p.is_floating_point())


def embeddings(towers: Any, pixels: Pixels, sample: Tensor, batch: int) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] -> (B, F) of unit length, `batch` images at once."""
    dtype = dtype_of(towers)
    parts = [wide(towers.encode_image(pixels(part).to(dtype))) for part in sample.split(batch)]
    return F.normalize(torch.cat(parts), dim=-1)


class ClipReward(nn.Module):
    """Scaled cosine similarity of an image and its prompt, in the space of a CLIP model.

    Args:
        towers: the encoders, `encode_image` and `encode_text` of open_clip; compute in the dtype of their parameters,
            the rest in float32.
        pixels: prepares images.
        tokens: prepares texts.
        scale: factor of the cosine.
        prefix: put before each prompt.
        batch: most images encoded at once.
    """

    domain = "image"
    provides = frozenset({"reward.grad", "reward.features"})
    range: tuple[float, float] = (-1.0, 1.0)
    unit = "cosine"
    texts: Tensor | None

    def __init__(
        self,
        towers: Any,
        pixels: Pixels,
        tokens: Tokens,
        scale: float = 1.0,
        prefix: str = "",
        batch: int = 32,
    ):
        super().__init__()
        self.towers, self.pixels, self.tokens = towers, pixels, tokens
        self.scale, self.prefix, self.batch = scale, prefix, batch
        self.register_buffer("texts", None, persistent=False)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> None:
        """Encode each prompt once; conditions are their numbers."""
        ids = self.tokens([self.prefix + text for text in texts]).to(self.pixels.mean.device)
        parts = [wide(self.towers.encode_text(part)) for part in ids.split(self.batch)]
        self.texts = F.normalize(torch.cat(parts), dim=-1)

    def features(self, sample: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, F) embeddings of unit length."""
        return embeddings(self.towers, self.pixels, sample, self.batch)

    def head(self, features: Tensor, cond: Tensor | None = None) -> Tensor:
        """Features (B, F) and prompt numbers (B,) -> (B,)."""
        return self.scale * (features * rows(self.texts, cond, "The reward")).sum(-1)

    def forward(self, sample: Tensor, cond: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and prompt numbers (B,) -> (B,)."""
        return self.head(self.features(sample), cond)


def open_clip_network(config: dict[str, Any]) -> nn.Module:
    """The untrained network of a `model_cfg` of open_clip."""
    from open_clip.model import CLIP, CustomTextCLIP

    config = dict(config)
    custom = config.pop("custom_text", False) or "hf_model_name" in config.get("text_cfg", {})
    return (CustomTextCLIP if custom else CLIP)(**config)


def load_open_clip(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A model in open_clip's own format, frozen and in float32, and the whole of its configuration.

    The folder holds `open_clip_config.json` and `open_clip_model.safetensors`, as open_clip's `local-dir:` reads them.
    """
    from safetensors.torch import load_file

    from dav_bench.builtin.checkpoints import fill

    paths = [folder / name for name in ("open_clip_config.json", "open_clip_model.safetensors")]
    for path in paths:
        if not path.is_file():
            raise DavBenchError(
                f"{folder} is no model of open_clip.", f"there is no {path.name}", code=ExitCode.MISSING
            )
    config = json.loads(paths[0].read_text(encoding="utf-8"))
    network = open_clip_network(config["model_cfg"])
    state = {name: wide(v) if v.is_floating_point() else v for name, v in load_file(paths[1]).items()}
    fill(network, state, f"CLIP model that {paths[0]} describes")
    return network.eval().requires_grad_(False), config
