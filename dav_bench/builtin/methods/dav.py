"""DAV: diffusion alignment as variational expectation-maximisation (arXiv 2510.00502)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dav_bench.builtin import parts
from dav_bench.core.method import Method, Training

_IMAGE_RELEASE = {
    "exponent": "left",
    "reduce": "mean",
    "fit_reduce": "mean",
    "kl": 0.01,
    "kl_form": "mse",
    "advance": "tree-value",
    "last": "greedy",
}
_DNA_RELEASE = {
    "batch": "mean",
    "relax": "gumbel-release",
    "target": "lookahead",
    "weight": "release",
    "fit_reduce": "mean",
    "time_input": "sigma",
    "skip": 80,
    "subset": 0.25,
}


@dataclass(frozen=True)
class DAV(Training, parts.ForwardKL, parts.Tree):
    """E-step: tree search from the current model. M-step: maximum likelihood of the trajectories found."""

    width: int = 4
    """Candidates per sample and denoising step."""
    alpha: float = 0.005
    """Temperature: lower searches harder."""
    gamma: float = 0.9
    """Discount on the look-ahead reward far from the data."""
    guide: bool = True
    """Tilt proposals by the reward gradient."""
    compat: Literal["paper", "release"] = "paper"
    """`release` selects all deviations of the released code for the domain of the task (docs/methods/dav.md)."""

    COMPAT: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "release": {"image": _IMAGE_RELEASE, "sequence": _DNA_RELEASE}
    }


@dataclass(frozen=True)
class DAVKL(DAV):
    """DAV with a pull to the pretrained model, as the released image scripts run it."""

    kl: float = 0.01
    """Weight of KL(model || pretrained) for each step."""


def build(c: DAV) -> Method:
    keep: Any = c.target if c.target in ("lookahead", "mean") else ""
    return Method(parts.tree(c, keep), parts.forward_kl(c), Training.of(c))
