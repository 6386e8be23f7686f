"""What each method should do in each world, and how close it should come: written down before it is run.

A method is exact in one of two senses.  It reaches the tilted target p exp(r / α) / Z, or it reaches another law that
its own approximation leads to and that is known as exactly (`LAWS`).  Distances are squared kernel distances in units
of that of the pretrained model from the target: 0 at the law, 1 without any alignment.  They may exceed what exact
samples would show by an allowance, stated with its reason, for each unit that the pretrained model is away.
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
DRAWS = Allowance(0.01, "finite rollouts of a look-ahead")
FITTED = Allowance(0.015, "network fitted to samples")
NOISY = Allowance(0.015, "network fitted by noisy gradients")
LABELS = Allowance(0.03, "labels drawn at random")
RELAXED = Allowance(0.02, "gradients through relaxed tokens")
LAST = Allowance(0.01, "the last step is trained by none")
BLURRED = Allowance(0.02, "density known up to a kernel")
STOPPED = Allowance(0.05, "training stops on the way")
SMALL = Allowance(0.15, "128 units trained for seconds, 65,536 sequences")

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
    "fitted": "reaches its own fixed point: a fit to steps tilted by the reward of {whose} {look} prediction",
    "adjoint": "reaches its own fixed point: steps that follow the adjoint of {steps} steps",
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
    model: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the pretrained model."""

    @property
    def says(self) -> str:
        """The expectation in words."""
        told = {"look": "mean", "k": 1, "steps": self.sampler.get("steps"), **self.of}
        told["whose"] = "its own" if self.of.get("by") == "policy" else "the pretrained"
        told["pulled"] = f" with KL {self.of['pull']:g}" if "pull" in self.of else ""
        return LAWS[self.law].format(**told)

    @property
    def allowance(self) -> float:
        return sum(a.size for a in self.allow)


