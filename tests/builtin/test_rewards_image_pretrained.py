"""Rewards whose weights others publish, on tiny random models saved in the published layouts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from dav_bench.builtin import image_rewards
from dav_bench.builtin.rewards.aesthetic import Aesthetic, ScoreLayers
from dav_bench.builtin.rewards.imagereward import DEVIATION, MEAN, ImageReward, renamed
from dav_bench.errors import DavBenchError, ExitCode
from dav_bench.images import CLIP_MEAN, CLIP_STD, Pixels
from dav_bench.plugins import catalog


def images(n: int = 3, height: int = 40, width: int = 40) -> Tensor:
    """Smooth and busy ones, on the grid of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, height, width, generator=generator)
    x[0] = F.interpolate(x[:1, :, :5, :5], (height, width), mode="bilinear")[0]
    return (x * 255).round() / 255


def pillow(image: Tensor, size: int, kernel: Image.Resampling) -> Tensor:
    """(3, H, W) resized to the short side, cropped, by Pillow."""
    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    short = min(picture.size)
    picture = picture.resize([int(size * side / short) for side in picture.size], kernel)
    left, top = (round((side - size) / 2) for side in picture.size)
    return (
        torch.from_numpy(np.asarray(picture.crop((left, top, left + size, top + size))).copy()).permute(
            2, 0, 1
        )
        / 255
    )


@pytest.mark.parametrize("shape", [(40, 40), (24, 24), (9, 9), (131, 90), (30, 47)])
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_pixels_are_those_of_pillow(shape: tuple[int, int], kernel: str) -> None:
    x = images(2, *shape)
    expected = torch.stack([pillow(image, 24, Image.Resampling[kernel.upper()]) for image in x])
    assert torch.equal(Pixels(24, (0,) * 3, (1,) * 3, kernel)(x), expected)


def test_fractions_are_kept_where_asked_for() -> None:
    x = images(2, 90, 131).requires_grad_()
    ours = Pixels(24, (0,) * 3, (1,) * 3, depth="float")(x)
    theirs = F.interpolate(x, (24, 34), mode="bicubic", antialias=True)[..., 5:29]
    assert torch.allclose(ours, theirs, atol=2e-6)
    way = torch.rand(ours.shape, generator=torch.Generator().manual_seed(1))
    (smooth,) = torch.autograd.grad((ours * way).sum(), x)
    (rounded,) = torch.autograd.grad((Pixels(24, (0,) * 3, (1,) * 3)(x) * way).sum(), x)
    assert smooth.abs().max() > 0.01
    assert torch.allclose(smooth, rounded, atol=1e-6)


def test_pixels_are_normalised_and_not_a_number_stays_so() -> None:
    x = images(2, 24, 24)
    x[1, 0, 3, 3] = torch.nan
    out = Pixels(24)(x)
    assert torch.allclose(
        out[0], (x[0] - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    )
    assert out[1].isnan().any()


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(DavBenchError, match="nearest"):
        Pixels(24, resize="nearest")


def layers(width: int) -> dict[str, Tensor]:
    """Of a score that keeps the scale of its input, as fresh ones do not."""
    generator = torch.Generator().manual_seed(4)
    state = ScoreLayers(width).state_dict()
    return {k: torch.randn(v.shape, generator=generator) / v.shape[-1] ** 0.5 for k, v in state.items()}


# ---- aesthetic predictor


@pytest.fixture(scope="module")
def aesthetic(tmp_path_factory: pytest.TempPathFactory) -> image_rewards.Aesthetic:
    root = tmp_path_factory.mktemp("aesthetic")
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 30, "max_position_embeddings": 12}
    vision = {**tower, "image_size": 24, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20))
    for p in clip.parameters():
        p.data.normal_(0, 0.3)
    clip.save_pretrained(root / "clip")
    torch.save(layers(20), root / "layers.pth")
    return image_rewards.Aesthetic(path=str(root / "layers.pth"), clip=str(root / "clip"))


def test_the_layers_have_the_published_names() -> None:
    names = {f"layers.{i}.{k}" for i in (0, 2, 4, 6, 7) for k in ("weight", "bias")}
    assert set(ScoreLayers().state_dict()) == names
    assert [tuple(p.shape) for p in ScoreLayers().parameters() if p.ndim == 2] == [
        (1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16),
    ]  # fmt: skip


