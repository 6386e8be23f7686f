"""The rewards on tiny random models of the published architectures, against transformers and open_clip themselves."""

import json

import open_clip
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from dav_bench import DavBenchError, ExitCode, catalog
from dav_bench.plugins import plugins
from dav_bench_preference import CLIPScore, HPSv2, PickScore
from dav_bench_preference.rewards import CLIPScoreReward, HPSReward, PickReward

PROMPTS = ["tiger", "red apple"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
COND = torch.tensor([1, 0, 1])


def images(size=24):
    """On the grid of 8 bits."""
    return (torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255).round() / 255


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name != "logit_scale":
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP model of transformers with its tokenizer."""
    at = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (at / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (at / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(at / "vocab.json"), str(at / "merges.txt")).save_pretrained(at)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = vocab.index("<|endoftext|>")
    text = {
        **tower,
        "vocab_size": len(vocab),
        "max_position_embeddings": 32,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = {**tower, "image_size": 24, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=20, logit_scale_init_value=3.0)
    randomise(CLIPModel(config)).save_pretrained(at)
    return at


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """A checkpoint in the layout of HPS v2, and the small architecture that it is of."""
    at = tmp_path_factory.mktemp("hps")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 24, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (at / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(at / "tiny-hps.json")
    model = randomise(open_clip.CLIP(**config))
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, at / "HPS_v2.1_compressed.pt")
    return at, model.eval()


def test_it_is_found_and_whole():
    assert "preference" in [p.name for p in plugins().loaded]
    for name in ("pickscore", "hpsv2", "clipscore"):
        entry = catalog().get("rewards", name)
        kind = entry.load().__self__
        assert entry.origin == "preference"
        assert frozenset(entry.provides) == kind.provides == {"reward.grad", "reward.features"}
        assert entry.domain == kind.domain == "image"
        assert kind.range[0] < kind.range[1]
        assert kind.unit


def theirs(folder, texts):
    clip, words = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    text = words(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return clip(pixel_values=(images() - MEAN) / STD, **text)


def test_pickscore_is_the_logit_of_clip(folder):
    reward = PickReward.load(PickScore(path=str(folder), tokenizer=str(folder)))
    reward.encode(PROMPTS)
    expected = theirs(folder, PROMPTS).logits_per_image[range(3), COND]
    assert torch.allclose(reward(images(), COND), expected, atol=1e-4)
    assert expected.std() > 0.1
    assert reward.range == pytest.approx((-(2.718281828**3), 2.718281828**3))


def test_clipscore_is_that_of_the_paper_or_a_percentage(folder):
    out = theirs(folder, ["A photo depicts " + p for p in PROMPTS])
    cosine = (out.image_embeds @ out.text_embeds.T)[range(3), COND]
    values = {}
    for form in ("paper", "percent"):
        reward = CLIPScoreReward.load(CLIPScore(path=str(folder), form=form))
        with pytest.warns(UserWarning, match="CLIP model ViT-B/32 reads 32 tokens"):
            reward.encode([*PROMPTS, "a tiger in the moonlight"])
        values[form] = reward(images(), COND)
    assert torch.allclose(values["paper"], 2.5 * cosine.clamp(min=0), atol=1e-5)
    assert torch.allclose(values["percent"], 100 * cosine, atol=1e-3)


def test_a_negative_cosine_is_no_clipscore(folder):
    reward = CLIPScoreReward.load(CLIPScore(path=str(folder), prefix=""))
    reward.encode(PROMPTS)
    features = torch.stack([reward.texts[0], -reward.texts[0]])
    assert reward.head(features, torch.tensor([0, 0])).tolist() == pytest.approx([2.5, 0.0])


def test_hps_is_the_cosine_of_open_clip(hps):
    at, model = hps
    reward = HPSReward.load(HPSv2(path=str(at), model="tiny-hps"))
    reward.encode(PROMPTS)
    ids = open_clip.SimpleTokenizer(context_length=20)(PROMPTS)
    with torch.no_grad():
        image, text, _ = model((images() - MEAN) / STD, ids)
    assert torch.allclose(reward(images(), COND), (image * text[COND]).sum(-1), atol=1e-5)
    with pytest.warns(UserWarning, match="HPS v2 reads 20 tokens: the prompt is cut after 'red apple"):
        reward.encode(["red apple " * 20])


def test_hps_resizes_as_floats(hps):
    reward = HPSReward.load(HPSv2(path=str(hps[0]), model="tiny-hps"))
    resized = torch.nn.functional.interpolate(images(40), 24, mode="bicubic", antialias=True)
    assert torch.allclose(reward.pixels(images(40)), (resized - MEAN) / STD, atol=1e-5)


def built(name, folder, hps, **more):
    given = {
        "pickscore": {"path": str(folder), "tokenizer": str(folder)},
        "clipscore": {"path": str(folder), "form": "percent", "prefix": ""},
        "hpsv2": {"path": str(hps[0]), "model": "tiny-hps"},
    }
    return catalog().get("rewards", name).build(given[name] | more)


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "clipscore"])
def test_each_has_features_a_gradient_and_batches(name, folder, hps):
    reward = built(name, folder, hps, depth="float").double()
    reward.encode(PROMPTS)
    x = images(40).double().requires_grad_()
    value = reward(x, COND)
    assert torch.equal(reward.head(reward.features(x), COND), value)
    assert reward.features(x).norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    (gradient,) = torch.autograd.grad(value.sum(), x)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    change = (reward(x + 1e-5 * way, COND) - reward(x - 1e-5 * way, COND)).sum().item() / 2e-5
    assert (gradient * way).sum().item() == pytest.approx(change, rel=1e-4)
    reward.batch = 2
    assert torch.allclose(reward(x, COND), value, atol=1e-9)


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "clipscore"])
def test_each_computes_in_the_dtype_asked_for(name, folder, hps):
    values = []
    for dtype in ("float32", "bfloat16"):
        reward = built(name, folder, hps, dtype=dtype)
        reward.encode(PROMPTS)
        values.append(reward.features(images()))
    assert values[1].dtype == torch.float32
    assert not torch.equal(*values)
    assert torch.allclose(*values, atol=0.05)


@pytest.mark.parametrize(
    ("name", "source", "setting"),
    [
        ("pickscore", "yuvalkirstain/PickScore_v1", "reward.train.path=FOLDER"),
        ("hpsv2", "xswu/HPSv2", "reward.train.path=FILE"),
        ("clipscore", "openai/clip-vit-base-patch32", "reward.train.path=FOLDER"),
    ],
)
@pytest.mark.parametrize("given", [{}, {"path": "nowhere"}])
def test_a_missing_weight_is_one_error(name, source, setting, given, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DavBenchError) as error:
        catalog().get("rewards", name).build(given)
    assert error.value.code == ExitCode.MISSING
    for part in (source, setting, given.get("path", source)):
        assert part in str(error.value)


def test_the_words_are_asked_for_too(folder, tmp_path):
    with pytest.raises(DavBenchError, match="tokenizer of CLIP ViT-H/14 is missing"):
        PickReward.load(PickScore(path=str(folder), tokenizer=str(tmp_path)))
