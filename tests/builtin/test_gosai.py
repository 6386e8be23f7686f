"""The published layouts: parameter counts, keys, and loading from synthetic checkpoints that have them."""

from __future__ import annotations

import gzip
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dav_bench.builtin import gosai
from dav_bench.builtin.gosai import GosaiModel, GosaiReward
from dav_bench.builtin.metrics import gosai as metrics
from dav_bench.builtin.metrics.base import MetricContext, Samples
from dav_bench.builtin.models import gosai as model
from dav_bench.builtin.models.gosai import DnaConv
from dav_bench.builtin.rewards import gosai as rewards
from dav_bench.builtin.rewards.gosai import Enformer, EnformerShape
from dav_bench.core.noise import Noise
from dav_bench.errors import DavBenchError, ExitCode
from dav_bench.plugins import catalog
from dav_bench.tasks import check_task, read_task, shipped_tasks

SMALL = {"n_conv": 3, "channels": 768, "n_transformers": 1, "n_heads": 8, "key_len": 4}


class PickledConfig:
    """Stands for the OmegaConf object of a real checkpoint."""

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("a class of the file was built")

    def __getstate__(self) -> dict[str, int]:
        return {"a": 1}


def dnaconv_keys() -> dict[str, tuple[int, ...]]:
    """Keys and shapes as published (dav.md F.3)."""
    keys: dict[str, tuple[int, ...]] = {
        "linear.weight": (128, 5, 9),
        "linear.bias": (128,),
        "time_embedder.0.W": (64,),
        "time_embedder.1.weight": (128, 128),
        "time_embedder.1.bias": (128,),
        "final_conv.0.weight": (128, 128, 1),
        "final_conv.0.bias": (128,),
        "final_conv.2.weight": (5, 128, 1),
        "final_conv.2.bias": (5,),
    }
    for i in range(20):
        keys |= {
            f"convs.{i}.weight": (128, 128, 9),
            f"convs.{i}.bias": (128,),
            f"time_layers.{i}.dense.weight": (128, 128),
            f"time_layers.{i}.dense.bias": (128,),
            f"norms.{i}.weight": (128,),
            f"norms.{i}.bias": (128,),
        }
    return keys


def batch_norm(c: int) -> dict[str, tuple[int, ...]]:
    return {
        **{f"norm.layer.{k}": (c,) for k in ("weight", "bias", "running_mean", "running_var")},
        "norm.layer.num_batches_tracked": (),
    }


def conv_block(i: int, o: int, kernel: int, pool: bool) -> dict[str, tuple[int, ...]]:
    keys = {**batch_norm(i), "conv.weight": (o, i, kernel), "conv.bias": (o,)}
    return {**keys, "pool.layer.to_attn_logits.weight": (o, o, 1, 1)} if pool else keys


