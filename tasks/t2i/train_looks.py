"""Train the classifier of looks, on drawings and on what the autoencoder makes of them.

    python tasks/t2i/train_looks.py CACHE STATE --minutes 5

Writes weights/looks/config.json and model.safetensors. Wants the autoencoder.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from data import ARTISTS, BACKGROUNDS, HERE, SIZE, Drawings, draw_looks, load, picture
from data import Looks as Drawn
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from train_clip import coarse, noise, some
from train_vae import sample_things
from training import Run, half, join

from dav_bench.builtin.looks import Looks

WIDTH = 32


def drawn(drawings: Drawings, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Drawn]:
    """Pictures (n, 3, 64, 64) of things of things.txt, and their looks."""
    thing, artist = sample_things(drawings, n, generator)
    looks = draw_looks(thing % drawings.things, artist, generator)
    return picture(drawings, looks, generator), looks


@torch.inference_mode()
def through(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """What comes back from the autoencoder, in [0, 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([(vae(p * 2 - 1).sample.float().clamp(-1, 1) + 1) / 2 for p in x.split(64)])


def accuracy(net: Looks, x: Tensor, looks: Drawn) -> dict[str, float]:
    """Share of pictures whose artist, background and both are told right."""
    with torch.inference_mode():
        artist, background = (logits.argmax(1) for logits in net(x))
    a, b = artist == looks.artist, background == looks.background
    right = {"artist": a, "background": b, "both": a & b}
    return {name: hits.float().mean().item() for name, hits in right.items()}


def write(net: Looks) -> None:
    """Write weights/looks."""
    folder = HERE / "weights/looks"
    folder.mkdir(parents=True, exist_ok=True)
    config = {"size": SIZE, "mean": 0.5, "std": 0.5, "artists": list(ARTISTS), "backgrounds": list(BACKGROUNDS),
              "colours": BACKGROUNDS, "width": WIDTH}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(half(net.state_dict()), folder / "model.safetensors", {"format": "pt"})


def main() -> None:
    """Train, look, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pool", type=int, default=4096, help="pictures that went through the autoencoder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    join(seed=4)
    drawings = load(args.cache)
    vae = AutoencoderKL.from_pretrained(
        HERE / "weights/emoji-diffusion/vae", torch_dtype=torch.float32
    ).eval()
    first, seen = drawn(drawings, args.pool)
    pool = through(vae, first)
    g = torch.Generator().manual_seed(11)
    fresh, truth = drawn(drawings, 512, g)
    decoded = through(vae, fresh)
    net = Looks(ARTISTS, BACKGROUNDS, WIDTH).to(memory_format=torch.channels_last)
    run = Run(net, args.state, 2e-3, decay=0.01, average=0.99, warmup=50)

    def loss() -> Tensor:
        x, looks = drawn(drawings, args.batch // 2)
        x = some(some(x, 0.5, coarse), 0.3, noise)
        row = torch.randint(0, args.pool, (args.batch // 2,))
        again = some(some(pool[row], 0.2, coarse), 0.2, noise)
        with torch.autocast("cpu", torch.bfloat16):
            artist, background = net(torch.cat([x, again]).contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(artist.float(), torch.cat([looks.artist, seen.artist[row]])) + F.cross_entropy(
            background.float(), torch.cat([looks.background, seen.background[row]])
        )

    def look() -> dict[str, float]:
        seen = {"drawn": accuracy(run.kept, fresh, truth), "decoded": accuracy(run.kept, decoded, truth)}
        return {f"{how}_{k}": v for how, numbers in seen.items() for k, v in numbers.items()}

    run.train(loss, args.minutes, 1, look, cool=0.4)
    write(run.kept)
    print(f"{math.ceil(run.seconds)} s in all", flush=True)


if __name__ == "__main__":
    main()
