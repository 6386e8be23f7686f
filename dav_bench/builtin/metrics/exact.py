"""Metrics of tasks whose target is known: how far samples are from p(x) exp(r(x) / α) / Z.

α is the task's (`target.alpha`), one for all methods; p is the pretrained chain, r the reward of the run.
Definitions and values of exact samples: `docs/metrics.md`, `docs/tasks/`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from dav_bench.builtin.metrics.base import MetricContext, Samples
from dav_bench.builtin.models.mixture import MixtureNetwork
from dav_bench.builtin.models.tokens import TokenNetwork

if TYPE_CHECKING:
    from dav_bench.builtin.exact import World

BOUND = 0.45
"""E-score from which an 8-mer counts as specifically bound."""


def world(ctx: MetricContext) -> World | None:
    """The exact world of the run that is measured; None where its model is another than the task's and not exact."""
    from dav_bench.builtin import exact

    if ctx.reward is None or not isinstance(ctx.reference().network, TokenNetwork | MixtureNetwork):
        return None
    return exact.world(ctx.reference(), ctx.reward, float(ctx.task.target["alpha"]))


def target_distance(samples: Samples, ctx: MetricContext) -> float | None:
    """Squared distance to the exact target, 1 for the pretrained model and without bias 0 for exact samples.

    Of kernel means on tokens, k(x, y) = Π_l (1 if x_l = y_l else 0.4); energy distance on vectors.
    """
    return exact.distance(samples.x) if (exact := world(ctx)) else None


def target_gap(samples: Samples, ctx: MetricContext) -> float | None:
    """Mean reward minus that of the exact target, E*[r]; 0 at the target, above it where diversity was given up."""
    if (exact := world(ctx)) is None:
        return None
    return float(exact.reward(samples.x.double()).mean()) - exact.best()


def target_tv(samples: Samples, ctx: MetricContext) -> float | None:
    """Total variation between the target and the samples' frequencies: of sequences, or of the modes of a mixture.

    Not 0 for exact samples: about half Σ sqrt(2 p (1 − p) / (π n)).
    """
    return exact.tv(samples.x) if (exact := world(ctx)) else None


def target_kl(samples: Samples, ctx: MetricContext) -> float | None:
    """KL(target ‖ model) in nats of a token model whose plain samples these are, from its law over all sequences.

    Not measured where a search drew the samples: their law is not that of a model.
    """
    from dav_bench.builtin.exact import TokenWorld

    exact = world(ctx)
    if ctx.policy is None or not isinstance(exact, TokenWorld):
        return None
    return exact.kl_to(ctx.policy())


def entropy(samples: Samples, ctx: MetricContext) -> float:
    """−log chance that two samples are the same sequence, or of the same mode, in nats (Rényi's entropy of order 2).

    The chance is estimated without bias from all pairs, which Shannon's entropy does not allow for so many
    sequences; without a single equal pair, as for one equal pair.
    """
    network, n = ctx.reference().network, len(samples)
    if isinstance(network, MixtureNetwork):
        label = torch.cdist(samples.x.double(), network.law.means).argmin(1)
    else:
        label = samples.x.argmax(-1)
    count = label.unique(dim=0, return_counts=True)[1].double()
    pairs = n * (n - 1) / 2
    return math.log(pairs / max(1.0, float((count * (count - 1)).sum()) / 2)) if pairs else 0.0


def log_prob(samples: Samples, ctx: MetricContext) -> np.ndarray | None:
    """(n,) exact log-likelihood of each sample under the pretrained law, in nats; a log-density for vectors."""
    network = ctx.reference().network
    if isinstance(network, MixtureNetwork):
        return network.law.log_prob(samples.x.double()).numpy()
    if not isinstance(network, TokenNetwork):
        return None
    length, vocab = samples.x.shape[1:]
    index = samples.x.argmax(-1) @ vocab ** torch.arange(length - 1, -1, -1)
    return network.prior[index].log().numpy()


def bound(samples: Samples, ctx: MetricContext) -> np.ndarray:
    """(n,) 1 where the E-score is above 0.45, the usual threshold of specific binding, else 0."""
    from dav_bench.builtin.rewards.tfbind8 import build

    return (build()(samples.x.float()) > BOUND).double().numpy()
