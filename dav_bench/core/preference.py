"""Preference pairs and the losses that fit them: Diffusion-DPO and its form for masked tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Model
from .noise import Noise
from .protocols import Batch, Context, Item, Loss
from .search import Rollout

_TIME, _NOISE, _LABEL = 1, 2, 3  # purposes of noise


def preferred(better: Tensor, worse: Tensor, scale: float) -> Tensor:
    """P(first wins) = σ((r_1 − r_2) / s), the law of Bradley and Terry."""
    return ((better - worse) / scale).sigmoid()


def preference_loss(logit: Tensor, clip: float | None = None) -> Tensor:
    """−log σ(logit): the negative log-likelihood of a label whose log-odds are `logit`."""
    return -F.logsigmoid(logit if clip is None else logit.clamp(-clip, clip))


@dataclass(frozen=True)
class Pairs:
    """Pairs of samples, one of them preferred by its reward: an E-step that searches nothing.

    Each slot draws n samples and makes a pair of any two of them, n (n − 1) / 2: as an average over pairs they have
    the expectation of one pair with less noise.  `best-worst` makes one.
    Pairs of equal reward say nothing about it: they get weight 0, the others the weight that keeps the mean one
    over the pairs that are left.
    """

    n: int = 2
    """Samples of each slot (prompt)."""
    label: Literal["bradley-terry", "soft", "hard", "best-worst"] = "bradley-terry"
    """First wins with chance σ((r_1 − r_2) / scale); both orders are fitted, each with its chance (`soft`, the
    expectation of the former); the larger reward wins; or best against worst of the n."""
    scale: float = 1.0
    """Temperature of the labels: DPO with β then has the optimum p_ref exp(r / (scale β)) / Z."""
    on: Literal["policy", "ref"] = "ref"
    """Model that draws: the pretrained one, or the current one (online)."""

    requires = frozenset({"sample"})

    def __post_init__(self) -> None:
        if self.n < 2 or not self.scale > 0:
            raise ValueError(f"pairs need n >= 2 and scale > 0, not n = {self.n} and scale = {self.scale}")

    def _pick(self, reward: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """(S, P) columns of winners and losers of rewards (S, n)."""
        if self.label == "best-worst":
            return reward.argmax(1, keepdim=True), reward.argmin(1, keepdim=True)
        first, second = torch.combinations(torch.arange(self.n, device=reward.device)).T
        a, b = reward[:, first], reward[:, second]
        if self.label in ("hard", "soft"):
            wins = a >= b
        else:
            chance = preferred(a, b, self.scale)
            wins = noise.fold(_LABEL).uniform(a.shape[1], dtype=chance.dtype) < chance
        return torch.where(wins, first, second), torch.where(wins, second, first)

    @torch.no_grad()
    def __call__(self, ctx: Context, noise: Noise, cond: Tensor | None = None) -> Batch:
        many = None if cond is None else cond.repeat_interleave(self.n, 0)
        drawn = Rollout(keep=False, on=self.on)(ctx, noise.repeat(self.n), many)
        reward, x = drawn.reward.view(-1, self.n), drawn.states[-1]
        win, lose = self._pick(reward, noise)
        gap = (reward.gather(1, win) - reward.gather(1, lose)).flatten()
        rows = torch.arange(len(noise), device=x.device)[:, None] * self.n
        win, lose = (rows + win).flatten(), (rows + lose).flatten()
        told = gap != 0
        weight = told.to(gap) * (len(gap) / told.sum().clamp_min(1))
        stats = {
            "ties": float((~told).sum()),
            "flipped": float((gap < 0).sum() / told.sum().clamp_min(1)),  # labels against the reward
            "reward_gap": float(gap.mean()),
        }
        columns = {"loser": x[lose], "weight": weight, "gap": gap}
        if self.label == "soft":
            columns["chance"] = (gap / self.scale).sigmoid()
        return Batch(
            x[win][None],
            drawn.reward[win],
            cond=None if many is None else many[win],
            stats=stats,
            unit="sample",
            per_sample=columns,
        )


@dataclass(frozen=True, eq=False)
class KnownPairs:
    """Pairs that were collected before, drawn without replacement in each round; their rewards stay unknown."""

    winner: Tensor
    """(N, L) token ids."""
    loser: Tensor
    """(N, L)."""
    cond: Tensor | None = None
    """(N,) conditions of the model."""
    ties: int = 0
    """Pairs left out because both are equal."""

    requires = frozenset({"sample"})

    @torch.no_grad()
    def __call__(self, ctx: Context, noise: Noise, cond: Tensor | None = None) -> Batch:
        process = ctx.policy.process
        length, vocab = getattr(process, "length", None), getattr(process, "vocab", 0)
        if length != self.winner.shape[1] or int(torch.maximum(self.winner, self.loser).max()) >= vocab:
            raise ValueError(
                f"the pairs are sequences of {self.winner.shape[1]} tokens, "
                + (f"the model makes {length} of {vocab} kinds" if length else "the model makes no sequences")
            )
        device = noise.keys.device
        order = Noise.of(int(noise.keys[0]), len(self.winner)).uniform(1)[:, 0].argsort()[: len(noise)]
        x, y = (
            process.pack(F.one_hot(ids[order], vocab + 1)).to(device) for ids in (self.winner, self.loser)
        )
        ones = torch.ones(len(order), device=device)
        return Batch(
            x[None],
            torch.full_like(ones, torch.nan),
            cond=None if self.cond is None else self.cond[order].to(device),
            stats={"ties": float(self.ties)},
            unit="sample",
            per_sample={"loser": y, "weight": ones},
        )


@dataclass(frozen=True)
class Preference(Loss):
    """DPO on denoising errors: winners denoised better than by the reference, losers worse.

    With ℓ(x) the error of one noisy state of x (squared error of the noise; on tokens one term of the negative
    ELBO in nats) and g = ℓ_ref − ℓ_θ what the policy gains on it, the loss is −log σ(b (g(winner) − g(loser))).
    Gaussian: b = B / 2 and errors averaged over dimensions (arXiv 2311.12908 as in SalesforceAIResearch/DiffusionDPO,
    train.py).  Tokens: g is the log-ratio of the masked tokens over t (D2-DPO, arXiv 2503.08295), whose mean over
    t and masks is what the ELBO of the policy exceeds that of the reference by.  Both samples of a pair see one t
    and one noise or pattern of masks, which cancels most of the variance.
    """

    beta: float | None = None
    """B on Gaussian noise, inverse temperature on tokens; None: 5000 (released code) and 1."""
    reduce: Literal["paper", "sum", "mean"] = "paper"
    """Errors over dimensions: the mean on Gaussian noise and the sum on tokens as published, or one for both."""
    draws: int = 1
    """Noisy states of each sample: draws of t and of noise or masks."""
    average: Literal["loss", "logit"] = "loss"
    """Average the draws of a pair outside the sigmoid (published; a bound by Jensen) or inside, as the ELBO does."""
    times: Literal["uniform", "antithetic", "stratified", "path"] = "uniform"
    """Times of the draws of a pair: independent, in pairs t and 1 − t, or evenly spaced from a random start.  `path`
    (tokens) is all T states of one way of unmasking, inside the sigmoid, each token scored where it is revealed:
    where one is revealed at a time and the conditionals belong to one law, that is its log-likelihood, exactly."""
    sft: float = 0.0
    """Weight of the winners' own denoising error, which keeps their likelihood from falling with the losers'."""
    clip: float | None = None
    """Bound on logits; beyond it a pair has no gradient."""

    requires = frozenset({"corrupt", "reference"})

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, not {self.draws}")

    def prepare(self, ctx: Context, batch: Batch, noise: Noise) -> None:
        if "loser" not in batch.per_sample:
            raise ValueError("a preference loss needs pairs; use the searcher Pairs")

    def active(self, batch: Batch) -> Tensor:
        return batch.per_sample["weight"] > 0

    def levels(self, noise: Noise, T: int) -> Tensor:
        """(b, draws) grid indices in 1 … T."""
        if self.times == "path":
            return torch.arange(1, T + 1, device=noise.keys.device).expand(len(noise), T)
        u = noise.uniform(self.draws)
        if self.times == "antithetic":
            half = (self.draws + 1) // 2
            u = torch.cat([u[:, :half], 1 - u[:, :half]], 1)[:, : self.draws]
        elif self.times == "stratified":
            u = (u[:, :1] + torch.arange(self.draws, device=u.device) / self.draws) % 1
        return (u * T).long().clamp_max(T - 1) + 1

    def scale(self, model: Model) -> tuple[float, float]:
        """(b, factor that turns `process.loss` into the error this loss speaks of)."""
        size = model.process.length if model.process.kind == "masked" else 1  # type: ignore[union-attr]
        if model.process.kind == "masked":
            return self.beta if self.beta is not None else 1.0, 1 / size if self.reduce == "mean" else 1.0
        dims = torch.Size(model.process.shape).numel()  # type: ignore[union-attr]
        return (5000.0 if self.beta is None else self.beta) / 2, float(dims) if self.reduce == "sum" else 1.0

    @staticmethod
    def errors(
        model: Model,
        clean: tuple[Tensor, Tensor],
        noisy: tuple[Tensor, Tensor],
        i: Tensor,
        cond: Tensor | None,
        fresh: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(n,) `process.loss` of winners and losers, or T times the negative log-probability of the tokens revealed
        next, `fresh` (n, L); noisy states that are equal in both share a prediction."""
        x, y = noisy
        rows = (x != y).flatten(1).any(1).nonzero()[:, 0]
        many = None if cond is None else torch.cat([cond, cond[rows]])
        pred = model.predict(torch.cat([x, y[rows]]), torch.cat([i, i[rows]]), many)
        model.count("shared", len(y) - len(rows))
        if torch.is_grad_enabled():
            model.count("backward", len(pred))
        first = pred[: len(x)]
        second = first.index_copy(0, rows, pred[len(x) :])
        if fresh is None:
            loss = model.process.loss
            return loss(first, clean[0], x, i), loss(second, clean[1], y, i)
        told = [(x0 * pred.log_softmax(-1)).sum(-1) for x0, pred in zip(clean, (first, second), strict=True)]
        return -model.process.T * (told[0] * fresh).sum(1), -model.process.T * (told[1] * fresh).sum(1)

    def logits(
        self, ctx: Context, clean: tuple[Tensor, Tensor], noisy: tuple[Tensor, Tensor], i: Tensor,
        cond: Tensor | None = None, fresh: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(n,) logits b (g(winner) − g(loser)) of given noisy states, g(winner), and ℓ_θ(winner)."""
        with torch.no_grad():
            known = self.errors(ctx.reference, clean, noisy, i, cond, fresh)
        won, lost = self.errors(ctx.policy, clean, noisy, i, cond, fresh)
        b, unit = self.scale(ctx.policy)
        gain = unit * (known[0] - won)
        return b * (gain - unit * (known[1] - lost)), gain, unit * won

    def __call__(self, ctx: Context, item: Item) -> Tensor:
        if item.noise is None:
            raise ValueError("a preference loss draws times and noise; its items need streams")
        process, path = ctx.policy.process, self.times == "path"
        if path and process.kind != "masked":
            raise ValueError("times='path' is a way of unmasking; this model has no masks")
        i = self.levels(item.noise.fold(_TIME), process.T)
        d, i = i.shape[1], i.flatten()
        rows = torch.arange(len(item.final), device=i.device).repeat_interleave(d)
        streams = item.noise.fold(_NOISE)[rows] if path else item.noise.fold(_NOISE).repeat(d)
        cond = None if item.cond is None else item.cond.repeat_interleave(d, 0)
        pair = (item.final, ctx.policy.unpack(item.columns["loser"]))
        clean = tuple(process.clean(x).repeat_interleave(d, 0) for x in pair)
        noisy = tuple(process.corrupt(x, i, streams) for x in clean)
        fresh = None
        if (
            path
        ):  # masks of one stream are nested: what is masked at i and not at i − 1 is revealed in between
            fresh = noisy[0][..., -1] - process.corrupt(clean[0], i - 1, streams)[..., -1]
        each, gain, error = self.logits(ctx, clean, noisy, i, cond, fresh)  # type: ignore[arg-type]
        each, gain, error = (v.view(-1, d) for v in (each, gain, error))
        logit = each if self.average == "loss" and not path else each.mean(1, keepdim=True)
        item.note("accuracy", (each.mean(1).sign() + 1) / 2)  # a half where nothing was learned yet
        item.note("winner_gain", gain.mean(1))
        if self.clip is not None:
            item.note("clipped", (logit.abs() > self.clip).double().mean(1))
        loss = preference_loss(logit, self.clip)
        if (chance := item.columns.get("chance")) is not None:
            loss = chance[:, None] * loss + (1 - chance[:, None]) * preference_loss(-logit, self.clip)
        loss = loss.mean(1)
        return item.columns["weight"].to(loss) * (loss + self.sft * error.mean(1) if self.sft else loss)
