"""The committed board: written by publish alone, rebuilt from its parquet file, checked in a fresh clone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from dav_bench.cli import app
from dav_bench.cli.run import planned, seed_list
from dav_bench.errors import DavBenchError
from dav_bench.known import board_path
from dav_bench.plugins import catalog
from dav_bench.report.published import check, load_published, publish
from dav_bench.report.rows import read_row
from dav_bench.report.terms import REFERENCE, arguments, default_settings, terms_of
from dav_bench.spec import RunSpec
from dav_bench.store import RunDir
from dav_bench.tasks import find_task

RunOf = Callable[..., list[RunDir]]


def snapshot(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.parent.iterdir())}


def test_publishing_the_same_runs_twice_gives_the_same_bytes(toy: Path, run_of: RunOf) -> None:
    runs = run_of(methods=["dav"], seeds=[0, 1])
    path = board_path(toy, "toy")
    done = publish(find_task("toy"), runs, path)
    assert len(done.added) == len(runs) == 6 and not done.left_out
    first = snapshot(path)
    assert set(first) == {"toy.parquet", "toy.md", "toy.csv"}
    publish(find_task("toy"), runs[::-1], path)
    publish(find_task("toy"), [], path)
    assert snapshot(path) == first and check(path) == []


def test_what_was_published_stays_when_others_publish(toy: Path, run_of: RunOf) -> None:
    path = board_path(toy, "toy")
    publish(find_task("toy"), run_of(methods=["dav"]), path)
    publish(find_task("toy"), run_of(methods=["svdd"], baselines=False), path)
    assert {r.label for r in load_published(path)[0]} == {"real", "pretrained", "dav", "dav+tree", "svdd"}


def test_runs_under_other_terms_are_not_published(toy: Path, run_of: RunOf) -> None:
    good = run_of(methods=["dav"], baselines=False)
    other = run_of(methods=["dav"], baselines=False, preset="paper")
    tuning = run_of(methods=["dav"], baselines=False, heldout=False)
    failed = run_of("failed", methods=["svdd"], baselines=False)
    done = publish(find_task("toy"), [*good, *other, *tuning, *failed], board_path(toy, "toy"))
    assert len(done.added) == 2 and len(done.left_out) == 5
    reasons = "\n".join(done.left_out)
    assert (
        "eval.samples 16 instead of 8" in reasons
        and "heldout" in reasons
        and "is not done but failed" in reasons
    )
    with pytest.raises(DavBenchError, match="nothing to publish"):
        publish(find_task("toy"), failed, board_path(toy / "elsewhere", "toy"))


def test_a_budget_is_published_in_its_section_with_what_is_missing(toy: Path, run_of: RunOf) -> None:
    path = board_path(toy, "toy")
    publish(find_task("toy"), run_of(methods=["dav"]), path)
    first = path.with_suffix(".md").read_text()
    assert "Training budget" not in first and "Not run yet" not in first
    publish(find_task("toy"), run_of(methods=["dav", "svdd"], seeds=[0, 1], budget="cost=20000"), path)
    text = path.with_suffix(".md").read_text()
    section = text.partition("## Training budget: cost 20,000")[2].partition("## ")[0]
    assert [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| ")][2:] == [
        "| real", "| pretrained", "| dav+tree", "| dav", "| svdd",
    ]  # fmt: skip
    missing = section.partition("Not run yet: ")[2].partition(".\n")[0].split(", ")
    assert "dav-kl" in missing and not {"dav", "svdd", "real"} & set(missing)
    assert "dav-bench run --method dav --budget cost=20000 --task toy --seeds 0-1" in text
    assert "dav-bench run --method svdd --task toy --seeds 0-1" in text
    assert check(path) == []
    before = snapshot(path)
    publish(find_task("toy"), [], path)
    assert snapshot(path) == before


def test_a_stale_or_missing_file_is_named(toy: Path, run_of: RunOf) -> None:
    path = board_path(toy, "toy")
    publish(find_task("toy"), run_of(methods=["dav"]), path)
    path.with_suffix(".md").write_text("better numbers")
    path.with_suffix(".csv").unlink()
    assert check(path) == ["toy.md differs from what toy.parquet gives", "toy.csv is missing"]


def test_a_damaged_board_is_named(toy: Path) -> None:
    path = board_path(toy, "toy")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(DavBenchError, match=r"toy\.parquet cannot be read"):
        load_published(path)
    pl.DataFrame({"a": [1]}).write_parquet(path)
    with pytest.raises(DavBenchError, match=r"toy\.parquet cannot be read"):
        load_published(path)
    pl.DataFrame({"a": [1]}).write_parquet(path, metadata={"dav_bench.schema": "2"})
    with pytest.raises(DavBenchError, match="newer dav-bench"):
        load_published(path)


def test_nothing_of_the_machine_is_published(toy: Path, run_of: RunOf) -> None:
    runs = run_of(methods=["dav"])
    host = runs[0].meta["host"]
    path = board_path(toy, "toy")
    publish(find_task("toy"), runs, path)
    text = pl.read_parquet(path).write_csv() + str(pl.read_parquet_metadata(path))
    assert str(toy.parent) not in text and f'"{host}"' not in text


@pytest.mark.parametrize(
    "command",
    [
        {"methods": ["dav"]},
        {"methods": ["dav"], "sets": ["dav.width=3", "eval.every=2"], "seeds": [0, 1]},
        {"methods": ["dav-kl", "svdd"], "preset": "paper", "heldout": False},
        {"methods": ["dav"], "search": "best-of", "sets": ["search.n=3"], "preset": "paper"},
        {"methods": [], "pair": ("tree", "forward-kl"), "sets": ["searcher.width=3", "training.rounds=8"]},
        {"methods": ["dav"], "budget": "5000"},
        {"methods": ["dav", "svdd"], "budget": "reward=5000", "sets": ["dav.rounds=9"]},
        {"methods": ["dav"], "budget": "seconds=0.5", "preset": "paper"},
        {"methods": [], "pair": ("tree", "forward-kl"), "budget": "cost=100", "search": "best-of"},
    ],
)
def test_the_command_of_a_row_makes_that_row(toy: Path, command: dict[str, object]) -> None:
    """The options told under a board, typed in, plan the very run."""
    task = find_task("toy")
    for run in planned(tasks=["toy"], **command):  # type: ignore[arg-type]
        given = arguments(run.spec, task, catalog())
        assert given[0] in ("--method", "--searcher")
        again = planned(tasks=["toy"], seeds=[run.spec.seed], baselines=False, **parsed(given))
        assert run.spec.identity in {r.spec.identity for r in again}


def parsed(given: tuple[str, ...]) -> dict[str, object]:
    """Options as the keywords of `planned`."""
    found: dict[str, object] = {"methods": [], "sets": []}
    words = iter(given)
    for word in words:
        if word == "--no-heldout":
            found["heldout"] = False
        elif word == "--set":
            found["sets"] = [*found["sets"], next(words)]  # type: ignore[misc]
        elif word == "--method":
            found["methods"] = [next(words)]
        elif word in ("--searcher", "--trainer"):
            found["pair"] = (*found.get("pair", ()), next(words))  # type: ignore[misc]
        else:
            found[word.removeprefix("--")] = next(words)
    return found


def test_published_numbers_of_others_are_read_and_shown_apart(toy: Path, run_of: RunOf) -> None:
    folder = toy / "reference" / "toy"
    folder.mkdir(parents=True)
    (folder / "paper.csv").write_text(
        ",".join(REFERENCE) + "\nDRAKES,activity,5.61,,R,a paper,other judges\n"
    )
    path = board_path(toy, "toy")
    publish(find_task("toy"), run_of(methods=["dav"]), path)
    text = path.with_suffix(".md").read_text()
    assert "## Published numbers" in text and "<sub>DRAKES</sub> | <sub>5.61</sub>" in text
    assert "DRAKES" not in path.with_suffix(".csv").read_text(), "never ranked with ours"
    (folder / "paper.csv").write_text("method,value\nDRAKES,5\n")
    with pytest.raises(DavBenchError, match="other columns"):
        terms_of(find_task("toy"), catalog(), {}, toy)


def test_the_scales_of_a_task_are_read(toy: Path) -> None:
    task = find_task("toy")
    scale = {"median": 0.5, "q90": 2.0, "q10": -1}
    (task.folder / "scales.json").write_text(
        json.dumps({"of": "real things", "train": scale, "heldout": scale})
    )
    terms = terms_of(task, catalog(), default_settings(task, catalog()))
    assert terms.scale_of == "real things" and terms.scales["heldout"] == {"median": 0.5, "q90": 2.0}
    (task.folder / "scales.json").write_text(json.dumps({"train": {"median": 1}}))
    with pytest.raises(DavBenchError, match="states no scale"):
        terms_of(task, catalog(), {})


def test_a_run_that_is_not_done_has_no_row(toy: Path, run_of: RunOf) -> None:
    (run, *_) = run_of("failed", methods=["svdd"])
    with pytest.raises(DavBenchError, match="not done but failed"):
        read_row(run)


# ------------------------------------------------------------------------------------------ commands


def call(*args: str) -> str:
    """Output of a command; its own errors are raised."""
    found = CliRunner().invoke(app, list(args))
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.stdout


def test_ls_lists_every_run_and_names_the_damaged(toy: Path, run_of: RunOf) -> None:
    assert "no runs" in call("results", "ls")
    runs = run_of(methods=["dav"], seeds=[0, 1])
    (runs[0].path / "run.json").write_text("{")
    held = json.loads(call("results", "ls", "--json"))
    assert len(held) == 6 and [r["problem"] is None for r in held].count(False) == 1
    text = call("results", "ls")
    assert "damaged" in text and "dav+tree" in text and "1.000" in text


def test_show_tells_status_cost_files_and_the_command(toy: Path, run_of: RunOf) -> None:
    run = run_of(methods=["dav"], baselines=False, sets=["dav.width=3"])[0]
    text = call("results", "show", run.path.name)
    for part in ("done", "levenshtein", "samples.parquet", "search", "sampler.steps",
                 "dav-bench run --method dav --set dav.width=3 --task toy --seeds 0"):  # fmt: skip
        assert part in text
    held = json.loads(call("results", "show", str(run.path), "--json"))
    assert held["settings"]["params.width"] == 3 and held["metrics"]["reward"] == 1.0


def test_the_leaderboard_shows_published_and_local_rows_and_writes_only_when_told(
    toy: Path, run_of: RunOf
) -> None:
    run_of(methods=["dav"])
    path = board_path(toy, "toy")
    assert "| dav (local) |" in call("leaderboard", "--task", "toy", "--format", "md")
    assert not path.exists()
    call("leaderboard", "--task", "toy", "--publish")
    before = snapshot(path)
    run_of(methods=["svdd"], baselines=False)
    text = call("leaderboard", "--task", "toy", "--format", "md")
    assert "| dav |" in text and "| svdd (local) |" in text
    assert "stale" not in call("leaderboard", "--task", "toy", "--check")
    assert "held-out reward" in call("leaderboard", "--task", "toy")
    only = json.loads(call("leaderboard", "--task", "toy", "--format", "json", "--only", "svdd"))
    assert [r["label"] for r in only["rows"]] == ["svdd"]
    assert snapshot(path) == before
    call("leaderboard", "--task", "toy", "--publish", "--only", only["rows"][0]["id"])
    assert len(load_published(path)[0]) == 5


def test_a_stale_board_fails_the_check(toy: Path, run_of: RunOf) -> None:
    run_of(methods=["dav"])
    call("leaderboard", "--task", "toy", "--publish")
    board_path(toy, "toy").with_suffix(".md").write_text("")
    with pytest.raises(AssertionError, match="differs"):
        call("leaderboard", "--task", "toy", "--check")


def test_a_wrong_format_and_an_empty_folder_are_explained(toy: Path) -> None:
    with pytest.raises(DavBenchError, match="did you mean 'md'"):
        call("leaderboard", "--task", "toy", "--format", "mdd")
    with pytest.raises(DavBenchError, match="no finished run"):
        call("leaderboard", "--task", "toy")
    with pytest.raises(DavBenchError, match="no published board"):
        call("leaderboard", "--task", "toy", "--check")


def test_seed_spans_round_trip() -> None:
    from dav_bench.report.board import span

    assert seed_list(span([0, 1, 2, 5])) == [0, 1, 2, 5]


def test_curves_are_published_with_their_run(toy: Path, run_of: RunOf) -> None:
    runs = run_of(methods=["dav"], seeds=[0, 1])
    for run in runs:
        spent = {"cost": 10, "reward_rows": 4, "seconds": 0.5, "n": 8}
        rows = [
            {
                "round": r,
                **{k: v * r for k, v in spent.items()},
                "split": split,
                "metric": metric,
                "value": r + shift,
            }
            for r in (1, 2, 3)
            for split, metric, shift in (
                ("train", "reward", 0.25),
                ("train", "loss", 9.0),
                ("eval", "levenshtein", 0.5),
            )
            if split == "train" or r == 2
        ]
        with RunDir.create(toy, RunSpec.from_dict(run.spec)) as again:
            again.append_metrics(rows)
    path = board_path(toy, "toy")
    publish(find_task("toy"), runs, path)
    before = snapshot(path)
    for row in load_published(path)[0]:
        train, evaluated = sorted(row.curves, key=lambda c: c.split, reverse=True)
        assert (train.metric, train.value.tolist(), train.cost.tolist()) == (
            "reward",
            [1.25, 2.25, 3.25],
            [10, 20, 30],
        )
        assert (evaluated.metric, evaluated.round.tolist(), evaluated.reward_rows.tolist()) == (
            "levenshtein",
            [2],
            [8],
        )
    publish(find_task("toy"), [], path)
    assert snapshot(path) == before


def test_the_ranking_of_the_task_is_published(toy: Path, run_of: RunOf) -> None:
    rank = {"by": ["reward-heldout", "levenshtein"], "gates": {"kmer-corr": ">= 0"}}
    path = board_path(toy, "toy")
    publish(replace(find_task("toy"), rank=rank), run_of(methods=["dav", "svdd"], seeds=[0, 1, 2]), path)
    terms = load_published(path)[1]
    assert terms.rank == rank
    assert "| layer | rank |" in path.with_suffix(".md").read_text() and check(path) == []
