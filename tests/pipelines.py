"""Tiny random pipelines of every family of latent diffusion, saved to disk as diffusers saves them."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from dav_bench.builtin.diffusion import Pipeline
from dav_bench.builtin.models.diffusion.model import DiffusionModel, build
from dav_bench.builtin.models.diffusion.pipelines import quiet
from dav_bench.core import Context, Meter, MeteredReward

KINDS = ("sd", "sd-v", "sdxl", "sd3", "lcm")
WIDTH, SIDE = 32, 16  # of the text encoders; pixels of an image, whose latents are 8 x 8
CONTEXT = 12
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tokenizer(folder: Path):
    """Letters, byte by byte, as CLIP has them."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT), len(tokens)


def text_encoder(vocab: int, projected: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocab, hidden_size=WIDTH, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=CONTEXT, projection_dim=WIDTH, bos_token_id=vocab - 2, eos_token_id=vocab - 1,
        pad_token_id=vocab - 1, hidden_act="gelu",
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def vae(channels: int = 4, shift: float | None = None):
    """Two pixels a latent."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=channels,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, scaling_factor=0.5, shift_factor=shift,
        sample_size=SIDE,
    )  # fmt: skip


def unet(**options):
    from diffusers import UNet2DConditionModel

    settings = dict(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4,
    )  # fmt: skip
    return UNet2DConditionModel(**{**settings, **options})


def pipeline(kind: str, scratch: Path):
    """The pipeline itself, with random weights that depend on nothing."""
    import diffusers

    torch.manual_seed(0)
    tokens, vocab = tokenizer(scratch / "tokenizer")
    ddim = dict(
        **BETAS, set_alpha_to_one=False, steps_offset=1, clip_sample=False,
        prediction_type="v_prediction" if kind == "sd-v" else "epsilon",
    )  # fmt: skip
    if kind in ("sd", "sd-v", "lcm"):
        cls = diffusers.LatentConsistencyModelPipeline if kind == "lcm" else diffusers.StableDiffusionPipeline
        scheduler = diffusers.LCMScheduler(**BETAS) if kind == "lcm" else diffusers.DDIMScheduler(**ddim)
        return cls(
            vae=vae(), text_encoder=text_encoder(vocab), tokenizer=tokens, safety_checker=None,
            unet=unet(time_cond_proj_dim=8 if kind == "lcm" else None), feature_extractor=None,
            scheduler=scheduler, requires_safety_checker=False,
        )  # fmt: skip
    if kind == "sdxl":
        backbone = unet(
            cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        )  # fmt: skip
        return diffusers.StableDiffusionXLPipeline(
            vae=vae(), text_encoder=text_encoder(vocab), text_encoder_2=text_encoder(vocab, projected=True),
            tokenizer=tokens, tokenizer_2=tokens, unet=backbone, scheduler=diffusers.EulerDiscreteScheduler(
                **BETAS, timestep_spacing="leading", steps_offset=1), add_watermarker=False,
        )  # fmt: skip
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    t5 = T5EncoderModel(
        T5Config(vocab_size=128, d_model=2 * WIDTH, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    )
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=32, pooled_projection_dim=2 * WIDTH, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(shift=0.1), text_encoder=text_encoder(vocab, True), text_encoder_2=text_encoder(vocab, True),
        text_encoder_3=t5, tokenizer=tokens, tokenizer_2=tokens, tokenizer_3=T5TokenizerFast(),
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


@cache
def _scratch() -> Path:
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def folder(kind: str) -> Path:
    """Where the pipeline of a kind lies; made on first use, and gone when the tests end."""
    path = _scratch() / kind
    with quiet():
        pipeline(kind, _scratch() / f"{kind}-parts").save_pretrained(path)
    return path


def model(
    kind: str, texts: tuple[str, ...] = ("cat", "red dog"), disturbed: float = 0.0, **settings
) -> DiffusionModel:
    """A tiny model read from disk; settings of the sampler and of the model in one.

    `disturbed` moves what is trained away from the pretrained model.
    """
    sampler = {"steps": 4, **{k: settings.pop(k) for k in ("steps", "eta", "guidance") if k in settings}}
    made = build(Pipeline(path=str(folder(kind)), **settings), sampler)
    made.to("cpu")
    if texts:
        made.encode(texts)
    made.reference()
    disturb(made, disturbed)
    return made


def disturb(made: DiffusionModel, scale: float, seed: int = 1) -> None:
    """Moves every trained parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.trainable().values():
            p.add_(scale * torch.randn(p.shape, generator=generator))


def brightness(images: torch.Tensor, cond: torch.Tensor | None = None) -> torch.Tensor:
    """A differentiable reward of pixels."""
    return images[:, 0].flatten(1).mean(1) - 0.5 * images[:, 2].flatten(1).mean(1)


def context(made: DiffusionModel, reward=brightness, micro_batch: int | None = None) -> Context:
    """As a run makes it."""
    meter = Meter()
    made.attach(meter, micro_batch)
    return Context(made, made.reference(), MeteredReward(reward, meter, micro_batch), meter)
