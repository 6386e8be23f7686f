"""A process that writes a run until it is killed; driven by test_store.py through pipes.

"go" on stdin forks a child that resumes the run and writes rounds for ever, and prints the child's number; "reap"
waits for its end. torch and polars are imported once and first used in the child.
"""

from __future__ import annotations

import os
import sys

import polars  # noqa: F401
import torch

from dav_bench.spec import RunSpec
from dav_bench.store import RunDir


def spec(seed: int = 0) -> RunSpec:
    return RunSpec("toy", 1, "0" * 16, "dav", params={"width": 4}, sampler={"steps": 8}, seed=seed)


def tensors(round: int) -> dict[str, torch.Tensor]:
    return {"net.weight": torch.full((300, 40), float(round)), "adam.step": torch.tensor([round])}


def metrics(round: int) -> list[dict[str, object]]:
    row = {"cost": 10 * round, "reward_rows": round, "seconds": 0.1, "split": "train", "n": 4}
    return [{"round": round, "metric": m, "value": round + 0.1, **row} for m in ("reward", "loss")]


def write_rounds(root: str) -> None:
    with RunDir.create(root, spec()) as run:
        last = run.load_checkpoint()
        round = last[0] if last else -1
        run.rewind_metrics(round)
        while True:
            round += 1
            run.append_metrics(metrics(round))
            run.event("round", round=round)
            run.write_samples({"index": range(50), "reward.train": [float(round)] * 50})
            run.save_checkpoint(round, tensors(round), {"round": round, "loss": round + 0.1})
            run.update(meter={"search": {"forward": round}})


if __name__ == "__main__":
    child = 0
    for line in sys.stdin:
        if line == "reap\n":
            os.waitpid(child, 0)
            print("reaped", flush=True)
            continue
        child = os.fork()
        if child == 0:
            write_rounds(sys.argv[1])
        print(child, flush=True)
