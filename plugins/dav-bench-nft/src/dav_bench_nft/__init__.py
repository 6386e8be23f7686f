"""DiffusionNFT (arXiv:2509.16117): learn from good and bad samples by denoising them, with no likelihood of a step.

A method as an outsider writes it: nothing but the public API of dav-bench, and no torch at import.
"""

from dataclasses import dataclass
from typing import Literal

from dav_bench import hookimpl
from dav_bench.core.method import Method, Training


@dataclass(frozen=True)
class NFT(Training):
    """Settings of DiffusionNFT; defaults are the paper's, but for rounds, samples and learning rate."""

    samples: int = 256
    """Samples drawn in each round, from the lagged model."""
    lr: float = 3e-4
    """AdamW learning rate (the paper's, for LoRA)."""
    beta: float = 1.0
    """How far the implicit positive model lies from the lagged one on the way to the trained one; the step that a
    round takes is 2 / beta times the covariance of quality and sample (paper: 1, and 0.1 for OCR)."""
    quality: Literal["advantage", "reward"] = "advantage"
    """Chance q that a sample counts as good: from its advantage among the samples of its prompt, or the reward itself
    where that is a number in [0, 1]."""
    reach: float = 5.0
    """Advantage, in standard deviations of the batch, at which q is 1 (and its negative, 0)."""
    pull: float = 1e-4
    """Weight of the squared distance of predictions to the pretrained model's."""
    weight: Literal["adaptive", "plain"] = "adaptive"
    """Squared errors over their own mean absolute error, as the paper trains, or as they stand, as it derives."""
    lag_rise: float = 1e-3
    """How much more of the lagged model is kept in each round."""
    lag_max: float = 0.5
    """Most of the lagged model that is kept."""

    def __post_init__(self):
        if self.beta <= 0 or self.reach <= 0:
            raise ValueError("beta and reach must be above 0")
        if not 0 <= self.lag_max < 1 or self.lag_rise < 0 or self.pull < 0:
            raise ValueError("lag_max lies in [0, 1); lag_rise and pull are at least 0")


def build(config):
    from dav_bench.core import Rollout

    from .loss import NegativeAware

    return Method(Rollout(on="old"), NegativeAware(config), Training.of(config))


@hookimpl
def register_methods(register):
    register("nft", build, config=NFT, requires=("sample", "step", "corrupt", "continuous", "reference if pull"),
             tunes=True, summary="denoise good samples and undo bad ones", paper="arXiv:2509.16117")  # fmt: skip
