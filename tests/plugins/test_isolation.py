"""Plugins that are broken in every way we could think of: each is reported, none breaks another."""

import json
import os
import subprocess
import sys

import pytest

from dav_bench import plugins
from dav_bench.errors import DavBenchError
from dav_bench.events import RunFinished
from dav_bench.spec import RunSpec

GOOD = """
from dav_bench import hookimpl
@hookimpl
def register_rewards(register):
    register("good", "math:sqrt", domain="sequence")
"""
SPEC = RunSpec("t", 1, "h", "dav")


def reward(name):
    return GOOD.replace('"good"', repr(name))


def broken():
    return {b.name: b for b in plugins.plugins().broken}


def test_a_working_plugin_is_loaded_with_its_metadata(install):
    install("acme", {"acme_mod": GOOD}, "acme = acme_mod")
    (loaded,) = (p for p in plugins.plugins().loaded if p.name == "acme")
    assert (loaded.dist, loaded.target, loaded.hooks) == ("acme 1.0", "acme_mod", ("register_rewards",))
    assert plugins.catalog().get("rewards", "good").origin == "acme"
    assert not broken()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        ("def f(:", "SyntaxError"),
        ("import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
        ("import sys; sys.exit(3)", "SystemExit"),
        ("x = 1", "it implements no hook"),
        ("def register_rewards(register): pass", "'register_rewards' lacks @hookimpl"),
        (GOOD.replace("register_rewards", "register_reward"), "did you mean 'register_rewards'"),
        (GOOD.replace("(register)", "(registrar)", 1), "registrar"),
        (GOOD.replace('"math:sqrt"', '"math"'), "'module:attr'"),
        (GOOD.replace("domain=", "domian="), "did you mean 'domain'"),
        (GOOD.replace('register("good"', '1 / 0; register("good"'), "ZeroDivisionError"),
        (reward("hepg2-specificity"), "already registered by 'dav-bench'"),
        (
            GOOD.replace("rewards", "tasks").replace('"good", "math:sqrt", domain="sequence"', '"/no/where"'),
            "no task.toml",
        ),
    ],
)
def test_a_broken_plugin_is_a_record_and_its_neighbours_work(install, source, reason):
    install("bad", {"bad_mod": source}, "bad = bad_mod")
    install("nice", {"nice_mod": reward("nice")}, "nice = nice_mod")
    assert reason in broken()["bad"].reason
    assert broken()["bad"].dist == "bad 1.0"
    names = plugins.catalog().names("rewards")
    assert "nice" in names and "good" not in names and "hepg2-specificity" in names
    assert "1 broken plugin left out (bad)" in plugins.plugins().notice()


def test_a_plugin_registers_all_or_nothing(install):
    source = GOOD + '    register("good", "math:sqrt")\n'
    install("bad", {"bad_mod": source}, "bad = bad_mod")
    assert "already registered by 'bad'" in broken()["bad"].reason
    assert "good" not in plugins.catalog().names("rewards")


def test_the_place_of_the_failure_is_named(install):
    site = install("bad", {"bad_mod": "\n\nraise RuntimeError('boom')"}, "bad = bad_mod")
    assert broken()["bad"].where == f"{site / 'bad_mod.py'}:3"


def test_a_misspelt_entry_point_is_reported(install):
    install("bad", {}, "bad = no_such_plugin_module")
    install("worse", {"worse_mod": "x = 1"}, "worse = worse_mod:nothing")
    assert "no_such_plugin_module" in broken()["bad"].reason
    assert "nothing" in broken()["worse"].reason


def test_two_plugins_with_one_name_in_order(install):
    install("one", {"one_mod": GOOD}, "one = one_mod")
    install("two", {"two_mod": GOOD}, "two = two_mod")
    assert plugins.catalog().get("rewards", "good").origin == "one"
    assert "register it under a namespace: 'two/good'" in broken()["two"].reason


def test_a_namespace_settles_the_collision(install):
    install("one", {"one_mod": GOOD}, "one = one_mod")
    install("two", {"two_mod": reward("two/good")}, "two = two_mod")
    assert not broken() and plugins.catalog().get("rewards", "two/good").origin == "two"


def test_another_api_version_is_reported_without_being_imported(install):
    install("old", {"old_mod": "raise RuntimeError('imported')"}, "old = old_mod", group="dav_bench.v2")
    assert broken()["old"].reason == "made for plugin API v2; this is v1"


