"""The optimiser loop of the M-step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .method import Training
from .model import chunks
from .noise import Noise
from .protocols import Batch, Context, Loss, NonFinite


def parameters(ctx: Context) -> dict[str, nn.Parameter]:
    """Everything that is trained, by name: the policy, and networks of the loss as `<module>/<name>`."""
    named = dict(ctx.policy.trainable())
    for key, module in ctx.modules.items():
        named |= {f"{key}/{name}": p for name, p in module.named_parameters() if p.requires_grad}
    return named


def optimizer(
    parameters: Mapping[str, nn.Parameter], training: Training, modules: Mapping[str, nn.Module] | None = None
) -> torch.optim.AdamW:
    """AdamW on these parameters, those of a module at its own `lr_scale` times the learning rate."""
    scales: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in parameters.items():
        module = (modules or {}).get(name.partition("/")[0]) if "/" in name else None
        scales.setdefault(float(getattr(module, "lr_scale", 1.0)), []).append(parameter)
    groups = [{"params": group, "lr": training.lr * scale, "scale": scale} for scale, group in scales.items()]
    return torch.optim.AdamW(groups, lr=training.lr, betas=training.betas, weight_decay=training.weight_decay)


def gradient(
    loss: Loss,
    ctx: Context,
    batch: Batch,
    index: Tensor,
    alive: Tensor,
    micro_batch: int | None,
    noise: Noise | None = None,
) -> float:
    """Adds the gradient of the mean loss over items `index`; returns that mean.

    One micro-batch of graph lives at a time, each scaled by the count of the whole, so its size changes memory
    and not the gradient.  Items without gradient are left out of the network but not of the mean.
    """
    live, total = index[alive[index]], 0.0
    for c in chunks(len(live), micro_batch):
        value = loss(ctx, batch.items(live[c], ctx.policy.unpack, noise))
        if not value.isfinite().all():
            raise NonFinite("the loss", int((~value.isfinite()).sum()), len(value))
        mean = value.sum() / len(index)
        if mean.requires_grad:  # a constant has no gradient: DDPO's clipped ratios, for example
            mean.backward()
        if batch.unit == "step" and loss.trains_policy:  # losses that run whole trajectories count their own rows
            ctx.policy.count("backward", len(live[c]))
        total += float(mean.detach())
    return total


def noted(batch: Batch) -> dict[str, float]:
    """What the loss noted of its items, one number for each name."""
    out = {}
    for name, parts in batch.notes.items():
        values = torch.cat(parts).double()
        extreme = {"_min": values.min, "_max": values.max}.get(name[-4:], values.mean)
        out[name] = float(extreme())
    return out


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
    loss.prepare(ctx, batch, noise.fold(2))
    alive = loss.active(batch)
    usable = torch.arange(len(batch), device=alive.device)
    if training.subset < 1:  # a share of the trajectories, as the release uses by accident (dav.md E12)
        samples = batch.states.shape[1]
        chosen = noise.fold(0).uniform(samples)[0].argsort()[: max(1, round(training.subset * samples))]
        usable = usable[torch.isin(usable % samples, chosen.to(usable.device))]
    ctx.policy.network.eval()
    # each has a norm of its own: the gradient of a baseline must not shrink that of the policy
    owners = [list(ctx.policy.trainable().values())]
    owners += [[p for p in module.parameters() if p.requires_grad] for module in ctx.modules.values()]
    losses, norms = [], []
    start, end = progress
    for update in range(training.updates):
        order = usable[noise.fold(1, update).uniform(len(usable))[0].argsort().to(usable.device)]
        fresh = noise.fold(3, update).repeat(len(batch))
        for k, index in enumerate(parts := order.split(training.minibatch)):
            done = start + (end - start) * (update + k / len(parts)) / training.updates
            rate = training.lr * (1 - done if training.schedule == "linear" else 1)
            for group in opt.param_groups:
                group["lr"] = rate * group["scale"]
            opt.zero_grad(set_to_none=True)
            losses.append(gradient(loss, ctx, batch, index, alive, ctx.policy.micro_batch, fresh))
            each = [nn.utils.clip_grad_norm_(group, training.clip) for group in owners]
            if not all(norm.isfinite() for norm in each):
                raise NonFinite("the gradient", 1, 1)
            norms.append(float(each[0]))
            opt.step()
            loss.updated(ctx)
    batch.stats |= noted(batch)
    return {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms)}
