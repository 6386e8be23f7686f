"""Methods, searchers and trainers, run on worlds whose models are tiny and exact."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch

from dav_bench.config import settings_of
from dav_bench.errors import DavBenchError
from dav_bench.events import RoundFinished
from dav_bench.plan import PlannedRun, trains
from dav_bench.registry import Entry, active
from dav_bench.runner import Options, execute
from dav_bench.store import RunDir

from .checklist import Checklist, Fail, label_of
from .watch import PHASES, SEEN, Watch
from .writes import Writes

TOYS = ("toy-mixture", "toy-tokens")
"""A continuous task and one of tokens."""

_SALTS = count(1)
_SMALL = {"rounds": 2, "samples": 16, "minibatch": 64}
_COUNTED = ("forward", "backward", "reward", "reward_backward")


class _Stop:
    """Ctrl-C after the first round."""

    def round_finished(self, event: RoundFinished) -> None:
        if event.round == 1:
            raise KeyboardInterrupt


@contextmanager
def sandbox() -> Iterator[tuple[Path, Path]]:
    """(results, elsewhere): a results folder, and the working directory while it lasts; temporary files go beside."""
    with tempfile.TemporaryDirectory(prefix="dav-bench-check-") as folder:
        root = Path(folder)
        for name in ("results", "work", "tmp"):
            (root / name).mkdir()
        before, held = os.getcwd(), tempfile.tempdir
        shown = os.environ.get("DAV_BENCH_TRACEBACK")
        os.environ["DAV_BENCH_TRACEBACK"] = "1"  # what goes wrong in a run reaches us with its place
        os.chdir(root / "work")
        tempfile.tempdir = str(root / "tmp")
        try:
            yield root / "results", root / "work"
        finally:
            tempfile.tempdir = held
            os.chdir(before)
            os.environ.pop("DAV_BENCH_TRACEBACK")
            if shown is not None:
                os.environ["DAV_BENCH_TRACEBACK"] = shown


def planned_small(entry: Entry, task: str, out: Path) -> list[PlannedRun]:
    from dav_bench.cli.run import planned

    sets = ["eval.samples=16"] + (["sampler.steps=6"] if task == "toy-mixture" else [])
    named: dict[str, Any] = {"methods": [], "search": None}
    if entry.kind == "methods":
        known = settings_of(entry.config) if entry.config else {}
        sets += [f"{entry.name}.{key}={value}" for key, value in _SMALL.items() if key in known]
        named["methods"] = [entry.name]
    else:
        sets += [f"training.{key}={value}" for key, value in _SMALL.items()]
        searcher = entry.kind == "searchers"
        named["pair"] = (entry.name, "forward-kl") if searcher else ("rollout", entry.name)
        named["search"] = "auto" if searcher else None
    return planned(tasks=[task], sets=sets, out=out, baselines=False, **named)


def _allowed(entry: Entry, run: PlannedRun) -> dict[str, frozenset[str]]:
    """What the component under test may use in each phase; the other half of a pair may use anything."""
    every = frozenset(SEEN)
    if entry.kind == "methods":
        mine = frozenset(active(entry.requires, run.spec.params))
        if not trains(entry):  # its policy is the pretrained model
            mine |= {"reference"}
        return dict.fromkeys(PHASES, mine)
    part = entry.kind[:-1]
    mine = frozenset(active(entry.requires, run.spec.params[part]["params"]))
    if entry.kind == "trainers":
        return {**dict.fromkeys(PHASES, every), "fit": mine}
    sample = mine if run.spec.search else every  # a tuned model is sampled plainly
    return {"search": mine, "fit": every, "sample": sample}


def execute_anew(run: PlannedRun, out: Path, *listeners: Any) -> RunDir:
    """A run whose randomness must come from its own noise: the global generators are elsewhere each time."""
    import random

    import numpy as np

    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    salt = next(_SALTS)
    torch.manual_seed(salt), np.random.seed(salt), random.seed(salt)
    try:
        return execute(run.spec, Options(out=out, device="cpu", threads=1, listeners=listeners))
    finally:
        torch.random.set_rng_state(state)
        torch.set_num_threads(threads)


def run(checklist: Checklist, entry: Entry) -> None:
    """Methods, searchers and trainers on both toys."""
    if entry.kind == "methods":
        with checklist.item(
            label_of(entry, "its parts need no more than it declares"), "add it to requires= in register"
        ):
            built = entry.build({})
            lacking = sorted(
                built.requires - {need.split(" if ")[0] for need in entry.requires} - {"sample", "step"}
            )
            if lacking:
                raise Fail(f"search and loss need {', '.join(lacking)}")
    for toy in TOYS:
        with sandbox() as (out, work):
            _on(checklist, entry, toy, out, work)


def _on(checklist: Checklist, entry: Entry, toy: str, out: Path, work: Path) -> None:
    def label(what: str) -> str:
        return label_of(entry, f"{what} on {toy}")

    try:
        runs = planned_small(entry, toy, out)
    except DavBenchError as err:
        with checklist.item(label("it can be planned")):
            raise err
        return
    if runs[0].status == "skip":
        checklist.skip(label("it runs"), runs[0].reason)
        return
    whole: list[RunDir] = []
    watches: list[Watch] = []
    with Writes((out, out.parent / "tmp")) as writes, checklist.item(label("it runs")) as item:
        for run in runs:
            watch = Watch(_allowed(entry, run))
            watches.append(watch)
            with watch.installed():
                whole.append(execute_anew(run, out))
        item.note = f"{2 if trains(entry) or entry.kind != 'methods' else 0} rounds and 16 samples"
    undeclared = [use for watch in watches for use in watch.undeclared]
    with checklist.item(
        label("it uses no more than it declares"), "add the capability to requires= in register"
    ) as item:
        if undeclared:
            raise Fail(f"undeclared: {', '.join(undeclared)}")
        item.note = ", ".join(sorted({use for watch in watches for use in watch.used})) or "steps alone"
    with checklist.item(
        label("it writes nowhere but in its run directory"), "write below `event.run_dir`, or nothing at all"
    ):
        if writes.found:
            raise Fail("; ".join(f"{path} (by {where})" for path, where in list(writes.found.items())[:4]))
    if len(whole) < len(runs):
        return
    exact = (
        "target.samples" in entry.requires
    )  # a yardstick draws from a known law, which costs nobody anything
    for run, watch, done in zip(runs, watches, whole, strict=True) if not exact else ():
        _metered(checklist, label("every network and reward row is counted"), run, watch, done)
    _repeats(checklist, label, entry, toy, whole)


def _metered(checklist: Checklist, name: str, run: PlannedRun, watch: Watch, done: RunDir) -> None:
    fix = "call networks by model.predict or model.step and the reward by ctx.reward; count backward rows on ctx.meter"
    with checklist.item(name, fix) as item:
        counts = done.meta["meter"]
        if run.spec.search:  # the training it builds on was another run
            counts = {"sample": counts["sample"]}
        said = {what: sum(counts[p][what] for p in PHASES if p in counts) for what in _COUNTED}
        short = [
            f"{watch.seen[what]} rows of {what} were computed and {said[what]:.0f} counted"
            for what in _COUNTED
            if watch.seen[what] > said[what]
        ]
        item.note = ", ".join(f"{watch.seen[what]} {what}" for what in _COUNTED if watch.seen[what])
        if short:
            raise Fail("; ".join(short))


def _repeats(
    checklist: Checklist, label: Callable[[str], str], entry: Entry, toy: str, whole: list[RunDir]
) -> None:
    """The same runs again, interrupted after their first round where they train, and from other global seeds."""
    resumes = entry.kind != "methods" or trains(entry)
    name = "interrupted and resumed it ends the same" if resumes else "the same seed gives the same samples"
    fix = "draw from the noise that is handed in, by `fold`, and keep state in modules(ctx)"
    with sandbox() as (out, _), checklist.item(label(name), fix):
        for run, first in zip(planned_small(entry, toy, out), whole, strict=True):
            if resumes and not run.spec.search:
                with suppress(KeyboardInterrupt):
                    execute_anew(run, out, _Stop())
            again = execute_anew(run, out)
            differs = _difference(first, again)
            if differs and resumes:
                with sandbox() as (anew, _):
                    third = execute_anew(planned_small(entry, toy, anew)[0], anew)
                    cause = (
                        "and so do two whole runs"
                        if _difference(whole[0], third)
                        else "two whole runs do not"
                    )
                raise Fail(f"{differs} differ; {cause}")
            if differs:
                raise Fail(f"{differs} differ between two runs of one seed")


def _difference(a: RunDir, b: RunDir) -> str:
    """Name of the first table that differs, or an empty string."""
    if not a.samples().equals(b.samples(), null_equal=True):
        return "samples"
    timed = ["seconds"]
    first, second = (
        m.drop(timed).filter(m["metric"] != "seconds") for m in (run.metrics() for run in (a, b))
    )
    return "" if first.equals(second, null_equal=True) else "numbers of the rounds"
