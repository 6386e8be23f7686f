"""Where files shipped with a task lie, and how its weights are read.

Weights are safetensors in fp16 with the network's name and configuration as metadata; they are computed with in fp32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dav_bench.errors import DavBenchError, ExitCode

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = (PACKAGE / "_tasks", PACKAGE.parent / "tasks")
"""Task folders inside an installed wheel, then those of a clone."""


def asset(relpath: str, task: str = "dna") -> Path:
    """A file shipped in the folder of a task."""
    for folder in SHIPPED:
        if (folder / task / relpath).is_file():
            return folder / task / relpath
    raise DavBenchError(
        f"{relpath} of task {task!r} was not found",
        "looked in " + " and ".join(str(folder / task) for folder in SHIPPED),
        "reinstall dav-bench, or run from a complete clone",
        code=ExitCode.MISSING,
    )


def find(name: str | Path, task: str = "dna") -> Path:
    """A weights file given by its path, or by the stem of one in the task's folder `weights`."""
    return Path(name) if Path(name).is_file() else asset(f"weights/{name}.safetensors", task)


def load(name: str | Path, task: str = "dna") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State in fp32 and metadata of weights; metadata values that are JSON are decoded."""
    with safe_open(find(name, task), framework="pt") as f:
        state = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118  (the handle is no mapping)
        meta = {key: _decode(value) for key, value in (f.metadata() or {}).items()}
    return {k: v.to(torch.float32) if v.is_floating_point() else v for k, v in state.items()}, meta


def _decode(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
