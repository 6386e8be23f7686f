"""Suites name grids; the suite `core` and the committed boards hold the same runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from dav_bench.cli.run import go, planned, planned_suite
from dav_bench.errors import DavBenchError
from dav_bench.known import board, expected
from dav_bench.plan import PlannedRun
from dav_bench.runner import Options
from dav_bench.store import RunDir
from dav_bench.suites import Grid, all_suites, find_suite, read_suites

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
BOARDS = sorted((RESULTS / "leaderboards").glob("*.parquet"))

SUITE = """
schema = 1

[quick]
title = "A quick look"
threads = 2

[[quick.grid]]
task = ["toy-tokens", "toy-mixture"]
method = "dav"
seeds = "0-1"
set = ["dav.rounds=2", "dav.width=2,4"]

[[quick.grid]]
task = "toy-tokens"
method = ["svdd", "dav"]
baselines = false
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "suites.toml").write_text(SUITE)
    return tmp_path


# ------------------------------------------------------------------------------------------ what is committed


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> list[PlannedRun]:
    """The suite in a fresh clone: nothing but the boards lies in its results."""
    out = tmp_path_factory.mktemp("clone")
    shutil.copytree(RESULTS / "leaderboards", out / "leaderboards")
    return planned_suite(find_suite("core"), out=out)


def test_every_cell_of_the_core_suite_is_published(core: list[PlannedRun]) -> None:
    odd = [
        (r.spec.task, r.spec.label, r.spec.seed, r.status, r.reason) for r in core if r.status != "published"
    ]
    assert core and odd == []


def test_every_task_with_a_board_is_in_the_core_suite() -> None:
    assert {path.stem for path in BOARDS} == {name.replace("/", "~") for name in find_suite("core").tasks}


@pytest.mark.parametrize("path", BOARDS, ids=lambda p: p.stem)
def test_every_published_row_but_a_baseline_is_in_the_core_suite(path: Path, core: list[PlannedRun]) -> None:
    ours = [r for r in core if r.spec.task.replace("/", "~") == path.stem]
    planned_here = {r.spec.identity for r in ours}
    abouts = pl.read_parquet(path).filter(pl.col("kind") == "about").select("label", "run", "text").rows()
    assert len(abouts) == len(board(RESULTS, ours[0].spec.task).runs)
    extra = [(label, run) for label, run, text in abouts if json.loads(text)["identity"] not in planned_here]
    assert [row for row in extra if row[0] not in ours[0].task.baselines] == []


def test_what_is_published_says_what_it_costs(core: list[PlannedRun]) -> None:
    for run, cost in zip(core, expected(core, core[0].path.parents[3]), strict=True):
        assert cost is not None and cost.source == "published" and cost.seconds is not None, run.spec.label
        assert cost.rows > 0 or run.spec.method in ("real", "exact"), run.spec.label


