"""Renders the two documents that are made from other files: README.md and the table of paper items in reports/README.md.

    python tools/render_documents.py     # from the root of the repository; `make prepare` runs it

nbdev renders README.md with Quarto, a program that pip cannot install. Little of it is needed: Markdown cells as they are,
code cells with their outputs, and relative links that lead from the root instead of the notebook's folder.
"""
import json
import os
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from addresses import badges, read_settings

from imaginet_nb.core import repo_root, write_text
from imaginet_nb.reporting.published import PAPER_ITEMS, PaperItem
from imaginet_nb.reporting.tables import markdown_table, read_table

MAP_START, MAP_END = "<!-- map: written by `make prepare` -->", "<!-- end of map -->"


def relink(
    markdown: str,
    folder: str, # that the links start from, seen from the new place, such as "nbs"
) -> str:
    "The text with relative links and pictures rewritten; fenced code, anchors and web addresses stay."
    def moved(match: re.Match[str]) -> str:
        target = match[2]
        if re.match(r"[a-z]+:|[#/]", target): return match[0]
        return match[1] + posixpath.normpath(posixpath.join(folder, target)) + match[3]
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(\]\()([^)\s]+)(\))", moved, parts[i])
        parts[i] = re.sub(r"((?:src|href)=\")([^\"]+)(\")", moved, parts[i])
    return "".join(parts)


def output_text(output: Mapping[str, Any]) -> str:
    "One output of a cell in Markdown; empty for a picture, which a README cannot show."
    data = output.get("data", {})
    if "text/markdown" in data: return "".join(data["text/markdown"]).strip()
    plain = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
    return f"```text\n{plain}\n```" if plain and not any(kind.startswith("image/") for kind in data) else ""


def cell_markdown(cell: Mapping[str, Any]) -> list[str]:
    "Parts of the README that one cell gives: none if it is hidden, outputs only after `#| echo: false`."
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown": return [source]
    directives = {re.sub(r"\s+", "", line[2:]) for line in source.splitlines() if line.startswith("#|")}
    if directives & {"hide", "default_exp"} or cell["cell_type"] != "code": return []
    code = "\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip()
    shown = [f"```python\n{code}\n```"] if code and "echo:false" not in directives else []
    results = [text for output in cell.get("outputs", []) if (text := output_text(output))]
    if "echo:false" in directives and not results:
        raise ValueError(f"cell `{code[:40]}` has no output that a README can show: run the notebook, then `make prepare`")
    return [*shown, *results]


def render_readme(
    notebook: Path, # nbs/index.ipynb
    root: Path, # folder of the README
) -> str:
    "The README that a notebook stands for."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    folder = Path(os.path.relpath(notebook.resolve().parent, root.resolve())).as_posix()
    parts = [relink(part, folder) for cell in cells for part in cell_markdown(cell) if part]
    marks = badges(read_settings(root))
    if marks: parts[0] = parts[0].replace("\n\n", f"\n\n{marks}\n\n", 1) # below the title
    return "\n\n".join([f"<!-- rendered from {folder}/{notebook.name} by `make prepare`; edit that notebook -->", *parts]) + "\n"


def state(
    report: Path, # reports/<profile>
    item: PaperItem,
) -> str: # yes, or why not
    "Whether an item is in a report."
    files = [*(report/"tables"/f"{stem}.csv" for stem in item.tables), *(report/"figures"/f"{stem}.png" for stem in item.figures)]
    if not files: return "–"
    if not all(file.is_file() for file in files): return "not run"
    tables = [read_table(report/"tables"/stem) for stem in item.tables]
    notes = [note for table in tables for note in (table["note"] if "note" in table else [""]*len(table))]
    return "not run: " + notes[0].removeprefix("not run: ") if notes and all(n.startswith("not run") for n in notes) else "yes"


def items_map(
    report: Path, # reports/<profile>
) -> str: # Markdown
    "Every item of the paper: its files, its notebook, and whether this report has it."
    def files(item: PaperItem) -> str:
        return " ".join([*(f"`tables/{stem}`" for stem in item.tables), *(f"`figures/{stem}`" for stem in item.figures)])
    rows = [(item.item, item.title, files(item) or item.remark, f"`imaginet notebook {item.notebook}`" if item.notebook else "",
             state(report, item)) for item in PAPER_ITEMS]
    return markdown_table(pd.DataFrame(rows, columns=["item", "shows", "files", "made by", f"in {report.name}"], dtype=str))


def render_map(
    text: str, # of reports/README.md
    report: Path, # reports/<profile>
) -> str:
    "The text with a new map of items between its two marks. Raises `ValueError` if they are missing."
    before, start, rest = text.partition(MAP_START)
    _, end, after = rest.partition(MAP_END)
    if not start or not end: raise ValueError(f"no place for the map: the lines {MAP_START} and {MAP_END} are needed")
    return f"{before}{MAP_START}\n\n{items_map(report)}\n\n{MAP_END}{after}"


def render_documents(
    root: Path, # folder that holds nbs/index.ipynb and reports/README.md
) -> None:
    "Write README.md, and the map of the committed demo into reports/README.md."
    reports = root/"reports"/"README.md"
    write_text(render_readme(root/"nbs"/"index.ipynb", root), root/"README.md")
    write_text(render_map(reports.read_text(encoding="utf-8"), root/"reports"/"demo"), reports)


if __name__ == "__main__": render_documents(repo_root())
