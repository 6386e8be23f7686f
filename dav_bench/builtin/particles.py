"""Searches by interacting particles, and guidance by none: settings without torch, built into the science on use.

All are settings of one loop (`core.SMC`).  Each is a method on the pretrained model and a searcher for a tuned one.
Fields share their names with other searchers where they mean the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dav_bench.builtin.parts import value

if TYPE_CHECKING:
    from dav_bench.core import Searcher
    from dav_bench.core.protocols import Value


@dataclass(frozen=True)
class Particles:
    """What all searches by particles share."""

    particles: int = 8
    """Particles for each sample."""
    alpha: float = 0.1
    """Temperature: lower searches harder."""
    ess: float = 0.5
    """Resample where the effective share of particles falls below this; 1 resamples at every weighed step."""
    resampler: Literal["multinomial", "systematic", "stratified", "ssp"] = "systematic"
    """How children are dealt out; all but multinomial keep within one of the expected numbers or close to it."""
    output: Literal["draw", "heaviest", "best", "survivor", "survivor-if-due", "all"] = "draw"
    """Return a particle drawn by weight, that of the largest weight, that of the largest reward, that of the largest
    reward among the children of one more resampling (made in any case, or if less than half of the particles are
    effective), or (for as many samples as particles) all of these children."""
    lookahead: Literal["mode", "mean", "sample", "draws", "rollout"] = "mode"
    """What the reward sees of a noisy sample: its likeliest tokens, their probabilities, one draw, or several clean
    draws or continuations whose rewards are averaged softly."""
    draws: int = 4
    """Clean draws or continuations of a state, for the last two."""
    on: Literal["policy", "ref"] = "policy"
    """Propose from the current model, or from the pretrained one."""
    anchor: Literal["policy", "ref"] = "policy"
    """Aim at a tilt of the current model, or of the pretrained one with the current model as a proposal."""


@dataclass(frozen=True)
class SMC(Particles):
    """Bootstrap particle filter: steps of the model, weighed by the gain in look-ahead reward."""

    tempering: Literal["none", "exp", "discount", "adaptive"] = "none"
    """Share of the look-ahead reward that counts: all, (1 + ramp)^step − 1, ramp^(steps left), or as much as leaves
    half of the particles effective."""
    ramp: float | None = None
    """Rate of `exp`, which by default reaches 1 after 87 % of the steps, or of `discount`."""


@dataclass(frozen=True)
class TDS(SMC):
    """Twisted diffusion sampler: steps tilted by the gradient of the look-ahead reward, with exact weights."""

    lookahead: Literal["mode", "mean", "sample", "draws", "rollout"] = "mean"
    """What the reward sees of a noisy sample; the probabilities are what the gradient is taken of."""
    tilt: Literal["full", "letters"] = "full"
    """Tilt what is revealed and as which letter (paper), or letters alone."""
    relax: Literal["mean", "gumbel", "gumbel-release"] = "mean"
    """Gradient on tokens goes through probabilities, a Gumbel draw, or a released one (probabilities as logits)."""
    strength: float = 1.0
    """Factor on the tilt; weights make up for any."""


@dataclass(frozen=True)
class DAS(TDS):
    """Tempered twisted particles (krafton-ai/DAS, config/sd.py)."""

    particles: int = 4
    """Particles for each sample."""
    alpha: float = 0.005
    """Temperature: lower searches harder (paper: 0.005 for aesthetics, 0.01 for CLIP, 0.0001 for PickScore)."""
    resampler: Literal["multinomial", "systematic", "stratified", "ssp"] = "ssp"
    """How children are dealt out."""
    tempering: Literal["none", "exp", "discount", "adaptive"] = "exp"
    """Share of the look-ahead reward that counts; `adaptive` bisects the effective share of particles."""
    carry: Literal["all", "state"] = "all"
    """A resampled particle takes all along, or leaves its gradient and last look-ahead reward to others (release)."""
    compat: Literal["paper", "release"] = "paper"
    """`release` selects all deviations of the released code (docs/methods/search.md)."""

    COMPAT: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "release": {
            kind: {"output": "heaviest", "carry": "state"} for kind in ("image", "vector", "sequence")
        }
    }


_FK_RELEASE = {
    "terminal": "release",
    "floor": 0.0,
    "clamp": 1e10,
    "skipped": "drop",
    "order": "propose-first",
}


@dataclass(frozen=True)
class FK(Particles):
    """Feynman-Kac steering: potentials of the look-ahead reward at some steps, black-box rewards."""

    particles: int = 4
    """Particles for each sample."""
    alpha: float = 0.1
    """Temperature, 1 / λ of the paper."""
    ess: float = 1.0
    """Resample where the effective share of particles falls below this; 1 resamples at every weighed step."""
    resampler: Literal["multinomial", "systematic", "stratified", "ssp"] = "multinomial"
    """How children are dealt out."""
    output: Literal["draw", "heaviest", "best", "survivor", "survivor-if-due", "all"] = "best"
    """Return the particle of the largest reward (paper), or as for the other searches."""
    potential: Literal["diff", "max", "add", "rt"] = "max"
    """Weigh by the gain in look-ahead reward, the largest so far, the sum so far, or the present one."""
    start: float = 0.2
    """Share of the steps done at the first weighing."""
    end: float = 0.8
    """Share of the steps done after which only x_0 is weighed."""
    every: float = 0.2
    """Share of the steps between weighings; 0 weighs at every step."""
    soften: float | None = None
    """Temperature of the soft mean over draws; none is alpha (text release: 1)."""
    terminal: Literal["exact", "release"] = "exact"
    """Last potential of max and add: what makes the product exp(r / α), or the release's, which aims elsewhere."""
    floor: float | None = None
    """Value from which the running maximum starts (release: 0)."""
    clamp: float | None = None
    """Largest potential (release: 1e10)."""
    skipped: Literal["keep", "drop"] = "keep"
    """Weights where nothing is resampled: kept, or forgotten (release)."""
    order: Literal["resample-first", "propose-first"] = "resample-first"
    """Resample before a step, or weigh where a step led by the look-ahead of where it started (release)."""
    compat: Literal["paper", "release"] = "paper"
    """`release` selects all deviations of the released code (docs/methods/search.md)."""

    COMPAT: ClassVar[dict[str, dict[str, dict[str, Any]]]] = {
        "release": {
            "image": {**_FK_RELEASE, "output": "survivor-if-due"},
            "vector": {**_FK_RELEASE, "output": "survivor-if-due"},
            "sequence": {**_FK_RELEASE, "output": "survivor", "lookahead": "draws", "soften": 1.0},
        }
    }


