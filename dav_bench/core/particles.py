"""Sequential Monte Carlo: particles that are proposed, weighed and resampled against each other.

Every sample (slot) has its own group of N particles, so slots never depend on each other.  With target twists
ψ_i(x_i) = exp(λ_i V_i(x_i) / α), ψ_0 = exp(r / α), a particle's weight grows at each step by

    log w += log ψ_{i−1}(x_{i−1}) − log ψ_i(x_i) + log p(x_{i−1} | x_i) − log q(x_{i−1} | x_i),

whose product along a path is exp(r(x_0) / α) p / q whatever the values are: a poor value costs variance, never
correctness.  The bootstrap filter (q = p), TDS and DAS (q tilted by the gradient of V), FK steering (other
potentials with the same product) and plain guidance (one particle, no weights) are choices of one loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from .model import Model, distinct
from .noise import Noise
from .process import Process
from .protocols import Batch, Context, NonFinite, Value
from .resample import RESAMPLERS, Interval, Potential, Tempering, ess
from .search import _CHILD, _GUIDE, _PICK, _PRIOR, _VALUE, Known, _table, evaluate
from .steps import Step
from .value import PosteriorMean, has_joint_gradient, value_and_grad

_RESAMPLE = 6  # purposes of noise go on from those of the tree search


@dataclass(frozen=True)
class Seen(Known):
    """States with what is held of them: prediction, value, and the value's gradient."""

    grad: Tensor | None = None

    def take(self, index: Tensor) -> Seen:
        known = super().take(index)
        return Seen(known.x, known.pred, known.value, None if self.grad is None else self.grad[index])


@dataclass(frozen=True)
class _World:
    """What all particles of a call share: G * N streams and conditions, and the model that moves them."""

    ctx: Context
    model: Model
    noise: Noise
    cond: Tensor | None
    random: frozenset[int]
    """Grid indices whose step is a draw.  Before a deterministic one there is nothing to guide, copies would stay
    copies, and what it leads to is weighed itself."""


def look(world: _World, value: Value, parents: Known | None, x: Tensor, i: int, score: bool) -> Seen:
    """Predictions of the states x at i > 0, and their values if `score`."""
    ctx, model, noise, cond = world.ctx, world.model, world.noise, world.cond
    asked = value if score else None
    known = evaluate(ctx, model, parents, x, i, noise.fold(i, _VALUE), asked, cond, steps=True)
    return Seen(known.x, known.pred, known.value)


def look_and_lean(world: _World, value: Value, parents: Seen | None, x: Tensor, i: int, score: bool) -> Seen:
    """The same with gradients of the values.

    The prediction comes with the gradient, and the value does where it is what was differentiated.  Masked states
    that are equal share a row, and one that equals a parent takes what the parent has, as in `search.evaluate`.
    """
    ctx, model, noise, cond = world.ctx, world.model, world.noise, world.cond
    share = model.shares and cond is None and value.grad_by_state
    held = parents
    if held is None or not share or held.grad is None or (score and held.value is None):
        held = Seen(x[:0])
    base, pool = len(held.x), torch.cat([held.x, x])
    first = group = torch.arange(len(x), device=x.device)
    if share:
        first, group = distinct(model.process.pack(pool))
    mine = group[base:]
    wanted = torch.zeros(len(first), dtype=torch.bool, device=x.device).index_fill_(0, mine, True)
    made: tuple[Tensor | None, Tensor, Tensor] | None = None

    def gradient(groups: Tensor) -> Tensor:
        nonlocal made
        own = first[groups] - base  # what no parent has is a state of its own
        part = None if cond is None else cond[own]
        made = value_and_grad(value, ctx, model, x[own], i, noise[own].fold(i, _GUIDE), part)
        if not made[1].isfinite().all():
            raise NonFinite("the reward gradient", int((~made[1].isfinite()).sum()), made[1].numel())
        return made[1]

    def again(groups: Tensor) -> Tensor:
        own = first[groups] - base
        part = None if cond is None else cond[own]
        return value(ctx, model, x[own], i, preds[groups], noise[own].fold(i, _VALUE), part)

    grads, computed = _table(held.grad, first, base, wanted, gradient)
    preds, _ = _table(held.pred, first, base, wanted, lambda _: made[2])  # type: ignore[index]
    model.count("shared", len(x) - computed)
    model.meter.count("reward_shared", len(x) - computed)
    seen = Seen(x, preds[mine], None, grads[mine])
    if not score:
        return seen
    if has_joint_gradient(value, model):
        values, _ = _table(held.value, first, base, wanted, lambda _: made[0])  # type: ignore[index,return-value]
        return replace(seen, value=values[mine])
    if not value.by_state:
        return replace(seen, value=value(ctx, model, x, i, seen.pred, noise.fold(i, _VALUE), cond))
    values, computed = _table(held.value, first, base, wanted, again)
    ctx.meter.count("reward_shared", len(x) - computed)
    return replace(seen, value=values[mine])


