"""Commands in README and docs work as printed: runs are planned, and what only reads is done."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dav_bench.cli import app
from dav_bench.errors import DavBenchError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "results" / "README.md",
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if "plugins" not in p.relative_to(ROOT).as_posix()),
]
"""Pages of plugins have a test of their own, which installs what they show."""

TRIED = ("run", "list", "show", "compare", "leaderboard")
"""What is planned, and what only reads."""

OTHERS = re.compile(r"\b(ID|RUN|METHOD|TASK|NAME|FOLDER)\b|1a2b3c4d|--publish|codon-usage|\[")
"""What needs a run, a name of the reader's own, or would write."""


def printed() -> list[str]:
    """Every command line with `dav-bench`, once: comments cut, continued lines joined."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            command = re.split(r"\s+#\s", line.strip())[0]
            if re.match(rf"dav-bench ({'|'.join(TRIED)}) ", command) and not OTHERS.search(command):
                found.append(" ".join(command.split()))
    return sorted(set(found))


def test_there_are_commands():
    assert len(printed()) > 40


@pytest.mark.parametrize("command", printed())
def test_the_command_works_as_printed(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    for name in ("gc.py", "my.py"):
        (tmp_path / name).write_text("def score(sequences):\n    return [0.0 for _ in sequences]\n")
    words = shlex.split(command)[1:]
    if words[0] == "run" and "--dry-run" not in words:
        words.append("--dry-run")
    try:
        app(words, prog_name="dav-bench", standalone_mode=False)
    except SystemExit as end:
        assert not end.code, command
    except DavBenchError as error:
        pytest.fail(f"{command}\n{error}")
