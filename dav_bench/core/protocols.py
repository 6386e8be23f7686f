"""What the parts of a method are to each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .meter import Meter
    from .model import Model
    from .noise import Noise


class NonFinite(RuntimeError):
    """A reward, a weight or a loss is NaN or infinite."""

    def __init__(self, what: str, bad: int, of: int) -> None:
        super().__init__(f"{what} gave {bad} of {of} values that are not finite")


@runtime_checkable
class Reward(Protocol):
    """(B,) values of B samples, higher is better."""

    domain: str
    """"sequence" or "image"; "latent" where it scores what the model makes before it is decoded, which then is not."""
    provides: frozenset[str]
    """Contains "reward.grad" if differentiable in the sample, "reward.features" if it is head(features(sample), cond)
    with features (B, F)."""

    def __call__(self, sample: Tensor, cond: Tensor | None = None) -> Tensor: ...


@dataclass
class Context:
    """All that a search or a loss may use."""

    policy: Model
    """The model being aligned."""
    reference: Model
    """The pretrained model, frozen."""
    reward: Callable[[Tensor, Tensor | None], Tensor]
    """Metered training reward."""
    meter: Meter
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    """What the loss keeps beside the policy (`Loss.modules`): baselines, learned values, lagged networks."""

    def shown(self, model: Model, x0: Tensor) -> Tensor:
        """What the training reward looks at: the clean samples x_0 themselves for domain "latent", else decoded."""
        return x0 if getattr(self.reward, "domain", "") == "latent" else model.decode(x0)

    def score(self, model: Model, x0: Tensor, cond: Tensor | None) -> Tensor:
        """(B,) training rewards of clean samples x_0 (B, ...)."""
        return self.reward(self.shown(model, x0), cond)

    def model(self, on: str) -> Model:
        """The model named `policy`, `ref`, or a network of `modules` in the policy's place."""
        if on == "policy":
            return self.policy
        return self.reference if on == "ref" else self.policy.with_network(self.modules[on])


def _ignore(name: str, values: Tensor) -> None:
    pass


@dataclass
class Item:
    """Some (sample, step) pairs of a batch, or whole samples, in any mix: the unit a loss is micro-batched over."""

    x: Tensor
    """(b, ...) states x_i; x_T for whole samples."""
    x_next: Tensor
    """(b, ...) states x_{i-1} that the search moved to; x_0 for whole samples."""
    i: Tensor
    """(b,) grid index."""
    lookahead: Tensor | None
    """(b, ...) clean prediction from x_{i-1}, where the search made one."""
    mean: Tensor | None
    """(b, ...) estimate of E[x_{i-1} | x_i] under the tilted step, where the search kept it."""
    final: Tensor
    """(b, ...) the state x_0 the trajectory ended in."""
    cond: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """(b, ...) values of these items by name: those of the search and those `Loss.prepare` added."""
    noise: Noise | None = None
    """(b,) streams of this pass over the items, for losses that draw."""
    keys: Noise | None = None
    """(b,) streams the search drew the samples from, for losses that draw them again."""
    report: Callable[[Tensor, Tensor], None] | None = None
    """report(x_0, reward) of samples that the loss itself drew."""
    note: Callable[[str, Tensor], None] = _ignore
    """note(name, values) of these items: the mean over all items of a round joins its statistics, or the extreme
    where the name ends in `_min` or `_max`."""


