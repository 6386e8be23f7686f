"""Measure the shipped weights of `t2i`: writes measured.json, from which the model cards take their numbers.

    python tasks/t2i/measure.py CACHE STATES [PART ...]

STATES is the folder that holds the states of training (vae, clip, heldout, looks, unet), for steps and seconds.
Parts: sizes, training, clip, vae, looks, unet, reference, scales, samples, sweep, grid; all but the sweep where none is
named. Parts not named keep what measured.json says. `reference` writes weights/reference.safetensors, `scales` writes
scales.json, and `grid` writes docs/emoji-diffusion.webp.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data import ANIMALS, ARTISTS, HERE, draw_looks, load, picture
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor
from train_clip import RECIPES, Tokens, accuracy
from train_looks import accuracy as looks_accuracy
from train_looks import drawn, through
from train_unet import FOLDER, Model, denoised, encoded, sample
from train_vae import held_out, psnr

from dav_bench.builtin.looks import load_looks
from dav_bench.images import load_open_clip

WEIGHTS = HERE / "weights"
STEPS, GUIDANCE, ETA = 20, 3.0, 1.0
"""What the card recommends, and what samples are drawn with."""
_FILE = tomllib.loads((HERE / "task.toml").read_text())
TASK = {name: _FILE["sampler"][name] for name in ("steps", "guidance")}
"""What the task samples with."""
PROMPTS = tuple(_FILE["prompts"]["eval"])
"""Prompts whose looks are counted: those evaluated."""


class Bench:
    """Everything that is measured, loaded once."""

    def __init__(self, cache: Path, states: Path) -> None:
        self.drawings, self.states, self.tokens = load(cache), states, Tokens()
        self._held: list[Any] = []

    @property
    def names(self) -> list[str]:
        """The 39 animals."""
        return [words[0] for words in self.drawings.captions[:ANIMALS]]

    def pipeline(self) -> tuple[Model, AutoencoderKL]:
        """The shipped networks in fp32."""
        if not self._held:
            pipe = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
            model = Model.__new__(Model)
            torch.nn.Module.__init__(model)
            model.text, model.unet = pipe.text_encoder.eval(), pipe.unet.eval()
            self._held = [model.requires_grad_(False), pipe.vae.eval().requires_grad_(False)]
        return self._held[0], self._held[1]

    def eye(self, name: str = "emoji-clip-heldout") -> Any:
        """A shipped CLIP."""
        return load_open_clip(WEIGHTS / name)[0]

    def draw(self, names: list[str], **settings: Any) -> Tensor:
        """Pictures of prompts with the recommended settings but for those given."""
        model, vae = self.pipeline()
        chosen = {"steps": STEPS, "guidance": GUIDANCE, "eta": ETA, "bf16": False, **settings}
        starts = range(0, len(names), 78)
        return torch.cat(
            [sample(model, vae, self.tokens(names[i : i + 78]), seed=9000 + i, **chosen) for i in starts]
        )


def sizes(bench: Bench) -> dict[str, Any]:
    """Parameters and bytes of everything shipped."""
    out: dict[str, Any] = {}
    for folder in sorted({p.parent for p in WEIGHTS.rglob("*") if p.is_file()}):
        files = [p for p in folder.iterdir() if p.is_file()]
        out[str(folder.relative_to(WEIGHTS))] = {"bytes": sum(p.stat().st_size for p in files)}
    model, vae = bench.pipeline()
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    nets = {
        "unet": model.unet,
        "text_encoder": model.text,
        "vae": vae,
        "looks": load_looks(WEIGHTS / "looks"),
    }
    nets |= {name: bench.eye(name) for name in RECIPES}
    out["parameters"] = {name: count(net) for name, net in nets.items()}
    return out


def training(bench: Bench) -> dict[str, Any]:
    """Steps and seconds of the clock of each training."""
    out = {}
    for path in sorted(bench.states.glob("*/*.pt")):
        saved = torch.load(path, weights_only=True)
        out[f"{path.parent.name}/{path.stem}"] = {"steps": saved["step"], "seconds": round(saved["seconds"])}
    return out


def clip(bench: Bench) -> dict[str, Any]:
    """Retrieval of captions on artists never seen, of both CLIPs."""
    out = {}
    for name, recipe in RECIPES.items():
        others = [a for a in ARTISTS if a not in recipe.artists]
        found = {"unseen": accuracy(bench.eye(name), bench.tokens, bench.drawings, others),
                 "seen": accuracy(bench.eye(name), bench.tokens, bench.drawings, recipe.artists)}  # fmt: skip
        out[name] = {
            "artists": recipe.artists,
            **{k: {m: round(x, 4) for m, x in v.items()} for k, v in found.items()},
        }
    return out


def vae(bench: Bench) -> dict[str, Any]:
    """PSNR of pictures that come back."""
    return {
        f"psnr_{name}": round(psnr(bench.pipeline()[1], x), 2) for name, x in held_out(bench.drawings).items()
    }


def looks(bench: Bench) -> dict[str, Any]:
    """Accuracy on pictures and on what the autoencoder makes of them."""
    x, truth = drawn(bench.drawings, 1024, torch.Generator().manual_seed(21))
    net = load_looks(WEIGHTS / "looks")
    back = through(bench.pipeline()[1], x)
    found = {"drawn": looks_accuracy(net, x, truth), "decoded": looks_accuracy(net, back, truth)}
    return {k: {m: round(v, 4) for m, v in numbers.items()} for k, numbers in found.items()}


def unet(bench: Bench) -> dict[str, Any]:
    """Mean squared error of v on 2,048 new looks, in fp32."""
    model, coder = bench.pipeline()
    held = encoded(coder, bench.drawings, 2048, torch.Generator().manual_seed(23))
    value = denoised(model, held, bench.drawings, bench.tokens, seed=24, bf16=False)
    return {"heldout_loss": round(value, 4)}


@torch.inference_mode()
def features(eye: Any, x: Tensor) -> Tensor:
    """Unit features of pictures (N, 3, 64, 64) in [0, 1]."""
    return torch.cat([eye.encode_image(p * 2 - 1, normalize=True) for p in x.split(128)])


def reference(bench: Bench) -> dict[str, Any]:
    """Write features of 64 training pictures of each animal, as the generator saw them."""
    g, eye = torch.Generator().manual_seed(25), bench.eye()
    thing = torch.arange(ANIMALS).repeat_interleave(64)
    artist = torch.arange(len(thing)) % len(ARTISTS)
    parts = torch.arange(len(thing)).split(312)
    found = [features(eye, picture(bench.drawings, draw_looks(thing[r], artist[r], g), g)) for r in parts]
    meta = {"names": json.dumps(bench.names), "features": "emoji-clip-heldout"}
    packed = {"features": torch.cat(found).half(), "prompt": thing.to(torch.int16)}
    save_file(packed, WEIGHTS / "reference.safetensors", meta)
    return {"pictures": len(thing)}


def scales(bench: Bench) -> dict[str, Any]:
    """Write scales.json: both rewards of training pictures and their names, the scale on which boards state the gap."""
    g = torch.Generator().manual_seed(27)
    thing = torch.arange(ANIMALS).repeat_interleave(32)
    artist = torch.arange(len(thing)) % len(ARTISTS)
    parts = torch.arange(len(thing)).split(312)
    x = torch.cat([picture(bench.drawings, draw_looks(thing[r], artist[r], g), g) for r in parts])
    held: dict[str, Any] = {"of": "training pictures of the 39 animals by all four artists"}
    for role, name in (("train", "emoji-clip"), ("heldout", "emoji-clip-heldout")):
        eye = bench.eye(name)
        with torch.inference_mode():
            text = eye.encode_text(bench.tokens(bench.names), normalize=True)[thing]
            reward = 100 * (features(eye, x) * text).sum(1)
        quantiles = torch.quantile(reward, torch.tensor([0.1, 0.5, 0.9])).tolist()
        held[role] = {k: round(q, 4) for k, q in zip(("q10", "median", "q90"), quantiles, strict=True)}
    (HERE / "scales.json").write_text(json.dumps(held, indent=2) + "\n")
    return {"pictures": len(thing)}


def agreement(bench: Bench, x: Tensor, truth: Tensor) -> dict[str, float]:
    """39-way accuracy and cosine of both CLIPs on pictures of animals, numbers (N,)."""
    out = {}
    for name in RECIPES:
        eye = bench.eye(name)
        with torch.inference_mode():
            text = eye.encode_text(bench.tokens(bench.names), normalize=True)
            score = features(eye, x) @ text.T
        out[f"{name}_39"] = round((score.argmax(1) == truth).float().mean().item(), 4)
        out[f"{name}_cosine"] = round(score[torch.arange(len(x)), truth].mean().item(), 4)
    return out


def entropy(labels: Tensor) -> float:
    """Entropy in nats of labels (N,), as counted."""
    p = labels.bincount().double() / len(labels)
    return -(p[p > 0] * p[p > 0].log()).sum().item()


def samples(bench: Bench) -> dict[str, Any]:
    """Pictures of the pretrained model: agreement with prompts, and looks; training pictures beside them."""
    truth = torch.arange(ANIMALS).repeat_interleave(8)
    x = bench.draw([bench.names[i] for i in truth])
    g = torch.Generator().manual_seed(26)
    artist = torch.arange(len(truth)) % len(ARTISTS)
    real = picture(bench.drawings, draw_looks(truth, artist, g), g)
    net = load_looks(WEIGHTS / "looks")
    seen = {}
    for prompt in PROMPTS:
        seen[prompt] = round(entropy(net.classes(bench.draw([prompt] * 64))), 3)
    tigers = draw_looks(torch.full((64,), bench.names.index("tiger")), torch.arange(64) % 4, g)
    return {
        "steps": STEPS, "guidance": GUIDANCE, "eta": ETA, "generated": agreement(bench, x, truth),
        "task": {**TASK, **agreement(bench, bench.draw([bench.names[i] for i in truth], **TASK), truth)},
        "real": agreement(bench, real, truth), "looks_entropy": seen,
        "looks_entropy_real": round(entropy(net.classes(picture(bench.drawings, tigers, g))), 3),
    }  # fmt: skip


def sweep(bench: Bench) -> dict[str, Any]:
    """39-way accuracy by guidance and steps."""
    truth = torch.arange(ANIMALS).repeat_interleave(4)
    names = [bench.names[i] for i in truth]
    settings = [("guidance", w) for w in (1.0, 2.0, 3.0, 5.0, 7.0)] + [
        ("steps", 10),
        ("steps", 40),
        ("eta", 0.0),
    ]
    return {f"{k} {v}": agreement(bench, bench.draw(names, **{k: v}), truth) for k, v in settings}


def grid(bench: Bench) -> dict[str, Any]:
    """Write the 39 animals, six pictures each, for the README."""
    from PIL import Image, ImageDraw

    each, across, side, margin = 6, 3, 64, 72
    x = bench.draw([name for name in bench.names for _ in range(each)])
    pictures = (x * 255).round().byte().permute(0, 2, 3, 1).numpy()
    rows = -(-ANIMALS // across)
    sheet = Image.new("RGB", (across * (each * (side + 2) + margin), rows * (side + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(bench.names):
        left, top = i % across * (each * (side + 2) + margin), i // across * (side + 2)
        pen.text((left + margin - 6, top + side // 2), name, fill="black", anchor="rm")
        for j in range(each):
            sheet.paste(Image.fromarray(pictures[i * each + j]), (left + margin + j * (side + 2), top))
    path = HERE.parent.parent / "docs/emoji-diffusion.webp"
    sheet.save(path, quality=85, method=6)
    return {"bytes": path.stat().st_size, "pictures": len(x)}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    f.__name__: f for f in (sizes, training, clip, vae, looks, unet, reference, scales, samples, sweep, grid)
}


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("states", type=Path)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench, path = Bench(args.cache, args.states), HERE / "measured.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    for name in args.parts or [p for p in PARTS if p != "sweep"]:
        torch.manual_seed(20)
        measured[name] = PARTS[name](bench)
        print(name, json.dumps(measured[name]), flush=True)
        path.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
