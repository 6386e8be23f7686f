"""What each method should do in each world, and how close it should come: written down before it is run.

A method is exact in one of two senses.  It reaches the tilted target p exp(r / α) / Z, or it reaches another law that
its own approximation leads to and that is known as exactly (`LAWS`).  Distances are squared kernel distances in units
of that of the pretrained model from the target: 0 at the law, 1 without any alignment.  They may exceed what exact
samples would show by an allowance, stated with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Allowance(NamedTuple):
    """How much farther than exact samples a method may be, and why."""

    size: float
    reason: str


PARTICLES = Allowance(0.01, "finite particles")
CANDIDATES = Allowance(0.01, "finite candidates")
FITTED = Allowance(0.02, "network fitted to samples")
NOISY = Allowance(0.04, "network fitted by noisy gradients")
RELAXED = Allowance(0.05, "gradients through relaxed tokens")
DRAWS = Allowance(0.01, "finite rollouts of a look-ahead")
TIMES = Allowance(0.05, "random times inside the sigmoid")
BLURRED = Allowance(0.05, "density known up to a kernel")
LAST = Allowance(0.02, "the last step is trained by none")
STOPPED = Allowance(0.05, "training stops on the way")

LAWS = {
    "prior": "prior unchanged",
    "target": "reaches the target",
    "tilt": "reaches tilt {k}",
    "tilts": "reaches tilt {k} as far as means of steps can",
    "control": "reaches the target as far as means of steps can",
    "best": "reaches its own law, the best of {n}",
    "steered": "reaches its own fixed point: steps tilted by the reward of the {look} prediction",
    "expected": "reaches its own fixed point: steps tilted by the expected reward",
    "guided": "reaches its own fixed point: steps tilted by the gradient",
    "rounds": "reaches its own round {k}: steps tilted by the reward of the {look} prediction{pulled}",
    "pulled": "reaches its own fixed point: a KL that counts at the states visited alone",
    "own": "reaches its own fixed point: steps tilted by the reward of its own {look} prediction",
    "maximum": "collapses, as it should without KL",
    "z": "estimates Z without bias",
}
"""What may be expected, as it is told; `{...}` are parameters of an expectation's `of`."""


@dataclass(frozen=True)
class Expectation:
    """One method in one world."""

    method: str
    """Name in the catalogue."""
    world: str
    """Task whose laws are known: toy-tokens, toy-mixture, toy-ring or tfbind8."""
    law: str
    """One of `LAWS`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the method."""
    allow: tuple[Allowance, ...] = ()
    """What may be added to the distance of exact samples."""
    of: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of the law: k, n, look, scale, pull."""
    alpha: float = 1.0
    """Temperature of the law."""
    n: int = 4000
    """Samples compared."""
    sampler: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the chain."""
    note: str = ""
    """What tells this row from others of the method."""

    @property
    def says(self) -> str:
        """The expectation in words."""
        told = {"look": "mean", "k": 1, **self.of}
        told["pulled"] = f" with KL {self.of['pull']:g}" if "pull" in self.of else ""
        return LAWS[self.law].format(**told)

    @property
    def allowance(self) -> float:
        return sum(a.size for a in self.allow)


TOKENS, MIXTURE, RING, BINDING = "toy-tokens", "toy-mixture", "toy-ring", "tfbind8"
_ALL: tuple[tuple[str, dict[str, Any]], ...] = (
    (TOKENS, {}),
    (MIXTURE, {}),
    (RING, {"n": 2000}),
    (BINDING, {"alpha": 0.05}),
)


def row(
    method: str, world: str, law: str, settings: Mapping[str, Any], *allow: Allowance, **fields: Any
) -> Expectation:
    """A row; Gaussian chains are short, since every law is that of the chain itself."""
    if world in (MIXTURE, RING):
        fields.setdefault("sampler", {"steps": 20})
    return Expectation(method, world, law, settings, allow, **fields)


def expectations() -> list[Expectation]:
    """All rows of the suite."""
    return [
        *_baselines(),
        *_searches(),
        *_particles(),
        *_likelihoods(),
        *_policies(),
        *_gradients(),
        *_pairs(),
    ]


def _baselines() -> list[Expectation]:
    rows = [row("pretrained", world, "prior", {}, **fields) for world, fields in _ALL]
    rows += [
        row("exact", world, "target", {"alpha": fields.get("alpha", 1.0)}, **fields) for world, fields in _ALL
    ]
    return rows + [row("best-of-n", world, "best", {"n": 4}, of={"n": 4}, **fields) for world, fields in _ALL]


