"""Pipeline folders of diffusers: which are understood, how they are read, and what each family's denoiser is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dav_bench.builtin.diffusion import Pipeline
from dav_bench.errors import DavBenchError, ExitCode, near

Rows = Mapping[str, Tensor]
"""What a denoiser is told beside states and times, by name: one row for each text, or for each state."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # components that no sample depends on
_CONVERT = "DiffusionPipeline.from_pretrained(OLD).save_pretrained(FOLDER), in Python, writes safetensors"


@dataclass(frozen=True)
class Family:
    """How the pipelines of one architecture are spoken to."""

    denoiser: str
    """Name of the component that denoises."""
    encode: Callable[[Any, list[str], torch.device, int], dict[str, Tensor]]
    """(pipeline, texts, device, side of the image) -> a row for each text."""
    call: Callable[[nn.Module, Tensor, Tensor, Rows, Tensor | None], Tensor]
    """(denoiser, states, timesteps, rows, embedding of the guidance) -> predictions."""
    layers: tuple[str, ...] = _ATTENTION
    """Layers that adapters are put on."""
    zeroed: tuple[str, ...] = ()
    """Rows that are 0 for no prompt, where the pipeline's configuration does not say otherwise."""


# ---- Stable Diffusion 1 and 2, latent consistency models


def _encode_sd(pipe: Any, texts: list[str], device: torch.device, size: int) -> dict[str, Tensor]:
    return {"text": pipe.encode_prompt(texts, device, 1, False)[0]}


def _call_sd(unet: nn.Module, x: Tensor, t: Tensor, rows: Rows, guidance: Tensor | None) -> Tensor:
    return unet(x, t, rows["text"], timestep_cond=guidance, return_dict=False)[0]


# ---- SDXL


def _encode_sdxl(pipe: Any, texts: list[str], device: torch.device, size: int) -> dict[str, Tensor]:
    text, _, pooled, _ = pipe.encode_prompt(texts, device=device, do_classifier_free_guidance=False)
    # size of the original, corner of the crop and size of the target: a whole picture of this size
    ids = text.new_tensor([size, size, 0, 0, size, size]).expand(len(texts), -1)
    return {"text": text, "pooled": pooled, "ids": ids}


def _call_sdxl(unet: nn.Module, x: Tensor, t: Tensor, rows: Rows, guidance: Tensor | None) -> Tensor:
    added = {"text_embeds": rows["pooled"], "time_ids": rows["ids"]}
    return unet(x, t, rows["text"], timestep_cond=guidance, added_cond_kwargs=added, return_dict=False)[0]


# ---- Stable Diffusion 3


def _encode_sd3(pipe: Any, texts: list[str], device: torch.device, size: int) -> dict[str, Tensor]:
    text, _, pooled, _ = pipe.encode_prompt(
        texts, None, None, device=device, do_classifier_free_guidance=False
    )
    return {"text": text, "pooled": pooled}


def _call_sd3(transformer: nn.Module, x: Tensor, t: Tensor, rows: Rows, guidance: Tensor | None) -> Tensor:
    return transformer(x, rows["text"], rows["pooled"], t, return_dict=False)[0]


_SD = Family("unet", _encode_sd, _call_sd)
FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": _SD,
    "LatentConsistencyModelPipeline": _SD,
    "StableDiffusionXLPipeline": Family("unet", _encode_sdxl, _call_sdxl, zeroed=("text", "pooled")),
    "StableDiffusion3Pipeline": Family(
        "transformer",
        _encode_sd3,
        _call_sd3,
        (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),  # those of Flow-GRPO
    ),
}
"""By the class that `model_index.json` names."""


# ---- reading


