"""Writes the report: pages from templates, one script for all charts, pictures of runs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dav_bench
from dav_bench.errors import DavBenchError
from dav_bench.files import write_text
from dav_bench.plugins import catalog
from dav_bench.report import charts, formats
from dav_bench.report.site import gather, motifs, views

if TYPE_CHECKING:
    from dav_bench.report.rows import Row
    from dav_bench.report.site.gather import Material

HERE = Path(__file__).resolve().parent
MANIFEST = "report.json"
"""What a report consists of, and from which boards it was made."""
SAMPLES = 24
"""Samples on the page of a row."""
STRIP = {"image": 8, "mer": 12, "sequence": 2}
"""Samples of a row on the page of its task."""
PICTURE = 256
"""Pixels of the longer side of a picture; larger ones are reduced."""


@dataclass(frozen=True)
class Built:
    """What was written."""

    index: Path
    """Where to begin."""
    files: Mapping[str, int]
    """Bytes by path below the folder."""
    removed: tuple[str, ...]
    """Files of an earlier report that are gone."""
    seconds: float
    """How long it took."""


def stamp(materials: Sequence[Material]) -> str:
    """A hash of every number of the boards: a report with another one is stale."""
    parts = (
        formats.table_csv(m.board) + json.dumps(m.board.terms.reference, sort_keys=True) for m in materials
    )
    return views.digest(part.encode() for part in parts)


def is_current(out: Path, materials: Sequence[Material]) -> bool:
    """Whether a report shows the numbers of these boards."""
    try:
        return bool(json.loads((out / MANIFEST).read_text())["boards"] == stamp(materials))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def build_site(
    materials: Sequence[Material], out: Path, origin: str = "published boards and local runs"
) -> Built:
    """Write a report into a folder; what an earlier report left there and this one has not goes.

    Args:
        materials: Tasks, as `gather` reads them.
        out: Folder; made if absent, otherwise empty or an earlier report.
        origin: What the footer says the pages were made from.

    Raises:
        DavBenchError: the folder holds something else.
    """
    began = time.perf_counter()
    before = _before(out)
    out.mkdir(parents=True, exist_ok=True)
    _write_manifest(out, "", materials, before)  # a report that stops half-way is still known as one
    site = _Site(materials, out, origin)
    site.write()
    gone = sorted(set(before) - set(site.files))
    for name in gone:
        (out / name).unlink(missing_ok=True)
    _write_manifest(out, stamp(materials), materials, sorted(site.files))
    return Built(out / "index.html", site.files, tuple(gone), time.perf_counter() - began)


def _write_manifest(out: Path, boards: str, materials: Sequence[Material], files: Sequence[str]) -> None:
    held = {"schema": 1, "boards": boards, "tasks": [m.name for m in materials], "files": list(files)}
    write_text(out / MANIFEST, json.dumps(held, indent=1) + "\n")


def _before(out: Path) -> list[str]:
    if not out.exists() or not any(out.iterdir()):
        return []
    try:
        return [
            str(name) for name in json.loads((out / MANIFEST).read_text())["files"] if ".." not in str(name)
        ]
    except (OSError, ValueError, KeyError, TypeError):
        raise DavBenchError(
            f"{out} is not empty and holds no report.",
            "Its files would be mixed with the pages.",
            "--out report",
        ) from None


class _Site:
    """Pages of one report."""

    def __init__(self, materials: Sequence[Material], out: Path, origin: str) -> None:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        self.materials, self.out, self.files = materials, out, {}  # type: Sequence[Material], Path, dict[str, int]
        self.env = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
            undefined=StrictUndefined,
        )  # fmt: skip
        tasks = [{"name": m.name, "folder": views.task_folder(m.name)} for m in materials]
        self.env.filters |= {"coded": coded, "whole": whole}
        self.env.globals |= {"version": dav_bench.__version__, "tasks": tasks, "origin": origin, "here": ""}

    def write(self) -> None:
        for asset in sorted((HERE / "assets").iterdir()):
            self.put(f"assets/{asset.name}", asset.read_text())
        drawn = False
        cards = []
        for material in self.materials:
            found = views.tables(material)
            drawn |= any(t.charts for t in found)
            self.task(material, found)
            cards.append(self.card(material, found))
        held = {f for c in cards for f in c["families"]}
        rose = [f for f in views.FAMILIES if f in held]
        self.page("index.html", "index.html", root="", cards=cards, families=rose)
        if drawn:
            self.put("assets/vega.js", vega_script(self.out / "assets/vega.js"))

    def put(self, name: str, text: str) -> None:
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        self.files[name] = len(text.encode())

    def page(self, template: str, path: str, /, **values: Any) -> None:
        self.put(path, self.env.get_template(template).render(**values))

    def card(self, material: Material, found: Sequence[views.Table]) -> dict[str, Any]:
        board, task = material.board, material.task
        runs = {row.identity: row for s in board.sections for rows in s.runs.values() for row in rows}
        across, up = charts.axes(board)
        return {
            "name": material.name,
            "folder": views.task_folder(material.name),
            "title": board.terms.title or material.name,
            "summary": task.summary if task else "",
            "rows": len({line.href for t in found for line in t.lines}),
            "runs": len(runs),
            "local": sum(row.source != "published" for row in runs.values()),
            "unfinished": len(material.unfinished),
            "podium": views.podium(board, found),
            "sketch": views.sketch(board),
            "up": up.title if up else "",
            "across": across.title if across else "",
            "families": views.families(found),
        }

    def task(self, material: Material, found: Sequence[views.Table]) -> None:
        board, folder = material.board, views.task_folder(material.name)
        pages = views.row_pages(material)
        galleries = []
        for name, page, rows in pages:
            held = self.samples(material, rows, f"{folder}/img/{name.removesuffix('.html')}")
            self.row(material, f"{folder}/{name}", page, held)
            if held:
                kind = "image" if held[0]["image"] else "mer" if held[0]["length"] <= 24 else "sequence"
                galleries.append({"label": page.line["label"], "href": name, "family": page.family,
                                  "samples": held[: STRIP[kind]]})  # fmt: skip
        roles = [(role, title) for role, title in views.ROLE_TITLES.items()
                 if any(role == g[0] for t in found for g in t.groups)]  # fmt: skip
        commands = list(dict.fromkeys(line for s in board.sections for line in s.frame["command"].to_list()))
        self.page(
            "task.html", f"{folder}/index.html", root="../", here=material.name, name=material.name,
            title=board.terms.title or material.name, summary=material.task.summary if material.task else "",
            tables=found, families=views.families(found), roles=roles, galleries=galleries,
            motifs=_motif_file(material) is not None, choices=views.choices(board),
            columns=views.as_json(views.choices(board)), protocol=formats.protocol(board), notes=formats.notes(board),
            commands=commands, published=views.published(board), overdone_note=getattr(formats, "OVERDONE_NOTE", ""),
            unfinished=[(f"{r.label}/{r.name}", r.status, r.problem or "") for r in material.unfinished],
        )  # fmt: skip

    def row(
        self, material: Material, name: str, page: views.RowPage, held: Sequence[Mapping[str, Any]]
    ) -> None:
        entry = catalog().find("methods", page.line["method"].partition("+")[0])
        self.page(
            "row.html", name, root="../", here=material.name, name=material.name, page=page, samples=held,
            meter=[(phase, *counts) for phase, counts in page.meter],
            summary=entry.summary.capitalize() + "." if entry and entry.summary else "",
            paper=entry.paper if entry else "", motifs=bool(held) and _motif_file(material) is not None,
        )  # fmt: skip

    def samples(self, material: Material, rows: Sequence[Row], stem: str) -> list[dict[str, Any]]:
        found = []
        path = _motif_file(material)
        for i, line in enumerate(gather.texts(rows, material.local(rows), SAMPLES)):
            scores = " · ".join(
                f"{title} {formats.number(line[key])}"
                for key, title in (("reward.heldout", "held-out"), ("reward.train", "train"))
                if line.get(key) is not None
            )
            picture = self.picture(line, f"{stem}-{i:02d}") if line.get("file") else None
            text = line.get("sequence") or ""
            if picture or text:
                shown = _marked(text, path) if text and not picture else {"pieces": [], "factors": []}
                found.append({"image": picture, "prompt": line.get("prompt") or "", "scores": scores,
                              "length": len(text), **shown})  # fmt: skip
        return found

    def picture(self, line: Mapping[str, Any], stem: str) -> dict[str, Any] | None:
        from PIL import Image, UnidentifiedImageError

        source = line["run"].path / line["file"]
        name = f"{stem}.webp"
        path = self.out / name
        try:
            with Image.open(source) as image:
                shown = image.convert("RGB")
        except (OSError, UnidentifiedImageError):
            return None
        shown.thumbnail((PICTURE, PICTURE))
        path.parent.mkdir(parents=True, exist_ok=True)
        shown.save(path, quality=88)
        self.files[name] = path.stat().st_size
        prompt = line.get("prompt") or ""
        alt = f"Sample for the prompt “{prompt}”" if prompt else "Sample"
        return {"src": f"img/{path.name}", "width": shown.width, "height": shown.height, "alt": alt}


def coded(text: str) -> Any:
    """Escaped text in which what stood between backticks is code."""
    from markupsafe import Markup, escape

    parts = str(text).split("`")
    if len(parts) % 2 == 0:  # an odd backtick means itself
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts)
    )


def whole(text: str) -> Any:
    """Escaped text whose words with a hyphen stay on one line."""
    from markupsafe import Markup, escape

    words = (
        Markup('<span class="nobreak">{}</span>').format(w) if "-" in w else escape(w) for w in text.split()
    )
    return Markup(" ").join(words)


def _motif_file(material: Material) -> Path | None:
    if material.task is None:
        return None
    path = material.task.folder / "motifs.json"
    return path if path.exists() else None


def _marked(text: str, path: Path | None) -> dict[str, Any]:
    """A sequence cut into pieces with the motifs that match them, and which factors do."""
    found = motifs.hits(text, path) if path else []
    pieces = []
    for part, here in motifs.pieces(text, found):
        groups = {h.group for h in here}
        kind = "both" if len(groups) > 1 else next(iter(groups), "")
        pieces.append(
            {"text": part, "kind": kind, "title": ", ".join(f"{h.name} ({h.strand})" for h in here)}
        )
    named: dict[tuple[str, str], int] = {}
    for h in found:
        named[h.name, h.group] = named.get((h.name, h.group), 0) + 1
    order = sorted(named.items(), key=lambda item: (item[0][1] != "liver", -item[1], item[0][0]))
    return {"pieces": pieces, "factors": [{"name": n, "group": g, "n": k} for (n, g), k in order]}


def vega_script(known: Path | None = None) -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines `vegaEmbed`.

    Args:
        known: A script made earlier, which is taken over if it has the same versions: bundling takes seconds.
    """
    import vl_convert as vl

    versions = (vl.get_vega_version(), vl.get_vegalite_versions()[-1], vl.get_vega_embed_version())
    notice = (
        f"/* Vega {versions[0]}, Vega-Lite {versions[1]}, Vega-Embed {versions[2]} and what they use; their licences "
        "lie beside this file in vega-licences.txt. */\n"
    )
    if known is not None and known.exists() and (text := known.read_text()).startswith(notice):
        return text
    return f"{notice}(() => {{\n{vl.javascript_bundle('window.vegaEmbed = vegaEmbed;')}\n}})();\n"
