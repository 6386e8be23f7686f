"""Small worlds that the tests of the science share: models, rewards and contexts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dav_bench.builtin.models import mixture, tokens
from dav_bench.builtin.rewards import toy as rewards
from dav_bench.builtin.toy import ToyMixture, ToyTokens
from dav_bench.core import Context, Meter, MeteredReward, Model

KINDS = ("mixture", "parallel", "random")


def model(kind: str, steps: int = 8, dtype: torch.dtype = torch.float64, untrained: bool = True) -> Model:
    """A toy world: `mixture`, or tokens revealed in `parallel` or one at a time in `random` order.

    `untrained=False` gives its residual random weights, so that the policy differs from the exact model.
    """
    if kind == "mixture":
        world = mixture.build_mixture(ToyMixture(hidden=16), {"steps": steps})
    else:
        world = tokens.build_tokens(ToyTokens(hidden=16, order=kind), {"steps": steps})
    world.to("cpu", dtype).network.eval()
    world.reference()
    if not untrained:
        disturb(world)
    return world


def disturb(world: Model, scale: float = 0.5, seed: int = 0) -> None:
    """Random weights in the last layer of the residual."""
    generator = torch.Generator().manual_seed(seed)
    last = world.network.residual[-1]
    with torch.no_grad():
        last.weight.copy_(scale * torch.randn(last.weight.shape, generator=generator, dtype=torch.float64))


def reward(kind: str) -> Callable[..., Tensor]:
    return rewards.QuadraticReward() if kind == "mixture" else rewards.LetterReward()


def context(world: Model, r: Callable[..., Tensor], micro_batch: int | None = None) -> Context:
    """A metered context, as a run makes it."""
    meter = Meter()
    world.attach(meter, micro_batch)
    return Context(world, world.reference(), MeteredReward(r, meter, micro_batch), meter)


def setting(kind: str, steps: int = 8, micro_batch: int | None = None, **options) -> Context:
    """Context of a world with its own reward."""
    return context(model(kind, steps, **options), reward(kind), micro_batch)


class Saved:
    """Bytes that autograd holds for the backward pass at any time."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor):
        counter = self

        class Handle:
            def __init__(self) -> None:
                self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
                counter.now += self.size
                counter.peak = max(counter.peak, counter.now)

            def __del__(self) -> None:
                counter.now -= self.size

        return Handle()
