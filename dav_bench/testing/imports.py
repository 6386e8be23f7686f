"""What importing a plugin costs, measured in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys

LIMIT = 0.5
"""Seconds that importing a plugin may take on an idle machine."""

HEAVY = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "open_clip",
    "jax",
    "tensorflow",
    "polars",
    "scipy",
)
"""Libraries that no plugin may import when it is listed."""

STANDARD = ("asyncio", "email.message", "http.client", "logging.config", "unittest", "xml.etree.ElementTree")
"""A fixed lot of modules, whose import says how fast this machine is at the moment."""

IDLE = 0.12
"""Seconds that importing STANDARD takes on an idle core of 2020 or later."""

TRIES = 5

_PROBE = """
import importlib, json, sys, time
import dav_bench.hookspecs
before, start = set(sys.modules), time.perf_counter()
for name in sys.argv[1].split(","):
    importlib.import_module(name)
seconds = time.perf_counter() - start
print("\\n" + json.dumps([seconds, sorted(m for m in set(sys.modules) - before if "." not in m)]))
"""


def cost(*modules: str) -> tuple[float, list[str]]:
    """Seconds that a fresh interpreter took to import these, the plugin API being there, and what came with them."""
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, ",".join(modules)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    seconds, names = json.loads(done.stdout.splitlines()[-1])
    return float(seconds), list(names)


def measure(module: str) -> tuple[float, float, list[str]]:
    """(seconds, limit, heavy libraries) of importing a plugin's module.

    The least of a few fresh interpreters counts, since other work on the machine can only add to it; and where a
    baseline interpreter, which imports a fixed lot of the standard library, is slower than on an idle core as well,
    the limit is stretched by as much.
    """
    seconds, limit = float("inf"), LIMIT
    heavy: list[str] = []
    for _ in range(TRIES):
        took, names = cost(module)
        heavy = [name for name in names if name in HEAVY]
        seconds = min(seconds, took)
        if seconds <= limit:
            return seconds, limit, heavy
        limit = max(limit, LIMIT * cost(*STANDARD)[0] / IDLE)
    return seconds, limit, heavy
