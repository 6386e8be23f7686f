"""The report in a real browser: charts render, tables sort and filter, nothing is asked of the network.

Needs a Chromium: Debian's, Chrome, or the one that DAV_BENCH_CHROMIUM names.
"""

from __future__ import annotations

import os
import shutil
import warnings

import pytest
from sites import HOSTILE, small_results

from dav_bench.report.site import build_site
from dav_bench.report.site.gather import gather

PATIENCE = 120_000
"""Milliseconds: a loaded machine draws slowly."""
SETTLED = "networkidle"
"""Pictures load when they come into sight; a page that is left before then reports them as failed."""


MOVED = "([m, b]) => [...document.querySelectorAll(m)].map(p => p.getAttribute('transform')).join() !== b"


def browser_path():
    named = os.environ.get("DAV_BENCH_CHROMIUM")
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    return named or next(filter(None, found), None)


@pytest.fixture(scope="module")
def chromium():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        api = pytest.importorskip(
            "playwright.sync_api", reason="NOT CHECKED in a browser: pip install playwright"
        )
    path = browser_path()
    if path is None:
        pytest.skip(
            "NOT CHECKED in a browser: no Chromium; apt-get install chromium, or DAV_BENCH_CHROMIUM=path"
        )
    with api.sync_playwright() as play:
        made = play.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"], timeout=PATIENCE
        )
        yield made
        made.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    build_site(gather(small_results(folder / "results")), folder / "report")
    return folder / "report"


@pytest.fixture
def visit(chromium, site):
    """`visit(page, width, scheme)` opens a page and, at the end, fails for errors and requests."""
    wrong, contexts = [], []

    def go(name="toy/index.html", width=1280, scheme="light"):
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else wrong.append(r.url))
        page.on("requestfailed", lambda r: wrong.append(f"failed: {r.url}"))
        page.on("dialog", lambda d: wrong.append(f"dialog: {d.message}"))
        page.goto((site / name).as_uri(), wait_until=SETTLED)
        if page.query_selector("figure.chart"):
            page.wait_for_selector("html[data-charts=drawn]")
        return page

    yield go
    for context in contexts:
        context.close()
    assert not wrong


def labels(page, table=0):
    return page.eval_on_selector_all(
        "table.board",
        "(tables, i) => [...tables[i].tBodies[0].rows].filter(r => !r.hidden)"
        ".map(r => r.cells[0].querySelector('a').textContent)",
        table,
    )


