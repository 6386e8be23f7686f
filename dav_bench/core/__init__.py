"""The science: step distributions, processes, search and fitting.  No files, no command line, no harness.

Names load on first use, so that settings such as `Training` can be read without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adjoint import AdjointMatching
    from .advantage import PerGroup, PerPrompt, Scaled
    from .fit import fit
    from .losses import MaximumLikelihood, ValueRegression
    from .meter import Meter
    from .method import Method, Training
    from .model import MeteredReward, Model
    from .noise import Noise
    from .particles import SMC, Guidance
    from .pathwise import Pathwise
    from .policy import PolicyGradient
    from .preference import KnownPairs, Pairs, Preference
    from .process import ConsistencyProcess, FlowProcess, GaussianProcess, MaskedProcess
    from .protocols import Batch, Context, Item, Loss, NonFinite, Reward, Searcher, Value
    from .resample import Interval, Potential, Tempering
    from .search import BestOf, RealSamples, Rollout, Seeds, TreeSearch
    from .stein import Stein
    from .steps import GaussianStep, MaskedStep, SingleRevealStep
    from .value import ExactValue, KRollout, Learned, PosteriorMean
    from .variance import LogVariance
    from .weighted import GainWeights, RewardWeights, WeightedLikelihood

_HOME = {
    "adjoint": ("AdjointMatching",),
    "advantage": ("PerGroup", "PerPrompt", "Scaled"),
    "fit": ("fit",),
    "losses": ("MaximumLikelihood", "ValueRegression"),
    "meter": ("Meter",),
    "method": ("Method", "Training"),
    "model": ("MeteredReward", "Model"),
    "noise": ("Noise",),
    "particles": ("SMC", "Guidance"),
    "pathwise": ("Pathwise",),
    "policy": ("PolicyGradient",),
    "preference": ("KnownPairs", "Pairs", "Preference"),
    "process": ("ConsistencyProcess", "FlowProcess", "GaussianProcess", "MaskedProcess"),
    "protocols": ("Batch", "Context", "Item", "Loss", "NonFinite", "Reward", "Searcher", "Value"),
    "resample": ("Interval", "Potential", "Tempering"),
    "search": ("BestOf", "RealSamples", "Rollout", "Seeds", "TreeSearch"),
    "stein": ("Stein",),
    "steps": ("GaussianStep", "MaskedStep", "SingleRevealStep"),
    "value": ("ExactValue", "KRollout", "Learned", "PosteriorMean"),
    "variance": ("LogVariance",),
    "weighted": ("GainWeights", "RewardWeights", "WeightedLikelihood"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "SMC",
    "AdjointMatching",
    "Batch",
    "BestOf",
    "ConsistencyProcess",
    "Context",
    "ExactValue",
    "FlowProcess",
    "GainWeights",
    "GaussianProcess",
    "GaussianStep",
    "Guidance",
    "Interval",
    "Item",
    "KRollout",
    "KnownPairs",
    "Learned",
    "LogVariance",
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
    "PerGroup",
    "PerPrompt",
    "PolicyGradient",
    "PosteriorMean",
    "Potential",
    "Preference",
    "RealSamples",
    "Reward",
    "RewardWeights",
    "Rollout",
    "Scaled",
    "Searcher",
    "Seeds",
    "SingleRevealStep",
    "Stein",
    "Tempering",
    "Training",
    "TreeSearch",
    "Value",
    "ValueRegression",
    "WeightedLikelihood",
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
