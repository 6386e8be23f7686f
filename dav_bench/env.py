"""Where a run happens: versions, git state, hardware and plugins, gathered without importing torch."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "dav-bench",
    "torch",
    "numpy",
    "polars",
    "safetensors",
    "scipy",
    "rapidfuzz",
    "diffusers",
    "transformers",
    "peft",
    "typer",
    "pluggy",
)
"""Packages whose version can change a number or an error message."""


def environment() -> dict[str, Any]:
    """What `env.json` holds; no host name, no user, no path."""
    from dav_bench.plugins import plugins

    loaded = plugins()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "git": git_state(),
        "hardware": hardware(),
        "cuda": cuda(),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "plugins": {p.name: p.dist for p in loaded.loaded if p.dist},
        "broken_plugins": {p.name: p.reason for p in loaded.broken},
    }


def packages() -> dict[str, str]:
    """Installed versions of the packages that matter."""
    out = {}
    for name in PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def git_state() -> dict[str, str]:
    """Commit of the checkout this package runs from, and a hash of what differs from it; empty when installed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {}
    sha = _git(root, "rev-parse", "HEAD")
    diff = _git(root, "diff", "HEAD", "--", "dav_bench", "tasks")
    return {"sha": sha, "diff": hashlib.sha256(diff.encode()).hexdigest()[:12] if diff else ""} if sha else {}


def _git(root: Path, *args: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args],
            capture_output=True,
            timeout=10,
            check=True,
            text=True,
            errors="replace",
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


@cache
def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, and memory in GB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    out: dict[str, Any] = {"cpu": _cpu_name(), "cores": cores}
    with suppress(ValueError, OSError, AttributeError):
        out["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return out


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cuda() -> dict[str, Any]:
    """GPUs as torch sees them; `torch` is asked only where it is already imported."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    out: dict[str, Any] = {"built": torch.version.cuda or ""}
    if torch.cuda.is_available():
        out["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        out["cudnn"] = torch.backends.cudnn.version()
    return out


def report() -> str:
    """The environment as text to paste into a bug report."""
    env = environment()
    lines = [f"python      {env['python']} on {env['platform']}"]
    lines += [f"hardware    {', '.join(f'{k} {v}' for k, v in env['hardware'].items())}"]
    if env["cuda"]:
        lines.append(f"cuda        {', '.join(f'{k} {v}' for k, v in env['cuda'].items())}")
    if env["git"]:
        lines.append(f"git         {env['git']['sha'][:12]}{' with changes' if env['git']['diff'] else ''}")
    lines += [f"{name:<11} {ver}" for name, ver in env["packages"].items()]
    lines += [f"plugin      {name} ({dist})" for name, dist in env["plugins"].items()]
    lines += [f"broken      {name}: {why}" for name, why in env["broken_plugins"].items()]
    return "\n".join(lines)
