"""Advantages: what a reward is worth beside others, the weight a policy gradient puts on log-probabilities.

Each takes a batch and gives (B,) numbers, and counts in `batch.stats` what would otherwise pass unseen: groups
without variance, spreads so small that the floor decides, advantages that were clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from .noise import Noise
from .protocols import Batch, Context


class Advantage(Protocol):
    """(B,) advantages of the samples of a batch."""

    def modules(self, ctx: Context) -> dict[str, nn.Module]:
        """What it remembers of earlier batches."""
        ...

    def __call__(self, ctx: Context, batch: Batch) -> Tensor: ...


# ---- groups


def prompt_keys(cond: Tensor) -> Tensor:
    """(B,) int64, equal for equal rows of conditions (B, ...): prompt numbers, tokens or embeddings."""
    flat = cond.reshape(len(cond), -1)
    bits = flat.double().view(torch.int64) if flat.is_floating_point() else flat.long()
    return ((bits + 1) * Noise.of(0, bits.shape[1], device=cond.device).keys).sum(1)


def grouped(batch: Batch, size: int) -> Tensor:
    """(B,) number of each sample's group: its prompt, or without prompts `size` consecutive samples."""
    if batch.cond is not None:
        return prompt_keys(batch.cond).unique(return_inverse=True)[1]
    n = len(batch.reward)
    if n % size:
        raise ValueError(
            f"{n} samples do not fall into groups of {size}; choose samples as a multiple of group"
        )
    return torch.arange(n, device=batch.reward.device) // size


@dataclass(frozen=True)
class Moments:
    """Mean and spread of rewards for each group."""

    mean: Tensor
    """(G,)."""
    std: Tensor
    """(G,) population standard deviation, exactly 0 where all are equal."""

    @classmethod
    def of(cls, reward: Tensor, group: Tensor) -> Moments:
        r = reward.double()
        zero = r.new_zeros(int(group.max()) + 1)
        count = zero.scatter_add(0, group, torch.ones_like(r))
        mean = zero.scatter_add(0, group, r) / count
        var = zero.scatter_add(0, group, (r - mean[group]) ** 2) / count
        low, high = (zero.scatter_reduce(0, group, r, how, include_self=False) for how in ("amin", "amax"))
        return cls(mean, torch.where(high > low, var.sqrt(), zero))


def standardised(
    batch: Batch, mean: Tensor, std: Tensor, floor: float, clip: float | None, alike: Tensor
) -> Tensor:
    """(B,) (r − mean) / (std + floor), 0 where a group is `alike`, at most `clip` in size; all (B,)."""
    gap = torch.where(alike, 0.0, batch.reward.double() - mean)
    value = gap / (std + floor)
    batch.stats["advantage_floored"] = float(((std < floor) & ~alike).double().mean())
    if clip is not None:
        batch.stats["advantage_clipped"] = float((value.abs() > clip).double().mean())
        value = value.clamp(-clip, clip)
    return value.to(batch.reward)


# ---- advantages


@dataclass(frozen=True)
class Scaled:
    """w r, or w (r − b) with b the mean of the other samples, which leaves the expected gradient as it is."""

    weight: float = 1.0
    baseline: Literal["mean", "none"] = "mean"

    def modules(self, ctx: Context) -> dict[str, nn.Module]:
        return {}

    def __call__(self, ctx: Context, batch: Batch) -> Tensor:
        r = batch.reward.double()
        if self.baseline == "mean" and len(r) > 1:
            r = (r - r.mean()) * len(r) / (len(r) - 1)
        return (self.weight * r).to(batch.reward)


