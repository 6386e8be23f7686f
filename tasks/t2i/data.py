"""Captioned emoji by four artists, and how pictures of 64 x 64 pixels are made from them.

    python tasks/t2i/data.py CACHE

Fetches the four npm packages with `npm pack` into CACHE and packs all drawings into CACHE/drawings.npz.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
SIZE = 64
ANIMALS = 39
"""The first things of things.txt: the "simple animals" of DDPO that the data have by name (all but squirrel)."""

ARTISTS = ("noto", "twemoji", "fluent-3d", "fluent-flat")
PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "blue": (140, 195, 245),
    "green": (165, 215, 150),
    "yellow": (250, 225, 120),
    "pink": (250, 180, 200),
    "grey": (110, 115, 125),
}
SCALES = {"small": 0.6, "": 0.84, "big": 1.0}
"""Side of the drawing as a share of the picture, by the word that a caption may use for it."""
FLAGS = ("Flags", "Component")


@dataclass(frozen=True)
class Drawings:
    """All drawings: one row per thing, the things of things.txt first and in its order."""

    rgba: Tensor
    """(N, 4, 4, 64, 64) uint8: thing, artist, channel; alpha 0 everywhere where the artist lacks the thing."""
    captions: list[list[str]]
    """Captions of each thing, the shortest name first."""
    things: int
    """How many of them things.txt names."""

    @property
    def there(self) -> Tensor:
        """(N, 4) bool: has the artist drawn the thing?"""
        return self.rgba[:, :, 3].ne(0).flatten(2).any(2)


def things() -> list[tuple[str, list[str]]]:
    """Short name and captions of each thing of things.txt."""
    text = (HERE / "things.txt").read_text()
    lines = [line.split("=") for line in text.splitlines() if line[:1] not in ("", "#")]
    return [(name.strip(), [word.strip() for word in words.split(",")]) for name, words in lines]


def fetch(cache: Path) -> dict[str, Path]:
    """The four packages in `cache`, fetched with npm where they are missing."""
    cache.mkdir(parents=True, exist_ok=True)
    found = {}
    for artist, package in PACKAGES.items():
        name, _, version = package.lstrip("@").replace("/", "-").rpartition("@")
        found[artist] = cache / f"{name}-{version}.tgz"
        if not found[artist].exists():
            subprocess.run(["npm", "pack", "--silent", package], cwd=cache, check=True)
    return found


def fitted(data: bytes) -> np.ndarray[Any, Any] | None:
    """A picture cropped to what is drawn and fitted into 64 x 64 RGBA pixels."""
    from PIL import Image

    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    ratio = SIZE / max(picture.size)
    size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
    if size != picture.size:
        picture = picture.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    out = np.zeros((SIZE, SIZE, 4), np.uint8)
    top, left = (SIZE - size[1]) // 2, (SIZE - size[0]) // 2
    out[top : top + size[1], left : left + size[0]] = np.asarray(picture)
    return out


def pack(cache: Path) -> Path:
    """Read all drawings from the packages into one file."""
    import resvg_py

    wanted = ("img/google/64/", "img/twitter/64/", "assets/", "emoji.json", "chars.json", "icons.json")
    files: dict[str, dict[str, bytes]] = {artist: {} for artist in ARTISTS}
    for artist, archive in fetch(cache).items():
        with tarfile.open(archive) as packed:  # in its order, for a seek in a compressed file reads it again
            for member in packed:
                name = member.name.removeprefix("package/")
                if name.startswith(wanted) and member.isfile():
                    files[artist][name] = packed.extractfile(member).read()  # type: ignore[union-attr]

    emoji = [e for e in json.loads(files["noto"]["emoji.json"]) if e["category"] not in FLAGS]
    by_name = {e["short_name"]: e for e in emoji}
    chosen = [(by_name[name], words) for name, words in things()]
    taken = {word for _, words in chosen for word in words} | {e["short_name"] for e, _ in chosen}
    for e in emoji:
        # the full name and the short one, but none that a chosen thing has (tiger2 is called "tiger" too)
        names = [e["short_name"], (e["name"] or "").lower()]
        words = [n.replace("_", " ").replace("-", " ").strip() for n in names]
        words = sorted({w for w in words if 2 < len(w) < 32}, key=len)
        if words and not any(w in taken or w.rstrip("2") in taken for w in words):
            chosen.append((e, words))
            taken.update(words)
    codes = json.loads(files["fluent-flat"]["chars.json"])
    icons = json.loads(files["fluent-flat"]["icons.json"])
    side, parts = icons.get("width", 32), icons["icons"]

    def find(artist: str, e: dict[str, Any]) -> bytes | None:
        code = e["unified"].lower()
        spellings = [code, code.replace("-fe0f", ""), (e.get("non_qualified") or code).lower()]
        for name in spellings:
            match artist:
                case "noto":
                    data = files[artist].get(f"img/google/64/{name}.png")
                case "twemoji":
                    data = files[artist].get(f"img/twitter/64/{name}.png")
                case "fluent-3d":
                    data = files[artist].get(f"assets/{name}.webp")
                case _:
                    icon = parts.get(codes.get(name, ""))
                    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {0}">{1}</svg>'
                    body = icon and svg.format(side, icon["body"])
                    data = body and bytes(resvg_py.svg_to_bytes(svg_string=body, width=256, height=256))
            if data:
                return data
        return None

    rgba = np.zeros((len(chosen), 4, SIZE, SIZE, 4), np.uint8)
    for i, (e, _) in enumerate(chosen):
        for a, artist in enumerate(ARTISTS):
            data = find(artist, e)
            drawn = fitted(data) if data else None
            if drawn is not None:
                rgba[i, a] = drawn
    path = cache / "drawings.npz"
    captions = json.dumps([words for _, words in chosen])
    np.savez(path, rgba=rgba.transpose(0, 1, 4, 2, 3), captions=captions, things=len(things()))
    return path


def load(cache: Path) -> Drawings:
    """The drawings packed in `cache`, which are fetched and packed first where they are missing."""
    path = cache / "drawings.npz"
    with np.load(path if path.exists() else pack(cache)) as data:
        return Drawings(
            torch.from_numpy(data["rgba"]), json.loads(str(data["captions"])), int(data["things"])
        )


def rotate_hue(rgb: Tensor, angle: Tensor) -> Tensor:
    """Colours (B, 3, H, W) turned about the grey axis by `angle` (B,) radians."""
    c, s = angle.cos(), angle.sin() / math.sqrt(3)
    a, b, d = (1 + 2 * c) / 3, (1 - c) / 3 - s, (1 - c) / 3 + s
    turn = torch.stack([a, b, d, d, a, b, b, d, a], 1).view(-1, 3, 3)
    return torch.einsum("bij,bjhw->bihw", turn, rgb)


def compose(
    rgba: Tensor, background: Tensor, scale: Tensor, shift: Tensor, mirror: Tensor,
    hue: Tensor | None = None, turn: Tensor | None = None, aspect: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Pictures (B, 3, 64, 64) in [0, 1] from drawings.

    Args:
        rgba: drawings (B, 4, 64, 64) uint8.
        background: colours (B, 3) in [0, 1].
        scale: side of the drawing as a share of the picture, (B,).
        shift: of its centre, in pixels, (B, 2).
        mirror: (B,) bool.
        hue: angle of the drawing's colours in radians, (B,).
        turn: rotation in radians, (B,).
        aspect: width over height, (B,).
    """
    x = rgba.float() / 255
    rgb, alpha = x[:, :3], x[:, 3:]
    if hue is not None:
        rgb = rotate_hue(rgb, hue).clamp(0, 1)
    wide = scale * (aspect.sqrt() if aspect is not None else 1)
    high = scale / (aspect.sqrt() if aspect is not None else 1)
    t = turn if turn is not None else torch.zeros_like(scale)
    sign = torch.where(mirror, -1.0, 1.0)
    zero = -2 * shift / SIZE
    rows = torch.stack([sign * t.cos() / wide, sign * t.sin() / wide, -t.sin() / high, t.cos() / high], 1)
    rows = rows.view(-1, 2, 2)
    theta = torch.cat([rows, torch.einsum("bij,bj->bi", rows, zero)[:, :, None]], 2)
    grid = F.affine_grid(theta, [len(x), 4, SIZE, SIZE], align_corners=False)
    placed = F.grid_sample(torch.cat([rgb * alpha, alpha], 1), grid, align_corners=False)
    return (placed[:, :3] + (1 - placed[:, 3:]) * background[:, :, None, None]).clamp(0, 1)


