// Filters, sorts and selects rows and runs, and draws the learning curves of the selected ones.
// Every text from a run is put in as text (`textContent`), never as markup.
"use strict";

const known = JSON.parse(document.getElementById("data").textContent);
const runRows = [...document.querySelectorAll("table.runs tbody tr")];
const resultRows = [...document.querySelectorAll("table.results tbody tr")];
const selected = new Set();
const MOST_CURVES = 24;
const LOOKS = ["c1", "c2", "c3", "c4", "c5", "c6", "c7"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];

const runsOf = (row) => (row.dataset.runs === "" ? [] : row.dataset.runs.split(" ").map(Number));

function element(name, text, attributes) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  return made;
}

// Plotly reads a few tags and %{...} in labels; neither may come from a name.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/%\{/g, "% {");

// ---- how many rows are shown: a browser lays out a hundred at once without delay ----

const MOST_SHOWN = 100;
const out = new Set(); // rows that the filter leaves out
const tables = [...document.querySelectorAll("table.sortable")].map((table) => {
  const more = element("button", "", { type: "button", class: "plain every" });
  const entry = { table, more, most: MOST_SHOWN };
  table.after(more);
  more.addEventListener("click", () => {
    entry.most = Infinity;
    limit(entry);
    table.closest(".scroll").focus(); // the button is gone
  });
  return entry;
});

function limit({ table, more, most }) {
  let count = 0;
  for (const row of table.tBodies[0].rows) {
    const isHidden = out.has(row) || ++count > most;
    if (row.hidden !== isHidden) row.hidden = isHidden;
  }
  more.hidden = count <= most;
  more.textContent = `Show all ${count} rows`;
}

tables.forEach(limit);

// ---- filter ----

const form = document.querySelector(".filter");
const passes = new Array(runRows.length).fill(true);
const texts = runRows.map((row) => row.textContent.toLowerCase());
const rowTexts = resultRows.map((row) => row.textContent.toLowerCase());
let redrawing = 0;

function filter() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = [...form.querySelectorAll("select")]
    .filter((select) => select.value !== "")
    .map((select) => [known.facets[Number(select.dataset.facet)].of, Number(select.value)]);
  let runs = 0;
  let rows = 0;
  const inFacets = runRows.map((_, run) => wanted.every(([of, value]) => of[run] === value));
  runRows.forEach((row, run) => {
    passes[run] = inFacets[run] && words.every((word) => texts[run].includes(word));
    if (passes[run]) out.delete(row);
    else out.add(row);
    runs += passes[run];
  });
  const left = new Set();
  resultRows.forEach((row, at) => {
    const own = runsOf(row);
    // A row is found by its own words, such as its label, or by those of one of its runs.
    const isShown =
      own.some((run) => passes[run]) || (own.some((run) => inFacets[run]) && words.every((word) => rowTexts[at].includes(word)));
    if (isShown) out.delete(row);
    else out.add(row);
    if (!isShown) left.add(row.dataset.label);
    rows += isShown;
  });
  tables.forEach(limit);
  document.getElementById("shown").textContent =
    words.length || wanted.length ? `${rows} of ${resultRows.length} rows, ${runs} of ${runRows.length} runs` : "";
  if (left.size === filtered.size && [...left].every((label) => filtered.has(label))) return;
  filtered.clear();
  for (const label of left) filtered.add(label);
  for (const button of legend) button.hidden = filtered.has(button.dataset.row);
  clearTimeout(redrawing);
  redrawing = setTimeout(() => {
    showPanels();
    drawAll();
  }, 200); // after the last key
}

if (form) {
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", filter);
  form.addEventListener("change", filter); // some browsers send only this one for a choice
  form.addEventListener("reset", () => setTimeout(filter));
  if ([...form.elements].some((field) => field.value)) filter(); // a reload keeps the words in some browsers
}

// ---- sort ----

function sortBy(table, column, direction) {
  const body = table.tBodies[0];
  const keyed = [...body.rows].map((row, at) => {
    const cell = row.cells[column];
    const number = cell.dataset.v === undefined ? NaN : Number(cell.dataset.v);
    return { row, at, number, text: cell.textContent.trim() };
  });
  const numeric = keyed.some(({ number }) => !Number.isNaN(number));
  const collator = new Intl.Collator(undefined, { numeric: true });
  keyed.sort((a, b) => {
    if (!numeric) return direction * collator.compare(a.text, b.text) || a.at - b.at;
    if (Number.isNaN(a.number) || Number.isNaN(b.number)) return Number.isNaN(a.number) - Number.isNaN(b.number) || a.at - b.at;
    return direction * (a.number - b.number) || a.at - b.at;
  });
  body.append(...keyed.map(({ row }) => row));
}

