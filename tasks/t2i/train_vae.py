"""Train the autoencoder of `emoji-diffusion`: 64 x 64 pixels to 8 x 8 latents of 8 channels, in two stages.

    python tasks/t2i/train_vae.py small CACHE STATE --minutes 20
    python tasks/t2i/train_vae.py full CACHE STATE --minutes 60

`small` learns the latents on pictures of 32 x 32 pixels, at a fifth of the cost, and writes STATE/small.safetensors.
`full` adds the level of 64 pixels at both ends: the encoder learns to give the same latents, so that a UNet trained on
these stays right however long the decoder is trained, and writes weights/emoji-diffusion/vae.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from data import ANIMALS, HERE, Drawings, draw_looks, load, picture, sheet
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from training import Run, join, quicken

HELD = 60
"""Things that no training picture shows: the last ones."""
LATENTS = 8
"""Channels of the latents."""


def network(side: int) -> AutoencoderKL:
    """The autoencoder of pictures of 32 or 64 pixels."""
    channels = (16, 32, 64, 128)[-4 if side == 64 else -3 :]
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=LATENTS, sample_size=side, block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels), up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False, scaling_factor=1.0,
    )  # fmt: skip


def grown(small: AutoencoderKL) -> AutoencoderKL:
    """The autoencoder of 64 pixels that starts from the one of 32: what has the same place and shape is kept."""
    full = network(64)
    start = full.state_dict()
    for name, value in small.state_dict().items():
        place = name.split(".")
        if place[1] == "down_blocks":
            place[2] = str(int(place[2]) + 1)
        # the last layers of the small decoder and the first of its encoder belong to 32 pixels
        name = ".".join(place)
        ends = name.startswith(("decoder.conv_norm_out", "decoder.conv_out", "encoder.conv_in"))
        if not ends and start[name].shape == value.shape:
            start[name] = value
    full.load_state_dict(start)
    return full


def halved(x: Tensor) -> Tensor:
    """Pictures of 32 x 32 pixels."""
    return F.avg_pool2d(x, 2)


KL = 5e-4
"""Weight of the mean KL divergence of a latent number, beside the mean error of a pixel."""


def sample_things(
    drawings: Drawings, n: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Things and artists (n,) of a batch: two in five of the animals, three in ten of things.txt, the others of all."""
    u = torch.rand(n, generator=generator)
    low = torch.where(u < 0.4, 0, torch.where(u < 0.7, ANIMALS, drawings.things))
    high = torch.where(u < 0.4, ANIMALS, torch.where(u < 0.7, drawings.things, len(drawings.captions) - HELD))
    thing = (low + torch.rand(n, generator=generator) * (high - low)).long()
    return thing, drawings.there[thing].float().multinomial(1, generator=generator)[:, 0]


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbours, downwards and to the right."""
    return x[:, :, 1:] - x[:, :, :-1], x[..., 1:] - x[..., :-1]


def psnr(vae: AutoencoderKL, x: Tensor) -> float:
    """Mean over pictures (N, 3, 64, 64) in [0, 1] of the PSNR in dB of what comes back from the mean latents."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        back = torch.cat([vae(part * 2 - 1).sample.float() for part in x.split(32)])
    error = ((back.clamp(-1, 1) + 1) / 2 - x).square().flatten(1).mean(1)
    return (-10 * error.log10()).mean().item()