@dataclass(frozen=True)
class Looks:
    """How pictures of things are drawn, one entry per picture."""

    thing: Tensor
    artist: Tensor
    background: Tensor
    """Index into `BACKGROUNDS`."""
    scale: Tensor
    """Index into `SCALES`."""


def draw_looks(thing: Tensor, artist: Tensor, generator: torch.Generator | None = None) -> Looks:
    """Random background and size for each (thing, artist), as the generator is to draw them."""
    n = len(thing)
    background = torch.randint(0, len(BACKGROUNDS), (n,), generator=generator)
    scale = torch.tensor([0.12, 0.76, 0.12]).multinomial(n, replacement=True, generator=generator)
    return Looks(thing, artist, background, scale)


def picture(drawings: Drawings, looks: Looks, generator: torch.Generator | None = None) -> Tensor:
    """Pictures (B, 3, 64, 64) in [0, 1] with the given looks, a random mirror, hue and a little play of position."""
    n = len(looks.thing)
    uniform = lambda *shape: torch.rand(*shape, generator=generator) * 2 - 1  # noqa: E731
    scale = torch.tensor(list(SCALES.values()))[looks.scale] * (1 + 0.03 * uniform(n))
    play = torch.tensor([6.0, 2.0, 0.0])[looks.scale]
    hue = uniform(n) * math.radians(10) * (torch.rand(n, generator=generator) < 0.3)
    return compose(
        drawings.rgba[looks.thing, looks.artist],
        torch.tensor(list(BACKGROUNDS.values()))[looks.background] / 255,
        scale,
        play[:, None] * uniform(n, 2),
        torch.rand(n, generator=generator) < 0.5,
        hue,
    )


