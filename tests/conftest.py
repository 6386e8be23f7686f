"""Shared fixtures: each test sees the plugins it installs, and the project's tasks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is not on this machine is missing: no test asks the network
for name in [n for n in os.environ if n.startswith("DAV_BENCH_")]:
    del os.environ[name]  # a developer's settings must not change what is tested

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def fresh_plugins() -> Iterator[None]:
    """Plugins load anew in this test and after it."""
    from dav_bench import plugins

    plugins.reset()
    yield
    plugins.reset()


@pytest.fixture
def install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_plugins: None
) -> Iterator[Callable[..., Path]]:
    """Install fake distributions: `install("acme", {"acme": source}, "acme = acme")`.

    Each is a module beside real `*.dist-info` metadata in a folder on `sys.path`, so that discovery is
    the real one.
    """
    site = tmp_path / "site"
    before = set(sys.modules)

    def put(dist: str, modules: dict[str, str], *points: str, group: str = "dav_bench.v1") -> Path:
        info = site / f"{dist.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n" + "\n".join(points) + "\n")
        for name, source in modules.items():
            (site / f"{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setenv("PYTHONPATH", str(site))
        return site

    yield put
    for name in set(sys.modules) - before:  # the next test may install another module of that name
        if str(site) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
