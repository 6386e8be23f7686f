"""Train the text encoder and the UNet of `emoji-diffusion` on latents of captioned emoji.

    python tasks/t2i/train_unet.py CACHE STATE CODER --minutes 60

STATE is a folder: latents.safetensors (pictures that went through the encoder, made where missing), state.pt (to go on
from) and grids. CODER is the small.safetensors of train_vae.py, whose latents are learnt. Writes the pipeline
weights/emoji-diffusion at every look. Wants the tokenizer, and to draw grids the autoencoder.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path

import diffusers
import torch
from data import ANIMALS, HERE, Drawings, Looks, captions_of, draw_looks, load, picture, sheet
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_clip import Tokens
from train_vae import halved, network
from training import Run, join, quicken, wait
from transformers import CLIPTextConfig, CLIPTextModel

FOLDER = HERE / "weights/emoji-diffusion"
TEXT = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16, "hidden_act": "gelu", "projection_dim": 128,
    "bos_token_id": 2046, "eos_token_id": 2047, "pad_token_id": 2047,
}  # fmt: skip
UNET = {
    "sample_size": 8, "in_channels": 8, "out_channels": 8, "block_out_channels": (128, 192), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 128, "attention_head_dim": 4, "norm_num_groups": 16, "time_embedding_dim": 256,
}  # fmt: skip
SCHEDULE = {
    "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False,
    "steps_offset": 1,
}  # fmt: skip
DROPOUT = 0.1
"""Share of captions that are left out, for guidance."""
SHARE = 0.65
"""Share of the 39 animals among the pictures."""


class Model(nn.Module):
    """Text encoder and UNet, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.text = CLIPTextModel(CLIPTextConfig(**TEXT, attn_implementation="eager"))
        self.unet = UNet2DConditionModel(**UNET)
        self.unet.set_attn_processor(AttnProcessor())  # the fused attention is slow backwards in bf16

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """v of latents (B, 8, 8, 8) at steps (B,) under captions (B, 16)."""
        return self.unet(x, t, self.text(input_ids=ids).last_hidden_state).sample


