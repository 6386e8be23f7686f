"""Runs that were never run: rows and run directories with numbers from exact arithmetic, for boards.

`python tests/report/conftest.py` writes the golden board anew, after a change of format that is meant.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dav_bench.plugins import catalog
from dav_bench.report.rows import Row
from dav_bench.report.terms import Column, Terms, compared
from dav_bench.spec import RunSpec
from dav_bench.store import RunDir

GOLDEN = Path(__file__).parent.parent / "golden" / "leaderboards" / "toy.parquet"

TASK = """
schema = 1
name = "toy"
version = 1
title = "A toy"
baselines = ["real", "pretrained"]
model.use = "mdlm-dna"
reward.train = "hepg2-specificity"
reward.heldout = "hepg2-specificity-heldout"
[metrics]
quality = ["reward", "reward-heldout", "gap", "accessibility"]
diversity = ["levenshtein"]
natural = ["kmer-corr", "log-likelihood"]
[sampler]
steps = 8
[eval]
samples = 8
[preset.paper]
sampler = { steps = 16 }
eval = { samples = 16 }
"""

SPEC = RunSpec(
    task="toy",
    task_version=1,
    task_hash="0123456789abcdef",
    method="dav",
    params={"width": 4, "alpha": 0.5},
    model={"use": "mdlm-dna"},
    sampler={"steps": 8},
    rewards={"train": {"use": "hepg2"}, "heldout": {"use": "hepg2-heldout"}},
    eval={"samples": 8, "seed": 20000, "every": 4},
    budget={"unit": "cost"},
)

TERMS = Terms(
    "toy",
    "A toy",
    compared(SPEC.to_dict()),
    (
        Column("accessibility", "accessibility", "quality", "up", "sample", "mean", "share called open"),
        Column("levenshtein", "levenshtein", "diversity", "up", "set", "median", "mean pairwise edit distance"),
        Column("kmer-corr", "kmer-corr", "natural", "up"),
    ),
    {"train": {"median": 0.5, "q90": 2.5}, "heldout": {"median": 0.25, "q90": 1.25}},
    "real elements",
    reference=(
        {"method": "DRAKES", "metric": "Pred-Activity", "value": "5.61", "error": "0.07", "evidence": "R",
         "source": "a paper", "differs": "other oracles"},
    ),
)  # fmt: skip

LIFT = {"real": 0.5, "pretrained": -1.0, "best-of-n": 0.75, "dav": 3.0, "dav+tree": 4.0}


def numbers(label: str, seed: int, n: int = 8) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Per-sample values and set metrics of a run; multiples of 1/64, so exact on every machine."""
    base = LIFT.get(label, 0.0) + seed / 16
    train = np.array([base + ((7 * i + 3 * seed) % 16 - 8) / 64 for i in range(n)])
    samples = {
        "reward.train": train,
        "reward.heldout": train / 4 + 0.25,
        "metric.accessibility": (train > 0) * 1.0,
    }
    return samples, {"levenshtein": 100.5 - 2 * base, "kmer-corr": 0.9375 - base / 16}


def make_row(label: str, seed: int = 0, source: str = "published", **changes: Any) -> Row:
    """A row without files; `changes` go to its specification."""
    method, _, search = label.partition("+")
    spec = replace(SPEC, method=method, seed=seed, **changes)
    spec = replace(spec, search={"name": search, "params": {"width": 4}}) if search else spec
    samples, metrics = numbers(label, seed, int(spec.eval["samples"]))
    return Row(
        spec.to_dict(), spec.identity, spec.run_id, label, seed, meter(label), metrics, samples,
        peak_mb=512.0 + seed, version="0.1.0", arguments=("--method", method), source=source,
    )  # fmt: skip


def meter(label: str) -> dict[str, dict[str, float]]:
    """Cost of a run by phase."""
    if label == "real":
        return {}
    drawing = {"forward": 8 * (29 if "tree" in label else 8), "backward": 0, "reward": 8, "seconds": 0.5}
    found = {"sample": drawing, "eval": {"forward": 9999, "reward": 9999, "seconds": 99.0}}
    if label.startswith("dav"):
        found["search"] = {
            "forward": 1000,
            "backward": 0,
            "reward": 100,
            "reward_backward": 50,
            "seconds": 2.0,
        }
        found["fit"] = {"forward": 400, "backward": 300, "reward": 0, "reward_backward": 0, "seconds": 1.0}
    return found


def make_rows() -> list[Row]:
    """A whole board: baselines once, methods with three seeds."""
    rows = [make_row("real"), make_row("pretrained")]
    return rows + [make_row(label, seed) for label in ("best-of-n", "dav", "dav+tree") for seed in range(3)]


def write_run(results: Path, spec: RunSpec, status: str = "done") -> RunDir:
    """A run directory with everything a board reads."""
    samples, metrics = numbers(spec.label, spec.seed, int(spec.eval["samples"]))
    with RunDir.create(results, spec) as run:
        row = {"round": 1, "cost": 1, "reward_rows": 1, "seconds": 0.5, "n": 8, "split": "final"}
        run.write_env({"packages": {"dav-bench": "0.1.0"}})
        run.append_metrics([{**row, "metric": m, "value": v} for m, v in {"reward": 1.0, **metrics}.items()])
        run.write_samples({"index": range(len(samples["reward.train"])), **samples})
        run.update(status=status, meter=meter(spec.label), peak_mb=512.0)
    return run


@pytest.fixture
def rows() -> list[Row]:
    return make_rows()


@pytest.fixture
def terms() -> Terms:
    return TERMS


@pytest.fixture
def row() -> Callable[..., Row]:
    return make_row


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder beside a task file that `find_task` sees; the working directory is there."""
    folder = tmp_path / "extra" / "toy"
    folder.mkdir(parents=True)
    (folder / "task.toml").write_text(TASK)
    monkeypatch.setenv("DAV_BENCH_TASKS", str(folder.parent))
    monkeypatch.chdir(tmp_path)
    catalog()
    return tmp_path / "results"


@pytest.fixture
def run_of(toy: Path) -> Callable[..., list[RunDir]]:
    """Write the runs that a command would make: `run_of(methods=["dav"], seeds=[0, 1])`."""
    from dav_bench.cli.run import planned

    def make(status: str = "done", **command: Any) -> list[RunDir]:
        return [write_run(toy, r.spec, status) for r in planned(tasks=["toy"], out=toy, **command)]

    return make


@pytest.fixture
def golden() -> Path:
    return GOLDEN


if __name__ == "__main__":
    from dav_bench.report.board import build
    from dav_bench.report.formats import FORMATS, render
    from dav_bench.report.published import save

    save(make_rows(), TERMS, GOLDEN)
    for fmt in FORMATS:
        GOLDEN.with_suffix(f".{fmt}").write_text(render(build(make_rows(), TERMS), fmt))
    sys.exit(f"wrote {GOLDEN.parent}: read the difference before you commit it")
