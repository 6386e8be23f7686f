"""Shell completion: names from the catalogue, instantly, since nothing that they stand for is imported."""

import os
import subprocess
import sys

import pytest

from dav_bench.cli import complete

PROBE = """
import atexit, sys
heavy = {"torch", "numpy", "polars", "scipy", "diffusers", "transformers"}
atexit.register(lambda: print("HEAVY", sorted(heavy & set(sys.modules))))
from dav_bench.cli import main
main()
"""


def ask(words: str, cwd, shell: str = "bash") -> list[str]:
    """What the shell is offered for the last of `words`."""
    env = {**os.environ, "_DAV_BENCH_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": words}
    env |= {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=cwd, capture_output=True, text=True, env=env)
    *offered, heavy = done.stdout.splitlines()
    assert heavy == "HEAVY []" and not done.stderr, done.stderr
    return offered


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("dav-bench run --method dr", ["draft", "drakes"]),
        ("dav-bench run --method dav,dd", ["dav,ddpo"]),
        ("dav-bench run --task toy", ["toy-mixture", "toy-ring", "toy-tokens"]),
        ("dav-bench plugins new x --kind t", ["trainer", "task", "tracker"]),
    ],
)
def test_methods_and_tasks_complete_without_torch(tmp_path, words, offered):
    assert ask(words, tmp_path) == offered


def test_a_plugin_counts_and_a_broken_one_is_silent(install, tmp_path):
    source = "from dav_bench import hookimpl\n@hookimpl\ndef register_rewards(register):\n    register('drift', 'x:y')"
    install("acme", {"acme": source}, "acme = acme")
    install("bad", {"bad": "1 / 0"}, "bad = bad")
    assert ask("dav-bench run --reward dri", tmp_path) == ["drift"]
    assert ask("dav-bench plugins check ba", tmp_path) == ["bad"]


def test_what_is_listed_already_is_not_offered_again(fresh_plugins):
    offered = [name for name, _ in complete.component("methods")("dav,draft,d")]
    assert "dav,draft,ddpo" in offered and not [n for n in offered if n.endswith((",dav", ",draft"))]
    assert complete.component("searchers", "auto", "none")("au") == [("auto", "")]
    assert (
        "dav",
        "method: search for better trajectories, fit the model to them, repeat",
    ) in complete.anything("da")


def test_an_error_completes_nothing(monkeypatch):
    monkeypatch.setattr("dav_bench.plugins.catalog", lambda: 1 / 0)
    assert complete.component("methods")("d") == [] and complete.anything("d") == []
