// Draws the figures: resolves colour names from the style sheet, follows light and dark, switches metrics, hides rows.
"use strict";

const specs = JSON.parse(document.getElementById("specs").textContent);
const chosen = {};
const hidden = new Set(); // rows switched off in a legend
const filtered = new Set(); // rows that the filter leaves out
const stale = new Set(); // figures to draw when they come into sight
const FEW = 16; // so many figures are drawn at once
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const touch = window.matchMedia("(pointer: coarse)");
const config = { responsive: true, displayModeBar: false, displaylogo: false };

// "@c1" is the custom property --c1; "@c1/0.2" is the same with that opacity.
function colour(name) {
  const [property, opacity] = name.slice(1).split("/");
  const value = getComputedStyle(document.documentElement).getPropertyValue("--" + property).trim();
  if (opacity === undefined) return value;
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(value.slice(at, at + 2), 16));
  return `rgba(${red}, ${green}, ${blue}, ${opacity})`;
}

// Plotly draws the copies that this returns; the specifications keep their names.
function resolve(value, key) {
  if (typeof value === "string") return /color(scale)?$/.test(key) && value[0] === "@" ? colour(value) : value;
  if (Array.isArray(value)) {
    const numbers = typeof value[0] === "number" && key !== "colorscale";
    return numbers ? value : value.map((item) => resolve(item, key));
  }
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, resolve(item, name)]));
}

function axis(own) {
  return {
    automargin: true, gridcolor: colour("@line"), linecolor: colour("@line"), zerolinecolor: colour("@line"),
    zeroline: false, tickfont: { color: colour("@muted") }, separatethousands: true, ...own,
    title: { standoff: 8, font: { color: colour("@muted"), size: 12 }, ...(own && own.title) },
  };
}

function draw(id) {
  stale.delete(id);
  const { data, layout } = resolve(specs[id][chosen[id]], "");
  const axes = Object.fromEntries(
    ["xaxis", "yaxis", ...Object.keys(layout).filter((key) => /^[xy]axis\d/.test(key))].map((key) => [key, axis(layout[key])]),
  );
  const look = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("@ink") },
    margin: { l: 12, r: 14, t: 12, b: 12 }, dragmode: touch.matches ? false : "zoom",
    hoverlabel: { bgcolor: colour("@card"), bordercolor: colour("@line"), font: { color: colour("@ink") } },
  };
  const shown = data.filter((trace) => !hidden.has(trace.meta) && !filtered.has(trace.meta));
  return Plotly.react(id, shown, { ...look, ...layout, ...axes }, config);
}

// Of many figures only those in sight are drawn at once; the others when they come near.
const near = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      target.dataset.near = isIntersecting ? "yes" : "";
      if (isIntersecting && stale.has(target.id)) draw(target.id);
    }
  },
  { rootMargin: "800px" },
);

function drawAll() {
  const ids = Object.keys(specs);
  for (const id of ids) {
    if (ids.length <= FEW || document.getElementById(id).dataset.near) draw(id);
    else stale.add(id);
  }
}

for (const id of Object.keys(specs)) chosen[id] = Object.keys(specs[id])[0];
for (const select of document.querySelectorAll("select[data-plot]")) {
  chosen[select.dataset.plot] = select.value; // a reload keeps the choice in some browsers
  select.addEventListener("change", () => {
    chosen[select.dataset.plot] = select.value;
    draw(select.dataset.plot);
  });
}

function showPanels() {
  for (const figure of document.querySelectorAll("figure[data-row]")) {
    figure.hidden = hidden.has(figure.dataset.row) || filtered.has(figure.dataset.row);
  }
}

const legend = document.querySelectorAll(".legend button");
for (const button of legend) {
  button.addEventListener("click", () => {
    const row = button.dataset.row;
    if (!hidden.delete(row)) hidden.add(row);
    for (const other of legend) {
      if (other.dataset.row === row) other.setAttribute("aria-pressed", String(!hidden.has(row)));
    }
    showPanels();
    drawAll();
  });
}
for (const button of document.querySelectorAll("button[data-plot]")) {
  button.addEventListener("click", () => {
    const plot = document.getElementById(button.dataset.plot);
    const size = { width: plot.clientWidth, height: plot.clientHeight };
    // With the card's ground: light letters on nothing cannot be read elsewhere.
    const figure = { data: plot.data, layout: { ...plot.layout, paper_bgcolor: colour("@card") } };
    Plotly.downloadImage(figure, { format: "svg", filename: button.dataset.plot, ...size });
  });
}
dark.addEventListener("change", drawAll);
drawAll();
for (const id of Object.keys(specs)) near.observe(document.getElementById(id));
