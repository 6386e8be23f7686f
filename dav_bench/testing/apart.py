"""A plugin checked in a child process, so that what it breaks is not the program that reports it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .checklist import Check

SECONDS = 600.0
"""Time limit."""

MEMORY_GB = 32.0
"""Limit of the address space; torch reserves much more of it than it uses."""


def examine_apart(
    name: str,
    seconds: float = SECONDS,
    memory_gb: float = MEMORY_GB,
    program: Sequence[str] = ("-m", "dav_bench.testing"),
) -> list[Check]:
    """The checks of one plugin; a crash, a hang or a limit is one more of them, after those that were made."""
    with tempfile.TemporaryDirectory(prefix="dav-bench-check-") as folder:
        report, log = Path(folder) / "report.jsonl", Path(folder) / "log.txt"
        report.touch()

        def limits() -> None:
            size = int(memory_gb * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
        with log.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, *program, name, str(report)], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=env, start_new_session=True, preexec_fn=limits,
            )  # fmt: skip
            ended = ""
            try:
                code = child.wait(seconds)
                if code:
                    ended = (
                        f"killed by {signal.Signals(-code).name}"
                        if code < 0
                        else f"ended with exit code {code}"
                    )
            except subprocess.TimeoutExpired:
                ended = f"took more than {seconds:.0f} s"
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)  # it leads a group of its own
                    child.wait()
        lines = [
            json.loads(line) for line in report.read_text(encoding="utf-8").splitlines() if line.endswith("}")
        ]
        checks = [Check(**line) for line in lines if "finished" not in line]
        if len(checks) == len(lines):
            last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
            after = f" after {checks[-1].name!r}" if checks else ""
            why = f"the check {ended or 'ended early'}{after}" + (f": {last}" if last else "")
            fix = "run `python -m pytest` on its tests: dav_bench.testing.check_plugin shows where"
            checks.append(Check("it survives being checked", "failed", why, fix))
        return checks
