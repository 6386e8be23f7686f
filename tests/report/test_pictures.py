"""Pictures of a run: exact pixels, what a grid shows where, and what is said of missing ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dav_bench.errors import DavBenchError
from dav_bench.report.pictures import grid, load_grid, save, save_grid, save_images, to_pil

SIDE = 8


def plain(values: list[float]) -> Tensor:
    """Pictures of one grey each."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, SIDE, SIDE)


def greys(image: Image.Image) -> list[list[int]]:
    """Runs of pictures in each line of the grid that holds some: their greys from left to right."""
    array = np.asarray(image.convert("L")).astype(int)
    lines = []
    for top in range(0, array.shape[0] - SIDE + 1):
        row, found, x = array[top : top + SIDE], [], 0
        while x + SIDE <= array.shape[1]:
            block = row[:, x : x + SIDE]
            if block.min() == block.max() < 250 and (
                top == 0 or (array[top - 1, x : x + SIDE] != block[0]).any()
            ):
                found.append(int(block[0, 0]))
                x += SIDE
            else:
                x += 1
        if found:
            lines.append(found)
    return lines


def test_pixels_are_rounded_and_clamped() -> None:
    image = torch.tensor([0.0, 1.0, 0.5, -3.0, 7.0, 100.4 / 255]).expand(3, 1, 6)
    assert np.asarray(to_pil(image))[0, :, 0].tolist() == [0, 255, 128, 0, 255, 100]
    colours = torch.zeros(3, 2, 3)
    colours[1, 1, 2] = 1  # green, in the last corner
    assert np.asarray(to_pil(colours))[1, 2].tolist() == [0, 255, 0]


def test_a_picture_carries_its_prompt(tmp_path: Path) -> None:
    save(tmp_path / "a.png", plain([0.5])[0], "a tïger")
    with Image.open(tmp_path / "a.png") as image:
        assert (image.info["prompt"], image.size, image.mode) == ("a tïger", (SIDE, SIDE), "RGB")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]  # no temporary file is left


def test_images_are_numbered_and_named_from_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "artifacts" / "images"
    files = save_images(folder, plain([0.0, 1.0]), ["cat", "dog"])
    assert files == ["artifacts/images/00000.png", "artifacts/images/00001.png"]
    assert [Image.open(tmp_path / name).getpixel((3, 3)) for name in files] == [(0, 0, 0), (255, 255, 255)]
    assert len(save_images(tmp_path / "other", plain([0.0]))) == 1  # without prompts


def test_a_row_for_each_prompt_with_the_pretrained_left() -> None:
    before, after = (plain([(base + k) / 255 for k in range(4)]) for base in (10, 110))
    image = grid(before, after, ["cat", "dog", "cat", "dog"])
    # both prompts have two pictures, so they share a panel and one line of blocks
    assert greys(image) == [[10, 12, 110, 112, 11, 13, 111, 113]]
    assert greys(grid(None, after, ["cat", "dog", "cat", "dog"])) == [[110, 112, 111, 113]]
    assert greys(grid(None, after, [""] * 4)) == [[110, 111, 112, 113]]


def test_many_prompts_are_wrapped_and_those_with_more_pictures_apart() -> None:
    n = 40
    names = ["tiger"] * 8 + [f"p{k}" for k in range(n)]
    after = plain([(k + 1) / 255 for k in range(8 + n)])
    lines = greys(grid(None, after, names))
    assert lines[0] == list(range(1, 9))
    assert [grey for line in lines[1:] for grey in line] == list(range(9, 9 + n))
    assert 1 < len(lines) - 1 < n


def test_pictures_are_scaled_to_one_size() -> None:
    large = torch.zeros(1, 3, 512, 512)
    assert grid(None, large, ["cat"]).width < 400
    assert grid(None, large, ["cat"], size=16).width < grid(None, large, ["cat"]).width
    with pytest.raises(ValueError, match="1 pictures of 2 prompts"):
        grid(None, large, ["cat", "dog"])


def test_a_grid_is_made_again_from_its_pictures(tmp_path: Path) -> None:
    before, after, prompts = plain([0.1, 0.2, 0.3]), plain([0.6, 0.7, 0.8]), ["cat", "dog", "cat"]
    save_grid(tmp_path, before, after, prompts)
    again = load_grid(tmp_path)
    assert again[2] == prompts
    made = np.asarray(Image.open(tmp_path / "grid.png"))
    assert np.array_equal(made, np.asarray(grid(*again)))
    assert np.array_equal(made, np.asarray(grid(before, after, prompts)))
    chosen = load_grid(tmp_path, ["dog"])
    assert chosen[2] == ["dog"] and chosen[1][0].getpixel((0, 0)) == (178, 178, 178)
    alone = tmp_path / "alone"
    alone.mkdir()
    save_grid(alone, None, after, prompts)
    assert load_grid(alone)[0] is None


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    artifacts = tmp_path / "ab12-s0" / "artifacts"
    with pytest.raises(DavBenchError, match="run ab12-s0 has no pictures"):
        load_grid(artifacts)
    artifacts.mkdir(parents=True)
    save_grid(artifacts, None, plain([0.5]), ["tiger"])
    with pytest.raises(DavBenchError, match="no pictures of 'tigr'; did you mean 'tiger'"):
        load_grid(artifacts, ["tigr"])
    (artifacts / "grid" / "00000-after.png").write_bytes(b"no picture")
    with pytest.raises(DavBenchError, match=r"00000-after.png cannot be read"):
        load_grid(artifacts)
