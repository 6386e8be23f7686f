"""Fixed points of methods, by sums over all states of a chain.

toy-tokens has 125 states.  toy-mixture lives on a line, here a grid fine enough that sums are integrals.  What a
search does to steps and what a fit makes of them is then linear algebra, written without the code of any method:
predictions of the pretrained model, the law of its steps and the reward are all that is taken.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dav_bench.core import GaussianProcess, MaskedProcess, Model

Look = str
"""What the reward is shown of a noisy state: `mode` or `mean`."""


@dataclass
class Chain(ABC):
    """States at each i and steps between them.

    A policy is a list over i = 0 ... T of what is trained at the states of i, from which `kernel` makes the log-law
    (S_i, C_i) of the children `child[i]` (S_i, C_i), numbers of states at i − 1.
    """

    model: Model
    reward: Callable[[Tensor], Tensor]
    states: list[Tensor]
    """(S_i, ...) as the network reads them, in float64."""
    child: list[Tensor]
    """(S_i, C_i); the first is unused."""
    start: Tensor
    """(S_T,) law of x_T."""

    def __post_init__(self) -> None:
        self.r = self.reward(self.model.process.clean(self.states[0]))
        self.reference = [torch.empty(0)] + [self.predict(i) for i in range(1, len(self.states))]

    @property
    def T(self) -> int:
        return len(self.states) - 1

    def predict(self, i: int) -> Tensor:
        """What the pretrained model predicts at the states of i."""
        with torch.no_grad():
            return self.model.predict(self.states[i], i)

    # ---- what depends on the kind of step
    @abstractmethod
    def kernel(self, i: int, policy: Tensor) -> Tensor:
        """(S_i, C_i) log-probabilities of the children under what is trained at i."""

    @abstractmethod
    def clean(self, i: int, policy: Tensor, look: Look) -> Tensor:
        """(S_i, ...) what the reward is shown of the states of i > 0."""

    @abstractmethod
    def project(self, i: int, log_q: Tensor, pull: float = 0.0) -> Tensor:
        """The policy closest to steps q: argmin E_q[−log p] + pull KL(p || reference) at each state."""

    @abstractmethod
    def tilt(self, i: int, value: Tensor, alpha: float) -> Tensor:
        """The policy that maximises E_p[value(x_{i−1})] − α KL(p || reference) at each state of i."""

    # ---- laws
    def law(self, kernels: Sequence[Tensor]) -> Tensor:
        """(S_0,) where the chain of log-kernels ends."""
        at = self.start
        for i in range(self.T, 0, -1):
            moved = at[:, None] * kernels[i].exp()
            size = len(self.states[i - 1])
            at = torch.zeros(size, dtype=at.dtype).index_add_(0, self.child[i].flatten(), moved.flatten())
        return at

    def kernels(self, policy: Sequence[Tensor]) -> list[Tensor]:
        return [torch.empty(0), *(self.kernel(i, policy[i]) for i in range(1, self.T + 1))]

    def of(self, policy: Sequence[Tensor]) -> Tensor:
        """(S_0,) law of a policy's samples."""
        return self.law(self.kernels(policy))

    def value(self, i: int, policy: Sequence[Tensor], look: Look) -> Tensor:
        """(S_i,) rewards of the clean predictions: the posterior-mean value."""
        return self.r if i == 0 else self.reward(self.clean(i, policy[i], look))

    def soft(self, alpha: float, policy: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Log-kernels p(x'|x) exp((v(x') − v(x)) / α) with the soft value v of that policy."""
        v, out = self.r / alpha, [torch.empty(0)]
        for i in range(1, self.T + 1):
            q = self.kernel(i, (policy or self.reference)[i]) + v[self.child[i]]
            v = q.logsumexp(1)
            out.append(q - v[:, None])
        return out

    def tilted(self, kernels: Sequence[Tensor], values: Callable[[int], Tensor]) -> list[Tensor]:
        """Log-kernels p(x'|x) exp(value(x')) / sum."""
        out = [torch.empty(0)]
        for i in range(1, self.T + 1):
            out.append((kernels[i] + values(i - 1)[self.child[i]]).log_softmax(1))
        return out

    def guided(self, scale: float, letters: bool = False) -> Tensor:
        """Steps p(x'|x) exp(scale <∇V(x), x'>) / sum, V the reward of the mean clean prediction."""
        kernels = [torch.empty(0)]
        for i in range(1, self.T + 1):
            lean = scale * self.inner(i, self.slope(i))
            log_q = self.kernel(i, self.reference[i]) + lean
            kernels.append(self.reordered(i, log_q) if letters else log_q.log_softmax(1))
        return self.law(kernels)

    def slope(self, i: int, step: float = 1e-4) -> Tensor:
        """(S_i, ...) gradient of the reward of the mean clean prediction at each state, by central differences."""
        x = self.states[i]
        g = torch.zeros_like(x)

        def value(at: Tensor) -> Tensor:
            with torch.no_grad():
                return self.reward(self.model.process.step(self.model.predict(at, i), at, i).x0)

        for k in range(x[0].numel()):
            h = torch.zeros_like(x[0]).flatten()
            h[k] = step
            g.view(len(x), -1)[:, k] = (value(x + h.view(x[0].shape)) - value(x - h.view(x[0].shape))) / (
                2 * step
            )
        return g

    def inner(self, i: int, g: Tensor) -> Tensor:
        """(S_i, C_i) products <g(x), x'> with each child."""
        kids = self.states[i - 1][self.child[i]]
        return (g[:, None] * kids).flatten(2).sum(-1)

    def reordered(self, i: int, log_q: Tensor) -> Tensor:
        """Steps whose choice of position is the reference's; what steps of other kinds do not have."""
        return log_q.log_softmax(1)

    # ---- what fits to them reach
    def rounds(self, k: int, alpha: float, look: Look = "mean", pull: float = 0.0) -> list[Tensor]:
        """k rounds of search with unlimited candidates from the current policy and a perfect fit (DAV)."""
        policy = list(self.reference)
        for _ in range(k):
            now = policy

            def value(i: int, now: Sequence[Tensor] = now) -> Tensor:
                return self.value(i, now, look) / alpha

            found = self.tilted(self.kernels(now), value)
            policy = [torch.empty(0), *(self.project(i, found[i], pull) for i in range(1, self.T + 1))]
        return policy

    def tilts(self, k: int, alpha: float) -> list[Tensor]:
        """k rounds of a perfect fit to own samples weighted by exp(r / α): p exp(k r / α) where steps are free."""
        policy = list(self.reference)
        for _ in range(k):
            found = self.soft(alpha, policy)
            policy = [torch.empty(0), *(self.project(i, found[i]) for i in range(1, self.T + 1))]
        return policy

    def control(self, alpha: float) -> list[Tensor]:
        """Policy of largest E[r] − α KL of the path."""
        v, policy = self.r, [torch.empty(0)]
        for i in range(1, self.T + 1):
            policy.append(self.tilt(i, v, alpha))
            p, ref = self.kernel(i, policy[i]), self.kernel(i, self.reference[i])
            v = (p.exp() * (v[self.child[i]] - alpha * torch.where(p > -math.inf, p - ref, 0.0))).sum(1)
        return policy

    def pulled(self, alpha: float) -> list[Tensor]:
        """Fixed point of a policy gradient whose KL counts at the states visited but not on the way there.

        Steps see E[r | x'] under the policy itself in place of the soft value (DPOK, GRPO).
        """
        q, policy = self.r, [torch.empty(0)]
        for i in range(1, self.T + 1):
            policy.append(self.tilt(i, q, alpha))
            q = (self.kernel(i, policy[i]).exp() * q[self.child[i]]).sum(1)
        return policy

    def expected(self, alpha: float) -> Tensor:
        """Steps of the reference tilted by E[r | x'], the value that a regression on rewards learns (SVDD-MC)."""
        v, kernels = [self.r], self.kernels(self.reference)
        for i in range(1, self.T):
            v.append((kernels[i].exp() * v[-1][self.child[i]]).sum(1))
        return self.law(self.tilted(kernels, lambda i: v[i] / alpha))

    def fitted(self, alpha: float, look: Look = "mean", by: str = "ref") -> list[Tensor]:
        """The policy closest to steps ref(x'|x) exp(V(x') / α), V by predictions of the reference or of the policy."""
        policy = [torch.empty(0)]
        for i in range(1, self.T + 1):
            ahead = self.reference if by == "ref" else policy
            policy.append(self.tilt(i, self.value(i - 1, ahead, look), alpha))
        return policy


