"""Train the reward and the held-out reward of the task `dna` on disjoint halves of the training chromosomes.

    python tasks/dna/train_oracles.py            # both

Nothing here looks at chromosome 1; chromosome 2 picked the settings and prints after each epoch.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from dhs import HEPG2, VALIDATION, Clock, Elements, auroc, either_strand, one_hot, save, shifted
from torch import Tensor, nn

from dav_bench.builtin.rewards.dna import NETWORKS, Specificity


@dataclass(frozen=True)
class Recipe:
    """How one oracle is trained."""

    network: str
    """Key of `NETWORKS`."""
    parity: int
    """0: even training chromosomes, 1: odd ones."""
    seed: int
    """Seed of the initial weights and of the batches."""
    config: dict[str, Any] = field(default_factory=dict)
    """Arguments of the network."""
    epochs: int = 20
    """Passes over the half, each element on a random strand."""
    lr: float = 3e-3
    """Peak of the one-cycle learning rate."""
    decay: float = 0.05
    """AdamW weight decay."""
    smoothing: float = 0.05
    """Label smoothing."""
    shift: int = 8
    """Elements are moved by up to this many bases."""
    average: float = 0.995
    """Decay of the average of weights that is kept."""
    batch: int = 128
    """Elements in a batch."""


RECIPES = {
    "specificity": Recipe("pooled-conv", parity=0, seed=1, config={"widths": (64, 64, 96), "pools": (4, 2, 1)}),
    "specificity-heldout": Recipe("dilated-attention", parity=1, seed=2),
}


@torch.inference_mode()
def scores(reward: nn.Module, x: Tensor) -> Tensor:
    """Rewards (N,) of bases (N, L)."""
    return torch.cat([reward(one_hot(part)) for part in x.split(512)])


def train(recipe: Recipe, data: Elements, log: bool = True) -> tuple[nn.Module, float]:
    """The averaged network and its seconds of training."""
    torch.manual_seed(recipe.seed)
    net = NETWORKS[recipe.network](**recipe.config)
    kept = copy.deepcopy(net)
    index = data.half(recipe.parity).nonzero()[:, 0]
    held = data.on(VALIDATION)
    per_epoch = len(index) // recipe.batch
    optimizer = torch.optim.AdamW(net.parameters(), recipe.lr, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.epochs * per_epoch
    )
    clock, spent = Clock(), 0.0
    for epoch in range(recipe.epochs):
        net.train()
        for rows in index[torch.randperm(len(index))][: per_epoch * recipe.batch].split(recipe.batch):
            x = shifted(one_hot(either_strand(data.x[rows])), recipe.shift)
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(x).float()
            loss = F.cross_entropy(logits, data.y[rows], label_smoothing=recipe.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average(kept, net, recipe.average)
        spent = clock()
        if log:
            score = scores(Specificity(kept.eval()), data.x[held])
            area = auroc(score, data.y[held] == HEPG2)
            print(
                f"epoch {epoch + 1:3d}  {spent:5.0f} s  loss {loss.item():.3f}  chr2 AUROC {area:.4f}",
                flush=True,
            )
    return kept.eval(), spent


@torch.no_grad()
def average(kept: nn.Module, net: nn.Module, decay: float) -> None:
    """Move the kept weights and statistics towards those of `net`."""
    for a, b in zip(kept.state_dict().values(), net.state_dict().values(), strict=True):
        if a.is_floating_point():
            a.lerp_(b, 1 - decay)
        else:
            a.copy_(b)


def main() -> None:
    """Train what was asked for and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(RECIPES), help="which of the oracles")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = Elements()
    for name in args.names:
        recipe = RECIPES[name]
        net, seconds = train(recipe, data)
        meta = {"network": recipe.network, "config": json.dumps(recipe.config), "recipe": json.dumps(asdict(recipe)),
                "seconds": f"{seconds:.0f}"}  # fmt: skip
        print(save(net, name, meta))


if __name__ == "__main__":
    main()
