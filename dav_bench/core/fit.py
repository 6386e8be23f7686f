"""The optimiser loop of the M-step."""

from __future__ import annotations

import torch
from torch import Tensor

from .method import Training
from .model import chunks
from .noise import Noise
from .protocols import Batch, Context, Loss, NonFinite


def optimizer(parameters: dict[str, torch.nn.Parameter], training: Training) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters.values(), lr=training.lr, betas=training.betas, weight_decay=training.weight_decay
    )


def gradient(
    loss: Loss, ctx: Context, batch: Batch, index: Tensor, alive: Tensor, micro_batch: int | None
) -> float:
    """Adds the gradient of the mean loss over items `index`; returns that mean.

    One micro-batch of graph lives at a time, each scaled by the count of the whole, so its size changes memory
    and not the gradient.  Items without gradient are left out of the network but not of the mean.
    """
    live, total = index[alive[index]], 0.0
    for c in chunks(len(live), micro_batch):
        value = loss(ctx, batch.items(live[c], ctx.policy.unpack))
        if not value.isfinite().all():
            raise NonFinite("the loss", int((~value.isfinite()).sum()), len(value))
        mean = value.sum() / len(index)
        mean.backward()
        ctx.meter.count("backward", len(live[c]))
        total += float(mean.detach())
    return total


def fit(
    loss: Loss,
    ctx: Context,
    batch: Batch,
    opt: torch.optim.Optimizer,
    training: Training,
    noise: Noise,
    progress: tuple[float, float] = (0.0, 0.0),
) -> dict[str, float]:
    """`training.updates` passes over the items of a batch, one optimiser step for each minibatch of them.

    `progress` is the share of all training done before and after this call, which a falling learning rate follows.
    The network stays in evaluation mode: with dropout the first pass would not see the log-probabilities that the
    search sampled from, and its global random numbers would have to be saved for a resume.
    """
    alive = loss.active(batch)
    usable = torch.arange(len(batch), device=alive.device)
    if training.subset < 1:  # a share of the trajectories, as the release uses by accident (dav.md E12)
        samples = batch.states.shape[1]
        chosen = noise.fold(0).uniform(samples)[0].argsort()[: max(1, round(training.subset * samples))]
        usable = usable[torch.isin(usable % samples, chosen.to(usable.device))]
    ctx.policy.network.eval()
    losses, norms = [], []
    start, end = progress
    for update in range(training.updates):
        order = usable[noise.fold(1, update).uniform(len(usable))[0].argsort().to(usable.device)]
        for k, index in enumerate(parts := order.split(training.minibatch)):
            done = start + (end - start) * (update + k / len(parts)) / training.updates
            for group in opt.param_groups:
                group["lr"] = training.lr * (1 - done if training.schedule == "linear" else 1)
            opt.zero_grad(set_to_none=True)
            losses.append(gradient(loss, ctx, batch, index, alive, ctx.policy.micro_batch))
            norm = torch.nn.utils.clip_grad_norm_(ctx.policy.trainable().values(), training.clip)
            if not norm.isfinite():
                raise NonFinite("the gradient", 1, 1)
            norms.append(float(norm))
            opt.step()
    return {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms)}
