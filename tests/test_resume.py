"""Every method that trains, interrupted and resumed, ends as it does in one go: weights, samples and counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_runner import assert_same

from dav_bench.cli.run import planned
from dav_bench.plugins import catalog
from dav_bench.runner import Options, execute
from dav_bench.spec import RunSpec

TRAINED = [entry.name for entry in catalog().all("methods") if entry.tunes]
ROUNDS = 4


def spec(method: str, out: Path) -> RunSpec:
    """A short run on the first toy the method fits."""
    entry = catalog().get("methods", method)
    for task in ("toy-tokens", "toy-mixture"):
        sets = [
            f"{method}.rounds={ROUNDS}",
            f"{method}.samples=16",
            f"{method}.minibatch=64",
            "eval.samples=16",
        ]
        if task == "toy-mixture":
            sets.append("sampler.steps=6")
        runs = planned(methods=[method], tasks=[task], sets=sets, out=out, baselines=False, search=None)
        if runs[0].status != "skip":
            assert runs[0].spec.label == entry.name
            return runs[0].spec
    raise AssertionError(f"{method} fits no toy: {runs[0].reason}")


class Stop:
    """Ctrl-C after a round."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round_finished(self, event: object) -> None:
        if event.round == self.after:  # type: ignore[attr-defined]
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", TRAINED)
def test_an_interrupted_run_ends_like_a_whole_one(method: str, tmp_path: Path) -> None:
    whole = execute(spec(method, tmp_path / "a"), Options(out=tmp_path / "a", threads=1))
    assert whole.status == "done", whole.meta.get("error")
    for after in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            execute(
                spec(method, tmp_path / "b"),
                Options(out=tmp_path / "b", threads=1, listeners=(Stop(after),)),
            )
    parts = execute(spec(method, tmp_path / "b"), Options(out=tmp_path / "b", threads=1))
    assert_same(whole, parts)