@dataclass
class Weights:
    """Log-weights of G groups of N particles, and the terms that they are made of."""

    log: Tensor
    """(G, N) log-weights since the last resampling."""
    given: Tensor
    """(G, N) log-potentials given to each path so far."""
    run: Tensor
    """(G, N) running statistic of each path's values, counted from `base`."""
    base: Tensor | None
    """(G, 1) value that others are counted from, so that a constant added to the reward changes nothing."""
    share: Tensor
    """(G,) λ_i, the share of the value that is trusted."""
    log_z: Tensor
    """(G,) log of the product of mean weights at past resamplings."""
    least: Tensor
    """(G,) smallest effective share of particles so far."""
    dead: Tensor
    """(G,) whether all weights of a group were 0 at some time."""
    resampled: int = 0
    """Resamplings of all groups."""

    @classmethod
    def equal(cls, groups: int, n: int, device: torch.device) -> Weights:
        zero = torch.zeros(groups, n, dtype=torch.float64, device=device)
        one = torch.ones(groups, dtype=torch.float64, device=device)
        return cls(zero, zero, zero, None, 0 * one, 0 * one, one, one > 1)

    def add(self, log: Tensor) -> None:
        """Multiplies weights; a group whose weights are all 0 starts again from equal ones, and is counted."""
        self.log = self.log + log
        bad = self.log.isnan() | (self.log == math.inf)
        if bad.any():
            raise NonFinite("particle weights", int(bad.sum()), bad.numel())
        gone = (self.log == -math.inf).all(1)
        if gone.any():
            self.dead = self.dead | gone
            self.log = torch.where(gone[:, None], 0.0, self.log)

    def mean(self) -> Tensor:
        """(G,) log of the mean weight."""
        return self.log.logsumexp(1) - math.log(self.log.shape[1])


