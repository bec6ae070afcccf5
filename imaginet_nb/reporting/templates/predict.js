const $ = id => document.getElementById(id), form = $("filter"), list = $("cards"), detail = $("detail"), cards = [...list.children];
const rows = cards.map(card => JSON.parse(card.dataset.row)), order = cards.map((card, i) => i);
const views = JSON.parse($("views").textContent);
let shown = order, last = null;
function make(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
const keys = {
  high: row => -(row.probability ?? -1), low: row => row.probability ?? 2, name: row => row.path,
  apart: row => -((row.probability_high ?? 0) - (row.probability_low ?? 0)) + (row.error ? 1 : 0),
};
function filter() {
  const data = new FormData(form), words = data.getAll("verdict"), text = data.get("text").toLowerCase();
  const family = data.get("family"), key = keys[data.get("sort")];
  const keep = row => words.includes(row.verdict) && row.path.toLowerCase().includes(text) && (!family || row.family === family);
  const compare = (a, b) => key(rows[a]) < key(rows[b]) ? -1 : key(rows[a]) > key(rows[b]) ? 1 : a - b;
  const sorted = [...order].sort(compare);
  shown = sorted.filter(i => keep(rows[i]));
  for (const i of sorted) { cards[i].hidden = !keep(rows[i]); list.append(cards[i]); }
  $("count").textContent = `${shown.length} of ${rows.length} shown`;
}
function route() {
  const number = /^#\d+$/.test(location.hash) ? Number(location.hash.slice(1)) : -1, open = number >= 0 && number < rows.length;
  detail.hidden = !open;
  $("overview").hidden = open;
  if (open) { last = number; show(number); }
  else if (last !== null) { cards[last].firstElementChild.focus(); last = null; }
}

function scores(row) {
  const table = make("table");
  for (const [column, title] of views) if (column in row) {
    const line = make("tr"), cell = make("td", row[column].toFixed(3) + " ");
    cell.append(make("meter", undefined, {min: 0, max: 1, value: row[column], "aria-label": title}));
    line.append(make("th", title, {scope: "row"}), cell);
    table.append(line);
  }
  return table;
}
function facts(row) {
  if (row.width) row.size = `${row.width} x ${row.height}`;
  const table = make("table"), names = {reason: "why unsure", family: "family", family_probability: "its probability", logit: "logit",
    crops: "crops", crop_spread: "spread of their logits", size: "size", format: "format", note: "note", error: "error", path: "file"};
  for (const [key, name] of Object.entries(names)) if (key in row) {
    const line = make("tr");
    line.append(make("th", name, {scope: "row"}), make("td", row[key]));
    table.append(line);
  }
  return table;
}
function figure(row, image) {
  const figure = make("figure"), frame = make("div", undefined, {class: "frame"}), caption = make("figcaption");
  frame.append(make("img", undefined, {src: image.src, alt: row.path}));
  figure.append(frame, caption);
  if (row.problem) caption.textContent = row.problem;
  if (!row.map) return figure;
  const over = make("img", undefined, {class: "over", src: row.map, alt: "class-activation map"});
  const label = make("label", "Class-activation map");
  const box = make("input", undefined, {type: "checkbox", id: "map", checked: ""});
  box.addEventListener("change", () => over.hidden = !box.checked);
  label.prepend(box);
  frame.append(over);
  caption.append(label, make("br"), make("span", "", {class: "key s"}), " speaks for synthetic ", make("span", "", {class: "key r"}),
    " for real ", make("span", "", {class: "key n"}), ` not looked at. Mean of the map ${row.mean}, logit ${row.logit.toFixed(4)}.`);
  return figure;
}

function show(number) {
  const row = rows[number], image = cards[number].querySelector("img"), at = shown.indexOf(number);
  const nav = make("nav"), right = make("div"), title = make("h2", row.name, {tabindex: -1});
  nav.append(make("a", "Back to all", {class: "back", href: "#"}));
  if (at > 0) nav.append(make("a", "\u2190 Previous", {class: "back", href: `#${shown[at - 1]}`, id: "previous"}));
  if (at >= 0 && at + 1 < shown.length) nav.append(make("a", "Next \u2192", {class: "back", href: `#${shown[at + 1]}`, id: "next"}));
  const word = make("p", "Verdict: ");
  word.append(make("b", row.verdict, {class: row.verdict}));
  right.append(word, scores(row), facts(row));
  detail.replaceChildren(nav, title, image ? figure(row, image) : make("p", row.problem ?? "There is no picture to show."), right);
  title.focus();
  scrollTo(0, 0);
}
form.addEventListener("input", filter);
form.addEventListener("reset", () => setTimeout(filter));
form.addEventListener("submit", event => event.preventDefault());
addEventListener("hashchange", route);
addEventListener("keydown", event => {
  if (detail.hidden || event.altKey || event.ctrlKey || event.metaKey) return;
  const link = {ArrowLeft: $("previous"), ArrowRight: $("next")}[event.key];
  if (link) location.hash = link.hash;
  else if (event.key === "Escape") location.hash = "#";
});
filter();
route();
