"""Metrics of pictures against closed forms, brute force and laws whose value is known."""

from __future__ import annotations

import math
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from dav_bench.builtin.metrics import image
from dav_bench.builtin.metrics.base import MetricContext, Samples
from dav_bench.builtin.metrics.image import (
    clip_distance,
    clipscore,
    cosine_distance,
    kid,
    looks_entropy,
    lpips,
    mmd,
    shannon,
    vendi,
    vendi_score,
)
from dav_bench.errors import DavBenchError
from dav_bench.tasks import asset

TWO = ["tiger", "owl"]


def context(**features: str) -> MetricContext:
    task: Any = SimpleNamespace(features={"clip": "eye", **features})
    return MetricContext(task, pretrained=lambda: None)  # type: ignore[arg-type,return-value]


def samples(n: int, texts: list[str] | None = None, seed: int = 0, size: int = 8) -> Samples:
    x = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return Samples(x, None if texts is None else torch.arange(n) % len(texts), texts or ())


def unit(n: int, width: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    x = torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[:, 0] += shift
    return F.normalize(x, dim=-1)


class Eye(nn.Module):
    """Sees a picture as its channel means less a half; a text as the place of its first letter."""

    calls = 0

    def features(self, sample: Tensor) -> Tensor:
        Eye.calls += len(sample)
        return F.normalize(sample.mean((2, 3)) - 0.5, dim=-1)

    def encode(self, texts: list[str]) -> None:
        self.texts = torch.stack([torch.eye(3)[(ord(text[0]) - ord("a")) % 3] for text in texts])

    def head(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return (x * self.texts[cond]).sum(-1)


@pytest.fixture(autouse=True)
def eye(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in image.PLACES.values():
        monkeypatch.delenv(name, raising=False)
    Eye.calls = 0
    monkeypatch.setattr(image, "_clip_of", lambda name: Eye())
    return Eye


# ---- entropy of looks


def _laws(looks: int) -> dict[str, np.ndarray]:
    zipf, steps = 1 / np.arange(1, looks + 1), 0.8 ** np.arange(looks)
    two = np.where(np.arange(looks) < 2, 0.5, 0.0)
    laws = {"even": np.ones(looks), "zipf": zipf, "geometric": steps, "two": two}
    laws["random"] = np.random.default_rng(1).dirichlet(np.full(looks, 0.5))
    return {name: law / law.sum() for name, law in laws.items()}


def _plug_in(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


@pytest.mark.parametrize("name", _laws(24))
def test_entropy_of_64_pictures_is_nearly_unbiased_where_that_of_frequencies_is_not(name: str) -> None:
    law, draws = _laws(24)[name], 1000
    counts = np.random.default_rng(0).multinomial(64, law, size=draws)
    truth = _plug_in(law)
    error = np.array([shannon(c) for c in counts]) - truth
    allowed = 0.03 + 4 * error.std() / math.sqrt(draws)
    assert abs(error.mean()) < allowed
    naive = np.mean([_plug_in(c) for c in counts]) - truth
    if name != "two":  # with two looks there is no bias to speak of
        assert naive < -max(0.1, allowed)
        corrected = naive + np.mean([((c > 0).sum() - 1) / 128 for c in counts])
        assert abs(error.mean()) < abs(corrected)  # Miller and Madow


def test_entropy_by_hand() -> None:
    for n in (1, 2, 5, 64):
        assert shannon(np.array([0, n])) == 0
    # Σ c/n (ψ(n) − ψ(c)) = Σ c/n (1/c + ... + 1/(n − 1))
    assert shannon(np.array([2, 3])) == pytest.approx(
        2 / 5 * (1 / 2 + 1 / 3 + 1 / 4) + 3 / 5 * (1 / 3 + 1 / 4)
    )
    # one look seen once and one twice: q = 1 − 2 / 4, and Σ_{j≥1} q^j / (2 + j) = (−ln(1 − q) − q − q²/2) / q²
    first = 1 / 3 * (1 + 1 / 2) + 2 / 3 * 1 / 2
    assert shannon(np.array([1, 2])) == pytest.approx(first + 1 / 3 * 4 * (math.log(2) - 1 / 2 - 1 / 8))
    # two looks once each: q = 1 − 2 / 3, and Σ_{j≥1} q^j / (1 + j) = −ln(1 − q) / q − 1
    assert shannon(np.array([1, 1])) == pytest.approx(1 - 3 * math.log(2 / 3) - 1)


class Painter(nn.Module):
    """Says who drew a picture by its first pixel, and on what by its last one."""

    def classes(self, images: Tensor) -> Tensor:
        artist, ground = ((images[:, 0, at, at] * n).floor().clamp(0, n - 1) for at, n in ((0, 4), (-1, 6)))
        return (artist * 6 + ground).long()


def test_entropy_of_looks_within_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "_looks", Painter)
    found = samples(1024, TWO)
    free = looks_entropy(found, context())
    assert set(free) == {"", *TWO}
    assert free[""] == pytest.approx((free["tiger"] + free["owl"]) / 2)
    assert free[""] == pytest.approx(math.log(24), abs=0.03)
    found = samples(1024, TWO)
    found.x[::2, 0, 0, 0] = 0.1  # all tigers by one artist: their backgrounds are left
    one = looks_entropy(found, context())
    assert one["tiger"] == pytest.approx(math.log(6), abs=0.03)
    assert one["owl"] == pytest.approx(free["owl"])
    found = samples(1024, TWO)
    found.x[::2] = found.x[0]
    assert looks_entropy(found, context())["tiger"] == 0


# ---- distance, Vendi score


def test_cosine_distance_is_the_mean_over_pairs() -> None:
    x = unit(9, 4)
    pairs = [1 - float(a @ b) for a, b in combinations(x, 2)]
    assert cosine_distance(x) == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)
    assert cosine_distance(torch.eye(5).double()) == pytest.approx(1)
    assert cosine_distance(x[:1].expand(6, -1)) == pytest.approx(0, abs=1e-12)
    assert cosine_distance(x[:1]) == 0


def test_vendi_counts_what_differs() -> None:
    assert vendi_score(torch.eye(5, dtype=torch.float64)) == pytest.approx(5)  # fewer pictures than features
    assert vendi_score(torch.eye(3, dtype=torch.float64).repeat(7, 1)) == pytest.approx(3)  # more
    assert vendi_score(unit(1, 6).expand(9, -1)) == pytest.approx(1)
    # two vectors of cosine c: the eigenvalues of K / 2 are (1 ± c) / 2
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    assert vendi_score(x) == pytest.approx(math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2)))
    x = unit(12, 5)
    kernel = np.linalg.eigvalsh((x @ x.T).numpy() / 12)
    kernel = kernel[kernel > 1e-12]
    assert vendi_score(x) == pytest.approx(math.exp(-(kernel * np.log(kernel)).sum()))


