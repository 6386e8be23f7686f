"""Pictures of a run: PNG files that carry their prompt, and a grid of pretrained beside aligned pictures.

    artifacts/images/00000.png           the evaluation samples
    artifacts/grid/00000-before.png      what the grid shows: pretrained and aligned, drawn from the same noise
    artifacts/grid/00000-after.png
    artifacts/grid.png                   the grid, which `dav-bench plot samples RUN` makes again from those files

A grid has a row for each prompt, the pretrained pictures left and the aligned ones right.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dav_bench.errors import DavBenchError, ExitCode, near
from dav_bench.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    Pictures: TypeAlias = Tensor | Sequence[Image]
    """(n, 3, H, W) in [0, 1], or PIL images."""

SIDES = ("pretrained", "aligned")
"""What the two halves of a grid are called."""

_LARGEST = 160  # pixels of a picture in a grid; larger ones are scaled down
_WIDTH = 16  # pictures side by side before rows of few pictures begin a new line
_GAP, _LABEL = 8, 18  # pixels between blocks, and of a line of text


def to_pil(image: Tensor) -> Image:
    """A (3, H, W) picture in [0, 1] as PIL; values are clamped and rounded to 8 bits."""
    from PIL import Image

    array = (image.detach().cpu().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())


def save(path: Path, image: Tensor | Image, prompt: str = "") -> None:
    """Write a PNG, whole or not at all; its text field `prompt` says what it should show."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if prompt:
        info.add_itxt("prompt", prompt)
    with replacing(path) as temporary:
        _pil(image).save(temporary, format="PNG", pnginfo=info)


