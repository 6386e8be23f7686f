// Sorting, filters, charts and the switch between light and dark. Without it everything but the charts still stands.
"use strict";

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const status = document.querySelector('[role="status"]');
const say = (text) => { if (status) status.textContent = text; };

// ---- light and dark

const THEMES = ["system", "light", "dark"];
const root = document.documentElement;
const themeButton = document.querySelector(".theme");

function showTheme() {
  themeButton.textContent = `Theme: ${root.dataset.theme || "system"}`;
}

themeButton.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(root.dataset.theme || "system") + 1) % THEMES.length];
  if (next === "system") delete root.dataset.theme;
  else root.dataset.theme = next;
  try { localStorage.setItem("dav-bench-theme", root.dataset.theme || ""); } catch { /* a browser may forbid it */ }
  showTheme();
});
showTheme();

// ---- sorting: the first press puts the best first, the second turns it round, the third restores the board's order

for (const table of all("table[data-sortable]")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const buttons = all("thead button", table);
  for (const button of buttons) {
    button.addEventListener("click", () => sort(table, body, original, buttons, button));
  }
}

function column(button) {
  // Place of a header cell in the rows below: cells of the first header row that span both come first, or last.
  const table = button.closest("table");
  const [first, second] = table.tHead.rows;
  const cell = button.closest("th");
  const whole = [...first.cells].filter((c) => c.rowSpan === 2);
  if (cell.parentElement === first) {
    const place = whole.indexOf(cell);
    return place < whole.length - 1 ? place : whole.length - 1 + second.cells.length;
  }
  return whole.length - 1 + cell.cellIndex;
}

function sort(table, body, original, buttons, button) {
  const head = button.closest("th");
  const kind = button.dataset.sort;
  const best = kind === "up" ? "descending" : "ascending";
  const best1st = head.classList.contains("num") && all("button[title^='95'], button[title^='Pareto']", head).length ? "ascending" : best;
  const other = best1st === "ascending" ? "descending" : "ascending";
  const now = head.getAttribute("aria-sort");
  const next = now === null ? best1st : now === best1st ? other : null;
  for (const b of buttons) b.closest("th").removeAttribute("aria-sort");
  let rows = original;
  if (next) {
    head.setAttribute("aria-sort", next);
    const at = column(button);
    const flip = next === "ascending" ? 1 : -1;
    const key = (row) => {
      const cell = row.cells[at];
      if (kind === "text") return cell.textContent.trim();
      return cell.dataset.v === "" ? null : Number(cell.dataset.v);
    };
    rows = original.map((row) => [key(row), row]).sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);  // what was not measured stands last
      return flip * (kind === "text" ? a.localeCompare(b) : a - b);
    }).map(([, row]) => row);
  }
  body.append(...rows);
  say(next ? `Sorted by ${button.textContent.trim()}, ${next}` : "In the order of the board");
}

// ---- filters

const search = document.querySelector(".toolbar input[type=search]");
const chips = all(".chip[data-family]");
const views = [];

const shown = () => chips.filter((c) => c.getAttribute("aria-pressed") === "true").map((c) => c.dataset.family);

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const families = shown();
  let count = 0;
  for (const row of all(".board tbody tr")) {
    const text = row.dataset.text.toLowerCase();
    row.hidden = !families.includes(row.dataset.family) || !words.every((w) => text.includes(w));
    count += !row.hidden;
  }
  for (const strip of all(".strip")) strip.hidden = !families.includes(strip.dataset.family);
  for (const view of views) view.signal("shown", families).runAsync();
  say(`${count} rows shown`);
}

if (search) {
  search.form.addEventListener("submit", (event) => event.preventDefault());
  search.addEventListener("input", filter);
  for (const chip of chips) {
    chip.addEventListener("click", (event) => {
      const pressed = (c, on) => c.setAttribute("aria-pressed", String(on));
      const on = chip.getAttribute("aria-pressed") === "true";
      if (event.altKey || event.detail === 2) chips.forEach((c) => pressed(c, c === chip));  // only this one
      else pressed(chip, !on);
      if (!shown().length) chips.forEach((c) => pressed(c, true));
      filter();
    });
  }
  for (const chip of all(".chip[data-role]")) {
    chip.addEventListener("click", () => {
      const on = chip.getAttribute("aria-pressed") === "true";
      chip.setAttribute("aria-pressed", String(!on));
      document.body.classList.toggle(`hide-${chip.dataset.role}`, on);
    });
  }
}

// ---- charts

const columns = JSON.parse(document.getElementById("columns")?.textContent ?? "[]");

async function draw(figure) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot");
  const { view } = await vegaEmbed(plot, spec, {
    actions: false, renderer: "svg", defaultStyle: false, tooltip: { theme: "custom", disableDefaultStyle: true },
  });
  views.push(view);
  for (const select of all("select", figure)) {
    select.addEventListener("change", () => {
      const axis = select.dataset.axis;
      const found = columns.find((c) => c.name === select.value);
      view.signal(`${axis}col`, found.name).signal(`${axis}sign`, found.sign).signal(`${axis}bend`, found.bend).runAsync();
    });
  }
  const slider = figure.querySelector("[data-samples]");
  slider?.addEventListener("input", () => {
    const n = Math.round(10 ** Number(slider.value));
    const rounded = Number(n.toPrecision(2));
    slider.nextElementSibling.textContent = rounded.toLocaleString("en");
    slider.setAttribute("aria-valuetext", rounded.toLocaleString("en"));
    view.signal("samples", rounded).runAsync();
  });
  figure.dataset.drawn = "";
}

async function drawAll() {
  for (const figure of all("figure.chart")) {
    try {
      await draw(figure);
    } catch (error) {
      figure.querySelector(".plot").textContent = `This chart could not be drawn: ${error.message}`;
      console.error(error);
    }
  }
  root.dataset.charts = "drawn";
}
if (window.vegaEmbed) drawAll();

// ---- commands

for (const button of all(".copy")) {
  button.addEventListener("click", async () => {
    const text = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(text.textContent.trim());
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}
