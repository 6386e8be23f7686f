"""Checkpoints published by others: read safely, and put into a network with every mismatch named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dav_bench.builtin.unpickle import unpickle
from dav_bench.errors import DavBenchError, ExitCode


def load_checkpoint(path: str | Path, what: str = "checkpoint", fix: str = "") -> dict[str, Any]:
    """Read a `torch.save` file into dictionaries, lists, tuples, scalars, tensors and `Inert` objects.

    Tensors are views of a private memory map: what is not used is not read, and nothing written to them
    reaches the file.

    Args:
        path: The checkpoint.
        what: What it is, for messages.
        fix: Where to get it, for messages.

    Raises:
        DavBenchError: The file is missing, of another format, damaged, or not a dictionary.
    """
    path = Path(path)

    def refuse(why: str, code: ExitCode = ExitCode.USAGE) -> DavBenchError:
        return DavBenchError(f"Cannot read the {what} at {path}", why, fix, code=code)

    if not path.is_file():
        raise refuse("there is no such file", ExitCode.MISSING)
    try:
        content = unpickle(path)
    except Exception as error:  # a damaged file can fail in any way
        raise refuse(f"{type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise refuse(f"it holds {content!r:.80}, not a dictionary")
    return content


def state_dict(content: Mapping[str, Any], prefix: str = "", what: str = "checkpoint") -> dict[str, Tensor]:
    """Take the tensors whose keys start with `prefix`, and remove it; keys without it are left out.

    They lie under `state_dict` (Lightning) or are the file itself.
    """
    inner = content.get("state_dict", content)
    if not isinstance(inner, Mapping):
        raise DavBenchError(f"The {what} has no state_dict", f"its keys: {', '.join(map(str, content))}")
    return {
        key.removeprefix(prefix): value
        for key, value in inner.items()
        if isinstance(key, str) and key.startswith(prefix) and isinstance(value, Tensor)
    }


def fill(
    module: torch.nn.Module, tensors: Mapping[str, Tensor], what: str, fix: str = "", assign: bool = False
) -> None:
    """Load `tensors` into `module`; missing, unknown and misshapen keys are listed in one error.

    `assign` puts them in the place of the module's own (one on the meta device) without a copy.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - own.keys())
    shapes = [
        f"{k} {tuple(tensors[k].shape)} for {tuple(own[k].shape)}"
        for k in sorted(own.keys() & tensors.keys())
        if own[k].shape != tensors[k].shape
    ]
    if missing or unknown or shapes:
        lines = [
            *_some("missing keys", missing),
            *_some("keys that do not belong", unknown),
            *_some("other shapes", shapes),
        ]
        raise DavBenchError(f"The file is not the {what} it should be", "\n".join(lines), fix)
    module.load_state_dict(dict(tensors), assign=assign)


def _some(label: str, names: list[str], most: int = 3) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{label}: {', '.join(names[:most])}{more}"]