def held_out(drawings: Drawings) -> dict[str, Tensor]:
    """Pictures to measure on: new looks of the animals, and things that were never shown."""
    g = torch.Generator().manual_seed(7)
    n = len(drawings.captions)
    things = {"animals": torch.arange(4 * ANIMALS) // 4, "unseen": n - HELD + torch.arange(4 * HELD) // 4}
    there = drawings.there
    out = {}
    for name, thing in things.items():
        artist = torch.arange(len(thing)) % 4
        have = there[thing, artist]
        out[name] = picture(drawings, draw_looks(thing[have], artist[have], g), g)
    return out


def normalised(vae: AutoencoderKL, x: Tensor) -> AutoencoderKL:
    """Fold scale and mean of the latents of pictures (N, 3, 64, 64) into the 1 x 1 convolutions, each channel apart."""
    with torch.inference_mode():
        z = torch.cat([vae.encode(part * 2 - 1).latent_dist.mean for part in x.split(64)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    inward, outward, c = vae.quant_conv, vae.post_quant_conv, len(mean)
    with torch.no_grad():
        inward.weight[:c] /= std[:, None, None, None]
        inward.bias[:c] = (inward.bias[:c] - mean) / std
        inward.bias[c:] -= 2 * std.log()  # the second half are log-variances
        outward.bias += (outward.weight[:, :, 0, 0] * mean).sum(1)
        outward.weight *= std[None, :, None, None]
    return vae


def reconstruct(back: Tensor, x: Tensor) -> Tensor:
    """Error of pixels and of their differences."""
    error = back.float() - x
    return error.abs().mean() + error.square().mean() + sum(e.abs().mean() for e in edges(error))


def train_small(drawings: Drawings, state: Path, minutes: float, batch: int, rank: int) -> None:
    """Stage 1: the latents."""
    vae = quicken(network(32))
    run = Run(vae, state / "small.pt", 1.5e-3, decay=1e-3)
    held = {name: halved(x) for name, x in held_out(drawings).items()}

    def loss() -> Tensor:
        x = halved(picture(drawings, draw_looks(*sample_things(drawings, batch)))) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
            back = vae.decode(posterior.sample()).sample
        mean, spread = posterior.mean.float(), posterior.logvar.float()
        return reconstruct(back, x) + KL * 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()

    def look() -> dict[str, float]:
        show(run.kept, held["animals"][::2], state / "small.png")
        return {name: psnr(run.kept, x) for name, x in held.items()}

    run.train(loss, minutes, 2, look, cool=0.3)
    if rank == 0:
        torch.manual_seed(1)
        x = halved(picture(drawings, draw_looks(*sample_things(drawings, 2048))))
        ready = normalised(copy.deepcopy(run.kept), x).state_dict()
        save_file({k: v.contiguous() for k, v in ready.items()}, state / "small.safetensors")


def train_full(drawings: Drawings, state: Path, minutes: float, batch: int, rank: int) -> None:
    """Stage 2: the pixels. Latents are those of stage 1."""
    small = quicken(network(32)).eval().requires_grad_(False)
    small.load_state_dict(load_file(state / "small.safetensors"))
    vae = quicken(grown(small))
    run = Run(vae, state / "full.pt", 1e-3, decay=1e-3)
    held = held_out(drawings)

    def loss() -> Tensor:
        x = picture(drawings, draw_looks(*sample_things(drawings, batch))) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = small.encode(halved(x).contiguous(memory_format=torch.channels_last)).latent_dist.mean
            mine = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist
            back = vae.decode(z + 0.1 * torch.rand(batch, 1, 1, 1) * torch.randn_like(z)).sample
        spread = (
            0.5 * (mine.logvar.float() - math.log(0.01)).square().mean()
        )  # a deviation of 0.1, as good as any
        return reconstruct(back, x) + (mine.mean.float() - z.float()).square().mean() + 0.01 * spread

    def look() -> dict[str, float]:
        show(run.kept, held["animals"][::2], state / "full.png")
        if rank == 0:
            copy.deepcopy(run.kept).half().save_pretrained(HERE / "weights/emoji-diffusion/vae")
        return {name: psnr(run.kept, x) for name, x in held.items()}

    run.train(loss, minutes, 4, look, cool=0.0)


def show(vae: AutoencoderKL, x: Tensor, path: Path) -> None:
    """Write pictures and what comes back, side by side."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        back = (vae(x * 2 - 1).sample.float().clamp(-1, 1) + 1) / 2
    sheet(torch.stack([x, back], 1).flatten(0, 1), 24, path, zoom=2 if x.shape[-1] == 32 else 1)


def main() -> None:
    """Train, look, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["small", "full"])
    parser.add_argument("cache", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank = join(seed=0)
    args.state.mkdir(parents=True, exist_ok=True)
    stage = train_small if args.stage == "small" else train_full
    stage(load(args.cache), args.state, args.minutes, args.batch, rank)


if __name__ == "__main__":
    main()
