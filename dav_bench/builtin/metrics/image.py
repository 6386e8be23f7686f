"""Metrics of sets of pictures: diversity within each prompt, agreement with the prompt, likeness to training pictures.

Pictures are compared in the features of a CLIP model that no method sees, which the task names (`[features] clip`).
Diversity is measured within each prompt and averaged over prompts, so that drawing what was asked for costs none.
Definitions and values: `docs/metrics.md`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import digamma, hyp2f1
from torch import Tensor, nn

from dav_bench.builtin import weights
from dav_bench.builtin.metrics.base import MetricContext, Samples
from dav_bench.errors import DavBenchError, ExitCode
from dav_bench.images import ClipReward, Pixels, TransformersTowers, tokenizer
from dav_bench.plugins import catalog
from dav_bench.pretrained import Published
from dav_bench.tasks import asset

BATCH = 64
"""Pictures encoded at once."""
ALL = "all"
"""Part of a metric that is taken over the pictures of all prompts together."""
PLACES = {"clip": "DAV_BENCH_CLIP", "imagereward": "DAV_BENCH_IMAGEREWARD", "lpips": "DAV_BENCH_LPIPS"}
"""Environment variables that say where a network of the metrics lies on this machine."""


# ---- diversity


def looks_entropy(samples: Samples, ctx: MetricContext) -> dict[str, float]:
    """Entropy in nats of the looks of pictures of one prompt; mean over prompts, and that of each.

    A look is who drew it and on which background, as the classifier shipped with the task `t2i` sees it.  0 says that
    all pictures of a prompt look alike; the most is the log of the number of looks.  Estimated as in `shannon`.
    """
    if "looks" not in samples.held:
        network = _looks().to(ctx.device)
        parts = [network.classes(x.to(ctx.device)).cpu() for x in samples.x.split(BATCH)]
        samples.held["looks"] = torch.cat(parts)
    look = samples.held["looks"]
    return _within(samples, lambda at: shannon(look[at].unique(return_counts=True)[1].numpy()))


def shannon(counts: np.ndarray) -> float:
    """Shannon's entropy in nats of the law that counts were drawn from, by Chao, Wang and Jost.

    doi:10.1111/2041-210X.12108: Σ c/n (ψ(n) − ψ(c)), and for looks not seen f₁/n Σ_{j≥1} q^j / (n − 1 + j), where f₁
    and f₂ looks were seen once and twice and 1 − q = 2 f₂ / ((n − 1) f₁ + 2 f₂), or 2 / ((n − 1) (f₁ − 1) + 2) for
    f₂ = 0, is about the chance of a look seen once.  0 where all are alike.  The frequencies' own entropy is too low
    by about (looks − 1) / 2n: by 0.2 for 24 looks and 64 pictures, where this one is off by at most 0.03
    (`tests/builtin/test_metrics_image.py`).
    """
    c = counts[counts > 0].astype(float)
    n, once, twice = c.sum(), (c == 1).sum(), (c == 2).sum()
    seen = (c * (digamma(n) - digamma(c))).sum() / n
    if not once or n < 2:
        return float(seen)
    q = 1 - (2 * twice / ((n - 1) * once + 2 * twice) if twice else 2 / ((n - 1) * (once - 1) + 2))
    # the sum over j is q / n 2F1(1, n; n + 1; q)
    return float(seen + once / n * q / n * hyp2f1(1, n, n + 1, q))


def clip_distance(samples: Samples, ctx: MetricContext) -> dict[str, float]:
    """Mean of 1 − cosine over pairs of pictures of one prompt; mean over prompts, of each, and of all pictures."""
    x = features(samples, ctx)
    return _within(samples, lambda at: cosine_distance(x[at]), over_all=True)


def cosine_distance(x: Tensor) -> float:
    """Mean of 1 − cosine over unordered pairs of (n, F) unit vectors: their sum s has |s|² = n + 2 Σ cosines."""
    n = len(x)
    return float(1 - (x.sum(0).square().sum() - n) / (n * (n - 1))) if n > 1 else 0.0


def vendi(samples: Samples, ctx: MetricContext) -> dict[str, float]:
    """Vendi score (arXiv:2210.02410) of pictures of one prompt: how many different ones they amount to.

    Mean over prompts, of each, and of all pictures.  It grows with the number of pictures: compare equal numbers.
    """
    x = features(samples, ctx)
    return _within(samples, lambda at: vendi_score(x[at]), over_all=True)


def vendi_score(x: Tensor) -> float:
    """exp of the entropy of the eigenvalues of K / n, with K the cosines of (n, F) unit vectors: 1 to n."""
    # x' x has the eigenvalues of x x', and zeros
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    p = torch.linalg.eigvalsh(gram / len(x)).clamp(min=0)
    return float(torch.special.entr(p / p.sum()).sum().exp())


def lpips(samples: Samples, ctx: MetricContext) -> dict[str, float] | None:
    """Mean LPIPS (arXiv:1801.03924, AlexNet, version 0.1) of pairs of pictures of one prompt, and of all pictures.

    Not measured unless `DAV_BENCH_LPIPS` names a folder with the backbone and the weights of its channels: they are
    not shipped.  Pictures are resized to 224 pixels as in the evaluation of DAS, and scaled to [−1, 1] as LPIPS has
    it, which that evaluation leaves out.
    """
    place = os.environ.get(PLACES["lpips"])
    if not place:
        return None
    network = _lpips(place).to(ctx.device)

    def spread(at: Tensor) -> float:
        # LPIPS is a squared distance: over pairs its mean is that to the centre, times 2 n / (n - 1)
        total, square = torch.zeros(()), 0.0
        for part in at.split(BATCH):
            e = network(samples.x[part].to(ctx.device)).double()
            total, square = total + e.sum(0).cpu(), square + float(e.square().sum())
        n = len(at)
        return 2 * (square - float(total.square().sum()) / n) / (n - 1) if n > 1 else 0.0

    return _within(samples, spread, over_all=True)


# ---- agreement with the prompt, and likeness to real pictures


def clipscore(samples: Samples, ctx: MetricContext) -> np.ndarray | None:
    """(n,) agreement of each picture with its prompt: cosine of their embeddings by the CLIP model of the metrics.

    As the reward of that model scales it, where it is one.  Hessel et al. (arXiv:2104.08718) report 2.5 times the
    positive part of the cosine.
    """
    if samples.cond is None:
        return None
    network, x = _clip(ctx), features(samples, ctx)
    network.encode(samples.texts)
    return network.head(x.float().to(ctx.device), samples.cond.to(ctx.device)).cpu().double().numpy()


def imagereward(samples: Samples, ctx: MetricContext) -> np.ndarray | None:
    """(n,) ImageReward (arXiv:2304.05977) of each picture and its prompt, with weights the task or the user names."""
    place = _place("imagereward", ctx)
    if samples.cond is None or not place:
        return None
    network = _imagereward(place).to(ctx.device)
    network.encode(samples.texts)
    parts = zip(samples.x.split(BATCH), samples.cond.split(BATCH), strict=True)
    scores = [network(x.to(ctx.device), cond.to(ctx.device)).cpu() for x, cond in parts]
    return torch.cat(scores).double().numpy()


def kid(samples: Samples, ctx: MetricContext) -> dict[str, float] | None:
    """Kernel distance (arXiv:1801.01401) to the training pictures of the same prompt; mean over prompts, of each.

    Without bias, so 0 on average where both have one law.  Only prompts that training pictures bear count.
    """
    prompts = samples.prompts or []
    if "reference" not in ctx.task.features:
        return None
    real, of, known = _reference(ctx.task.features["reference"])
    if not set(prompts) & set(known):
        return None
    x = features(samples, ctx)
    return _within(samples, lambda at: mmd(x[at], real[of == known.index(prompts[int(at[0])])]), only=known)


def mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of (n, F) and (m, F) unit vectors under (1 + cosine)³.

    That is the kernel (1 + x·y / F)³ of Bińkowski et al. on features scaled to a mean square of 1.  Over all pairs,
    where their code averages over random subsets.  NaN for fewer than two pictures.
    """
    if min(len(x), len(y)) < 2:
        return float("nan")

    n, m = len(x), len(y)
    xx, yy, xy = ((1 + a @ b.T) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * xy.mean())


