"""The report as files: complete, self-contained, safe, and made from the boards alone."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report.conftest import TERMS, make_row
from sites import SEQUENCE, small_results

from dav_bench.errors import DavBenchError
from dav_bench.plugins import catalog
from dav_bench.report import charts, formats
from dav_bench.report.families import FAMILIES, family_of
from dav_bench.report.published import load_published, save
from dav_bench.report.site import build_site, is_current, motifs
from dav_bench.report.site.gather import gather
from dav_bench.tasks import find_task

ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    """What a page refers to, and which of its elements have names."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids, self.unnamed, self.text = [], [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        held = dict(attrs)
        self.ids.add(held.get("id"))
        if tag == "a":
            self.links.append(held["href"])
        elif held.get("src") or (tag == "link" and held.get("href")):
            self.loads.append(held.get("src") or held["href"])
        if tag in ("figure", "svg") and held.get("class") == "chart" and not held.get("aria-labelledby"):
            self.unnamed.append(held)
        if tag == "img" and not held.get("alt"):
            self.unnamed.append(held)

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A report of a board with two budgets, a failing gate, hostile names, and local runs."""
    folder = tmp_path_factory.mktemp("site")
    materials = gather(small_results(folder / "results"))
    built = build_site(materials, folder / "report")
    return folder / "report", built, materials


def pages(root):
    return {p.relative_to(root).as_posix(): Page(p.read_text()) for p in root.rglob("*.html")}


def test_every_link_leads_to_a_file_and_nothing_is_fetched(site):
    root, _, _ = site
    found = pages(root)
    for name, page in found.items():
        for target in page.links + page.loads:
            if target.startswith("data:"):
                continue
            assert not re.match(r"[a-z]+:|//", target), f"{name} asks for {target}"
            path, _, anchor = target.partition("#")
            there = (root / name).parent / path if path else root / name
            assert there.exists(), f"{name} leads to {target}"
            if anchor:
                assert anchor in found[there.resolve().relative_to(root.resolve()).as_posix()].ids, (
                    f"{name}: {target}"
                )


def test_the_style_sheet_and_own_script_fetch_nothing(site):
    for name in ("report.css", "report.js"):
        text = (site[0] / "assets" / name).read_text()
        assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest", text)


def test_every_number_of_the_board_is_on_its_page(site):
    root, _, (material,) = site
    text = "".join(pages(root)["toy/index.html"].text)
    for section in material.board.sections:
        for line in section.frame.iter_rows(named=True):
            assert line["label"] in text and line["command"] in text
            for column in material.board.columns:
                for part in formats.cell(line, column).split(" ± "):
                    assert part in text
        assert all(remark.partition("`")[0] in text for remark in formats.remarks(section))
    assert all(note.partition("`")[0] in text for note in formats.notes(material.board))


def test_each_row_has_a_page_with_its_command_settings_cost_and_identity(site):
    root, _, (material,) = site
    runs = {row.identity: row for s in material.board.sections for rows in s.runs.values() for row in rows}
    rows = "".join(p.read_text() for p in (root / "toy").glob("*.html") if p.name != "index.html")
    for row in runs.values():
        assert row.identity in rows
    dav = next(p for p in (root / "toy").glob("dav-*.html") if "local" not in p.name and "--" not in p.name)
    text = " ".join("".join(Page(dav.read_text()).text).split())
    assert "dav-bench run --method dav --task toy --seeds 0-2" in text
    assert "width" in text and "search" in text
    assert "reward backward" in text and "Intel" in text


def test_names_and_texts_cannot_break_out(site):
    root, _, _ = site
    for path in root.rglob("*.html"):
        text = path.read_text()
        assert "<img src=x" not in text and "<script>alert" not in text
        assert text.count("</script>") == len(re.findall(r"<script\b", text))


def test_charts_and_pictures_have_names(site):
    for page in pages(site[0]).values():
        assert not page.unnamed
    spec = charts.pareto_chart(site[2][0].board).to_dict()
    assert "rows of toy" in spec["description"]


def test_rows_that_fail_a_gate_are_on_no_front(site):
    board = site[2][0].board
    below = {p["row"] for p in charts.points(board, board.main) if "below" in p}
    assert below == {"dav", "dav (local)", "dav+tree"}
    text = json.dumps(charts.pareto_chart(board).to_dict())
    assert "!datum.below" in text


def test_samples_show_the_first_ones(site):
    root, _, _ = site
    text = next(p for p in (root / "toy").glob("dav-*-local.html")).read_text()
    assert text.count("Sequence of") == 8
    assert SEQUENCE[:30] in "".join(Page(text).text)


def test_pictures_are_copied_small_and_described(site):
    root, built, _ = site
    assert "toy/img" in "".join(built.files)
    text = next(p for p in (root / "toy").glob("grpo-*-local.html")).read_text()
    assert text.count("<img") == 2 and "a tiger" in text and 'width="256"' in text


def test_runs_without_a_row_are_named(site):
    text = "".join(pages(site[0])["toy/index.html"].text)
    assert "Runs without a row" in text and "failed" in text


def test_the_same_boards_give_the_same_bytes(site, tmp_path):
    root, built, materials = site
    again = build_site(materials, tmp_path / "again")
    assert set(again.files) == set(built.files)
    for name in built.files:
        if not name.endswith(("vega.js", ".webp")):
            assert (tmp_path / "again" / name).read_bytes() == (root / name).read_bytes(), name


def test_a_report_knows_when_its_numbers_changed(site, tmp_path):
    root, _, materials = site
    assert is_current(root, materials)
    other = gather(small_results(tmp_path / "results", shift=1 / 64))
    assert not is_current(root, other)
    assert not is_current(tmp_path, materials)


def test_pages_of_rows_that_are_gone_go(site, tmp_path):
    _, _, materials = site
    build_site(materials, tmp_path)
    fewer = gather(small_results(tmp_path.parent / "fewer"), published=True)
    built = build_site(fewer, tmp_path)
    assert any("-local" in name for name in built.removed)
    assert not list((tmp_path / "toy").glob("*-local.html"))


def test_a_folder_with_other_files_is_left_alone(site, tmp_path):
    (tmp_path / "thesis.tex").write_text("five years")
    with pytest.raises(DavBenchError, match="holds no report"):
        build_site(site[2], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_asking_for_what_is_not_there_says_what_to_run(tmp_path):
    with pytest.raises(DavBenchError, match="nothing to report in"):
        gather(tmp_path)
    with pytest.raises(DavBenchError, match="did you mean 'toy'"):
        gather(small_results(tmp_path), ["toi"])


def test_motifs_hit_where_the_metric_counts_them():
    torch = pytest.importorskip("torch")
    from dav_bench.builtin.metrics.sequence import motif_hits

    path = find_task("dna").folder / "motifs.json"
    ids = torch.randint(0, 4, (40, 200), generator=torch.Generator().manual_seed(0))
    names = [m["name"] for m in json.loads(path.read_text())["motifs"]]
    counted = motif_hits(ids, path)
    assert counted.sum() > 20
    for row, counts in zip(ids, counted, strict=True):
        text = "".join("ACGT"[i] for i in row)
        found = motifs.hits(text, path)
        assert [sum(h.name == n for h in found) for n in names] == counts.tolist()
        assert "".join(part for part, _ in motifs.pieces(text, found)) == text


def test_every_builtin_method_has_a_family_and_every_hue_is_readable():
    named = {m for f in FAMILIES for m in f.methods}
    builtin = {e.name for e in catalog().all("methods") if e.origin == "builtin" or "/" not in e.name}
    assert {m for m in builtin if catalog().get("methods", m).origin.startswith("builtin")} <= named
    for family in FAMILIES:
        for ground in ("#ffffff", "#15181d", "#1b1f25"):
            assert contrast(family.colour, ground) >= 3, (family.name, ground)
    assert family_of("dav+tree").name == "distil"


def contrast(a, b):
    """Contrast ratio of WCAG 2."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_a_scale_bends_only_for_values_far_from_the_rest():
    assert charts.bend([1.0, 2.0, 3.0]) > 1e6 - 1
    assert charts.bend([0.1, 0.2, 0.3, 110.0]) == 0.25
    assert charts.bend([]) > 0