@pytest.mark.parametrize(
    ("value", "loaded"),
    [(None, {"one", "two"}), ("", set()), ("one", {"one"}), ("-one", {"two"}), ("one,two", {"one", "two"})],
)
def test_plugins_can_be_blocked(install, monkeypatch, value, loaded):
    install("one", {"one_mod": reward("one")}, "one = one_mod")
    install("two", {"two_mod": reward("two")}, "two = two_mod")
    if value is not None:
        monkeypatch.setenv("DAV_BENCH_PLUGINS", value)
    assert {p.name for p in plugins.plugins().loaded} - {"dav-bench"} == loaded
    assert set(plugins.plugins().blocked) == {"one", "two"} - loaded


def test_strict_plugins_fail(install):
    install("bad", {"bad_mod": "raise RuntimeError('boom')"}, "bad = bad_mod")
    plugins.reset(strict=True)
    with pytest.raises(DavBenchError, match="plugin 'bad' is broken"):
        plugins.plugins()


HOOKS = """
from dav_bench import hookimpl
seen = []
@hookimpl
def run_finished(event):
    seen.append(event.status)
    raise ValueError("tracker down")
"""


def test_an_exception_in_a_life_hook_is_told_once_and_passes(install, capsys):
    install("track", {"track_mod": HOOKS}, "track = track_mod")
    event = RunFinished(SPEC, None, "done")
    plugins.emit(event)
    plugins.emit(event)
    err = capsys.readouterr().err
    assert err.count("track.run_finished failed: ValueError: tracker down") == 1
    assert sys.modules["track_mod"].seen == ["done", "done"]
    plugins.plugins().strict = True
    with pytest.raises(ValueError, match="tracker down"):
        plugins.emit(event)


def test_listeners_of_one_run_get_events_too(fresh_plugins):
    class Listener:
        seen = ()

        def run_finished(self, event):
            self.seen += (event.status,)

    listener = Listener()
    plugins.emit(RunFinished(SPEC, None, "nan"), [listener])
    assert listener.seen == ("nan",)


def dav_bench(*args, cwd):
    return subprocess.run([sys.executable, "-m", "dav_bench", *args], cwd=cwd, capture_output=True, text=True)


def test_the_command_line_lists_them_and_mentions_them_in_one_line(install, tmp_path):
    install("bad", {"bad_mod": "raise RuntimeError('boom')"}, "bad = bad_mod")
    install("slow", {"slow_mod": "import time; time.sleep(0.3)\n" + reward("slow")}, "slow = slow_mod")
    rows = {r["plugin"]: r for r in json.loads(dav_bench("plugins", "list", "--json", cwd=tmp_path).stdout)}
    assert rows["bad"]["status"] == "broken" and "boom" in rows["bad"]["note"]
    assert rows["slow"]["status"] == "ok" and rows["slow"]["import_s"] >= 0.3
    other = dav_bench("list", "rewards", cwd=tmp_path)
    assert other.returncode == 0 and "slow" in other.stdout
    assert other.stderr.count("\n") == 1 and "1 broken plugin left out (bad)" in other.stderr
    strict = dav_bench("--strict-plugins", "list", "rewards", cwd=tmp_path)
    assert strict.returncode == 2 and "plugin 'bad' is broken" in strict.stderr


COMMAND = """
from dav_bench import hookimpl
@hookimpl
def register_commands(app):
    @app.command()
    def greet(name: str = "you"):
        print("hello", name)
"""


def test_help_loads_no_plugin_and_their_commands_still_run(install, tmp_path):
    install("cmd", {"cmd_mod": "print('imported')" + COMMAND}, "cmd = cmd_mod")
    assert "imported" not in dav_bench("--help", cwd=tmp_path).stdout
    done = dav_bench("greet", "--name", "cell", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("hello cell\n")
    assert dav_bench("gret", cwd=tmp_path).returncode == 2


def test_hook_calls_can_be_traced(install, tmp_path, monkeypatch):
    monkeypatch.setenv("DAV_BENCH_TRACE_PLUGINS", "1")
    install("acme", {"acme_mod": GOOD}, "acme = acme_mod")
    assert "register_rewards" in dav_bench("list", "rewards", cwd=tmp_path).stderr
    assert os.environ["DAV_BENCH_TRACE_PLUGINS"] == "1"
