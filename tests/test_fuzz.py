"""Readers meet run directories that a crash, a bad disk or a text editor left behind: they name them and go on."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from dav_bench.cli.results import _facts, _line, gather
from dav_bench.cli.run import planned
from dav_bench.errors import DavBenchError
from dav_bench.runner import Options, execute
from dav_bench.scan import runs_frame, scan
from dav_bench.store import RunDir

ROUNDS = 120


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    out = tmp_path_factory.mktemp("made")
    sets = ["dav.rounds=1", "dav.samples=8", "eval.samples=16"]
    (run,) = planned(
        methods=["dav"], tasks=["toy-tokens"], sets=sets, out=out, baselines=False, search=None
    )
    return execute(run.spec, Options(out=out, threads=1))


WORDS = (b"null", b"[]", b"{}", b'"x"', b"-1", b"1e999", b"NaN", b"true", b"\xff\xfe", b"\x00", b"", b"done")


DAMAGE = ("cut", "flip", "word", "line", "empty", "gone", "folder", "swap", "twice")


def mutate(folder: Path, rng: random.Random) -> str:
    """Damages one file of a run; says how."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    path, how = rng.choice(files), rng.choice(DAMAGE)
    data = path.read_bytes()
    place = rng.randrange(len(data)) if data else 0
    if how == "cut":
        path.write_bytes(data[:place])
    elif how == "flip":
        path.write_bytes(data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :])
    elif how == "word":  # a value that is legal and wrong
        lines = data.split(b": ")
        k = rng.randrange(len(lines))
        lines[k] = rng.choice(WORDS) + (b"," if k else b"")
        path.write_bytes(b": ".join(lines))
    elif how == "line":
        lines = data.splitlines(keepends=True)
        del lines[rng.randrange(len(lines)) if lines else 0 :][:1]
        path.write_bytes(b"".join(lines))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "gone":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "swap":
        path.write_bytes(rng.choice(files).read_bytes())
    else:
        path.write_bytes(data + data)
    return f"{path.name} {how}"


@pytest.mark.filterwarnings("default")  # what a damaged file makes numpy say is no failure
def test_a_damaged_run_never_stops_a_reader(made: RunDir, tmp_path: Path) -> None:
    """One damaged run beside a whole one: both are listed, the whole one is on the board, nothing else is raised."""
    rng, ends = random.Random(0), Counter()
    whole = tmp_path / "results" / made.path.relative_to(made.path.parents[3])
    shutil.copytree(made.path, whole)
    other = whole.with_name("0" * 8 + "-s0")
    for _ in range(ROUNDS):
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(made.path, other)
        said = [mutate(other, rng) for _ in range(rng.choice((1, 1, 1, 3)))]
        records = scan(tmp_path / "results")
        assert [r.path for r in records] == [other, whole], said
        assert records[1].problem is None
        for record in records:
            assert all(isinstance(cell, str | int) for cell in _line(record)), said
        assert runs_frame(records).height == 2
        board = gather("toy-tokens", tmp_path / "none.parquet", tmp_path / "results", None)
        assert any(len(s.frame) for s in board.sections), said
        try:
            _facts(RunDir.open(other))
            ends["shown"] += 1
        except DavBenchError as error:
            assert "0" * 8 in str(error), f"{said}: {error} does not say which run"
            ends["named"] += 1
    assert ends["named"] > ROUNDS / 5 and ends["shown"] > ROUNDS / 5, ends
