"""Runs that travel: a zip with a checksum of every file, and an import that believes none of it unchecked.

    manifest.json                      schema, who wrote it, the runs, and size and sha256 of every file
    runs/<task>/<label>/<id>-s<seed>/  the run directories, without what only a resume needs

An imported run lies under `foreign/` in the results folder: it is listed and shown on boards as foreign, never taken
for a run of one's own, so the same command still runs here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from dav_bench.errors import DavBenchError, ExitCode
from dav_bench.files import read_json, replacing, write_json
from dav_bench.scan import FOREIGN
from dav_bench.spec import RunSpec
from dav_bench.store import RunDir

SCHEMA = 1
"""Of the manifest."""

ORIGIN = "origin.json"
"""In each imported run: which bundle it came from, and the checksums of its files."""

LIMIT = 16 << 30
"""Most bytes that an import unpacks."""

_MANIFEST, _CHUNK = "manifest.json", 1 << 20
_LONGEST = 64 << 20  # bytes of a manifest
_HERE = (".lock", ".reserve", ORIGIN)  # of this machine alone
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same runs give the same bytes


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    added: tuple[Path, ...]
    """Folders of runs that are new here."""
    held: tuple[Path, ...]
    """Folders of runs that were here already, file by file the same."""


def bundle(runs: Sequence[RunDir], path: Path, weights: bool = True) -> list[str]:
    """Write finished runs into one zip file; returns their names in it.

    Host name and process number are left out; the command line in env.json stays, because it says how to run again.

    Args:
        runs: Runs that are done.
        path: The file, replaced as a whole.
        weights: Whether tuned weights travel too.

    Raises:
        DavBenchError: there is no run, or one is not finished.
    """
    if not runs:
        raise DavBenchError("there is no run to bundle.", fix="dav-bench results ls")
    files: dict[str, Path] = {}
    changed: dict[str, bytes] = {}
    about = []
    for run in runs:
        if run.status != "done":
            why = f"It is {run.status}; a bundle holds finished runs."
            raise DavBenchError(f"run {run.path.name} cannot go into a bundle.", why, "repeat its command: it goes on")
        spec = RunSpec.from_dict(run.spec)
        about.append({"path": spec.dirname, "identity": spec.identity, "task": spec.task, "label": run.meta["label"]})
        for file in sorted(p for p in run.path.rglob("*") if p.is_file() and not p.is_symlink()):
            name = file.relative_to(run.path).as_posix()
            if name in _HERE or name.endswith(".tmp") or (not weights and file.suffix == ".safetensors"):
                continue
            files[f"{spec.dirname}/{name}"] = file
        changed[f"{spec.dirname}/run.json"] = _anonymous(run)
    listed = {name: _described(changed.get(name) or file) for name, file in files.items()}
    manifest = {"schema": SCHEMA, "dav_bench": _version(), "runs": about, "files": listed}
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as out:
        _store(out, _MANIFEST, json.dumps(manifest, indent=1).encode())
        for name, file in files.items():
            _store(out, name, changed.get(name) or file)
    return [entry["path"] for entry in about]


def _version() -> str:
    from dav_bench.env import packages

    return packages().get("dav-bench", "")


def _anonymous(run: RunDir) -> bytes:
    return (json.dumps({**run.meta, "host": "", "pid": 0}, indent=1) + "\n").encode()


def _described(content: bytes | Path) -> dict[str, Any]:
    if isinstance(content, bytes):
        return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with content.open("rb") as f:
        return {"size": content.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def _store(out: zipfile.ZipFile, name: str, content: bytes | Path) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    with out.open(info, "w", force_zip64=True) as target:
        if isinstance(content, bytes):
            target.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, target, _CHUNK)


# ---- import


def unbundle(path: Path, root: Path, limit: int = LIMIT) -> Imported:
    """Check a bundle in full, then put its runs under `<root>/foreign`; nothing is there unless all of it is right.

    Refused are: what is no zip file or has no manifest, a newer schema, names that lead out of the folder, links, files
    that the manifest does not name or that differ from it, more bytes than `limit`, runs whose specification is not
    what their identity says, and a run that is here already with other content.

    Raises:
        DavBenchError: what of this is wrong, and with which file.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        why, fix = " ".join(str(error).split()), "ask for the file again; `dav-bench results bundle` writes them"
        raise DavBenchError(f"{path} is no bundle of runs.", why, fix, code=ExitCode.MISSING) from error
    root.mkdir(parents=True, exist_ok=True)
    with archive, tempfile.TemporaryDirectory(prefix=".import-", dir=root) as temporary:
        place = Path(temporary)
        try:
            manifest = _manifest(archive, path)
            _check_names(archive, manifest, limit)
            for name, fact in manifest["files"].items():
                _extract(archive, name, fact, place / name)
        except _Wrong as error:
            raise _refusal(path, str(error)) from error
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
            raise _refusal(path, " ".join(str(error).split()) or type(error).__name__) from error
        origin = {
            "bundle": path.name,
            "sha256": _described(path)["sha256"],
            "written_by": str(manifest.get("dav_bench", "")),
            "imported": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        moves, held = [], []
        for entry in manifest["runs"]:
            folder = place / entry["path"]
            files = {
                name.removeprefix(entry["path"] + "/"): fact["sha256"]
                for name, fact in manifest["files"].items()
                if name.startswith(entry["path"] + "/")
            }
            _check_run(folder, entry, path)
            target = root / FOREIGN / entry["path"].removeprefix("runs/")
            if target.exists():
                _check_same(target, files)
                held.append(target)
                continue
            write_json(folder / ORIGIN, {**origin, "files": files})
            moves.append((folder, target))
        for folder, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(target)
    return Imported(tuple(target for _, target in moves), tuple(held))


class _Wrong(Exception):
    """What is wrong with a bundle, in words."""


def _refusal(path: Path, why: str) -> DavBenchError:
    return DavBenchError(f"{path} is refused: nothing was imported.", why, "ask its author for the file again")


def _manifest(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    try:
        info = archive.getinfo(_MANIFEST)
    except KeyError:
        raise _Wrong(f"It holds no {_MANIFEST}.") from None
    if info.file_size > _LONGEST:
        raise _Wrong(f"Its {_MANIFEST} would have {info.file_size:,} bytes.")
    with archive.open(info) as source:
        text = source.read(_LONGEST + 1)
    if len(text) > _LONGEST:
        raise _Wrong(f"Its {_MANIFEST} is larger than it says.")
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"Its {_MANIFEST} is no JSON ({error}).") from error
    if not isinstance(manifest, dict):
        raise _Wrong(f"Its {_MANIFEST} is no table.")
    schema = manifest.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise _Wrong(f"Its schema {schema!r} is no number.")
    if schema > SCHEMA:
        raise DavBenchError(
            f"{path} was written by a newer dav-bench.",
            f"It has schema {schema}; this version reads up to {SCHEMA}.",
            "pip install --upgrade dav-bench",
        )
    runs, files = manifest.get("runs"), manifest.get("files")
    lists = isinstance(runs, list) and runs and all(map(_names_run, runs))
    if not lists or not isinstance(files, dict) or not all(map(_describes, files.values())):
        raise _Wrong(f"Its {_MANIFEST} does not list runs with path and identity, and files with size and sha256.")
    return manifest


def _names_run(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("path", "identity"))


def _describes(fact: Any) -> bool:
    if not isinstance(fact, dict) or not isinstance(fact.get("sha256"), str):
        return False
    return type(fact.get("size")) is int and fact["size"] >= 0


def _check_names(archive: zipfile.ZipFile, manifest: Mapping[str, Any], limit: int) -> None:
    """Names, kinds and sizes, before a byte is unpacked."""
    entries = [info for info in archive.infolist() if not info.is_dir()]
    names = [info.filename for info in entries]
    if len(set(names)) < len(names):
        raise _Wrong("It holds two files of one name.")
    listed, paths = manifest["files"], [run["path"] for run in manifest["runs"]]
    if len(set(paths)) < len(paths):
        raise _Wrong("It lists one run twice.")
    for folder in paths:
        if not _inside(folder) or len(PurePosixPath(folder).parts) != 4 or not folder.startswith("runs/"):
            raise _Wrong(f"The run {folder!r} would not lie in a folder of runs.")
    for info in entries:
        name = info.filename
        if name == _MANIFEST:
            continue
        if not _inside(name):
            raise _Wrong(f"The file {name!r} would lie outside the results folder.")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise _Wrong(f"The file {name!r} is a link.")
        if name not in listed:
            raise _Wrong(f"The file {name!r} is not in its manifest.")
        if not any(name.startswith(folder + "/") for folder in paths):
            raise _Wrong(f"The file {name!r} belongs to none of its runs.")
        if info.file_size != listed[name]["size"]:
            said = listed[name]["size"]
            raise _Wrong(f"The file {name!r} has {info.file_size:,} bytes, by the manifest {said:,}.")
    missing = sorted(set(listed) - set(names))
    if missing:
        raise _Wrong(f"The file {missing[0]!r} of its manifest is missing.")
    total = sum(fact["size"] for fact in listed.values())
    if total > limit:
        raise _Wrong(f"It would unpack to {total / 2**30:,.1f} GB; the limit is {limit / 2**30:,.1f} GB (--limit-gb).")


def _inside(name: str) -> bool:
    """Whether a name stays in the folder it is unpacked into, on any system."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") or "\\" in part or ":" in part or "\0" in part for part in parts)


def _extract(archive: zipfile.ZipFile, name: str, fact: Mapping[str, Any], target: Path) -> None:
    """Unpack one file, never more bytes than it should have, and compare its hash."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, left = hashlib.sha256(), int(fact["size"])
    with archive.open(name) as source, target.open("wb") as out:
        while chunk := source.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                raise _Wrong(f"The file {name!r} is larger than the manifest says.")
            digest.update(chunk)
            out.write(chunk)
    if left or digest.hexdigest() != fact["sha256"]:
        raise _Wrong(f"The file {name!r} was changed: its checksum is not that of the manifest.")


def _check_run(folder: Path, entry: Mapping[str, Any], path: Path) -> None:
    """The run is finished, readable, and what its identity says."""
    try:
        run = RunDir.open(folder)
        spec = RunSpec.from_dict(run.spec)
        run.metrics(), run.samples()
        right = run.meta.get("status") == "done" and spec.dirname == entry["path"]
        right = right and spec.identity == entry["identity"] == run.meta["identity"]["hash"]
    except (DavBenchError, KeyError, TypeError) as error:
        if isinstance(error, DavBenchError) and "newer" in error.what:
            raise DavBenchError(error.what.replace(str(folder), entry["path"]), error.why, error.fix) from error
        why = " ".join(str(error).replace(str(folder), entry["path"]).split())
        raise _refusal(path, f"The run {entry['path']} cannot be read: {why}") from error
    if not right:
        raise _refusal(path, f"The run {entry['path']} is not finished, or not the one that its identity names.")


def _check_same(target: Path, files: Mapping[str, str]) -> None:
    try:
        held = read_json(target / ORIGIN)["files"]
    except (DavBenchError, KeyError):
        held = None
    if held != files:
        raise DavBenchError(
            f"{target} holds another import of this run.",
            "Its files are not those of this bundle; nothing was imported.",
            f"dav-bench results rm {target}, then import again",
        )
