"""ImageReward-v1.0 (arXiv:2304.05977): BLIP reads the image into the prompt, and layers turn the result into a score.

The released file holds the weights under the names of Salesforce's BLIP; here they are put into the modules of
transformers.  Layout, preprocessing and constants as in THUDM/ImageReward (ImageReward/ImageReward.py, models/BLIP).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dav_bench.builtin import image_rewards
from dav_bench.builtin.image_rewards import BERT, IMAGEREWARD
from dav_bench.builtin.rewards.aesthetic import ScoreLayers
from dav_bench.errors import DavBenchError
from dav_bench.images import Pixels, rows, tokenizer, wide

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072
CONTEXT = 35
HEAD_WIDTH = 64

_VISION = {  # parts of a name, Salesforce's and those of transformers
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm": "post_layernorm",
}


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released tensors under the names of `ImageReward` below; those that the score does not use are left out."""
    out = {}
    for name, value in tensors.items():
        part, _, rest = name.removeprefix("blip.").partition(".")
        if part == "visual_encoder":
            for old, new in _VISION.items():
                rest = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\1{new}", rest)
            out["vision." + rest] = value
        elif part == "text_encoder" and not rest.endswith("position_ids"):
            out["text." + rest] = value
        elif part == "mlp":
            out["layers." + rest] = value
    return out


class ImageReward(nn.Module):
    """How much people prefer an image for its prompt.

    Args:
        vision: a `BlipVisionModel`.
        text: a `BlipTextModel` with cross-attention, read in both directions.
        layers: the score of the state of the first token.
        pixels: prepares images.
        tokens: prepares texts.
        standardised: in units of the authors' data.
        batch: most images encoded at once.
    """

    domain = "image"
    provides = frozenset({"reward.grad"})
    range = (float("-inf"), float("inf"))
    unit = "standard deviations of the authors' scores, 0 their mean"
    ids: Tensor | None
    mask: Tensor | None

    def __init__(
        self, vision: nn.Module, text: nn.Module, layers: ScoreLayers, pixels: Pixels, tokens: Any,
        standardised: bool = True, batch: int = 32,
    ):  # fmt: skip
        super().__init__()
        self.vision, self.text, self.layers = vision, text, layers
        self.pixels, self.tokens, self.standardised, self.batch = pixels, tokens, standardised, batch
        self.register_buffer("ids", None, persistent=False)
        self.register_buffer("mask", None, persistent=False)

    @classmethod
    def load(cls, c: image_rewards.ImageReward) -> ImageReward:
        """The reward `imagereward`."""
        from transformers import BertTokenizer

        tensors = renamed(IMAGEREWARD.tensors(c.path, "ImageReward.pt"))
        vision, text = networks(tensors)
        tokens = tokenizer(BERT.tokenizer(BertTokenizer, c.tokenizer), CONTEXT, "ImageReward")
        layers = ScoreLayers(text.config.hidden_size)
        pixels = Pixels(vision.config.image_size, depth=c.depth)
        reward = cls(vision, text, layers, pixels, tokens, c.standardised, c.batch)
        IMAGEREWARD.fill(reward, tensors)
        dtype = getattr(torch, c.dtype)
        vision.to(dtype)
        text.to(dtype)
        return reward.eval().requires_grad_(False)

    def encode(self, texts: Sequence[str]) -> None:
        """Tokenise each prompt once; conditions are their numbers.  Images enter every text layer: no more is held."""
        found = self.tokens(texts)
        device = self.pixels.mean.device
        self.ids, self.mask = found["input_ids"].to(device), found["attention_mask"].to(device)

    def forward(self, sample: Tensor, cond: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and prompt numbers (B,) -> (B,)."""
        ids, mask = (rows(table, cond, "ImageReward") for table in (self.ids, self.mask))
        parts = [
            self._score(*part)
            for part in zip(*(t.split(self.batch) for t in (sample, ids, mask)), strict=True)
        ]
        score = torch.cat(parts)
        return (score - MEAN) / DEVIATION if self.standardised else score

    def _score(self, sample: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        dtype = self.text.embeddings.word_embeddings.weight.dtype
        image = self.vision(pixel_values=self.pixels(sample).to(dtype)).last_hidden_state
        state = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=image, is_decoder=False)
        return self.layers(wide(state.last_hidden_state[:, 0]))


def networks(tensors: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Untrained BLIP encoders of the sizes of the renamed tensors; attention heads are 64 wide, as in every BLIP."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    def depth(prefix: str) -> int:
        return len({name.split(".")[3] for name in tensors if name.startswith(prefix)})

    try:
        patch = tensors["vision.embeddings.patch_embedding.weight"]
        positions = tensors["vision.embeddings.position_embedding"].shape[1] - 1
        width = len(patch)
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(tensors["vision.encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=depth("vision.encoder.layers."),
            num_attention_heads=width // HEAD_WIDTH,
            image_size=round(positions**0.5) * patch.shape[-1],
            patch_size=patch.shape[-1],
            layer_norm_eps=1e-6,
            hidden_act="gelu",
        )
        words = tensors["text.embeddings.word_embeddings.weight"]
        text = BlipTextConfig(
            vocab_size=len(words),
            hidden_size=words.shape[1],
            encoder_hidden_size=width,
            intermediate_size=len(tensors["text.encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=depth("text.encoder.layer."),
            num_attention_heads=words.shape[1] // HEAD_WIDTH,
            max_position_embeddings=len(tensors["text.embeddings.position_embeddings.weight"]),
            layer_norm_eps=1e-12,
            hidden_act="gelu",
            is_decoder=True,  # builds the cross-attention; forward reads in both directions
            attn_implementation="eager",  # masks are added to the scores, as the original does
        )
    except KeyError as err:
        raise DavBenchError(
            f"The file is not the {IMAGEREWARD.what} it should be",
            f"missing keys: {err.args[0]}",
            IMAGEREWARD.fix,
        ) from err
    return BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
