"""How the weights in a task's folder are found and read.

Weights are safetensors in fp16 with the network's name and configuration as metadata; they are computed with in fp32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dav_bench.tasks import asset


def find(name: str | Path, task: str = "dna") -> Path:
    """A weights file given by its path, or by the stem of one in the task's folder `weights`."""
    return Path(name) if Path(name).is_file() else asset(task, f"weights/{name}.safetensors")


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