def load(c: Pipeline) -> tuple[Any, Family]:
    """The pipeline on the CPU in float32, frozen, and its family.

    Raises:
        DavBenchError: it is not there, of another kind, or its weights are no safetensors.
    """
    if not c.path:
        raise DavBenchError(
            "the model 'diffusers' needs a pipeline.",
            "Weights as large as these are not shipped.",
            "--set model.path=FOLDER of a diffusers pipeline, or its id on huggingface.co",
        )
    folder = Path(c.path).expanduser()
    local = folder.exists()
    if local:
        _check(folder)
    elif c.path.startswith((".", "/", "~")) or c.path.count("/") != 1:
        raise _missing(c.path, "There is no such folder, and an id of the hub reads OWNER/NAME.")
    from diffusers import DiffusionPipeline

    source = str(folder) if local else c.path
    options = {} if local or c.revision is None else {"revision": c.revision}
    with quiet():
        try:
            index = DiffusionPipeline.load_config(source, **options)
            family = _family(c.path, index.get("_class_name", ""))
            unused: dict[str, Any] = {name: None for name in _UNUSED if name in index}
            if "requires_safety_checker" in index:
                unused["requires_safety_checker"] = False
            pipe = DiffusionPipeline.from_pretrained(
                source,
                **options,
                **unused,
                variant=c.variant,
                use_safetensors=True,
            )
        except DavBenchError:
            raise
        except Exception as err:  # of the hub, the network, the file system or a configuration
            raise _missing(c.path, _reason(err)) from err
        for part in pipe.components.values():
            if isinstance(part, nn.Module):  # whatever the dtype of its file
                part.float().eval().requires_grad_(False)
    return pipe, family


def _family(path: str, kind: str) -> Family:
    if kind not in FAMILIES:
        raise DavBenchError(
            f"{path} is a {kind or 'pipeline of no class'}, which dav-bench does not know{near(kind, FAMILIES)}.",
            f"Known: {', '.join(FAMILIES)}.",
            "--set model.path= one of those, or write a plugin with a model (docs/plugins/models.md)",
        )
    return FAMILIES[kind]


def _check(folder: Path) -> None:
    """A folder holds an index, a class that is known, and safetensors for each component with weights."""
    index = folder / "model_index.json"
    if folder.is_file():
        raise DavBenchError(
            f"{folder} is a file; a model is a pipeline folder of diffusers.",
            "Checkpoints of a single file have no tokenizer and no scheduler of their own.",
            f"StableDiffusionPipeline.from_single_file('{folder}').save_pretrained(FOLDER), in Python",
        )
    if not index.is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/model_index.json"))
        raise DavBenchError(
            f"{folder} is no pipeline folder of diffusers: it has no model_index.json.",
            f"There is one in {', '.join(inside)} inside it." if inside else "",
            f"--set model.path={folder / inside[0]}" if inside else "--set model.path=FOLDER, or a hub id",
        )
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        kind = parts["_class_name"]
    except (ValueError, KeyError, TypeError) as err:
        raise DavBenchError(f"{index} cannot be read.", f"{type(err).__name__}: {err}") from err
    family = _family(str(folder), kind)
    for name in (family.denoiser, "vae"):
        if not (folder / name).is_dir():
            raise DavBenchError(f"{folder} lacks its component '{name}'.", "model_index.json names it.")
    for name in parts:
        if name in _UNUSED or not (folder / name).is_dir():
            continue
        files = [p.name for p in (folder / name).iterdir()]
        unsafe = sorted(f for f in files if f.endswith((".bin", ".ckpt", ".pt", ".pth")))
        if unsafe and not any(f.endswith(".safetensors") for f in files):
            raise DavBenchError(
                f"the weights of '{name}' in {folder} are no safetensors.",
                f"{unsafe[0]} is a pickle, which may run code when it is read; dav-bench does not read it.",
                _CONVERT,
            )


def _missing(path: str, why: str) -> DavBenchError:
    fetch = "`hf download OWNER/NAME --local-dir FOLDER` with a network, then --set model.path=FOLDER"
    return DavBenchError(
        f"the model {path!r} cannot be had.",
        f"{why}\nIt should be a pipeline folder of diffusers, or the id of one on huggingface.co.",
        _CONVERT if "safetensors" in why else fetch,
        code=ExitCode.MISSING,
    )


def _reason(err: Exception) -> str:
    first = next((line.strip() for line in str(err).splitlines() if line.strip()), "")
    return f"{type(err).__name__}: {first[:300]}"


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no remarks about components that are left out on purpose."""
    import diffusers.utils.logging
    import transformers.utils.logging

    both = (diffusers.utils.logging, transformers.utils.logging)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in both]
    for log in both:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (level, bars) in zip(both, before, strict=True):
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()