def test_all_charts_render_marks_and_carry_names(visit):
    page = visit()
    charts = page.query_selector_all("figure.chart")
    assert len(charts) >= 5
    for chart in charts:
        svg = chart.query_selector("svg")
        assert svg.get_attribute("aria-label") or svg.query_selector("[aria-label]")
        marks = chart.eval_on_selector_all(
            "svg .role-mark path, svg .role-mark line",
            "m => m.filter(p => p.getBoundingClientRect().width + p.getBoundingClientRect().height > 2).length",
        )
        assert marks >= 2, chart.get_attribute("data-chart")
        plot, drawn = chart.query_selector(".plot").bounding_box(), svg.bounding_box()
        assert abs(plot["width"] - drawn["width"]) < 3 and abs(plot["height"] - drawn["height"]) < 3


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["index.html", "toy/index.html"])
def test_no_page_is_wider_than_the_screen(visit, name, width):
    page = visit(name, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for link in page.eval_on_selector_all(
        "main a[href$='.html']", "links => [...new Set(links.map(l => l.href))].slice(0, 4)"
    ):
        page.goto(link, wait_until=SETTLED)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, link


def test_the_header_sorts_by_keyboard_and_back(visit):
    page = visit()
    before = labels(page)
    button = page.locator("table.board").first.locator("thead button", has_text="train reward")
    button.focus()
    values = "rows => rows.map(r => Number(r.querySelector('td[data-role]').dataset.v))"
    rows = "table.board:first-of-type >> nth=0 >> tbody tr"
    page.keyboard.press("Enter")
    assert button.locator("xpath=..").get_attribute("aria-sort") == "descending"
    held = page.locator("table.board").first.locator("tbody tr").evaluate_all(values)
    assert held == sorted(held, reverse=True) and len(set(held)) > 3, rows
    page.keyboard.press("Space")
    assert button.locator("xpath=..").get_attribute("aria-sort") == "ascending"
    held = page.locator("table.board").first.locator("tbody tr").evaluate_all(values)
    assert held == sorted(held)
    page.keyboard.press("Enter")
    assert labels(page) == before and button.locator("xpath=..").get_attribute("aria-sort") is None


def test_what_was_not_measured_stands_last_and_ranks_begin_with_the_best(visit):
    page = visit()
    table = page.locator("table.board").nth(1)
    for word in ("rank", "version", "kmer-corr"):
        table.locator("thead button", has_text=word).click()
        column = table.locator("tbody tr").evaluate_all(
            "(rows, word) => { const t = rows[0].closest('table'); const b = [...t.querySelectorAll('thead button')]"
            ".find(b => b.textContent.includes(word)); return rows.map(r => r.cells[column(b)].textContent.trim()) }",
            word,
        )
        if word == "rank":
            ranks = [int(c.split("–")[0]) for c in column if c != "–"]
            assert (
                ranks and ranks == sorted(ranks) and column[: len(ranks)] == [c for c in column if c != "–"]
            )
        if word == "version":
            assert set(column) == {"0.1.0"}
        if word == "kmer-corr":
            held = [float(c.split(" ")[0]) for c in column]
            assert held == sorted(held, reverse=True)


def test_words_and_families_filter_rows_and_marks(visit):
    page = visit()
    page.fill("input[type=search]", "dav tree")
    assert set(labels(page)) == {"dav+tree"}
    assert "rows shown" in page.text_content("[role=status]")
    page.fill("input[type=search]", "")
    everything = labels(page)
    count = "document.querySelectorAll('figure[data-chart=pareto] .mark-symbol.role-mark path').length"
    before = page.evaluate(count)
    chip = page.locator(".chip", has_text="search, then fit")
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert not [name for name in labels(page) if name.startswith("dav")] and "best-of-n" in labels(page)
    page.wait_for_function(f"{count} < {before}")
    chip.click()
    assert labels(page) == everything
    page.wait_for_function(f"{count} === {before}")


def test_groups_of_columns_can_be_hidden(visit):
    page = visit()
    cost = page.locator("table.board thead button", has_text="training cost").first
    assert cost.is_visible()
    page.locator(".chip.role", has_text="cost").click()
    assert not cost.is_visible()
    assert page.locator("table.board thead button", has_text="train reward").first.is_visible()


def test_axes_and_number_of_samples_move_the_marks(visit):
    page = visit()
    figure = page.locator("figure[data-chart=pareto]").first
    marks = ".mark-symbol.role-mark path"
    where = "paths => paths.map(p => p.getAttribute('transform')).join()"
    before = figure.locator(marks).evaluate_all(where)
    figure.locator("select[data-axis=x]").select_option("kmer-corr")
    page.wait_for_function(MOVED, arg=[f"#s0 figure[data-chart=pareto] {marks}", before])
    cost = page.locator("figure[data-chart=cost]").first
    before = cost.locator(marks).evaluate_all(where)
    cost.locator("input[type=range]").fill("6")
    assert cost.locator("output").text_content() == "1,000,000"
    page.wait_for_function(MOVED, arg=[f"#s0 figure[data-chart=cost] {marks}", before])


def test_the_theme_follows_the_system_and_the_switch(visit):
    page = visit(scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    for name, colour in (("light", "rgb(251, 250, 248)"), ("dark", dark), ("system", dark)):
        page.click(".theme")
        assert name in page.text_content(".theme") and page.evaluate(ground) == colour
    assert visit(scheme="light").evaluate(ground) == "rgb(251, 250, 248)"


def test_pictures_are_seen(visit, site):
    page = visit(next((site / "toy").glob("grpo-*-local.html")).relative_to(site).as_posix(), width=390)
    pictures = page.locator(".gallery img")
    assert pictures.count() == 2
    pictures.first.scroll_into_view_if_needed()
    page.wait_for_function("[...document.querySelectorAll('.gallery img')].every(i => i.naturalWidth === 256)")


def test_hostile_names_are_text(visit):
    page = visit()
    assert HOSTILE in " ".join(labels(page))
    assert page.locator("img[src=x]").count() == 0


def test_nothing_moves_while_charts_are_drawn(visit, site, chromium):
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.add_init_script(
        "window.moved = 0; new PerformanceObserver(l => l.getEntries().forEach(e => window.moved += e.value))"
        ".observe({type: 'layout-shift', buffered: true})"
    )
    page.goto((site / "toy/index.html").as_uri())
    page.wait_for_selector("html[data-charts=drawn]")
    assert page.evaluate("window.moved") < 0.01
    context.close()


def test_it_prints(visit, tmp_path):
    page = visit()
    page.emulate_media(media="print")
    assert not page.locator(".toolbar").is_visible() and not page.locator(".theme").is_visible()
    assert page.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    page.pdf(path=tmp_path / "toy.pdf", prefer_css_page_size=True)
    assert (tmp_path / "toy.pdf").stat().st_size > 20_000


def test_without_scripts_the_numbers_still_stand(chromium, site):
    context = chromium.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto((site / "toy/index.html").as_uri(), timeout=PATIENCE)
    assert "needs JavaScript" in page.content() and page.locator("table.board tbody tr").count() > 5
    assert not page.locator(".toolbar").is_visible()
    context.close()
