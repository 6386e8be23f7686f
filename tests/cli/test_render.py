"""Progress as plain lines, and as a bar on a terminal."""

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from dav_bench.cli import render
from dav_bench.events import RoundFinished, RunFinished, RunStarted
from dav_bench.launch import Outcome
from dav_bench.plan import PlannedRun
from dav_bench.spec import RunSpec
from dav_bench.tasks import TaskSpec

SPEC = RunSpec("t", 1, "h", "dav", seed=3)


def play(progress, rounds):
    with progress:
        progress.run_started(RunStarted(SPEC, Path("x"), "dav", rounds=rounds))
        for r in range(1, rounds + 1):
            metrics = {"train/reward": 1.25, "train/seconds": 2.0, "train/other": 9.0}
            progress.round_finished(RoundFinished(SPEC, r, rounds, metrics, seconds=2.0 * r))
        progress.run_finished(RunFinished(SPEC, Path("x"), "nan", "the reward gave NaN", {}, 4.0))


def test_plain_lines_say_round_reward_and_time_left(capsys):
    play(render.Progress(2), 3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[1/2] t dav seed 3"
    assert lines[1] == "  round 1/3  reward 1.25  2 s, about 4 s left"
    assert lines[-1] == "  dav seed 3: nan in 4 s  the reward gave NaN"


def test_many_rounds_are_thinned(capsys):
    play(render.Progress(1), 200)
    lines = [line for line in capsys.readouterr().err.splitlines() if "round" in line]
    assert len(lines) == 20 and "200/200" in lines[-1]


def test_a_terminal_gets_a_bar(monkeypatch):
    made = Console(force_terminal=True, width=120, record=True, file=io.StringIO())
    monkeypatch.setattr(render, "console", lambda stderr=False: made)
    progress = render.Progress(1)
    assert progress.bar is not None
    play(progress, 3)
    assert "dav seed 3: nan" in made.export_text()


def two(progress):
    """Two runs at once, whose rounds come in turn."""
    a, b = (replace(SPEC, seed=seed) for seed in (3, 4))
    with progress:
        for spec in (a, b):
            progress.run_started(RunStarted(spec, Path("x"), "dav", rounds=2))
        for r in (1, 2):
            for spec in (b, a):
                progress.round_finished(RoundFinished(spec, r, 2, {"train/reward": 1.0, "train/seconds": 1.0}))
        progress.run_finished(RunFinished(b, Path("x"), "done", warnings=("beyond its budget",)))
        for spec in (a, replace(SPEC, seed=5)):
            run = PlannedRun(spec, TaskSpec("t", 1, Path()), "new", Path("x"))
            progress.ended(run, Outcome("failed", "nothing is there"))


def test_runs_at_once_are_told_apart(capsys):
    two(render.Progress(3, jobs=2))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["[1/3] t dav seed 3", "[2/3] t dav seed 4"]
    assert [line.split(":")[0] for line in lines[2:6]] == ["  t dav seed 4", "  t dav seed 3"] * 2
    assert lines[6:8] == ["  t dav seed 4: done in 0 s", "  t dav seed 4: beyond its budget"]
    assert lines[8] == "Error: t dav seed 3: nothing is there"
    assert lines[9] == "  t dav seed 5: failed, as before", "an error that many runs share is told once"


def test_runs_at_once_have_a_bar_each(monkeypatch):
    made = Console(force_terminal=True, width=120, record=True, file=io.StringIO())
    monkeypatch.setattr(render, "console", lambda stderr=False: made)
    progress = render.Progress(3, jobs=2)
    two(progress)
    assert not progress.tasks and "t dav seed 4: done" in made.export_text()


def test_tables_keep_whole_words_and_brackets(capsys):
    render.table(("name", "what"), [("a[b]", "x" * 90), ("c", None)])
    out = capsys.readouterr().out
    assert "a[b]" in out and "x" * 90 in out