for (const entry of tables) {
  const { table } = entry;
  const heads = [...table.tHead.rows[0].cells];
  for (const head of heads) {
    const button = element("button", head.textContent, { type: "button", class: "sort" });
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortBy(table, head.cellIndex, descending ? -1 : 1);
      limit(entry);
    });
  }
}

// ---- select ----

// The box stands inside the first cell, so that the columns keep their numbers.
for (const row of [...resultRows, ...runRows]) {
  const name = row.dataset.label === undefined ? known.names[runsOf(row)[0]] : row.dataset.label;
  const box = element("input", undefined, { type: "checkbox", class: "pick", "aria-label": `Select ${name}` });
  const place = row.cells[0].querySelector(".name") || row.cells[0];
  place.prepend(box);
  box.addEventListener("change", () => {
    for (const run of runsOf(row)) {
      if (box.checked) selected.add(run);
      else selected.delete(run);
    }
    showSelection();
  });
}

function showSelection() {
  for (const row of [...resultRows, ...runRows]) {
    const own = runsOf(row);
    const count = own.filter((run) => selected.has(run)).length;
    const box = row.querySelector("input.pick");
    box.checked = own.length > 0 && count === own.length;
    box.indeterminate = count > 0 && count < own.length;
    row.classList.toggle("picked", count > 0);
  }
  const runs = [...selected];
  const many = `${runs.length} run${runs.length === 1 ? "" : "s"} selected`;
  document.querySelector(".tray").hidden = runs.length === 0;
  document.getElementById("tray-count").textContent = many;
  document.getElementById("selected").hidden = runs.length === 0;
  document.getElementById("selected-none").hidden = runs.length > 0;
  const list = document.querySelector(".chosen");
  list.replaceChildren(
    ...runs.slice(0, MOST_CURVES).map((run, at) => {
      const item = element("li");
      const button = element("button", known.names[run], { type: "button", "aria-label": `Remove ${known.names[run]}` });
      const swatch = element("span", undefined, { class: "swatch", "aria-hidden": "true" });
      swatch.style.background = `var(--${LOOKS[at % LOOKS.length]})`;
      button.prepend(swatch);
      button.addEventListener("click", () => {
        selected.delete(run);
        showSelection();
        (list.querySelector("button") || document.getElementById("runs")).focus();
      });
      item.append(button);
      return item;
    }),
    ...(runs.length > MOST_CURVES ? [element("li", `and ${runs.length - MOST_CURVES} more, which are not drawn`)] : []),
  );
  if (runs.length === 0) return;
  showCurves(runs.slice(0, MOST_CURVES));
  showDifferences(runs);
}

const metricChoice = document.getElementById("selected-metric");

function showCurves(runs) {
  const { metrics, titles, steps, runs: curves } = known.curves;
  const longest = (at) => Math.max(0, ...runs.map((run) => (curves[run][at] ? steps[curves[run][at][0]].length : 0)));
  const there = metrics.map((_, at) => at).filter((at) => longest(at) > 0);
  there.sort((a, b) => (longest(a) === 1) - (longest(b) === 1) || a - b); // a single point is no curve
  const before = metricChoice.value;
  metricChoice.replaceChildren(...there.map((at) => element("option", metrics[at], { value: at })));
  if (there.includes(Number(before)) && before !== "") metricChoice.value = before;
  const figure = document.getElementById("selected-figure");
  figure.hidden = there.length === 0;
  if (figure.hidden) return;
  const metric = Number(metricChoice.value);
  const data = runs.flatMap((run, at) => {
    if (!curves[run][metric]) return [];
    const [place, values] = curves[run][metric];
    const name = plain(known.names[run]);
    return [
      {
        type: "scatter", mode: steps[place].length > 40 ? "lines" : "lines+markers", name, x: steps[place], y: values,
        line: { color: `@${LOOKS[at % LOOKS.length]}`, width: 2, dash: DASHES[Math.floor(at / LOOKS.length) % DASHES.length] },
        marker: { size: 5 }, hovertemplate: `${name}, step %{x}: %{y:.4~g}<extra></extra>`,
      },
    ];
  });
  const layout = {
    xaxis: { title: { text: "step" }, rangemode: "tozero" }, yaxis: { title: { text: titles[metric] } },
  };
  specs["selected-curves"] = { "": { data, layout } };
  chosen["selected-curves"] = "";
  draw("selected-curves");
}

metricChoice.addEventListener("change", () => showCurves([...selected].slice(0, MOST_CURVES)));
document.getElementById("clear").addEventListener("click", () => {
  selected.clear();
  showSelection();
  document.getElementById("runs").focus();
});
