"""The doctor: each ailment is named with its place and what mends it, and a healthy installation is said to be one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dav_bench import doctor, plugins
from dav_bench.errors import DavBenchError
from dav_bench.files import SCHEMA
from dav_bench.spec import RunSpec
from dav_bench.store import RunDir

GOOD = """
from dav_bench import hookimpl
@hookimpl
def register_rewards(register):
    register("NAME", "math:sqrt", domain="sequence", summary="good")
"""


@pytest.fixture
def found(monkeypatch, tmp_path):
    """Findings by area; torch is left out, which has its own tests and takes seconds to import."""
    monkeypatch.setattr(doctor, "_torch", lambda: iter(()))
    monkeypatch.chdir(tmp_path)

    def look(area: str, **options) -> list[doctor.Finding]:
        plugins.reset()
        return [f for f in doctor.diagnose(tmp_path / "results", **options) if f.area == area]

    return look


def problems(findings) -> list[tuple[str, str]]:
    return [(f.what, f.fix) for f in findings if f.status == "problem"]


def test_a_healthy_installation(found, fresh_plugins):
    for area in ("plugins", "requirements", "tasks", "torch", "runs"):
        assert [f.status for f in found(area) if f.status != "note"] == ["ok"], found(area)


@pytest.mark.parametrize(
    ("source", "what", "fix"),
    [
        (
            "\n\nraise RuntimeError('boom')",
            "RuntimeError: boom (PLACE:3)",
            "leave it out: DAV_BENCH_PLUGINS=-bad",
        ),
        ("import no_such_thing", "No module named 'no_such_thing' (PLACE:1)", "pip install no_such_thing"),
        ("x = 1", "it implements no hook", "docs/plugins.md"),
        (GOOD.replace("NAME", "tfbind8"), "already registered by 'dav-bench'", "uninstall one of the two"),
    ],
    ids=["raises", "module", "no-hook", "name"],
)
def test_a_broken_plugin_has_a_place_and_a_way_out(install, found, source, what, fix):
    site = install("bad", {"bad_mod": source}, "bad = bad_mod")
    ((told, way),) = problems(found("plugins"))
    assert told.startswith("bad of bad 1.0: ") and what.replace("PLACE", str(site / "bad_mod.py")) in told
    assert fix in way


def test_an_entry_point_without_its_module(install, found):
    install("bad", {}, "bad = gone_mod")
    ((told, way),) = problems(found("plugins"))
    assert "gone_mod" in told and "pip install --force-reinstall bad" in way


def test_another_api(install, found):
    install("old", {"old_mod": ""}, "old = old_mod", group="dav_bench.v0")
    assert problems(found("plugins")) == [
        (
            "old of old 1.0: made for plugin API v0; this is v1",
            "pip install --upgrade old, or a dav-bench for that API",
        )
    ]


def test_what_is_left_out_and_what_is_demanded(install, found, monkeypatch):
    install("acme", {"acme_mod": GOOD.replace("NAME", "good")}, "acme = acme_mod")
    monkeypatch.setenv("DAV_BENCH_PLUGINS", "-acme")
    monkeypatch.setenv("DAV_BENCH_REQUIRE_PLUGINS", "acme")
    findings = found("plugins")
    assert [f.what for f in findings if f.status == "note"] == ["acme is left out by DAV_BENCH_PLUGINS"]
    assert problems(findings) == [
        (
            "acme is demanded by DAV_BENCH_REQUIRE_PLUGINS and does not work here",
            "install it, or `dav-bench plugins list`",
        )
    ]
    with pytest.raises(DavBenchError, match="demands acme"):
        plugins.require()
    monkeypatch.delenv("DAV_BENCH_PLUGINS")
    plugins.reset()
    plugins.require()


def require(site: Path, *lines: str) -> None:
    with (site / "acme-1.0.dist-info" / "METADATA").open("a") as file:
        file.write("".join(f"Requires-Dist: {line}\n" for line in lines))


def test_requirements_and_extras(install, found):
    site = install("acme", {"acme_mod": GOOD.replace("NAME", "good")}, "acme = acme_mod")
    require(site, "no-such-thing>=2", "pluggy>=99", "pluggy", "never; python_version < '3'")
    require(site, "no-such-board; extra == 'board'", "no-such-linter; extra == 'dev'")
    findings = found("requirements")
    told = dict(problems(findings))
    assert told["acme needs it: no-such-thing is not installed"] == "pip install 'no-such-thing>=2'"
    assert [fix for what, fix in told.items() if "not >=99" in what] == ["pip install 'pluggy>=99'"] and len(
        told
    ) == 2
    notes = [(f.what, f.fix) for f in findings if f.status == "note" and "acme" in f.what]
    assert notes == [("extra 'board' of acme: no-such-board is not installed", "pip install 'acme[board]'")]


def test_a_module_that_an_extra_brings_is_named_with_the_extra(install, found):
    site = install("acme", {"acme_mod": "import no_such_board"}, "acme = acme_mod")
    require(site, "no-such-board; extra == 'board'")
    assert problems(found("plugins"))[0][1] == "pip install 'acme[board]'"


TASK = """
schema = 1
name = "toy-tokens"
version = 1
model.use = "toy-tokens"
reward.train = "toy-tokens"
"""


def test_tasks_that_are_broken_shadowed_or_lack_a_file(found, fresh_plugins, tmp_path):
    for name, text in (
        ("bad", "schema = 1"),
        ("mine", TASK),
        ("short", TASK.replace("toy-tokens", "short", 1)),
    ):
        (tmp_path / "tasks" / name).mkdir(parents=True)
        (tmp_path / "tasks" / name / "task.toml").write_text(text)
    with (tmp_path / "tasks" / "short" / "task.toml").open("a") as file:
        file.write('assets = ["counts.json"]\nmetrics.quality = ["no-such"]\n')
    findings = found("tasks")
    told = [what for what, _ in problems(findings)]
    assert any("missing key 'name'" in what for what in told)
    assert any(what.startswith("short: ") and "unknown metric 'no-such'" in what for what in told)
    assert [f.what for f in findings if f.status == "note" and "shadows" in f.what]
    path = tmp_path / "tasks" / "short" / "task.toml"
    path.write_text(path.read_text().replace("no-such", "reward"))
    from dav_bench.tasks import _scan

    _scan.cache_clear()
    assert any("lacks counts.json" in what for what, _ in problems(found("tasks")))
    _scan.cache_clear()


@pytest.mark.parametrize(
    ("built", "driver", "available", "status", "what"),
    [
        (None, "", False, None, ""),
        ("12.8", "", False, "note", "there is no NVIDIA driver"),
        (None, "570.1", False, "problem", "built without CUDA"),
        ("13.0", "470.2", False, "problem", "the driver is too old"),
        ("12.8", "570.1", True, None, ""),
    ],
)
def test_torch_and_the_driver(monkeypatch, built, driver, available, status, what):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    findings = list(doctor.torch_findings("2.9.0", built, driver, available))
    assert [f.status for f in findings] == ([status] if status else [])
    assert all(what in f.what for f in findings)


def test_a_hidden_gpu_and_the_driver_file(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (finding,) = doctor.torch_findings("2.9.0", "12.8", "570.1", False)
    assert finding.status == "note" and finding.fix == "unset CUDA_VISIBLE_DEVICES"
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26\nGCC version: 12\n"
    )
    assert doctor.driver_version(file) == "570.124.06" and doctor.driver_version(tmp_path / "none") == ""


def test_dead_damaged_stale_and_newer_runs(found, fresh_plugins, tmp_path):
    out = tmp_path / "results"
    runs = {}
    for name in ("dead", "damaged", "stale", "newer", "fine"):
        with RunDir.create(out, RunSpec("toy-tokens", 1, "h", name)) as run:
            if name != "dead":
                run.update(status="done")
        runs[name] = run.path

    def rewrite(name: str, **fields) -> None:
        path = runs[name] / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    (runs["damaged"] / "run.json").write_text("{")
    rewrite("stale", schema=SCHEMA - 1)
    rewrite("newer", schema=SCHEMA + 1)
    told = {what.split("/")[1]: (what, fix) for what, fix in problems(found("runs"))}
    assert set(told) == {"dead", "damaged", "stale", "newer"}
    assert "nobody runs it" in told["dead"][0] and f"--spec {runs['dead'] / 'spec.toml'}" in told["dead"][1]
    assert "results migrate" in told["stale"][1] and "--upgrade dav-bench" in told["newer"][1]
    assert "move" in told["damaged"][1]


def test_the_command(install, tmp_path):
    install("bad", {"bad_mod": "raise RuntimeError('boom')"}, "bad = bad_mod")
    env = {**os.environ, "COLUMNS": "200"}
    ask = [sys.executable, "-m", "dav_bench", "plugins", "doctor"]
    done = subprocess.run(ask, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 1, done.stderr
    assert "problem  plugins: bad of bad 1.0: RuntimeError: boom" in done.stdout and "Try: " in done.stdout
    assert "ok       runs: 0 runs in results" in done.stdout
