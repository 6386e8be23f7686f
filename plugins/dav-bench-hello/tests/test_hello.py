"""The plugin as a user meets it: installed, through dav-bench alone."""

import json
import subprocess
import sys

import pytest
import torch

from dav_bench import catalog
from dav_bench.plugins import plugins


def dav_bench(*args, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "dav_bench", *args], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_found_and_whole():
    assert "hello" in [p.name for p in plugins().loaded]
    assert catalog().get("rewards", "gc-content").origin == "hello"
    assert catalog().get("searchers", "hello/retry").origin == "hello"


def test_reward_counts_g_and_c():
    sample = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 3], [1, 1, 2, 2]]), 4).float()
    reward = catalog().get("rewards", "gc-content").build()
    assert reward(sample).tolist() == [0.5, 1.0]


def test_impossible_settings_are_refused():
    with pytest.raises(Exception, match="expected int"):
        catalog().get("searchers", "retry").settings({"tries": "many"})


def test_a_pair_with_a_built_in_trainer_runs(tmp_path):
    run = ["run", "--searcher", "retry", "--trainer", "forward-kl", "--task", "hello", "--json", "--threads", "1"]
    runs = json.loads(dav_bench(*run, "--set", "training.rounds=2", "--set", "training.lr=0.01", cwd=tmp_path))
    assert {r["label"]: r["status"] for r in runs} == {
        "pretrained": "done",
        "retry_forward-kl": "done",
        "retry_forward-kl+retry": "done",
    }
