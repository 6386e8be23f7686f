"""The plugins printed in docs/plugins/ work as they stand: installed, listed, and run by the commands beside them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).resolve().parents[2] / "docs" / "plugins").glob("*.md"))
KINDS = {"models", "rewards", "searchers", "trainers", "methods", "metrics", "tasks", "trackers", "commands"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def test_each_kind_of_plugin_has_a_page():
    assert {page.stem for page in PAGES} == KINDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_works_as_printed(page, install, tmp_path):
    text = page.read_text(encoding="utf-8")
    (module,) = blocks(text, "python")
    site = install("printed", {"printed": module}, "printed = printed")
    if page.stem == "tasks":
        folder = site / "tasks" / "few-letters"
        folder.mkdir(parents=True)
        (folder / "task.toml").write_text(blocks(text, "toml")[0])
    commands = [line for block in blocks(text, "sh") for line in block.splitlines()]
    assert commands or page.stem == "metrics"
    for command in ["dav-bench --strict-plugins plugins list", *commands]:
        name, *args = shlex.split(command)
        assert name == "dav-bench"
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "dav_bench", *args],
            cwd=work,
            capture_output=True,
            text=True,
            env=os.environ,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    if page.stem == "trackers":
        (told,) = work.glob("results/runs/toy-tokens/dav/*/rounds.jsonl")
        assert len(told.read_text().splitlines()) == 3


def test_the_metric_measures(install):
    page = next(p for p in PAGES if p.stem == "metrics")
    install(
        "printed", {"printed": blocks(page.read_text(encoding="utf-8"), "python")[0]}, "printed = printed"
    )
    import torch

    from dav_bench.builtin.metrics.base import Samples
    from dav_bench.plugins import catalog

    x = torch.nn.functional.one_hot(torch.tensor([[0, 1], [0, 1], [2, 3]]), 4).float()
    assert catalog().get("metrics", "distinct").load()(Samples(x), None) == pytest.approx(2 / 3)


def test_the_reward_of_images_reads_the_prompt(install):
    page = next(p for p in PAGES if p.stem == "rewards")
    install(
        "printed", {"printed": blocks(page.read_text(encoding="utf-8"), "python")[0]}, "printed = printed"
    )
    import torch

    from dav_bench.plugins import catalog

    reward = catalog().get("rewards", "named-colour").build()
    reward.encode(["red apple", "tiger"])
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert reward(red, torch.tensor([0, 1])).tolist() == pytest.approx([2 / 3, -1 / 3])
