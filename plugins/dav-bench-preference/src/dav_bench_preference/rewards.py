"""The three rewards: CLIP models, their cosine similarity of image and prompt, and what each makes of it."""

import open_clip
import torch
from transformers import CLIPModel, CLIPTokenizer

from dav_bench.images import ClipReward, Pixels, TransformersTowers, open_clip_network, say_cut, tokenizer
from dav_bench_preference import CLIP_B, CLIP_B_WORDS, CLIP_H, HPS, PICKSCORE, CLIPScore, HPSv2, PickScore

CONTEXT = 77


def _built(cls, published, words, path, tokens, c, **options):
    """A reward on a CLIP model of transformers."""
    clip = published.model(CLIPModel, path)
    length = min(CONTEXT, clip.config.text_config.max_position_embeddings)
    read = tokenizer(words.tokenizer(CLIPTokenizer, tokens), length, published.what)
    pixels = Pixels(clip.config.vision_config.image_size, depth=c.depth)
    towers = TransformersTowers(clip.to(getattr(torch, c.dtype)))
    reward = cls(towers, pixels, lambda texts: read(texts)["input_ids"], batch=c.batch, **options)
    return reward.eval().requires_grad_(False)


class PickReward(ClipReward):
    """Logit of the prompt: exp(logit scale), about 100, times the cosine (README of yuvalkirstain/PickScore)."""

    range = (-100.0, 100.0)
    unit = "logits; a difference of 1 is odds of e that people prefer the image"

    @classmethod
    def load(cls, c: PickScore):
        """The reward `pickscore`."""
        reward = _built(cls, PICKSCORE, CLIP_H, c.path, c.tokenizer, c)
        reward.scale = reward.towers.clip.logit_scale.exp().item()
        reward.range = (-reward.scale, reward.scale)
        return reward


class CLIPScoreReward(ClipReward):
    """2.5 times the cosine, 0 where it is negative (arXiv:2104.08718, jmhessel/clipscore); or 100 times the cosine."""

    range = (0.0, 2.5)
    unit = "2.5 times the cosine similarity"
    clip = True

    @classmethod
    def load(cls, c: CLIPScore):
        """The reward `clipscore`."""
        paper = c.form == "paper"
        scale = 2.5 if paper else 100.0
        reward = _built(
            cls, CLIP_B, CLIP_B_WORDS, c.path, c.tokenizer or c.path, c, scale=scale, prefix=c.prefix
        )
        if not paper:
            reward.range, reward.unit, reward.clip = (-100.0, 100.0), "100 times the cosine similarity", False
        return reward

    def head(self, features, cond=None):
        """Features (B, F) and prompt numbers (B,) -> (B,)."""
        value = super().head(features, cond)
        return value.clamp(min=0) if self.clip else value


class HPSReward(ClipReward):
    """The cosine itself, by a CLIP ViT-H/14 tuned on preferences (hpsv2/img_score.py of tgxs002/HPSv2).

    The original resizes tensors: antialiased by today's torchvision, not by the ones before 0.17.
    """

    range = (-1.0, 1.0)
    unit = "cosine similarity"

    @classmethod
    def load(cls, c: HPSv2):
        """The reward `hpsv2`."""
        tensors = HPS.tensors(c.path, f"HPS_v{c.version}_compressed.pt".replace("v2.0", "v2"))
        config = open_clip.get_model_config(c.model)
        network = open_clip_network(config)
        HPS.fill(network, tensors)
        words = open_clip.SimpleTokenizer(context_length=config["text_cfg"].get("context_length", CONTEXT))
        pixels = Pixels(config["vision_cfg"]["image_size"], depth=c.depth)
        reward = cls(network.to(getattr(torch, c.dtype)), pixels, _tokens(words), batch=c.batch)
        return reward.eval().requires_grad_(False)


def _tokens(words):
    """open_clip's tokenizer, which cuts without a word, as a function of texts that says where."""

    def tokens(texts):
        for text in texts:
            ids = words.encode(text)
            if len(ids) > words.context_length - 2:
                say_cut("HPS v2", words.context_length, words.decode(ids[: words.context_length - 2]).strip())
        return words(list(texts))

    return tokens
