// Lays configurations side by side: one line for each setting, named by its path in the YAML.
"use strict";

const MOST_COLUMNS = 8;

// The settings of a run, path -> value. The files are written by one program: block style, lists not indented.
function settings(run) {
  const { lines, blocks, runs } = known.configs;
  const found = new Map();
  const above = []; // { indent, key, items } of the lines that this one belongs to
  let last = null;
  const path = () => above.map(({ key }) => key).join(".").replace(/\.\[/g, "[");
  for (const line of runs[run].flatMap((block) => blocks[block]).map((at) => lines[at])) {
    let indent = line.search(/\S/);
    let text = line.trim();
    if (text.startsWith("#")) continue;
    while (text === "-" || text.startsWith("- ")) {
      while (above.length && (above.at(-1).indent > indent || (above.at(-1).indent === indent && above.at(-1).isItem))) above.pop();
      const list = above.at(-1) || { items: 0 };
      above.push({ indent, key: `[${list.items || 0}]`, isItem: true });
      list.items = (list.items || 0) + 1;
      text = text.slice(1).trimStart();
      indent += 2;
    }
    const match = /^(['"]?[^\s:'"][^:]*?['"]?):(?: (.*))?$/.exec(text);
    if (match) {
      while (above.length && above.at(-1).indent >= indent) above.pop();
      above.push({ indent, key: match[1] });
      last = path();
      if (match[2] !== undefined) found.set(last, match[2]);
    } else if (above.length && above.at(-1).isItem && above.at(-1).indent === indent - 2) {
      last = path();
      if (text) found.set(last, text);
    } else if (last !== null) {
      found.set(last, `${found.get(last) || ""} ${text}`.trim()); // a text over several lines
    }
  }
  return found;
}

function showDifferences(chosenRuns) {
  const table = document.getElementById("diff");
  const runs = chosenRuns.slice(0, MOST_COLUMNS);
  const each = runs.map(settings);
  const keys = [...new Set(each.flatMap((of) => [...of.keys()]))];
  const differing = keys.filter((key) => new Set(each.map((of) => of.get(key))).size > 1);
  const every = document.getElementById("every-setting").checked || runs.length === 1;
  const missing = runs.filter((_, at) => each[at].size === 0).map((run) => known.names[run]);
  document.getElementById("diff-summary").textContent = [
    runs.length === 1 ? `${keys.length} settings; select more runs to compare` : `${differing.length} of ${keys.length} settings differ`,
    ...(chosenRuns.length > runs.length ? [`the first ${runs.length} of ${chosenRuns.length} runs are compared`] : []),
    ...(missing.length ? [`no config.yaml: ${missing.join(", ")}`] : []),
  ].join("; ");
  const head = element("tr");
  head.append(element("th", "setting", { scope: "col" }), ...runs.map((run) => element("th", known.names[run], { scope: "col" })));
  const different = new Set(differing);
  const rows = (every ? keys : differing).map((key) => {
    const row = element("tr");
    row.append(element("th", key, { scope: "row" }));
    each.forEach((of, at) => {
      const value = of.get(key);
      const cell = element("td", value === undefined ? "–" : value);
      if (at > 0 && different.has(key) && value !== each[0].get(key)) cell.className = "marked";
      row.append(cell);
    });
    return row;
  });
  const thead = element("thead");
  const tbody = element("tbody");
  thead.append(head);
  tbody.append(...rows);
  table.replaceChildren(thead, tbody);
}

document.getElementById("every-setting").addEventListener("change", () => showDifferences([...selected]));
document.getElementById("selection").hidden = false;
