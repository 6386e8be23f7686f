"""Errors a user can act on, and the exit codes of the command line."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """What `dav-bench` returns to the shell."""

    OK = 0
    RUN_FAILED = 1
    USAGE = 2
    INCOMPATIBLE = 3
    MISSING = 4
    INTERRUPTED = 130


class DavBenchError(Exception):
    """A problem the user can fix: printed as what, why and fix, without a traceback.

    Args:
        what: One sentence: what could not be done.
        why: The cause, in the user's terms; may span lines.
        fix: What to type or change.
        code: Exit code of the command that fails with this error.
    """

    def __init__(self, what: str, why: str = "", fix: str = "", *, code: ExitCode = ExitCode.USAGE):
        super().__init__(what, why, fix)
        self.what, self.why, self.fix, self.code = what, why, fix, code

    def __str__(self) -> str:
        lines = [self.what, *self.why.splitlines()]
        if self.fix:
            lines.append(f"Try: {self.fix}")
        return "\n  ".join(lines)


class OutOfTime(BaseException):
    """The alarm of `--timeout`: like Ctrl-C it passes every `except Exception` on its way."""

    def __str__(self) -> str:
        return "its time was over (--timeout); the same command goes on from its last checkpoint"


def near(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or the known names when none is close, to append to a message."""
    from difflib import get_close_matches

    known = sorted(set(known))
    close = get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 24 else ""


def problems(what: str, found: list[str], fix: str = "", code: ExitCode = ExitCode.USAGE) -> DavBenchError:
    """Bundle every problem found into one error, so that a user fixes them in one go."""
    why = found[0] if len(found) == 1 else "\n".join(f"- {f}" for f in found)
    return DavBenchError(what, why, fix, code=code)
