"""From a plan to finished runs: in this process, or each in a process of its own, with limits and several at a time.

Children are forked from a server that has imported the heavy packages once and computed nothing, so a cell costs
no new import of torch. A child that crashes, hangs or eats the memory takes only its own run with it, and what it
had saved is where the next command goes on.

Memory is watched from outside as the resident size of the child and its descendants. A limit on the address space
(RLIMIT_AS) would be a trap: torch and CUDA map many times what they use, and a mapping that fails inside them ends
in an abort instead of an error.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dav_bench.errors import DavBenchError, ExitCode, OutOfTime

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from dav_bench.plan import PlannedRun
    from dav_bench.runner import Options

GRACE = 10.0
"""Seconds that a child has to end by itself after its time is over or the user stopped the command."""

WATCH = 0.2
"""Seconds between two looks at the clock and the memory of the children."""

_PRELOAD = [
    "polars",
    "torch",
    "torch._dynamo",  # the first optimizer imports it, whether anything is compiled or not
    "safetensors.torch",
    "dav_bench.runner",
    "dav_bench.core.fit",
    "dav_bench.core.search",
    "dav_bench.builtin.metrics.base",
]


@dataclass(frozen=True)
class Limits:
    """What one run may take from the machine; none is unlimited."""

    timeout: float | None = None
    """Seconds on the wall clock, from the start of its process; a resumed run has the full time again."""
    memory: int | None = None
    """Bytes of resident memory of its process and their descendants together."""

    def __bool__(self) -> bool:
        return self.timeout is not None or self.memory is not None


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: str
    """done | failed | oom | timeout | nan | disk | interrupted, killed (its process vanished), busy (another process
    writes it) or "not run" (the run it builds on did not end well)."""
    error: str = ""
    """What went wrong."""
    code: ExitCode = ExitCode.RUN_FAILED
    """Exit code of a command that ran nothing else."""
    told: bool = False
    """The run's own `run_finished` said so already."""

    @property
    def failed(self) -> bool:
        """Whether the command should say so with its exit code; what another process writes is no failure."""
        return self.status not in ("done", "busy")


_INTERRUPTED = Outcome("interrupted", "stopped by the user; the same command resumes it", told=True)


def launch(
    runs: Sequence[PlannedRun],
    options: Options,
    *,
    jobs: int = 1,
    limits: Limits | None = None,
    apart: bool | None = None,
    trackers: Sequence[str] = (),
    outcomes: dict[Path, Outcome] | None = None,
) -> dict[Path, Outcome]:
    """Execute the runs of a plan; one that fails does not stop the others, only those that build on it.

    Args:
        runs: In the order of execution, without those that are skipped.
        options: How each is executed. Without `threads`, parallel jobs share the cores; several devices
            (`cuda:0,cuda:1`) are dealt to the jobs in turn. Its listeners stay in this process: they are told of
            starts, rounds and ends, and where they have the methods, `reused(run)` of what was finished before
            and `ended(run, outcome)` of what could not say so itself.
        jobs: Most runs at once.
        limits: What each may take; needs processes apart.
        apart: Each run in a process of its own; None does so where there are several, or limits.
        trackers: Names of trackers, built in the process of each run.
        outcomes: Filled as runs end, so that a caller who is interrupted has them.

    Returns:
        Outcome by run directory.

    Raises:
        KeyboardInterrupt: after every run was recorded as interrupted.
    """
    outcomes = {} if outcomes is None else outcomes
    limits = limits or Limits()
    tell = _Tell(options.listeners)
    todo = []
    for run in runs:
        if run.status == "cached":
            outcomes[run.path] = Outcome("done")
            tell("reused", run)
        else:
            todo.append(run)
    if apart is None:
        apart = jobs > 1 or bool(limits) or len(todo) > 1
    if apart:
        if limits.memory is not None and not Path("/proc/self/statm").exists():
            raise DavBenchError("--memory needs /proc, which this system does not have.", fix="leave it out")
        _Pool(options, jobs, limits, trackers, tell, outcomes).run(todo)
    else:
        _here(todo, options, trackers, tell, outcomes)
    return outcomes


