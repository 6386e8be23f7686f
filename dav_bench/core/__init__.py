"""The science: step distributions, processes, search and fitting.  No files, no command line, no harness."""

from .fit import fit
from .losses import MaximumLikelihood
from .meter import Meter
from .method import Method, Training
from .model import MeteredReward, Model
from .noise import Noise
from .process import GaussianProcess, MaskedProcess
from .protocols import Batch, Context, Item, Loss, NonFinite, Reward, Searcher, Value
from .search import BestOf, RealSamples, Rollout, TreeSearch
from .steps import GaussianStep, MaskedStep, SingleRevealStep
from .value import ExactValue, PosteriorMean

__all__ = [
    "Batch",
    "BestOf",
    "Context",
    "ExactValue",
    "GaussianProcess",
    "GaussianStep",
    "Item",
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
    "PosteriorMean",
    "RealSamples",
    "Reward",
    "Rollout",
    "Searcher",
    "SingleRevealStep",
    "TreeSearch",
    "Training",
    "Value",
    "fit",
]