class Tokens(Chain):
    """Masked sequences of which one position is revealed in each step; trained are letters given state and position."""

    @classmethod
    def of_model(cls, model: Model, reward: Callable[[Tensor], Tensor]) -> Tokens:
        process = model.process
        assert isinstance(process, MaskedProcess)
        L, V = process.length, process.vocab
        every = torch.cartesian_prod(*[torch.arange(V + 1)] * L)
        left = (every == V).sum(1)
        groups = [every[left == i] for i in range(L + 1)]
        weight = (V + 1) ** torch.arange(L)
        child = [torch.empty(0, dtype=torch.long)]
        for i in range(1, L + 1):
            number = {int(c): k for k, c in enumerate((groups[i - 1] * weight).sum(1))}
            rows = []
            for state in groups[i]:
                code = int((state * weight).sum())
                spots = (state == V).nonzero()[:, 0].tolist()
                rows.append([number[code + (v - V) * int(weight[s])] for s in spots for v in range(V)])
            child.append(torch.tensor(rows))
        states = [F.one_hot(g, V + 1).double() for g in groups]
        return cls(model, reward, states, child, torch.ones(1, dtype=torch.float64))

    def _masked(self, i: int) -> Tensor:
        """(S_i, L) which positions are masked."""
        return self.states[i][..., -1] > 0

    def predict(self, i: int) -> Tensor:
        """(S_i, i, V) log-letters at the masked positions."""
        letters = super().predict(i).log_softmax(-1)
        return letters[self._masked(i)].view(len(letters), i, -1)

    def kernel(self, i: int, policy: Tensor) -> Tensor:
        return policy.flatten(1) - math.log(i)

    def clean(self, i: int, policy: Tensor, look: Look) -> Tensor:
        shown = policy.exp() if look == "mean" else F.one_hot(policy.argmax(-1), policy.shape[-1]).double()
        x = self.states[i][..., :-1].clone()
        x[self._masked(i)] = shown.flatten(0, 1)
        return x

    def project(self, i: int, log_q: Tensor, pull: float = 0.0) -> Tensor:
        spots = log_q.view(len(log_q), i, -1)
        letters, share = spots.log_softmax(-1), spots.logsumexp(-1, keepdim=True).exp()
        if not pull:
            return letters
        ref = self.reference[i].exp()
        # stationary: −q_v + (pull / i) p_v (log p_v / ref_v − KL) + p_v Σ q = 0, by a few damped steps on the logits
        free = letters.clone().requires_grad_(True)
        opt = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-11, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            opt.zero_grad()
            p = free.log_softmax(-1)
            loss = (-share * letters.exp() * p + pull / i * p.exp() * (p - ref.log())).sum()
            loss.backward()
            return loss

        opt.step(closure)
        return free.detach().log_softmax(-1)

    def tilt(self, i: int, value: Tensor, alpha: float) -> Tensor:
        return (self.reference[i] + (value / alpha)[self.child[i]].view_as(self.reference[i])).log_softmax(-1)

    def reordered(self, i: int, log_q: Tensor) -> Tensor:
        return self.kernel(i, log_q.view(len(log_q), i, -1).log_softmax(-1))


