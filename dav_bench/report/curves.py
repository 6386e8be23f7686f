"""Learning curves over cost, so that methods whose rounds differ can be compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dav_bench.store import RunDir


def curve(
    run: RunDir,
    metric: str = "reward",
    split: Literal["train", "eval", "final"] = "train",
    over: Literal["cost", "reward_rows", "seconds"] = "cost",
) -> list[tuple[float, float]]:
    """(what training had spent, value) for each round of a run that recorded the metric, in order.

    Args:
        run: Any run, finished or not.
        metric: Such as `reward`, the median training reward.
        split: `train` is what the search of the round found, `eval` the evaluation samples every `eval.every`
            rounds, `final` the samples at the end.
        over: Network rows (`cost`) or reward rows, forward + 2 x backward, or seconds of search and fit.
    """
    rows = run.metrics().select("round", "split", "metric", over, "value").rows()
    return [(spent, value) for _, s, m, spent, value in sorted(rows) if (s, m) == (split, metric)]