class _Tell:
    """Calls a method of every listener that has it."""

    def __init__(self, listeners: Sequence[Any]) -> None:
        self.listeners = listeners

    def __call__(self, name: str, *args: Any) -> None:
        for listener in self.listeners:
            method = getattr(listener, name, None)
            if method is not None:
                method(*args)


def _obstacle(run: PlannedRun, outcomes: Mapping[Path, Outcome], root: Path) -> Outcome | None:
    """Why a run cannot begin: the training run it builds on ended badly in this launch."""
    base = None if run.base is None else outcomes.get(root / run.base.dirname)
    if run.base is None or base is None or base.status == "done":
        return None
    why = f"it builds on {run.base.label} seed {run.base.seed}, which ended as '{base.status}'"
    return Outcome("busy" if base.status == "busy" else "not run", why, base.code)


# ---------------------------------------------------------------------------------------- in this process


def _here(
    runs: Sequence[PlannedRun],
    options: Options,
    trackers: Sequence[str],
    tell: _Tell,
    outcomes: dict[Path, Outcome],
) -> None:
    device = options.device.split(",")[0]
    for run in runs:
        outcome = _obstacle(run, outcomes, options.out)
        if outcome is None:
            told = (*options.listeners, *_trackers(trackers))
            outcome = _executed(run.spec, replace(options, device=device, listeners=told))
        outcomes[run.path] = outcome
        if not outcome.told:
            tell("ended", run, outcome)
        if outcome.status == "interrupted":
            raise KeyboardInterrupt


def _trackers(names: Sequence[str]) -> list[Any]:
    from dav_bench.plugins import catalog

    return [catalog().get("trackers", name).build() for name in names]


def _executed(spec: Any, options: Options) -> Outcome:
    from dav_bench.runner import execute
    from dav_bench.store import Busy

    try:
        run = execute(spec, options)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Busy as err:
        return Outcome("busy", str(err), err.code)
    except DavBenchError as err:
        if os.environ.get("DAV_BENCH_TRACEBACK"):
            raise
        return Outcome("failed", str(err), err.code)
    return Outcome(run.status, str(run.meta.get("error") or ""), told=True)


# ---------------------------------------------------------------------------------- in processes of their own


def _context() -> Any:
    """Processes forked from a clean server where forks are safe; started anew elsewhere."""
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


@dataclass(frozen=True)
class _Order:
    """What a child is to do, and the surroundings in which it was asked."""

    spec: Any
    options: Options
    timeout: float | None
    trackers: tuple[str, ...]
    strict: bool
    environ: Mapping[str, str]


class _Relay:
    """In the child: sends the life of the run to the parent."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def _send(self, name: str, event: Any) -> None:
        with suppress(OSError):  # the parent is gone, and so are we in a moment
            self.pipe.send((name, event))

    def run_started(self, event: Any) -> None:
        self._send("run_started", event)

    def round_finished(self, event: Any) -> None:
        self._send("round_finished", event)

    def run_finished(self, event: Any) -> None:
        self._send("run_finished", event)


def _child(order: _Order, pipe: Connection) -> None:
    """Main function of a child: one run under a clock."""
    _die_with_the_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(order.environ)
    from dav_bench import plugins

    if order.timeout is not None:
        signal.signal(signal.SIGALRM, _ring)
        signal.setitimer(signal.ITIMER_REAL, order.timeout)
    try:
        plugins.reset(order.strict)
        told = (*_trackers(order.trackers), _Relay(pipe))
        outcome = _executed(order.spec, replace(order.options, listeners=told))
    except KeyboardInterrupt:
        outcome = _INTERRUPTED
    except DavBenchError as err:
        outcome = Outcome("failed", str(err), err.code)
    except OutOfTime:  # before the run began, or after it ended
        return
    with suppress(OSError):
        pipe.send(("outcome", outcome))


def _ring(*_: Any) -> None:
    raise OutOfTime


def _die_with_the_parent() -> None:
    """Leave no child behind, however the parent ends: its end of a pipe closes with it, on every system.

    Linux also kills the child with the server it was forked from.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="dav-bench parent", daemon=True).start()
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@dataclass
class _Job:
    """A child at work."""

    run: PlannedRun
    slot: int
    process: Any
    pipe: Connection
    began: float = field(default_factory=time.monotonic)
    outcome: Outcome | None = None
    over: str = ""  # why the parent killed it


