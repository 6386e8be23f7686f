"""A pipeline of diffusers as a model: its sampler's law, prompts, pixels, and what other tools load of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dav_bench.builtin.diffusion import EmojiDiffusion, Pipeline
from dav_bench.builtin.models.diffusion.network import Denoiser, Prompts
from dav_bench.builtin.models.diffusion.pipelines import Family, load, quiet
from dav_bench.core.meter import Meter
from dav_bench.core.model import Model, chunks
from dav_bench.core.process import ConsistencyProcess, FlowProcess, GaussianProcess
from dav_bench.errors import DavBenchError

LATENTS = {"cuda": 2**14, "cpu": 2**10}
"""Most latents of a call. Four states of Stable Diffusion take about 60 GB with gradients through UNet and VAE; 16 of
the embedded model take half a GB, and more of them at once are no faster on a CPU."""

Prediction = Literal["x0", "eps", "v"]
_PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class DiffusionModel(Model):
    """Latent diffusion: the denoiser is trained, text encoders and VAE are frozen and no part of the network.

    States are latents in the scale of the denoiser, conditions are numbers of the prompts told to `encode`.
    """

    network: nn.Module

    def __init__(
        self,
        network: Denoiser,
        process: GaussianProcess,
        vae: nn.Module,
        pipeline: type,
        name: str = "diffusers",
    ) -> None:
        super().__init__(network, process, "image", name=name)
        self.vae, self.pipeline, self.denoiser = vae, pipeline, network

    @property
    def provides(self) -> frozenset[str]:
        return super().provides | {"prompts"}

    @property
    def dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> DiffusionModel:
        """bfloat16 means autocast of the denoiser: weights, states, adapters and the VAE stay float32.

        Channels come last in memory: up to a third faster on a CPU, and what tensor cores read.
        """
        super().to(device, dtype)
        last = torch.channels_last
        self.network.to(memory_format=last)
        with quiet():
            self.vae.to(device=device, dtype=torch.float32 if self.autocast else dtype, memory_format=last)
        return self

    def attach(self, meter: Meter, micro_batch: int | None = None) -> DiffusionModel:
        """Counts on `meter`; calls are of at most `micro_batch` rows, and of `LATENTS` latents."""
        super().attach(meter, micro_batch)
        limit = LATENTS["cpu" if self.device.type == "cpu" else "cuda"]
        most = max(1, limit // (self.process.shape[1] * self.process.shape[2]))  # type: ignore[union-attr]
        self.micro_batch = most if self.micro_batch is None else min(most, self.micro_batch)
        return self

    @property
    def prompts(self) -> Prompts:
        """What the denoiser is told of each prompt."""
        return self.denoiser.prompts

    def encode(self, texts: Sequence[str]) -> None:
        """Encodes each prompt once, and the empty one; the text encoders are let go then."""
        self.prompts.encode(texts, self.device)
        self.prompts.drop()

    def decode(self, x0: Tensor) -> Tensor:
        """Latents (B, C, h, w) on any device -> images (B, 3, H, W) in [0, 1], differentiable inside that range."""
        config = self.vae.config  # type: ignore[union-attr]
        z = x0.to(self.device, self.dtype) / config.scaling_factor + (config.get("shift_factor") or 0.0)
        parts = [self.vae.decode(z[c], return_dict=False)[0] for c in chunks(len(z), self.micro_batch)]  # type: ignore[operator]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def save(self, folder: Path) -> None:
        """Writes what diffusers loads: adapters for `pipe.load_lora_weights(folder)`, or the denoiser's folder."""
        name = self.denoiser.family.denoiser
        folder.mkdir(parents=True, exist_ok=True)
        if not self.denoiser.lora:
            self.denoiser.backbone.save_pretrained(folder / name)  # type: ignore[operator]
            return
        layers = {f"{name}_lora_layers": self.denoiser.lora_state()}
        self.pipeline.save_lora_weights(folder, **layers, safe_serialization=True)  # type: ignore[attr-defined]


