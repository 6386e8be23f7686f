"""Worlds whose right answers are known, and distances of samples to them.

    world = world_of("tfbind8")          # or world(model, reward, alpha)
    world.log_z(), world.best(), world.kl()
    world.distance(samples)              # 0 at the target without bias, 1 at the pretrained model
    world.null(len(samples))             # where the distance of exact samples lies

A law is a set of points with probabilities: all sequences of a token world, quadrature nodes of a Gaussian one.  The
target of a chain is its own tilt: what it samples, not what it was derived from, times exp(r / α).  Everything is in
float64 on the CPU; networks are copied, so nothing here is metered or changes a model.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from dav_bench.builtin.models.mixture import MixtureNetwork
from dav_bench.builtin.models.tokens import TokenNetwork
from dav_bench.builtin.multilinear import letters
from dav_bench.builtin.toy import Exact
from dav_bench.core import (
    Batch,
    Context,
    ExactValue,
    GaussianProcess,
    MaskedProcess,
    Meter,
    MeteredReward,
    Method,
    Model,
    Noise,
    Reward,
    Rollout,
    Value,
)
from dav_bench.core.steps import SingleRevealStep, Step
from dav_bench.errors import DavBenchError

SAME = 0.4
"""Likeness of two different tokens at one position, where equal ones have 1: the kernel of token worlds."""
REACH = 6.5
"""Half-width of the grid of a Gaussian world, in standard deviations of the noise; more where its modes need it."""
NODES = {1: 1024, 2: 128}
"""Grid points for each dimension, by number of dimensions."""
_CHUNK = 4096
_FAINT = 1e-10  # nodes with less mass are left out, for speed


@dataclass(frozen=True, eq=False)
class Law:
    """Points x (G, ...) with probabilities p (G,)."""

    x: Tensor
    p: Tensor

    def mean(self, values: Tensor) -> float:
        """Expectation of (G,) values at the points."""
        return float((self.p * values).sum())

    def tilt(self, logw: Tensor) -> tuple[Law, float]:
        """The law proportional to p exp(logw), and the log of its integral."""
        logp = self.p.log() + logw
        return Law(self.x, logp.softmax(0)), float(logp.logsumexp(0))

    def index(self, noise: Noise) -> Tensor:
        """(n,) numbers of points drawn from it, by inversion."""
        cdf = self.p.cumsum(0)
        u = noise.uniform(1, dtype=torch.float64)[:, 0] * cdf[-1]
        return torch.searchsorted(cdf, u, right=True).clamp_max(len(cdf) - 1)


class World(ABC):
    """A pretrained chain and a reward whose tilted law p(x_0) exp(r(x_0) / α) / Z is known."""

    def __init__(self, model: Model, reward: Reward, alpha: float) -> None:
        self.model = _copy(model.reference(), torch.float64)
        """The pretrained chain, in float64."""
        self.alpha = alpha
        self.reward = (
            copy.deepcopy(reward).cpu().double().requires_grad_(False)
            if isinstance(reward, nn.Module)
            else reward
        )
        self._known: dict[float, tuple[Law, float]] = {}
        self._energies: dict[Law, float] = {}

    # ---- the answers

    @cached_property
    def prior(self) -> Law:
        """What the pretrained chain samples."""
        return self.law(self.model)

    @cached_property
    def rewards(self) -> Tensor:
        """(G,) at the points of `prior`."""
        return self.reward(self.prior.x).double()

    def _tilted(self, k: float) -> tuple[Law, float]:
        if k not in self._known:
            self._known[k] = self.prior.tilt(k * self.rewards / self.alpha)
        return self._known[k]

    def target(self, k: float = 1.0) -> Law:
        """p(x_0) exp(k r(x_0) / α) / Z_k: what k rounds of tilting at α lead to; k = 1 is the target."""
        return self._tilted(k)[0]

    def log_z(self, k: float = 1.0) -> float:
        """log Z_k = log E[exp(k r(x_0) / α)] under the pretrained chain."""
        return self._tilted(k)[1]

    def best(self, k: float = 1.0) -> float:
        """E*[r]: mean reward of the (k-th) target."""
        return self.target(k).mean(self.rewards)

    def kl(self, k: float = 1.0) -> float:
        """KL(target ‖ prior) in nats: k E*[r] / α − log Z_k."""
        return k * self.best(k) / self.alpha - self.log_z(k)

    @abstractmethod
    def soft_value(self) -> ExactValue:
        """α log E[exp(r(x_0) / α) | x_i] of the forward process."""

    @abstractmethod
    def sample(self, noise: Noise) -> Tensor:
        """(n, ...) exact draws from the target, one for each stream."""

    @abstractmethod
    def law(self, model: Model) -> Law:
        """What a model of this world samples: its chain, integrated."""

    @abstractmethod
    def steered(self, value: Value, gamma: float = 1.0) -> Law:
        """What the pretrained chain samples when each step is tilted by γ^(i−1) V(x_{i−1}) / α and normalised.

        With the soft value this is the target; with the posterior mean it is the fixed point that a perfect search
        by that value has, which is another law.
        """

    # ---- distances

    @abstractmethod
    def _cross(self, x: Tensor, law: Law) -> Tensor:
        """(n,) E_y k(x, y) over y from a law."""

    @abstractmethod
    def _within(self, x: Tensor) -> float:
        """Mean k(x_a, x_b) over pairs of different samples."""

    def _energy(self, law: Law) -> float:
        """E k(y, y') of two independent draws from a law."""
        if law not in self._energies:
            self._energies[law] = law.mean(self._cross(law.x, law))
        return self._energies[law]

    @cached_property
    def unit(self) -> float:
        """Squared distance of prior and target."""
        a, b = self.prior, self.target()
        return self._energy(a) + self._energy(b) - 2 * a.mean(self._cross(a.x, b))

    def apart(self, a: Law, b: Law) -> float:
        """Squared distance of two laws, in units of that of prior and target."""
        return (self._energy(a) + self._energy(b) - 2 * a.mean(self._cross(a.x, b))) / self.unit

    def distance(self, x: Tensor, law: Law | None = None) -> float:
        """Squared distance of samples to a law (the target), in units of that of prior and target.

        Unbiased, so that of exact samples is 0 on average and below 0 half the time.
        """
        law = law or self.target()
        x = x.detach().cpu().double()
        return (self._within(x) + self._energy(law) - 2 * float(self._cross(x, law).mean())) / self.unit

    def null(
        self, n: int, law: Law | None = None, draws: int = 400, level: float = 0.99, seed: int = 0
    ) -> tuple[float, float]:
        """Interval that holds `distance` of n exact samples of a law with probability `level`, by simulation."""
        law = law or self.target()
        to, energy = self._cross(law.x, law), self._energy(law)
        index = law.index(Noise.of(seed, n * draws)).view(draws, n)
        found = [self._within(law.x[i]) + energy - 2 * float(to[i].mean()) for i in index]
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        low, high = (torch.tensor(found, dtype=torch.float64) / self.unit).quantile(ends).tolist()
        return low, high

    # ---- classes: sequences themselves, modes of a mixture

    @abstractmethod
    def classes(self, x: Tensor) -> Tensor:
        """(n,) number of the class of each sample."""

    def shares(self, law: Law | None = None) -> Tensor:
        """(K,) probability of each class under a law (the target)."""
        law = law or self.target()
        return torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.classes(law.x), law.p)

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of classes."""

    def tv(self, x: Tensor, law: Law | None = None) -> float:
        """Total variation between the shares of classes among samples and under a law; above 0 for exact samples."""
        share = torch.bincount(self.classes(x), minlength=self.count).double() / len(x)
        return float((share - self.shares(law)).abs().sum()) / 2

    def entropy(self, law: Law | None = None) -> float:
        """−log chance that two draws from a law (the target) fall into one class, in nats (Rényi's of order 2)."""
        return -math.log(float((self.shares(law) ** 2).sum()))

    # ---- running methods in it

    def context(self, policy: Model | None = None) -> Context:
        """A metered context; without a policy, that of a fresh copy of the pretrained model."""
        policy = policy or self.policy()
        meter = Meter()
        policy.attach(meter)
        return Context(policy, policy.reference(), MeteredReward(self.reward, meter), meter)

    def policy(self) -> Model:
        """A copy of the pretrained model that may be trained."""
        model = _copy(self.model)
        model.network.requires_grad_(True)
        return model

    def _scores(self, value: Value, x: Tensor, i: int, pred: Tensor | None) -> Tensor:
        """(B,) values of states x_i."""
        ctx = Context(self.model, self.model, MeteredReward(self.reward, Meter()), Meter())
        noise, parts = Noise.of(0, len(x)), [slice(j, j + _CHUNK) for j in range(0, len(x), _CHUNK)]
        found = [value(ctx, self.model, x[c], i, None if pred is None else pred[c], noise[c]) for c in parts]
        return torch.cat(found).double()


def _copy(model: Model, dtype: torch.dtype | None = None) -> Model:
    """The same model on the CPU, frozen, with a meter and a reference of its own."""
    twin = copy.copy(model)
    twin.network = copy.deepcopy(model.network).to("cpu", dtype).requires_grad_(False).eval()
    twin.autocast, twin._reference = None, None
    return twin.attach(Meter(), _CHUNK)


def _one_hot(ids: Tensor, model: Model) -> Tensor:
    """States (B, L, V + 1) of token numbers (B, L), the mask being the last."""
    return torch.eye(model.process.vocab + 1, dtype=model.dtype)[ids]  # type: ignore[union-attr]


# ---- tokens


class TokenWorld(World):
    """All V^L sequences, enumerated."""

    model: Model

    @property
    def process(self) -> MaskedProcess:
        return self.model.process  # type: ignore[return-value]

    @cached_property
    def prior(self) -> Law:
        network = self.model.network
        assert isinstance(network, TokenNetwork)
        if self.process.order == "random":  # the chain of single reveals has the law of the model itself
            return Law(network.sequences, network.prior)
        return self.law(self.model)

    def classes(self, x: Tensor) -> Tensor:
        """(n,) numbers of one-hot sequences (n, L, V), their places in `prior`."""
        length, vocab = x.shape[1:]
        return x.argmax(-1).cpu() @ vocab ** torch.arange(length - 1, -1, -1)

    @property
    def count(self) -> int:
        return int(self.process.vocab**self.process.length)

    def soft_value(self) -> ExactValue:
        network = self.model.network
        assert isinstance(network, TokenNetwork)
        return ExactValue(network.soft_value(self.reward, self.alpha), by_state=True)

    def sample(self, noise: Noise) -> Tensor:
        law = self.target()
        return law.x[law.index(noise)]

    def kl_to(self, model: Model) -> float:
        """KL(target ‖ law of a model) in nats, with no sampling error."""
        p, q = self.target().p, self.law(model).p
        return float((p * (p.log() - q.log())).sum())

    # ---- chains

    def law(self, model: Model) -> Law:
        return self._run(_copy(model), None)

    def steered(self, value: Value, gamma: float = 1.0) -> Law:
        return self._run(
            self.model, lambda x, i, pred: gamma**i * self._scores(value, x, i, pred) / self.alpha
        )

    def _run(self, model: Model, tilt: Callable[[Tensor, int, Tensor | None], Tensor] | None) -> Law:
        """Push the mass of all states through the chain; `tilt`, (states, i, predictions) -> (B,), steers each step."""
        process, vocab = self.process, self.process.vocab
        ids = letters(vocab + 1, process.length)  # every state; the mask is the last token
        single = process.order == "random"
        if not single and len(ids) > 1000:
            raise DavBenchError(
                "the law of this chain is not tabulated.",
                f"Tokens revealed in parallel lead from each of {len(ids):,} states to most others.",
                "--set model.order=random",
            )
        masks, every = (ids == vocab).sum(1), torch.arange(len(ids))
        mass = torch.zeros(len(ids), dtype=torch.float64)
        mass[-1] = 1.0
        here = every[-1:]
        pred: Tensor | None = model.predict(_one_hot(ids[here], model), process.T)
        for i in range(process.T, 0, -1):
            there = every[masks == i - 1] if single else every
            x = _one_hot(ids[there], model)
            ahead = model.predict(x, i - 1) if i > 1 else None
            logw = None
            if tilt is not None:
                logw = torch.zeros_like(mass).index_copy_(0, there, tilt(x, i - 1, ahead))
            after = torch.zeros_like(mass)
            for part in range(0, len(here), _CHUNK):
                rows = here[part : part + _CHUNK]
                step = process.step(pred[part : part + _CHUNK], _one_hot(ids[rows], model), i)  # type: ignore[index]
                kids, logp = self._children(step, rows, there, x)
                if logw is None:
                    move = logp.exp().double()
                else:
                    move = (logp.double() + logw[kids]).softmax(1)
                after.index_add_(0, kids.flatten(), (mass[rows, None] * move).flatten())
            mass, here, pred = after, there, ahead
        done = every[masks == 0]
        return Law(_one_hot(ids[done], self.model)[..., :-1], mass[done])

    def _children(self, step: Step, rows: Tensor, there: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(S, C) numbers of states that a step from states `rows` can lead to, and their log-probabilities."""
        length, vocab = self.process.length, self.process.vocab
        if isinstance(step, SingleRevealStep):
            stride = (vocab + 1) ** torch.arange(length - 1, -1, -1)
            shift = (torch.arange(vocab) - vocab) * stride[:, None]
            kids = (rows[:, None, None] + shift).clamp_min(
                0
            )  # below 0 only where nothing is masked, with p = 0
            return kids.flatten(1), (step.order[..., None] + step.log_probs).flatten(1)
        many = torch.arange(len(rows)).repeat_interleave(len(there))
        logp = step.take(many).log_prob(x.repeat(len(rows), 1, 1))
        return there.expand(len(rows), -1), logp.view(len(rows), -1)

    # ---- distances: k(x, y) = Π_l (1 if x_l = y_l else SAME)

    def _smooth(self, p: Tensor) -> Tensor:
        """(N,) Σ_y k(x, y) p(y) for every sequence x, position by position."""
        grid = p.view([self.process.vocab] * self.process.length)
        for axis in range(self.process.length):
            grid = (1 - SAME) * grid + SAME * grid.sum(axis, keepdim=True)
        return grid.flatten()

    def _cross(self, x: Tensor, law: Law) -> Tensor:
        return self._smooth(law.p)[self.classes(x)]

    def _within(self, x: Tensor) -> float:
        n = len(x)
        count = torch.bincount(self.classes(x), minlength=self.count).double()
        return float((count * self._smooth(count)).sum() - n) / (n * (n - 1))


# ---- Gaussian mixtures


class GaussianWorld(World):
    """A mixture in one or two dimensions; laws of chains are integrated on a grid, distances are energy distances."""

    @property
    def process(self) -> GaussianProcess:
        return self.model.process  # type: ignore[return-value]

    @property
    def means(self) -> Tensor:
        """(K, d) of the modes."""
        return self.model.network.law.means  # type: ignore[union-attr]

    @property
    def dim(self) -> int:
        return int(self.means.shape[1])

    def soft_value(self) -> ExactValue:
        network = self.model.network
        assert isinstance(network, MixtureNetwork)
        return ExactValue(network.soft_value(self.reward, self.alpha))

    def sample(self, noise: Noise) -> Tensor:
        """By rejection: samples of the chain kept with chance exp((r − bound) / α), so the reward must have a bound."""
        bound = getattr(self.reward, "bound", None)
        if bound is None:
            raise DavBenchError(
                "exact samples of this target are not known.",
                f"{type(self.reward).__name__} states no `bound` that no reward exceeds.",
            )
        out = torch.zeros(len(noise), self.dim, dtype=torch.float64)
        left, attempt, ctx = torch.arange(len(noise)), 0, self.context()
        while len(left):
            streams = noise[left].fold(attempt)
            batch = Rollout(keep=False)(ctx, streams.fold(1))
            keep = (
                streams.fold(2).uniform(1, dtype=torch.float64)[:, 0].log()
                < (batch.reward - bound) / self.alpha
            )
            out[left[keep]] = batch.states[-1][keep]
            left, attempt = left[~keep], attempt + 1
        return out

    def classes(self, x: Tensor) -> Tensor:
        """(n,) number of the nearest mode."""
        return torch.cdist(x.cpu().double(), self.means).argmin(1)

    @property
    def count(self) -> int:
        return len(self.means)

    # ---- chains

    @cached_property
    def grid(self) -> Tensor:
        """(n,) nodes of one axis."""
        if self.dim not in NODES:
            raise DavBenchError(
                f"the law of a chain in {self.dim} dimensions is not integrated.",
                "Grids are for one or two dimensions; the mixture itself has a closed form (`Mixture.tilt`).",
            )
        far = float(self.means.abs().max()) + 8 * math.sqrt(self.model.network.law.var)  # type: ignore[union-attr,arg-type]
        return torch.linspace(-1, 1, NODES[self.dim], dtype=torch.float64) * max(far, REACH)

    def _start(self) -> tuple[Tensor, Tensor]:
        """Nodes (G, d) and the mass (G,) of x_T there."""
        x = torch.cartesian_prod(*[self.grid] * self.dim).view(-1, self.dim)
        return x, (-(x**2).sum(1) / 2).softmax(0)

    def law(self, model: Model) -> Law:
        """Mass on the grid, moved by the means of each step and blurred by its noise; the last step has none.

        Moved mass falls between nodes and is spread over the six nearest on each axis so that five moments are
        kept (Lagrange weights); the blur is exact, in Fourier space.
        """
        model = _copy(model, torch.float64)
        x, mass = self._start()
        for i in range(self.process.T, 1, -1):
            mean, std, p = self._move(model, x, mass, i)
            mass = self._blur(self._deposit(mean, p), std).clamp_min(0)
            mass = mass / mass.sum()
        mean, std, p = self._move(model, x, mass, 1)
        if std:
            raise ValueError("the last step of this chain is not deterministic")
        return Law(mean, p / p.sum())

    def _move(self, model: Model, x: Tensor, mass: Tensor, i: int) -> tuple[Tensor, float, Tensor]:
        """(means, noise, mass) of the step from i at nodes that hold any mass."""
        live = mass > _FAINT
        with torch.no_grad():
            step = model.step(x[live], i)
        return step.mean, float(step.std.flatten()[0]), mass[live]  # type: ignore[union-attr]

    def _deposit(self, at: Tensor, mass: Tensor) -> Tensor:
        """(n,) * d mass on the grid of mass (G,) at points (G, d)."""
        n, h = len(self.grid), float(self.grid[1] - self.grid[0])
        place = ((at - self.grid[0]) / h).clamp(2, n - 4)
        first = place.floor().long()
        offset, near = place - first, torch.arange(-2, 4)
        weights = torch.ones(*at.shape, 6, dtype=torch.float64)
        for a, b in product(range(6), range(6)):
            if a != b:
                weights[..., a] *= (offset - near[b]) / (near[a] - near[b])
        out = torch.zeros(n**self.dim, dtype=torch.float64)
        for nodes in product(range(6), repeat=self.dim):
            index, w = torch.zeros_like(first[:, 0]), mass
            for axis, node in enumerate(nodes):
                index, w = index * n + first[:, axis] + near[node], w * weights[:, axis, node]
            out.index_add_(0, index, w)
        return out.view([n] * self.dim)

    def _blur(self, mass: Tensor, std: float) -> Tensor:
        """(G,) mass after Gaussian noise."""
        n, h = len(self.grid), float(self.grid[1] - self.grid[0])
        for axis in range(self.dim):
            waves = 2 * math.pi * torch.fft.fftfreq(n, h, dtype=torch.float64)
            gain = (-0.5 * (std * waves) ** 2).exp().view([-1 if a == axis else 1 for a in range(self.dim)])
            mass = torch.fft.ifft(torch.fft.fft(mass, dim=axis) * gain, dim=axis).real
        return mass.flatten()

    def steered(self, value: Value, gamma: float = 1.0) -> Law:
        """In one dimension, by the full matrix of each step on a grid finer than its noise."""
        if self.dim != 1:
            raise DavBenchError(
                "steered chains are integrated in one dimension.", f"This world has {self.dim}."
            )
        model, T = self.model, self.process.T
        ends = torch.stack([model.step(self.grid[:1, None], i).std.flatten()[0] for i in range(2, T + 1)])  # type: ignore[union-attr]
        nodes = 1 + math.ceil(2 * float(self.grid[-1]) / (float(ends.min()) / 1.5))
        x = torch.linspace(-1, 1, nodes, dtype=torch.float64)[:, None] * self.grid[-1]
        mass, pred = (-(x[:, 0] ** 2) / 2).softmax(0), model.predict(x, T)
        for i in range(T, 1, -1):
            step = self.process.step(pred, x, i)
            pred = model.predict(x, i - 1)
            logw = gamma ** (i - 1) * self._scores(value, x, i - 1, pred) / self.alpha
            move = (-((x.T - step.mean) ** 2) / (2 * step.std**2) + logw).softmax(1)
            mass = mass @ move
        live = mass > _FAINT
        return Law(self.process.step(pred, x, 1).mean[live], mass[live] / mass[live].sum())

    # ---- distances: k(x, y) = −|x − y|

    def _cross(self, x: Tensor, law: Law) -> Tensor:
        return -torch.cat([torch.cdist(part, law.x) @ law.p for part in x.split(1024)])

    def _within(self, x: Tensor) -> float:
        n = len(x)
        if self.dim == 1:  # each gap between neighbours is crossed by the pairs it parts
            gaps, k = x[:, 0].sort().values.diff(), torch.arange(1, n, dtype=torch.float64)
            return -2 * float((gaps * k * (n - k)).sum()) / (n * (n - 1))
        return -float(torch.cdist(x, x).sum()) / (n * (n - 1))


# ---- worlds of models and tasks


def world(model: Model, reward: Reward, alpha: float) -> World:
    """The world of a pretrained model and a reward; one that is not exact is refused."""
    model = model.reference()
    for known in _RECENT:
        if known[0] is model and known[1] is reward and known[2] == alpha:
            return known[3]
    for network, kind in ((TokenNetwork, TokenWorld), (MixtureNetwork, GaussianWorld)):
        if isinstance(model.network, network):
            made = kind(model, reward, alpha)
            _RECENT.append((model, reward, alpha, made))
            return made
    raise DavBenchError(
        f"the laws of model '{model.name}' are not known exactly.",
        fix="metrics of exact worlds fit toy-mixture, toy-ring, toy-tokens and tfbind8",
    )


_RECENT: deque[tuple[Model, Reward, float, World]] = deque(maxlen=4)
"""Worlds made last: all metrics of a run share one."""


def world_of(
    task: str, sampler: Mapping[str, Any] | None = None, alpha: float | None = None, **model: Any
) -> World:
    """The world of a task: its model, training reward and temperature, with other settings where given."""
    from dav_bench.plugins import catalog
    from dav_bench.tasks import find_task

    spec = find_task(task)
    if alpha is None and "alpha" not in spec.target:
        raise DavBenchError(f"task '{task}' states no temperature of an exact target (target.alpha).")
    generator, reward = {**spec.model, **model}, dict(spec.rewards["train"])
    built = (
        catalog().get("models", generator.pop("use")).build(generator, {**spec.sampler, **(sampler or {})})
    )
    reward = catalog().get("rewards", reward.pop("use")).build(reward)
    return world(built, reward, float(spec.target["alpha"] if alpha is None else alpha))


def log_z(task: str) -> float:
    """The exact log Z of a task at its own temperature."""
    return world_of(task).log_z()


@dataclass(frozen=True)
class ExactTarget:
    """Exact samples of the target: what a perfect method gets, noise of the samples included."""

    alpha: float

    requires = frozenset({"target"})

    @torch.no_grad()
    def __call__(self, ctx: Context, noise: Noise, cond: Tensor | None = None) -> Batch:
        model = ctx.policy
        reward: Any = ctx.reward.reward if isinstance(ctx.reward, MeteredReward) else ctx.reward
        x = world(ctx.reference, reward, self.alpha).sample(Noise(noise.keys.cpu()))
        x = x.to(model.device, model.dtype)
        state = torch.nn.functional.pad(x, (0, 1)) if model.process.kind == "masked" else x
        return Batch(model.process.pack(state)[None], ctx.reward(model.decode(x), cond), cond=cond)


def build(config: Exact) -> Method:
    return Method(ExactTarget(config.alpha))
