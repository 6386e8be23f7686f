"""Markov chains of tokens, short enough to enumerate, whose masked denoiser is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dav_bench.builtin.models.residual import residual
from dav_bench.builtin.multilinear import contract, fold, letters, outer
from dav_bench.builtin.toy import TFBind8, ToyTokens
from dav_bench.core import MaskedProcess, Model, Reward
from dav_bench.tasks import asset

FX3 = (
    (0.4, 0.3, 0.2, 0.1),
    ((0.4, 0.3, 0.2, 0.1), (0.1, 0.4, 0.3, 0.2), (0.2, 0.1, 0.4, 0.3), (0.3, 0.2, 0.1, 0.4)),
)
"""Law of the first token, and of each next one."""


class TokenNetwork(nn.Module):
    """p(x_0^l | x_i) of a Markov chain by sum-product, plus a residual that starts at 0.

    Blocks of as many tokens as the chain remembers form a chain that remembers one block, so a marginal takes one
    product with V^k x V^k numbers for each block and direction: the sum over all V^L sequences, at a fraction of
    its cost.  Multilinear in the rows of the state before it is normalised, so a relaxed state has a gradient.
    """

    time_input = False

    def __init__(self, start: Tensor, follow: Tensor, length: int, hidden: int = 64) -> None:
        """`start`, (V,) * k: law of the first k tokens; `follow`, (V,) * (k + 1): of a token after the k before it."""
        super().__init__()
        self.start, self.follow = start.double(), follow.double()
        self.length, self.vocab, self.order = length, len(start), start.ndim
        self.widths = [min(self.order, length - i) for i in range(0, length, self.order)]
        self.first: Tensor
        self.register_buffer("first", self.start.flatten())
        for j, widths in enumerate(pairwise(self.widths)):
            self.register_buffer(f"link{j}", self._link(*widths))
        for width in {*self.widths}:  # (V^w, w V): which tokens a block holds
            ids = letters(self.vocab, width)
            self.register_buffer(f"holds{width}", F.one_hot(ids, self.vocab).double().flatten(1))
        self.residual = residual(length * (self.vocab + 1), hidden, length * self.vocab)

    def _link(self, before: int, after: int) -> Tensor:
        """(V^before, V^after) p(block | the block before it)."""
        ids = letters(self.vocab, before + after)
        p = torch.ones(len(ids), dtype=torch.float64)
        for j in range(after):
            p = p * self.follow[tuple(ids[:, j : j + before + 1].T)]
        return p.view(self.vocab**before, -1)

    # ---- the law, enumerated

    @cached_property
    def prior(self) -> Tensor:
        """(N,) float64 probability of each of the V^L sequences."""
        ids, k = letters(self.vocab, self.length), self.order
        p = self.start[tuple(ids[:, :k].T)]
        for j in range(self.length - k):
            p = p * self.follow[tuple(ids[:, j : j + k + 1].T)]
        return p

    @property
    def sequences(self) -> Tensor:
        """(N, L, V) all sequences, one-hot, in the order of `prior`."""
        return F.one_hot(letters(self.vocab, self.length), self.vocab).to(self.first)

    def target(self, reward: Reward, alpha: float) -> Tensor:
        """(N,) p(x_0) exp(r(x_0) / α) / Z of each sequence."""
        return (self.prior.log() + reward(self.sequences).cpu().double() / alpha).softmax(0)

    def soft_value(self, reward: Reward, alpha: float) -> Callable[[Tensor, int], Tensor]:
        """(x, i) -> (B,) α log E[exp(r(x_0) / α) | x_i]; exact where one token is revealed a step."""
        rewards = reward(self.sequences).cpu().double()
        top = float(rewards.max())
        tilted = fold(self.prior * ((rewards - top) / alpha).exp(), self.vocab, self.length)

        def value(x: Tensor, i: int) -> Tensor:
            mass = self._messages(x)[0].sum(-1)
            return top + alpha * (contract(tilted.to(x), self._fits(x)) / mass).log()

        return value

    # ---- the denoiser

    @staticmethod
    def _fits(x: Tensor) -> Tensor:
        """(B, L, V) how well each token fits a state (B, L, V + 1): a mask fits all."""
        return x[..., :-1] + x[..., -1:]

    def _messages(self, x: Tensor) -> list[Tensor]:
        """For each block (B, V^w) p(block, state), up to the chance of the masks."""
        seen = [outer(part) for part in self._fits(x).split(self.order, 1)]
        links = [getattr(self, f"link{j}").to(x) for j in range(len(seen) - 1)]
        left = [self.first.to(x) * seen[0]]
        for link, block in zip(links, seen[1:], strict=True):
            left.append((left[-1] @ link) * block)
        right = [torch.ones_like(seen[-1])]
        for link, block in zip(reversed(links), reversed(seen[1:]), strict=True):
            right.append((right[-1] * block) @ link.T)
        return [a * b for a, b in zip(left, reversed(right), strict=True)]

    def marginals(self, x: Tensor) -> Tensor:
        """(B, L, V) p(x_0^l | x_i) of the chain without the residual, from states (B, L, V + 1)."""
        blocks = self._messages(x)
        holds = [getattr(self, f"holds{w}").to(x) for w in self.widths]
        law = torch.cat([block @ has for block, has in zip(blocks, holds, strict=True)], 1)
        return (law / blocks[0].sum(-1, keepdim=True)).view(len(x), self.length, self.vocab)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, L, V) logits of states (B, L, V + 1); the time adds nothing to the state."""
        return self.marginals(x).clamp_min(1e-30).log() + self.residual(x.flatten(1)).view(
            len(x), self.length, self.vocab
        )


def _build(network: TokenNetwork, order: Any, sampler: Mapping[str, Any], name: str) -> Model:
    process = MaskedProcess(network.length, network.vocab, int(sampler.get("steps", 8)), order)
    return Model(network, process, "sequence", name=name)


def build_tokens(config: ToyTokens, sampler: Mapping[str, Any]) -> Model:
    """A Markov chain of three tokens over four letters (the fixture FX3 of the tests)."""
    start, follow = (torch.tensor(law, dtype=torch.float64) for law in FX3)
    return _build(TokenNetwork(start, follow, 3, config.hidden), config.order, sampler, "toy-tokens")


def build_tfbind8(config: TFBind8, sampler: Mapping[str, Any]) -> Model:
    """Eight bases of human regulatory DNA: the Markov chain of order 3 of `tasks/tfbind8/fit_prior.py`."""
    with np.load(asset("tfbind8", "prior.npz")) as held:
        start, follow = torch.from_numpy(held["start"]), torch.from_numpy(held["follow"])
    return _build(TokenNetwork(start, follow, 8, config.hidden), config.order, sampler, "tfbind8")