def things_of(drawings: Drawings, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Things and artists (n,), `SHARE` of them animals."""
    u = torch.rand(n, 3, generator=generator)
    animal = (u[:, 0] * ANIMALS).long()
    other = ANIMALS + (u[:, 0] * (drawings.things - ANIMALS)).long()
    return torch.where(u[:, 1] < SHARE, animal, other), (u[:, 2] * 4).long()


@torch.inference_mode()
def encoded(vae: AutoencoderKL, drawings: Drawings, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Mean latents (n, 8, 8, 8) in fp16 of random pictures, and their looks."""
    parts: dict[str, list[Tensor]] = {k: [] for k in ("z", "thing", "artist", "background", "scale")}
    for rows in torch.arange(n).split(64):
        looks = draw_looks(*things_of(drawings, len(rows), generator), generator)
        x = picture(drawings, looks, generator) * 2 - 1
        x = halved(x) if vae.config.sample_size == 32 else x
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        for k, v in {"z": z.half(), **vars(looks)}.items():
            parts[k].append(v if k == "z" else v.to(torch.int16))
    return {k: torch.cat(v).contiguous() for k, v in parts.items()}


def pool(vae: AutoencoderKL, drawings: Drawings, path: Path, n: int) -> dict[str, Tensor]:
    """At least n latents, those in the file and new ones."""
    have = load_file(path) if path.exists() else {}
    count = len(have["z"]) if have else 0
    if count < n:
        new = encoded(vae, drawings, n - count, torch.Generator().manual_seed(100 + count))
        have = {k: torch.cat([have[k], v]) if have else v for k, v in new.items()}
        save_file(have, path)
    return have


def scheduler() -> DDIMScheduler:
    """The scheduler that the model ships with."""
    return DDIMScheduler(**SCHEDULE)


ALPHAS = scheduler().alphas_cumprod


def captioned(
    pool: dict[str, Tensor], rows: Tensor, drawings: Drawings, tokens: Tokens
) -> tuple[Tensor, Tensor]:
    """Latents (B, 8, 8, 8) of a pool and a caption of each, (B, 16); `DROPOUT` of the captions are empty."""
    said = captions_of(
        drawings, Looks(*(pool[k][rows].long() for k in ("thing", "artist", "background", "scale")))
    )
    said = [
        "" if drop else s for s, drop in zip(said, (torch.rand(len(rows)) < DROPOUT).tolist(), strict=True)
    ]
    return pool["z"][rows].float(), tokens(said)


def denoise(model: nn.Module, z: Tensor, ids: Tensor, t: Tensor, noise: Tensor, bf16: bool = True) -> Tensor:
    """Mean squared error (B,) of v for latents at steps (B,)."""
    a, s = ALPHAS[t].sqrt()[:, None, None, None], (1 - ALPHAS[t]).sqrt()[:, None, None, None]
    x = (a * z + s * noise).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        v = model(x, t, ids)
    return (v.float() - (a * noise - s * z)).square().mean((1, 2, 3))


@torch.inference_mode()
def denoised(
    model: Model, held: dict[str, Tensor], drawings: Drawings, tokens: Tokens, seed: int, bf16: bool = True
) -> float:
    """Mean error over held-out latents, each at one step and under one draw of noise and caption."""
    torch.manual_seed(seed)
    n = len(held["z"])
    z, ids = captioned(held, torch.arange(n), drawings, tokens)
    t, noise = torch.arange(n) * 1000 // n, torch.randn_like(z)
    rows = torch.arange(n).split(64)
    return torch.cat([denoise(model, z[r], ids[r], t[r], noise[r], bf16) for r in rows]).mean().item()


@torch.inference_mode()
def sample(
    model: Model, vae: AutoencoderKL, ids: Tensor, steps: int = 20, guidance: float = 3.0, eta: float = 1.0,
    seed: int = 0, bf16: bool = True,
) -> Tensor:  # fmt: skip
    """Pictures (N, 3, 64, 64) in [0, 1] of captions (N, 16)."""
    g, s = torch.Generator().manual_seed(seed), scheduler()
    s.set_timesteps(steps)
    empty = torch.tensor([[2046] + [2047] * 15]).expand_as(ids)
    x = torch.randn(len(ids), 8, 8, 8, generator=g)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        text = model.text(input_ids=torch.cat([empty, ids])).last_hidden_state
        for t in s.timesteps:
            v = model.unet(torch.cat([x, x]), t, text).sample.float()
            free, told = v.chunk(2)
            x = s.step(free + guidance * (told - free), t, x, eta=eta, generator=g).prev_sample
        out = torch.cat([vae.decode(z / vae.config.scaling_factor).sample.float() for z in x.split(64)])
    return (out.clamp(-1, 1) + 1) / 2


def main() -> None:
    """Train, look, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("coder", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pool", type=int, default=40_000, help="pictures encoded beforehand")
    parser.add_argument("--every", type=float, default=8, help="minutes between looks")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--average", type=float, default=0.999)
    parser.add_argument(
        "--cool", type=float, default=0.0, help="share of the minutes in which the learning rate falls"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    rank = join(seed=0)
    args.state.mkdir(parents=True, exist_ok=True)
    drawings, tokens = load(args.cache), Tokens()
    vae = AutoencoderKL.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32).eval()
    coder = quicken(network(32)).eval()
    coder.load_state_dict(load_file(args.coder))
    latents = args.state / "latents.safetensors"
    if rank:  # the first process makes what is missing
        wait()
    data = pool(coder, drawings, latents, args.pool)
    if not rank:
        wait()
    held = encoded(coder, drawings, 1024, torch.Generator().manual_seed(5))
    model = Model()
    quicken(model.unet)
    print({k: round(sum(p.numel() for p in m.parameters()) / 1e6, 3) for k, m in
           {"unet": model.unet, "text": model.text, "vae": vae}.items()}, flush=True)  # fmt: skip
    run = Run(model, args.state / "state.pt", args.lr, decay=0.01, average=args.average, warmup=300)
    run.lr = args.lr
    fast = torch.compile(model)  # a third faster on a CPU, for two minutes of compiling; wants a C++ compiler

    def loss() -> Tensor:
        z, ids = captioned(data, torch.randint(0, len(data["z"]), (args.batch,)), drawings, tokens)
        t = ((torch.arange(args.batch) + torch.rand(args.batch)) / args.batch * 1000).long()
        return denoise(fast, z, ids, t, torch.randn_like(z)).mean()

    words = [drawings.captions[i][0] for i in range(ANIMALS)] + ["red apple", "sad face", "owl"]

    def look() -> dict[str, float]:
        keep = torch.get_rng_state()
        out = {"held": denoised(run.kept, held, drawings, tokens, seed=6)}
        if run.step > 1500 or run.seconds > 600:
            ids = tokens([w for w in words for _ in range(4)])
            x = sample(run.kept, vae, ids)
            sheet(x, 24, args.state / f"grid-{run.step}.png")
            save(run.kept)
        torch.set_rng_state(keep)
        return out

    run.train(loss, args.minutes, args.every, look, cool=args.cool)
    if rank == 0:
        save(run.kept)
        print(f"{math.ceil(run.seconds)} s in all", flush=True)


def save(model: Model) -> None:
    """Write the pipeline folder in fp16, all but the autoencoder and the tokenizer, which are there."""
    net = copy.deepcopy(model).half()
    net.unet.save_pretrained(FOLDER / "unet")
    net.text.save_pretrained(FOLDER / "text_encoder")
    config = FOLDER / "text_encoder/config.json"
    # transformers computes in the type that the config names, diffusers in fp32: they have to agree
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    scheduler().save_pretrained(FOLDER / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__,
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None], "feature_extractor": [None, None],
        "image_encoder": [None, None], "requires_safety_checker": False,
    }  # fmt: skip
    (FOLDER / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    main()