def test_diversity_is_within_prompts_and_over_all() -> None:
    found = samples(8, TWO)
    found.x[::2], found.x[1::2] = (
        torch.tensor([1.0, 0.5, 0.5])[:, None, None],
        torch.tensor([0.5, 1.0, 0.5])[:, None, None],
    )
    distance, score = clip_distance(found, context()), vendi(found, context())
    # two prompts, each with one picture four times, at a right angle: 16 of the 28 pairs are of two prompts
    assert distance == pytest.approx({"": 0, "tiger": 0, "owl": 0, "all": 16 / 28}, abs=1e-6)
    assert score == pytest.approx({"": 1, "tiger": 1, "owl": 1, "all": 2}, rel=1e-5)
    assert Eye.calls == 8  # both metrics share one look
    alone = samples(8)
    assert set(clip_distance(alone, context())) == {""}


# ---- LPIPS


def _backbone(path: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A random AlexNet and weights of its channels, as files."""
    torch.manual_seed(0)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    backbone = {}
    for layer, (out, into, width) in shapes.items():
        backbone[f"features.{layer}.weight"] = torch.randn(out, into, width, width) / math.sqrt(
            into * width**2
        )
        backbone[f"features.{layer}.bias"] = torch.randn(out) / 10
    heads = {
        f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1) - 0.2 for k, c in enumerate((64, 192, 384, 256, 256))
    }
    torch.save(backbone, path / "alexnet-random.pth")
    torch.save(heads, path / "alex.pth")
    return backbone, heads


def _lpips_of_pair(a: Tensor, b: Tensor, backbone: dict[str, Tensor], heads: dict[str, Tensor]) -> float:
    """LPIPS as its paper defines it: mean over places of weighted squared differences of unit activations, summed."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = F.interpolate(torch.stack([a, b]), (64, 64), mode="bilinear", antialias=True) * 2 - 1
    x, total = (x - shift[:, None, None]) / scale[:, None, None], 0.0
    for k, (layer, stride, padding) in enumerate(((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1))):
        x = F.max_pool2d(x, 3, 2) if layer in (3, 6) else x
        x = F.conv2d(
            x, backbone[f"features.{layer}.weight"], backbone[f"features.{layer}.bias"], stride, padding
        ).relu()
        difference = (F.normalize(x[0], dim=0) - F.normalize(x[1], dim=0)).square()
        total += float((difference * heads[f"lin{k}.model.1.weight"][0].clamp(min=0)).sum(0).mean())
    return total


def test_lpips_is_the_mean_over_pairs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lpips(samples(4), context()) is None  # nothing given: nothing measured
    parts = _backbone(tmp_path)
    monkeypatch.setenv("DAV_BENCH_LPIPS", str(tmp_path))
    monkeypatch.setattr(image.Lpips, "SIZE", 64)
    found = samples(3, ["tiger"], size=16)
    pairs = [_lpips_of_pair(a, b, *parts) for a, b in combinations(found.x, 2)]
    measured = lpips(found, context())
    assert measured is not None
    assert measured[""] == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)
    found.x[:] = found.x[0]
    assert lpips(found, context()) == pytest.approx({"": 0, "tiger": 0}, abs=1e-9)