def _searches() -> list[Expectation]:
    """Trees and guidance: biased by their look-ahead, so most reach a law of their own."""
    wide = {"width": 256, "alpha": 1.0, "lookahead": "mean"}
    line = {**wide, "width": 64}
    learned = {
        "width": 128,
        "alpha": 1.0,
        "rounds": 10,
        "samples": 1000,
        "updates": 10,
        "lr": 3e-3,
        "minibatch": 500,
    }
    letters = {"scale": 1.0, "letters": True}
    return [
        row("svdd", TOKENS, "steered", wide, CANDIDATES),
        row("svdd", TOKENS, "steered", {**wide, "lookahead": "mode"}, CANDIDATES, of={"look": "mode"}),
        row("svdd", TOKENS, "steered", {**wide, "guide": True}, CANDIDATES),
        row(
            "svdd", TOKENS, "target", {**line, "lookahead": "rollout", "draws": 64}, CANDIDATES, DRAWS, n=2000
        ),
        row("svdd", MIXTURE, "steered", line, CANDIDATES),
        row("svdd", MIXTURE, "steered", {**line, "guide": True}, CANDIDATES),
        row("svdd-mc", TOKENS, "expected", {**learned, "schedule": "linear"}, CANDIDATES, FITTED),
        row("guidance", TOKENS, "guided", {"scale": 1.0}, of={"scale": 1.0}),
        row("guidance", TOKENS, "guided", {"scale": 1.0, "tilt": "letters"}, of=letters),
        row("guidance", MIXTURE, "guided", {"scale": 1.0}, of={"scale": 1.0}),
    ]


def _particles() -> list[Expectation]:
    """Weights make up for any look-ahead, so particles reach the target in every world, and estimate its Z."""
    every = {"start": 0.0, "end": 1.0, "every": 0.0}
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (
        ("smc", {"lookahead": "mean"}),
        ("tds", {}),
        ("das", {}),
        ("fk", {"lookahead": "mean", "potential": "max", **every}),
    )
    rows = []
    for method, settings in kinds:
        drawn = {**settings, "particles": 64, "alpha": 1.0, "output": "draw"}
        rows += [row(method, world, "target", drawn, PARTICLES, n=2000) for world in (TOKENS, MIXTURE, RING)]
        cold = {**drawn, "alpha": 0.05, "particles": 128}
        rows += [row(method, BINDING, "target", cold, PARTICLES, alpha=0.05, n=1000)]
        rows += [row(method, world, "z", {**drawn, "particles": 8}, n=4000) for world in (TOKENS, MIXTURE)]
    for kind in ("diff", "add", "rt"):
        settings = {**kinds[-1][1], "potential": kind, "particles": 64, "alpha": 1.0, "output": "draw"}
        rows.append(row("fk", TOKENS, "target", settings, PARTICLES, n=2000))
    adaptive = {"tempering": "adaptive", "particles": 64, "alpha": 0.5}
    return [*rows, row("das", TOKENS, "target", adaptive, PARTICLES, alpha=0.5, n=2000)]


def _likelihoods() -> list[Expectation]:
    """Fits to trajectories found: one round is one tilt by what found them."""
    fit = {"samples": 4000, "updates": 20, "minibatch": 500, "lr": 3e-3, "schedule": "linear"}
    dav = {
        **fit,
        "width": 64,
        "alpha": 1.0,
        "gamma": 1.0,
        "guide": False,
        "lookahead": "mean",
        "target": "mean",
    }
    rwr = {**fit, "alpha": 1.0}
    vidd = {**fit, "samples": 1000, "alpha": 1.0, "lookahead": "mean"}
    own = {**vidd, "prior": "ref", "rounds": 20, "updates": 4, "refresh": 8}
    collapse = {**dav, "rounds": 10, "samples": 1000, "updates": 8}
    return [
        row("dav", TOKENS, "rounds", {**dav, "rounds": 1}, CANDIDATES, FITTED, of={"k": 1}),
        row("dav", TOKENS, "rounds", {**dav, "rounds": 2}, CANDIDATES, FITTED, of={"k": 2}),
        row("dav", TOKENS, "rounds", {**dav, "rounds": 1, "guide": True}, CANDIDATES, FITTED, of={"k": 1}),
        row(
            "dav",
            TOKENS,
            "rounds",
            {**dav, "rounds": 1, "target": "transition"},
            CANDIDATES,
            FITTED,
            of={"k": 1},
        ),
        row("dav", TOKENS, "maximum", collapse, STOPPED),
        row("dav", MIXTURE, "rounds", {**dav, "rounds": 1}, CANDIDATES, FITTED, LAST, of={"k": 1}),
        row(
            "dav-kl",
            TOKENS,
            "rounds",
            {**dav, "rounds": 3, "kl": 1.0},
            CANDIDATES,
            FITTED,
            of={"k": 3, "pull": 1.0},
        ),
        row("rwr", TOKENS, "tilt", {**rwr, "rounds": 1}, FITTED, of={"k": 1}),
        row("rwr", TOKENS, "tilt", {**rwr, "rounds": 2}, FITTED, of={"k": 2}),
        row("rwr", MIXTURE, "tilts", {**rwr, "rounds": 1}, FITTED, LAST, of={"k": 1}),
        row("rwr", RING, "target", {**rwr, "rounds": 1}, FITTED, LAST, n=2000),
        row("rwr", BINDING, "target", {**rwr, "alpha": 0.2, "rounds": 1}, FITTED, alpha=0.2),
        row(
            "vidd",
            TOKENS,
            "rounds",
            {**vidd, "rounds": 1, "samples": 4000, "updates": 20, "refresh": 100000},
            FITTED,
        ),
        row("vidd", TOKENS, "own", own, NOISY),
    ]