class Line(Chain):
    """A Gaussian chain in one dimension, on a grid; trained are the clean predictions, which move the means.

    The last step has no noise, so a policy gradient or a likelihood says nothing about it: it stays as it is.
    """

    @classmethod
    def of_model(
        cls, model: Model, reward: Callable[[Tensor], Tensor], reach: float = 5.5, points: int = 441
    ) -> Line:
        process = model.process
        assert isinstance(process, GaussianProcess)
        x = torch.linspace(-reach, reach, points, dtype=torch.float64)[:, None]
        with torch.no_grad():
            last = process.step(model.predict(x, 1), x, 1).mean
        states = [last, *[x] * process.T]
        straight = torch.arange(points)
        child = [torch.empty(0, dtype=torch.long), straight[:, None]]
        child += [straight.expand(points, -1)] * (process.T - 1)
        return cls(model, reward, states, child, (-(x[:, 0] ** 2) / 2).softmax(0))

    def predict(self, i: int) -> Tensor:
        return super().predict(i)

    def _step(self, i: int, policy: Tensor) -> tuple[Tensor, Tensor]:
        """(S_i, 1) mean and standard deviation."""
        step = self.model.process.step(policy, self.states[i], i)
        return step.mean, step.std.view(-1, 1).expand_as(step.mean)  # type: ignore[union-attr]

    def kernel(self, i: int, policy: Tensor) -> Tensor:
        if i == 1:
            return torch.zeros(len(policy), 1, dtype=policy.dtype)
        mean, std = self._step(i, policy)
        return (-(((self.states[i - 1][:, 0] - mean) / std) ** 2) / 2).log_softmax(1)

    def clean(self, i: int, policy: Tensor, look: Look) -> Tensor:
        return policy

    def _to(self, i: int, mean: Tensor) -> Tensor:
        """The prediction whose step has that mean: steps are linear in the prediction."""
        zero, one = (self._step(i, torch.full_like(mean, at))[0] for at in (0.0, 1.0))
        return (mean - zero) / (one - zero)

    def project(self, i: int, log_q: Tensor, pull: float = 0.0) -> Tensor:
        """E_q[x'] and the reference's mean, weighed 1 to `pull`: both terms are squared distances of means."""
        if i == 1:
            return self.reference[1]
        mean = log_q.exp() @ self.states[i - 1]
        ref = self._step(i, self.reference[i])[0]
        return self._to(i, (mean + pull * ref) / (1 + pull))

    def tilt(self, i: int, value: Tensor, alpha: float) -> Tensor:
        """m = μ + s² E_{N(m, s²)}[value'] / α, by iteration."""
        return self.lean(i, torch.gradient(value, spacing=(self.states[i - 1][:, 0],))[0], alpha)

    def lean(self, i: int, slope: Tensor, alpha: float) -> Tensor:
        """The policy whose mean is moved by s² E[slope(x')] / α, with x' its own."""
        if i == 1:
            return self.reference[1]
        mean, std = self._step(i, self.reference[i])
        policy = self.reference[i]
        for _ in range(100):
            told = self._to(i, mean + std**2 * (self.kernel(i, policy).exp() @ slope[:, None]) / alpha)
            if (told - policy).abs().max() < 1e-5:
                break
            policy = 0.3 * policy + 0.7 * told
        return policy

    def adjoint(self, alpha: float) -> list[Tensor]:
        """Fixed point of adjoint matching: steps follow the adjoint where they arrive, E[A_{i−1}(x')] / α.

        A_0 = r' and A_i(x) = μ_i'(x) E[A_{i−1}(x')]: carried back through means of the reference, over paths of the
        policy.  In the limit of many steps this is the optimal control; with few it is not.
        """
        x, first = self.states[1][:, 0], self.states[0][:, 0]
        (a,) = torch.gradient(self.r, spacing=(first,))
        policy = [torch.empty(0)]
        for i in range(1, self.T + 1):
            policy.append(self.lean(i, a, alpha))
            (jacobian,) = torch.gradient(self._step(i, self.reference[i])[0][:, 0], spacing=(x,))
            a = jacobian * (self.kernel(i, policy[i]).exp() * a[self.child[i]]).sum(1)
        return policy
