"""The names that `import dav_bench` promises, each with its parameters: whoever changes one changes this file."""

import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import dav_bench

GOLDEN = Path(__file__).parent / "api.txt"
DOCS = Path(__file__).parents[2] / "docs" / "plugins.md"


def describe(name: str) -> str:
    """`name` with what a caller depends on: parameters, fields or members."""
    value = getattr(dav_bench, name)
    if inspect.isclass(value):
        if is_dataclass(value):
            inner = ", ".join(f.name for f in fields(value))
        elif issubclass(value, int):
            inner = ", ".join(f"{m.name} = {m.value}" for m in value)
        else:
            inner = ", ".join(inspect.signature(value).parameters)
        methods = sorted(n for n, v in vars(value).items() if not n.startswith("_") and inspect.isroutine(v))
        methods = [] if issubclass(value, int) else methods
        return f"class {name}({inner})" + (f": {', '.join(methods)}" if methods else "")
    if inspect.isfunction(value):
        return f"{name}({', '.join(inspect.signature(value).parameters)})"
    return f"{name}: {type(value).__name__}"


def test_the_api_is_as_committed():
    """Plugins of version v1 rest on these: what is taken away or renamed needs a new API version."""
    now = "\n".join(describe(name) for name in sorted(dav_bench.__all__)) + "\n"
    assert now == GOLDEN.read_text(encoding="utf-8"), now


def test_every_name_is_documented():
    text = DOCS.read_text(encoding="utf-8")
    table = text[text.index("## Names you can rely on") :]
    lacking = [name for name in dav_bench.__all__ if f"`{name}`" not in table and f"`{name}(" not in table]
    assert not lacking and 20 <= len(dav_bench.__all__) <= 30


def test_names_load_on_first_use():
    code = (
        "import sys, dav_bench\n"
        "assert not {'pluggy', 'torch', 'numpy', 'dav_bench.plugins'} & set(sys.modules)\n"
        "[getattr(dav_bench, name) for name in dav_bench.__all__]\n"
        "print(sorted({'torch', 'numpy', 'polars'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
