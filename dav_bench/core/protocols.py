"""What the parts of a method are to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

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
    """"sequence" or "image"."""
    provides: frozenset[str]
    """Contains "reward.grad" if differentiable in the sample."""

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


@dataclass
class Item:
    """Some (sample, step) pairs of a batch, in any mix: the unit a step loss is micro-batched over."""

    x: Tensor
    """(b, ...) states x_i."""
    x_next: Tensor
    """(b, ...) states x_{i-1} that the search moved to."""
    i: Tensor
    """(b,) grid index."""
    lookahead: Tensor | None
    """(b, ...) clean prediction from x_{i-1}, where the search made one."""
    mean: Tensor | None
    """(b, ...) estimate of E[x_{i-1} | x_i] under the tilted step, where the search kept it."""
    final: Tensor
    """(b, ...) the state x_0 the trajectory ended in."""
    cond: Tensor | None = None


@dataclass
class Batch:
    """Trajectories that a search found."""

    states: Tensor
    """(T + 1, B, ...) packed states, x_T first; (1, B, ...) for a search that keeps only x_0."""
    reward: Tensor
    """(B,) training reward of x_0."""
    lookahead: Tensor | None = None
    """(T, B, ...) packed clean predictions from each chosen x_{i-1}."""
    mean: Tensor | None = None
    """(T, B, ...) estimates of E[x_{i-1} | x_i] under the tilted steps."""
    cond: Tensor | None = None
    stats: dict[str, float] = field(default_factory=dict)
    """What the search noticed: mean effective share of candidates, ..."""

    @property
    def steps(self) -> int:
        return len(self.states) - 1

    def __len__(self) -> int:
        """Number of (sample, step) items."""
        return self.steps * self.states.shape[1]

    def moved(self) -> Tensor:
        """(T * B,) True where x_{i-1} differs from x_i."""
        same = (self.states[1:] == self.states[:-1]).flatten(2).all(-1)
        return ~same.flatten()

    def items(self, index: Tensor, unpack: Callable[[Tensor], Tensor]) -> Item:
        """The items numbered `index`, step-major: item k is step k // B of sample k % B."""
        k, b = index // self.states.shape[1], index % self.states.shape[1]
        return Item(
            x=unpack(self.states[k, b]),
            x_next=unpack(self.states[k + 1, b]),
            i=self.steps - k,
            lookahead=None if self.lookahead is None else unpack(self.lookahead[k, b]),
            mean=None if self.mean is None else self.mean[k, b],
            final=unpack(self.states[-1, b]),
            cond=None if self.cond is None else self.cond[b],
        )


class Searcher(Protocol):
    """E-step: finds trajectories.  `requires` names the capabilities it uses."""

    @property
    def requires(self) -> frozenset[str]: ...

    def __call__(self, ctx: Context, noise: Noise, cond: Tensor | None = None) -> Batch: ...


class Loss(Protocol):
    """M-step: (b,) values for some items of a batch, whose mean is minimised."""

    @property
    def requires(self) -> frozenset[str]: ...

    def active(self, batch: Batch) -> Tensor:
        """(items,) False where the loss and its gradient are 0, so that the row need not be computed."""
        ...

    def __call__(self, ctx: Context, item: Item) -> Tensor: ...


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