@dataclass(frozen=True)
class SMC:
    """N particles for each sample, weighed towards p(x_0) exp(r / α) / Z and resampled within their group.

    Rows for each sample and T steps, R of them random (R = T − 1 for DDPM, whose last step is not): N T network
    rows forward and, with `guide`, N R backward; N rewards for x_0 and for each weighed state, R of these at most,
    and N R more where the gradient is not that of the value.  Equal masked states share rows.  `anchor="ref"` adds
    N T rows of the pretrained model.

    `log_z` estimates log Z of that anchor: exp(log_z) is unbiased for any value and schedule fixed in advance;
    adaptive tempering costs a bias of order 1/N.
    """

    particles: int = 8
    """N."""
    alpha: float = 0.1
    guide: bool = False
    """Propose from the step tilted by λ_{i−1} ∇V(x_i) / α instead of the step itself."""
    rate: bool = True
    """Tilt which tokens are revealed too, with the mask as one more class (TDS), or their letters alone."""
    strength: float = 1.0
    """Factor on the tilt."""
    value: Value = field(default_factory=PosteriorMean)
    potential: Potential = field(default_factory=Potential)
    tempering: Tempering = field(default_factory=Tempering)
    points: Interval = field(default_factory=Interval)
    """States that are weighed, those before a deterministic step left out."""
    ess: float = 0.5
    """Resample a group whose effective share of particles is below this; 1: at every weighed state."""
    resampler: Literal["multinomial", "systematic", "stratified", "ssp"] = "systematic"
    output: Literal["draw", "heaviest", "best", "survivor", "survivor-if-due", "all"] = "draw"
    """One particle drawn by weight, that of the largest weight (DAS's release), of the largest reward, of the largest
    reward among the children of one more resampling (FK's release on text; on images it is made only where fewer than
    half of the particles are effective), or all children of one more resampling."""
    on: Literal["policy", "ref"] = "policy"
    anchor: Literal["policy", "ref"] = "policy"
    """The p of the weights: the model that proposes, or the pretrained one.  A deterministic step has no density, so
    what a tuned model changes in the last step of a Gaussian chain is not weighed."""
    skipped: Literal["keep", "drop"] = "keep"
    """Weights where a group is not resampled: kept, or forgotten (FK's release)."""
    order: Literal["resample-first", "propose-first"] = "resample-first"
    """FK's image release weighs x_{i−1} by the prediction at x_i: it proposes from all particles and then resamples."""
    carry: Literal["all", "state"] = "all"
    """What a resampled particle takes along: everything, or its state without gradient and twist (DAS's release)."""
    keep: bool = True
    """Keep whole trajectories (a trainer needs them) or x_0 alone."""

    @property
    def requires(self) -> frozenset[str]:
        """A deterministic chain would never part two copies of a particle, so `step.log_prob` is needed in any case."""
        needs = {"step", "step.log_prob"} | ({"step.tilt", "reward.grad"} if self.guide else set())
        return frozenset(needs | ({"reference"} if self.anchor == "ref" else set()))

    @property
    def unbiased(self) -> bool:
        """Whether the weights are those of the target, so that they estimate Z."""
        exact = self.potential.terminal == "exact" and self.potential.clamp is None
        return exact and self.skipped == "keep" and self.carry == "all"

    def _weigh(self, w: Weights, value: Tensor, i: int, steps: int) -> None:
        value = value.double().view_as(w.log)
        if not value.isfinite().all():
            raise NonFinite("the look-ahead value", int((~value.isfinite()).sum()), value.numel())
        if w.base is None:
            # clamped potentials are meant in absolute terms
            w.base = value.amax(1, keepdim=True) * (self.potential.clamp is None)
            w.run = self.potential.start(w.base).expand_as(value)
        value = value - w.base
        w.run = self.potential.follow(w.run, value)
        if self.tempering.kind == "adaptive" and 0 < i < steps:
            rest = w.log + self.potential.log(w.run, value, w.given, torch.zeros_like(value), False)
            w.share = self.tempering.solve(w.share, rest, w.run / self.alpha)
        else:
            w.share = torch.full_like(w.share, self.tempering.share(i, steps))
        scale = w.share[:, None] / self.alpha
        new = self.potential.log(w.run, value, w.given, scale, last=i == 0)
        # a difference that was clamped is not made up for by the next one
        w.given = scale * w.run if self.potential.kind == "diff" else w.given + new
        w.add(new)
        w.least = torch.minimum(w.least, ess(w.log) / w.log.shape[1])

    def _resample(self, w: Weights, before: Tensor, noise: Noise) -> Tensor | None:
        """(G * N,) the particle that each one continues; None where all go on as they are.

        `before` are the potentials given up to here without this state's.
        """
        n = w.log.shape[1]
        due = ess(w.log) < self.ess * n * (1 + 1e-9)  # rounding must not decide a tie
        index, straight = None, torch.arange(n, device=w.log.device).expand_as(w.log)
        if due.any() and n > 1:
            drawn = RESAMPLERS[self.resampler](w.log.softmax(1), noise)
            index = torch.where(due[:, None], drawn, straight)
            w.log_z = w.log_z + torch.where(due, w.mean(), 0.0)
            w.resampled += int(due.sum())
            w.log = torch.where(due[:, None], 0.0, w.log)
            w.run = w.run.gather(1, index)
            if self.carry == "all":
                w.given, before = w.given.gather(1, index), before.gather(1, index)
        if self.skipped == "drop":
            w.log = torch.zeros_like(w.log)
            if self.potential.kind != "diff":
                w.given = torch.where(due[:, None], w.given, before)
        if index is None:
            return None
        return (index + n * torch.arange(len(index), device=index.device)[:, None]).flatten()

    def _proposal(self, world: _World, seen: Seen, w: Weights, i: int) -> tuple[Step, Step]:
        """(p, q) at the particles."""
        ctx, model = world.ctx, world.model
        p = q = seen.step(model, i)
        if seen.grad is not None:
            share = w.share  # an adaptive λ_{i−1} is not known before its particles are
            if self.tempering.kind != "adaptive":
                share = torch.full_like(share, self.tempering.share(i - 1, model.process.T))
            scale = (self.strength / self.alpha * share).repeat_interleave(self.particles).to(seen.grad)
            q = p.tilt(scale.view(-1, *[1] * (seen.grad.ndim - 1)) * seen.grad, rate=self.rate)
        if self.anchor == "ref" and model is not ctx.reference:
            known = evaluate(ctx, ctx.reference, None, seen.x, i, world.noise, cond=world.cond)
            p = known.step(ctx.reference, i)
        return p, q

    def _chosen(self, w: Weights, reward: Tensor, slots: Noise, n: int) -> Tensor:
        """(n,) particles that are returned, among all (G * N)."""
        starts = torch.arange(len(slots), device=reward.device) * self.particles
        if self.output == "draw":
            return starts + slots.fold(0, _PICK).categorical(w.log)
        if self.output == "heaviest":
            return starts + w.log.argmax(1)
        if self.output == "best":
            return starts + reward.argmax(1)
        kids = RESAMPLERS[self.resampler](w.log.softmax(1), slots.fold(0, _RESAMPLE))
        if self.output == "all":
            return (starts[:, None] + kids).flatten()[:n]
        if self.output == "survivor-if-due":
            straight = torch.arange(self.particles, device=kids.device).expand_as(kids)
            kids = torch.where((ess(w.log) < 0.5 * self.particles)[:, None], kids, straight)
        return starts + kids.gather(1, reward.gather(1, kids).argmax(1, keepdim=True))[:, 0]

    def _groups(self, noise: Noise, cond: Tensor | None) -> tuple[Noise, Tensor | None]:
        """Streams and conditions of the groups: one for each slot, or one for N slots that share its particles."""
        if self.output != "all":
            return noise, cond
        first = torch.arange(len(noise), device=noise.keys.device) // self.particles * self.particles
        if cond is not None and not torch.equal(cond, cond[first.to(cond.device)]):
            raise ValueError("output 'all' gives one group to several samples, whose conditions differ")
        return noise[:: self.particles], None if cond is None else cond[:: self.particles]

    def _look(self, world: _World, parents: Seen | None, x: Tensor, i: int) -> Seen:
        """What is needed of the states at i; at 0 that is the reward."""
        if i > 0:
            how = look_and_lean if self.guide and i in world.random else look
            score = i in world.random and i in self.points(world.model.process.T)
            return how(world, self.value, parents, x, i, score)
        # the posterior mean's value of a state that is clean already is its reward
        held = parents if isinstance(self.value, PosteriorMean) else None
        known = evaluate(world.ctx, world.model, held, x, 0, world.noise, PosteriorMean(), world.cond)
        return Seen(known.x, None, known.value)

    @torch.no_grad()
    def __call__(self, ctx: Context, noise: Noise, cond: Tensor | None = None) -> Batch:
        model, n = ctx.model(self.on), self.particles
        process = model.process
        slots, part = self._groups(noise, cond)
        many = slots if n == 1 else slots.repeat(n)  # one particle is a plain sample of its slot
        x = process.prior(many.fold(_PRIOR), dtype=model.dtype)
        each = None if part is None else part.repeat_interleave(n, 0)
        world = _World(ctx, model, many, each, self._random(process, x[:1]))
        w = Weights.equal(len(slots), n, x.device)
        states: list[Tensor] = [process.pack(x)]
        ancestors: list[Tensor | None] = []
        root = torch.arange(len(x), device=x.device)
        seen = self._look(world, None, x, process.T)
        for i in range(process.T, 0, -1):
            index = None
            if seen.value is not None:
                before = w.given
                self._weigh(w, seen.value, i, process.T)
                index = self._resample(w, before, slots.fold(i, _RESAMPLE))
            if index is not None and self.order == "resample-first":
                seen = (
                    replace(seen.take(index), grad=seen.grad) if self.carry == "state" else seen.take(index)
                )
            p, q = self._proposal(world, seen, w, i)
            x = q.sample(many.fold(i, _CHILD))
            ratio = None if p is q else (p.log_prob(x) - q.log_prob(x)).double()
            if index is not None and self.order == "propose-first":
                x, ratio = x[index], None if ratio is None else ratio[index]
            if ratio is not None:
                w.add(ratio.view_as(w.log))
            states = states if self.keep else []
            states.append(process.pack(x))
            ancestors.append(index)
            root = root if index is None else root[index]
            seen = self._look(world, seen, x, i - 1)
        reward: Tensor = seen.value  # type: ignore[assignment]
        self._weigh(w, reward, 0, process.T)
        chosen = self._chosen(w, reward.view_as(w.log), slots, len(noise))
        log_z = (w.log_z + w.mean() + w.base[:, 0] / self.alpha).masked_fill(w.dead, -math.inf)  # type: ignore[index]
        return Batch(
            self._paths(states, ancestors, chosen),
            reward[chosen],
            cond=cond,
            stats=self._stats(w, root, log_z),
            log_z=log_z[chosen // n] if self.unbiased else None,
            keys=noise,
        )

    @staticmethod
    def _random(process: Process, x: Tensor) -> frozenset[int]:
        """Grid indices whose step is a draw: a matter of the schedule, so any state and prediction will do."""
        every = range(1, process.T + 1)
        return frozenset(i for i in every if process.kind == "masked" or process.step(x, x, i).stochastic)

    @staticmethod
    def _paths(states: list[Tensor], ancestors: list[Tensor | None], chosen: Tensor) -> Tensor:
        """(T + 1, n, ...) the lineages of the chosen particles; (1, n, ...) where only x_0 was kept."""
        path = [states[-1][chosen]]
        for state, index in zip(states[-2::-1], ancestors[::-1], strict=len(states) > 1):
            chosen = chosen if index is None else index[chosen]
            path.append(state[chosen])
        return torch.stack(path[::-1])

    def _stats(self, w: Weights, root: Tensor, log_z: Tensor) -> dict[str, float]:
        """Means over slots, and how many slots collapsed to one particle or to none."""
        n = self.particles
        if n == 1:
            return {}
        born = root.view(-1, n).sort(1).values.diff(dim=1).ne(0).sum(1) + 1
        alive = log_z[~w.dead]
        return {
            "ess_min": float(w.least.mean()),
            "ancestors": float(born.double().mean()) / n,
            "resamplings": w.resampled / len(w.dead),
            "collapsed": float((w.dead | (w.least * n < 1.01)).sum()),
        } | ({"log_z": float(alive.mean())} if self.unbiased and len(alive) else {})


@dataclass(frozen=True)
class Guidance:
    """One sample at a time from steps tilted by `scale` ∇V(x_i), with no weights to correct it (DPS).

    For a Gaussian step the mean moves by scale s² ∇V (Chung et al. 2023 with this step size); for tokens the
    letters' logits, and with `rate` what is revealed, move as in TDS.  Exact where V is linear and the chain is
    Gaussian; else biased, more so for a larger scale.  T network rows forward for each sample, and one backward
    for each random step.
    """

    scale: float = 10.0
    """1 / α where a tilt exp(r / α) is meant."""
    rate: bool = True
    value: Value = field(default_factory=PosteriorMean)
    on: Literal["policy", "ref"] = "policy"
    keep: bool = True

    requires = frozenset({"step", "step.log_prob", "step.tilt", "reward.grad"})

    def __call__(self, ctx: Context, noise: Noise, cond: Tensor | None = None) -> Batch:
        search = SMC(1, 1.0, guide=True, rate=self.rate, strength=self.scale, value=self.value, points=Interval(1, 0),
                     on=self.on, keep=self.keep)  # fmt: skip
        return replace(search(ctx, noise, cond), log_z=None)
