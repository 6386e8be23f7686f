"""Grids in processes of their own: the same bits, limits, failures that stay where they are, and no process left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_runner import assert_same

from dav_bench import launch as launching
from dav_bench.cli.run import go, planned
from dav_bench.errors import DavBenchError, ExitCode
from dav_bench.launch import Limits, Outcome, descendants, launch, resident, seconds, size
from dav_bench.plan import PlannedRun
from dav_bench.runner import Options
from dav_bench.store import RunDir

FAST = ("dav.rounds=3", "dav.samples=8", "dav.guide=false", "eval.samples=16")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def reward(tmp_path: Path) -> Callable[[str], str]:
    """A training reward with a side effect: `reward("line of Python")`."""

    def write(line: str = "pass") -> str:
        body = (
            "import os, signal, time, subprocess, sys\nfrom pathlib import Path\n"
            f"def fn(sequences):\n    {line}\n    return [float(s.count('G')) for s in sequences]\n"
        )
        name = f"mine{len(list(tmp_path.glob('mine*.py')))}.py"
        (tmp_path / name).write_text(body)
        return f"./{name}:fn"

    return write


def grid(*sets: str, out: str = "out", **more: Any) -> list[PlannedRun]:
    options = {"baselines": False, "search": None, **more}
    return planned(methods=["dav"], tasks=["toy-tokens"], sets=[*FAST, *sets], out=Path(out), **options)


def options(out: str = "out", **more: Any) -> Options:
    return Options(out=Path(out), device="cpu", threads=1, **more)


class Notes:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, int]] = []
        self.ends: dict[str, Outcome] = {}

    def run_started(self, event: Any) -> None:
        self.seen.append(("started", event.spec.label, event.spec.seed))

    def round_finished(self, event: Any) -> None:
        self.seen.append(("round", event.spec.label, event.round))

    def run_finished(self, event: Any) -> None:
        self.seen.append((event.status, event.spec.label, event.spec.seed))

    def ended(self, run: PlannedRun, outcome: Outcome) -> None:
        self.ends[run.spec.label] = outcome


def test_a_child_gives_the_bits_of_this_process_and_says_what_happens() -> None:
    notes = Notes()
    (here,), (there,) = grid(out="here"), grid(out="there")
    assert launch([here], options("here"), apart=False) == {here.path: Outcome("done", told=True)}
    made = launch([there], options("there", listeners=(notes,)), apart=True)
    assert made == {there.path: Outcome("done", told=True)}
    assert_same(RunDir.open(here.path), RunDir.open(there.path))
    assert notes.seen == [
        ("started", "dav", 0),
        *(("round", "dav", r) for r in (1, 2, 3)),
        ("done", "dav", 0),
    ]


def test_jobs_share_the_cores_and_wait_for_what_they_build_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "cores", lambda: 6)
    notes = Notes()
    runs = grid(seeds=(0, 1), search="auto", baselines=True)
    assert [r.spec.label for r in runs] == ["exact", "pretrained", *["dav", "dav+tree"] * 2]
    made = launch(runs, Options(out=Path("out"), device="cpu,cpu:0", listeners=(notes,)), jobs=2)
    assert {o.status for o in made.values()} == {"done"}
    for seed in (0, 1):  # once each, and the search only after its base was done
        tree, done = ("started", "dav+tree", seed), ("done", "dav", seed)
        assert notes.seen.count(done) == 1 and notes.seen.index(tree) > notes.seen.index(done)
    machines = [RunDir.open(r.path).env["execution"] for r in runs]
    assert {m["threads"] for m in machines} == {3} and {m["device"] for m in machines} == {"cpu", "cpu:0"}
    notes.seen.clear()
    again = grid(seeds=(0, 1), search="auto", baselines=True)
    assert {r.status for r in again} == {"cached"}
    assert set(launch(again, options(listeners=(notes,)), jobs=2)) == set(made) and not notes.seen


def test_one_that_fails_stops_only_what_builds_on_it(reward: Any, capsys: Any) -> None:
    bad = reward("raise ValueError('no such gene')")
    runs = [*grid(search="tree", reward=bad), *grid("dav.rounds=2", search="tree")]
    assert go(runs, options()) == ExitCode.RUN_FAILED
    shown = capsys.readouterr()
    assert "2 of 4 runs did not finish" in shown.out and "no such gene" in shown.out
    assert "it builds on dav seed 0, which ended as 'failed'" in shown.out
    assert [(r.path / "run.json").exists() for r in runs] == [True, False, True, True]
    assert [RunDir.open(r.path).status for r in (runs[0], *runs[2:])] == ["failed", "done", "done"]


def test_a_crash_is_recorded_and_the_next_run_goes_on(reward: Any) -> None:
    runs = [*grid(reward=reward("os.kill(os.getpid(), signal.SIGSEGV)")), *grid("dav.rounds=2")]
    made = launch(runs, options())
    assert [made[r.path].status for r in runs] == ["failed", "done"]
    crashed = RunDir.open(runs[0].path)
    assert crashed.status == "failed" and "SIGSEGV" in crashed.meta["error"]
    assert crashed.events()[-1]["event"] == "run_finished"


def test_a_run_out_of_time_stops_itself_and_goes_on_later(reward: Any) -> None:
    name = reward("if Path('armed').exists(): time.sleep(600)")
    (first,) = grid(reward=name, out="whole")
    began = time.monotonic()
    assert launch([first], options("whole"), apart=True)[first.path].status == "done"
    enough = 2.0 + 4 * (time.monotonic() - began)

    class Arm:
        def round_finished(self, event: Any) -> None:
            if event.round == 1:
                Path("armed").touch()

    (run,) = grid(reward=name)
    made = launch([run], options(listeners=(Arm(),)), limits=Limits(timeout=enough))
    held = RunDir.open(run.path)
    assert made[run.path].status == held.status == "timeout" and "--timeout" in held.meta["error"]
    Path("armed").unlink()
    (again,) = grid(reward=name)
    assert (again.status, again.reason) == ("resumable", "timeout")
    assert launch([again], options(), apart=True)[run.path].status == "done"
    assert_same(RunDir.open(run.path), RunDir.open(first.path))


def test_a_run_that_does_not_hear_its_alarm_is_killed(reward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "GRACE", 0.3)
    deaf = reward("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM]); time.sleep(60)")
    notes, began = Notes(), time.monotonic()
    (run,) = grid(reward=deaf)
    made = launch([run], options(listeners=(notes,)), limits=Limits(timeout=6.0))
    assert made[run.path].status == RunDir.open(run.path).status == "timeout"
    assert time.monotonic() - began < 60 and notes.ends["dav"].status == "timeout"


@linux
def test_a_run_beyond_its_memory_is_killed_with_what_it_started(reward: Any) -> None:
    code = "x = bytearray(400 << 20); print(1, flush=True); import time; time.sleep(60)"
    eats = reward(
        f"p = subprocess.Popen([sys.executable, '-c', {code!r}], stdout=-1); p.stdout.readline(); time.sleep(60)"
    )
    runs = grid(reward=eats) + grid("dav.rounds=2")
    made = launch(runs, options(), limits=Limits(memory=720 << 20))
    held = RunDir.open(runs[0].path)
    assert made[runs[0].path].status == held.status == "oom" and "GB of memory" in held.meta["error"]
    assert made[runs[1].path].status == "done", made


@linux
def test_resident_memory_counts_descendants() -> None:
    code = "import subprocess, sys, time; c = 'x = bytearray(64 << 20); print(1, flush=True); input()'\n"
    code += "p = subprocess.Popen([sys.executable, '-c', c], stdin=-1); p.wait()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(descendants(process.pid)) == 2 and resident(process.pid) > 64 << 20
    finally:
        for pid in reversed(descendants(process.pid)):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
    assert resident(process.pid) == 0


def test_what_another_process_writes_is_left_to_it() -> None:
    mine, other = grid(), grid("dav.rounds=2")
    with RunDir.create(Path("out"), mine[0].spec):
        for apart in (False, True):
            made = launch([*mine, *other], options(), apart=apart)
            assert made[mine[0].path].status == "busy" and not made[mine[0].path].failed
            assert made[other[0].path].status == "done"
    assert RunDir.open(mine[0].path).status == "killed"  # it is ours to go on with


def test_a_missing_asset_is_told_once_and_gives_its_exit_code(
    monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    runs = planned(methods=["svdd", "best-of-n"], tasks=["dna-gosai"], out=Path("out"), baselines=False)
    if any(r.status == "skip" for r in runs):
        pytest.skip("the plan already knows that something is missing")
    assert go(runs, options()) == ExitCode.MISSING
    assert capsys.readouterr().err.count("Error: ") == 1


# ------------------------------------------------------------------------------------- the whole program


def start(*args: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "dav_bench",
        "run",
        "--task",
        "toy-tokens",
        "--method",
        "dav",
        "--out",
        "out",
    ]
    sets = [word for s in FAST for word in ("--set", s)]
    # a shell without job control starts what stands in the background with SIGINT ignored, and children inherit that
    return subprocess.Popen(
        [*command, *sets, "--search", "none", "--no-baselines", "--threads", "1", *args],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def wait(what: Callable[[], Any], limit: float = 120.0) -> Any:
    until = time.monotonic() + limit
    while not (found := what()):
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.05)
    return found


@pytest.fixture
def asleep(reward: Any) -> Iterator[tuple[subprocess.Popen[bytes], list[int], list[PlannedRun]]]:
    """The program with two runs at work at once, both asleep in their reward, and all processes it has."""
    name = reward("Path(f'asleep-{os.getpid()}').touch(); time.sleep(600)")
    process, family = start("--reward", name, "--seeds", "0-1", "--jobs", "2"), []
    try:
        wait(lambda: len(list(Path.cwd().glob("asleep-*"))) == 2)
        family = descendants(process.pid)
        yield process, family, grid(seeds=(0, 1), reward=name)
    finally:
        for pid in (process.pid, *family):  # where a test fails, more than the first may be left
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def gone(pids: list[int]) -> bool:
    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return not any(alive(pid) for pid in pids)


@linux
def test_children_die_with_the_parent(asleep: Any) -> None:
    process, family, runs = asleep
    assert len(family) >= 4, "the parent, the server it forks from, two children"
    assert {r.status for r in runs} == {"skip"} and "another process" in runs[0].reason
    process.kill()
    process.wait()
    wait(lambda: gone(family), 20)
    assert [RunDir.open(r.path).status for r in runs] == ["killed", "killed"]


@linux
def test_a_stop_of_the_parent_alone_stops_its_children(asleep: Any) -> None:
    process, family, runs = asleep
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == ExitCode.INTERRUPTED
    wait(lambda: gone(family), 20)
    assert [RunDir.open(r.path).status for r in runs] == ["interrupted", "interrupted"]
    assert b"goes on from here" in process.stderr.read()


@linux
def test_the_death_of_a_child_leaves_the_others_alone(asleep: Any) -> None:
    process, _, runs = asleep
    by_seed = {r.spec.seed: json.loads((r.path / "run.json").read_text())["pid"] for r in runs}
    os.kill(by_seed[0], signal.SIGKILL)
    assert b"killed" in process.stderr.readline() + process.stderr.readline() + process.stderr.readline()
    assert RunDir.open(runs[0].path).status == "killed" and RunDir.open(runs[1].path).status == "running"
    assert process.poll() is None


@linux
def test_the_death_of_the_server_takes_its_children_and_is_told(asleep: Any) -> None:
    process, family, runs = asleep
    (server,) = {
        int(Path(f"/proc/{json.loads((r.path / 'run.json').read_text())['pid']}/stat").read_text().split()[3])
        for r in runs
    }
    assert server in family and server != process.pid
    os.kill(server, signal.SIGKILL)
    assert process.wait(60) == ExitCode.RUN_FAILED
    wait(lambda: gone(family), 20)
    assert [RunDir.open(r.path).status for r in runs] == ["killed", "killed"]


# ------------------------------------------------------------------------------------------------ small things


@pytest.mark.parametrize(
    ("text", "value"),
    [("90", 90), ("90s", 90), ("2h", 7200), ("1h30m", 5400), ("1.5 hours", 5400), ("2 d", 172800)],
)
def test_times_are_read(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("8GB", 8 << 30), ("500 MB", 500 << 20), ("1.5g", 3 << 29), ("2GiB", 2 << 30), ("1000", 1000)],
)
def test_sizes_are_read(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "0", "-1h", "h", "2x", "1h-", "nan", "1.2.3", "5 GB 3"])
def test_other_limits_are_refused(text: str) -> None:
    for read in (seconds, size):
        with pytest.raises(DavBenchError, match="is no limit"):
            read(text)


def test_deterministic_is_recorded_and_refuses_what_is_not(reward: Any) -> None:
    sound = (
        "import torch; torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))"  # which of two lands is open
    )
    runs = grid("dav.rounds=2,3", reward=reward(f"if Path('armed').exists(): exec({sound!r})"))
    made = launch(runs[:1], options(deterministic=True), apart=True)
    assert made[runs[0].path].status == "done"
    assert RunDir.open(runs[0].path).env["execution"]["deterministic"] is True
    Path("armed").touch()
    failed = launch(runs[1:], options(deterministic=True), apart=True)[runs[1].path]
    assert failed.status == "failed" and "deterministic" in failed.error
    assert launch(grid("dav.rounds=3", reward="./mine0.py:fn", fresh=True), options(fresh=True), apart=True)


@pytest.mark.parametrize(("budget", "rounds"), [(1, "only round"), (150, "whole rounds")])
def test_a_budget_that_rounds_overshoot_is_told(budget: int, rounds: str, capsys: Any) -> None:
    runs = grid(budget=f"cost={budget}")
    assert go(runs, options()) == ExitCode.OK
    (warning,) = RunDir.open(runs[0].path).meta["warnings"]
    assert rounds in warning and "fewer samples" in warning
    assert warning.split(";")[0][:40] in capsys.readouterr().err


def test_a_budget_that_rounds_keep_to_is_not_told() -> None:
    runs = grid(budget="cost=3000")
    launch(runs, options())
    assert "warnings" not in RunDir.open(runs[0].path).meta
