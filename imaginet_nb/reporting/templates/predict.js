const $ = id => document.getElementById(id), form = $("filter"), list = $("cards"), detail = $("detail"), cards = [...list.children];
const rows = cards.map(card => JSON.parse(card.dataset.row)), order = cards.map((card, i) => i);
const data = JSON.parse($("data").textContent), prior = $("prior");
let shown = order, last = null, given = "", shift = 0; // of the log-odds, by the share of synthetic pictures that the reader expects
const logOdds = p => Math.log(p / (1 - p)), sigmoid = z => 1 / (1 + Math.exp(-z));
const posterior = p => sigmoid(logOdds(p) + shift);
const least = 10 ** -data.digits, hasNumber = row => "probability" in row;
const probabilityText = p => p < least / 2 ? `< ${least.toFixed(data.digits)}` // as on the cards without a script
  : p > 1 - least / 2 ? `> ${(1 - least).toFixed(data.digits)}` : p.toFixed(data.digits);
function make(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
const last_of_all = row => row.error ? 3 : 2; // behind every picture with a number
const keys = {
  high: row => hasNumber(row) ? -row.probability : last_of_all(row), low: row => hasNumber(row) ? row.probability : last_of_all(row),
  apart: row => hasNumber(row) ? (row.probability_low ?? 0) - (row.probability_high ?? 0) : last_of_all(row), name: row => row.path,
};
function filter() {
  const chosen = new FormData(form), words = chosen.getAll("verdict"), text = chosen.get("text").toLowerCase();
  const family = chosen.get("family"), key = keys[chosen.get("sort") ?? "name"];
  const keep = row => words.includes(row.verdict) && row.path.toLowerCase().includes(text) && (!family || row.family === family);
  const compare = (a, b) => key(rows[a]) < key(rows[b]) ? -1 : key(rows[a]) > key(rows[b]) ? 1 : a - b;
  const sorted = [...order].sort(compare);
  shown = sorted.filter(i => keep(rows[i]));
  for (const i of sorted) { cards[i].hidden = !keep(rows[i]); list.append(cards[i]); }
  $("count").textContent = `${shown.length} of ${rows.length} shown`;
}
function expect() {
  const field = prior.elements.share, status = prior.querySelector("[role=status]");
  if (!field.checkValidity()) { status.textContent = "A number between 0.1 and 99.9, please."; return; }
  shift = field.value === field.defaultValue ? 0 : logOdds(field.value / 100) - logOdds(data.share);
  given = shift ? ` at ${field.value} %` : "";
  for (const i of order) if (hasNumber(rows[i])) {
    cards[i].querySelector(".p").textContent = probabilityText(posterior(rows[i].probability));
    cards[i].querySelector(".at").textContent = given;
  }
  status.textContent = shift ? `${data.measure} is now for ${field.value} %. Verdicts do not change: their error rates hold within each class.` : "";
  if (!detail.hidden) show(last);
}
function route() {
  const number = /^#\d+$/.test(location.hash) ? Number(location.hash.slice(1)) : -1, open = number >= 0 && number < rows.length;
  detail.hidden = !open;
  $("overview").hidden = open;
  if (open) {
    last = number;
    show(number);
    detail.querySelector("h2").focus();
    scrollTo(0, 0);
  }
  else if (last !== null) { cards[last].firstElementChild.focus(); last = null; }
}

function table(lines) {
  const body = make("table");
  for (const [title, ...cells] of lines) {
    const line = make("tr"), cell = make("td");
    cell.append(...cells);
    line.append(make("th", title, {scope: "row"}), cell);
    body.append(line);
  }
  return body;
}
function scores(row) {
  const known = data.views.filter(([column]) => column in row);
  return table(known.map(([column, title]) => {
    const p = posterior(row[column]);
    return [title, probabilityText(p) + " ", make("meter", undefined, {min: 0, max: 1, value: p, "aria-label": title})];
  }));
}
function facts(row) {
  const values = {"error": row.error, "why": row.reason, "note": row.notes.join("; "),
    "size": row.width && `${row.width} x ${row.height} pixels`, "format": row.format, "file": row.path};
  if (row.flat && hasNumber(row)) values["flat areas"] = `${Math.round(100 * row.flat)} % of what was looked at, as in a screenshot, a diagram or text. ` +
    "If the training data held no such pictures, the score means nothing.";
  return table(Object.entries(values).filter(([, value]) => value));
}
function folded(title, ...content) {
  const box = make("details");
  box.append(make("summary", title), ...content);
  return box;
}
function onRequest(row) {
  const boxes = [], whose = data.demo ? " of the demo detector" : "";
  if (row.family) boxes.push(folded("Family of the generator, a guess",
    make("p", `${row.family}; the nearest known family has ${probabilityText(row.family_probability)} of the score. ${data.family}`)));
  if ("logit" in row) {
    const numbers = [["logit", row.logit.toFixed(3)], ["squares", row.crops]];
    if ("crop_spread" in row) numbers.push(["spread of their logits", row.crop_spread.toFixed(3)]);
    boxes.push(folded(`More numbers${whose}`, table(numbers)));
  }
  return boxes;
}

function outlines(row) {
  const make = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const drawing = make("svg", {class: "squares", viewBox: `0 0 ${row.width} ${row.height}`, preserveAspectRatio: "none", "aria-hidden": "true"});
  for (const kind of ["below", "above"]) for (const [x, y, width, height] of row.squares)
    drawing.append(make("rect", {class: kind, x, y, width, height}));
  return drawing;
}
function figure(row, image) {
  const figure = make("figure"), frame = make("div", undefined, {class: "frame"}), caption = make("figcaption");
  frame.append(make("img", undefined, {src: image.src, alt: row.path}));
  figure.append(frame, caption);
  if (row.squares) {
    const share = row.share > 0.995 ? "all" : `${Math.max(1, Math.round(100 * row.share))} %`, n = row.squares.length;
    frame.append(outlines(row));
    caption.append(make("p", `The detector looked at ${n === 1 ? "one part" : `${n} squares`}, outlined: ${share} of the picture. ` +
      (share === "all" ? "" : "The rest was not scored.")));
  }
  if (row.problem) caption.append(make("p", row.problem));
  if (!row.map) return figure;
  const over = make("img", undefined, {class: "over", src: row.map, alt: "class-activation map"});
  const label = make("label", `Which places raised or lowered the score${data.demo ? " of the demo detector" : ""} (class-activation map)`);
  const box = make("input", undefined, {type: "checkbox", id: "map", checked: ""}), scale = make("div", undefined, {class: "scale"});
  box.addEventListener("change", () => over.hidden = scale.hidden = !box.checked);
  label.prepend(box);
  frame.append(over);
  scale.append(make("span", `real \u2212${row.limit.toFixed(1)}`), make("span", undefined, {class: "bar"}),
    make("span", `+${row.limit.toFixed(1)} synthetic`), make("span", "contribution to the logit, from which the score is computed; without colour: none", {class: "unit"}));
  caption.append(label, scale);
  return figure;
}

function show(number) {
  const row = rows[number], image = cards[number].querySelector("img"), at = shown.indexOf(number);
  const nav = make("nav"), right = make("div"), title = make("h2", row.name, {tabindex: -1}), link = (text, to, key, id) =>
    make("a", text, {class: "back", href: `#${to}`, "aria-keyshortcuts": key, ...id && {id}});
  nav.append(link("Back to all", "", "Escape"));
  if (at > 0) nav.append(link("\u2190 Previous", shown[at - 1], "ArrowLeft", "previous"));
  if (at >= 0 && at + 1 < shown.length) nav.append(link("Next \u2192", shown[at + 1], "ArrowRight", "next"));
  nav.append(make("span", "Keys: \u2190 and \u2192 for the previous and the next picture, Esc for all.", {class: "keys"}));
  const word = make("p", "Verdict: ", {class: "verdict"});
  word.append(make("b", row.verdict, {class: row.verdict}));
  if (hasNumber(row)) word.append(`, ${data.measure}${given} ${probabilityText(posterior(row.probability))}`);
  if (row.says) right.append(make("p", `The file itself says: ${row.says}`, {class: "tag"})); // evidence comes before a score
  right.append(word);
  if (!row.error) right.append(...row.tags.filter(tag => !row.says || !tag.startsWith("the file says")).map(tag => make("p", tag, {class: "tag"})));
  if (hasNumber(row)) right.append(make("p", `${data.measure}${given} of the picture in these views:`), scores(row));
  right.append(facts(row), ...onRequest(row));
  detail.replaceChildren(nav, title, image ? figure(row, image) : make("p", row.problem ?? "There is no picture to show."), right);
}
form.addEventListener("input", filter);
form.addEventListener("reset", () => setTimeout(filter));
form.addEventListener("submit", event => event.preventDefault());
if (prior) {
  prior.addEventListener("input", expect);
  prior.querySelector("button").addEventListener("click", () => {
    prior.reset();
    expect();
  });
  prior.addEventListener("submit", event => event.preventDefault());
}
addEventListener("hashchange", route);
addEventListener("keydown", event => {
  if (detail.hidden || event.altKey || event.ctrlKey || event.metaKey || event.target.matches("input, select")) return;
  const link = {ArrowLeft: $("previous"), ArrowRight: $("next")}[event.key];
  if (link) location.hash = link.hash;
  else if (event.key === "Escape") location.hash = "#";
});
filter();
route();