def test_a_dry_run_of_the_core_suite_as_the_program_shows_it(tmp_path: Path) -> None:
    shutil.copytree(RESULTS / "leaderboards", tmp_path / "results" / "leaderboards")
    code = (
        "import sys; from dav_bench.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "--suite", "core", "--dry-run", "--json"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {r["status"] for r in rows} == {"published"} and all(r["expected"]["seconds"] >= 0 for r in rows)


# ------------------------------------------------------------------------------------------------ the status


def test_published_gives_way_to_what_lies_here_and_to_fresh(tmp_path: Path) -> None:
    shutil.copytree(RESULTS / "leaderboards", tmp_path / "leaderboards")

    def status(sets: tuple[str, ...] = (), fresh: bool = False) -> PlannedRun:
        options = {"baselines": False, "out": tmp_path, "fresh": fresh, "sets": sets}
        return planned(methods=["best-of-n"], tasks=["tfbind8"], **options)[0]  # type: ignore[arg-type]

    run = status()
    assert run.status == "published"
    assert status(fresh=True).status == "new"
    assert status(("best-of-n.n=7",)).status == "new", "another setting is another run"
    assert status(("eval.samples=64",)).status == "new"
    RunDir.create(tmp_path, run.spec).close()
    assert (status().status, status().reason) == ("new", "the last attempt ended: killed")
    (tmp_path / "leaderboards" / "tfbind8.parquet").write_bytes(b"PAR1 half a file")
    torn = status(("best-of-n.n=7",))
    assert torn.status == "new" and "cannot be read" in torn.reason


def test_costs_come_from_another_seed_or_the_budget_or_nowhere(tmp_path: Path) -> None:
    sets = ["dav.rounds=2", "dav.samples=8", "dav.guide=false", "eval.samples=16"]
    common = {"methods": ["dav"], "tasks": ["toy-tokens"], "out": tmp_path, "baselines": False}
    runs = planned(sets=sets, **common)  # type: ignore[arg-type]
    assert expected(runs, tmp_path) == [None, None]
    assert go(runs, Options(out=tmp_path, device="cpu", threads=1)) == 0
    assert [c.rows for c in expected(planned(sets=sets, **common), tmp_path)] == [0, 0]  # type: ignore[arg-type, union-attr]
    other = planned(sets=sets, seeds=(1,), **common)  # type: ignore[arg-type]
    trained, searched = expected(other, tmp_path)
    assert trained is not None and searched is not None and trained.source == "local"
    assert trained.rows > searched.rows > 0, "a search does not pay again for the training it builds on"
    under = planned(budget="cost=5000", search=None, **common)  # type: ignore[arg-type]
    (cost,) = expected(under, tmp_path)
    assert cost is not None and (cost.rows, cost.seconds, cost.source) == (5000, None, "budget")


# ------------------------------------------------------------------------------------------------- the file


def test_a_suite_is_its_commands(place: Path) -> None:
    suite = find_suite("quick")
    assert (suite.threads, suite.tasks, suite.origin) == (2, ("toy-tokens", "toy-mixture"), "./tasks")
    runs = planned_suite(suite, out=place)
    by_hand = planned(methods=["dav"], tasks=["toy-tokens", "toy-mixture"], seeds=(0, 1),
                      sets=["dav.rounds=2", "dav.width=2,4"], out=place)  # fmt: skip
    by_hand += planned(methods=["svdd", "dav"], tasks=["toy-tokens"], baselines=False, out=place)
    assert {r.spec.identity for r in runs} == {r.spec.identity for r in by_hand}
    assert len({r.spec.identity for r in runs}) == len(runs)


def test_tasks_and_methods_pick_from_a_suite(place: Path) -> None:
    suite = find_suite("quick")
    few = planned_suite(suite, tasks=["toy-mixture"], out=place)
    assert {r.spec.task for r in few} == {"toy-mixture"} and {r.spec.method for r in few} >= {
        "dav",
        "pretrained",
    }
    few = planned_suite(suite, methods=["svdd"], out=place)
    assert {r.spec.method for r in few} == {"svdd", "pretrained", "exact"}
    with pytest.raises(DavBenchError, match="did you mean 'toy-tokens'") as error:
        planned_suite(suite, tasks=["toy-token"], methods=["rwr"], out=place)
    assert "method 'rwr'" in error.value.why


def test_one_s_own_suites_come_first_and_the_shipped_ones_stay(place: Path) -> None:
    assert set(all_suites()) == {"quick", "core"} and all_suites()["core"].origin == "shipped"
    with pytest.raises(DavBenchError, match="did you mean 'quick'"):
        find_suite("quik")


def test_everything_wrong_with_a_file_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "suites.toml").write_text(
        "schema = 2\nodd = 3\n[a]\ntitel = 'x'\nthreads = true\n[[a.grid]]\nmethod = 'dav'\nseed = '0-2'\n"
        "[[a.grid]]\ntask = 'dna'\nheldout = 'no'\nbudget = 5\n[b]\n"
    )
    with pytest.raises(DavBenchError) as error:
        read_suites(tmp_path / "suites.toml")
    for part in (
        "schema must be 1", "odd: expected a table", "a.titel: unknown key; did you mean 'title'?",
        "a.threads: expected int", "a.grid 1: unknown option 'seed'; did you mean 'seeds'?", "a.grid 1: no task",
        "a.grid 2: no method", "a.grid 2.heldout: cannot be 'no'", "a.grid 2.budget: cannot be 5", "b: no [[b.grid]]",
    ):  # fmt: skip
        assert part in error.value.why, part


def test_options_of_a_grid_are_options_of_the_command() -> None:
    """Each field of a grid is an option of `dav-bench run`."""
    import inspect

    from dav_bench.cli.run import run

    options = {name.rstrip("_") for name in inspect.signature(run).parameters}
    assert set(Grid.__dataclass_fields__) <= options


@pytest.mark.parametrize(
    "option", [["--seeds", "0-2"], ["--set", "dav.width=2"], ["--search", "none"], ["--no-baselines"]]
)
def test_a_suite_takes_no_settings(option: list[str], place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dav_bench", "run", "--suite", "quick", "--dry-run", *option],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and f"--suite does not go with {option[0]}" in done.stderr