def _policies() -> list[Expectation]:
    """Policy gradients: what they aim at depends on how a KL counts."""
    fit = {"samples": 512, "minibatch": 1536, "lr": 3e-3, "schedule": "linear", "clip": 1.0, "updates": 1}
    dpok = {**fit, "rounds": 100, "kl": 1.0, "weight": 1.0}
    grpo = {**fit, "rounds": 100, "kl": 1.0, "std": "none", "group": 8}
    vmpo = {**fit, "rounds": 100, "alpha": 1.0, "warmup": 0, "baseline": "batch", "weight_decay": 0.0}
    ddpo = {**fit, "rounds": 100, "lr": 1e-2}
    steps = {"minibatch": 10240}
    return [
        row("ddpo", TOKENS, "maximum", ddpo, STOPPED),
        row("ddpo", TOKENS, "maximum", {**ddpo, "form": "sf"}, STOPPED),
        row("dpok", TOKENS, "pulled", dpok, NOISY),
        row("dpok", MIXTURE, "pulled", {**dpok, **steps}, NOISY, LAST),
        row("grpo", TOKENS, "pulled", grpo, NOISY),
        row("vmpo", TOKENS, "target", {**vmpo, "form": "r2g"}, NOISY),
        row("vmpo", TOKENS, "own", {**vmpo, "form": "diff", "lookahead": "mean"}, NOISY),
        row("vmpo", MIXTURE, "control", {**vmpo, "form": "r2g", **steps}, NOISY, LAST),
        row(
            "vmpo",
            BINDING,
            "target",
            {**vmpo, "form": "r2g", "alpha": 0.1, "minibatch": 4096},
            NOISY,
            alpha=0.1,
        ),
    ]


def _gradients() -> list[Expectation]:
    """Reward gradients through samples."""
    fit = {
        "samples": 256,
        "minibatch": 256,
        "lr": 3e-3,
        "schedule": "linear",
        "weight_decay": 0.0,
        "rounds": 100,
    }
    return [
        row("draft", TOKENS, "maximum", {**fit, "last": 0, "lr": 1e-2}, STOPPED),
        row("draft", MIXTURE, "maximum", {**fit, "last": 0, "lr": 1e-2}, STOPPED),
        row("draft", MIXTURE, "maximum", {**fit, "last": 5, "lr": 1e-2}, STOPPED),
        row("drakes", TOKENS, "target", {**_without(fit, "weight_decay"), "last": 0, "alpha": 1.0}, RELAXED),
        row("adjoint", MIXTURE, "control", {**fit, "minibatch": 5120, "alpha": 1.0}, FITTED, LAST),
        row("adjoint", RING, "target", {**fit, "minibatch": 5120, "alpha": 1.0}, FITTED, LAST, n=2000),
        row("fav", MIXTURE, "target", {**fit, "samples": 256, "alpha": 1.0, "taus": (0.1,)}, BLURRED),
    ]


def _pairs() -> list[Expectation]:
    """Preferences drawn by Bradley and Terry's law carry the reward itself."""
    dpo = {
        "samples": 500,
        "n": 4,
        "rounds": 30,
        "updates": 1,
        "minibatch": 500,
        "lr": 3e-3,
        "schedule": "linear",
    }
    dpo |= {"beta": 1.0, "scale": 1.0, "average": "logit", "draws": 8, "times": "stratified"}
    return [
        row("dpo", TOKENS, "target", dpo, TIMES),
        row("dpo", BINDING, "target", {**dpo, "scale": 0.2}, TIMES, alpha=0.2),
    ]


def _without(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in names}
