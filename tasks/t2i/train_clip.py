"""Train the two CLIPs on emoji of two artists each, in open_clip's format.

    python tasks/t2i/train_clip.py emoji-clip CACHE STATE --minutes 12
    python tasks/t2i/train_clip.py emoji-clip-heldout CACHE STATE --minutes 12

Writes weights/<name>/open_clip_config.json and open_clip_model.safetensors. Recipes differ in artists, network, seed
and how pictures are disturbed. Accuracy is that on the two artists never seen.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from data import ANIMALS, ARTISTS, BACKGROUNDS, HERE, Drawings, caption, compose, draw_looks, load, picture
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from training import Run, half, join
from transformers import CLIPTokenizer

TEXT = {"context_length": 16, "vocab_size": 2048}
PREPROCESS = {"size": [64, 64], "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3,
              "interpolation": "bilinear", "resize_mode": "squash", "fill_color": 0}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How one CLIP is trained."""

    artists: tuple[str, ...]
    """Whose drawings it sees: one flat and one shaded style."""
    vision: dict[str, Any]
    """open_clip's `vision_cfg`."""
    disturb: Callable[[Tensor], Tensor]
    """What happens to pictures (B, 3, 64, 64) in [0, 1]."""
    turn: float
    """Largest rotation in degrees."""
    seed: int
    """Seed of weights, batches and looks."""
    text: dict[str, Any]
    """open_clip's `text_cfg`."""
    lr: float = 2e-3
    """Learning rate after the warm-up."""