def test_lpips_says_what_is_missing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAV_BENCH_LPIPS", str(tmp_path))
    with pytest.raises(DavBenchError, match="should hold AlexNet of torchvision"):
        lpips(samples(4), context())
    _backbone(tmp_path)
    (tmp_path / "alexnet-random.pth").write_bytes(b"no checkpoint")
    with pytest.raises(DavBenchError, match="cannot be read for LPIPS"):
        lpips(samples(4), context())


# ---- agreement, kernel distance


def test_clipscore_compares_each_picture_with_its_own_prompt() -> None:
    found = samples(6, TWO)
    measured = clipscore(found, context())
    direction = F.normalize(found.x.mean((2, 3)) - 0.5, dim=-1)
    places = {"tiger": 1, "owl": 2}
    assert measured == pytest.approx(
        [float(d[places[p]]) for d, p in zip(direction, found.prompts or [], strict=True)]
    )
    assert clipscore(samples(4), context()) is None


def test_kernel_distance_by_brute_force() -> None:
    x, y = unit(5, 4), unit(7, 4, seed=1)
    kernel = lambda a, b: (1 + float(a @ b)) ** 3  # noqa: E731
    within = [np.mean([kernel(a, b) for a, b in combinations(z, 2)]) for z in (x, y)]
    assert mmd(x, y) == pytest.approx(
        sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y]), rel=1e-9
    )
    a, b = torch.eye(2, dtype=torch.float64)[:, None].expand(2, 6, 2)
    assert mmd(a, b) == pytest.approx(8 + 8 - 2)
    assert math.isnan(mmd(a[:1], b))


def test_kernel_distance_is_unbiased() -> None:
    same = np.array([mmd(unit(8, 4, 2 * k, 1.0), unit(20, 4, 2 * k + 1, 1.0)) for k in range(400)])
    assert abs(same.mean()) < 4 * same.std() / 20
    other = np.array([mmd(unit(8, 4, 2 * k, 1.0), unit(20, 4, 2 * k + 1, -1.0)) for k in range(50)])
    assert other.mean() > 4 * other.std() / math.sqrt(50)


def test_kernel_distance_to_training_pictures_of_the_same_prompt(tmp_path: Any) -> None:
    found = samples(12, [*TWO, "sea monster"])
    animals = asset("t2i", "animals.txt").read_text().split()
    seen = F.normalize((found.x.mean((2, 3)) - 0.5).double(), dim=-1)
    of = torch.tensor([animals.index(name) for name in ("fly", "bee", "tiger")] * 4)
    state = {"features": unit(12, 3).half(), "prompt": of.short()}
    path = tmp_path / "reference.safetensors"
    save_file(state, path)
    measured = kid(found, context(reference=str(path)))
    real = F.normalize(state["features"].double()[2::3], dim=-1)
    assert measured == pytest.approx(dict.fromkeys(("", "tiger"), mmd(seen[::3], real)), rel=1e-5)
    assert kid(found, context()) is None  # the task has no training pictures
    assert kid(samples(4, ["sea monster"]), context(reference=str(path))) is None  # nor has the prompt
