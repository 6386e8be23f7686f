# ruff: noqa: E501  (text and tables)
"""Write cards/*.md from measured.json, so that no card says what was not measured.

python tasks/t2i/write_cards.py
"""

from __future__ import annotations

import json
from typing import Any

from data import HERE

LICENCE = """- **Licence**: that of dav-bench; the pictures it learnt from are under CC-BY-4.0 (Twemoji), Apache-2.0 (Noto Emoji) and MIT
  (Fluent Emoji), with the notices in `NOTICE-emoji.md`, which go with the weights and with what they draw."""


def percent(x: float) -> str:
    """A share in per cent."""
    return f"{100 * x:.1f} %"


def time(m: dict[str, Any], *names: str) -> str:
    """Updates and seconds of trainings."""
    found = [m["training"].get(n, {"steps": 0, "seconds": 0}) for n in names]
    return f"{sum(f['steps'] for f in found):,} updates in {sum(f['seconds'] for f in found):,} s"


def diffusion(m: dict[str, Any]) -> str:
    """The card of emoji-diffusion."""
    p, s, drawn = m["sizes"]["parameters"], m["sizes"], m["samples"]
    size = sum(v["bytes"] for k, v in s.items() if k.startswith("emoji-diffusion"))
    entropy = "\n".join(f"| {name} | {value:.2f} |" for name, value in drawn["looks_entropy"].items())
    sweep = "\n".join(
        f"| {name} | {percent(v['emoji-clip-heldout_39'])} | {percent(v['emoji-clip_39'])} |"
        for name, v in m.get("sweep", {}).items()
    )
    table = f"""
| 39-way accuracy | `emoji-clip-heldout` | `emoji-clip` |
|---|---|---|
{sweep}

Four pictures of each animal, all else as recommended.
""" if sweep else ""  # fmt: skip
    return f"""# Model card: `emoji-diffusion`

A latent text-to-image diffusion model of emoji, 64 x 64 pixels: a Stable Diffusion in miniature, in the folder that
diffusers' `DiffusionPipeline.from_pretrained` reads. The pretrained model of the tasks `t2i`, `t2i-compress` and
`t2i-incompress`.

| part | parameters | what |
|---|---|---|
| `unet` | {p["unet"]:,} | `UNet2DConditionModel`, 8 x 8 and 4 x 4 positions of 128 and 192 channels, cross-attention at 8 x 8 |
| `vae` | {p["vae"]:,} | `AutoencoderKL`, 64 x 64 pixels to 8 x 8 latents of 8 channels, each with mean 0 and variance 1 (`scaling_factor` 1) |
| `text_encoder` | {p["text_encoder"]:,} | `CLIPTextModel`, two layers of 128, 16 tokens |
| `tokenizer` | | byte-pair encoding of our own, 2,048 tokens, lower case |
| `scheduler` | | DDIM, v-prediction, the noise levels of Stable Diffusion, trailing time steps |

Stored in fp16, {size:,} bytes in all; computed in fp32 here, and all numbers below are of the rounded weights.

- **Use**: `pipe(prompt, guidance_scale={drawn["guidance"]:g}, num_inference_steps={drawn["steps"]})`. A prompt is the name of a thing of `things.txt`,
  with a size before it or a background after it, or without: "tiger", "small tiger", "tiger on a blue background".
- **Data**: `DATA_CARD.md`. 65 % of pictures show one of the 39 animals.
{LICENCE}
- **Training**, one thread per process on a 2-core CPU that was busy with other work: latents `train_vae.py small`
  {time(m, "vae/small")}, pixels `train_vae.py full` {time(m, "vae/full")}, text encoder and UNet `train_unet.py`
  {time(m, "unet/state")} of 64 pictures each; bf16 autocast, AdamW, averaged weights, 10 % of captions left out. Seconds are
  of the clock. Training can go on from its states; the numbers are of what is shipped.

| | |
|---|---|
| denoising loss on new looks (mean squared error of v, 2,048 latents) | {m["unet"]["heldout_loss"]:.4f} |
| PSNR of the autoencoder, new looks of the animals | {m["vae"]["psnr_animals"]:.2f} dB |
| PSNR, things never shown | {m["vae"]["psnr_unseen"]:.2f} dB |
| 39-way accuracy of `emoji-clip-heldout` on generated animals | {percent(drawn["generated"]["emoji-clip-heldout_39"])} |
| the same as the tasks draw them, {drawn["task"]["steps"]} steps, guidance {drawn["task"]["guidance"]:g} | {percent(drawn["task"]["emoji-clip-heldout_39"])} |
| the same on training pictures | {percent(drawn["real"]["emoji-clip-heldout_39"])} |
| 39-way accuracy of `emoji-clip` on generated animals | {percent(drawn["generated"]["emoji-clip_39"])} |
| the same on training pictures | {percent(drawn["real"]["emoji-clip_39"])} |
| mean cosine to the prompt, `emoji-clip-heldout`, generated and real | {drawn["generated"]["emoji-clip-heldout_cosine"]:.3f}, {drawn["real"]["emoji-clip-heldout_cosine"]:.3f} |
| mean cosine to the prompt, `emoji-clip`, generated and real | {drawn["generated"]["emoji-clip_cosine"]:.3f}, {drawn["real"]["emoji-clip_cosine"]:.3f} |

Eight pictures of each animal, {drawn["steps"]} steps, guidance {drawn["guidance"]:g}, eta {drawn["eta"]:g}.
{table}
| entropy of looks in nats, 64 pictures, as counted | |
|---|---|
{entropy}
| training pictures of a tiger | {drawn["looks_entropy_real"]:.2f} |

The most is log 24 = 3.18.

**Limits.** It knows 220 things and draws those with many pictures best. Words that it has not seen are spelt in pieces,
which mean nothing to it. It is no model of natural pictures.
"""


