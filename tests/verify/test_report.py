"""The page and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dav_bench.cli import app
from dav_bench.errors import DavBenchError, ExitCode
from dav_bench.verify import Allowance, Expectation, Result, expectations
from dav_bench.verify.defects import defects
from dav_bench.verify.report import allowance, markdown, settings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "verification.md"
ROW = Expectation(
    "dav", "toy-tokens", "tilt", {"width": 4, "lr": 0.1}, (Allowance(0.01, "few|ness"),), {"k": 2}
)
GOOD = Result(ROW, 0.01, -0.002, 0.004, 1.2, 0.5, 1.5, 2.0)


def call(*args: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["verify", *args])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.stdout


def test_a_result_passes_up_to_the_interval_and_the_allowance() -> None:
    assert ROW.says == "reaches tilt 2" and GOOD.limit == pytest.approx(0.004 + 0.01 * 1.2) and GOOD.passed
    assert not Result(ROW, 0.02, -0.002, 0.004, 1.2, 0.5, 1.5, 2.0).passed
    assert Result(ROW, -0.5, -0.002, 0.004, 1.2, 0.5, 1.5, 2.0).passed


def test_a_page_holds_every_row_and_defect() -> None:
    nan = float("nan")
    failed = Result(ROW, nan, nan, nan, nan, nan, nan, 0.0, "no such thing")
    text = markdown([GOOD, failed], [(defects()[0], False, GOOD)])
    assert "1 of 2 expectations hold; 0 of 1 planted defects are seen." in text
    assert "| 0.0100 | -0.0020 to 0.0040 | 0.01 (few\\|ness) | 1.200 | 0.500 | as expected |" in text
    assert "could not run: no such thing" in text and "NOT SEEN" in text


def test_the_committed_page_is_of_the_present_table_and_all_holds() -> None:
    text = PAGE.read_text(encoding="utf-8")
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    for row in expectations():
        wanted = [row.world, settings(row), row.says, str(row.n)]
        mine = [line for line in lines if [line[0].removeprefix("| "), *line[1:4]] == wanted]
        assert mine and mine[0][6] == allowance(row) and mine[0][9] == "as expected", wanted
    for defect in defects():
        assert f"| {defect.name} | " in text
    rows, planted = len(expectations()), len(defects())
    assert f"{rows} of {rows} expectations hold; {planted} of {planted} planted defects are seen." in text


def test_the_command_runs_what_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = call("--method", "guidance", "--world", "toy-tokens", "--jobs", "1", "--json")
    rows = json.loads(out)
    assert code == ExitCode.OK and len(rows) == 2
    assert all(r["passed"] and r["method"] == "guidance" and r["distance"] is not None for r in rows)
    code, out = call("--method", "pretrained", "--world", "toy-tokens", "--jobs", "1")
    assert code == ExitCode.OK and "prior unchanged" in out


def test_a_failure_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    import dav_bench.verify as package

    monkeypatch.setattr(
        package, "expectations", lambda: [Expectation("pretrained", "toy-tokens", "target", n=500)]
    )
    code, out = call("--jobs", "1")
    assert code == ExitCode.RUN_FAILED and "NOT as expected" in " ".join(out.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "dva"], "did you mean 'dav'"),
        (["--method", "real"], "nothing is written down"),
        (["--world", "toy-token"], "did you mean 'toy-tokens'"),
        (["--method", "draft", "--world", "toy-ring"], "no expectation together"),
        (["--write", "--method", "dav"], "the whole of"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input_is_one_clear_error(args: list[str], message: str) -> None:
    with pytest.raises(DavBenchError, match=message):
        call(*args)


def test_a_page_is_written_in_a_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DavBenchError, match="no folder docs"):
        call("--write")