def test_aesthetic_is_a_linear_map_of_the_embedding(aesthetic: image_rewards.Aesthetic) -> None:
    reward = Aesthetic.load(aesthetic)
    x = images()
    clip = CLIPModel.from_pretrained(aesthetic.clip)
    pixels = torch.stack([pillow(image, 24, Image.Resampling.BICUBIC) for image in x])
    pixels = (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        embedding = clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)
    embedding = embedding / embedding.norm(dim=1, keepdim=True)
    for i in (0, 2, 4, 6, 7):
        saved = torch.load(aesthetic.path, weights_only=True)
        embedding = embedding @ saved[f"layers.{i}.weight"].T + saved[f"layers.{i}.bias"]
    assert torch.allclose(reward(x), embedding[:, 0], atol=1e-6)
    assert reward(x).std() > 1e-3
    assert torch.equal(reward.head(reward.features(x)), reward(x))


def test_aesthetic_reads_safetensors_too(aesthetic: image_rewards.Aesthetic, tmp_path: Path) -> None:
    save_file(torch.load(aesthetic.path, weights_only=True), tmp_path / "layers.safetensors")
    other = Aesthetic.load(replace(aesthetic, path=str(tmp_path / "layers.safetensors")))
    assert torch.equal(other(images()), Aesthetic.load(aesthetic)(images()))


def test_aesthetic_computes_in_the_dtype_asked_for(aesthetic: image_rewards.Aesthetic) -> None:
    full, half = Aesthetic.load(aesthetic), Aesthetic.load(replace(aesthetic, dtype="bfloat16"))
    assert {p.dtype for p in half.clip.parameters()} == {torch.bfloat16}
    assert half(images()).dtype == torch.float32
    assert not torch.equal(half(images()), full(images()))
    assert torch.allclose(half(images()), full(images()), atol=0.02)


def test_the_predictor_of_another_encoder_is_refused(
    aesthetic: image_rewards.Aesthetic, tmp_path: Path
) -> None:
    torch.save(layers(21), tmp_path / "wide.pth")
    with pytest.raises(DavBenchError, match="other shapes"):
        Aesthetic.load(replace(aesthetic, path=str(tmp_path / "wide.pth")))


# ---- ImageReward

WIDTH, TEXT, LAYERS, PATCH, SIDE, VOCAB = 128, 64, 2, 8, 24, 12
PROMPTS = ["red apple", "a sad sad face", "tiger"]


