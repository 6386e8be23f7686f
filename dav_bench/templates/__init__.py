"""`dav-bench plugins new`: a complete distribution to start from, whose tests pass as it stands."""

from __future__ import annotations

import keyword
import os
import re
import shutil
import tempfile
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from string import Template

from dav_bench.errors import DavBenchError, near
from dav_bench.hookspecs import GROUP
from dav_bench.plugins import catalog

KINDS = ("reward", "model", "method", "searcher", "trainer", "metric", "task", "tracker")
"""What can be started."""

_COMMON = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "LICENSE": "LICENSE",
    "gitignore": ".gitignore",
    "tests.yml": ".github/workflows/tests.yml",
}
_KIND = {"task.toml": "src/$module/tasks/$name/task.toml", "test.py": "tests/test_$module.py"}


def new(name: str, kind: str, into: Path = Path(), author: str = "") -> list[Path]:
    """Write the distribution `dav-bench-NAME` below `into`; returns its folder and then its files.

    Args:
        name: Of the plugin and of the component in it; a leading `dav-bench-` is left out.
        kind: One of KINDS.
        into: The folder that the distribution's folder is made in.
        author: Who the licence names.

    Raises:
        DavBenchError: the name cannot be used or is taken, or the folder exists. Nothing is written then.
    """
    if kind not in KINDS:
        raise DavBenchError(f"there is no scaffold for {kind!r}{near(kind, KINDS)}", fix="--kind reward")
    name = name.removeprefix("dav-bench-")
    _check(name, kind)
    dist = f"dav-bench-{name}"
    module = dist.replace("-", "_")
    folder = into / dist
    if folder.exists() or folder.is_symlink():
        raise DavBenchError(f"{folder} exists.", "Nothing is written over.", "another name, or --into FOLDER")
    if find_spec(module) is not None:
        raise DavBenchError(f"a module called {module} is installed already.", fix="another name")
    words = {
        "name": name,
        "dist": dist,
        "module": module,
        "Class": "".join(part.capitalize() for part in name.split("-")),
        "kind": kind,
        "group": GROUP,
        "year": str(date.today().year),
        "author": " ".join(author.split()) or f"the authors of {dist}",
    }
    words["usage"] = _fill(kind, "usage.md", words).strip()
    texts = {path: _fill("common", source, words) for source, path in _COMMON.items()}
    for file in sorted(p.name.removesuffix(".tmpl") for p in _folder(kind).glob("*.tmpl")):
        if file != "usage.md":
            place = _KIND.get(file, f"src/$module/{'__init__.py' if file == 'init.py' else file}")
            texts[Template(place).substitute(words)] = _fill(kind, file, words)
    return [folder, *_write(folder, texts)]


def _check(name: str, kind: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 40:
        wanted = "Small letters, digits and single dashes, a letter first, 40 at most."
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")[:40].strip("-")
        raise DavBenchError(f"{name!r} is no usable name.", wanted, plain or "a name such as codon-usage")
    if keyword.iskeyword(name):  # a class and a test are named after it
        raise DavBenchError(f"{name!r} is a word of Python.", fix=f"my-{name}")
    taken = catalog().find(f"{kind}s", name)
    if taken is not None:
        raise DavBenchError(f"a {kind} called {name!r} is registered by {taken.origin!r}.", fix=f"my-{name}")


def _folder(kind: str) -> Path:
    return Path(__file__).parent / kind


def _fill(kind: str, file: str, words: dict[str, str]) -> str:
    return Template((_folder(kind) / f"{file}.tmpl").read_text(encoding="utf-8")).substitute(words)


def _write(folder: Path, texts: dict[str, str]) -> list[Path]:
    """All of the files, or none: they are written beside the folder, which then gets its name."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as err:
        raise DavBenchError(f"{folder} cannot be written.", str(err), "--into FOLDER") from err
    try:
        os.chmod(made, 0o755)
        for path, text in texts.items():
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            (made / path).write_text(text, encoding="utf-8")
        made.rename(folder)
    except OSError as err:
        raise DavBenchError(f"{folder} cannot be written.", str(err), "--into FOLDER") from err
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return [folder / path for path in sorted(texts)]
