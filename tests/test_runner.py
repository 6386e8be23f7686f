"""Runs as a whole: reuse, resume after real kills, failures that are recorded, test-time search on a tuned model."""

from __future__ import annotations

import importlib
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from dav_bench.cli.run import planned
from dav_bench.core import Meter
from dav_bench.plan import UNTIL_SPENT, PlannedRun
from dav_bench.report.curves import curve
from dav_bench.runner import Options, execute, final_metrics
from dav_bench.store import RunDir

SETTINGS = (
    "dav.alpha=0.5",
    "dav.gamma=1",
    "dav.guide=false",
    "dav.rounds=12",
    "dav.samples=32",
    "dav.lr=0.01",
)


def plan(out: Path, *sets: str, method: str = "dav", **options: object) -> dict[str, PlannedRun]:
    found = planned(methods=[method], tasks=["toy-tokens"], sets=[*SETTINGS, *sets], out=out, **options)  # type: ignore[arg-type]
    return {run.spec.label: run for run in found}


# children are forked from a clean server with the packages imported: polars and torch do not survive a fork once used
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["polars", "dav_bench.runner", "dav_bench.builtin.metrics.base", "dav_bench.core.search"]
)


def start(run: PlannedRun, options: Options) -> BaseProcess:
    """The run in a process of its own, which a test may kill."""
    process = FORKS.Process(target=execute, args=(run.spec, options), daemon=True)
    process.start()
    return process


def kill(process: BaseProcess) -> bool:
    """SIGKILL; False when the process had ended by itself."""
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def results(run: RunDir) -> tuple[bytes, pl.DataFrame, pl.DataFrame, dict]:
    """What must be equal bit for bit: weights, samples, metrics and counts, all but the seconds."""
    weights = (run.path / "checkpoints" / "final.safetensors").read_bytes()
    meter = {
        phase: {k: v for k, v in counts.items() if k != "seconds"}
        for phase, counts in run.meta["meter"].items()
    }
    metrics = run.metrics().drop("seconds").filter(pl.col("metric") != "seconds")
    return weights, run.samples(), metrics, meter


def assert_same(a: RunDir, b: RunDir) -> None:
    (w, s, m, c), (w2, s2, m2, c2) = results(a), results(b)
    assert w == w2
    assert_frame_equal(s, s2)
    assert_frame_equal(m, m2)
    assert c == c2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    out = tmp_path_factory.mktemp("whole")
    return execute(plan(out)["dav"].spec, Options(out=out, threads=1))


def test_a_run_ends_done_with_everything_on_disk(finished: RunDir) -> None:
    assert finished.status == "done"
    assert finished.samples().height == 2048
    assert set(final_metrics(finished)) >= {"reward"}
    assert finished.meta["meter"]["search"]["forward"] > 0
    assert finished.env["execution"]["threads"] == 1
    assert not list((finished.path / "checkpoints").glob("last*"))


def test_training_raises_the_reward_above_the_pretrained_model(finished: RunDir, tmp_path: Path) -> None:
    before = execute(plan(tmp_path)["pretrained"].spec, Options(out=tmp_path, threads=1))
    assert finished.samples()["reward.train"].mean() > before.samples()["reward.train"].mean() + 0.3  # type: ignore[operator]


def test_the_same_spec_twice_reuses_the_finished_run(finished: RunDir) -> None:
    out = finished.path.parents[3]
    run = plan(out)["dav"]
    assert run.status == "cached"
    written = (finished.path / "samples.parquet").stat().st_mtime_ns
    again = execute(run.spec, Options(out=out, threads=1))
    assert again.status == "done"
    assert (finished.path / "samples.parquet").stat().st_mtime_ns == written


def test_fresh_runs_again_and_gives_the_same(finished: RunDir, tmp_path: Path) -> None:
    first = execute(plan(tmp_path)["dav"].spec, Options(out=tmp_path, threads=1))
    assert_same(first, finished)
    written = (first.path / "samples.parquet").stat().st_mtime_ns
    fresh = execute(plan(tmp_path)["dav"].spec, Options(out=tmp_path, threads=1, fresh=True))
    assert (fresh.path / "samples.parquet").stat().st_mtime_ns > written
    assert_same(fresh, finished)


def test_killed_at_random_moments_it_resumes_to_the_same_result(finished: RunDir, tmp_path: Path) -> None:
    run, options = plan(tmp_path)["dav"], Options(out=tmp_path, threads=1)
    rng, kills, seen = random.Random(0), 0, set()
    last_json = run.path / "checkpoints" / "last.json"
    for attempt in range(40):
        process, before = start(run, options), last_json.stat().st_mtime_ns if last_json.exists() else 0
        moves = (
            attempt % 3
        )  # right at the start, or once one or two more rounds are saved; then at a random moment
        while moves and process.is_alive():
            now = last_json.stat().st_mtime_ns if last_json.exists() else before
            moves, before = moves - (now != before), now
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.1))
        if not kill(process):
            break
        kills += 1
        if (run.path / "run.json").exists():
            held = RunDir.open(run.path)
            assert held.status in ("killed", "done")
            last = held.load_checkpoint()
            seen.add(last[0] if last else 0)
    assert kills >= 3
    assert len(seen) >= 3, "the kills fell into few rounds; little was resumed"
    resumed = execute(run.spec, options)
    assert resumed.status == "done"
    assert_same(resumed, finished)