def clips(m: dict[str, Any]) -> str:
    """The card of both CLIPs."""
    c, p = m["clip"], m["sizes"]["parameters"]
    names = ("emoji-clip", "emoji-clip-heldout")
    rows = ""
    for kind, said in (("unseen", "artists never seen"), ("seen", "artists of its training")):
        for many, size in (("39", "39 animals"), ("things", "220 things"), ("all", "1,620 things")):
            for way, how in (
                ("image_to_text", "picture to caption"),
                ("text_to_image", "caption to picture"),
            ):
                rows += f"| {said}, {size}, {how} | " + " | ".join(
                    percent(c[n][kind][f"{way}_{many}"]) for n in names
                )
                rows += " |\n"
    return f"""# Model card: `emoji-clip` and `emoji-clip-heldout`

Two CLIPs (contrastive image-text models) of emoji in open_clip's own format: `open_clip.create_model("local-dir:FOLDER")` reads them.
`emoji-clip` is the reward of the task `t2i`, `emoji-clip-heldout` judges and is never seen by a method. Both take
64 x 64 pixels as `x * 2 - 1` and the tokens of `emoji-diffusion`'s tokenizer, padded to 16.

| | `emoji-clip` (reward) | `emoji-clip-heldout` |
|---|---|---|
| image tower | `ModifiedResNet` with attention pooling, width 16 | `VisionTransformer`, six layers of 128, patches of 8 x 8 |
| text tower | two layers of 128 | two layers of 48 |
| parameters | {p["emoji-clip"]:,} | {p["emoji-clip-heldout"]:,} |
| artists | Noto, Fluent flat | Twemoji, Fluent 3-D |
| seed | 1 | 2 |
| disturbed by | blur, noise, light, grey, turns of 15 degrees | coarse pixels, holes, noise, light, grey, turns of 25 degrees |
| training | {time(m, "clip/state")} of 192 | {time(m, "heldout/state")} of 192 |

Shares found by the nearest of all captions (or pictures), plain backgrounds and sizes as the generator draws them:

| | `emoji-clip` | `emoji-clip-heldout` |
|---|---|---|
{rows}
- **Data**: `DATA_CARD.md`; each has one flat and one shaded artist, hue turned freely in 15 % of pictures and by 12 degrees in the
  others, 15 % grey, so that neither can rely on style or colour alone.
{LICENCE}
- **Training**: `python tasks/t2i/train_clip.py NAME CACHE STATE`; symmetric cross-entropy with label smoothing .05 over batches in which no thing occurs twice.

**Limits.** Fluent flat and Fluent 3-D are two renderings of one design, one on each side, so the two models agree more
than two strangers would. A cosine is a score of emoji and says nothing of other pictures.
"""


def looks(m: dict[str, Any]) -> str:
    """The card of the classifier of looks."""
    a, b = m["looks"]["drawn"], m["looks"]["decoded"]
    return f"""# Model card: `looks`

Tells which of four artists drew a picture and on which of six backgrounds: 24 looks of one prompt, whose entropy is the
metric `looks-entropy`. Four strided convolutions and two linear heads (`dav_bench/builtin/looks.py`),
{m["sizes"]["parameters"]["looks"]:,} parameters.

| accuracy on 1,024 new looks | artist | background | both |
|---|---|---|---|
| pictures | {percent(a["artist"])} | {percent(a["background"])} | {percent(a["both"])} |
| what the autoencoder makes of them | {percent(b["artist"])} | {percent(b["background"])} | {percent(b["both"])} |

- **Data**: `DATA_CARD.md`; half of each batch are pictures, made coarse or noisy, half went through the autoencoder.
{LICENCE}
- **Training**: `python tasks/t2i/train_looks.py CACHE STATE`, {time(m, "looks/state")} of 64.

**Limits.** It always answers: a picture that no artist would have drawn gets the look that it is least unlike.
"""


def main() -> None:
    """Write all cards."""
    measured = json.loads((HERE / "measured.json").read_text())
    (HERE / "cards").mkdir(exist_ok=True)
    for name, card in {"emoji-diffusion": diffusion, "emoji-clip": clips, "looks": looks}.items():
        (HERE / "cards" / f"{name}.md").write_text(card(measured))


if __name__ == "__main__":
    main()
