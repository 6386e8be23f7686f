"""A whole plugin: a reward, a searcher and a task. Nothing heavy is imported until it is used."""

from dataclasses import dataclass
from pathlib import Path

from dav_bench import hookimpl


class GCContent:
    """Share of G and C among the letters A, C, G, T; differentiable."""

    domain = "sequence"
    provides = frozenset({"reward.grad"})

    def __call__(self, sample, cond=None):
        """One-hot or relaxed sequences (B, L, 4) -> (B,)."""
        return sample[..., 1:3].sum(-1).mean(-1)


@dataclass(frozen=True)
class Retry:
    """Settings of the searcher; `--set searcher.tries=5` and `dav-bench show retry` know them."""

    tries: int = 3
    """Samples drawn at most for each one kept."""
    enough: float = 0.5
    """Reward that ends the trying."""


class Retrying:
    """Draws a sample again while its reward is not enough, and keeps the last."""

    requires = frozenset({"sample"})

    def __init__(self, config):
        self.config = config

    def __call__(self, ctx, noise, cond=None):
        from dav_bench.core import Batch, Rollout

        batch = Rollout()(ctx, noise, cond)
        for attempt in range(1, self.config.tries):
            rows = (batch.reward < self.config.enough).nonzero()[:, 0]
            if len(rows):
                again = Rollout()(ctx, noise[rows].fold(attempt), None if cond is None else cond[rows])
                states = batch.states.index_copy(1, rows, again.states)
                batch = Batch(states, batch.reward.index_copy(0, rows, again.reward), cond=cond)
        return batch


@hookimpl
def register_rewards(register):
    register("gc-content", GCContent, provides="reward.grad", domain="sequence", summary="share of G and C")


@hookimpl
def register_searchers(register):
    register("retry", Retrying, config=Retry, requires="sample", summary="draw again what is not good enough")


@hookimpl
def register_tasks(register):
    register(Path(__file__).parent / "tasks" / "hello")
