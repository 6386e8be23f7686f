"""E-steps: searchers that find trajectories, from plain sampling to DAV's tree search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .model import Model, distinct
from .noise import Noise
from .protocols import Batch, Context, NonFinite, Value
from .steps import Step
from .value import PosteriorMean

_PRIOR, _CHILD, _PICK, _VALUE, _GUIDE = 1, 2, 3, 4, 5  # purposes of noise within a step


@dataclass(frozen=True)
class Known:
    """States x (N, ...) with what is held of them: predictions (N, ...) and values (N,)."""

    x: Tensor
    pred: Tensor | None = None
    value: Tensor | None = None

    def take(self, index: Tensor) -> Known:
        pred, value = (None if part is None else part[index] for part in (self.pred, self.value))
        return Known(self.x[index], pred, value)

    def put(self, rows: Tensor, other: Known) -> Known:
        """These states with `rows` replaced by those of `other`."""
        pairs = ((self.pred, other.pred), (self.value, other.value))
        pred, value = (a if a is None or b is None else a.index_copy(0, rows, b) for a, b in pairs)
        return Known(self.x.index_copy(0, rows, other.x), pred, value)

    def step(self, model: Model, i: int) -> Step:
        """p(x_{i−1} | x_i) at these states."""
        if self.pred is None:
            raise ValueError("these states have no prediction yet")
        return model.process.step(self.pred, self.x, i)


@dataclass(frozen=True)
class Expansion:
    """Children of B parents and what they tell about the tilted step."""

    kids: Known
    """(B * M, ...) sample-major."""
    logw: Tensor
    """(B, M) log-weights."""
    mean: Tensor | None = None
    """(B, ...) estimate of E[x_{i−1} | x_i] under the tilted step, where a trainer asks for it."""

    def put(self, rows: Tensor, other: Expansion) -> Expansion:
        """This with parents `rows` replaced by those of `other`."""
        width = self.logw.shape[1]
        slots = (rows[:, None] * width + torch.arange(width, device=rows.device)).flatten()
        mean = None if self.mean is None or other.mean is None else self.mean.index_copy(0, rows, other.mean)
        return Expansion(self.kids.put(slots, other.kids), self.logw.index_copy(0, rows, other.logw), mean)


def _table(
    held: Tensor | None, first: Tensor, base: int, wanted: Tensor, compute: Callable[[Tensor], Tensor]
) -> tuple[Tensor, int]:
    """(G, ...) one row for each wanted group, held where a parent has it and else computed; and how many were."""
    have = wanted & (first < base) if held is not None else torch.zeros_like(wanted)
    todo = (wanted & ~have).nonzero()[:, 0]
    got = compute(todo) if len(todo) else held
    if got is None:
        raise ValueError("no states to evaluate")
    table = got.new_empty(len(first), *got.shape[1:])
    if len(todo):
        table[todo] = got
    if held is not None:
        table[have] = held[first[have]].to(table)
    return table, len(todo)


def evaluate(
    ctx: Context, model: Model, parents: Known | None, kids: Tensor, i: int, noise: Noise,
    value: Value | None = None, cond: Tensor | None = None, steps: bool = False,
) -> Known:  # fmt: skip
    """What is needed of the states `kids` at i: predictions (not at i = 0) and, given `value`, their values.

    A value that needs no prediction leaves it out, unless all of these states take a step next (`steps`).

    Where the prediction depends on the state alone (`model.shares`), equal children are computed once and a
    child that equals a parent takes what the parent has: a fifth of all rows at 128 steps of 200 tokens.
    """
    share = model.shares and cond is None
    pool = torch.cat([parents.x, kids]) if share and parents is not None else kids
    base = len(pool) - len(kids)
    if share:
        first, group = distinct(model.process.pack(pool))
    else:
        first = group = torch.arange(len(kids), device=kids.device)
    mine = group[base:]
    wanted = torch.zeros(len(first), dtype=torch.bool, device=kids.device).index_fill_(0, mine, True)
    held = parents if share and parents is not None else Known(kids[:0])
    pred = preds = None

    def conditions(rows: Tensor) -> Tensor | None:
        return None if cond is None else cond[rows]

    def predict(groups: Tensor) -> Tensor:
        rows = first[groups]
        return model.predict(pool[rows], i, conditions(rows))

    if i > 0 and (value is None or value.uses_prediction or steps):
        preds, computed = _table(held.pred, first, base, wanted, predict)
        model.count("shared", len(kids) - computed)
        pred = preds[mine]
    if value is None:
        return Known(kids, pred)
    if not value.by_state:
        return Known(kids, pred, value(ctx, model, kids, i, pred, noise, cond))

    def score(groups: Tensor) -> Tensor:
        rows = first[groups]
        known = None if preds is None else preds[groups]
        return value(ctx, model, pool[rows], i, known, noise, conditions(rows))

    values, computed = _table(held.value, first, base, wanted, score)
    if value.uses_prediction:
        ctx.meter.count("reward_shared", len(kids) - computed)
    return Known(kids, pred, values[mine])


def _terminal(ctx: Context, model: Model, x: Tensor, cond: Tensor | None) -> Tensor:
    return ctx.score(model, model.process.clean(x), cond)


@dataclass(frozen=True)
class Rollout:
    """Ancestral sampling: the E-step of on-policy methods and how a tuned model is evaluated."""

    keep: bool = True
    """Keep the whole trajectory (a trainer needs it) or x_0 alone."""
    on: str = "policy"
    """The model sampled: the policy, the pretrained one (`ref`), or a network of the loss by name."""
    log_prob: bool = False
    """Keep the column `log_prob` (T, B): log p(x_{i−1} | x_i) of the steps taken."""
    value: Value | None = None
    """Keep the columns `value` (T, B), V_i(x_i), and `gain` (T, B), V_{i−1}(x_{i−1}) − V_i(x_i)."""

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"sample"} | ({"step.log_prob"} if self.log_prob else set()))

    @torch.no_grad()
    def __call__(self, ctx: Context, noise: Noise, cond: Tensor | None = None) -> Batch:
        model, here = ctx.model(self.on), None
        x = model.process.prior(noise.fold(_PRIOR), dtype=model.dtype)
        states, chosen, values = [model.process.pack(x)], [], []
        for i in range(model.process.T, 0, -1):
            here = evaluate(ctx, model, here, x, i, noise.fold(i, _VALUE), self.value, cond, steps=True)
            step = here.step(model, i)
            x = step.sample(noise.fold(i, _CHILD))
            if self.log_prob:
                chosen.append(step.log_prob(x))
            values.append(here.value)
            states.append(model.process.pack(x))
        reward = _terminal(ctx, model, x, cond)
        batch = Batch(torch.stack(states if self.keep else states[-1:]), reward, cond=cond, keys=noise)
        if self.log_prob:
            batch.per_step["log_prob"] = torch.stack(chosen)
        if self.value is not None:
            value = torch.stack(values)  # type: ignore[arg-type]
            batch.per_step["value"] = value
            batch.per_step["gain"] = torch.cat([value[1:], reward.to(value)[None]]) - value
        return batch


@dataclass(frozen=True)
class Seeds:
    """No search at all: noise, from which a loss draws its samples itself, with their graph (DRaFT, DRAKES, FAV)."""

    requires = frozenset({"sample"})

    @torch.no_grad()
    def __call__(self, ctx: Context, noise: Noise, cond: Tensor | None = None) -> Batch:
        process = ctx.policy.process
        x = process.pack(process.prior(noise.fold(_PRIOR), dtype=ctx.policy.dtype))
        unknown = torch.full((len(noise),), torch.nan, dtype=ctx.policy.dtype, device=x.device)
        return Batch(torch.stack([x, x]), unknown, cond=cond, keys=noise, unit="sample")


@dataclass(frozen=True)
class TreeSearch:
    """M children for each parent and step, one of them picked by its weight: DAV's E-step, and SVDD without a tilt.

    log w = γ^k V(x_{i−1}) / α + log p(x_{i−1} | x_i) − log q(x_{i−1} | x_i) (dav.md A4); q is p tilted by the
    reward gradient with `guide`, else p itself.  One lineage for each sample: samples never meet, so neither the
    batch size nor its order matters.  Values are compared among siblings before they are scaled, so a constant
    added to the reward changes nothing.

    Network rows for each sample: 1 + (T − 1) M, or T + (T − 1) M with guidance; a reference anchor adds T.  An only
    child needs no weight: M = 1 takes T rows with or without guidance, and one reward beside those of the guidance.
    """

    width: int = 4
    alpha: float = 0.1
    gamma: float = 1.0
    guide: bool = False
    anchor: Literal["policy", "ref"] = "policy"
    select: Literal["sample", "argmax"] = "sample"
    reduce: Literal["sum", "mean"] = "sum"
    exponent: Literal["left-1", "left"] = "left-1"
    advance: Literal["sampled", "tree-value"] = "sampled"
    last: Literal["sample", "greedy"] = "sample"
    on: Literal["policy", "ref"] = "policy"
    value: Value = field(default_factory=PosteriorMean)
    keep: Literal["", "lookahead", "mean"] = ""
    """What a trainer needs beside the states: clean predictions of the winners, or means of the tilted steps."""

    @property
    def requires(self) -> frozenset[str]:
        needs = {"step"} | ({"step.tilt", "step.log_prob", "reward.grad"} if self.guide else set())
        return frozenset(needs | ({"reference", "step.log_prob"} if self.anchor == "ref" else set()))

    def _scale(self, i: int) -> float:
        return self.gamma ** (i - (self.exponent == "left-1")) / self.alpha

    def _proposal(
        self, ctx: Context, model: Model, parents: Known, i: int, noise: Noise, cond: Tensor | None
    ) -> tuple[Step, Step]:
        """(p, q) at the parents; guidance needs a graph, so there the prediction comes with the gradient."""
        if not self.guide:
            p = parents.step(model, i)
            return p, p
        first, group = torch.arange(len(parents.x)), None
        if model.shares and cond is None and self.value.grad_by_state:
            first, group = distinct(model.process.pack(parents.x))
            model.count("shared", len(parents.x) - len(first))
            ctx.meter.count("reward_shared", len(parents.x) - len(first))
        part = None if cond is None else cond[first]
        g, pred = self.value.grad(ctx, model, parents.x[first], i, noise[first].fold(i, _GUIDE), part)
        if not g.isfinite().all():
            raise NonFinite("the reward gradient", int((~g.isfinite()).sum()), g.numel())
        if group is not None:
            g, pred = g[group], pred[group]
        p = model.process.step(pred, parents.x, i)
        return p, p.tilt(self._scale(i) * g)

    def _expand(
        self, ctx: Context, model: Model, parents: Known, i: int, noise: Noise, cond: Tensor | None
    ) -> Expansion:
        width = self.width * (2 if self.last == "greedy" and i == 1 else 1)
        B = len(parents.x)
        p, q = self._proposal(ctx, model, parents, i, noise, cond)
        if not q.stochastic:  # equal children are one
            ctx.meter.count("reward_shared", B * (width - 1) if self.value.uses_prediction else 0)
            model.count("shared", B * (width - 1) if i > 1 and self.value.uses_prediction else 0)
            width = 1
        rows = torch.arange(B, device=parents.x.device).repeat_interleave(width)
        children = noise.fold(i, _CHILD).repeat(width)
        kids = q.take(rows).sample(children)
        many = None if cond is None else cond[rows]
        if self.width == 1 and i > 1 and self.keep != "lookahead" and self.advance == "sampled":
            # there is nothing to weigh; with guidance the gradient of the next step brings the prediction
            known = Known(kids) if self.guide else evaluate(ctx, model, parents, kids, i - 1, children, cond=many)
            return Expansion(known, kids.new_zeros(B, 1), q.mean if self.keep == "mean" else None)
        known = evaluate(ctx, model, parents, kids, i - 1, children.fold(_VALUE), self.value, many)
        if known.value is None:
            raise ValueError("tree search needs values")
        value = known.value.view(B, width)
        logw = self._scale(i) * (value - value.amax(1, keepdim=True))
        if self.anchor == "ref":
            p = evaluate(ctx, ctx.reference, None, parents.x, i, noise, cond=cond).step(ctx.reference, i)
        if p is not q:
            ratio = (p.take(rows).log_prob(kids) - q.take(rows).log_prob(kids)).view(B, width)
            logw = logw + (ratio / p.size if self.reduce == "mean" else ratio)
        if logw.isnan().any() or (logw == -torch.inf).all(1).any():
            raise NonFinite("search weights", int(logw.isnan().sum()), logw.numel())
        return Expansion(known, logw, self._mean(q, kids, logw) if self.keep == "mean" else None)

    @staticmethod
    def _mean(q: Step, kids: Tensor, logw: Tensor) -> Tensor:
        """E[x_{i−1}] of the tilted step: weighted children, with the proposal's own mean as control variate.

        Σ w_m c_m + (E_q[c] − Σ c_m / M): the bracket has expectation 0 and cancels what the children share by
        being drawn from q, so that where all weights are equal the estimate is q's mean, without noise.
        """
        w = logw.softmax(1) - 1 / logw.shape[1]
        kids = kids.view(*logw.shape, *kids.shape[1:])
        return q.mean + (w.view(*w.shape, *[1] * (kids.ndim - 2)) * kids).sum(1)

    def _pick(self, logw: Tensor, noise: Noise, i: int) -> Tensor:
        """(B,) column of the child to move to."""
        if self.select == "argmax" or (self.last == "greedy" and i == 1):
            return logw.argmax(1)
        return noise.fold(i, _PICK).categorical(logw)

    def _tree_value(
        self, ctx: Context, model: Model, kids: Known, pick: Tensor, i: int, noise: Noise, cond: Tensor | None
    ) -> tuple[Tensor, Expansion]:
        """The release's move (dav.md A.6, E3): to the sibling of largest own value plus that of its children.

        Only the picked child has children, so with positive rewards it wins and with negative ones it loses.
        """
        B = len(pick)
        value = kids.value.view(B, -1)  # type: ignore[union-attr]
        rows = torch.arange(B, device=pick.device)
        width = value.shape[1]
        grown = self._expand(ctx, model, kids.take(rows * width + pick), i - 1, noise, cond)
        gain = grown.kids.value.view(B, -1).sum(1, keepdim=True)  # type: ignore[union-attr]
        best = value.scatter_add(1, pick[:, None], gain).argmax(1)
        moved = (best != pick).nonzero()[:, 0]
        if len(moved):
            part = None if cond is None else cond[moved]
            again = self._expand(
                ctx, model, kids.take(moved * width + best[moved]), i - 1, noise[moved], part
            )
            grown = grown.put(moved, again)
        return best, grown

    @torch.no_grad()
    def __call__(self, ctx: Context, noise: Noise, cond: Tensor | None = None) -> Batch:
        model = ctx.policy if self.on == "policy" else ctx.reference
        process = model.process
        x = process.prior(noise.fold(_PRIOR), dtype=model.dtype)
        here = Known(x) if self.guide else evaluate(ctx, model, None, x, process.T, noise, cond=cond)
        states, kept, share = [process.pack(x)], [], []
        grown: Expansion | None = None
        for i in range(process.T, 0, -1):
            now = grown or self._expand(ctx, model, here, i, noise, cond)
            grown, logw = None, now.logw
            pick = self._pick(logw, noise, i)
            if self.advance == "tree-value" and i > 1:
                pick, grown = self._tree_value(ctx, model, now.kids, pick, i, noise, cond)
            here = now.kids.take(torch.arange(len(x), device=x.device) * logw.shape[1] + pick)
            if i > 1 and here.pred is None and not self.guide:  # a value that needed no prediction
                here = Known(
                    here.x, evaluate(ctx, model, None, here.x, i - 1, noise, cond=cond).pred, here.value
                )
            share.append(1 / (logw.softmax(1) ** 2).sum(1).mean() / logw.shape[1])
            states.append(process.pack(here.x))
            if self.keep:
                kept.append(self._clean(model, here, i - 1) if self.keep == "lookahead" else now.mean)
        scored = self.value.uses_prediction and here.value is not None
        return Batch(
            torch.stack(states),
            here.value if scored else _terminal(ctx, model, here.x, cond),  # type: ignore[arg-type]
            lookahead=torch.stack(kept) if self.keep == "lookahead" else None,
            mean=torch.stack(kept) if self.keep == "mean" else None,
            cond=cond,
            stats={"ess_share": float(torch.stack(share).mean())},
        )

    @staticmethod
    def _clean(model: Model, here: Known, i: int) -> Tensor:
        """Packed clean prediction of the chosen state (dav.md A.8: the release's target)."""
        if i == 0 or here.pred is None:
            return model.process.pack(here.x)
        return model.process.pack(here.step(model, i).mode)


@dataclass(frozen=True)
class BestOf:
    """The best of N plain samples for each slot."""

    n: int = 4

    requires = frozenset({"sample"})

    @torch.no_grad()
    def __call__(self, ctx: Context, noise: Noise, cond: Tensor | None = None) -> Batch:
        many = None if cond is None else cond.repeat_interleave(self.n, 0)
        batch = Rollout()(ctx, noise.repeat(self.n), many)
        best = batch.reward.view(-1, self.n).argmax(1)
        rows = torch.arange(len(noise), device=best.device) * self.n + best
        return Batch(batch.states[:, rows], batch.reward[rows], cond=cond)


@dataclass(frozen=True)
class RealSamples:
    """Real samples of a held-out split, drawn without replacement: the yardstick row of a table."""

    split: str = "test"

    requires = frozenset({"data"})

    @torch.no_grad()
    def __call__(self, ctx: Context, noise: Noise, cond: Tensor | None = None) -> Batch:
        if ctx.policy.data is None:
            raise ValueError("this model carries no real data")
        real = ctx.policy.data(self.split)
        order = Noise.of(int(noise.keys[0]), len(real)).uniform(1)[:, 0].argsort()
        x = real[order[: len(noise)].to(real.device)].to(ctx.policy.device)
        state = torch.nn.functional.pad(x, (0, 1)) if ctx.policy.process.kind == "masked" else x
        return Batch(ctx.policy.process.pack(state)[None], ctx.reward(x, cond), cond=cond)