def test_densities_have_an_area_of_one():
    import numpy as np

    x = np.random.default_rng(0).normal(2, 3, 4000)
    grid = np.linspace(-15, 19, 400)
    assert np.trapezoid(charts.density(x, grid), grid) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("ending", ["svg", "png", "json", "html"])
def test_charts_are_saved_as_files(site, tmp_path, ending):
    path = tmp_path / f"front.{ending}"
    charts.save(charts.pareto_chart(site[2][0].board), path)
    head = path.read_bytes()[:200]
    assert {"svg": b"<svg", "png": b"PNG", "json": b"{", "html": b"<!DOCTYPE html>"}[ending] in head


def test_the_command_writes_and_checks_without_torch(tmp_path):
    small_results(tmp_path / "results")
    code = (
        "import sys\n"
        "sys.argv[:1] = 'dav-bench report --task toy --results results --out pages'.split()\n"
        "from dav_bench.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules, 'torch was imported'"
    )

    def call(*args):
        return subprocess.run([sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "COLUMNS": "80"})  # fmt: skip

    assert call("--check").returncode == 2  # there is none yet
    written = call()
    assert written.returncode == 0, written.stderr
    assert "index.html" in written.stdout and "MB" in written.stdout
    assert call("--check").returncode == 0
    assert call("--check", "--published").returncode == 1  # without the local runs the numbers are others


def test_the_committed_report_shows_the_committed_boards():
    out = ROOT / "docs" / "boards"
    if not out.exists():
        pytest.skip("docs/boards is not in this checkout")
    materials = gather(ROOT / "results", published=True)
    assert is_current(out, materials), "write it again: dav-bench report --published --out docs/boards"
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert size < 5e6


def test_texts_and_environment_survive_publication(tmp_path):
    row = replace(make_row("dav"), texts={"sequence": (SEQUENCE, "ACGT")}, env={"python": "3.12"})
    save([row, make_row("real")], TERMS, tmp_path / "toy.parquet")
    (again, plain), _ = load_published(tmp_path / "toy.parquet")
    assert (again.texts, again.env) == (row.texts, row.env)
    assert (plain.texts, plain.env) == ({}, {})
