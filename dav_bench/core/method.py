"""A method is a pair: a search that finds trajectories and a loss that fits them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .protocols import Loss, Searcher


@dataclass(frozen=True)
class Training:
    """How a method alternates and fits; every training method takes these settings."""

    rounds: int = 10
    """EM rounds: one search and one fit each."""
    samples: int = 64
    """Trajectories searched in each round; they are used once and dropped (no replay)."""
    updates: int = 1
    """Passes over a round's items."""
    minibatch: int = 256
    """(sample, step) items of one optimiser step."""
    lr: float = 1e-4
    """AdamW learning rate."""
    schedule: Literal["constant", "linear"] = "constant"
    """Learning rate over the rounds: constant, or falling to 0, which leaves less noise in the last weights."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moments."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    subset: float = 1.0
    """Share of a round's trajectories that are fitted (release, DNA: a quarter)."""
    stop_reward: float | None = None
    """End after the round whose search reaches this median training reward (never the held-out one)."""

    @classmethod
    def of(cls, config: Training) -> Training:
        """The schedule in the settings of a method."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(Training)})


@dataclass(frozen=True)
class Method:
    """Search without a loss is a test-time method: it samples by searching."""

    search: Searcher
    loss: Loss | None = None
    training: Training | None = None
    sampler: Searcher | None = None
    """Draws the final samples where training leaves the policy as it was (a learned value); None: the tuned model."""

    @property
    def requires(self) -> frozenset[str]:
        return self.search.requires | (self.loss.requires if self.loss else frozenset())
