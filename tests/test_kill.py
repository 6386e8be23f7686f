"""SIGKILL at random moments to parents and children, and a full disk: the same command goes on to the same bits.

`KILLS=2000 pytest tests/test_kill.py -s` goes on for longer and says how many kills fell where.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from dav_bench import launch as launching
from dav_bench.cli.run import planned
from dav_bench.launch import launch
from dav_bench.plan import PlannedRun
from dav_bench.runner import Options
from dav_bench.scan import scan
from dav_bench.store import RunDir

KILLS = int(os.environ.get("KILLS", "8"))
"""Kills of each kind."""

SETS = ("dav.rounds=6", "dav.samples=8", "dav.guide=false", "eval.samples=16")


def grid(out: Path) -> list[PlannedRun]:
    return planned(methods=["dav"], tasks=["toy-tokens"], seeds=(0, 1), sets=SETS, out=out, baselines=False)


def options(out: Path, **more: Any) -> Options:
    return Options(out=out, device="cpu", threads=1, **more)


def results(run: RunDir) -> tuple[Any, ...]:
    """What must be equal bit for bit: weights, samples, metrics and counts, all but the seconds."""
    weights = run.path / "checkpoints" / "final.safetensors"
    meter = {p: {k: v for k, v in c.items() if k != "seconds"} for p, c in run.meta["meter"].items()}
    metrics = run.metrics().drop("seconds").filter(pl.col("metric") != "seconds")
    return weights.read_bytes() if weights.exists() else b"", meter, run.samples(), metrics


def assert_same(ours: Path, whole: Path) -> None:
    for a, b in zip(grid(ours), grid(whole), strict=True):
        (weights, meter, *frames), (weights2, meter2, *frames2) = (
            results(RunDir.open(r.path)) for r in (a, b)
        )
        assert weights == weights2 and meter == meter2
        for frame, frame2 in zip(frames, frames2, strict=True):
            assert_frame_equal(frame, frame2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert {o.status for o in launch(grid(out), options(out), apart=True).values()} == {"done"}
    return out


def check(out: Path, held: set[str]) -> dict[str, int]:
    """Every run is readable, and says one of `held`; rounds saved by run."""
    rounds = {}
    for record in scan(out):
        if not (record.path / "run.json").exists():  # killed before its first file
            continue
        assert record.problem is None, record.problem
        assert record.status in held
        last = record.run.load_checkpoint()
        rounds[f"{record.label}-{record.seed}"] = last[0] if last else 0
    return rounds


def restart(out: Path, number: int) -> Path:
    """A place for the next grid once one is finished, so that kills may go on."""
    return out / f"again{number}"


class Pids:
    """A listener that knows the processes at work."""

    def __init__(self) -> None:
        self.pids: dict[str, int] = {}

    def run_started(self, event: Any) -> None:
        self.pids[event.spec.dirname] = RunDir(event.run_dir).meta["pid"]

    def run_finished(self, event: Any) -> None:
        self.pids.pop(event.spec.dirname, None)


class Killer(threading.Thread):
    """Kills children of a launch at random moments until it is told to stop."""

    def __init__(self, seed: int, most: int, pids: Pids) -> None:
        super().__init__(daemon=True)
        self.rng, self.most, self.pids, self.kills = random.Random(seed), most, pids, 0
        self.stop = threading.Event()

    def run(self) -> None:
        while self.kills < self.most and not self.stop.wait(self.rng.uniform(0.02, 0.6)):
            alive = list(self.pids.pids.values())
            if alive:
                pid = self.rng.choice(alive)
                try:
                    os.kill(pid, signal.SIGKILL)
                    self.kills += 1
                except ProcessLookupError:
                    pass


def test_children_killed_at_random_moments(whole: Path, tmp_path: Path) -> None:
    kills, attempts, grids, fell = 0, 0, 0, Counter[str]()
    out = restart(tmp_path, 0)
    while kills < KILLS or grids == 0:
        attempts += 1
        assert attempts < 20 * KILLS + 40, "it does not get on"
        pids = Pids()
        killer = Killer(attempts, KILLS - kills, pids)
        killer.start()
        made = launch(grid(out), options(out, listeners=(pids,)), jobs=2)
        killer.stop.set()
        killer.join()
        kills += killer.kills
        statuses = {o.status for o in made.values()}
        assert statuses <= {"done", "killed", "not run"}, made
        fell.update(f"round {r}" for r in check(out, {"done", "killed"}).values())
        if statuses == {"done"}:
            assert_same(out, whole)
            grids += 1
            out = restart(tmp_path, grids)
    print(
        f"\n{kills} kills of children in {attempts} launches, {grids} grids finished; saved then: {dict(fell)}"
    )


def _parent(out: Path) -> None:
    launch(grid(out), options(out), jobs=2)


def wait_for_rounds(more: int, out: Path, process: Any) -> None:
    """Until that many checkpoints were written, or the process has ended."""

    def state() -> dict[Path, int]:
        found = {}
        for path in out.rglob("last.json"):
            with suppress(FileNotFoundError):
                found[path] = path.stat().st_mtime_ns
        return found

    before = state()
    while more > 0 and process.is_alive():
        now = state()
        more -= sum(before.get(path) != written for path, written in now.items())
        before = now
        time.sleep(0.005)


def test_parents_killed_at_random_moments(whole: Path, tmp_path: Path) -> None:
    """A parent with two children dies; they die with it, and the next parent goes on."""
    rng, kills, attempts, grids, fell = random.Random(1), 0, 0, 0, Counter[str]()
    context, out = launching._context(), restart(tmp_path, 0)
    parent = import_module("test_kill")._parent  # by the name that a new process finds, however pytest named it
    while kills < KILLS or grids == 0:
        attempts += 1
        assert attempts < 20 * KILLS + 40, "it does not get on"
        process = context.Process(target=parent, args=(out,))
        process.start()
        if kills < KILLS:
            wait_for_rounds(attempts % 4, out, process)  # right at the start, or once some more are saved
            process.join(rng.uniform(0.0, 0.3))
            process.kill()
        process.join()
        kills += process.exitcode != 0
        assert process.exitcode in (0, -signal.SIGKILL)
        until = time.monotonic() + 30
        while any(r.run.alive for r in scan(out) if r.problem is None) and time.monotonic() < until:
            time.sleep(0.01)
        fell.update(f"round {r}" for r in check(out, {"done", "killed"}).values())
        if process.exitcode == 0:
            assert {r.status for r in grid(out)} == {"cached"}
            assert_same(out, whole)
            grids += 1
            out = restart(tmp_path, grids)
    print(
        f"\n{kills} kills of parents in {attempts} attempts, {grids} grids finished; saved then: {dict(fell)}"
    )


# ------------------------------------------------------------------------------------------------ a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes of memory as a disk."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=777", "tmpfs", str(place)]
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    try:
        done = subprocess.run([*sudo, *mount], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no small disk to fill: {error}")
    if done.returncode:
        pytest.skip(
            f"no small disk to fill: {done.stderr.strip()} (test_store.py limits the size of files instead)"
        )
    yield place
    subprocess.run([*sudo, "umount", "--lazy", str(place)], check=True, timeout=20)


class Fill:
    """A listener that leaves no room once a round is saved."""

    def __init__(self, place: Path, after: int) -> None:
        self.filler, self.after = place / "filler", after

    def round_finished(self, event: Any) -> None:
        if event.round == self.after and not self.filler.exists():
            with open(self.filler, "wb", buffering=0) as file:
                for size in (1 << 16, 1 << 10, 1):
                    try:
                        while True:
                            file.write(b"x" * size)
                    except OSError:
                        continue


@pytest.mark.parametrize("apart", [False, True], ids=["here", "apart"])
def test_a_full_disk_loses_nothing(apart: bool, whole: Path, small_disk: Path) -> None:
    out = small_disk / "results"
    for after in (1, 3):
        made = launch(grid(out), options(out, listeners=(Fill(small_disk, after),)), apart=apart)
        assert {o.status for o in made.values()} <= {"disk", "failed", "not run", "done"}, made
        assert "disk" in {o.status for o in made.values()}
        full = next(o for o in made.values() if o.status == "disk")
        assert "no room left" in full.error and "free some space" in full.error
        assert shutil.disk_usage(small_disk).free < 1 << 17
        check(out, {"disk", "done"})
        (small_disk / "filler").unlink()
    assert {o.status for o in launch(grid(out), options(out), apart=apart).values()} == {"done"}
    assert_same(out, whole)