# ---- samplers


def _gaussian(config: Mapping[str, Any], shape: tuple[int, ...], steps: int, eta: float) -> GaussianProcess:
    """DDIM and DDPM on the grid of the scheduler's own spacing, ending at the share that it ends at."""
    from diffusers import DDIMScheduler

    # latents have no bounds to clip to, and pipelines of other samplers do not say so
    scheduler = DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
    scheduler.set_timesteps(steps)
    at = scheduler.timesteps.flip(0)
    shares = torch.cat([scheduler.final_alpha_cumprod.view(1), scheduler.alphas_cumprod[at]])
    prediction = _PREDICTIONS[scheduler.config.prediction_type]
    return GaussianProcess(shape, steps, eta, shares, prediction, _times(at, scheduler))


def _consistency(config: Mapping[str, Any], shape: tuple[int, ...], steps: int) -> ConsistencyProcess:
    """The grid and the scalings of `LCMScheduler`, which ends at the prediction itself."""
    from diffusers import LCMScheduler

    scheduler = LCMScheduler.from_config(config, clip_sample=False, thresholding=False)
    scheduler.set_timesteps(steps)
    at = scheduler.timesteps.flip(0)
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(at.double())
    ends = (torch.ones(1), torch.zeros(1))
    shares = torch.cat([torch.ones(1), scheduler.alphas_cumprod[at]])
    skip, out = (torch.cat([end.double(), part]) for end, part in zip(ends, (skip, out), strict=True))
    prediction = _PREDICTIONS[scheduler.config.prediction_type]
    return ConsistencyProcess(shape, steps, shares, skip, out, prediction, _times(at, scheduler))


def _flow(
    config: Mapping[str, Any], shape: tuple[int, ...], steps: int, eta: float, patch: int
) -> FlowProcess:
    """The shifted noise levels of `FlowMatchEulerDiscreteScheduler`."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    held = scheduler.config
    if held.get("use_dynamic_shifting"):  # with the number of patches
        mu = calculate_shift(
            (shape[1] // patch) * (shape[2] // patch),
            *(held.get(k, d) for k, d in (("base_image_seq_len", 256), ("max_image_seq_len", 4096))),
            *(held.get(k, d) for k, d in (("base_shift", 0.5), ("max_shift", 1.16))),
        )
        scheduler.set_timesteps(steps, mu=mu)
    else:
        scheduler.set_timesteps(steps)
    return FlowProcess(shape, scheduler.sigmas.flip(0), eta)


def _times(at: Tensor, scheduler: Any) -> Tensor:
    """(T + 1,) timesteps as shares of those trained with; the clean end is 0."""
    return torch.cat([torch.zeros(1), at / scheduler.config.num_train_timesteps])


def sampler_of(scheduler: Any) -> str:
    """`ddim`, `flow` or `lcm`: the sampler that a pipeline's scheduler stands for."""
    name = type(scheduler).__name__
    if name == "LCMScheduler":
        return "lcm"
    return "flow" if name.startswith("FlowMatch") else "ddim"


def process_of(
    pipe: Any, family: Family, shape: tuple[int, ...], sampler: Mapping[str, Any], path: str
) -> GaussianProcess:
    """The law of the pipeline's sampler at these settings: `steps`, and `eta` where it has one."""
    steps, config, kind = int(sampler.get("steps", 50)), pipe.scheduler.config, sampler_of(pipe.scheduler)
    eta = float(sampler.get("eta", 0.7 if kind == "flow" else 1.0))
    if steps < 1 or eta < 0:
        raise DavBenchError(
            f"sampler.steps={steps} and sampler.eta={eta:g}: steps are at least 1, eta at least 0."
        )
    if kind == "ddim" and eta > 1:
        raise DavBenchError(f"sampler.eta={eta:g}: 1 is all the noise of DDPM.", fix="--set sampler.eta=1")
    try:
        with quiet():
            if kind == "flow":
                return _flow(config, shape, steps, eta, int(getattr(pipe, "patch_size", 2)))
            if kind == "lcm":
                return _consistency(config, shape, steps)
            return _gaussian(config, shape, steps, eta)
    except (ValueError, KeyError, AttributeError, IndexError) as err:
        raise DavBenchError(
            f"the scheduler of {path} cannot take {steps} steps.", f"{type(err).__name__}: {err}".split("\n")[0],
            "--set sampler.steps= fewer",
        ) from err  # fmt: skip


