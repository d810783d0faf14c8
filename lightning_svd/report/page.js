// The page reads without this; with it one layer can be followed through the charts and the tables be searched and sorted.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const select = document.getElementById("layer");
const lines = [...document.querySelectorAll(".ranks .layer")].sort((a, b) => a.dataset.layer - b.dataset.layer);
let chosen = null;

function mark(index) {
  lines.forEach((line, k) => line.classList.toggle("chosen", k === index));
  if (index !== null) lines[index]?.parentNode.append(lines[index]); // the last one is on top
}

function choose(index) {
  chosen = index;
  select.value = index;
  document.getElementById("spectrum").replaceChildren(
    document.getElementById(`spectrum-${index}`).content.cloneNode(true));
  mark(index);
}

if (select) {
  const count = select.options.length;
  select.addEventListener("change", () => choose(Number(select.value)));
  for (const [id, by] of [["previous", count - 1], ["next", 1]]) {
    document.getElementById(id).addEventListener("click", () => choose((Number(select.value) + by) % count));
  }
  for (const link of document.querySelectorAll("a[data-layer]")) {
    link.addEventListener("click", () => choose(Number(link.dataset.layer)));
  }
}

const plot = document.querySelector(".ranks .plot");
if (plot) {
  const readout = document.getElementById("readout"), invitation = readout.textContent;
  let pointed = null;
  plot.classList.add("pointed");
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const step = (event.clientX - box.left) / box.width * data.end;
    const share = (1 - (event.clientY - box.top) / box.height) * data.top;
    const at = Math.max(0, data.steps.findLastIndex((each) => each <= step));
    const distance = ([, full, ranks]) => Math.abs(ranks[at] / full - share);
    pointed = data.layers.reduce((best, layer, k) => distance(layer) < distance(data.layers[best]) ? k : best, 0);
    const [name, full, ranks] = data.layers[pointed];
    readout.textContent = `${name}: rank ${ranks[at]} of ${full} from step ${data.steps[at].toLocaleString("en")}`;
    mark(pointed);
  });
  plot.addEventListener("pointerleave", () => { readout.textContent = invitation; mark(chosen); });
  plot.addEventListener("click", () => { if (pointed !== null) choose(pointed); });
}

const table = document.getElementById("layers");
if (table) {
  const body = table.tBodies[0], rows = [...body.rows];
  const words = new Intl.Collator("en", { numeric: true });
  const compare = (a, b) => parseFloat(a) - parseFloat(b) || words.compare(a, b);
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.ariaSort = "none";
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[head.ariaSort];
      for (const other of table.tHead.rows[0].cells) other.ariaSort = "none";
      head.ariaSort = next;
      const column = head.cellIndex, sign = next === "descending" ? -1 : 1;
      const text = (row) => row.cells[column].textContent;
      body.append(...(next === "none" ? rows : [...rows].sort((a, b) => sign * compare(text(a), text(b)))));
    });
  }
  document.getElementById("search").addEventListener("input", (event) => {
    const wanted = event.target.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    const shown = rows.filter((row) => !row.hidden).length;
    document.getElementById("found").textContent = `${shown} of ${rows.length} layers`;
  });
}
