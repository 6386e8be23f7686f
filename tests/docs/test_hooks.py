"""The hooks and their documentation name each other."""

import inspect
import re
from pathlib import Path

import pytest

from dav_bench import hookspecs

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
HOOKS = {
    name: list(inspect.signature(value).parameters)
    for name, value in vars(hookspecs).items()
    if hasattr(value, "dav_bench_spec")
}


def test_there_are_hooks():
    assert {"register_methods", "run_finished", "register_commands"} <= set(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_each_hook_has_a_heading_with_its_arguments(name):
    assert f"### {name}({', '.join(HOOKS[name])})\n" in TEXT
    assert getattr(hookspecs, name).__doc__


def test_no_heading_documents_a_hook_that_is_none():
    assert set(re.findall(r"^### (\w+)\(", TEXT, re.M)) == set(HOOKS)


def test_the_first_plugin_is_as_short_as_the_docs_say():
    source = ROOT / "plugins" / "dav-bench-hello" / "src" / "dav_bench_hello"
    files = [source / "__init__.py", *source.glob("tasks/*/task.toml")]
    lines = [line for f in files for line in f.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(lines) <= 66
