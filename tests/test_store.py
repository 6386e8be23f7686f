"""The run directory survives kills, full disks, torn files, a second writer and newer versions."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from dav_bench import files, store
from dav_bench.errors import DavBenchError
from dav_bench.files import DiskFull
from dav_bench.scan import find, runs_frame, scan
from dav_bench.spec import RunSpec
from dav_bench.store import RunDir

HERE = Path(__file__).parent


def spec(seed: int = 0, **changes: object) -> RunSpec:
    return RunSpec("toy", 1, "0" * 16, "dav", params={"width": 4, "kl": None, **changes}, seed=seed)


def row(round: int, **changes: object) -> dict[str, object]:
    base = {"round": round, "cost": 3, "reward_rows": 2, "seconds": 0.5, "split": "train", "metric": "reward"}
    return {**base, "value": 0.1, "n": 4, **changes}


def strays(path: Path) -> list[str]:
    return [p.name for p in path.rglob("*.tmp")]


# ------------------------------------------------------------------------------------------ contents


def test_a_run_reads_back_what_was_written(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, dtype=torch.float64)
    scalars = {"loss": 0.1 + 0.2, "meter": {"search": {"forward": 2**60}}, "none": None}
    with RunDir.create(tmp_path, spec()) as run:
        run.append_metrics([row(0)])
        run.append_metrics([row(1, split="final", metric="levenshtein", value=1 / 3)])
        run.write_samples(
            {"index": torch.arange(2), "sequence": ["AC", "GT"], "reward.train": np.array([0.5, 1])}
        )
        run.save_checkpoint(3, {"w": weight, "tied": weight, "row": weight[0]}, scalars)
        run.save_weights({"w": weight.to(torch.bfloat16)})
        run.write_env({"dav_bench": "0.1.0"})
        run.update(status="done", meter={"search": {"forward": 7}}, peak_mb=12.5)
    held = RunDir.open(run.path)
    assert run.path == tmp_path / spec().dirname
    assert RunSpec.from_dict(held.spec) == spec()
    assert held.meta["identity"] == {"version": 1, "hash": spec().identity}
    assert held.meta["meter"] == {"search": {"forward": 7}} and held.meta["ended"] and held.status == "done"
    assert held.env == {"dav_bench": "0.1.0"}
    metrics = held.metrics()
    assert {n: str(t) for n, t in metrics.schema.items()} == store.METRICS
    assert metrics["value"].to_list() == [0.1, 1 / 3]
    samples = held.samples()
    assert dict(samples.schema) == {"index": pl.Int32, "sequence": pl.String, "reward.train": pl.Float32}
    round, tensors, back = held.load_checkpoint() or (0, {}, {})
    assert round == 3 and back == scalars
    assert all(torch.equal(tensors[k], v) for k, v in {"w": weight, "tied": weight, "row": weight[0]}.items())
    assert tensors["w"].dtype == torch.float64
    assert torch.equal(held.load_weights()["w"], weight.to(torch.bfloat16))
    footer = pl.read_parquet_metadata(run.path / "samples.parquet")
    assert (footer["dav_bench.schema"], footer["dav_bench.identity"]) == ("1", spec().identity)


def test_equal_tables_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        files.write_parquet(
            tmp_path / name, pl.DataFrame({"x": [1.0, 2.0], "s": ["A", "C"]}), {"identity": "i"}
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_only_the_last_checkpoint_is_kept_and_rows_after_it_are_dropped(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, spec()) as run:
        assert run.load_checkpoint() is None and run.metrics().is_empty()
        for round in range(3):
            run.append_metrics([row(round)])
            run.save_checkpoint(round, {"w": torch.zeros(1)}, {})
        run.save_checkpoint(2, {"w": torch.ones(1)}, {})  # the same round again, after a rewind
        assert len(list((run.path / "checkpoints").glob("*.safetensors"))) == 1
        assert (run.load_checkpoint() or (0, {"w": 0}, {}))[1]["w"] == 1
        run.rewind_metrics(1)
        assert (
            run.metrics()["round"].to_list() == [0, 1] == RunDir.open(run.path).metrics()["round"].to_list()
        )
        run.drop_checkpoint()
        assert run.load_checkpoint() is None


def test_unequal_columns_and_unknown_status_are_refused(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, spec()) as run:
        with pytest.raises(ValueError, match="unequal"):
            run.write_samples({"index": [0, 1], "reward.train": [1.0]})
        with pytest.raises(ValueError, match="none of"):
            run.update(status="finished")


# ----------------------------------------------------------------------------------------- ownership


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, spec()) as run:
        with pytest.raises(DavBenchError, match="another process"):
            RunDir.create(tmp_path, spec())
        assert RunDir.open(run.path).status == "running"
        RunDir.create(tmp_path, spec(seed=1)).close()
    assert RunDir.open(run.path).status == "killed"
    with RunDir.create(tmp_path, spec()) as again:
        assert again.status == "running"


def test_a_reader_never_keeps_a_writer_out(tmp_path: Path) -> None:
    path = RunDir.create(tmp_path, spec())
    path.close()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            _ = RunDir(path.path).alive

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for _ in range(30):
            RunDir.create(tmp_path, spec()).close()
    finally:
        stop.set()
        for reader in readers:
            reader.join()


def test_a_run_of_another_machine_lives_while_it_beats(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, spec()) as run:
        run.update(host="elsewhere")
    reader = RunDir.open(run.path)
    assert reader.status == "running"
    with pytest.raises(DavBenchError, match="elsewhere"):
        RunDir.create(tmp_path, spec())
    past = time.time() - 2 * store.SILENCE
    os.utime(run.path / "run.json", (past, past))
    assert reader.status == "killed"


def test_the_heartbeat_beats_and_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "HEARTBEAT", 0.01)
    beats = []
    monkeypatch.setattr(RunDir, "heartbeat", lambda self: beats.append(self.path))
    with RunDir.create(tmp_path, spec()):
        while len(beats) < 3:
            time.sleep(0.001)
    names = [t for t in threading.enumerate() if t.name == "dav-bench heartbeat"]
    for thread in names:
        thread.join(5)
    assert not any(t.is_alive() for t in names)


def test_a_finished_run_stays_done_and_fresh_discards_it(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, spec()) as run:
        run.append_metrics([row(0)])
        run.save_checkpoint(0, {"w": torch.zeros(1)}, {})
        run.update(status="done")
    with RunDir.create(tmp_path, spec()) as run:
        assert run.status == "done" and run.metrics().height == 1
    with RunDir.create(tmp_path, spec(), fresh=True) as run:
        assert run.status == "running" and run.load_checkpoint() is None and run.metrics().is_empty()


def test_an_interrupted_run_goes_on_without_its_old_error(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, spec()) as run:
        run.update(status="failed", error="boom")
    with RunDir.create(tmp_path, spec()) as run:
        assert (run.meta["status"], run.meta["error"], run.meta["ended"]) == ("running", None, None)


def test_a_folder_of_another_spec_is_refused(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, spec()) as run:
        run.update(identity={"version": 1, "hash": "f" * 64})
    with pytest.raises(DavBenchError, match="another run"):
        RunDir.create(tmp_path, spec())
    RunDir.create(tmp_path, spec(), fresh=True).close()


# --------------------------------------------------------------------------------------------- kills


def test_sigkill_at_any_moment_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    """Kill a real writer 25 times; after each kill everything reads back and is of one piece."""
    rng = random.Random(0)
    nursery = subprocess.Popen(
        [sys.executable, str(HERE / "writer.py"), str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
    )  # fmt: skip
    assert nursery.stdin and nursery.stdout
    rounds = [-1]
    try:
        for kill in range(25):
            nursery.stdin.write("go\n")
            nursery.stdin.flush()
            child = int(nursery.stdout.readline())
            if kill == 0:  # let the first one come to its rounds, whatever the machine
                while not list(tmp_path.glob("runs/toy/dav/*/checkpoints/last.json")):
                    time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.25))
            os.kill(child, signal.SIGKILL)
            nursery.stdin.write("reap\n")
            nursery.stdin.flush()
            assert nursery.stdout.readline() == "reaped\n"
            rounds.append(check_killed(tmp_path))
            assert rounds[-1] >= rounds[-2]
    finally:
        nursery.stdin.close()
        nursery.wait(10)
        nursery.stdout.close()
    assert rounds[-1] > rounds[1], "no kill ever fell into later rounds"


def check_killed(root: Path) -> int:
    (record,) = scan(root)
    assert record.problem is None and record.status == "killed"
    run = RunDir.open(record.path)
    round, tensors, scalars = run.load_checkpoint() or (-1, {}, {})
    assert all((t == round).all() for t in tensors.values())
    assert scalars == {"round": round, "loss": round + 0.1}
    metrics = run.metrics()
    written = metrics["round"].max()
    assert written in (round, round + 1)  # at most the round that was not yet saved
    assert metrics["round"].to_list() == sorted([*range(written + 1)] * 2)
    assert run.samples().height == 50
    assert all("event" in event for event in run.events())
    return round


# --------------------------------------------------------------------------------------- full disk

FILL = """
import resource, sys, torch
from tests_writer import spec, tensors, metrics
from dav_bench.store import RunDir, DiskFull
with RunDir.create(sys.argv[1], spec()) as run:
    run.append_metrics(metrics(0))
    run.write_samples({"index": range(4)})
    run.save_checkpoint(0, tensors(0), {"round": 0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    full = []
    for write in (
        lambda: run.save_checkpoint(1, {k: v.repeat(50, 1) for k, v in tensors(1).items()}, {}),
        lambda: run.save_checkpoint(1, {}, {"text": "x" * 50_000}),
        lambda: run.save_weights({"w": torch.rand(300, 300)}),
        lambda: run.write_samples({"reward.train": torch.rand(100_000)}),
        lambda: run.append_metrics([{**metrics(i)[0], "value": i ** .5} for i in range(50_000)]),
        lambda: run.write_env({"x": "y" * 50_000}),
    ):
        try:
            write()
        except DiskFull as error:
            full.append(str(error))
    assert len(full) == 6, full
    run.update(status="disk", error=full[0])
"""


def test_a_full_disk_damages_nothing_and_is_recorded(tmp_path: Path) -> None:
    """The kernel refuses growth (RLIMIT_FSIZE) to every kind of write of a real process."""
    path = os.pathsep.join([str(HERE.parent), str(tmp_path)])
    (tmp_path / "tests_writer.py").write_text((HERE / "writer.py").read_text())
    root = tmp_path / "results"
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(root)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (record,) = scan(root)
    assert (
        record.status == "disk" and "no room left" in record.meta["error"] and "Try" in record.meta["error"]
    )
    run = record.run
    assert (run.load_checkpoint() or (9,))[0] == 0 and run.samples().height == 4 and run.metrics().height == 2
    assert strays(root) == []
    assert len(list(run.path.glob("checkpoints/*"))) == 2


def test_the_space_set_aside_records_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync
    with RunDir.create(tmp_path, spec()) as run:
        reserve = run.path / ".reserve"
        assert reserve.stat().st_size >= 1 << 16

        def full(handle: int) -> None:
            if reserve.exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(handle)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DiskFull):
            run.append_metrics([row(0)])
        assert reserve.exists()
        run.update(status="disk")
    assert not reserve.exists() and RunDir.open(run.path).status == "disk" and strays(tmp_path) == []
    monkeypatch.setattr(os, "fsync", sync)
    with RunDir.create(tmp_path, spec()):
        assert reserve.exists()


def test_other_errors_of_a_write_pass_through_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old" and strays(tmp_path) == []


# ------------------------------------------------------------------------------------------- damage


def test_scan_names_damaged_folders_and_goes_on(tmp_path: Path) -> None:
    for seed in range(6):
        with RunDir.create(tmp_path, spec(seed)) as run:
            run.update(status="done")
    paths = [tmp_path / spec(seed).dirname for seed in range(6)]
    (paths[0] / "run.json").write_text('{"schema": 1, "lab')
    (paths[1] / "run.json").unlink()
    (paths[2] / "run.json").write_text("[]")
    (paths[3] / "run.json").write_text(json.dumps({"schema": 1, "status": "done"}))
    (paths[4] / "run.json").write_text(json.dumps({**RunDir(paths[5]).meta, "schema": 2}))
    (paths[0].parent / "README").write_text("no run")
    (paths[0].parent / "empty").mkdir()
    records = {r.path.name: r for r in scan(tmp_path)}
    assert len(records) == 7
    healthy = [r for r in records.values() if r.problem is None]
    assert [r.path for r in healthy] == [paths[5]] and healthy[0].status == "done"
    assert all(
        r.status == "damaged" and r.label == "dav" and r.task == "toy" for r in records.values() if r.problem
    )
    assert "newer dav-bench" in (records[paths[4].name].problem or "")
    frame = runs_frame(list(records.values()))
    assert frame.height == 7 and frame["problem"].null_count() == 1
    assert scan(tmp_path / "nowhere") == [] and scan(tmp_path, "other") == []


@pytest.mark.parametrize("name", ["metrics.parquet", "samples.parquet", "checkpoints/last-000000.safetensors",
                                  "checkpoints/last.json", "spec.toml"])  # fmt: skip
@pytest.mark.parametrize("damage", ["truncate", "empty", "garbage"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    with RunDir.create(tmp_path, spec()) as run:
        run.append_metrics([row(0)])
        run.write_samples({"index": [0]})
        run.save_checkpoint(0, {"w": torch.rand(50)}, {"a": 1})
    path = run.path / name
    whole = path.read_bytes()
    path.write_bytes(
        {"truncate": whole[: len(whole) // 2], "empty": b"", "garbage": b"[[" + bytes(64)}[damage]
    )
    held = RunDir.open(run.path)
    read = {"metrics": held.metrics, "samples": held.samples, "spec": lambda: held.spec}
    with pytest.raises(DavBenchError, match=path.name):
        (read.get(path.stem) or held.load_checkpoint)()


def test_a_newer_table_is_refused(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, spec()) as run:
        run.write_samples({"index": [0]})
    run.samples().write_parquet(run.path / "samples.parquet", metadata={"dav_bench.schema": "2"})
    with pytest.raises(DavBenchError, match="newer dav-bench"):
        RunDir.open(run.path).samples()


def test_a_torn_event_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, spec()) as run:
        run.event("one", n=1)
        with open(run.path / "events.jsonl", "a") as file:
            file.write('{"event": "tor')
        run.event("two", path=Path("x"))
        run.log("a line")
    assert [e["event"] for e in run.events()] == ["one", "two"]
    assert (run.path / "log.txt").read_text().endswith("a line\n")


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, spec()) as run:
        run.save_checkpoint(0, {"w": torch.zeros(1)}, {})
        (run.path / ".metrics.parquet.1-2.tmp").write_text("half")
        (run.path / "checkpoints" / "last-000001.safetensors").write_text("not pointed to")
    with RunDir.create(tmp_path, spec()) as run:
        assert strays(tmp_path) == []
        assert [p.name for p in (run.path / "checkpoints").glob("last-*")] == ["last-000000.safetensors"]


def test_find_takes_a_path_a_name_or_its_start(tmp_path: Path) -> None:
    for seed in (0, 1):
        RunDir.create(tmp_path, spec(seed)).close()
    name = f"{spec().run_id}-s0"
    assert find(tmp_path, name).path == find(tmp_path, str(tmp_path / spec().dirname)).path
    assert find(tmp_path, name).path.name == name
    with pytest.raises(DavBenchError, match="means 2 runs"):
        find(tmp_path, spec().run_id)
    with pytest.raises(DavBenchError, match="no run is called"):
        find(tmp_path, "nothing")


def test_the_store_imports_nothing_heavy() -> None:
    code = (
        "import sys, dav_bench.store, dav_bench.scan; print({'torch', 'polars', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE.parent, check=True
    )
    assert done.stdout.strip() == "set()"