class PromptStatistics(nn.Module):
    """The last rewards of each prompt, in tables of fixed size so that a checkpoint holds them.

    When all rows are taken, a new prompt takes the row of the one not seen for longest.
    """

    def __init__(self, prompts: int, window: int) -> None:
        super().__init__()
        self.keys: Tensor
        self.rewards: Tensor
        self.seen: Tensor
        self.used: Tensor
        self.register_buffer("keys", torch.zeros(prompts, dtype=torch.int64))
        self.register_buffer("rewards", torch.zeros(prompts, window, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(prompts, dtype=torch.int64))
        self.register_buffer("used", torch.zeros(prompts, dtype=torch.int64))

    def row(self, key: Tensor) -> tuple[int, bool]:
        """Row of a prompt, and whether another prompt was forgotten for it."""
        held = ((self.keys == key) & (self.used > 0)).nonzero()
        if len(held):
            row, forgot = int(held[0]), False
        else:
            row = int(self.used.argmin())  # 0 where a row is free
            forgot = bool(self.used[row] > 0)
            self.keys[row], self.seen[row] = key, 0
        self.used[row] = self.used.max() + 1
        return row, forgot

    def push(self, row: int, rewards: Tensor) -> Tensor:
        """Adds rewards (n,) of a prompt, oldest first; returns those now held."""
        window = self.rewards.shape[1]
        kept = rewards[-window:].double()
        at = (
            self.seen[row] + len(rewards) - len(kept) + torch.arange(len(kept), device=kept.device)
        ) % window
        self.rewards[row, at] = kept
        self.seen[row] += len(rewards)
        return self.rewards[row, : min(window, int(self.seen[row]))]


@dataclass(frozen=True)
class PerPrompt:
    """(r − mean_c) / (std_c + floor) by the last rewards of the prompt, by the batch's until there are `min_count`.

    Without prompts the batch is all there is.  DDPO (arXiv 2305.13301); window and count of its released code.
    """

    window: int = 32
    min_count: int = 16
    prompts: int = 1024
    """Most prompts remembered."""
    floor: float = 1e-6
    clip: float | None = 5.0
    tracker: bool = True
    """False: the batch's statistics always."""

    def modules(self, ctx: Context) -> dict[str, nn.Module]:
        if not self.tracker:
            return {}
        return {"statistics": PromptStatistics(self.prompts, self.window).to(ctx.policy.device)}

    def __call__(self, ctx: Context, batch: Batch) -> Tensor:
        r = batch.reward.double()
        every = Moments.of(r, torch.zeros_like(r, dtype=torch.long))
        mean, std = every.mean.expand(len(r)).clone(), every.std.expand(len(r)).clone()
        if self.tracker and batch.cond is not None:
            self._remember(ctx, batch, mean, std)
        alike = std == 0
        batch.stats["zero_variance"] = float(alike.double().mean())
        return standardised(batch, mean, std, self.floor, self.clip, alike)

    def _remember(self, ctx: Context, batch: Batch, mean: Tensor, std: Tensor) -> None:
        """Puts the statistics of known prompts into `mean` and `std`."""
        table = ctx.modules["statistics"]
        assert isinstance(table, PromptStatistics) and batch.cond is not None
        fallback, forgotten, keys = 0, 0, prompt_keys(batch.cond)
        for key in keys.unique():
            mine = keys == key
            row, forgot = table.row(key)
            held = table.push(row, batch.reward[mine])
            forgotten += forgot
            if len(held) < self.min_count:
                fallback += int(mine.sum())
                continue
            own = Moments.of(held, torch.zeros(len(held), dtype=torch.long, device=held.device))
            mean[mine], std[mine] = own.mean[0], own.std[0]
        batch.stats["prompt_fallback"] = fallback / len(keys)
        batch.stats["prompts_forgotten"] = float(forgotten)


@dataclass(frozen=True)
class PerGroup:
    """(r − mean_group) / (std + floor), the spread being that of the group or of the batch (GRPO, arXiv 2402.03300).

    A group whose rewards are all equal tells nothing and gets 0.
    """

    size: int = 8
    std: Literal["group", "batch", "none"] = "group"
    """`none` subtracts the mean of the others alone, so that the KL weight is a temperature in units of reward."""
    floor: float = 1e-4
    clip: float | None = 5.0

    def modules(self, ctx: Context) -> dict[str, nn.Module]:
        return {}

    def __call__(self, ctx: Context, batch: Batch) -> Tensor:
        group, r = grouped(batch, self.size), batch.reward.double()
        own = Moments.of(r, group)
        batch.stats["zero_variance"] = float((own.std == 0).double().mean())
        alike = (own.std == 0)[group]
        if self.std == "none":
            n = group.bincount()[group]  # with the sample itself in the mean, all would be short by (n − 1)/n
            return torch.where(alike, 0.0, (r - own.mean[group]) * n / (n - 1).clamp_min(1)).to(batch.reward)
        every = Moments.of(r, torch.zeros_like(group)).std.expand(len(r))
        spread = own.std[group] if self.std == "group" else every
        return standardised(batch, own.mean[group], spread, self.floor, self.clip, alike)
