"""What the recipes share: a loop that can be stopped and goes on from its checkpoint, with averaged weights."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def join(seed: int) -> int:
    """Seed, and join the other processes of this training where RANK and WORLD_SIZE are set: this one's number."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(seed)
    return rank


def wait() -> None:
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def agree(parameters: Iterable[nn.Parameter], share: float) -> float:
    """Average gradients, and how far training is, over the processes."""
    if not dist.is_initialized():
        return share
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads] + [torch.tensor([share])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat[:-1].split([g.numel() for g in grads])
    torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])
    return flat[-1].item()


class _Norm(torch.autograd.Function):
    """Group norm whose backward runs on contiguous copies: that of PyTorch is slow in bf16 with channels last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        shape = (len(x), x.shape[1], x[0, 0].numel(), groups)
        y, mean, rstd = torch.ops.aten.native_group_norm(x, weight.to(x.dtype), bias.to(x.dtype), *shape, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, mean, rstd = ctx.saved_tensors
        strided = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        dx, dw, db = torch.ops.aten.native_group_norm_backward(
            grad.contiguous(), x.contiguous(), mean, rstd, weight.to(x.dtype), *ctx.shape, [True] * 3
        )
        return dx.contiguous(memory_format=strided), dw.to(weight.dtype), db.to(weight.dtype), None, None


class QuickGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, trained faster."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, ...)."""
        return _Norm.apply(x, self.weight, self.bias, self.num_groups, self.eps)


def quicken(net: nn.Module) -> nn.Module:
    """The same network with `QuickGroupNorm`s, channels last."""
    for module in net.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = QuickGroupNorm
    return net.to(memory_format=torch.channels_last)


class Run:
    """One network in training: AdamW, a warm-up, averaged weights, and a state on disk to go on from.

    The learning rate is constant after the warm-up, so that training can go on at any time; over the last `cool` of the
    minutes given it falls linearly to zero, and a later call goes on with the full rate.
    """

    def __init__(
        self, net: nn.Module, state: Path, lr: float, decay: float = 0.01, average: float = 0.999, warmup: int = 200,
        groups: Iterable[dict[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        self.net, self.state, self.lr, self.average, self.warmup = net, state, lr, average, warmup
        self.optimizer = torch.optim.AdamW(
            groups or net.parameters(), lr, weight_decay=decay, betas=(0.9, 0.99), fused=True
        )
        for group in self.optimizer.param_groups:
            group["share"] = group["lr"] / lr
        self.kept = copy.deepcopy(net).eval().requires_grad_(False)
        self.step, self.seconds = 0, 0.0
        self.log: list[dict[str, float]] = []
        if state.exists():
            saved = torch.load(state, weights_only=True)
            net.load_state_dict(saved["net"])
            self.kept.load_state_dict(saved["kept"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step, self.seconds, self.log = saved["step"], saved["seconds"], saved["log"]
            print(f"goes on at step {self.step}, {self.seconds:.0f} s", flush=True)

    def save(self) -> None:
        """Write the state."""
        part = self.state.with_suffix(".part")
        parts = {"net": self.net, "kept": self.kept, "optimizer": self.optimizer}
        saved = {name: what.state_dict() for name, what in parts.items()}
        torch.save({**saved, "log": self.log, "step": self.step, "seconds": self.seconds}, part)
        os.replace(part, self.state)

    def train(
        self, loss: Callable[[], Tensor], minutes: float, every: float,
        look: Callable[[], dict[str, float]], cool: float = 0.0,
    ) -> None:  # fmt: skip
        """Train for `minutes` of the clock.

        Args:
            loss: of one batch, a scalar with a graph.
            minutes: of training in this call.
            every: minutes between looks.
            look: numbers of the averaged network, which are printed and logged.
            cool: share of the minutes over which the learning rate falls to zero.
        """
        start, spent, looked, running = time.monotonic(), self.seconds, 0.0, list[Tensor]()
        done, share = False, 0.0
        first = not dist.is_initialized() or dist.get_rank() == 0
        torch.manual_seed(
            torch.initial_seed() + self.step + 7919 * (dist.get_rank() if dist.is_initialized() else 0)
        )
        while not done:
            done = share >= 1
            fall = min(1.0, max(0.0, 1 - share) / cool) if cool else 1.0
            rate = min(1.0, (self.step + 1) / self.warmup) * fall
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * rate * group["share"]
            self.net.train()
            value = loss()
            value.backward()
            share = agree(self.net.parameters(), (time.monotonic() - start) / 60 / minutes)
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            running.append(value.detach())
            with torch.no_grad():
                decay = min(self.average, (1 + self.step) / (10 + self.step))
                torch._foreach_lerp_(list(self.kept.parameters()), list(self.net.parameters()), 1 - decay)
                for mine, new in zip(self.kept.buffers(), self.net.buffers(), strict=True):
                    mine.copy_(new)  # running statistics are averages already
            self.seconds = spent + time.monotonic() - start
            if first and (time.monotonic() - start - looked > 60 * every or done):
                looked = time.monotonic() - start
                numbers = {"step": self.step, "seconds": round(self.seconds)}
                numbers |= {"loss": torch.stack(running).mean().item(), **look()}
                self.log.append(numbers)
                print("  ".join(f"{k} {v:.5g}" for k, v in numbers.items()), flush=True)
                running = []
                self.save()


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in fp16, ready to be written."""
    return {k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in state.items()}
