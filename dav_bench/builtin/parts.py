"""Searchers and trainers as users set them: settings without torch, built into the science on use.

A method is a pair of these; `--searcher tree --trainer forward-kl` makes one without code.  Deviations of released
code from the paper are fields with the paper's choice as default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dav_bench.core import KRollout, Loss, PosteriorMean, Searcher


@dataclass(frozen=True)
class Rollout:
    """Samples of the model as it is."""


@dataclass(frozen=True)
class BestOf:
    """The best of several samples."""

    n: int = 4
    """Samples drawn for each one kept."""


@dataclass(frozen=True)
class Tree:
    """Children for each step of each sample, one picked by its look-ahead reward: DAV's E-step."""

    width: int = 4
    """Candidates per sample and denoising step."""
    alpha: float = 0.1
    """Temperature: lower searches harder."""
    gamma: float = 1.0
    """Discount on the look-ahead reward far from the data."""
    guide: bool = False
    """Tilt proposals by the reward gradient."""
    select: Literal["sample", "argmax"] = "sample"
    """Draw a child by its weight, or take the best."""
    anchor: Literal["policy", "ref"] = "policy"
    """Weigh children against the current model, or against the pretrained one."""
    on: Literal["policy", "ref"] = "policy"
    """Propose from the current model, or from the pretrained one (no hill climbing)."""
    lookahead: Literal["mode", "mean", "sample", "draws", "rollout"] = "mode"
    """What the reward sees of a noisy sequence: its likeliest tokens, their probabilities, one draw, or several clean
    draws or continuations whose rewards are averaged softly."""
    draws: int = 4
    """Clean draws or continuations of a state, for the last two."""
    relax: Literal["mean", "gumbel", "gumbel-release"] = "mean"
    """Guidance on tokens goes through probabilities, a Gumbel draw, or the release's draw (probabilities as logits)."""
    batch: Literal["sum", "mean"] = "sum"
    """Reduction of rewards before guidance is differentiated; the DNA release's mean scales it by 1/B."""
    reduce: Literal["sum", "mean"] = "sum"
    """Log-probabilities in weights: summed over dimensions, or averaged (image release)."""
    exponent: Literal["left-1", "left"] = "left-1"
    """Steps of discount: those left after this one, or with it (image release)."""
    advance: Literal["sampled", "tree-value"] = "sampled"
    """Move to the child drawn, or to the sibling of largest accumulated value (image release)."""
    last: Literal["sample", "greedy"] = "sample"
    """Draw the last step like the others, or take the best of twice as many (image release)."""


@dataclass(frozen=True)
class ForwardKL:
    """Maximum likelihood of what the search found, with an optional pull to the pretrained model: DAV's M-step."""

    kl: float = 0.0
    """Weight of KL(model || pretrained) for each step."""
    target: Literal["transition", "mean", "lookahead", "final"] = "transition"
    """Fit the step taken, the mean of the tilted step over all children (less noise), the winner's clean prediction
    (DNA release), or the final sequence."""
    weight: Literal["paper", "release", "uniform"] = "paper"
    """Weight of a step towards a clean target: the likelihood's, the DNA release's, or 1."""
    skip: int = 0
    """Steps left out of the fit: the first n (DNA release: 80 of 128), or with -n the last n."""
    kl_form: Literal["exact", "mse"] = "exact"
    """KL of the step laws, or squared error of noise predictions (image release)."""
    fit_reduce: Literal["sum", "mean"] = "sum"
    """Log-likelihood summed over dimensions, or averaged (release)."""
    time_input: Literal["zero", "sigma"] = "zero"
    """Time told to a network trained without one: none, or the real one in the fit alone (DNA release)."""


def rollout(c: Rollout) -> Searcher:
    from dav_bench.core import Rollout

    return Rollout()


def best_of(c: BestOf) -> Searcher:
    from dav_bench.core import BestOf

    return BestOf(c.n)


def value(
    lookahead: str, draws: int, alpha: float, relax: str = "mean", batch: str = "sum"
) -> PosteriorMean | KRollout:
    """The look-ahead value that settings of a search name; `alpha` is the temperature of a soft mean over draws."""
    from dav_bench.core import KRollout, PosteriorMean

    if lookahead in ("draws", "rollout"):
        return KRollout(draws, alpha, jump=lookahead == "draws")
    return PosteriorMean(lookahead, relax, batch)  # type: ignore[arg-type]


def tree(c: Tree, keep: Literal["", "lookahead", "mean"] = "") -> Searcher:
    from dav_bench.core import TreeSearch

    return TreeSearch(
        width=c.width,
        alpha=c.alpha,
        gamma=c.gamma,
        guide=c.guide,
        anchor=c.anchor,
        select=c.select,
        reduce=c.reduce,
        exponent=c.exponent,
        advance=c.advance,
        last=c.last,
        on=c.on,
        value=value(c.lookahead, c.draws, c.alpha, c.relax, c.batch),
        keep=keep,
    )


def forward_kl(c: ForwardKL) -> Loss:
    from dav_bench.core import MaximumLikelihood

    return MaximumLikelihood(
        kl=c.kl,
        target=c.target,
        weight=c.weight,
        skip=c.skip,
        kl_form=c.kl_form,
        reduce=c.fit_reduce,
        time_input=c.time_input,
    )
