"""A results folder with everything a report shows, from numbers that were never measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from report.conftest import SPEC, TERMS, make_row, make_rows, meter, numbers

from dav_bench.known import board_path
from dav_bench.report.published import save
from dav_bench.store import RunDir

SEQUENCE = "GGGCAAAGTCCAGTAAACATTGCGCAATCCGCCCCGTGACTCAGTCATTTGCATAACAAT"
HOSTILE = "<img src=x onerror=alert(1)>"


def small_results(folder: Path, shift: float = 0.0) -> Path:
    """Published rows with ranks, a gate, a budget and hostile names; local runs with text, pictures, and failed."""
    rows = [*make_rows(), make_row(HOSTILE)]
    budget = {"unit": "cost", "train": 1000}
    rows += [make_row(label, seed, budget=budget) for label in ("ddpo", "vmpo") for seed in range(3)]
    rows = [replace(row, env={"python": "3.12", "hardware": {"cpu": "Intel"}}) for row in rows]
    rows[-1].samples["reward.train"][:] += shift
    terms = replace(
        TERMS, title="A toy </script><script>alert(1)</script>",
        rank={"by": ["reward-heldout", "levenshtein"], "gates": {"kmer-corr": ">= 0.8"}},
    )  # fmt: skip
    save(rows, terms, board_path(folder, "toy"))
    local_run(folder, 7, "dav", sequence=[SEQUENCE[i:] + SEQUENCE[:i] for i in range(8)])
    names = [f"artifacts/images/{i:05d}.png" for i in range(2)] + [""] * 6
    run = local_run(folder, 7, "grpo", file=names, prompt=["a tiger"] * 8)
    pictures(run, names[:2])
    local_run(folder, 9, "dav", "failed")
    return folder


def local_run(results: Path, seed: int, method: str, status: str = "done", **columns: list[str]) -> RunDir:
    """A run directory; `columns` go to its samples."""
    spec = replace(SPEC, method=method, seed=seed)
    samples, metrics = numbers(method, seed)
    line: dict[str, Any] = {"round": 1, "cost": 1000, "reward_rows": 1, "seconds": 0.5, "n": 8}
    with RunDir.create(results, spec) as run:
        run.write_env(
            {"python": "3.12", "packages": {"dav-bench": "0.1.0"}, "git": {"sha": "0" * 40, "diff": ""}}
        )
        final = [
            {**line, "split": "final", "metric": m, "value": v} for m, v in {"reward": 1.0, **metrics}.items()
        ]
        way = [
            {**line, "round": r, "cost": 300 * r, "split": "train", "metric": "reward", "value": r / 8}
            for r in (1, 2)
        ]
        run.append_metrics([*way, *final])
        run.write_samples({"index": range(8), **samples, **columns})
        run.update(status=status, meter=meter(method), error="it broke" if status == "failed" else None)
    return run


def pictures(run: RunDir, names: list[str]) -> None:
    """Two coloured squares, larger than a page shows them."""
    from PIL import Image

    for i, name in enumerate(names):
        path = run.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 300), (200, 80 * i, 40)).save(path)