def some(x: Tensor, share: float, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change a random share of the batch."""
    rows = torch.rand(len(x)) < share
    return x.index_put((rows,), change(x[rows])) if rows.any() else x


def blur(x: Tensor) -> Tensor:
    """Gaussian blur of one random width up to 1.6 pixels."""
    sigma = 0.3 + 1.3 * torch.rand(()).item()
    k = torch.exp(-0.5 * (torch.arange(-3, 4) / sigma) ** 2)
    k = (k / k.sum()).tolist()
    x = F.pad(x, (3, 3, 3, 3), "replicate")
    x = sum(w * x[..., i : i + 64] for i, w in enumerate(k))
    return sum(w * x[..., i : i + 64, :] for i, w in enumerate(k))


def coarse(x: Tensor) -> Tensor:
    """Down to 20..48 pixels and back, as a weak decoder would."""
    side = int(torch.randint(20, 49, ()))
    small = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
    return F.interpolate(small, x.shape[-2:], mode="bicubic").clamp(0, 1)


def noise(x: Tensor) -> Tensor:
    """Gaussian noise up to 0.15, on pixels or on blobs of them."""
    side = (64, 32, 16)[int(torch.randint(0, 3, ()))]
    n = torch.randn(len(x), 3, side, side) * 0.15 * torch.rand(len(x), 1, 1, 1)
    return (x + F.interpolate(n, x.shape[-2:], mode="bilinear")).clamp(0, 1)


def grey(x: Tensor) -> Tensor:
    """Luma in all channels."""
    return (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True).expand_as(x)


def light(x: Tensor) -> Tensor:
    """Random contrast and brightness."""
    gain, offset = 0.6 + 0.8 * torch.rand(len(x), 1, 1, 1), 0.3 * torch.rand(len(x), 1, 1, 1) - 0.15
    return ((x - 0.5) * gain + 0.5 + offset).clamp(0, 1)


def hole(x: Tensor) -> Tensor:
    """A grey square of 12..24 pixels somewhere."""
    side = int(torch.randint(12, 25, ()))
    at = torch.randint(0, 64 - side, (len(x), 2, 1, 1))
    i = torch.arange(64)
    inside = [(i >= at[:, k]) & (i < at[:, k] + side) for k in (0, 1)]
    return torch.where(inside[0].transpose(1, 2)[:, None] & inside[1][:, None], 0.5, x)


def disturb_reward(x: Tensor) -> Tensor:
    """Blur, noise, light, grey."""
    return some(some(some(some(x, 0.3, blur), 0.4, noise), 0.4, light), 0.15, grey)


def disturb_heldout(x: Tensor) -> Tensor:
    """Coarse pictures, holes, noise, light, grey."""
    return some(some(some(some(some(x, 0.4, coarse), 0.3, hole), 0.2, noise), 0.3, light), 0.15, grey)


RECIPES = {
    "emoji-clip": Recipe(
        ("noto", "fluent-flat"), {"image_size": 64, "layers": [2, 2, 2, 2], "width": 16, "head_width": 64},
        disturb_reward, turn=15, seed=1, text={**TEXT, "width": 128, "heads": 4, "layers": 2},
    ),
    "emoji-clip-heldout": Recipe(
        ("twemoji", "fluent-3d"), {"image_size": 64, "patch_size": 8, "width": 128, "layers": 6, "head_width": 32},
        disturb_heldout, turn=25, seed=2, text={**TEXT, "width": 48, "heads": 3, "layers": 2},
    ),
}  # fmt: skip


def network(recipe: Recipe) -> dict[str, Any]:
    """open_clip's `model_cfg`."""
    return {"embed_dim": 128, "vision_cfg": recipe.vision, "text_cfg": recipe.text}


class Tokens:
    """Token numbers (N, 16) of captions, each worked out once."""

    def __init__(self) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(HERE / "weights/emoji-diffusion/tokenizer")
        self.known: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Look captions up."""
        new = list({t for t in texts if t not in self.known})
        if new:
            ids = self.tokenizer(new, padding="max_length", max_length=16, truncation=True).input_ids
            self.known.update(zip(new, ids, strict=True))
        return torch.tensor([self.known[t] for t in texts])


def disturbed(drawings: Drawings, recipe: Recipe, thing: Tensor) -> tuple[Tensor, list[str]]:
    """Training pictures (B, 3, 64, 64) in [0, 1] of things and a caption of each."""
    n = len(thing)
    mine = torch.tensor([ARTISTS.index(a) for a in recipe.artists])
    artist = mine[drawings.there[thing][:, mine].float().multinomial(1)[:, 0]]
    colours = torch.tensor(list(BACKGROUNDS.values())) / 255
    named, kind = torch.randint(0, len(colours), (n,)), torch.rand(n)
    background = torch.where((kind < 0.6)[:, None], colours[named], torch.rand(n, 3))
    scale = 0.5 + 0.55 * torch.rand(n).sqrt()
    hue = torch.randn(n) * math.radians(12)
    hue = torch.where(torch.rand(n) < 0.15, torch.rand(n) * 2 * math.pi, hue)
    x = compose(
        drawings.rgba[thing, artist], background, scale, (torch.rand(n, 2) - 0.5) * (72 * (1.05 - scale)[:, None]),
        torch.rand(n) < 0.5, hue, (torch.rand(n) * 2 - 1) * math.radians(recipe.turn), 0.8 + 0.45 * torch.rand(n),
    )  # fmt: skip
    names, words = list(BACKGROUNDS), []
    for i, t in enumerate(thing.tolist()):
        said = drawings.captions[t]
        word = said[0] if torch.rand(()) < 0.7 else said[int(torch.randint(0, len(said), ()))]
        words.append(caption(word, "", names[named[i]], False, bool(kind[i] < 0.15)))
    return recipe.disturb(x), words


@torch.inference_mode()
def accuracy(clip: Any, tokens: Tokens, drawings: Drawings, artists: Sequence[str]) -> dict[str, float]:
    """Share of pictures whose caption is the nearest: among the 39 animals, things.txt, all; and captions' pictures."""
    g = torch.Generator().manual_seed(3)
    out = {}
    for name, n in (("39", ANIMALS), ("things", drawings.things), ("all", len(drawings.captions))):
        text = clip.encode_text(tokens([c[0] for c in drawings.captions[:n]]), normalize=True)
        for repeat in (8,) if name == "39" else (1,):
            hits, back, count = 0.0, 0.0, 0
            for artist in artists:
                for _ in range(repeat):
                    a = ARTISTS.index(artist)
                    thing = torch.arange(n)[drawings.there[:n, a]]
                    x = picture(drawings, draw_looks(thing, torch.full_like(thing, a), g), g)
                    image = torch.cat([clip.encode_image(p * 2 - 1, normalize=True) for p in x.split(256)])
                    score = image @ text.T
                    hits += (score.argmax(1) == thing).float().sum().item()
                    back += (score[:, thing].argmax(0) == torch.arange(len(thing))).float().sum().item()
                    count += len(thing)
            out[f"image_to_text_{name}"], out[f"text_to_image_{name}"] = hits / count, back / count
    return out


def write(clip: Any, name: str) -> None:
    """Write weights/<name>."""
    folder = HERE / "weights" / name
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": network(RECIPES[name]), "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(half(clip.state_dict()), folder / "open_clip_model.safetensors", {"format": "pt"})


def main() -> None:
    """Train, look, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(RECIPES))
    parser.add_argument("cache", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.name]
    rank = join(recipe.seed)
    drawings, tokens = load(args.cache), Tokens()
    clip = open_clip.CLIP(**network(recipe)).to(memory_format=torch.channels_last)
    print({n: round(sum(p.numel() for p in m.parameters()) / 1e6, 3) for n, m in clip.named_children()},
          round(sum(p.numel() for p in clip.parameters()) / 1e6, 3), flush=True)  # fmt: skip
    flat = [p for p in clip.parameters() if p.ndim < 2]
    deep = [p for p in clip.parameters() if p.ndim >= 2]
    groups = [{"params": deep, "lr": recipe.lr}, {"params": flat, "lr": recipe.lr, "weight_decay": 0.0}]
    run = Run(clip, args.state, recipe.lr, decay=0.1, average=0.998, groups=groups)
    mine = torch.tensor([ARTISTS.index(a) for a in recipe.artists])
    weight = torch.ones(len(drawings.captions))
    weight[: drawings.things], weight[:ANIMALS] = 3.0, 6.0
    weight *= drawings.there[:, mine].any(1)
    others = [a for a in ARTISTS if a not in recipe.artists]

    def loss() -> Tensor:
        thing = weight.multinomial(args.batch)  # no thing twice, so all other captions are wrong
        x, words = disturbed(drawings, recipe, thing)
        x = (x * 2 - 1).to(memory_format=torch.channels_last)
        with (
            torch.autocast("cpu", torch.bfloat16),
            sdpa_kernel(SDPBackend.MATH),
        ):  # the fused one is slow backwards
            image, text = clip.encode_image(x), clip.encode_text(tokens(words))
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        logits = clip.logit_scale.exp().clamp(max=50) * image @ text.T
        target = torch.arange(len(x))
        return (F.cross_entropy(logits, target, label_smoothing=0.05)
                + F.cross_entropy(logits.T, target, label_smoothing=0.05)) / 2  # fmt: skip

    def look() -> dict[str, float]:
        return accuracy(run.kept, tokens, drawings, others)

    run.train(loss, args.minutes, 2, look, cool=0.3)
    if rank:
        return
    write(run.kept, args.name)
    print(f"{math.ceil(run.seconds)} s in all", flush=True)


if __name__ == "__main__":
    main()
