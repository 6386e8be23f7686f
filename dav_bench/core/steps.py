"""Step distributions: the law p(x_{i-1} | x_i), the one object that search and training share.

Both laws answer the same five questions (`sample`, `rsample`, `log_prob`, `kl`, `tilt`), so that no algorithm
asks whether it works on pixels or on tokens.  Guidance is the exponential tilt exp<g, x>: a shifted mean for a
Gaussian, shifted logits for tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .noise import Noise


def _rows(x: Tensor) -> Tensor:
    """(B,) sums over everything but the batch, in float32 or better."""
    return (x if x.dtype == torch.float64 else x.float()).flatten(1).sum(1)


@dataclass(frozen=True)
class GaussianStep:
    """N(mean, std²).  Rows with std = 0 are deterministic: they have no density and add nothing to a log-prob."""

    mean: Tensor
    """(B, ...)."""
    std: Tensor
    """(B, 1, ...), the same for all dimensions of a sample."""
    x0: Tensor
    """(B, ...) clean prediction E[x_0 | x_i]."""

    @property
    def mode(self) -> Tensor:
        """(B, ...) the clean prediction a reward is shown."""
        return self.x0

    @property
    def size(self) -> int:
        """Dimensions of a sample, what a mean log-probability divides by."""
        return self.mean[0].numel()

    @property
    def stochastic(self) -> bool:
        return bool((self.std > 0).all())

    def take(self, index: Tensor) -> GaussianStep:
        return GaussianStep(self.mean[index], self.std[index], self.x0[index])

    def sample(self, noise: Noise) -> Tensor:
        return self.rsample(noise).detach()

    def rsample(self, noise: Noise, tau: float = 1.0, soft: bool = False, drawn: bool = False) -> Tensor:
        """A sample as a function of the mean; the other arguments are for tokens."""
        return self.mean + self.std * noise.normal(*self.mean.shape[1:], dtype=self.mean.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        live = self.std > 0
        std = torch.where(live, self.std, torch.ones_like(self.std))
        z = (x - self.mean) / std
        return _rows(
            torch.where(live, -0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi), torch.zeros_like(z))
        )

    def expected_log_prob(self, mean: Tensor) -> Tensor:
        """E[log_prob(x)] over any x with this mean, (B,), up to its variance, which no parameter touches."""
        return self.log_prob(mean)

    def kl(self, other: GaussianStep) -> Tensor:
        """KL(self || other), (B,).  Equal deterministic rows give 0."""
        live = (self.std > 0) & (other.std > 0)
        s, o = (torch.where(live, d.std, torch.ones_like(d.std)) for d in (self, other))
        term = (o / s).log() + (s**2 + (self.mean - other.mean) ** 2) / (2 * o**2) - 0.5
        return _rows(torch.where(live, term, torch.zeros_like(term)))

    def tilt(self, g: Tensor, rate: bool = False) -> GaussianStep:
        """N(m, s²) exp<g, x> = N(m + s² g, s²); `rate` has no meaning here."""
        return replace(self, mean=self.mean + self.std**2 * g)


@dataclass(frozen=True)
class MaskedStep:
    """Each masked position is revealed with chance `reveal`, its token drawn from `log_probs`; the rest is copied."""

    log_probs: Tensor
    """(B, L, V) normalised log p(x_0 = v | x_i); no mask class (SUBS)."""
    reveal: Tensor
    """(B, 1, 1) or (B, L, 1) chance that a masked position is revealed in this step."""
    x: Tensor
    """(B, L, V + 1) the current state, mask last."""

    @property
    def masked(self) -> Tensor:
        """(B, L, 1), 1 at masked positions; fractional for a relaxed state."""
        return self.x[..., -1:]

    @property
    def x0(self) -> Tensor:
        """(B, L, V) posterior mean: revealed tokens kept, token probabilities elsewhere."""
        return self.x[..., :-1] + self.masked * self.log_probs.exp()

    @property
    def mode(self) -> Tensor:
        """(B, L, V) one-hot: the likeliest token at masked positions."""
        best = F.one_hot(self.log_probs.argmax(-1), self.log_probs.shape[-1]).to(self.x.dtype)
        return torch.where(self.masked > 0, best, self.x[..., :-1])

    @property
    def size(self) -> int:
        """Positions of a sample, what a mean log-probability divides by."""
        return self.x.shape[1]

    @property
    def stochastic(self) -> bool:
        return True

    def take(self, index: Tensor) -> MaskedStep:
        return replace(self, log_probs=self.log_probs[index], reveal=self.reveal[index], x=self.x[index])

    def clean(self, noise: Noise) -> Tensor:
        """(B, L, V) one draw of x_0 from independent positions, a rollout of a single step."""
        return replace(self, reveal=torch.ones_like(self.reveal)).sample(noise)[..., :-1]

    def _law(self) -> Tensor:
        """(B, L, V + 1) log-probabilities of a masked position: tokens, then staying masked."""
        reveal = self.reveal.expand(*self.log_probs.shape[:-1], 1)
        return torch.cat([reveal.log() + self.log_probs, torch.log1p(-reveal)], -1)

    def sample(self, noise: Noise) -> Tensor:
        """(B, L, V + 1) one-hot, by inversion: one uniform number for each position."""
        cdf = self.log_probs.detach().exp().cumsum(-1)
        cdf = self.reveal * (cdf / cdf[..., -1:])
        u = noise.uniform(self.x.shape[1], dtype=cdf.dtype)
        token = (u[..., None] >= cdf).sum(-1, keepdim=True)
        drawn = torch.zeros_like(self.x).scatter_(-1, token, 1.0)
        return torch.where(self.masked > 0, drawn, self.x)

    def rsample(self, noise: Noise, tau: float = 1.0, soft: bool = False, drawn: bool = False) -> Tensor:
        """(B, L, V + 1) Gumbel-softmax: straight through (hard forward, soft backward), or `soft` both ways.

        A relaxed state is drawn anew to the share that is masked in it and copied to the rest.  Where its largest
        class is a token it counts as revealed, so that the draw is that token or the mask (DRAKES,
        drakes_dna/diffusion_gosai_update.py).  There the mask is one class among the others and takes most of a
        token's gradient; `drawn` draws first what is revealed, which no parameter touches, and relaxes tokens alone.
        """
        gumbel = noise.gumbel(*self.x.shape[1:], dtype=self.x.dtype)
        law = self._law()
        if drawn:
            u = (-(-gumbel[..., -1:]).exp()).exp()  # the number of the mask, made uniform again
            shown = u <= self.reveal
            low = torch.full_like(law, -math.inf)
            tokens = torch.cat([self.log_probs, low[..., -1:]], -1)
            law = torch.where(shown, tokens, torch.cat([low[..., :-1], torch.zeros_like(self.masked)], -1))
        elif soft:
            mask = law.shape[-1] - 1
            top = self.x.argmax(-1, keepdim=True)
            kept = torch.full_like(law[..., :-1], -math.inf).scatter(-1, top.clamp_max(mask - 1), 0.0)
            held = torch.cat([kept + self.reveal.log(), law[..., -1:]], -1)
            law = torch.where(top == mask, law, held)
        new = ((law.clamp_min(-1e6) + gumbel) / tau).softmax(-1)
        if soft:
            return self.masked * new + (1 - self.masked) * self.x
        hard = F.one_hot(new.argmax(-1), new.shape[-1]).to(new.dtype)
        masked = self.masked.detach()
        return masked * (hard + (new - new.detach())) + (1 - masked) * self.x

    def log_prob(self, x: Tensor) -> Tensor:
        """(B,) for one-hot `x`; −inf where a revealed position differs from the present state."""
        law = self._law()
        inside = torch.where(x > 0, x * law, torch.zeros_like(law)) * (self.masked > 0)
        moved = ((x - self.x).abs().sum(-1) > 1e-6) & (self.masked[..., 0] <= 0)
        return _rows(inside).masked_fill(moved.any(-1), -math.inf)

    @property
    def mean(self) -> Tensor:
        """(B, L, V + 1) E[x_{i−1} | x_i]: the probabilities of each position."""
        return torch.where(self.masked > 0, self._law().exp(), self.x)

    def expected_log_prob(self, mean: Tensor) -> Tensor:
        """E[log_prob(x)] over any x with this mean, (B,): the law is linear in one-hot x."""
        law = self._law()
        return _rows(torch.where(mean != 0, mean * law, torch.zeros_like(law)) * (self.masked > 0))

    def kl(self, other: MaskedStep) -> Tensor:
        """KL(self || other), (B,): token laws at the rate of reveal, and the rates where a tilt changed them.

        A position of a relaxed state counts to the share that is masked in it.
        """
        p, q, r, s = self.log_probs, other.log_probs, self.reveal, other.reveal
        stay = torch.where(r < 1, (1 - r) * (torch.log1p(-r) - torch.log1p(-s)), torch.zeros_like(r * s))
        rate = r * (r.log() - s.log()) + stay
        return _rows(self.masked.detach() * (r * (p.exp() * (p - q)).sum(-1, keepdim=True) + rate))

    def tilt(self, g: Tensor, rate: bool = False) -> MaskedStep:
        """p(x) exp<g, x>.

        `rate=False` tilts the token law given a reveal and leaves the rate (DAV's guidance, dav.md A3);
        `rate=True` is the full tilt with the mask as one more class (TDS).  g: (B, L, V) or (B, L, V + 1).
        """
        tokens = self.log_probs + g[..., : self.log_probs.shape[-1]]
        mass = tokens.logsumexp(-1, keepdim=True)
        if not rate:
            return replace(self, log_probs=tokens - mass)
        stay = torch.log1p(-self.reveal) + (g[..., -1:] if g.shape[-1] == self.x.shape[-1] else 0.0)
        return replace(self, log_probs=tokens - mass, reveal=(self.reveal.log() + mass - stay).sigmoid())


@dataclass(frozen=True)
class SingleRevealStep(MaskedStep):
    """Reveals exactly one masked position, drawn from `order`: the chain of independent tokens is then exact.

    Revealing several positions at once draws them independently, which no sequence model means; one at a time
    in random order, the reverse chain has the law of the model itself.  `reveal` is unused (ones).
    """

    order: Tensor
    """(B, L) log-probability that a position is the one revealed; −inf where nothing is masked."""

    def take(self, index: Tensor) -> SingleRevealStep:
        return SingleRevealStep(self.log_probs[index], self.reveal[index], self.x[index], self.order[index])

    @classmethod
    def uniform(cls, log_probs: Tensor, x: Tensor) -> SingleRevealStep:
        masked = x[..., -1] > 0
        order = torch.where(masked, 0.0, -math.inf).to(log_probs.dtype).log_softmax(-1)
        return cls(log_probs, torch.ones_like(x[:, :1, :1]), x, order)

    def clean(self, noise: Noise) -> Tensor:
        return MaskedStep(self.log_probs, self.reveal, self.x).sample(noise)[..., :-1]

    def _alive(self) -> Tensor:
        """(B, 1) False for a sequence with nothing left to reveal, which is copied."""
        return (self.masked[..., 0] > 0).any(-1, keepdim=True)

    def sample(self, noise: Noise) -> Tensor:
        order = torch.where(self._alive(), self.order, torch.zeros_like(self.order))
        position = noise.fold(1).categorical(order)
        full = MaskedStep(self.log_probs, self.reveal, self.x).sample(noise.fold(2))
        chosen = F.one_hot(position, self.x.shape[1])[..., None] > 0
        return torch.where(chosen, full, self.x)

    def rsample(self, noise: Noise, tau: float = 1.0, soft: bool = False, drawn: bool = False) -> Tensor:
        order = torch.where(self._alive(), self.order, torch.zeros_like(self.order))
        chosen = F.one_hot(noise.fold(1).categorical(order), self.x.shape[1])[..., None] > 0
        full = MaskedStep(self.log_probs, self.reveal, self.x).rsample(noise.fold(2), tau, soft, drawn)
        return torch.where(chosen, full, self.x)

    def log_prob(self, x: Tensor) -> Tensor:
        fresh = ((x - self.x).abs().sum(-1) > 1e-6).to(self.x.dtype)
        legal = ((fresh.sum(-1) == 1) & ((fresh * (self.masked[..., 0] <= 0)).sum(-1) == 0)) | (
            ~self._alive()[:, 0] & (fresh.sum(-1) == 0)
        )
        token = torch.where(
            x[..., :-1] > 0, x[..., :-1] * self.log_probs, torch.zeros_like(self.log_probs)
        ).sum(-1)
        value = torch.where(fresh > 0, token + self.order, torch.zeros_like(token))
        return _rows(value).masked_fill(~legal | (x[..., -1] * fresh).any(-1), -math.inf)

    @property
    def mean(self) -> Tensor:
        """(B, L, V + 1): a position is revealed with the chance that it is the one."""
        chance = torch.where(self.masked > 0, self.order.exp()[..., None], torch.zeros_like(self.masked))
        fresh = torch.cat([chance * self.log_probs.exp(), 1 - chance], -1)
        return torch.where(self.masked > 0, fresh, self.x)

    def expected_log_prob(self, mean: Tensor) -> Tensor:
        law = self.log_probs + self.order[..., None]
        inside = torch.where(
            (self.masked > 0) & (mean[..., :-1] != 0), mean[..., :-1] * law, torch.zeros_like(law)
        )
        return _rows(inside)

    def kl(self, other: MaskedStep) -> Tensor:
        theirs = other.order if isinstance(other, SingleRevealStep) else self.order
        p, q = self.log_probs, other.log_probs
        per = (p.exp() * (p - q)).sum(-1) + torch.where(self.order > -math.inf, self.order - theirs, 0.0)
        return _rows(torch.where(self.order > -math.inf, self.order.exp() * per, torch.zeros_like(per)))

    def tilt(self, g: Tensor, rate: bool = False) -> SingleRevealStep:
        tokens = self.log_probs + g[..., : self.log_probs.shape[-1]]
        mass = tokens.logsumexp(-1, keepdim=True)
        if not rate:
            return replace(self, log_probs=tokens - mass)
        # staying masked has weight exp(g_mask) at every position but one: only the difference matters
        gain = mass[..., 0] - (g[..., -1] if g.shape[-1] == self.x.shape[-1] else 0.0)
        order = torch.where(self.order > -math.inf, self.order + gain, self.order)
        return replace(self, log_probs=tokens - mass, order=order.log_softmax(-1))


Step = GaussianStep | MaskedStep