TOKENS, MIXTURE, RING, BINDING = "toy-tokens", "toy-mixture", "toy-ring", "tfbind8"
_ALL: tuple[tuple[str, dict[str, Any]], ...] = (
    (TOKENS, {}),
    (MIXTURE, {}),
    (RING, {"n": 1000}),
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
    """All rows of the suite, those of a method together."""
    rows = [
        *_baselines(),
        *_searches(),
        *_particles(),
        *_likelihoods(),
        *_policies(),
        *_gradients(),
        *_pairs(),
    ]
    methods = list(dict.fromkeys(r.method for r in rows))
    return sorted(rows, key=lambda r: methods.index(r.method))


def _baselines() -> list[Expectation]:
    rows = [row("pretrained", world, "prior", {}, **fields) for world, fields in _ALL]
    for world, fields in _ALL:
        rows.append(row("exact", world, "target", {"alpha": fields.get("alpha", 1.0)}, **fields))
        rows.append(row("best-of-n", world, "best", {"n": 4}, of={"n": 4}, **fields))
    return rows


def _searches() -> list[Expectation]:
    """Trees and guidance: biased by their look-ahead, so that most reach a law of their own."""
    mean = {"width": 64, "alpha": 0.5, "lookahead": "mean"}  # at α = 0.5 the laws differ more from each other
    mode = {**mean, "lookahead": "mode"}
    many = {"width": 32, "alpha": 0.5, "lookahead": "rollout", "draws": 32}
    line = {"width": 32, "alpha": 1.0, "lookahead": "mean"}
    fit = {"samples": 1000, "rounds": 10, "updates": 4, "minibatch": 500, "lr": 3e-3, "schedule": "linear"}
    learned = {**fit, "width": 64, "alpha": 1.0}
    letters = {"scale": 1.0, "letters": True}
    return [
        row("svdd", TOKENS, "steered", mean, CANDIDATES, alpha=0.5, n=2000),
        row("svdd", TOKENS, "steered", mode, CANDIDATES, of={"look": "mode"}, alpha=0.5, n=2000),
        row("svdd", TOKENS, "steered", {**mean, "guide": True}, CANDIDATES, alpha=0.5, n=2000),
        row("svdd", TOKENS, "target", many, CANDIDATES, DRAWS, alpha=0.5, n=500),
        row("svdd", MIXTURE, "steered", line, CANDIDATES, n=2000),
        row("svdd", MIXTURE, "steered", {**line, "guide": True}, CANDIDATES, n=2000),
        row("svdd-mc", TOKENS, "expected", learned, CANDIDATES, FITTED, n=1000),
        row("guidance", TOKENS, "guided", {"scale": 1.0}, of={"scale": 1.0}),
        row("guidance", TOKENS, "guided", {"scale": 1.0, "tilt": "letters"}, of=letters),
        row("guidance", MIXTURE, "guided", {"scale": 1.0}, of={"scale": 1.0}),
    ]


def _particles() -> list[Expectation]:
    """Weights make up for any look-ahead, so particles reach the target in every world, and estimate its Z."""
    every = {"start": 0.0, "end": 1.0, "every": 0.0}
    kinds: dict[str, dict[str, Any]] = {
        "smc": {"lookahead": "mean"},
        "tds": {},
        "das": {},
        "fk": {"lookahead": "mean", "potential": "diff", **every},
    }
    rows = []
    for method, settings in kinds.items():
        drawn = {**settings, "alpha": 1.0, "output": "draw"}
        cold = {**drawn, "alpha": 0.1, "particles": 64}
        rows += [
            row(method, TOKENS, "target", {**drawn, "particles": 64}, PARTICLES, n=2000),
            row(method, MIXTURE, "target", {**drawn, "particles": 32}, PARTICLES, n=1000),
            row(method, RING, "target", {**drawn, "particles": 32}, PARTICLES, n=500),
            row(method, BINDING, "target", cold, PARTICLES, alpha=0.1, n=1000),
            row(method, TOKENS, "z", {**drawn, "particles": 8}, n=4000),
            row(method, MIXTURE, "z", {**drawn, "particles": 8}, n=2000),
        ]
    fk = {**kinds["fk"], "alpha": 1.0, "output": "draw", "particles": 64}  # the others end in heavy weights
    rows += [
        row("fk", TOKENS, "target", {**fk, "potential": p}, PARTICLES, n=2000) for p in ("max", "add", "rt")
    ]
    adaptive = {"tempering": "adaptive", "particles": 64, "alpha": 0.5}
    return [*rows, row("das", TOKENS, "target", adaptive, PARTICLES, alpha=0.5, n=2000)]


def _likelihoods() -> list[Expectation]:
    """Fits to trajectories found: each round is one tilt by what found them."""
    fit = {"samples": 2000, "updates": 8, "minibatch": 1000, "lr": 1e-2, "schedule": "linear"}
    line = {**fit, "samples": 1000, "updates": 10, "minibatch": 2000}
    tree = {"width": 32, "alpha": 1.0, "gamma": 1.0, "guide": False, "lookahead": "mean", "target": "mean"}
    dav = {**fit, **tree}
    collapse = {**dav, "rounds": 10, "samples": 500}
    rwr = {**fit, "samples": 16000, "updates": 4, "lr": 2e-2, "alpha": 1.0}
    vidd = {**fit, "alpha": 1.0, "lookahead": "mean"}
    refreshed = {**vidd, "samples": 1000, "rounds": 20, "updates": 2, "prior": "ref", "refresh": 6}
    pulled = {"k": 3, "pull": 1.0}
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
        row("dav", MIXTURE, "rounds", {**tree, **line, "rounds": 1}, CANDIDATES, FITTED, LAST, of={"k": 1}),
        row("dav-kl", TOKENS, "rounds", {**dav, "rounds": 3, "kl": 1.0}, CANDIDATES, FITTED, of=pulled),
        row("rwr", TOKENS, "tilt", {**rwr, "rounds": 1}, FITTED, of={"k": 1}),
        row("rwr", TOKENS, "tilt", {**rwr, "rounds": 2}, FITTED, of={"k": 2}),
        row("rwr", MIXTURE, "tilts", {**line, "rounds": 1, "alpha": 1.0}, FITTED, LAST, of={"k": 1}),
        row("rwr", RING, "target", {**line, "rounds": 1, "alpha": 1.0}, FITTED, LAST, n=1000),
        row("rwr", BINDING, "target", {**rwr, "rounds": 1, "lr": 1e-2, "alpha": 0.2}, SMALL, alpha=0.2),
        row(
            "vidd",
            TOKENS,
            "rounds",
            {**vidd, "samples": 4000, "rounds": 1, "refresh": 100_000},
            FITTED,
            of={"k": 1},
        ),
        row("vidd", TOKENS, "fitted", refreshed, NOISY),
    ]