@dataclass(frozen=True)
class Guidance:
    """Steps tilted by the gradient of the look-ahead reward, one sample at a time, with no weights."""

    scale: float = 10.0
    """Factor on the gradient; 1 / α for a tilt exp(r / α)."""
    tilt: Literal["full", "letters"] = "full"
    """Tilt what is revealed and as which letter, or letters alone."""
    relax: Literal["mean", "gumbel", "gumbel-release"] = "mean"
    """Gradient on tokens goes through probabilities, a Gumbel draw, or a released one (probabilities as logits)."""
    on: Literal["policy", "ref"] = "policy"
    """Steps of the current model, or of the pretrained one."""


def _value(c: Particles, relax: str = "mean", soften: float | None = None) -> Value:
    return value(c.lookahead, c.draws, c.alpha if soften is None else soften, relax)


def _shared(c: Particles) -> dict[str, Any]:
    names = ("particles", "alpha", "ess", "resampler", "output", "on", "anchor")
    return {name: getattr(c, name) for name in names}


def smc(c: SMC, **choices: Any) -> Searcher:
    from dav_bench.core import SMC as Search
    from dav_bench.core import Tempering

    tempering = Tempering(c.tempering, c.ramp, c.ess if c.ess < 1 else 0.5)
    return Search(**{"value": _value(c), "tempering": tempering, **_shared(c), **choices})


def tds(c: TDS, **choices: Any) -> Searcher:
    value = _value(c, c.relax)
    return smc(c, guide=True, rate=c.tilt == "full", strength=c.strength, value=value, **choices)


def das(c: DAS) -> Searcher:
    return tds(c, carry=c.carry)


def fk(c: FK) -> Searcher:
    from dav_bench.core import SMC as Search
    from dav_bench.core import Interval, Potential

    return Search(
        value=_value(c, soften=c.soften),
        potential=Potential(c.potential, c.terminal, c.floor, c.clamp),
        points=Interval(c.start, c.end, c.every),
        skipped=c.skipped,
        order=c.order,
        **_shared(c),
    )


def guidance(c: Guidance) -> Searcher:
    from dav_bench.core import Guidance as Search
    from dav_bench.core import PosteriorMean

    return Search(c.scale, c.tilt == "full", PosteriorMean("mean", c.relax), c.on)