# ---- building


def _latent(pipe: Any, family: Family, size: int | None, path: str) -> tuple[tuple[int, int, int], int]:
    """Shape of a latent and side of the image."""
    backbone, vae = getattr(pipe, family.denoiser), pipe.vae
    factor = int(pipe.vae_scale_factor)
    patch = int(backbone.config.get("patch_size") or 1)
    trained = backbone.config.sample_size
    side = size or (trained if isinstance(trained, int) else max(trained)) * factor
    if side < 1 or side % (factor * patch):
        near = max(factor * patch, round(side / (factor * patch)) * factor * patch)
        raise DavBenchError(
            f"images of {side} x {side} pixels cannot be encoded by this model.",
            f"Its VAE makes one latent of {factor} x {factor} pixels"
            + (f", its denoiser patches of {patch} x {patch} latents" if patch > 1 else "")
            + f": sides are multiples of {factor * patch}.",
            f"--set model.size={near}",
        )
    channels = int(backbone.config.in_channels)
    if channels != vae.config.latent_channels:
        raise DavBenchError(
            f"{path} denoises {channels} channels and its VAE has {vae.config.latent_channels}.",
            "Models that fill in or edit pictures need a picture to start from.",
            "a text-to-image pipeline",
        )
    return (channels, side // factor, side // factor), side


def assemble(pipe: Any, family: Family, c: Pipeline, sampler: Mapping[str, Any], name: str) -> DiffusionModel:
    """The model that a pipeline makes at these settings."""
    kind = sampler_of(pipe.scheduler)
    if c.process not in ("auto", kind):
        raise DavBenchError(
            f"model.process={c.process}, and {c.path} has a {type(pipe.scheduler).__name__}.",
            f"That is sampled as '{kind}'.", f"--set model.process={kind}",
        )  # fmt: skip
    shape, side = _latent(pipe, family, c.size, c.path)
    process = process_of(pipe, family, shape, sampler, c.path)
    backbone, guidance = getattr(pipe, family.denoiser), float(sampler.get("guidance", 1.0))
    embedding = None
    if width := backbone.config.get("time_cond_proj_dim"):  # distilled with guidance, which it is told
        embedding = pipe.get_guidance_scale_embedding(torch.tensor([guidance - 1.0]), embedding_dim=width)
    span = int(pipe.scheduler.config.num_train_timesteps)
    prompts = Prompts(pipe, family, side)
    network = Denoiser(backbone, family, prompts, guidance, span, kind != "flow", c, embedding)
    if c.gradient_checkpointing:
        pipe.vae.enable_gradient_checkpointing()
    return DiffusionModel(network.eval(), process, pipe.vae, type(pipe), name)


def build(c: Pipeline, sampler: Mapping[str, Any]) -> DiffusionModel:
    """The model `diffusers`: any pipeline of a known family, from a folder or the hub."""
    pipe, family = load(c)
    return assemble(pipe, family, c, sampler, "diffusers")


def build_emoji(c: EmojiDiffusion, sampler: Mapping[str, Any]) -> DiffusionModel:
    """The model `emoji-diffusion`: the pipeline shipped with the task t2i."""
    from dav_bench.tasks import asset

    settings = Pipeline(path=str(asset("t2i", "weights/emoji-diffusion")), **asdict(c))
    pipe, family = load(settings)
    return assemble(pipe, family, settings, sampler, "emoji-diffusion")