def caption(name: str, size: str, background: str, names_size: bool, names_background: bool) -> str:
    """The caption of a picture, which names its size and background or leaves them open."""
    before = f"{size} " if names_size and size else ""
    return before + name + (f" on a {background} background" if names_background else "")


def captions_of(drawings: Drawings, looks: Looks, open_share: float = 0.75) -> list[str]:
    """A random caption for each picture: three in four leave size and background open."""
    n, sizes, colours = len(looks.thing), list(SCALES), list(BACKGROUNDS)
    said: Sequence[list[bool]] = (torch.rand(n, 2) > open_share**0.5).tolist()
    first = (torch.rand(n) < 0.8).tolist()
    pick = torch.rand(n).tolist()
    rows = zip(
        looks.thing.tolist(), looks.scale.tolist(), looks.background.tolist(), said, first, pick, strict=True
    )
    out = []
    for thing, scale, background, (size_said, colour_said), plain, u in rows:
        names = drawings.captions[thing]
        name = names[0] if plain else names[int(u * len(names))]
        out.append(caption(name, sizes[scale], colours[background], size_said, colour_said))
    return out


def sheet(pictures: Tensor, columns: int, path: Path, zoom: int = 1) -> None:
    """Write pictures (N, 3, H, W) in [0, 1] as one sheet."""
    from torchvision.utils import make_grid, save_image

    grid = make_grid(pictures, columns, padding=1, pad_value=1.0)
    save_image(F.interpolate(grid[None], scale_factor=zoom, mode="nearest")[0], path)


def main() -> None:
    """Fetch, pack and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    drawings = load(parser.parse_args().cache)
    have = drawings.there
    print(f"{len(have)} things, {drawings.things} of them in things.txt")
    for a, artist in enumerate(ARTISTS):
        print(
            f"{artist}: {int(have[:, a].sum())} in all, {int(have[: drawings.things, a].sum())} of things.txt"
        )


if __name__ == "__main__":
    main()
