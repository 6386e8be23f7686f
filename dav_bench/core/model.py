"""A model is a network, a process and a codec; algorithms see its step distribution and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .meter import Meter
from .noise import Noise
from .process import Process
from .protocols import NonFinite, Reward
from .steps import Step

STEP = frozenset({"sample", "step", "step.rsample", "corrupt", "reference"})


def chunks(n: int, size: int | None) -> Iterator[slice]:
    """Slices of at most `size` rows (None: one slice) that bound the memory of a call."""
    size = size or max(n, 1)
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


class Model:
    """Network + process + codec.

    `network(x, t[, cond])` predicts from states x (B, ...) at times t (B,).  With `network.time_input` False the
    prediction depends on the state alone, so equal states share one row.  A network that computes several rows for
    each state says so as `network.rows` (classifier-free guidance: 2), one whose pretrained self is itself without
    its adapters gives that as `network.reference()`.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        domain: str,
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        data: Callable[[str], Tensor] | None = None,
        name: str = "model",
    ) -> None:
        self.network, self.process, self.domain, self.name = network, process, domain, name
        self.data = data
        """data(split) -> real samples in the form of `decode`; None where the task has none."""
        self._decode = decode
        self.meter, self.micro_batch = Meter(), None  # type: tuple[Meter, int | None]
        self.autocast: torch.dtype | None = None
        self._reference: Model | None = None

    # ---- where and how it runs
    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of states; under autocast these stay float32."""
        return next((p.dtype for p in self.network.parameters()), torch.float32)

    @property
    def shares(self) -> bool:
        """Whether equal states have equal predictions, so that they are computed once."""
        return self.process.kind == "masked" and not getattr(self.network, "time_input", True)

    @property
    def provides(self) -> frozenset[str]:
        """What a chain gives, and what its process adds."""
        return STEP | getattr(self.process, "provides", frozenset())

    @property
    def rows(self) -> int:
        """Rows that the network computes for each state, what it is counted as."""
        return int(getattr(self.network, "rows", 1))

    def count(self, what: str, states: int) -> None:
        """Counts network rows, forward, backward or shared, of so many states."""
        self.meter.count(what, states * self.rows)

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Model:
        """bfloat16 means autocast: weights and states stay float32."""
        self.autocast = dtype if dtype in (torch.bfloat16, torch.float16) else None
        self.network.to(device=device, dtype=torch.float32 if self.autocast else dtype)
        return self

    def attach(self, meter: Meter, micro_batch: int | None = None) -> Model:
        """Counts on `meter`, in network calls of at most `micro_batch` rows, but of one state at least."""
        self.meter = meter
        self.micro_batch = None if micro_batch is None else max(1, micro_batch // self.rows)
        return self

    # ---- the step distribution
    def predict(self, x: Tensor, i: int | Tensor, cond: Tensor | None = None) -> Tensor:
        """The network's prediction for each row of x."""
        if not len(x):
            raise ValueError("predict needs at least one row")
        t = self.process.time(i, x)
        cast = torch.autocast(x.device.type, self.autocast) if self.autocast else nullcontext()
        with cast:
            parts = [
                self.network(x[c], t[c]) if cond is None else self.network(x[c], t[c], cond[c])
                for c in chunks(len(x), self.micro_batch)
            ]
        self.count("forward", len(x))
        return torch.cat(parts).to(x.dtype)

    def step(self, x: Tensor, i: int | Tensor, cond: Tensor | None = None) -> Step:
        """p(x_{i-1} | x_i)."""
        return self.process.step(self.predict(x, i, cond), x, i)

    def decode(self, x0: Tensor) -> Tensor:
        """What rewards and metrics are shown: (B, L, V) one-hot sequences, (B, 3, H, W) images in [0, 1]."""
        return x0 if self._decode is None else self._decode(x0)

    def encode(self, texts: Sequence[str]) -> None:
        """Told once which prompts conditions number, by models that read text."""
        raise NotImplementedError(f"{self.name} reads no text")

    def unpack(self, packed: Tensor) -> Tensor:
        """Stored states as the network reads them, in its dtype."""
        return self.process.unpack(packed).to(self.dtype)

    # ---- training
    def reference(self) -> Model:
        """The pretrained model: the network without its adapters where it has some, else a frozen copy, which is
        taken on the first call, before any training."""
        if self._reference is None:
            twin = copy.copy(self)
            view = getattr(self.network, "reference", lambda: None)()
            twin.network = view or copy.deepcopy(self.network).requires_grad_(False).eval()
            twin._reference = twin
            self._reference = twin
        self._reference.meter, self._reference.micro_batch = self.meter, self.micro_batch
        self._reference.autocast = self.autocast
        return self._reference

    def with_network(self, network: nn.Module) -> Model:
        """This model with another network of the same kind, which shares its meter."""
        twin = copy.copy(self)
        twin.network = network
        return twin

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}


def distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Groups equal rows of integers (N, L): first row of each group (U,), and the group of each row (N,).

    Rows meet by a 64-bit hash and are then compared, so a collision costs sharing, never correctness.
    """
    flat = ids.flatten(1).long()
    weights = Noise.of(0, flat.shape[1], device=ids.device).keys  # random: no small combination of them is 0
    _, group = (flat * weights).sum(1).unique(return_inverse=True)
    rows = torch.arange(len(flat), device=ids.device)
    first = torch.full((int(group.max()) + 1,), len(flat), device=ids.device).scatter_reduce(
        0, group, rows, "amin"
    )
    first, order = first.sort()  # groups in the order in which they appear
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))
    group = rank[group]
    if not torch.equal(flat[first[group]], flat):
        return rows, rows
    return first, group


@dataclass
class MeteredReward:
    """A reward that counts its rows, runs in chunks and refuses to hand on NaN."""

    reward: Reward
    meter: Meter
    micro_batch: int | None = None
    name: str = "reward"

    @property
    def domain(self) -> str:
        return getattr(self.reward, "domain", "")

    def __call__(self, sample: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B,) float32 or better; raises NonFinite when a value is NaN or infinite."""
        parts = [
            self.reward(sample[c], None if cond is None else cond[c])
            for c in chunks(len(sample), self.micro_batch)
        ]
        value = torch.cat(parts) if len(parts) > 1 else parts[0]
        self.meter.count("reward", len(sample))
        if value.shape != (len(sample),):
            raise ValueError(
                f"reward '{self.name}' returned shape {tuple(value.shape)} for {len(sample)} samples"
            )
        bad = int((~value.isfinite()).sum())
        if bad:
            raise NonFinite(f"reward '{self.name}'", bad, len(sample))
        return value if value.dtype == torch.float64 else value.float()

    def features(self, sample: Tensor) -> Tensor:
        """(B, F) what a reward that `provides` "reward.features" looks at; counts as rows of the reward."""
        parts = [self.reward.features(sample[c]) for c in chunks(len(sample), self.micro_batch)]  # type: ignore[attr-defined]
        self.meter.count("reward", len(sample))
        return torch.cat(parts)

    def head(self, features: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B,) the reward of features, whose cost is not counted."""
        value = self.reward.head(features, cond)  # type: ignore[attr-defined]
        if not value.isfinite().all():
            raise NonFinite(f"reward '{self.name}'", int((~value.isfinite()).sum()), len(value))
        return value
