"""Runs that travel: what an import puts down is what was packed, and everything else is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dav_bench.bundle import ORIGIN, bundle, unbundle
from dav_bench.cli.run import planned
from dav_bench.errors import DavBenchError
from dav_bench.migrate import migrate
from dav_bench.runner import Options, execute
from dav_bench.scan import find, scan
from dav_bench.store import RunDir


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run with tuned weights."""
    out = tmp_path_factory.mktemp("made")
    sets = ["dav.rounds=1", "dav.samples=8", "eval.samples=16"]
    (run,) = planned(
        methods=["dav"], tasks=["toy-tokens"], sets=sets, out=out, baselines=False, search=None
    )
    done = execute(run.spec, Options(out=out, threads=1))
    assert done.status == "done"
    return done


@pytest.fixture
def packed(made: RunDir, tmp_path: Path) -> Path:
    path = tmp_path / "runs.zip"
    bundle([made], path)
    return path


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(path: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    """The bundle with its files changed by `change`, and a manifest as it was unless that changes it too."""
    held = contents(path)
    change(held)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in held.items():
            archive.writestr(name, data)
    return path


def honest(held: dict[str, bytes]) -> None:
    """Make the manifest describe the files as they now are: a forger would."""
    manifest = json.loads(held["manifest.json"])
    manifest["files"] = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in held.items()
        if name != "manifest.json"
    }
    held["manifest.json"] = json.dumps(manifest).encode()


def test_a_run_arrives_as_it_left(made: RunDir, packed: Path, tmp_path: Path) -> None:
    (path,) = unbundle(packed, tmp_path / "there").added
    there = RunDir.open(path)
    assert there.spec == made.spec and there.metrics().equals(made.metrics())
    assert there.samples().equals(made.samples())
    assert all((there.load_weights()[name] == value).all() for name, value in made.load_weights().items())
    assert there.meta["host"] == "" and made.meta["host"], "where it ran is nobody's business"
    left = {p.relative_to(made.path).as_posix() for p in made.path.rglob("*") if p.is_file()}
    came = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert came - {ORIGIN} == left - {".lock"}


def test_an_imported_run_is_foreign_and_never_taken_for_ones_own(made: RunDir, packed: Path, tmp_path: Path) -> None:
    unbundle(packed, tmp_path / "there")
    (record,) = scan(tmp_path / "there")
    assert record.foreign and record.problem is None
    spec = made.spec
    runs = planned(methods=["dav"], tasks=["toy-tokens"], out=tmp_path / "there", baselines=False, search=None,
                   sets=["dav.rounds=1", "dav.samples=8", "eval.samples=16"])  # fmt: skip
    assert runs[0].spec.to_dict() == spec and runs[0].status == "new"
    assert not scan(made.path.parents[3])[0].foreign


def test_ones_own_run_comes_first_where_both_are_here(made: RunDir, packed: Path) -> None:
    root = made.path.parents[3]
    unbundle(packed, root)
    try:
        assert find(root, made.path.name).path == made.path
        assert len(scan(root)) == 2
    finally:
        shutil.rmtree(root / "foreign")


def test_the_same_runs_give_the_same_bytes_and_a_second_import_changes_nothing(
    made: RunDir, packed: Path, tmp_path: Path
) -> None:
    bundle([made], tmp_path / "again.zip")
    assert packed.read_bytes() == (tmp_path / "again.zip").read_bytes()
    first = unbundle(packed, tmp_path / "there")
    again = unbundle(tmp_path / "again.zip", tmp_path / "there")
    assert again.held == first.added and not again.added


def test_weights_stay_at_home_if_asked(made: RunDir, tmp_path: Path) -> None:
    bundle([made], tmp_path / "light.zip", weights=False)
    assert not any(name.endswith(".safetensors") for name in contents(tmp_path / "light.zip"))
    (path,) = unbundle(tmp_path / "light.zip", tmp_path / "there").added
    assert RunDir.open(path).status == "done"


def test_an_unfinished_run_is_not_packed(made: RunDir, tmp_path: Path) -> None:
    copy = tmp_path / made.path.relative_to(made.path.parents[3])
    shutil.copytree(made.path, copy)
    RunDir(copy).update(status="failed")
    with pytest.raises(DavBenchError, match="cannot go into a bundle"):
        bundle([RunDir.open(copy)], tmp_path / "no.zip")
    assert not (tmp_path / "no.zip").exists()


def escape(name: str) -> Callable[[dict[str, bytes]], None]:
    def change(held: dict[str, bytes]) -> None:
        held[name] = b"gotcha"
        honest(held)

    return change


def flip(held: dict[str, bytes]) -> None:
    name = next(n for n in held if n.endswith("samples.parquet"))
    held[name] = held[name][:-1] + bytes([held[name][-1] ^ 1])


def better(held: dict[str, bytes]) -> None:
    """Another setting under the old identity, with a manifest that agrees."""
    name = next(n for n in held if n.endswith("spec.toml"))
    held[name] = held[name].replace(b"width = 4", b"width = 5")
    honest(held)


def newer(held: dict[str, bytes]) -> None:
    held["manifest.json"] = held["manifest.json"].replace(b'"schema": 1', b'"schema": 2')


def newer_run(held: dict[str, bytes]) -> None:
    name = next(n for n in held if n.endswith("run.json"))
    held[name] = held[name].replace(b'"schema": 1', b'"schema": 2')
    honest(held)


def larger(held: dict[str, bytes]) -> None:
    held[next(n for n in held if n.endswith("events.jsonl"))] += b"0" * (1 << 20)


