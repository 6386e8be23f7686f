"""Files that are written as a whole or not at all, and read with a clear word about damage.

A file gets a temporary name in the same folder, is synced, then renamed: a reader never meets half of it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dav_bench.errors import DavBenchError, ExitCode

if TYPE_CHECKING:
    import polars as pl
    import torch

SCHEMA = 1
"""Version of all files of results; readers refuse a newer one."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFull(DavBenchError):
    """A write found no room; the file that was there before is untouched."""

    def __init__(self, path: Path):
        super().__init__(
            f"no room left to write {path.name}.",
            f"The disk or the quota of {path.parent} is full; what was there before is intact.",
            "free some space, or point --out at another disk, then repeat the same command to resume",
            code=ExitCode.RUN_FAILED,
        )


def _is_full(error: BaseException) -> bool:
    """Whether an error means "no room": Rust writers (polars, safetensors) only say so in their text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    found = re.search(r"\(os error (\d+)\)", str(error))
    return bool(found) and int(found[1]) in _FULL  # type: ignore[index]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file as a whole or not at all: yields a temporary name in the same folder, then renames it.

    Raises:
        DiskFull: there is no room; `path` is as it was and the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if _is_full(error):
            raise DiskFull(path) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically (floats survive exactly)."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_parquet(path: Path, frame: pl.DataFrame, footer: Mapping[str, str]) -> None:
    """Replace a parquet file atomically; the schema and `footer` go to its footer. Same rows, same bytes."""
    metadata = {"dav_bench.schema": str(SCHEMA), **{f"dav_bench.{k}": v for k, v in footer.items()}}
    with replacing(path) as temporary:
        frame.write_parquet(temporary, compression="zstd", row_group_size=1 << 20, metadata=metadata)


def read_parquet(path: Path) -> pl.DataFrame:
    """Read a parquet file of this package; refuses a newer schema, names a damaged file."""
    import polars as pl

    try:
        metadata = pl.read_parquet_metadata(path)
        check_schema(metadata.get("dav_bench.schema", "1"), path)
        return pl.read_parquet(path, memory_map=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise damaged(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; names a damaged file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    if not isinstance(value, dict):
        raise damaged(path, ValueError("not an object"))
    return value


def check_schema(schema: Any, path: Path) -> None:
    """Refuse what a newer dav-bench wrote."""
    try:
        version = int(schema)
    except (TypeError, ValueError):
        raise damaged(path, ValueError(f"schema {schema!r} is not a number")) from None
    if version > SCHEMA:
        raise DavBenchError(
            f"{path} was written by a newer dav-bench.",
            f"It has schema {version}; this version reads up to {SCHEMA}.",
            "pip install --upgrade dav-bench",
        )


def damaged(path: Path, error: BaseException) -> DavBenchError:
    """The error for a file that is missing, truncated or not ours."""
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return DavBenchError(
        f"{path} cannot be read.",
        f"The file is missing, truncated or not ours ({reason}).",
        "repeat the command of this run with --fresh, or remove the folder",
    )


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace a safetensors file atomically; tied weights are stored once each."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in seen else value  # the format takes no shared memory
        seen.add(storage)
    with replacing(path) as temporary:
        save_file(plain, temporary)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file to the CPU; names a damaged file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error
