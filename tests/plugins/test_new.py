"""A plugin of each kind, made by `plugins new`: whole, tidy, and its own tests pass as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dav_bench import plugins
from dav_bench.errors import DavBenchError
from dav_bench.templates import KINDS, new

SOURCES = {"model": ["network.py"], "method": ["loss.py"], "trainer": ["loss.py"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    plugins.reset()
    into = tmp_path_factory.mktemp("made")
    return {kind: new(f"try-{kind}", kind, into)[0] for kind in KINDS}


@pytest.fixture(scope="module")
def site(made, tmp_path_factory) -> Path:
    """All of them as `pip install` leaves them: packages beside metadata."""
    site = tmp_path_factory.mktemp("site")
    for folder in made.values():
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        ((group, points),) = project["entry-points"].items()
        lines = [f"{name} = {module}" for name, module in points.items()]
        (info / "entry_points.txt").write_text(f"[{group}]\n" + "\n".join(lines) + "\n")
        for package in (folder / "src").iterdir():
            (site / package.name).symlink_to(package)
    return site


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_whole_distribution(made, kind):
    folder, module = made[kind], f"dav_bench_try_{kind}"
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    expected = [".github/workflows/tests.yml", ".gitignore", "LICENSE", "README.md", "pyproject.toml"]
    expected += [f"src/{module}/{name}" for name in ["__init__.py", *SOURCES.get(kind, [])]]
    expected += [f"tests/test_{module}.py"]
    expected += [f"src/{module}/tasks/try-task/task.toml"] if kind == "task" else []
    assert files == sorted(expected)
    for name in files:
        text = (folder / name).read_text()
        left = [word for word in text.split() if word.startswith("$") and not word.startswith("${{")]
        assert text.endswith("\n") and not left, name
    assert "${{ matrix.python }}" in (folder / ".github/workflows/tests.yml").read_text()


def test_their_own_tests_pass_at_once(made, site, tmp_path):
    """One interpreter for all of them; `nox -s plugins` does this with pip, in an environment of its own."""
    env = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    tests = [str(folder / "tests") for folder in made.values()]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider",
         "--rootdir", str(tmp_path), *tests],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{2 * len(KINDS)} passed" in done.stdout


def test_it_is_tidy(made):
    ruff = pytest.importorskip("ruff")
    done = subprocess.run(
        [ruff.find_ruff_bin() if hasattr(ruff, "find_ruff_bin") else "ruff", "check", "--isolated", "--select",
         "E,F,I,B,UP", "--line-length", "120", *map(str, made.values())], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "kind", "what"),
    [
        ("Codon", "reward", "no usable name"),
        ("codon usage", "reward", "no usable name"),
        ("2codons", "reward", "no usable name"),
        ("../codon", "reward", "no usable name"),
        ("a" * 41, "reward", "no usable name"),
        ("", "reward", "no usable name"),
        ("class", "reward", "a word of Python"),
        ("dav", "method", "registered by 'dav-bench'"),
        ("codon", "rewards", "did you mean 'reward'"),
    ],
)
def test_bad_names_are_refused(tmp_path, name, kind, what):
    with pytest.raises(DavBenchError, match=what):
        new(name, kind, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(tmp_path):
    folder, *files = new("dav-bench-codon", "reward", tmp_path, author="A. Uthor")
    assert folder.name == "dav-bench-codon" and "A. Uthor" in (folder / "LICENSE").read_text()
    before = {p: p.read_bytes() for p in files}
    with pytest.raises(DavBenchError, match="exists"):
        new("codon", "metric", tmp_path)
    assert {p: p.read_bytes() for p in files} == before and list(tmp_path.iterdir()) == [folder]


def test_an_installed_module_is_not_shadowed(install, tmp_path):
    install("acme", {"dav_bench_codon": "x = 1"}, "acme = dav_bench_codon")
    with pytest.raises(DavBenchError, match="installed already"):
        new("codon", "reward", tmp_path / "into")


def test_the_command(tmp_path):
    def call(*args):
        return subprocess.run(
            [sys.executable, "-m", "dav_bench", "plugins", "new", *args], cwd=tmp_path, capture_output=True, text=True
        )  # fmt: skip

    done = call("codon", "--kind", "reward")
    assert done.returncode == 0 and "dav-bench-codon/pyproject.toml" in done.stdout, done.stderr
    assert "pip install -e 'dav-bench-codon[dev]'" in done.stdout
    again = call("codon", "--kind", "reward")
    assert again.returncode == 2 and "exists" in again.stderr
    assert call("codon", "--kind", "rewrad").returncode == 2


def test_the_templates_are_in_the_wheel():
    """Hatchling takes all files of the package: none is left out by name."""
    from dav_bench import templates

    root = Path(templates.__file__).parent
    ignored = (
        (root.parents[1] / ".gitignore").read_text() if (root.parents[1] / ".gitignore").exists() else ""
    )
    assert "tmpl" not in ignored and len(list(root.rglob("*.tmpl"))) >= 5 + 3 * len(KINDS)