class _Pool:
    """At most `jobs` children at a time, watched until all are done."""

    def __init__(
        self,
        options: Options,
        jobs: int,
        limits: Limits,
        trackers: Sequence[str],
        tell: _Tell,
        outcomes: dict[Path, Outcome],
    ) -> None:
        from dav_bench import plugins

        threads = options.threads or (max(1, cores() // jobs) if jobs > 1 else None)
        self.options, self.limits = replace(options, threads=threads, listeners=()), limits
        self.tell, self.outcomes = tell, outcomes
        self.devices = options.device.split(",")
        self.free = list(range(jobs))
        self.jobs: list[_Job] = []
        self.context = _context()
        self.order = _Order(
            None, self.options, limits.timeout, tuple(trackers), plugins.plugins().strict, dict(os.environ)
        )

    def run(self, runs: Sequence[PlannedRun]) -> None:
        waiting = list(runs)
        try:
            while waiting or self.jobs:
                while self.free and (run := self._next(waiting)) is not None:
                    self._start(run)
                self._watch()
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            for job in self.jobs:
                job.process.kill()
            while self.jobs:
                self._reap(self.jobs[0])

    def _next(self, waiting: list[PlannedRun]) -> PlannedRun | None:
        """The first run whose base is not still to come or under way; those without hope are dropped here."""
        pending = {r.spec.identity for r in waiting} | {j.run.spec.identity for j in self.jobs}
        for run in list(waiting):
            hopeless = _obstacle(run, self.outcomes, self.options.out)
            if hopeless is not None:
                waiting.remove(run)
                self._end(run, hopeless)
            elif run.base is None or run.base.identity not in pending:
                waiting.remove(run)
                return run
        return None

    def _start(self, run: PlannedRun) -> None:
        slot = self.free.pop(0)
        options = replace(self.options, device=self.devices[slot % len(self.devices)])
        ours, theirs = self.context.Pipe(duplex=False)
        order = replace(self.order, spec=run.spec, options=options)
        process = self.context.Process(target=_child, args=(order, theirs), name=run.path.name)
        process.start()
        theirs.close()
        self.jobs.append(_Job(run, slot, process, ours))

    def _watch(self, wait: float = WATCH) -> None:
        """Pass on what children say, end those beyond their limits, collect those that ended."""
        connection.wait([w for job in self.jobs for w in (job.pipe, job.process.sentinel)], wait)
        for job in list(self.jobs):
            self._listen(job)
            if job.process.exitcode is not None:
                self._reap(job)
            elif not job.over and (why := self._beyond(job)):
                job.over = why
                job.process.kill()

    def _listen(self, job: _Job) -> None:
        with suppress(EOFError, OSError):
            while job.pipe.poll():
                name, value = job.pipe.recv()
                if name == "outcome":
                    job.outcome = value
                else:
                    self.tell(name, value)

    def _beyond(self, job: _Job) -> str:
        """Which limit a child has passed; its own alarm should have ended it at the first."""
        timeout, memory = self.limits.timeout, self.limits.memory
        if timeout is not None and time.monotonic() - job.began > timeout + GRACE:
            return "timeout"
        if memory is not None and resident(job.process.pid) > memory:
            return "oom"
        return ""

    def _reap(self, job: _Job) -> None:
        job.process.join()
        self._listen(job)
        self.jobs.remove(job)
        self.free.append(job.slot)
        self.free.sort()
        self._end(job.run, job.outcome or self._obituary(job))
        job.pipe.close()
        job.process.close()

    def _obituary(self, job: _Job) -> Outcome:
        """How a child ended that could not say so itself; recorded in its run."""
        from dav_bench.store import RunDir

        code = job.process.exitcode
        if job.over == "timeout" or (not code and self.limits.timeout is not None):
            found = Outcome("timeout", str(OutOfTime()))
        elif job.over == "oom":
            size = (self.limits.memory or 0) / 2**30
            found = Outcome(
                "oom",
                f"it held more than {size:.3g} GB of memory; the same command with a larger --memory goes on, "
                "or --fresh with a smaller --micro-batch starts over",
            )
        elif code in (-signal.SIGKILL, 255):  # from outside: its child, or the server that forked it
            found = Outcome("killed", "its process was killed (by hand, or by the system for want of memory)")
        elif code and code < 0:
            found = Outcome("failed", f"its process crashed: {signal.Signals(-code).name}")
        else:
            found = Outcome("failed", f"its process ended with exit code {code}")
        held = None
        for spec in (job.run.base, job.run.spec):  # it may have been at work on the run it builds on
            if spec is not None:
                held = RunDir.bury(self.options.out / spec.dirname, found.status, found.error)
        return (
            found
            if held is None
            else replace(found, status=held.status, error=held.meta["error"] or found.error)
        )

    def _end(self, run: PlannedRun, outcome: Outcome) -> None:
        self.outcomes[run.path] = outcome
        if not outcome.told:
            self.tell("ended", run, outcome)

    def _stop(self) -> None:
        """After Ctrl-C: the terminal told all children too; those it did not reach are told now, then killed."""
        with suppress(KeyboardInterrupt):  # a second Ctrl-C: at once
            for seconds, sign in ((1.0, signal.SIGINT), (GRACE, signal.SIGKILL)):
                until = time.monotonic() + seconds
                while self.jobs and time.monotonic() < until:
                    self._watch(0.05)
                for job in self.jobs:
                    with suppress(ProcessLookupError):
                        os.kill(job.process.pid, sign)


# ------------------------------------------------------------------------------------------------ the machine


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident(pid: int) -> int:
    """Bytes of resident memory of a process and its descendants (Linux); pages they share count for each."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(_pages(one) for one in descendants(pid)) * page


def _pages(pid: int) -> int:
    with suppress(OSError, ValueError, IndexError):  # it may end while we look
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return 0


def descendants(pid: int) -> list[int]:
    """A process and all that it started, directly or not (Linux)."""
    children: dict[int, list[int]] = {}
    for one, parent in _parents():
        children.setdefault(parent, []).append(one)
    found = [pid]
    for one in found:
        found += children.get(one, ())
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError, ValueError, IndexError):
                stat = Path(f"/proc/{entry}/stat").read_text()
                yield int(entry), int(stat.rpartition(")")[2].split()[1])


_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def seconds(text: str) -> float:
    """`90`, `90s`, `2h`, `1h30m` in seconds."""
    parts = re.findall(r"([0-9.]+)\s*([a-z]*)", text.strip().lower())
    return _amount(text, parts, _SECONDS, lambda unit: unit[:1], "--timeout 2h, 90m or 1h30m")


def size(text: str) -> int:
    """`8GB`, `500MB` in bytes; units are powers of 1024."""
    parts = re.findall(r"([0-9.]+)\s*([A-Z]*)", text.strip().upper())
    return int(_amount(text, parts[:1], _BYTES, lambda unit: unit[:1], "--memory 8GB or 500MB"))


def _amount(
    text: str,
    parts: Sequence[tuple[str, str]],
    units: Mapping[str, float],
    short: Callable[[str], str],
    fix: str,
) -> float:
    whole = "".join(number + unit for number, unit in parts)
    try:
        total = sum(float(number) * units[short(unit)] for number, unit in parts)
    except (KeyError, ValueError):
        total = 0.0
    if not total > 0 or whole.lower() != re.sub(r"\s", "", text).lower():
        raise DavBenchError(f"{text!r} is no limit.", fix=fix)
    return total
