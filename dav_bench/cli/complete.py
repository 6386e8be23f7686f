"""What the shell completes: names that are registered, read without importing what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress

Words = list[tuple[str, str]]
"""Completions, each with a line of help."""


def _fitting(words: Iterable[tuple[str, str]], incomplete: str) -> Words:
    """Those that go on from `incomplete`; after a comma, from its last part, without what is there already."""
    head, comma, last = incomplete.rpartition(",")
    taken = head.split(",")
    return [(f"{head}{comma}{n}", help) for n, help in words if n.startswith(last) and n not in taken]


def component(kind: str, *more: str) -> Callable[[str], Words]:
    """Completes names of one kind, and the words `more`."""

    def complete(incomplete: str) -> Words:
        with suppress(Exception):  # a shell that completes nothing is better than one that prints a traceback
            from dav_bench.plugins import catalog

            words = [(name, "") for name in more] + [(e.name, e.summary) for e in catalog().all(kind)]
            return _fitting(words, incomplete)
        return []

    return complete


def task(incomplete: str) -> Words:
    """Completes tasks in sight."""
    with suppress(Exception):
        from dav_bench.tasks import all_tasks

        return _fitting([(t.name, t.title) for _, t in sorted(all_tasks().found.items())], incomplete)
    return []


def anything(incomplete: str) -> Words:
    """Completes what `show` knows."""
    with suppress(Exception):
        from dav_bench.plugins import catalog

        words = {e.name: f"{e.kind[:-1]}: {e.summary}" for e in catalog() if e.kind != "tasks"}
        return [*_fitting(sorted(words.items()), incomplete), *task(incomplete)]
    return []


def plugin(incomplete: str) -> Words:
    """Completes plugins, working or not."""
    with suppress(Exception):
        from dav_bench.plugins import plugins

        here = plugins()
        found = [(p.name, p.dist) for p in here.loaded] + [(b.name, b.reason) for b in here.broken]
        return _fitting(found, incomplete)
    return []


def one_of(*words: str) -> Callable[[str], Words]:
    """Completes fixed words."""
    return lambda incomplete: _fitting([(word, "") for word in words], incomplete)
