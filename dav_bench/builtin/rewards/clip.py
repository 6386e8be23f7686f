"""Prompt fidelity on the task `t2i`: two small CLIP models of our own, in open_clip's format (tasks/t2i)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dav_bench.builtin.image_rewards import EmojiClip
from dav_bench.errors import DavBenchError, ExitCode
from dav_bench.images import ClipReward, Pixels, load_open_clip, tokenizer
from dav_bench.tasks import asset

TASK = "t2i"
TOKENIZER = "weights/emoji-diffusion/tokenizer"


class EmojiReward(ClipReward):
    """100 times the cosine similarity of an image and its prompt."""

    range = (-100.0, 100.0)
    unit = "100 times the cosine similarity"

    @classmethod
    def load(cls, c: EmojiClip) -> EmojiReward:
        """The reward `emoji-clip`."""
        return cls.of(c, "emoji-clip")

    @classmethod
    def load_heldout(cls, c: EmojiClip) -> EmojiReward:
        """The held-out reward `emoji-clip-heldout`: other architecture, seed and drawings."""
        return cls.of(c, "emoji-clip-heldout")

    @classmethod
    def of(cls, c: EmojiClip, name: str) -> EmojiReward:
        """The model of that name in the task's weights, or the one that the settings point to."""
        folder = Path(c.weights).expanduser() if c.weights else asset(TASK, f"weights/{name}")
        network, config = load_open_clip(folder)
        pixels = prepared(config)
        words = Path(c.tokenizer).expanduser() if c.tokenizer else asset(TASK, TOKENIZER)
        tokens = clip_tokens(words, config["model_cfg"]["text_cfg"].get("context_length", 77), name)
        reward = cls(network, pixels, tokens, c.scale, batch=128)
        reward.range = (-abs(c.scale), abs(c.scale))
        return reward


def prepared(config: dict[str, Any]) -> Pixels:
    """Pixels as `preprocess_cfg` says; open_clip's defaults where it says nothing.  Nothing is rounded."""
    preprocess = config.get("preprocess_cfg", {})
    size = preprocess.get("size") or config["model_cfg"]["vision_cfg"].get("image_size", 224)
    size = size if isinstance(size, int) else max(size)
    given = {key: preprocess[key] for key in ("mean", "std") if preprocess.get(key)}
    return Pixels(size, **given, resize=preprocess.get("interpolation", "bicubic"), depth="float")


def clip_tokens(folder: Path, length: int, who: str) -> Any:
    """Token ids (P, length) of texts by the CLIP tokenizer in a folder."""
    from transformers import CLIPTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise DavBenchError(
            f"{folder} is no tokenizer of CLIP.", "there is no tokenizer.json", code=ExitCode.MISSING
        )
    tokens = tokenizer(CLIPTokenizer.from_pretrained(folder), length, who)
    return lambda texts: tokens(texts)["input_ids"]