def released() -> dict[str, Tensor]:
    """Random tensors under the names of ImageReward.pt, two encoder layers each."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, WIDTH),
        "visual_encoder.pos_embed": (1, (SIDE // PATCH) ** 2 + 1, WIDTH),
        "visual_encoder.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "visual_encoder.patch_embed.proj.bias": (WIDTH,),
        **affine("visual_encoder.norm", WIDTH),
        "text_encoder.embeddings.word_embeddings.weight": (VOCAB, TEXT),
        "text_encoder.embeddings.position_embeddings.weight": (40, TEXT),
        **affine("text_encoder.embeddings.LayerNorm", TEXT),
        **linear("vision_proj", WIDTH, 16),
        **linear("text_proj", TEXT, 16),
    }
    for i in range(LAYERS):
        at = f"visual_encoder.blocks.{i}"
        shapes |= affine(f"{at}.norm1", WIDTH) | affine(f"{at}.norm2", WIDTH)
        shapes |= linear(f"{at}.attn.qkv", WIDTH, 3 * WIDTH) | linear(f"{at}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{at}.mlp.fc1", WIDTH, 96) | linear(f"{at}.mlp.fc2", 96, WIDTH)
        at = f"text_encoder.encoder.layer.{i}"
        for name, source in (("attention", TEXT), ("crossattention", WIDTH)):
            shapes |= linear(f"{at}.{name}.self.query", TEXT, TEXT)
            shapes |= linear(f"{at}.{name}.self.key", source, TEXT) | linear(
                f"{at}.{name}.self.value", source, TEXT
            )
            shapes |= linear(f"{at}.{name}.output.dense", TEXT, TEXT) | affine(
                f"{at}.{name}.output.LayerNorm", TEXT
            )
        shapes |= linear(f"{at}.intermediate.dense", TEXT, 80) | linear(f"{at}.output.dense", 80, TEXT)
        shapes |= affine(f"{at}.output.LayerNorm", TEXT)
    generator = torch.Generator().manual_seed(3)
    tensors = {f"blip.{k}": 0.3 * torch.randn(s, generator=generator) for k, s in shapes.items()}
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    return tensors | {f"mlp.{k}": v for k, v in layers(TEXT).items()}


def affine(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name: str, i: int, o: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (o, i), f"{name}.bias": (o,)}


class Reference:
    """BLIP read straight from the released names (arXiv:2201.12086): no module of transformers."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.t = {k.removeprefix("blip."): v for k, v in tensors.items()}

    def lin(self, name: str, x: Tensor) -> Tensor:
        return x @ self.t[f"{name}.weight"].T + self.t[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * self.t[f"{name}.weight"] + self.t[f"{name}.bias"]

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
        score = q @ k.transpose(-1, -2) / 8
        if mask is not None:
            score = score.masked_fill(mask[:, None, None] == 0, -torch.inf)
        return (score.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def image(self, pixels: Tensor) -> Tensor:
        at = "visual_encoder."
        patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)
        patches = (
            patches @ self.t[at + "patch_embed.proj.weight"].flatten(1).T
            + self.t[at + "patch_embed.proj.bias"]
        )
        x = (
            torch.cat([self.t[at + "cls_token"].expand(len(pixels), -1, -1), patches], 1)
            + self.t[at + "pos_embed"]
        )
        for i in range(LAYERS):
            b = f"{at}blocks.{i}."
            q, k, v = self.lin(b + "attn.qkv", self.norm(b + "norm1", x, 1e-6)).chunk(3, -1)
            x = x + self.lin(b + "attn.proj", self.attend(q, k, v))
            x = x + self.lin(b + "mlp.fc2", F.gelu(self.lin(b + "mlp.fc1", self.norm(b + "norm2", x, 1e-6))))
        return self.norm(at + "norm", x, 1e-6)

    def score(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        image, at = self.image(pixels), "text_encoder.embeddings."
        x = (
            self.t[at + "word_embeddings.weight"][ids]
            + self.t[at + "position_embeddings.weight"][: ids.shape[1]]
        )
        x = self.norm(at + "LayerNorm", x, 1e-12)
        for i in range(LAYERS):
            b = f"text_encoder.encoder.layer.{i}."
            for name, source, keep in (("attention", None, mask), ("crossattention", image, None)):
                a = b + name
                source = x if source is None else source
                q, k, v = (
                    self.lin(f"{a}.self.{p}", s)
                    for p, s in (("query", x), ("key", source), ("value", source))
                )
                x = self.norm(
                    f"{a}.output.LayerNorm",
                    x + self.lin(f"{a}.output.dense", self.attend(q, k, v, keep)),
                    1e-12,
                )
            h = F.gelu(self.lin(b + "intermediate.dense", x))
            x = self.norm(b + "output.LayerNorm", x + self.lin(b + "output.dense", h), 1e-12)
        h = x[:, 0]
        for i in (0, 2, 4, 6, 7):
            h = self.lin(f"mlp.layers.{i}", h)
        return h[:, 0]


@pytest.fixture(scope="module")
def imagereward(tmp_path_factory: pytest.TempPathFactory) -> image_rewards.ImageReward:
    root = tmp_path_factory.mktemp("imagereward")
    torch.save(released(), root / "ImageReward.pt")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "apple", "a", "sad", "face", "tiger", "cat"]
    (root / "vocab.txt").write_text("\n".join(words) + "\n")
    return image_rewards.ImageReward(path=str(root), tokenizer=str(root))


@pytest.fixture
def judge(imagereward: image_rewards.ImageReward) -> ImageReward:
    reward = ImageReward.load(imagereward)
    reward.encode(PROMPTS)
    return reward


def test_imagereward_is_blip_with_the_released_weights(judge: ImageReward) -> None:
    x, cond = images(4), torch.tensor([2, 0, 1, 0])
    ids = torch.zeros(3, 35, dtype=torch.long)
    for i, row in enumerate([[2, 5, 6, 3], [2, 7, 8, 8, 9, 3], [2, 10, 3]]):
        ids[i, : len(row)] = torch.tensor(row)
    expected = Reference(released()).score(judge.pixels(x), ids[cond], (ids != 0).long()[cond])
    assert torch.allclose(judge(x, cond), (expected - MEAN) / DEVIATION, atol=1e-5)
    assert judge(x, cond).std() > 1e-3
    assert not torch.allclose(judge(x[:1], cond[:1]), judge(x[:1], cond[1:2]), atol=1e-4)


def test_imagereward_in_batches_and_without_the_scale(
    judge: ImageReward, imagereward: image_rewards.ImageReward
) -> None:
    x, cond = images(3), torch.tensor([2, 0, 1])
    other = ImageReward.load(replace(imagereward, batch=2, standardised=False))
    other.encode(PROMPTS)
    assert torch.allclose(other(x, cond), judge(x, cond) * DEVIATION + MEAN, atol=1e-5)


def test_imagereward_has_the_gradient_of_its_value(imagereward: image_rewards.ImageReward) -> None:
    judge = ImageReward.load(replace(imagereward, depth="float")).double()
    judge.encode(PROMPTS)
    x, cond = images(1).double().requires_grad_(), torch.tensor([1])
    (gradient,) = torch.autograd.grad(judge(x, cond).sum(), x)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    change = (judge(x + 1e-5 * way, cond) - judge(x - 1e-5 * way, cond)).item() / 2e-5
    assert (gradient * way).sum().item() == pytest.approx(change, rel=1e-4)


def test_imagereward_has_the_published_size() -> None:
    """ViT-L/16 at 224 pixels and BERT base with cross-attention: names and shapes, without the memory."""
    from dav_bench.builtin.rewards import imagereward as module

    like = {
        "vision.embeddings.patch_embedding.weight": (1024, 3, 16, 16),
        "vision.embeddings.position_embedding": (1, 197, 1024),
        "vision.encoder.layers.0.mlp.fc1.weight": (4096, 1024),
        "text.embeddings.word_embeddings.weight": (30524, 768),
        "text.embeddings.position_embeddings.weight": (512, 768),
        "text.encoder.layer.0.intermediate.dense.weight": (3072, 768),
        **{f"vision.encoder.layers.{i}.x": () for i in range(24)},
        **{f"text.encoder.layer.{i}.x": () for i in range(12)},
    }
    with torch.device("meta"):
        vision, text = module.networks({k: torch.empty(s) for k, s in like.items()})
    assert (vision.config.image_size, vision.config.num_attention_heads) == (224, 16)
    assert text.config.num_attention_heads == 12
    assert sum(p.numel() for p in vision.parameters()) == 303_301_632
    assert sum(p.numel() for p in text.parameters()) == 141_977_088


def test_names_are_mapped_one_to_one() -> None:
    tensors = released()
    unused = [k for k in tensors if "_proj." in k or k.endswith("position_ids")]
    assert len(renamed(tensors)) == len(tensors) - len(unused)


def test_imagereward_lacking_a_tensor_is_refused(
    imagereward: image_rewards.ImageReward, tmp_path: Path
) -> None:
    for lost in ("blip.visual_encoder.blocks.1.attn.qkv.bias", "blip.visual_encoder.pos_embed"):
        tensors = released()
        del tensors[lost]
        torch.save(tensors, tmp_path / "ImageReward.pt")
        with pytest.raises(DavBenchError, match="missing keys") as error:
            ImageReward.load(replace(imagereward, path=str(tmp_path)))
        assert "THUDM/ImageReward" in error.value.fix


def test_imagereward_scores_nothing_without_prompts(imagereward: image_rewards.ImageReward) -> None:
    with pytest.raises(DavBenchError, match="there are none"):
        ImageReward.load(imagereward)(images(), None)


# ---- what is missing


@pytest.mark.parametrize(
    ("name", "given", "named"),
    [
        (
            "aesthetic",
            {},
            ["aesthetic predictor", "improved-aesthetic-predictor", "Apache-2.0", "reward.train.path="],
        ),
        ("aesthetic", {"path": "nowhere.pth"}, ["aesthetic predictor", "nowhere.pth", "reward.train.path="]),
        (
            "aesthetic",
            {"path": "LAYERS"},
            ["CLIP ViT-L/14", "openai/clip-vit-large-patch14", "MIT", "reward.train.clip="],
        ),
        ("imagereward", {}, ["ImageReward-v1.0", "THUDM/ImageReward", "Apache-2.0", "reward.train.path="]),
        (
            "imagereward",
            {"path": "FOLDER"},
            ["ImageReward-v1.0", "holds no ImageReward.pt", "reward.train.path="],
        ),
        (
            "imagereward",
            {"path": "MODEL"},
            ["tokenizer of BERT", "google-bert/bert-base-uncased", "reward.train.tokenizer="],
        ),
    ],
)
def test_a_missing_weight_is_one_error(
    name: str, given: dict[str, str], named: list[str], tmp_path: Path, aesthetic: Any, imagereward: Any
) -> None:
    places = {"LAYERS": aesthetic.path, "FOLDER": str(tmp_path), "MODEL": imagereward.path}
    with pytest.raises(DavBenchError) as error:
        catalog().get("rewards", name).build({k: places.get(v, v) for k, v in given.items()})
    assert error.value.code == ExitCode.MISSING
    assert all(part in str(error.value) for part in named), str(error.value)


@pytest.mark.parametrize("name", ["emoji-clip", "emoji-clip-heldout", "aesthetic", "imagereward"])
def test_declares_what_it_is(name: str) -> None:
    entry = catalog().get("rewards", name)
    kind = entry.load().__self__
    assert frozenset(entry.provides) == kind.provides
    assert kind.domain == entry.domain == "image"
    assert kind.unit
    assert kind.range[0] < kind.range[1]
    assert not any(math.isnan(bound) for bound in kind.range)