@dataclass
class Batch:
    """Trajectories that a search found."""

    states: Tensor
    """(T + 1, B, ...) packed states, x_T first; (1, B, ...) for a search that keeps only x_0."""
    reward: Tensor
    """(B,) training reward of x_0; NaN while no sample was drawn."""
    lookahead: Tensor | None = None
    """(T, B, ...) packed clean predictions from each chosen x_{i-1}."""
    mean: Tensor | None = None
    """(T, B, ...) estimates of E[x_{i-1} | x_i] under the tilted steps."""
    cond: Tensor | None = None
    stats: dict[str, float] = field(default_factory=dict)
    """What the search noticed: mean effective share of candidates, ..."""
    log_z: Tensor | None = None
    """(B,) log of an unbiased estimate of Z = E[exp(r(x_0) / α)], by searches that weigh particles."""
    keys: Noise | None = None
    """(B,) streams the samples were drawn from."""
    unit: Literal["step", "sample"] = "step"
    """What a loss sees one by one: (sample, step) pairs, or whole samples."""
    per_sample: dict[str, Tensor] = field(default_factory=dict)
    """(B, ...) columns by name: advantage, weight, ..."""
    per_step: dict[str, Tensor] = field(default_factory=dict)
    """(T, B, ...) columns by name: log_prob, gain, ..."""
    notes: dict[str, list[Tensor]] = field(default_factory=dict)
    """(b,) values by name that the loss noted of its items while it was fitted."""

    @property
    def steps(self) -> int:
        return len(self.states) - 1

    def __len__(self) -> int:
        """Number of items."""
        return self.states.shape[1] * (self.steps if self.unit == "step" else 1)

    def moved(self) -> Tensor:
        """(T * B,) True where x_{i-1} differs from x_i."""
        same = (self.states[1:] == self.states[:-1]).flatten(2).all(-1)
        return ~same.flatten()

    def items(self, index: Tensor, unpack: Callable[[Tensor], Tensor], noise: Noise | None = None) -> Item:
        """The items numbered `index`, step-major: item k is step k // B of sample k % B.

        `noise`, (len(self),), holds one stream for each item of the batch.
        """
        whole = self.unit == "sample"
        k, b = index // self.states.shape[1], index % self.states.shape[1]
        columns = {name: column[b] for name, column in self.per_sample.items()}
        columns |= {name: column[k, b] for name, column in self.per_step.items()}
        return Item(
            x=unpack(self.states[k, b]),
            x_next=unpack(self.states[-1 if whole else k + 1, b]),
            i=self.steps - k,
            lookahead=None if self.lookahead is None else unpack(self.lookahead[k, b]),
            mean=None if self.mean is None else self.mean[k, b],
            final=unpack(self.states[-1, b]),
            cond=None if self.cond is None else self.cond[b],
            columns=columns,
            noise=None if noise is None else noise[index],
            keys=None if self.keys is None else self.keys[b],
            report=partial(self._report, b),
            note=self._note,
        )

    def _note(self, name: str, values: Tensor) -> None:
        self.notes.setdefault(name, []).append(values.detach())

    def _report(self, b: Tensor, x0: Tensor, reward: Tensor) -> None:
        self.states[-1, b] = x0.detach().to(self.states.dtype)
        self.reward[b] = reward.detach().to(self.reward.dtype)


class Searcher(Protocol):
    """E-step: finds trajectories.  `requires` names the capabilities it uses."""

    @property
    def requires(self) -> frozenset[str]: ...

    def __call__(self, ctx: Context, noise: Noise, cond: Tensor | None = None) -> Batch: ...


class Loss:
    """M-step: (b,) values for some items of a batch, whose mean is minimised.  Losses derive from this.

    What one item needs of the others (advantages, particle drifts, adjoints) is made in `prepare` as columns of
    the batch, so that the loss itself sees items one by one and micro-batches change nothing.
    """

    requires: frozenset[str] = frozenset()
    trains_policy = True
    """Whether each (sample, step) item differentiates one row of the policy, which costs as much."""

    def modules(self, ctx: Context) -> dict[str, nn.Module]:
        """Networks, buffers and counters of its own, at their start; saved with every checkpoint.

        Parameters that require a gradient are trained with the policy's, at `lr_scale` (an attribute of the
        module, 1 without it) times its learning rate.
        """
        return {}

    def prepare(self, ctx: Context, batch: Batch, noise: Noise) -> None:
        """Called once for each batch before it is fitted: adds columns, and counts to `batch.stats`."""

    def active(self, batch: Batch) -> Tensor:
        """(items,) False where the loss and its gradient are 0, so that the row need not be computed."""
        return torch.ones(len(batch), dtype=torch.bool, device=batch.states.device)

    def __call__(self, ctx: Context, item: Item) -> Tensor:
        raise NotImplementedError(type(self).__name__)

    def updated(self, ctx: Context) -> None:
        """Called after each optimiser step: lagged networks follow here."""


class Value(Protocol):
    """Look-ahead value V_i(x_i) ≈ α log E[exp(r(x_0) / α) | x_i], in units of the reward."""

    @property
    def uses_prediction(self) -> bool:
        """Whether it needs the network's prediction at x_i."""
        ...

    @property
    def by_state(self) -> bool:
        """Whether it is a function of state and prediction alone, not of index or noise: equal states share one."""
        ...

    @property
    def grad_by_state(self) -> bool:
        """The same of the gradient."""
        ...

    def __call__(self, ctx: Context, model: Model, x: Tensor, i: int, pred: Tensor | None, noise: Noise,
                 cond: Tensor | None = None) -> Tensor:  # fmt: skip
        """(B,) values of states x_i whose predictions are `pred`."""
        ...

    def grad(self, ctx: Context, model: Model, x: Tensor, i: int, noise: Noise,
             cond: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Gradient of each value in its own state, like x, and the predictions made on the way."""
        ...
