"""A run is a value: what is run, in full, and the identity that names its directory."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from dav_bench.errors import near, problems

IDENTITY_VERSION = 1
"""Bumped when the canonical form below changes; hashes of every version shipped are pinned by tests."""


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides the numbers of a run, as plain values.

    Not in it: device, dtype, threads, micro-batch, paths, trackers, package versions. They are
    recorded beside the run.
    """

    task: str
    """Name of the task."""
    task_version: int
    """Version its file states."""
    task_hash: str
    """Hash of what the task measures: models, rewards, metrics and assets."""
    method: str
    """Name of the method, or `searcher_trainer` for a pair made on the command line."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """All its settings, defaults included."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """`use` and the settings of the generator."""
    sampler: Mapping[str, Any] = field(default_factory=dict)
    """`steps` and whatever else the task's process takes."""
    rewards: Mapping[str, Any] = field(default_factory=dict)
    """Role (train, heldout) to `use` and settings."""
    prompts: Mapping[str, Any] = field(default_factory=dict)
    """`train` and `eval`, the texts themselves, and `repeat`; empty for models that read no text."""
    eval: Mapping[str, Any] = field(default_factory=dict)
    """`samples`, `seed` and `every`: the same for all methods."""
    budget: Mapping[str, Any] = field(default_factory=dict)
    """`unit`, and `train` where training is limited."""
    search: Mapping[str, Any] | None = None
    """Test-time search on the tuned model: `name` and `params`; None draws from the model."""
    heldout: bool = True
    """The held-out reward is read; tuning runs do not."""
    seed: int = 0
    """Training seed."""

    def __post_init__(self) -> None:
        for name in ("params", "model", "sampler", "rewards", "prompts", "eval", "budget", "search"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, plain(value))

    @property
    def label(self) -> str:
        """Name of the row: the method, with `+search` for test-time search on the tuned model."""
        name = f"{self.method}+{self.search['name']}" if self.search else self.method
        return name.replace("/", "~")

    @property
    def identity(self) -> str:
        """sha256 of the canonical form, in hex."""
        return _digest(self.canonical())

    @property
    def run_id(self) -> str:
        """First 8 hex digits of the identity without the seed: seeds of one setting share it."""
        return _digest({k: v for k, v in self.canonical().items() if k != "seed"})[:8]

    @property
    def dirname(self) -> str:
        """Run directory below the results: `runs/<task>/<label>/<id>-s<seed>`."""
        return f"runs/{self.task}/{self.label}/{self.run_id}-s{self.seed}"

    @property
    def reproducible(self) -> bool:
        """False where the clock decides how long it trains."""
        return self.budget.get("unit") != "seconds" or "train" not in self.budget

    def base(self) -> RunSpec:
        """The same spec without test-time search: the training run it builds on."""
        return replace(self, search=None)

    def canonical(self) -> dict[str, Any]:
        """What is hashed: all fields, with files of rewards and pairs by content rather than path."""
        out = self.to_dict()
        for held in (*out["rewards"].values(), out["params"]):
            for key in ("use", "pairs"):
                if held.get("sha256") and key in held:
                    held[key] = held[key].replace("\\", "/").rsplit("/", 1)[-1]
        return {"identity": IDENTITY_VERSION, **out}

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field, without an absent search or prompts."""
        out = {f.name: plain(getattr(self, f.name)) for f in fields(self)}
        absent = {name for name in ("search", "prompts") if not getattr(self, name)}
        return {k: v for k, v in out.items() if k not in absent}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunSpec:
        """Inverse of `to_dict`; unknown and missing keys are reported together."""
        known = {f.name for f in fields(cls)}
        found = [f"unknown key {k!r}{near(k, known)}" for k in values if k not in known]
        found += [
            f"missing key {k!r}" for k in ("task", "task_version", "task_hash", "method") if k not in values
        ]
        if found:
            raise problems("this run specification cannot be read.", found)
        return cls(**values)

    def to_toml(self) -> str:
        """As the text of `spec.toml`."""
        import tomli_w

        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, text: str) -> RunSpec:
        """From the text of `spec.toml`."""
        return cls.from_dict(tomllib.loads(text))


def plain(value: Any) -> Any:
    """Reduce to what TOML and JSON both hold: tables, lists, text, numbers; None becomes "none"."""
    from dataclasses import is_dataclass

    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} cannot be part of a run specification")


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