def lose(held: dict[str, bytes]) -> None:
    del held[next(n for n in held if n.endswith("metrics.parquet"))]


def elsewhere(held: dict[str, bytes]) -> None:
    held["manifest.json"] = held["manifest.json"].replace(b'"path": "runs/', b'"path": "../runs/')


def unfinished(held: dict[str, bytes]) -> None:
    name = next(n for n in held if n.endswith("run.json"))
    held[name] = held[name].replace(b'"status": "done"', b'"status": "failed"')
    honest(held)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (escape("../evil.txt"), "outside the results folder"),
        (escape("/etc/evil"), "outside the results folder"),
        (escape("runs/../../evil"), "outside the results folder"),
        (escape("runs\\..\\evil"), "outside the results folder"),
        (escape("C:/evil"), "outside the results folder"),
        (escape("runs/toy-tokens/other.txt"), "belongs to none of its runs"),
        (lambda held: held.update({"runs/x": b""}), "not in its manifest"),
        (flip, "checksum"),
        (better, "cannot be read"),
        (newer, "newer dav-bench"),
        (newer_run, "newer dav-bench"),
        (larger, "by the manifest"),
        (lose, "is missing"),
        (elsewhere, "would not lie in a folder of runs"),
        (unfinished, "not finished"),
        (lambda held: held.pop("manifest.json"), "holds no manifest.json"),
        (lambda held: held.update({"manifest.json": b"{"}), "no JSON"),
        (lambda held: held.update({"manifest.json": b"[]"}), "no table"),
        (lambda held: held.update({"manifest.json": b'{"schema": 1, "runs": 3}'}), "does not list"),
        (lambda held: held.update({"manifest.json": b'{"schema": "1"}'}), "no number"),
    ],
)
def test_what_is_not_right_is_refused_and_nothing_is_left(
    change: Callable[..., object], text: str, packed: Path, tmp_path: Path
) -> None:
    rewritten(packed, change)
    with pytest.raises(DavBenchError, match=text):
        unbundle(packed, tmp_path / "there")
    assert not any((tmp_path / "there").rglob("*"))
    assert not list(tmp_path.glob("evil*"))


def test_a_link_is_refused(packed: Path, tmp_path: Path) -> None:
    held = contents(packed)
    name = next(n for n in held if n.endswith("spec.toml"))
    held[name] = b"/etc/passwd"
    honest(held)
    with zipfile.ZipFile(packed, "w") as archive:
        for key, data in held.items():
            info = zipfile.ZipInfo(key)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16 if key == name else 0o644 << 16
            archive.writestr(info, data)
    with pytest.raises(DavBenchError, match="is a link"):
        unbundle(packed, tmp_path / "there")


def test_more_than_the_limit_is_refused_before_it_is_unpacked(packed: Path, tmp_path: Path) -> None:
    def grow(held: dict[str, bytes]) -> None:
        name = next(n for n in held if n.endswith("spec.toml"))
        held[name.replace("spec.toml", "zeros.bin")] = bytes(50 << 20)
        honest(held)

    rewritten(packed, grow)
    assert packed.stat().st_size < 1 << 20, "a thousandfold"
    with pytest.raises(DavBenchError, match="limit"):
        unbundle(packed, tmp_path / "there", limit=10 << 20)


def test_a_file_that_unpacks_to_more_than_it_says_stops_there(packed: Path, tmp_path: Path) -> None:
    """Archive and manifest agree on a small size; the data go on."""
    held = contents(packed)
    name = next(n for n in held if n.endswith("events.jsonl"))
    size = len(held[name])
    held[name] += b" " * size
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, data in held.items():
            archive.writestr(key, data)
        next(i for i in archive.filelist if i.filename == name).file_size = size
    with pytest.raises(DavBenchError, match="nothing was imported"):
        unbundle(packed, tmp_path / "there")


def test_what_is_no_zip_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"hello")
    for name in ("x.zip", "none.zip"):
        with pytest.raises(DavBenchError, match="no bundle"):
            unbundle(tmp_path / name, tmp_path / "there")


def test_another_import_of_the_same_run_is_not_overwritten(packed: Path, tmp_path: Path) -> None:
    (path,) = unbundle(packed, tmp_path / "there").added

    def change(held: dict[str, bytes]) -> None:
        name = next(n for n in held if n.endswith("events.jsonl"))
        held[name] += b"\n"
        honest(held)

    before = sorted((p.name, p.stat().st_mtime_ns) for p in path.rglob("*"))
    with pytest.raises(DavBenchError, match="another import"):
        unbundle(rewritten(packed, change), tmp_path / "there")
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in path.rglob("*"))


# ---- migration


def test_steps_lift_a_run_one_schema_at_a_time_and_go_on_where_they_stopped(made: RunDir, tmp_path: Path) -> None:
    copy = tmp_path / "runs" / "a" / "b" / "c"
    shutil.copytree(made.path, copy)
    taken = []
    steps = {1: lambda path: taken.append(1), 2: lambda path: taken.append(2)}
    assert migrate(RunDir(copy), {1: steps[1]}, to=2) == 1
    assert migrate(RunDir(copy), steps, to=3) == 1 and taken == [1, 2]
    assert RunDir(copy).meta["schema"] == 3
    assert migrate(RunDir(copy), steps, to=3) == 0
    with pytest.raises(DavBenchError, match="cannot bring up"):
        migrate(RunDir(copy), steps, to=5)
