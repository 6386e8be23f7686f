"""The program from outside: what it prints, imports and returns."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dav_bench.cli import COMMANDS, load
from dav_bench.cli.run import names, seed_list
from dav_bench.errors import DavBenchError

GOLDEN = Path(__file__).parent.parent / "golden"
HEAVY = ("torch", "diffusers", "transformers", "polars", "scipy", "numpy", "rapidfuzz")


@pytest.fixture
def run(tmp_path):
    def call(*args, code=0, **env):
        done = subprocess.run(
            [sys.executable, "-m", "dav_bench", *map(str, args)],
            cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80", **env},
        )  # fmt: skip
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return call


def test_help_is_as_committed(run):
    assert run("--help").stdout == (GOLDEN / "help.txt").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_static_help_is_the_real_one(name):
    """A group's help is its callback's docstring, a command's is its own."""
    real = load(name).help.strip().split("\n\n")[0]
    assert " ".join(real.split()) == COMMANDS[name][1]


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["run", "--help"],
        ["run", "--method", "dav", "--task", "dna", "--dry-run"],
        ["list", "methods", "--fits", "dna"],
        ["list", "tasks"],
        ["show", "dav", "--task", "dna"],
        ["plugins", "list"],
    ],
    ids=" ".join,
)
def test_planning_imports_nothing_heavy(args, tmp_path):
    code = (
        "import sys\nfrom dav_bench.cli import main\n"
        f"sys.argv = ['dav-bench', *{args!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('HEAVY', sorted(set(sys.modules) & set({HEAVY!r})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_help_does_not_even_import_plugins(tmp_path):
    code = (
        "import sys\nfrom dav_bench.cli import main\nsys.argv = ['dav-bench', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "late = {'pluggy', 'rich.console', 'dav_bench.plugins', 'dav_bench.cli.run'}\n"
        "print(sorted(late & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("args", "code", "what", "fix"),
    [
        (
            ["run", "--method", "dva", "--task", "dna"],
            2,
            "unknown method 'dva'; did you mean 'dav'",
            "list methods",
        ),
        (
            ["run", "--method", "dav", "--task", "dan"],
            2,
            "unknown task 'dan'; did you mean 'dna'?",
            "list tasks",
        ),
        (["run", "--task", "dna"], 2, "no method is named.", "--method dav"),
        (["run", "--method", "dav"], 2, "no task is named.", "--task dna"),
        (["run", "--method", "dav", "--task", "dna", "--seeds", "2-0"], 2, "counts down", "--seeds 0-2"),
        (["run", "--searcher", "tree", "--task", "dna"], 2, "belong together", "--trainer"),
        (
            ["run", "--method", "dav", "--task", "dna", "--set", "dav.widht=2"],
            2,
            "did you mean 'width'",
            "dav-bench show dav --task dna",
        ),
        (["run", "--method", "dav", "--task", "dna", "--config", "no.toml"], 2, "no.toml cannot be read", ""),
        (
            ["run", "--method", "dav", "--task", "dna", "--reward", "./no.py:f"],
            4,
            "cannot be read",
            "--reward",
        ),
        (
            ["run", "--method", "dav", "--task", "dna", "--budget", "second=5"],
            2,
            "unknown unit 'second'; did you mean 'seconds'?",
            "--budget cost=20000",
        ),
        (["run", "--spec", "no.toml"], 2, "no.toml cannot be read", ""),
        (["list", "method"], 2, "did you mean 'methods'", ""),
        (["show", "dva"], 2, "did you mean", ""),
        (["plugins", "show", "nobody"], 2, "no plugin is called 'nobody'", "plugins list"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_errors_say_what_and_how_to_go_on(run, args, code, what, fix):
    err = run(*args, code=code).stderr
    assert err.startswith("Error: ") and what in err and fix in err
    assert "Traceback" not in err


def test_a_traceback_only_where_asked_for(run):
    done = run("show", "dva", code=2, DAV_BENCH_TRACEBACK="1")
    assert "Traceback" in done.stderr


def test_an_unknown_command_is_a_usage_error(run):
    assert "did you mean 'run'" in run("runn", code=2).stderr


def test_a_dry_run_shows_the_plan_and_writes_nothing(run, tmp_path):
    text = run("run", "--method", "dav,svdd", "--task", "toy-tokens", "--seeds", "0-1", "--dry-run").stdout
    assert len(re.findall(r"^toy-tokens .* new ", text, re.M)) == 8
    rows = json.loads(run("run", "--method", "dav", "--task", "dna", "--dry-run", "--json").stdout)
    assert [r["label"] for r in rows] == ["real", "pretrained", "dav", "dav+tree"]
    assert rows[2]["spec"]["params"]["width"] > 0 and rows[2]["path"].startswith("results/runs/dna/dav/")
    assert not (tmp_path / "results").exists()


def test_nothing_compatible_is_exit_code_3(run, tmp_path):
    (tmp_path / "r.py").write_text(
        "def fn(sequences):\n    return [float(s.count('G')) for s in sequences]\n"
    )
    args = (
        "run",
        "--method",
        "dav",
        "--task",
        "toy-tokens",
        "--reward",
        "./r.py:fn",
        "--set",
        "dav.guide=true",
    )
    assert "try --set dav.guide=false" in run(*args, code=3).stderr
    assert "skip" in run(*args, "--dry-run", code=3).stdout


def test_a_config_file_and_the_environment_are_layers(run, tmp_path):
    (tmp_path / "c.toml").write_text("[method.dav]\nwidth = 3\nlr = 0.5\n[sampler]\nsteps = 9\n")
    args = ("run", "--method", "dav", "--task", "dna", "--config", "c.toml", "--dry-run", "--json")
    rows = json.loads(run(*args, "--set", "dav.lr=0.25", DAV_BENCH_SET_DAV__WIDTH="5").stdout)
    assert (rows[2]["spec"]["params"]["width"], rows[2]["spec"]["params"]["lr"]) == (5, 0.25)
    assert rows[2]["spec"]["sampler"]["steps"] == 9


def test_show_tells_where_each_value_comes_from(run):
    (shown,) = json.loads(
        run("show", "dav", "--task", "dna", "--preset", "paper", "--set", "dav.width=3", "--json").stdout
    )
    settings = {s["setting"]: s for s in shown["settings"]}
    assert (settings["width"]["value"], settings["width"]["from"]) == (3, "--set")
    assert settings["lr"]["from"] == "preset paper"
    assert all(s["doc"] for s in settings.values())
    assert "reward.grad if guide" in shown["needs"]


@pytest.mark.parametrize(
    "kind", ["methods", "models", "rewards", "searchers", "trainers", "metrics", "tasks"]
)
def test_every_kind_can_be_listed(run, kind):
    rows = json.loads(run("list", kind, "--json").stdout)
    assert rows and all(row["name"] for row in rows)


def test_list_says_what_fits_a_task_and_why_the_rest_does_not(run):
    rows = {r["name"]: r for r in json.loads(run("list", "methods", "--fits", "toy-tokens", "--json").stdout)}
    assert rows["dav"]["fits"] is True and rows["dav"]["why not"] == "" and rows["dav"]["paper"]
    assert rows["real"]["fits"] is False and "needs data" in rows["real"]["why not"]
    assert set(rows) == {r["name"] for r in json.loads(run("list", "methods", "--json").stdout)}
    text = run("list", "methods", "--fits", "toy-tokens").stdout
    assert re.search(r"^real +no +'real' needs data", text, re.M) and re.search(r"^dav +yes ", text, re.M)


def test_every_method_that_has_one_shows_its_paper_and_all_show_what_they_need(run):
    rows = json.loads(run("list", "methods", "--json").stdout)
    own = {"real", "exact", "pretrained", "best-of-n"}
    assert [r["name"] for r in rows if not r["needs"] or not (r["paper"] or r["name"] in own)] == []
    (shown,) = (s for s in json.loads(run("show", "dav", "--json").stdout) if s["kind"] == "method")
    assert shown["trains"] == "yes" and shown["search"] == "tree" and "dna" in shown["fits"]


def test_env_is_pasteable(run):
    text = run("env").stdout
    assert "python" in text and "torch" in text and "dav-bench" in text
    assert str(Path.home()) not in text


def test_names_and_seeds():
    assert names(["a,b", "b,c"]) == ["a", "b", "c"] and names(None) == []
    assert seed_list("0-2,5,1") == [0, 1, 2, 5]
    with pytest.raises(DavBenchError):
        seed_list("a")
