"""All trajectories of the enumerable tokens, so that expectations are sums: nothing is left to chance.

Three tokens over four letters, one revealed at a time: 4³ sequences in 3! orders make 384 paths through 125 states.
The policy is a table with its own logits for each state, so that every law of tokens given a state can be fitted
exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from worlds import context, model, reward

from dav_bench.core import Batch, Context, Loss, Model, Noise

LENGTH, VOCAB = 3, 4
_ORDERS = list(itertools.permutations(range(LENGTH)))


class Table(nn.Module):
    """Logits for each of the 125 states, those of another network at first."""

    time_input = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        states = F.one_hot(torch.cartesian_prod(*[torch.arange(VOCAB + 1)] * LENGTH), VOCAB + 1).double()
        with torch.no_grad():
            self.logits = nn.Parameter(network(states, torch.zeros(len(states), dtype=torch.float64)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, L, V) logits at states (B, L, V + 1)."""
        place = (VOCAB + 1) ** torch.arange(LENGTH - 1, -1, -1)
        return self.logits[(x.argmax(-1) * place).sum(-1)]


def disturb(world: Model, scale: float = 0.5, seed: int = 0) -> None:
    """Moves the logits of a table at random."""
    noise = torch.randn(
        world.network.logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    with torch.no_grad():
        world.network.logits.add_(scale * noise)


def setting(scale: float = 0.5, seed: int = 0, micro_batch: int | None = None) -> Context:
    """Tokens revealed one at a time, the policy a table moved away from the exact model by `scale`."""
    world = model("random")
    table = Model(Table(world.network), world.process, "sequence", name="table")
    table.reference()
    disturb(table, scale, seed)
    return context(table, reward("random"), micro_batch)


def every_path(ctx: Context) -> Batch:
    """(T + 1, 384, L) all trajectories with their rewards."""
    sequences = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)
    paths = []
    for order in _ORDERS:
        ids = torch.full((LENGTH + 1, len(sequences), LENGTH), VOCAB)
        for k, position in enumerate(order, start=1):
            ids[k:, :, position] = sequences[:, position]
        paths.append(ids)
    states = torch.cat(paths, 1).to(torch.uint8)
    n = states.shape[1]
    final = ctx.policy.unpack(states[-1])
    return Batch(
        states, ctx.reward(ctx.policy.decode(ctx.policy.process.clean(final)), None), keys=Noise.of(0, n)
    )


def step_log_probs(world: Model, batch: Batch) -> Tensor:
    """(T, N) log p(x_{i−1} | x_i) along each path, with its graph."""
    x = [world.unpack(s) for s in batch.states]
    T = batch.steps
    return torch.stack([world.step(x[k], T - k).log_prob(x[k + 1]) for k in range(T)])


def expected_gradient(loss: Loss, ctx: Context, batch: Batch, weight: Tensor) -> Tensor:
    """Gradient of E[Σ_i loss_i] where path n has probability `weight[n]`, a batch that was prepared."""
    item = batch.items(torch.arange(len(batch)), ctx.policy.unpack, Noise.of(5, len(batch)))
    values = loss(ctx, item).view(batch.steps, -1)
    (g,) = torch.autograd.grad((values * weight).sum(), ctx.policy.network.logits)
    return g


def law(ctx: Context, world: Model | None = None) -> Tensor:
    """(64,) the law of x_0 under a model."""
    batch = every_path(ctx)
    with torch.no_grad():
        p = step_log_probs(world or ctx.policy, batch).sum(0).exp()
    return p.view(len(_ORDERS), -1).sum(0)


def tilted(ctx: Context, alpha: float, power: float = 1.0) -> Tensor:
    """(64,) p_ref(x_0) exp(power r(x_0) / α) / Z."""
    batch = every_path(ctx)
    r = batch.reward[: VOCAB**LENGTH]
    return (law(ctx, ctx.reference).log() + power * r / alpha).softmax(0)


def backward(
    ctx: Context, alpha: float, value: Callable[[Tensor, int], Tensor] | None = None, soft: bool = True
) -> None:
    """Gives the table the law p_ref exp(V(x_{i−1}) / α) of tokens at each state, from the last step to the first.

    V is `value`, or follows from the steps already set: the soft value of the pretrained model, which makes the
    exact tilt of the reward, or with `soft=False` the plain mean E[r | x_{i−1}] under the table itself.
    """
    states = F.one_hot(torch.cartesian_prod(*[torch.arange(VOCAB + 1)] * LENGTH), VOCAB + 1).double()
    left = states[..., -1].sum(1).long()
    place = (VOCAB + 1) ** torch.arange(LENGTH - 1, -1, -1)
    ref, logits = ctx.reference.network.logits.log_softmax(-1), ctx.policy.network.logits
    held = torch.where(left == 0, ctx.reward.reward(states[..., :-1]), 0.0)
    if value is not None:
        held = torch.stack([value(states[k : k + 1], int(left[k]))[0] for k in range(len(states))])
    with torch.no_grad():
        for i in range(1, LENGTH + 1):
            for k in (left == i).nonzero()[:, 0].tolist():
                hidden = states[k, :, -1].nonzero()[:, 0]
                kids = k - (VOCAB - torch.arange(VOCAB)) * place[hidden][:, None]
                law = ref[k, hidden] + held[kids] / alpha
                logits[k, hidden] = law
                if value is None and soft:
                    held[k] = alpha * law.logsumexp(-1).mean()  # the same for each position
                elif value is None:
                    held[k] = (law.softmax(-1) * held[kids]).sum(-1).mean()
