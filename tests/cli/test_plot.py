"""`dav-bench plot samples`: files it writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dav_bench.cli.plot import app
from dav_bench.errors import DavBenchError
from dav_bench.report.pictures import save_grid
from dav_bench.spec import RunSpec
from dav_bench.store import RunDir

PROMPTS = ["tiger", "owl"] * 2 + ["bee", "bee"]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with four measured pictures and two more."""
    spec = RunSpec("t2i", 1, "0" * 16, "dav")
    with RunDir.create(tmp_path / "results", spec) as made:
        made.write_samples({"index": range(4), "prompt": PROMPTS[:4]})
        x = torch.rand(2, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        (made.path / "artifacts").mkdir()
        save_grid(made.path / "artifacts", x[0], x[1], PROMPTS)
        made.update(status="done")
    return made


def plot(run: RunDir, *args: Any) -> str:
    done = CliRunner().invoke(app, ["samples", str(run.path), *map(str, args)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_it_makes_the_grid_of_the_run_again(run: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "again.png"
    assert "wrote 6 pictures of 3 prompts" in plot(run, "--out", out)
    kept = run.path / "artifacts" / "grid.png"
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(Image.open(kept)))


def test_prompts_are_chosen_by_name_or_as_those_that_are_measured(run: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "some.webp"
    assert "wrote 4 pictures of 2 prompts" in plot(run, "--out", out, "--prompts", "eval")
    with Image.open(out) as image:
        assert image.format == "WEBP"
    assert "wrote 2 pictures of 1 prompts" in plot(run, "--out", out, "--prompts", "bee", "--size", 32)
    with pytest.raises(DavBenchError, match="no pictures of 'cat'"):
        plot(run, "--out", out, "--prompts", "cat")


def test_a_bad_place_is_refused_before_anything_is_read(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(DavBenchError, match=r"'grid.txt' has no form"):
        plot(run, "--out", "grid.txt")
    with pytest.raises(DavBenchError, match="does not exist"):
        plot(run, "--out", tmp_path / "no" / "grid.png")


def test_a_run_without_pictures_says_so(run: RunDir, tmp_path: Path) -> None:
    for path in (run.path / "artifacts" / "grid").iterdir():
        path.unlink()
    with pytest.raises(DavBenchError, match="has no pictures to show"):
        plot(run, "--out", tmp_path / "a.png")