# ---- what pictures are seen through


class Eye(Protocol):
    """A CLIP model as metrics use it; rewards with the capability `reward.features` and texts are such."""

    def encode(self, texts: Any) -> None: ...

    def features(self, sample: Tensor) -> Tensor: ...

    def head(self, features: Tensor, cond: Tensor | None = None) -> Tensor: ...


def features(samples: Samples, ctx: MetricContext) -> Tensor:
    """(n, F) unit vectors, float64 on the CPU, of the pictures; computed once for all metrics."""
    if "features" not in samples.held:
        network = _clip(ctx)
        parts = [network.features(x.to(ctx.device)).cpu() for x in samples.x.split(BATCH)]
        samples.held["features"] = F.normalize(torch.cat(parts).double(), dim=-1)
    return samples.held["features"]


def _within(
    samples: Samples, measure: Callable[[Tensor], float], over_all: bool = False, only: Any = None
) -> dict[str, float]:
    """`measure` of the places of each prompt's pictures, by prompt, and under "" its mean over prompts.

    Without prompts all pictures are of one.  With `over_all` also of all pictures; of the prompts in `only` alone.
    """
    everything = torch.arange(len(samples))
    if samples.prompts is None:
        return {"": measure(everything)}
    places: dict[str, list[int]] = {}
    for k, prompt in enumerate(samples.prompts):
        places.setdefault(prompt, []).append(k)
    found = {name: measure(torch.tensor(at)) for name, at in places.items() if only is None or name in only}
    mean = float(np.mean([*found.values()])) if found else float("nan")
    return {"": mean, **found} | ({ALL: measure(everything)} if over_all and len(found) > 1 else {})


