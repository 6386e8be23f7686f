"""Which files a piece of code writes, wherever it does so."""

from __future__ import annotations

import os
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PATHS = {"os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.symlink": (1,)}
_PATHS |= {"os.link": (1,), "os.truncate": (0,), "sqlite3.connect": (0,)}
_SYSTEM = ("/dev/", "/proc/", "/sys/")

_watching: list[Writes] = []
_hooked = False


@dataclass
class Writes:
    """Context in which writes outside of the allowed folders are noted, by CPython's audit events.

    Files that a library writes without Python's `open` are not seen.
    """

    allowed: tuple[Path, ...]
    """Folders in which writing is fine."""
    found: dict[str, str] = field(default_factory=dict)
    """Path to the place in the code that wrote it."""

    def __post_init__(self) -> None:
        self.roots = tuple(os.path.realpath(folder) + os.sep for folder in self.allowed)

    def __enter__(self) -> Writes:
        global _hooked
        if not _hooked:  # an audit hook cannot be taken away again
            sys.addaudithook(_audit)
            _hooked = True
        _watching.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        _watching.remove(self)

    def note(self, path: Any) -> None:
        if not isinstance(path, str | bytes | os.PathLike):  # a descriptor that is open already
            return
        name = os.fsdecode(path)
        if name in ("", ":memory:") or name.startswith("file:"):
            return
        full = os.path.realpath(name)
        caches = (f"{os.sep}__pycache__", f"{os.sep}torchinductor_")  # of the interpreter, and of torch's compiler
        if full.startswith((*_SYSTEM, *self.roots)) or any(cache in full for cache in caches):
            return
        self.found.setdefault(full, _caller())


def _caller() -> str:
    """File and line of the innermost frame that is neither this module nor the standard library's."""
    library = os.path.dirname(os.__file__) + os.sep
    for frame in reversed(traceback.extract_stack()):
        other = frame.filename.startswith(library) and "site-packages" not in frame.filename
        if frame.filename != __file__ and not other and not frame.filename.startswith("<"):
            return f"{frame.filename}:{frame.lineno}"
    return ""


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event == "open":
        path, mode, flags = args
        writes = any(letter in mode for letter in "wax+") if isinstance(mode, str) else False
        if writes or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            for watch in tuple(_watching):
                watch.note(path)
    elif event in _PATHS:
        for k in _PATHS[event]:
            for watch in tuple(_watching):
                watch.note(args[k])