def save_images(folder: Path, images: Pictures, prompts: Sequence[str] | None = None) -> list[str]:
    """Write `00000.png`, `00001.png`, ... and return their paths as seen from the run directory."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{k:05d}.png" for k in range(len(images))]
    for k, name in enumerate(names):
        save(folder / name, images[k], prompts[k] if prompts else "")
    return [f"{folder.parent.name}/{folder.name}/{name}" for name in names]


def save_grid(artifacts: Path, before: Pictures | None, after: Pictures, prompts: Sequence[str]) -> None:
    """Write the pictures of the grid one by one, and the grid.

    Args:
        artifacts: folder `artifacts` of the run.
        before: of the pretrained model, from the same noise as `after`; None where nothing was aligned.
        after: n pictures of the run.
        prompts: n prompts.
    """
    folder = artifacts / "grid"
    folder.mkdir(parents=True, exist_ok=True)
    for side, images in (("before", before), ("after", after)):
        for k, prompt in enumerate(prompts if images is not None else ()):
            save(folder / f"{k:05d}-{side}.png", images[k], prompt)  # type: ignore[index]
    save(artifacts / "grid.png", grid(before, after, prompts))


def load_grid(artifacts: Path, only: Sequence[str] = ()) -> tuple[list[Image] | None, list[Image], list[str]]:
    """What `save_grid` wrote, as (before, after, prompts); of the prompts `only`, where some are named.

    Raises:
        DavBenchError: the run holds no such pictures, or none of a prompt that is named.
    """
    paths = sorted((artifacts / "grid").glob("*-after.png"))
    if not paths:
        raise DavBenchError(
            f"run {artifacts.parent.name} has no pictures to show.",
            f"Looked for PNG files in {artifacts / 'grid'}: only finished runs of image tasks have them.",
            "dav-bench results ls",
            code=ExitCode.MISSING,
        )
    after = [_read(p) for p in paths]
    prompts = [str(image.info.get("prompt", "")) for image in after]
    for name in only:
        if name not in prompts:
            raise DavBenchError(
                f"run {artifacts.parent.name} has no pictures of {name!r}{near(name, prompts)}.",
                f"It has them of: {', '.join(dict.fromkeys(prompts))}.",
                "one of these, or `dav-bench sample` to draw others",
            )
    beside = [p.with_name(p.name.replace("-after", "-before")) for p in paths]
    before = [_read(p) for p in beside] if all(p.exists() for p in beside) else None
    kept = [k for name in only for k, p in enumerate(prompts) if p == name] or list(range(len(prompts)))
    return before and [before[k] for k in kept], [after[k] for k in kept], [prompts[k] for k in kept]


def grid(
    before: Pictures | None, after: Pictures, prompts: Sequence[str], size: int | None = None,
    sides: tuple[str, str] = SIDES,
) -> Image:  # fmt: skip
    """One row for each prompt, the pretrained pictures left and the aligned ones right.

    Rows follow the order in which prompts appear.  Neighbours with as many pictures share a panel, whose rows are
    wrapped: few pictures for each of many prompts do not make a tall, thin image.

    Args:
        before: n pictures, or None for one side only.
        after: n pictures.
        prompts: n prompts.
        size: pixels of one picture; None is its own width, at most 160.
        sides: what stands above the two halves.
    """
    from PIL import Image

    if len({len(after), len(prompts), len(after if before is None else before)}) > 1 or not len(after):
        raise ValueError(
            f"{len(after)} pictures of {len(prompts)} prompts, and as many before them, expected"
        )
    size = size or min(_pil(after[0]).width, _LARGEST)
    halves: list[tuple[str, Pictures]] = [("", after)]
    if before is not None:
        halves = [(sides[0], before), (sides[1], after)]
    rows: dict[str, list[int]] = {}
    for k, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(k)
    alike = [[*names] for _, names in groupby(rows, key=lambda name: len(rows[name]))]
    room = size * max(_WIDTH, len(halves) * max(len(places) for places in rows.values()))
    panels = [_panel(halves, {name: rows[name] for name in names}, size, room) for names in alike]
    canvas = Image.new("RGB", (max(p.width for p in panels), sum(p.height for p in panels)), "white")
    top = 0
    for panel in panels:
        canvas.paste(panel, (0, top))
        top += panel.height
    return canvas


def _panel(halves: Sequence[tuple[str, Pictures]], rows: dict[str, list[int]], size: int, room: int) -> Image:
    """Rows of equally many pictures, as many blocks of them side by side as pictures fit into `room` pixels."""
    from PIL import Image

    half = size * len(next(iter(rows.values()))) + _GAP
    block = len(halves) * half + _GAP
    across = min(len(rows), max(1, room // (block - (len(halves) + 1) * _GAP)))
    head = _LABEL if halves[0][0] else 0
    down = -(-len(rows) // across)
    canvas = Image.new("RGB", (across * block, head + down * (_LABEL + size) + _GAP), "white")
    for r, (name, places) in enumerate(rows.items()):
        left, top = _GAP + r % across * block, head + r // across * (_LABEL + size)
        _write(canvas, (left, top), name, "black", half - _GAP)
        for title, images in halves:
            if top == head:
                _write(canvas, (left, 0), title, "grey", half - _GAP)
            for j, k in enumerate(places):
                canvas.paste(_pil(images[k]).resize((size, size)), (left + j * size, top + _LABEL))
            left += half
    return canvas


def _write(canvas: Image, at: tuple[int, int], text: str, colour: str, room: int) -> None:
    """A line of text, cut with an ellipsis where it is wider than its pictures."""
    from PIL import ImageDraw, ImageFont

    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    if pen.textlength(text, font) > room:
        while text and pen.textlength(text + "…", font) > room:
            text = text[:-1]
        text += "…"
    pen.text((at[0], at[1] + 1), text, colour, font)


def _read(path: Path) -> Image:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except OSError as error:
        raise DavBenchError(f"{path} cannot be read.", str(error), "repeat its run with --fresh") from error


def _pil(image: Any) -> Image:
    from PIL import Image

    return image.convert("RGB") if isinstance(image, Image.Image) else to_pil(image)
