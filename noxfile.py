"""What `nox` checks: the same here and in continuous integration. Plain `nox` runs all but `gpu`."""

from __future__ import annotations

import os
import shutil
import tomllib
from pathlib import Path

import nox

nox.needs_version = ">=2024.4"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "docs", "tests", "plugins"]
nox.options.error_on_missing_interpreters = True

QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
TESTS = ("tests",)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: errors, imports, upgrades."""
    session.install("ruff>=0.11")
    session.run("ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """mypy on the package; heavy dependencies count as untyped, so that nothing big is installed."""
    session.install("mypy>=1.15", "typer>=0.15", "pluggy>=1.5", "rich>=13.7", "numpy>=1.26")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Unit, exact and contract tests against the installed package, in one environment."""
    session.install(".[dev]")
    session.run("pytest", *(session.posargs or TESTS), env=QUIET)


@nox.session
def plugins(session: nox.Session) -> None:
    """Build the core and plugins/*, install the wheels together, run each plugin's tests and its contract."""
    session.install("build>=1.2", "pytest>=8.3")
    wheels = Path(session.create_tmp()).resolve()
    for old in wheels.glob("*.whl"):
        old.unlink()
    folders = sorted(p.parent for p in Path("plugins").glob("*/pyproject.toml"))
    for source in [Path("."), *folders]:
        session.run("python", "-m", "build", "--wheel", "--outdir", str(wheels), str(source), silent=True)
    built = [str(w) for w in sorted(wheels.glob("*.whl"))]
    session.install(*built)
    session.install("--force-reinstall", "--no-deps", *built)
    session.chdir(session.create_tmp())  # away from the checkout: what is tested is what is installed
    root = Path(__file__).resolve().parent
    for folder in folders:
        session.run("pytest", "-q", "-W", "error", str(root / folder / "tests"), env=QUIET)
    session.run("dav-bench", "--strict-plugins", "plugins", "list", env=QUIET)
    for folder in folders:
        project = tomllib.loads((root / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for name in (name for group in project["entry-points"].values() for name in group):
            session.run("dav-bench", "plugins", "check", name, env=QUIET)
    session.run("dav-bench", "run", "--method", "dav", "--task", "dna", "--dry-run", env=QUIET)  # assets are inside
    started = Path(session.create_tmp()).resolve() / "started"  # what `plugins new` writes, installed by pip
    shutil.rmtree(started, ignore_errors=True)
    kinds = ("reward", "model", "method", "searcher", "trainer", "metric", "task", "tracker")
    away = ("python", "-m", "pip", "uninstall", "-q", "-y", *(f"dav-bench-try-{kind}" for kind in kinds))
    session.run(*away, silent=True)  # an earlier session may have ended before it came to this
    for kind in kinds:
        session.run("dav-bench", "plugins", "new", f"try-{kind}", "--kind", kind, "--into", str(started), silent=True)
    made = [started / f"dav-bench-try-{kind}" for kind in kinds]
    session.install("--no-deps", *map(str, made))
    session.run("pytest", "-q", "-W", "error", "--import-mode=importlib", *(str(m / "tests") for m in made), env=QUIET)
    session.run(*away, silent=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site of the documentation, with warnings as errors; `nox -s docs` says where it lies."""
    session.install("mkdocs-material>=9.5", "mkdocstrings-python>=1.10", "ruff>=0.11")  # ruff formats signatures
    root, place = Path(__file__).resolve().parent, Path(session.create_tmp()).resolve()
    shutil.rmtree(place / "source", ignore_errors=True)
    pages = [root / "README.md", *root.glob("docs/**/*"), *root.glob("results/**/*"), *root.glob("tasks/**/*")]
    kinds = {".md", ".svg", ".png", ".webp", ".csv", ".toml", ".json", ".html"}
    for page in pages:
        if page.suffix in kinds and "runs" not in page.parts:
            target = place / "source" / page.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(page, target)
    shutil.copy(root / "docs" / "mkdocs.yml", place)
    env = {"DAV_BENCH_SOURCE": str(root), "NO_MKDOCS_2_WARNING": "1"}
    session.run("mkdocs", "build", "--strict", "--quiet", "-f", str(place / "mkdocs.yml"), env=env)
    session.log(f"the site lies at {place / 'site' / 'index.html'}")


@nox.session
def gpu(session: nox.Session) -> None:
    """Default tasks and the conformance suite on CUDA; `nox --no-venv -s gpu` where nothing can be installed."""
    if session.virtualenv.is_sandboxed:
        session.install(".[dev]")
    ask = "import torch; print(torch.cuda.is_available())"
    if "True" not in str(session.run("python", "-c", ask, silent=True, external=True)):
        session.skip("no CUDA device: nothing was checked on a GPU")
    out = os.environ.get("DAV_BENCH_GPU_OUT") or session.create_tmp()
    env = {"HF_HUB_OFFLINE": "1"}
    for task in ("toy-mixture", "toy-tokens", "toy-ring", "tfbind8", "dna"):
        session.run(
            "python", "-m", "dav_bench", "run", "--method", "dav", "--task", task, "--device", "cuda", "--fresh",
            "--out", out, env=env, external=True,
        )  # fmt: skip
    session.run(
        "python", "-m", "dav_bench", "verify", "--device", "cuda", "--jobs", "1", *session.posargs, env=env,
        external=True,
    )  # fmt: skip
