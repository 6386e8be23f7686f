"""A checklist: what was checked, what came out, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Literal

from dav_bench.errors import DavBenchError, ExitCode
from dav_bench.plugins import reason_of, where_of
from dav_bench.registry import Entry


@dataclass(frozen=True)
class Check:
    """One line of a checklist."""

    name: str
    """What was checked, of which component."""
    status: Literal["ok", "failed", "skipped"]
    """What came out."""
    note: str = ""
    """What was found, or why it was skipped."""
    fix: str = ""
    """What to change where it failed."""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


class Skip(Exception):
    """A check that has no meaning here, with the reason."""


class Fail(Exception):
    """A check that failed, with what to change."""

    def __init__(self, note: str, fix: str = "") -> None:
        super().__init__(note)
        self.fix = fix


class ContractBroken(AssertionError):
    """A checklist with failures, as pytest shows it."""


class Item:
    """What a check in progress may say."""

    note = ""


@dataclass
class Checklist:
    """Checks in the order in which they were made."""

    say: Callable[[Check], None] = lambda check: None
    """Told of each check as it is made: a crash after it does not lose it."""
    checks: list[Check] = field(default_factory=list)

    @contextmanager
    def item(self, name: str, fix: str = "") -> Iterator[Item]:
        """One check: what is raised inside fails it, and the next one goes on.

        `Skip`, and a `DavBenchError` about a missing file or extra, skip it.
        """
        item = Item()
        try:
            yield item
        except Skip as why:
            self._add(Check(name, "skipped", str(why)))
        except Fail as err:
            self._add(Check(name, "failed", str(err), err.fix or fix))
        except DavBenchError as err:
            if err.code == ExitCode.MISSING:
                self._add(Check(name, "skipped", reason_of(err)))
            else:
                self._add(Check(name, "failed", reason_of(err), fix))
        except (Exception, SystemExit) as err:
            where = where_of(err)
            note = f"{reason_of(err)} ({where})" if where else reason_of(err)
            self._add(Check(name, "failed", note, fix))
        else:
            self._add(Check(name, "ok", item.note))

    def _add(self, check: Check) -> None:
        self.checks.append(check)
        self.say(check)

    def skip(self, name: str, why: str) -> None:
        self._add(Check(name, "skipped", why))

    @property
    def failed(self) -> list[Check]:
        return [c for c in self.checks if c.status == "failed"]

    def raise_failures(self) -> list[Check]:
        """All checks, where none failed.

        Raises:
            ContractBroken: naming each failure and its fix.
        """
        if self.failed:
            raise ContractBroken("\n" + "\n".join(_line(c) for c in self.failed))
        return self.checks


def _line(check: Check) -> str:
    return f"{check.name}: {check.note}" + (f"\n    fix: {check.fix}" if check.fix else "")


def label_of(entry: Entry, what: str) -> str:
    """Name of a check of one component."""
    return f"{entry.kind[:-1]} {entry.name}: {what}"
