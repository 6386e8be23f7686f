"""CLIP rewards in open_clip's format: a tiny random model saved as the shipped ones are, against open_clip itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from dav_bench.builtin.image_rewards import EmojiClip
from dav_bench.builtin.rewards.clip import EmojiReward
from dav_bench.errors import DavBenchError, ExitCode
from dav_bench.images import open_clip_network

WORDS = ["tiger", "red", "apple", "sad", "face"]
PROMPTS = ["tiger", "red apple", "sad face"]
CONFIG = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 300, "width": 16, "heads": 2, "layers": 1},
        "custom_text": True,
    },
    "preprocess_cfg": {
        "size": 32,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
    },
}


def write_tokenizer(folder: Path) -> None:
    """The letters, and each word as the merges that make it."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = [*letters, *(c + "</w>" for c in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            vocab.append(parts[0])
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)


def write_clip(folder: Path, config: dict[str, Any] = CONFIG) -> None:
    torch.manual_seed(0)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = {k: v.half() for k, v in open_clip_network(config["model_cfg"]).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clip")
    write_clip(root / "clip")
    write_tokenizer(root / "tokenizer")
    return root


def settings(files: Path, **changes: Any) -> EmojiClip:
    return EmojiClip(**{"weights": str(files / "clip"), "tokenizer": str(files / "tokenizer"), **changes})


@pytest.fixture
def reward(files: Path) -> EmojiReward:
    built = EmojiReward.load(settings(files))
    built.encode(PROMPTS)
    return built


def images(n: int = 5, size: int = 32) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_is_the_cosine_that_open_clip_computes(files: Path, reward: EmojiReward) -> None:
    theirs = open_clip.create_model(f"local-dir:{files / 'clip'}", precision="fp32").eval()
    ids = CLIPTokenizer.from_pretrained(files / "tokenizer")(
        PROMPTS, padding="max_length", max_length=8, return_tensors="pt"
    )["input_ids"]
    x, cond = images(), torch.tensor([0, 1, 2, 1, 0])
    with torch.no_grad():
        image = F.normalize(theirs.encode_image((x - 0.5) / 0.25), dim=-1)
        text = F.normalize(theirs.encode_text(ids), dim=-1)
    assert torch.allclose(reward(x, cond), 100 * (image * text[cond]).sum(-1), atol=1e-4)
    assert reward(x, cond).std() > 0.1


def test_is_head_of_features(reward: EmojiReward) -> None:
    x, cond = images(), torch.tensor([2, 0, 1, 0, 2])
    features = reward.features(x)
    assert features.shape == (5, 16)
    assert torch.allclose(features.norm(dim=-1), torch.ones(5))
    assert torch.equal(reward.head(features, cond), reward(x, cond))


def test_batches_change_nothing(reward: EmojiReward) -> None:
    x, cond = images(), torch.tensor([2, 0, 1, 0, 2])
    together = reward(x, cond)
    reward.batch = 2
    assert torch.allclose(reward(x, cond), together, atol=1e-4)


def test_has_the_gradient_of_its_value(reward: EmojiReward) -> None:
    reward = reward.double()
    reward.encode(PROMPTS)
    x, cond = images(1).double().requires_grad_(), torch.tensor([1])
    (gradient,) = torch.autograd.grad(reward(x, cond).sum(), x)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-6 * way
    change = (reward(x + step, cond) - reward(x - step, cond)).item() / 2e-6
    assert (gradient * way).sum().item() == pytest.approx(change, rel=1e-5)


@pytest.mark.parametrize("size", [16, 64])
def test_reads_images_of_another_size(reward: EmojiReward, size: int) -> None:
    x = images(2, size).requires_grad_()
    reward(x, torch.tensor([0, 1])).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_scores_nothing_without_prompts(files: Path, reward: EmojiReward) -> None:
    with pytest.raises(DavBenchError, match="there are none"):
        reward(images(), None)
    with pytest.raises(DavBenchError, match="there are none"):
        EmojiReward.load(settings(files))(images(), torch.zeros(5, dtype=torch.long))


def test_says_where_a_prompt_is_cut(reward: EmojiReward) -> None:
    kept = "emoji-clip reads 8 tokens: the prompt is cut after 'red apple red apple red apple'"
    with pytest.warns(UserWarning, match=kept):
        reward.encode(["tiger", "red apple " * 6])


def test_states_its_scale(files: Path) -> None:
    assert EmojiReward.load(settings(files, scale=2.0)).range == (-2.0, 2.0)
    assert EmojiReward.range == (-100.0, 100.0)


@pytest.mark.parametrize("lost", ["open_clip_config.json", "open_clip_model.safetensors"])
def test_a_folder_without_a_model_is_one_error(tmp_path: Path, files: Path, lost: str) -> None:
    write_clip(tmp_path / "clip")
    (tmp_path / "clip" / lost).unlink()
    with pytest.raises(DavBenchError, match=lost) as error:
        EmojiReward.load(settings(files, weights=str(tmp_path / "clip")))
    assert error.value.code == ExitCode.MISSING


def test_weights_of_another_network_are_refused(tmp_path: Path, files: Path) -> None:
    write_clip(tmp_path / "clip")
    config = json.loads(json.dumps(CONFIG))
    config["model_cfg"]["embed_dim"] = 8
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(DavBenchError, match="other shapes"):
        EmojiReward.load(settings(files, weights=str(tmp_path / "clip")))


def test_the_shipped_models_differ_in_kind_and_read_prompts() -> None:
    train, heldout = EmojiReward.load(EmojiClip()), EmojiReward.load_heldout(EmojiClip())
    assert type(train.towers.visual) is not type(heldout.towers.visual)
    assert 2 * sum(p.numel() for r in (train, heldout) for p in r.parameters()) < 10 * 2**20  # bytes in fp16
    x = images(3, 64).requires_grad_()
    cond = torch.tensor([0, 1, 0])
    for reward in (train, heldout):
        reward.encode(["tiger", "red apple"])
        assert reward.features(x).shape == (3, 128)
        value = reward(x, cond)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0
        assert value.abs().max() < 100
        assert not torch.allclose(value, reward(x, 1 - cond), atol=0.1)
