"""What a metric is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dav_bench.core.model import Model
from dav_bench.core.protocols import Reward

if TYPE_CHECKING:
    from dav_bench.tasks import TaskSpec

BASES = "ACGT"


@dataclass(frozen=True)
class Samples:
    """The samples that are measured."""

    x: Tensor
    """(n, L, V) one-hot, on the CPU; images are (n, 3, H, W) in [0, 1], vectors (n, d)."""
    cond: Tensor | None = None
    """(n,) number of each sample's prompt in `texts`."""
    texts: Sequence[str] = ()
    """The prompts of the run."""
    held: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What one metric computed of these samples and others use too."""

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def prompts(self) -> list[str] | None:
        """The prompt of each sample; None where there are none."""
        return None if self.cond is None else [self.texts[k] for k in self.cond.tolist()]

    @cached_property
    def ids(self) -> Tensor:
        """(n, L) token numbers, A C G T = 0 1 2 3."""
        return self.x.argmax(-1)

    @cached_property
    def sequences(self) -> list[str] | None:
        """The samples as text; None where they are no sequences of A C G T."""
        if self.x.ndim != 3 or self.x.shape[-1] != len(BASES):
            return None
        letters = np.frombuffer(BASES.encode(), np.uint8)[self.ids.numpy()]
        return [row.tobytes().decode() for row in letters]


@dataclass(frozen=True)
class MetricContext:
    """What a metric may use besides the samples."""

    task: TaskSpec
    """The task, with its folder."""
    pretrained: Callable[[], Model]
    """Gives the pretrained model; called only by metrics that need it."""
    rewards: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Values per sample, by role, computed before the metrics."""
    seed: int = 0
    """Of the evaluation: the same for every method, so that comparisons are paired."""
    device: str | torch.device = "cpu"
    """Where networks run."""
    reward: Reward | None = None
    """The training reward, not metered."""
    policy: Callable[[], Model] | None = None
    """Gives the model whose plain samples are measured; None where a search drew them."""

    def asset(self, path: str) -> Path:
        """A file of the task's folder."""
        return self.task.asset(path)

    def reference(self) -> Model:
        """The pretrained model, frozen."""
        return self.pretrained()