def test_a_resume_keeps_the_micro_batch_and_threads_it_was_begun_with(tmp_path: Path) -> None:
    run = plan(tmp_path, "dav.rounds=40")["dav"]
    process = start(run, Options(out=tmp_path, threads=1, micro_batch=16))
    while not (run.path / "checkpoints" / "last.json").exists():
        assert process.is_alive()
        time.sleep(0.01)
    assert kill(process)
    resumed = execute(run.spec, Options(out=tmp_path, threads=2, micro_batch=64))
    assert resumed.status == "done"
    machine = {"device": "cpu", "dtype": "float32", "threads": 1, "micro_batch": 16, "deterministic": False}
    assert resumed.env["execution"] == machine


def test_interrupting_the_command_leaves_a_resumable_run_and_exit_code_130(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dav_bench",
        "run",
        "--method",
        "dav",
        "--task",
        "toy-tokens",
        "--no-baselines",
    ]
    command += ["--out", str(tmp_path), "--threads", "1"]
    for item in (*SETTINGS, "dav.rounds=400"):
        command += ["--set", item]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not list(tmp_path.glob("runs/*/*/*/checkpoints/last.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "Traceback" not in output
    (path,) = tmp_path.glob("runs/toy-tokens/dav/*")
    assert RunDir.open(path).status == "interrupted"
    assert plan(tmp_path, "dav.rounds=400")["dav"].status == "resumable"


SCORE = "    return sample.sum((1, 2))"
FAILURES = {
    "nan": (SCORE + " * (float('nan') if calls > 20 else 1.0)", "nan", "not finite"),
    "exception": (
        "    if calls > 20:\n        raise RuntimeError('lost the oracle')\n" + SCORE,
        "failed",
        "lost the oracle",
    ),
    "out of memory": ("    if calls > 20:\n        raise MemoryError\n" + SCORE, "oom", "--micro-batch"),
    "wrong shape": (SCORE + "[:-1]", "failed", "returned shape"),
}


def file_reward(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    path.write_text(f"calls = 0\n\ndef score(sample, cond=None):\n    global calls\n    calls += 1\n{body}\n")
    return f"{path}:score"


@pytest.mark.parametrize(("body", "status", "hint"), FAILURES.values(), ids=FAILURES)
def test_a_failing_reward_is_a_recorded_status_with_a_hint(
    tmp_path: Path, body: str, status: str, hint: str
) -> None:
    run = plan(tmp_path, reward=file_reward(tmp_path, body))["dav"]
    ended = execute(run.spec, Options(out=tmp_path, threads=1))
    assert ended.status == status
    assert hint in ended.meta["error"]
    if "calls > 20" in body:
        assert ended.metrics().height > 0, "the rounds before the failure stay readable"
        assert ended.load_checkpoint() is not None


def test_test_time_search_trains_its_base_once_and_carries_its_cost(finished: RunDir) -> None:
    out = finished.path.parents[3]
    run = plan(out)["dav+tree"]
    searched = execute(run.spec, Options(out=out, threads=1))
    assert searched.status == "done"
    own, base = searched.meta["meter"], finished.meta["meter"]
    assert own["search"] == base["search"]
    assert own["fit"] == base["fit"]
    assert (
        own["sample"]["forward"] + own["sample"]["shared"]
        > base["sample"]["forward"] + base["sample"]["shared"]
    )


def test_a_run_records_what_its_final_search_noticed(tmp_path: Path) -> None:
    out = tmp_path / "results"
    (spec,) = [r.spec for r in planned(methods=["smc"], tasks=["toy-tokens"], sets=["eval.samples=32"], out=out,
                                       baselines=False)]  # fmt: skip
    run = execute(spec, Options(out=out, threads=1))
    noticed = run.metrics().filter(pl.col("split") == "search")
    assert {"ess_min", "log_z", "collapsed"} <= set(noticed["metric"])
    assert set(noticed["n"]) == {32}


def test_test_time_search_makes_a_missing_base_run(tmp_path: Path) -> None:
    runs = plan(tmp_path, "dav.rounds=1")
    searched = execute(runs["dav+tree"].spec, Options(out=tmp_path, threads=1))
    assert searched.status == "done"
    base = RunDir.open(runs["dav"].path)
    assert base.status == "done"
    assert searched.samples()["reward.train"].mean() > base.samples()["reward.train"].mean() + 0.2  # type: ignore[operator]


def test_a_budget_ends_training(finished: RunDir, tmp_path: Path) -> None:
    spent = finished.meta["meter"]
    full = sum(spent[p]["forward"] + 2 * spent[p]["backward"] for p in ("search", "fit"))
    run = execute(
        plan(tmp_path, f"budget.train={int(full / 3)}")["dav"].spec, Options(out=tmp_path, threads=1)
    )
    rounds = run.metrics().filter(pl.col("split") == "train")["round"].max()
    assert 1 <= rounds < 12  # type: ignore[operator]
    cost = run.metrics()["cost"].max()
    assert full / 3 <= cost < full / 3 + full / 6  # type: ignore[operator]


def rates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """The course of training that each later fit is told."""
    module = importlib.import_module("dav_bench.core.fit")  # `core.fit` may be the function of that name

    told: list[tuple[float, float]] = []
    fit = module.fit

    def spy(*args: object, **kwargs: object) -> dict[str, float]:
        told.append(args[6])  # type: ignore[arg-type]
        return fit(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "fit", spy)
    return told


def test_under_a_budget_the_learning_rate_follows_what_is_spent(
    finished: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = finished.meta["meter"]
    round_cost = sum(spent[p]["forward"] + 2 * spent[p]["backward"] for p in ("search", "fit")) / 12
    budget = {"unit": "cost", "train": int(5 * round_cost)}
    spec = plan(tmp_path, "dav.rounds=1000", "dav.schedule=linear")["dav"].spec
    told = rates(monkeypatch)
    run = execute(replace(spec, budget=budget), Options(out=tmp_path, threads=1))
    cost = run.metrics().filter(pl.col("metric") == "loss")["cost"].to_list()
    assert 4 <= len(told) == len(cost) <= 7
    shares = [0.0, *(c / budget["train"] for c in cost)]
    assert [start for start, _ in told] == pytest.approx(shares[:-1])
    assert all(start < end <= 1 for start, end in told)
    assert [end for _, end in told[1:]] == pytest.approx([min(1, s) for s in shares[2:]], abs=0.05)
    assert run.meta["reproducible"] is True
    assert [c for c, _ in curve(run)] == cost and curve(run, split="final")[-1][0] == cost[-1]
    assert len(curve(run, split="eval")) == len(cost) // 5


def test_without_a_budget_it_follows_the_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = rates(monkeypatch)
    execute(plan(tmp_path, "dav.rounds=2")["dav"].spec, Options(out=tmp_path, threads=1))
    assert told == [(0, 0.5), (0.5, 1)]


@pytest.mark.parametrize("unit", ["reward", "seconds"])
def test_each_unit_ends_training_and_a_resume_counts_what_was_spent_before(
    tmp_path: Path, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    amount = {"reward": 3 * 32 * 2, "seconds": 0.4}[unit]
    (run,) = planned(methods=["dav"], tasks=["toy-tokens"], budget=f"{unit}={amount}", out=tmp_path,
                     sets=[s for s in SETTINGS if "rounds" not in s], baselines=False, search=None)  # fmt: skip
    assert run.spec.params["rounds"] == UNTIL_SPENT
    save = RunDir.save_checkpoint

    def stop(self: RunDir, r: int, *args: object) -> None:
        save(self, r, *args)  # type: ignore[arg-type]
        if r == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunDir, "save_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        execute(run.spec, Options(out=tmp_path, threads=1))
    before = RunDir.open(run.path).load_checkpoint()
    assert before is not None
    monkeypatch.setattr(RunDir, "save_checkpoint", save)
    ended = execute(run.spec, Options(out=tmp_path, threads=1))
    assert ended.status == "done" and ended.meta["reproducible"] is (unit != "seconds")
    table = ended.metrics().filter(pl.col("metric") == "loss")
    spent = table["reward_rows" if unit == "reward" else "seconds"].to_list()
    assert spent[-1] >= amount > spent[-2] and spent == sorted(spent)
    assert spent[1] == pytest.approx(Meter(before[2]["meter"]).spent(unit, "search", "fit"))


def test_a_budget_that_nothing_is_charged_to_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meter, "reward_rows", lambda self, *phases: 0)
    (run,) = planned(methods=["dav"], tasks=["toy-tokens"], budget="reward=10", out=tmp_path,
                     sets=["dav.samples=4"], baselines=False, search=None)  # fmt: skip
    ended = execute(run.spec, Options(out=tmp_path, threads=1))
    assert ended.status == "failed" and "would never end" in ended.meta["error"]


def test_evaluation_noise_does_not_depend_on_method_or_seed(finished: RunDir, tmp_path: Path) -> None:
    other = execute(plan(tmp_path, "dav.rounds=1", seeds=(3,))["dav"].spec, Options(out=tmp_path, threads=1))
    assert other.samples()["noise_seed"].to_list() == finished.samples()["noise_seed"].to_list()


def test_an_unknown_device_is_one_clear_error(tmp_path: Path) -> None:
    ended = execute(plan(tmp_path)["dav"].spec, Options(out=tmp_path, device="abacus"))
    assert ended.status == "failed"
    assert "unknown device 'abacus'" in ended.meta["error"]
