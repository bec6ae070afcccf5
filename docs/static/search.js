// Search page: one result per page, with an excerpt. Sphinx fetches each page for its excerpt, which browsers refuse for local
// files, so the texts come from excerpts.js, which docs/conf.py writes.
"use strict";

const EXCERPT = 240; // characters

function excerpt(text, terms) {
  const lower = text.toLowerCase();
  const places = [...terms].map((term) => lower.indexOf(term.toLowerCase())).filter((place) => place >= 0);
  const start = places.length ? Math.max(Math.min(...places) - EXCERPT / 4, 0) : 0;
  const paragraph = document.createElement("p");
  paragraph.className = "context";
  const shown = text.slice(start, start + EXCERPT);
  const words = [...terms].map((term) => term.replace(/[^\p{Letter}\p{Number}_]/gu, "")).filter((term) => term);
  const parts = words.length ? shown.split(new RegExp(`(${words.join("|")})`, "iu")) : [shown];
  paragraph.append(start ? "… " : "");
  parts.forEach((part, i) => {
    const piece = document.createElement(i % 2 ? "mark" : "span");
    piece.textContent = part;
    paragraph.append(piece);
  });
  paragraph.append(start + EXCERPT < text.length ? " …" : "");
  return paragraph;
}

let terms = [];
const search = Search._performSearch;
Search._performSearch = (query, searchTerms, ...rest) => {
  terms = query.split(/\s+/).filter((word) => word);
  const seen = new Set(); // the best result comes last
  const best = search(query, searchTerms, ...rest).reverse().filter(([page]) => !seen.has(page) && seen.add(page));
  return best.reverse();
};

new MutationObserver((changes) => {
  for (const item of changes.flatMap((change) => [...change.addedNodes])) {
    const link = item.nodeName === "LI" && item.querySelector("a");
    const page = link && link.getAttribute("href").replace(/\.html.*$/, "");
    if (page && EXCERPTS[page]) item.append(excerpt(EXCERPTS[page], terms));
  }
}).observe(document.getElementById("search-results"), { childList: true, subtree: true });
