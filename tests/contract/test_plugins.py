"""The distributions in `plugins/` keep the contract; `nox -s plugins` checks them once more, built and installed."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from dav_bench import plugins, testing

FOLDERS = sorted(p.parent for p in (Path(__file__).resolve().parents[2] / "plugins").glob("*/pyproject.toml"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_it_keeps_the_contract(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    ((group, points),) = project["entry-points"].items()
    (info / "entry_points.txt").write_text(
        f"[{group}]\n" + "".join(f"{n} = {m}\n" for n, m in points.items())
    )
    monkeypatch.syspath_prepend(str(folder / "src"))
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    plugins.reset()
    try:
        for name in points:
            testing.examine(name, timed=False).raise_failures()
    finally:
        for module in set(sys.modules) - before:
            if str(folder) in str(getattr(sys.modules[module], "__file__", "")):
                del sys.modules[module]
        plugins.reset()