def _place(what: str, ctx: MetricContext) -> str:
    return os.environ.get(PLACES[what]) or ctx.task.features.get(what, "")


def _clip(ctx: MetricContext) -> Eye:
    network = _clip_of(_place("clip", ctx))
    return cast(Eye, network.to(ctx.device) if isinstance(network, nn.Module) else network)


@lru_cache(maxsize=2)
def _clip_of(name: str) -> Any:
    """A reward by its name, or a CLIP model of transformers by its folder or hub id."""
    entry = catalog().find("rewards", name)
    if entry is not None:
        return entry.build({})
    from transformers import AutoTokenizer, CLIPModel

    source = _Network("CLIP model that metrics look through", name, "MIT", "clip")
    model = source.model(CLIPModel, name)
    with source.reading(name):
        reader = AutoTokenizer.from_pretrained(name)
    tokens = tokenizer(
        reader, model.config.text_config.max_position_embeddings, "The CLIP model of the metrics"
    )
    pixels = Pixels(model.config.vision_config.image_size)
    return ClipReward(TransformersTowers(model), pixels, lambda texts: tokens(texts)["input_ids"]).eval()


@lru_cache(maxsize=1)
def _imagereward(place: str) -> Any:
    return catalog().get("rewards", "imagereward").build({"path": place})


class _Network(Published):
    """Weights that a metric needs: an environment variable says where they are."""

    @property
    def fix(self) -> str:
        return f"get it from {self.source}, then set {PLACES[self.setting]} to its folder: the same command goes on"


@lru_cache(maxsize=1)
def _looks() -> Any:
    from dav_bench.builtin.looks import load_looks

    return load_looks(asset("t2i", "weights/looks")).eval()


@lru_cache(maxsize=2)
def _reference(name: str) -> tuple[Tensor, Tensor, list[str]]:
    """Features (N, F) of training pictures, the number of each one's prompt (N,), and the prompts in that order."""
    state, _ = weights.load(name, "t2i")
    prompts = asset("t2i", "animals.txt").read_text(encoding="utf-8").split("\n")
    return F.normalize(state["features"].double(), dim=-1), state["prompt"].long(), [p for p in prompts if p]


class Lpips(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> (B, F), whose squared distance is LPIPS.

    The layers' activations have unit length over channels; a channel weighs w / (H W) in the squared difference, so
    they are multiplied by its root.
    """

    ENDS = (2, 5, 8, 10, 12)
    """Layers of AlexNet after which LPIPS looks, the ReLUs."""
    SIZE = 224
    """Pixels that pictures are resized to."""
    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Mapping[str, Tensor], heads: Mapping[str, Tensor]):
        super().__init__()
        from torchvision.models import alexnet

        with torch.device("meta"):
            self.layers = alexnet(weights=None).features
        state = {k.removeprefix("features."): v for k, v in backbone.items() if k.startswith("features.")}
        self.layers.load_state_dict(state, assign=True)
        self.heads = [heads[f"lin{k}.model.1.weight"].clamp(min=0) for k in range(len(self.ENDS))]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), (self.SIZE, self.SIZE), mode="bilinear", antialias=True)
        x, parts, start = (2 * x - 1 - self.shift) / self.scale, [], 0
        for end, head in zip(self.ENDS, self.heads, strict=True):
            x = self.layers[start:end](x)
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            parts.append((unit * (head.to(x) / x[0, 0].numel()).sqrt()).flatten(1))
            start = end
        return torch.cat(parts, 1)


@lru_cache(maxsize=1)
def _lpips(place: str) -> Lpips:
    folder = Path(place).expanduser()
    backbone = next(iter(sorted(folder.glob("alexnet*"))), None)
    heads = folder / "alex.pth"
    found = importlib.util.find_spec("lpips")
    if not heads.is_file() and found is not None and found.origin:
        heads = Path(found.origin).parent / "weights" / "v0.1" / "alex.pth"
    if backbone is None or not heads.is_file():
        raise DavBenchError(
            f"LPIPS cannot be measured with {PLACES['lpips']}={place}.",
            "The folder should hold AlexNet of torchvision (alexnet-*.pth) and, unless the package lpips is installed, "
            "its weights of channels (lpips/weights/v0.1/alex.pth).",
            f"put them there, or unset {PLACES['lpips']}",
            code=ExitCode.MISSING,
        )
    return Lpips(*(_tensors(path) for path in (backbone, heads))).eval()


def _tensors(path: Path) -> Any:
    """Of a safetensors file, or a torch checkpoint of any age, with the unpickler that takes tensors alone."""
    from safetensors.torch import load_file

    try:
        return (
            load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        )
    except Exception as err:  # a damaged file can fail in any way
        raise DavBenchError(f"{path} cannot be read for LPIPS.", f"{type(err).__name__}: {err}") from err
