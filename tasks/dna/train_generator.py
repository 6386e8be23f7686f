"""Train a generator of the task `dna`: masked diffusion over 200 bases, all four cell types, both strands.

    python tasks/dna/train_generator.py

Starts the network's memory from words that recur on every chromosome but 1 and 2, trains on these chromosomes, prints
the bound on chromosome 2 as it goes, and keeps the best average.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from dhs import VALIDATION, Clock, Elements, either_strand, one_hot, save
from repeats import recurring
from torch import Tensor, nn

from dav_bench.builtin.models.mdlm import NETWORKS

MASK = 4


@dataclass(frozen=True)
class Recipe:
    """How one generator is trained."""

    network: str = "hourglass"
    """Key of `NETWORKS`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Arguments of the network."""
    steps: int = 14_000
    """Updates."""
    batch: int = 128
    """Elements in a batch, each with one draw of masks."""
    lr: float = 4e-3
    """Peak learning rate, reached after `warmup` updates, then a cosine to zero."""
    warmup: int = 200
    """Updates of linear warm-up."""
    decay: float = 0.05
    """AdamW weight decay."""
    average: float = 0.999
    """Decay of the average of weights that is kept."""
    seed: int = 0
    """Seed of weights, batches and masks."""


RECIPES = {
    "generator": Recipe(config={"width": 128, "words": 1024, "span": 28}),
}


def corrupt(x: Tensor, counts: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Hide `counts` (B,) random positions of each row of bases (B, L): tokens and the mask, both (B, L)."""
    hidden = torch.rand(x.shape, generator=generator).argsort(1).argsort(1) < counts[:, None]
    return x.masked_fill(hidden, MASK), hidden


def loss(net: nn.Module, x: Tensor, counts: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Nats per hidden base (B,): with counts uniform in 1..L its mean is the bound on the NLL per base."""
    tokens, hidden = corrupt(x, counts, generator)
    nll = F.cross_entropy(net(one_hot(tokens, MASK + 1)).float().transpose(1, 2), x, reduction="none")
    return (nll * hidden).sum(1) / counts


def spread(n: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Counts (n,) uniform in 1..length, one from each of n equal parts of the range, in random order."""
    u = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    return (u[torch.randperm(n, generator=generator)] * length).long().clamp_max(length - 1) + 1


@torch.inference_mode()
def bound(net: nn.Module, x: Tensor, draws: int = 32, seed: int = 5) -> tuple[float, float]:
    """Upper bound on bits per base of bases (N, L), and its Monte-Carlo standard error.

    Each sequence gets `draws` counts, one from each of `draws` equal parts of 1..L, so the error given, which treats
    them as independent, is conservative. It is the error over masks, for these N sequences.
    """
    g = torch.Generator().manual_seed(seed)
    n, length = x.shape
    u = (torch.arange(draws)[None] + torch.rand(n, draws, generator=g)) / draws
    counts = (u * length).long().clamp_max(length - 1) + 1
    bits = torch.empty(n, draws, dtype=torch.float64)
    for j in range(draws):
        for rows in torch.arange(n).split(256):
            bits[rows, j] = loss(net, x[rows], counts[rows, j], g).double() / math.log(2)
    return bits.mean().item(), (bits.var(1) / draws).sum().sqrt().item() / n


def batches(index: Tensor, size: int) -> Iterator[Tensor]:
    """Rows of shuffled passes over `index`, for ever."""
    while True:
        yield from index[torch.randperm(len(index))][: len(index) // size * size].split(size)


def train(name: str, recipe: Recipe, data: Elements, every: int, minutes: float = math.inf) -> None:
    """Train and write weights/<name>.safetensors whenever chromosome 2 likes the average better.

    Args:
        name: stem of the file.
        recipe: how to train.
        data: all elements.
        every: updates between looks at chromosome 2.
        minutes: a slow machine ends the schedule of the learning rate after this time, in fewer updates.
    """
    torch.manual_seed(recipe.seed)
    net = NETWORKS[recipe.network](**recipe.config)
    net.memory.remember(recurring(data.x[data.train], recipe.config["words"], recipe.config["span"]))
    kept, best, clock = copy.deepcopy(net), math.inf, Clock()
    print(f"{name}: {sum(p.numel() for p in net.parameters())} parameters {recipe}", flush=True)
    optimizer = torch.optim.AdamW(
        net.parameters(), recipe.lr, weight_decay=recipe.decay, betas=(0.9, 0.98), fused=True
    )
    rows, spent = batches(data.train.nonzero()[:, 0], recipe.batch), 0.0
    held, running = data.x[data.on(VALIDATION)], list[float]()
    step, done = 0, 0.0
    while done < 1:
        step += 1
        done = max(step / recipe.steps, clock() / 60 / minutes)
        rate = min(1.0, step / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        for group in optimizer.param_groups:
            group["lr"] = rate * recipe.lr
        x = either_strand(data.x[next(rows)])
        net.train()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(net, x, spread(len(x), x.shape[1])).mean()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        average(kept, net, min(recipe.average, (1 + step) / (10 + step)))
        running.append(value.item() / math.log(2))
        if step % every == 0 or done >= 1:
            spent = clock()
            with torch.autocast("cpu", torch.bfloat16):
                now, error = bound(kept.eval(), held, draws=4)
            print(f"step {step:6d}  {spent:5.0f} s  train {sum(running) / len(running):.4f}  "
                  f"chr2 {now:.4f} +- {error:.4f}", flush=True)  # fmt: skip
            running = []
            if now < best:
                best = now
                meta = {"network": recipe.network, "config": json.dumps(recipe.config),
                        "recipe": json.dumps(asdict(recipe)), "step": str(step), "seconds": f"{spent:.0f}",
                        "cpu_seconds": f"{time.process_time():.0f}"}  # fmt: skip
                save(kept, name, meta)


@torch.no_grad()
def average(kept: nn.Module, net: nn.Module, decay: float) -> None:
    """Move the kept weights towards those of `net`."""
    torch._foreach_lerp_(list(kept.parameters()), list(net.parameters()), 1 - decay)


def main() -> None:
    """Train what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(RECIPES), nargs="?", default="generator")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=500, help="updates between looks at chromosome 2")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the schedule by then")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.name, RECIPES[args.name], Elements(), args.every, args.minutes)


if __name__ == "__main__":
    main()
