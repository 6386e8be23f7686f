"""Train the validity check of the task `dna`: which sequences are open chromatin at all, in each of four cell types.

    python tasks/dna/train_accessibility.py

Negatives, as many as elements: one half elements with their dinucleotides shuffled, one half samples of a Markov model
of order 3 fitted to the training chromosomes. They are open nowhere. An element is open in its own cell type alone.
The threshold of the HepG2 output lets 5 % of the negatives of chromosome 2 through.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from dhs import (
    HEPG2,
    VALIDATION,
    Clock,
    Elements,
    Markov,
    auroc,
    dinucleotide_shuffle,
    either_strand,
    one_hot,
    save,
    shifted,
)
from torch import Tensor
from train_oracles import average

from dav_bench.builtin.rewards.dna import NETWORKS, BothStrands

ORDER = 3
"""Of the Markov model that draws half of the negatives."""
FALSE_POSITIVES = 0.05
"""Share of the negatives of chromosome 2 that the threshold lets through."""


@dataclass(frozen=True)
class Recipe:
    """How the validity check is trained."""

    network: str = "pooled-conv"
    """Key of `NETWORKS`."""
    config: dict[str, Any] = field(default_factory=lambda: {"widths": (64, 96, 96)})
    """Arguments of the network."""
    epochs: int = 8
    """Passes over elements and negatives; negatives are drawn anew in each."""
    lr: float = 3e-3
    """Peak of the one-cycle learning rate."""
    decay: float = 0.05
    """AdamW weight decay."""
    shift: int = 8
    """Sequences are moved by up to this many bases."""
    average: float = 0.998
    """Decay of the average of weights that is kept."""
    batch: int = 256
    """Sequences in a batch."""
    seed: int = 3
    """Seed of weights, batches and negatives."""


def negatives(x: Tensor, markov: Markov, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """As many negatives as elements x (B, L): shuffled ones and Markov samples, each (B/2, L)."""
    part = rng.permutation(len(x))[: len(x) // 2]
    shuffled = np.stack([dinucleotide_shuffle(row, rng) for row in x[part].numpy()])
    seed = int(rng.integers(2**31))
    return torch.from_numpy(shuffled), markov.sample(len(x) - len(part), x.shape[1], seed)


@torch.inference_mode()
def logits(both: BothStrands, x: Tensor) -> Tensor:
    """Logits (N, 4) of bases (N, L)."""
    return torch.cat([both(one_hot(part)) for part in x.split(512)])


def train(recipe: Recipe, data: Elements) -> tuple[BothStrands, dict[str, str]]:
    """The averaged network with its threshold, as metadata of the weights."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    markov = Markov(data.x[data.train], ORDER)
    x, y = data.x[data.train], F.one_hot(data.y[data.train], 4).float()
    held = data.on(VALIDATION)
    held_negatives = torch.cat(negatives(data.x[held], markov, np.random.default_rng(100)))
    net = NETWORKS[recipe.network](**recipe.config)
    kept, clock = copy.deepcopy(net), Clock()
    per_epoch = 2 * len(x) // recipe.batch
    optimizer = torch.optim.AdamW(net.parameters(), recipe.lr, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.epochs * per_epoch
    )
    for epoch in range(recipe.epochs):
        sequences = torch.cat([x, *negatives(x, markov, rng)])
        labels = torch.cat([y, torch.zeros_like(y)])
        net.train()
        for rows in torch.randperm(len(sequences))[: per_epoch * recipe.batch].split(recipe.batch):
            batch = shifted(one_hot(either_strand(sequences[rows])), recipe.shift)
            with torch.autocast("cpu", torch.bfloat16):
                out = net(batch).float()
            loss = F.binary_cross_entropy_with_logits(out, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average(kept, net, recipe.average)
        both = BothStrands(kept.eval())
        real, fake = logits(both, data.x[held]), logits(both, held_negatives)
        own = real[data.y[held] == HEPG2, HEPG2]
        area = auroc(torch.cat([own, fake[:, HEPG2]]), torch.arange(len(own) + len(fake)) < len(own))
        threshold = fake[:, HEPG2].quantile(1 - FALSE_POSITIVES).item()
        share = (own > threshold).float().mean()
        print(f"epoch {epoch + 1:3d}  {clock():5.0f} s  loss {loss.item():.3f}  chr2: AUROC of HepG2 elements against "
              f"negatives {area:.4f}, called open {share:.3f}", flush=True)  # fmt: skip
    return both, {"threshold": repr(threshold), "seconds": f"{clock():.0f}"}


def main() -> None:
    """Train and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = Recipe()
    both, found = train(recipe, Elements())
    meta = {
        "network": recipe.network,
        "config": json.dumps(recipe.config),
        "recipe": json.dumps(asdict(recipe)),
    }
    print(save(both.net, "accessibility", meta | found))


if __name__ == "__main__":
    main()
