"""The science: step distributions, processes, search and fitting.  No files, no command line, no harness.

Names load on first use, so that settings such as `Training` can be read without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fit import fit
    from .losses import MaximumLikelihood
    from .meter import Meter
    from .method import Method, Training
    from .model import MeteredReward, Model
    from .noise import Noise
    from .particles import SMC, Guidance
    from .pathwise import Pathwise
    from .preference import KnownPairs, Pairs, Preference
    from .process import GaussianProcess, MaskedProcess
    from .protocols import Batch, Context, Item, Loss, NonFinite, Reward, Searcher, Value
    from .resample import Interval, Potential, Tempering
    from .search import BestOf, RealSamples, Rollout, Seeds, TreeSearch
    from .steps import GaussianStep, MaskedStep, SingleRevealStep
    from .value import ExactValue, KRollout, Learned, PosteriorMean

_HOME = {
    "fit": ("fit",),
    "losses": ("MaximumLikelihood",),
    "meter": ("Meter",),
    "method": ("Method", "Training"),
    "model": ("MeteredReward", "Model"),
    "noise": ("Noise",),
    "particles": ("SMC", "Guidance"),
    "pathwise": ("Pathwise",),
    "preference": ("KnownPairs", "Pairs", "Preference"),
    "process": ("GaussianProcess", "MaskedProcess"),
    "protocols": ("Batch", "Context", "Item", "Loss", "NonFinite", "Reward", "Searcher", "Value"),
    "resample": ("Interval", "Potential", "Tempering"),
    "search": ("BestOf", "RealSamples", "Rollout", "Seeds", "TreeSearch"),
    "steps": ("GaussianStep", "MaskedStep", "SingleRevealStep"),
    "value": ("ExactValue", "KRollout", "Learned", "PosteriorMean"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "SMC",
    "Batch",
    "BestOf",
    "Context",
    "ExactValue",
    "GaussianProcess",
    "GaussianStep",
    "Guidance",
    "Interval",
    "Item",
    "KRollout",
    "KnownPairs",
    "Learned",
    "Loss",
    "MaskedProcess",
    "MaskedStep",
    "MaximumLikelihood",
    "Meter",
    "MeteredReward",
    "Method",
    "Model",
    "Noise",
    "NonFinite",
    "Pairs",
    "Pathwise",
    "PosteriorMean",
    "Potential",
    "Preference",
    "RealSamples",
    "Reward",
    "Rollout",
    "Searcher",
    "Seeds",
    "SingleRevealStep",
    "Tempering",
    "Training",
    "TreeSearch",
    "Value",
    "fit",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'dav_bench.core' has no attribute {name!r}")
    value = getattr(import_module(f"dav_bench.core.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