def enformer_keys() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the full-size oracle as published (dav.md F.4)."""
    widths = (768, 768, 896, 1024, 1152, 1280, 1536)
    tower = "embedding.conv_tower.blocks"
    keys: dict[str, tuple[int, ...]] = {f"{tower}.0.0.weight": (768, 4, 15), f"{tower}.0.0.bias": (768,)}
    for i, c in enumerate(widths):
        keys |= {f"{tower}.{i}.1.{k}": s for k, s in conv_block(c, c, 1, True).items()}
        if i:
            keys |= {f"{tower}.{i}.0.{k}": s for k, s in conv_block(widths[i - 1], c, 5, False).items()}
    for j in range(11):
        at = f"embedding.transformer_tower.blocks.{j}"
        for norm in ("norm", "ffn.dense1.norm"):
            keys |= {f"{at}.{norm}.layer.{k}": (1536,) for k in ("weight", "bias")}
        keys |= {f"{at}.mha.{k}.weight": (512, 1536) for k in ("to_q", "to_k")}
        keys |= {f"{at}.mha.{k}.weight": (1536, 1536) for k in ("to_v", "to_out")}
        keys |= {f"{at}.mha.{k}": (1, 8, 1, 64) for k in ("rel_content_bias", "rel_pos_bias")}
        keys |= {f"{at}.mha.to_out.bias": (1536,), f"{at}.mha.to_rel_k.weight": (512, 192)}
        keys |= {f"{at}.ffn.dense1.linear.weight": (3072, 1536), f"{at}.ffn.dense1.linear.bias": (3072,)}
        keys |= {f"{at}.ffn.dense2.linear.weight": (1536, 3072), f"{at}.ffn.dense2.linear.bias": (1536,)}
    keys |= {f"embedding.pointwise_conv.{k}": s for k, s in conv_block(1536, 3072, 1, False).items()}
    keys |= {"head.channel_transform.conv.layer.weight": (3, 3072, 1)}
    return {**keys, "head.channel_transform.conv.layer.bias": (3,)}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


def values(keys: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: 0.05 * torch.randn(s, generator=generator) for k, s in keys.items()}


def test_dnaconv_is_the_published_network() -> None:
    network = DnaConv()
    assert shapes(network) == dnaconv_keys()
    trainable = [p for p in network.parameters() if p.requires_grad]
    assert sum(p.numel() for p in network.parameters()) == 3_326_661
    assert (len(trainable), sum(p.numel() for p in trainable)) == (128, 3_326_597)
    assert [c.dilation[0] for c in network.convs] == [1] * 8 + [4] * 4 + [16] * 4 + [64] * 4


def test_full_size_enformer_is_the_published_network() -> None:
    with torch.device("meta"):
        network = Enformer(EnformerShape())
    assert shapes(network) == enformer_keys()
    assert sum(p.numel() for p in network.parameters()) == 229_854_723
    assert network(torch.zeros(2, 4, 200, device="meta")).shape == (2, 3, 1)


# ---- the denoiser


def write_mdlm(path: Path) -> dict[str, dict[str, Tensor]]:
    raw, average = values(dnaconv_keys(), 0), values(dnaconv_keys(), 1)
    order = [k for k, p in DnaConv().named_parameters() if p.requires_grad]
    content = {
        "state_dict": {f"backbone.{k}": v for k, v in raw.items()},
        "hyper_parameters": {"config": PickledConfig()},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 3e-4}]}],
        "lr_schedulers": [],
        "epoch": 1,
        "global_step": 131_500,
        "ema": {"decay": 0.9999, "num_updates": 10, "shadow_params": [average[k] for k in order]},
        "sampler": {"random_state": None},
    }
    torch.save(content, path)
    return {"raw": raw, "ema": {**average, "time_embedder.0.W": raw["time_embedder.0.W"]}}


@pytest.fixture(scope="module")
def mdlm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    path = tmp_path_factory.mktemp("mdlm") / "last.ckpt"
    return path, write_mdlm(path)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_reads_the_weights_asked_for(mdlm: tuple[Path, Any], weights: Any) -> None:
    path, written = mdlm
    built = model.build(GosaiModel(path=str(path), weights=weights), {"steps": 16})
    state = built.network.state_dict()
    assert all(torch.equal(state[k], v) for k, v in written[weights].items())
    assert (built.process.T, built.domain, built.shares) == (16, "sequence", True)


def test_raw_weights_are_the_default_as_in_the_release() -> None:
    assert GosaiModel().weights == "raw"
    assert GosaiModel().time_input is False


def test_a_bare_state_dict_is_read(mdlm: tuple[Path, Any], tmp_path: Path) -> None:
    torch.save({f"backbone.{k}": v for k, v in mdlm[1]["raw"].items()}, tmp_path / "finetuned.ckpt")
    network = model.load_dnaconv(tmp_path / "finetuned.ckpt")
    assert torch.equal(network.linear.weight, mdlm[1]["raw"]["linear.weight"])
    with pytest.raises(DavBenchError, match="no average of the weights"):
        model.load_dnaconv(tmp_path / "finetuned.ckpt", "ema")


def test_time_is_read_only_where_asked_for(mdlm: tuple[Path, Any]) -> None:
    x = F.one_hot(torch.randint(0, 5, (2, 200)), 5).float()
    early, late = torch.full((2,), 0.1), torch.ones(2)
    for time_input in (False, True):
        network = model.load_dnaconv(mdlm[0], time_input=time_input).eval()
        same = torch.equal(network(x, early), network(x, late))
        assert same is not time_input
        assert network(x, late).isfinite().all()
    assert network(x, late).shape == (2, 200, 4)


def test_the_model_samples(mdlm: tuple[Path, Any]) -> None:
    built = model.build(GosaiModel(path=str(mdlm[0])), {"steps": 3})
    noise = Noise.of(0, 2)
    x = built.process.prior(noise)
    with torch.no_grad():
        for i in range(3, 0, -1):
            x = built.step(x, i).sample(noise.fold(i))
    assert x[..., -1].sum() == 0
    assert (x.sum(-1) == 1).all()


# ---- oracles and classifier


def write_oracle(path: Path, tasks: int = 3, task: str = "regression", **changes: Any) -> Enformer:
    torch.manual_seed(tasks)
    network = Enformer(EnformerShape(n_tasks=tasks, **SMALL)).eval()
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    params = {"model_type": "EnformerModel", "n_tasks": tasks, **SMALL, **changes}
    content = {
        "state_dict": {
            **{f"model.{k}": v for k, v in network.state_dict().items()},
            "loss.pos_weight": torch.ones(tasks, 1),
        },
        "hyper_parameters": {
            "model_params": params,
            "train_params": {"task": task, "loss": "mse", "lr": 1e-4, "logger": PickledConfig()},
            "data_params": {"tasks": {"name": ["hepg2", "k562", "sknsh"]}},
        },
        "optimizer_states": [],
    }
    torch.save(content, path)
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("gosai")
    write_oracle(at / gosai.ORACLE.file)
    write_oracle(at / gosai.HELDOUT.file)
    write_oracle(at / gosai.ATAC.file, tasks=7, task="binary")
    write_dataset(at / gosai.DATASET.file)
    return at


def write_dataset(path: Path, n: int = 3000) -> None:
    rng = np.random.default_rng(0)
    rows = [",seq,hepg2,k562,sknsh,chrom"]
    for i in range(n):
        bases = "ACG" if i < 3 else "ACGT"
        seq = "".join(rng.choice(list(bases), 200))
        rows.append(f"{i},{seq},{9 - i if i < 3 else rng.normal():.3f},0.5,1,chr{i % 22 + 1}")
    with gzip.open(path, "wt") as out:
        out.write("\n".join(rows) + "\n")


def sequences(n: int = 3, seed: int = 0) -> Tensor:
    return F.one_hot(torch.randint(0, 4, (n, 200), generator=torch.Generator().manual_seed(seed)), 4).float()


def test_the_reward_is_the_first_output_in_evaluation_mode(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gosai.FOLDER, str(folder))
    reward = rewards.build(GosaiReward())
    assert not reward.training and reward.provides == {"reward.grad"} and reward.domain == "sequence"
    torch.manual_seed(3)
    expected = write_oracle(folder / "again.ckpt")
    x = sequences()
    with torch.no_grad():
        outputs = expected(x.transpose(1, 2))
        assert torch.allclose(reward(x), outputs[:, 0, 0], atol=1e-6)
        assert torch.allclose(
            rewards.build_heldout(GosaiReward(cell="sknsh"))(x), outputs[:, 2, 0], atol=1e-6
        )


def test_the_reward_has_a_gradient_and_sees_one_sample_at_a_time(folder: Path) -> None:
    reward = rewards.build(GosaiReward(path=str(folder / gosai.ORACLE.file)))
    x = sequences(4).requires_grad_()
    total = reward(x)
    assert torch.allclose(total[:1], reward(x[:1]), atol=1e-6)
    (gradient,) = torch.autograd.grad(total[0], x)
    assert gradient[0].abs().sum() > 0 and gradient[1:].abs().sum() == 0
    assert all(not p.requires_grad for p in reward.parameters())


def test_pooling_ignores_the_padding_of_an_odd_length() -> None:
    pool = rewards.AttentionPool(2)
    nn.init.normal_(pool.to_attn_logits.weight)
    x = torch.randn(1, 2, 5)
    out = pool(x)
    assert out.shape == (1, 2, 3)
    assert torch.allclose(out[..., -1], x[..., -1])
    logits = pool.to_attn_logits.weight[:, :, 0, 0] @ x[0, :, :2]
    assert torch.allclose(out[0, :, 0], (x[0, :, :2] * logits.softmax(-1)).sum(-1), atol=1e-6)


def test_attention_reads_the_signed_distance() -> None:
    torch.manual_seed(0)
    layer = rewards.RelativeAttention(12, 2, 4)
    nn.init.normal_(layer.rel_pos_bias)
    for name in ("to_q", "to_k"):
        nn.init.zeros_(getattr(layer, name).weight)
    x = torch.randn(1, 4, 12)
    features = rewards.relative_features(4, 6, x)
    keys = layer.to_rel_k(features).unflatten(-1, (2, 4))
    values = layer.to_v(x)[0].unflatten(-1, (2, 6))
    out = torch.zeros(4, 2, 6)
    for i in range(4):
        for h in range(2):
            logits = torch.stack([layer.rel_pos_bias[0, h, 0] @ keys[j - i + 3, h] for j in range(4)])
            out[i, h] = logits.softmax(0) @ values[:, h]
    assert torch.allclose(layer(x)[0], layer.to_out(out.flatten(1)), atol=1e-5)


def test_the_classifier_gives_seven_probabilities(folder: Path) -> None:
    p = rewards.load_atac(str(folder / gosai.ATAC.file))(sequences())
    assert p.shape == (3, 7)
    assert ((p > 0) & (p < 1)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "ConvModel"}, "type 'ConvModel', which cannot be loaded"),
        ({"model_type": PickledConfig()}, "cannot be loaded"),
        ({"crop_len": 2}, "crops or pools"),
        ({"n_transformers": "many"}, "no usable sizes"),
        ({"n_transformers": 2}, "missing keys: embedding.transformer_tower.blocks.1"),
        ({"key_len": 8}, "other shapes"),
    ],
)
def test_refuses_what_is_not_the_classifier(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_oracle(tmp_path / "atac.ckpt", tasks=7, task="binary", **changes)
    with pytest.raises(DavBenchError) as caught:
        rewards.load_atac(str(tmp_path / "atac.ckpt"))
    assert message in str(caught.value) and "DRAKES_data.zip" in str(caught.value)


def test_oracles_and_classifier_are_not_confused(folder: Path) -> None:
    with pytest.raises(DavBenchError, match="no activity oracle"):
        rewards.build(GosaiReward(path=str(folder / gosai.ATAC.file)))
    with pytest.raises(DavBenchError, match="not the ATAC classifier"):
        rewards.load_atac(str(folder / gosai.ORACLE.file))
    with pytest.raises(DavBenchError, match="not the masked diffusion model"):
        model.build(GosaiModel(path=str(folder / gosai.ORACLE.file)), {})


# ---- files that are missing


@pytest.mark.parametrize("artefact", [gosai.DENOISER, gosai.ORACLE, gosai.HELDOUT, gosai.ATAC, gosai.DATASET])
def test_a_missing_file_is_named_with_where_to_get_it(
    artefact: gosai.Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(gosai.FOLDER, raising=False)
    for place in ("", str(tmp_path)):
        if place:
            monkeypatch.setenv(gosai.FOLDER, place)
        with pytest.raises(DavBenchError) as caught:
            artefact.locate()
        text = str(caught.value)
        assert caught.value.code == ExitCode.MISSING
        assert (
            artefact.what in text
            and artefact.file in text
            and artefact.where in text
            and gosai.FOLDER in text
        )
    (tmp_path / artefact.file).touch()
    assert artefact.locate() == tmp_path / artefact.file


# ---- dataset and metrics


def context(folder: Path) -> MetricContext:
    task: Any = SimpleNamespace(asset=lambda path: folder / path)
    return MetricContext(task, lambda: pytest.fail("the pretrained model is not needed"))


def test_the_most_active_elements(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gosai.FOLDER, str(folder))
    top = metrics.most_active()
    assert top.shape == (3, 200)
    assert top.max() == 2  # those written without T
    data = metrics.read_dataset(folder / gosai.DATASET.file)
    assert data.columns == ["seq", "hepg2", "k562", "sknsh", "chrom"] and len(data) == 3000


def test_metrics_of_the_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gosai.FOLDER, str(folder))
    ctx = context(folder)
    top = Samples(F.one_hot(metrics.most_active(), 4).float())
    assert metrics.kmer_corr(top, ctx) == pytest.approx(1)
    assert metrics.motif_corr(top, ctx) == pytest.approx(1)
    assert metrics.kmer_corr(Samples(sequences(64)), ctx) < 0.9
    samples = Samples(sequences(5))
    with torch.no_grad():
        p = rewards.load_atac()(samples.x)
    assert metrics.accessibility(samples, ctx).tolist() == (p[:, 1] > 0.5).double().tolist()


def test_the_task_builds_from_one_folder(
    folder: Path, mdlm: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gosai.FOLDER, str(folder))
    (folder / gosai.DENOISER.file).write_bytes(mdlm[0].read_bytes())
    task, known = read_task(shipped_tasks() / "dna-gosai"), catalog()
    check_task(task, known)
    built = known.get("models", task.model["use"]).build({}, task.sampler)
    assert (built.process.T, built.domain) == (128, "sequence")
    for reward in task.rewards.values():
        entry = known.get("rewards", reward["use"])
        assert entry.build({})(sequences(2)).shape == (2,)
        assert entry.provides == ("reward.grad",)
    for role, names in task.metrics.items():
        for entry in filter(None, (known.find("metrics", name) for name in names)):
            assert entry.role == role and callable(entry.load())


@pytest.mark.parametrize(
    "text", ["seq,hepg2\nACGT,1\n", ",seq,hepg2,k562,sknsh,chrom\n0,ACGN,1,1,1,chr1\n", "\x00\x01"]
)
def test_another_csv_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.csv").write_text(text)
    with pytest.raises(DavBenchError, match="not the dataset"):
        metrics.read_dataset(tmp_path / "dataset.csv")
