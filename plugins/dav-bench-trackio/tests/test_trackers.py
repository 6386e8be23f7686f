"""The trackers as a run meets them: trackio for real where it is installed, the others by stand-ins."""

import json
import os
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest

from dav_bench import DavBenchError, RoundFinished, RunFinished, RunSpec, RunStarted, catalog
from dav_bench.testing import check_plugin

SPEC = RunSpec("toy", 1, "hash", "dav", params={"width": 4})


class Stand:
    """Notes every call on a stand-in for a library."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **options):
            self.calls.append((name, args, options))
            return self

        return call


@pytest.fixture
def stand(monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", "somewhere")
    made = Stand()
    for name in ("trackio", "wandb"):
        module = ModuleType(name)
        module.init, module.finish = made.init, made.finish
        monkeypatch.setitem(sys.modules, name, module)
    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = made.SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    return made


def live(tracker, folder, resumed=0, status="done"):
    """A run of two rounds, the second of which diverged."""
    tracker.run_started(RunStarted(SPEC, folder, "dav", rounds=2, resumed=resumed))
    for r, value in ((1, 0.5), (2, float("nan"))):
        tracker.round_finished(RoundFinished(SPEC, r, 2, {"train/reward": value, "train/loss": 1.0}, cost=7 * r))
    tracker.run_finished(RunFinished(SPEC, folder, status, metrics={"reward": 0.7}))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "results" / "runs" / "toy" / "dav" / "1a2b3c4d-s0"
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_what_a_run_tells(stand, folder, name):
    live(catalog().get("trackers", name).build(), folder)
    names = [call[0] for call in stand.calls]
    assert names == ["init", "log", "log", "log", "finish"]
    opened = stand.calls[0][2]
    assert (opened["project"], opened["name"], opened["group"]) == ("dav-bench-toy", "dav 1a2b3c4d-s0", "dav")
    assert opened["config"]["params"]["width"] == 4
    (first,), step = stand.calls[1][1], stand.calls[1][2]["step"]
    assert first == {"train/reward": 0.5, "train/loss": 1.0, "cost": 7.0, "seconds": 0.0} and step == 1
    assert "train/reward" not in stand.calls[2][1][0]  # it was NaN
    assert stand.calls[3][1] == ({"final/reward": 0.7},)


def test_the_folder_of_tensorboard(stand, folder):
    live(catalog().get("trackers", "tensorboard").build(), folder)
    assert stand.calls[0][:2] == ("SummaryWriter", (str(folder / "tensorboard"),))
    scalars = [call[1] for call in stand.calls if call[0] == "add_scalar"]
    assert ("train/reward", 0.5, 1) in scalars and ("final/reward", 0.7, 2) in scalars
    assert [call[0] for call in stand.calls[-2:]] == ["add_text", "close"]


def test_a_resumed_run_goes_on_in_its_entry(stand, folder):
    live(catalog().get("trackers", "trackio").build(), folder, resumed=1)
    assert stand.calls[0][2]["resume"] == "allow"
    live(catalog().get("trackers", "wandb").build(), folder, status="nan")
    assert stand.calls[-1] == ("finish", (), {"exit_code": 1})


def test_a_tracker_that_never_began_says_nothing_more(stand, folder):
    tracker = catalog().get("trackers", "trackio").build()
    tracker.run_finished(RunFinished(SPEC, folder, "failed"))
    tracker.round_finished(SimpleNamespace(round=1, cost=0, seconds=0, metrics={}))
    assert stand.calls == []


def test_a_missing_library_is_named_with_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr("dav_bench_trackio.trackers.find_spec", lambda name: None)
    with pytest.raises(DavBenchError) as caught:
        catalog().get("trackers", "wandb").build()
    assert caught.value.fix == "pip install 'dav-bench-trackio[wandb]'" and caught.value.code == 4


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_a_real_run_lies_in_the_results_folder(tmp_path):
    run = ["run", "--method", "dav", "--task", "toy-tokens", "--tracker", "trackio", "--json", "--threads", "1"]
    run += ["--set", "dav.rounds=2", "--set", "eval.samples=16", "--search", "none", "--no-baselines"]
    env = {k: v for k, v in os.environ.items() if k != "TRACKIO_DIR"} | {"HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "dav_bench", *run], cwd=tmp_path, capture_output=True, text=True, env=env
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["status"] == "done" and "failed" not in done.stderr
    (store,) = (tmp_path / "results" / "trackio").glob("dav-bench-toy-tokens*.db")
    with sqlite3.connect(store) as database:
        logged = [json.loads(row[0]) for row in database.execute("select metrics from metrics")]
    database.close()
    assert len([row for row in logged if "train/reward" in row]) == 2
    assert [row for row in logged if "final/reward" in row]


def test_the_contract():
    checks = {c.name: c for c in check_plugin("trackio")}
    heard = checks["tracker trackio: it hears something"]
    assert heard.status == ("ok" if find_spec("trackio") else "skipped")
