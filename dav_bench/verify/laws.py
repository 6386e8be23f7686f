"""The laws of `expectations.LAWS`, and how far samples are from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dav_bench.builtin.exact import Law, World, world_of
from dav_bench.core import Batch, Model, PosteriorMean
from dav_bench.errors import DavBenchError, near
from dav_bench.verify.chains import Chain, Line, Tokens
from dav_bench.verify.expectations import LAWS, Expectation

LEVEL = 0.99
"""Of the interval that holds the distance of exact samples."""


@dataclass(frozen=True)
class Measured:
    """How far samples are from a law."""

    distance: float
    """As the expectation counts it; 0 is at the law."""
    low: float
    """Lower end of the interval of exact samples."""
    high: float
    """Upper end."""


def measure(row: Expectation, model: Model, batch: Batch) -> Measured:
    """Distance of the samples in a batch to the law that a row expects."""
    if row.law == "z":
        return _normaliser(row, batch)
    x = model.decode(model.process.clean(model.process.unpack(batch.states[-1])))
    world = _world(row)
    if row.law == "maximum":
        missed = _missed(world, world.reward(x.detach().cpu().double()))
        return Measured(float(missed.mean()), 0.0, 0.0)
    law = law_of(row)
    return Measured(world.distance(x, law), *_null(row, len(x)))


def law_of(row: Expectation) -> Law:
    """The law that samples should have, exactly."""
    return _law(_place(row), row.law, _frozen(row.of))


def _missed(world: World, reward: Tensor) -> Tensor:
    """1 where a reward is more than a tenth of the way from the maximum to the pretrained mean, else 0."""
    top, start = float(world.rewards.max()), world.prior.mean(world.rewards)
    return (reward.double() < top - 0.1 * (top - start)).double()


def start_of(row: Expectation) -> float:
    """Distance of the pretrained model from that law: what a method has to cover; NaN for an estimate of Z."""
    world = _world(row)
    if row.law == "z":
        return math.nan
    if row.law == "maximum":
        return world.prior.mean(_missed(world, world.rewards))
    return world.apart(world.prior, law_of(row))


def away_of(row: Expectation) -> float:
    """Distance of that law from the target."""
    if row.law in ("maximum", "z"):
        return math.nan
    world = _world(row)
    return world.apart(law_of(row), world.target())


@dataclass(frozen=True)
class _Place:
    """A world at a temperature, as a key."""

    task: str
    alpha: float
    sampler: tuple[tuple[str, Any], ...]
    model: tuple[tuple[str, Any], ...]


def _frozen(values: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(values.items()))


def _place(row: Expectation) -> _Place:
    return _Place(row.world, row.alpha, _frozen(row.sampler), _frozen(row.model))


def _world(row: Expectation) -> World:
    return _known(_place(row))


@lru_cache(maxsize=8)
def _known(place: _Place) -> World:
    return world_of(place.task, dict(place.sampler), place.alpha, **dict(place.model))


@lru_cache(maxsize=64)
def _interval(place: _Place, law: str, of: Any, n: int, draws: int) -> tuple[float, float]:
    return _known(place).null(n, _law(place, law, of), draws, LEVEL)


def _null(row: Expectation, n: int) -> tuple[float, float]:
    draws = 200 if row.world == "toy-ring" else 400  # all pairs in the plane cost more than on a line
    return _interval(_place(row), row.law, _frozen(row.of), n, draws)


@lru_cache(maxsize=4)
def _chain(place: _Place) -> Chain:
    """Of the same states at every temperature."""
    world = _known(place)
    for kind, name in ((Tokens, "toy-tokens"), (Line, "toy-mixture")):
        if place.task == name:
            return kind.of_model(world.model, world.reward)  # type: ignore[attr-defined,no-any-return]
    raise DavBenchError(
        f"fixed points in world {place.task!r} are not known.",
        fix="toy-tokens or toy-mixture, or another law",
    )


@lru_cache(maxsize=64)
def _law(place: _Place, name: str, of: Any) -> Law:
    world, options, alpha = _known(place), dict(of), place.alpha
    if name == "prior":
        return world.prior
    if name in ("target", "tilt"):
        return world.target(options.get("k", 1))
    if name == "best":
        return best_of(world, options["n"])
    if name == "steered":
        return world.steered(PosteriorMean(options.get("look", "mean")))
    chain = _chain(place)
    policies: dict[str, Callable[[], list[Tensor]]] = {
        "rounds": lambda: chain.rounds(alpha=alpha, **{"k": 1, **options}),
        "tilts": lambda: chain.tilts(options.get("k", 1), alpha),
        "control": lambda: chain.control(alpha),
        "pulled": lambda: chain.pulled(alpha),
        "fitted": lambda: chain.fitted(alpha, **options),
        "adjoint": lambda: chain.adjoint(alpha),  # type: ignore[attr-defined]
    }
    if name in policies:
        p = chain.of(policies[name]())
    elif name in ("guided", "expected"):
        p = chain.guided(**options) if name == "guided" else chain.expected(alpha)
    else:
        raise DavBenchError(f"there is no law {name!r}{near(name, LAWS)}")
    x = world.prior.x if isinstance(chain, Tokens) else chain.states[0]
    return Law(x, p)


def best_of(world: World, n: int) -> Law:
    """P(x) = (F(r)^n − F(r−)^n) p(x) / p(level): the best of n, those of equal reward in proportion."""
    p, (levels, level) = world.prior.p, world.rewards.unique(return_inverse=True)
    mass = torch.zeros(len(levels), dtype=p.dtype).index_add_(0, level, p)
    below = torch.cat([torch.zeros(1, dtype=p.dtype), mass.cumsum(0).clamp_max(1)])
    won = (below**n).diff()
    return Law(world.prior.x, p * (won / mass.clamp_min(1e-300))[level])


def _normaliser(row: Expectation, batch: Batch) -> Measured:
    """|mean Ẑ / Z − 1| over groups of particles, and what an unbiased estimate shows by chance."""
    if batch.log_z is None:
        raise DavBenchError(f"{row.method!r} estimates no Z.", fix="expect the law of its samples instead")
    ratio = (batch.log_z.double() - _world(row).log_z()).exp()
    z = float(torch.special.ndtri(torch.tensor((1 + LEVEL) / 2, dtype=torch.float64)))
    spread = z * float(ratio.std()) / math.sqrt(len(ratio))
    return Measured(abs(float(ratio.mean()) - 1), 0.0, spread)
