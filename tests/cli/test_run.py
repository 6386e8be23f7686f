"""`dav-bench run` on a toy, in this process."""

import json
from pathlib import Path

import pytest

from dav_bench.cli.run import go, planned, planned_from_spec
from dav_bench.errors import DavBenchError, ExitCode
from dav_bench.runner import Options

FAST = ["dav.rounds=2", "dav.samples=8", "eval.samples=16"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(methods=("dav",), sets=FAST, fresh=False, json=False, **options):
    runs = planned(methods=methods, tasks=["toy-tokens"], sets=list(sets), fresh=fresh, **options)
    return runs, go(runs, Options(device="cpu", threads=1, fresh=fresh), json)


def test_a_run_ends_with_a_table_and_the_next_reuses_it(capsys):
    runs, code = run()
    shown = capsys.readouterr()
    assert code == ExitCode.OK and [r.spec.label for r in runs] == ["exact", "pretrained", "dav", "dav+tree"]
    for name in ("pretrained", "dav+tree", "training cost", "results: results/runs/toy-tokens"):
        assert name in shown.out, name
    assert "round 2/2" in shown.err
    stamps = [(r.path / "run.json").stat().st_mtime_ns for r in runs]
    again, code = run()
    assert code == ExitCode.OK and {r.status for r in again} == {"cached"}
    assert capsys.readouterr().err.count("reused") == 4
    assert [(r.path / "run.json").stat().st_mtime_ns for r in again] == stamps
    assert {r.status for r in run(fresh=True)[0]} == {"new"}
    assert [(r.path / "run.json").stat().st_mtime_ns for r in again] != stamps


def test_json_says_where_the_numbers_are(capsys):
    run(["pretrained"], ["eval.samples=16"], json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [r["label"] for r in rows] == ["exact", "pretrained"]
    assert all(r["status"] == "done" and Path(r["path"]).is_dir() for r in rows)


def test_a_spec_file_reruns_a_run(tmp_path):
    ((first, *_), _) = run(["pretrained"], ["eval.samples=16"])
    again = planned_from_spec(first.path / "spec.toml", tmp_path / "elsewhere", fresh=False)
    assert again.spec == first.spec and again.status == "new"
    assert go([again], Options(out=tmp_path / "elsewhere", device="cpu", threads=1)) == 0
    text = (first.path / "spec.toml").read_text().replace(first.spec.task_hash, "0" * 16)
    (tmp_path / "old.toml").write_text(text)
    with pytest.raises(DavBenchError, match="has changed since"):
        planned_from_spec(tmp_path / "old.toml", tmp_path, fresh=False)


def test_a_reward_that_raises_is_a_recorded_failure(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def fn(sequences):\n    raise ValueError('no such gene')\n")
    runs, code = run(sets=[*FAST, "dav.guide=false"], reward="./bad.py:fn", baselines=False, search=None)
    assert code == ExitCode.RUN_FAILED
    assert json.loads((runs[0].path / "run.json").read_text())["status"] == "failed"
    assert "no such gene" in capsys.readouterr().err


def test_ctrl_c_leaves_a_resumable_run(tmp_path, capsys):
    (tmp_path / "stop.py").write_text(
        "from pathlib import Path\n"
        "def fn(sequences):\n"
        "    seen = Path('calls')\n"
        "    seen.write_text((seen.read_text() if seen.exists() else '') + '.')\n"
        "    if Path('armed').exists() and len(seen.read_text()) > 8: raise KeyboardInterrupt\n"
        "    return [float(s.count('G')) for s in sequences]\n"
    )
    (tmp_path / "armed").touch()
    options = {"reward": "./stop.py:fn", "baselines": False, "search": None}
    sets = [*FAST, "dav.guide=false", "dav.rounds=6"]
    assert run(sets=sets, **options)[1] == ExitCode.INTERRUPTED
    assert "goes on from here" in capsys.readouterr().err
    (tmp_path / "armed").unlink()
    runs, code = run(sets=sets, **options)
    assert runs[0].status == "resumable" and code == ExitCode.OK
