"""Watching a run from outside: which rows it computes, and which capabilities it uses without having said so.

The objects stay what they are; their classes get subclasses whose methods look before they do as before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dav_bench import build
from dav_bench.core import Model
from dav_bench.core.steps import GaussianStep, MaskedStep

PHASES = ("search", "fit", "sample")
"""Phases of a run in which the code of methods, searchers and trainers runs."""

GATED = {
    "log_prob": "step.log_prob",
    "expected_log_prob": "step.log_prob",
    "rsample": "step.rsample",
    "tilt": "step.tilt",
    "kl": "step.kl",
}
"""Methods of a step distribution, and the capability that each takes."""

SEEN = (*sorted(set(GATED.values())), "corrupt", "data", "reference", "reward.features", "reward.grad")
"""Capabilities whose use is seen. The others (`continuous`, `tokens`, `step.memoryless`) are promises about the
model that leave no trace in a call, and every model has `sample` and `step`."""

_TWIN = "WatchedReference"

_FREE = ("sample", "clean", "take", "mean", "mode", "x0")


class Undeclared(RuntimeError):
    """A capability was used that the component does not declare."""

    def __init__(self, capability: str, by: str) -> None:
        super().__init__(f"{by} needs {capability!r}, which is not declared")
        self.capability = capability


@dataclass
class Watch:
    """Counts the rows of one run and guards its capabilities."""

    allowed: Mapping[str, frozenset[str]] | None = None
    """Capabilities by phase of the meter; None allows all."""
    seen: Counter[str] = field(default_factory=Counter)
    """Rows by name of the meter's counts: forward, backward, reward, reward_backward."""
    undeclared: list[str] = field(default_factory=list)
    """Capabilities that were used without being declared."""
    used: set[str] = field(default_factory=set)
    """All capabilities whose use was seen."""
    _inside: int = 0
    _meter: Callable[[], Any] | None = None

    # ---- the two factories of a run

    @contextmanager
    def installed(self) -> Iterator[Watch]:
        """Runs that begin in here are watched."""
        model, reward = build.build_model, build.build_reward

        def watched_reward(spec: Any, role: str) -> Any:
            made = reward(spec, role)
            return self.reward(made) if role == "train" else made

        build.build_model = lambda *args: self.model(model(*args))
        build.build_reward = watched_reward
        try:
            yield self
        finally:
            build.build_model, build.build_reward = model, reward

    def model(self, model: Model) -> Model:
        """The model with counted rows, and guarded steps, noise, data and reference."""
        self._meter = lambda: model.meter
        watch = self

        def count(network: Any, args: tuple[Any, ...], output: Any) -> None:  # no method: copies share it
            if watch.phase in PHASES:
                watch.count("forward", args[0] if args else output, output)

        model.network.register_forward_hook(count)
        _recast(model.process, self._process(type(model.process)))
        if model.data is not None:
            model.data = self._gate(model.data, "data", "model.data")  # type: ignore[method-assign]
        kind = type(model)

        def reference(self: Any) -> Model:  # taken by the run, once the model has its device and precision
            twin = kind.reference(self)
            if type(twin).__name__ != _TWIN:
                predict = watch._gate(kind.predict, "reference", "a prediction of the pretrained model")
                _recast(twin, type(_TWIN, (kind,), {"predict": predict}))
            return twin

        _recast(model, type(kind.__name__, (kind,), {"reference": reference}))
        return model

    def reward(self, reward: Any) -> Any:
        """The reward with counted rows, and guarded gradient and features."""
        if not hasattr(reward, "__dict__"):  # a plain function
            return reward
        if type(reward).__name__ == "function":
            return _Function(reward, self)
        kind, watch = type(reward), self

        def call(self: Any, *args: Any, **options: Any) -> Tensor:
            watch._inside += 1  # it may read its own features
            try:
                value = kind.__call__(self, *args, **options)
            finally:
                watch._inside -= 1
            return watch._value(value, args[0])

        own: dict[str, Any] = {"__call__": call}
        for name in ("features", "head"):
            if hasattr(kind, name):
                own[name] = self._gate(getattr(kind, name), "reward.features", f"reward.{name}")
        _recast(reward, type(kind.__name__, (kind,), own))
        return reward

    def _value(self, value: Tensor, sample: Tensor) -> Tensor:
        if self.phase not in PHASES:
            return value
        self.seen["reward"] += len(sample)
        if value.requires_grad and sample.requires_grad:

            def passed(grad: Tensor) -> None:
                self.check("reward.grad", "the gradient of the reward")
                self.seen["reward_backward"] += len(sample)

            value.register_hook(passed)
        return value

    # ---- bookkeeping

    @property
    def phase(self) -> str:
        meter = self._meter() if self._meter else None
        return "" if meter is None else str(meter._phase)

    def check(self, capability: str, by: str) -> None:
        """Raises Undeclared where the running component does not declare `capability`."""
        if self._inside or self.phase not in PHASES:
            return
        self.used.add(capability)
        if self.allowed is not None and capability not in self.allowed.get(self.phase, frozenset()):
            self.undeclared.append(f"{capability} ({by}, in {self.phase})")
            raise Undeclared(capability, by)

    def count(self, what: str, x: Any, output: Any) -> None:
        rows = len(x)
        self.seen[what] += rows
        if isinstance(output, Tensor) and output.requires_grad:

            def passed(grad: Tensor) -> None:
                self.seen["backward"] += rows

            output.register_hook(passed)

    def _gate(self, original: Callable[..., Any], capability: str | None, by: str) -> Any:
        watch = self

        def call(*args: Any, **options: Any) -> Any:
            if capability is not None:
                watch.check(capability, by)
            watch._inside += 1  # what a permitted call does inside is its own affair
            try:
                return watch._step(original(*args, **options))
            finally:
                watch._inside -= 1

        return call

    def _process(self, kind: type) -> type:
        watch = self

        def step(self: Any, *args: Any, **options: Any) -> Any:
            return watch._step(kind.step(self, *args, **options))  # type: ignore[attr-defined]

        corrupt = self._gate(kind.corrupt, "corrupt", "process.corrupt")  # type: ignore[attr-defined]
        return type(kind.__name__, (kind,), {"step": step, "corrupt": corrupt})

    def _step(self, value: Any) -> Any:
        """A step distribution that looks before it answers; anything else as it is."""
        kind = type(value)
        if not isinstance(value, GaussianStep | MaskedStep) or getattr(kind, "_watched", None) is self:
            return value
        own: dict[str, Any] = {"_watched": self}
        for name in (*GATED, *_FREE):
            found = getattr(kind, name, None)
            if callable(found):
                own[name] = self._gate(found, GATED.get(name), f"step.{name}")
        _recast(value, type(kind.__name__, (kind,), own))
        return value


class _Function:
    """A reward that is a plain function."""

    def __init__(self, function: Callable[..., Tensor], watch: Watch) -> None:
        self.function, self.watch = function, watch

    def __call__(self, sample: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.watch._value(self.function(sample, cond), sample)


def _recast(value: Any, kind: type) -> None:
    object.__setattr__(value, "__class__", kind)  # a frozen dataclass refuses plain assignment