def _policies() -> list[Expectation]:
    """Policy gradients: what they aim at depends on how a KL counts."""
    fit = {"rounds": 60, "samples": 512, "minibatch": 1536, "updates": 1, "lr": 1e-2, "schedule": "linear"}
    line = {**fit, "samples": 256, "minibatch": 5120}
    dpok = {"kl": 1.0, "weight": 1.0, "clip": 1.0}
    vmpo = {"alpha": 1.0, "warmup": 0, "baseline": "batch", "weight_decay": 0.0}
    ddpo = {**fit, "samples": 256, "minibatch": 768}
    diff = {**fit, **vmpo, "form": "diff", "lookahead": "mean"}
    cold = {**fit, **vmpo, "form": "r2g", "minibatch": 4096, "alpha": 0.2}
    return [
        row("ddpo", TOKENS, "maximum", ddpo, STOPPED, n=1000),
        row("ddpo", TOKENS, "maximum", {**ddpo, "form": "sf"}, STOPPED, n=1000),
        row("ddpo", MIXTURE, "maximum", {**line, "rounds": 80}, STOPPED, n=1000),
        row("dpok", TOKENS, "pulled", {**fit, **dpok}, NOISY),
        row("dpok", MIXTURE, "pulled", {**line, **dpok}, NOISY, LAST, n=2000),
        row("grpo", TOKENS, "pulled", {**fit, "kl": 1.0, "std": "none", "group": 8}, NOISY),
        row("vmpo", TOKENS, "target", {**fit, **vmpo, "form": "r2g"}, NOISY),
        row("vmpo", TOKENS, "fitted", diff, NOISY),
        row("vmpo", TOKENS, "fitted", {**diff, "potential": "policy"}, NOISY, of={"by": "policy"}),
        row("vmpo", MIXTURE, "control", {**line, **vmpo, "form": "r2g"}, NOISY, LAST, n=2000),
        row("vmpo", BINDING, "target", cold, SMALL, alpha=0.2, n=2000),
    ]


def _gradients() -> list[Expectation]:
    """Reward gradients through samples, or carried back along them."""
    fit = {"rounds": 100, "samples": 256, "minibatch": 256, "lr": 1e-2, "schedule": "linear"}
    draft = {**fit, "rounds": 60, "samples": 64, "minibatch": 64, "weight_decay": 0.0}
    drakes = {**fit, "last": 0, "alpha": 1.0, "tau": 0.3}
    # between modes far apart the weights of modes take far longer than seconds to settle
    adjoint = {**fit, "rounds": 80, "minibatch": 2560, "lr": 2e-2, "alpha": 1.0}
    near = {"means": (-1.0, 1.0)}
    fav = {**fit, "lr": 5e-3, "weight_decay": 0.0, "alpha": 1.0, "taus": "0.1"}
    one = {
        "weights": (1.0,),
        "means": (0.0,),
        "std": 1.0,
    }  # where half the repulsion shows: half the variance
    return [
        row("draft", TOKENS, "maximum", {**draft, "last": 0}, STOPPED, n=1000),
        row("draft", MIXTURE, "maximum", {**draft, "last": 3}, STOPPED, n=1000),
        row("drakes", TOKENS, "target", drakes, RELAXED),
        row("adjoint", MIXTURE, "adjoint", adjoint, FITTED, LAST, model=near, n=2000),
        row("fav", MIXTURE, "target", {**fav, "rounds": 200}, BLURRED, model=one, n=2000),
        row("fav", MIXTURE, "target", fav, BLURRED, n=2000),
    ]


def _pairs() -> list[Expectation]:
    """Preferences drawn by the law of Bradley and Terry carry the reward itself."""
    fit = {"samples": 300, "rounds": 20, "updates": 1, "minibatch": 300, "lr": 1e-2, "schedule": "linear"}
    dpo = {**fit, "n": 4, "beta": 1.0, "scale": 1.0, "label": "soft", "times": "path"}
    return [
        row("dpo", TOKENS, "target", dpo, FITTED),
        row("dpo", TOKENS, "target", {**dpo, "label": "bradley-terry", "rounds": 60}, LABELS),
        row("dpo", BINDING, "target", {**dpo, "rounds": 40, "scale": 0.2}, NOISY, alpha=0.2, n=2000),
    ]
