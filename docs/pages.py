"""Gathers the pages of the site: every notebook, the documents of the repository, and an API page for each module.

    python docs/pages.py FOLDER     # then: sphinx-build -c docs FOLDER OUT; `make docs` does both

The folder has the layout of the repository, so relative links work. API pages are made from the source text: the signature,
the docstring and the comment after each parameter. The library is not imported for them.
"""
import ast
import copy
import csv
import io
import itertools
import json
import os
import re
import shutil
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import click
import typer

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("data/README.md", "reports/README.md", "reports/published/README.md", "reports/audit/README.md", "reports/demo/README.md",
             "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "reports/demo/data_card.md", "reports/demo/model_card.md")
FILES = ("reports/**/*.csv", "reports/**/*.tex", "reports/**/*.md", "reports/**/*.json", "reports/**/*.html",
         "reports/**/*.png", "reports/**/*.pdf",
         "data/*.csv", "profiles/*.yaml", "LICENSE", "Snakefile", "Makefile") # what the pages show or link to
TUTORIALS = ("00_imaginet_in_one_sitting", "score_my_pictures", "score_my_detector", "bring_my_data_set", "change_things",
             "many_machines", "make_it_fast", "paper_and_code", "what_is_fitted_on_what") # in reading order; a new one comes last
UNWANTED = ("checkpoints", "predictions", "manifests", "notebooks", "logs") # parts of a report that the site leaves out
KEPT_REPORTS = (("demo",), ("audit",), ("published",), ("benchmark",), ("README.md",))
PRIVATE = re.compile(r"^#\|\s*(hide|default_exp)\b", re.M)


def notebooks(pattern: str) -> list[Path]:
    "Notebooks of the repository, except the one from which the README is made."
    return [p for p in sorted((ROOT/"nbs").glob(pattern)) if p.name != "index.ipynb"]


def library() -> list[Path]:
    "Notebooks that export a module, in reading order."
    return [*notebooks("[0-9]*.ipynb"), *notebooks("[0-9]*/[0-9]*.ipynb")]


def module_of(notebook: Path) -> str:
    "The module that a library notebook exports, such as data.manifest: folder and file name without their numbers."
    return ".".join(part.partition("_")[2] for part in notebook.relative_to(ROOT/"nbs").with_suffix("").parts)


def title_and_question(notebook: Path) -> tuple[str, str]:
    "The heading of a notebook, and the sentence below it that says what it is about."
    lines = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"]).splitlines()
    question = next((line for line in lines if line.startswith("> ")), "")
    return lines[0].removeprefix("# "), question.removeprefix("> ")


def chapters() -> dict[str, str]:
    "Folder of a chapter -> its description in the table of the README."
    rows = re.findall(r"^\| \[\w+\]\(nbs/(\d\d_\w+)\) \| (.+) \|$", (ROOT/"README.md").read_text(encoding="utf-8"), re.M)
    return dict(rows)


def number_of(notebook: Path) -> str:
    "Number of the chapter and of the notebook in it: 3.1 for nbs/03_training/01_processes.ipynb."
    return ".".join(str(int(part[:2])) for part in notebook.relative_to(ROOT/"nbs").parts)


def shown_cell(cell: dict) -> dict | None:
    "A cell as the site shows it: without directives, and without outputs that need a kernel or a network."
    source = "".join(cell["source"])
    if PRIVATE.search(source): return None
    hidden = re.search(r"^#\|\s*echo:\s*false", source, re.M)
    cell = {**cell, "source": "\n".join(line for line in source.splitlines() if not line.startswith("#|")),
            "metadata": {"tags": ["remove-input"]} if hidden else {}}
    if cell["cell_type"] == "code":
        keep = [o for o in cell["outputs"] if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})]
        cell["outputs"] = [o for o in keep if o.get("name") != "stderr"]
    return cell


def copy_notebook(path: Path, target: Path) -> None:
    "Copy a notebook to the site; for a pipeline notebook, the copy that `make reproduce` has executed, if there is one."
    executed = ROOT/"reports"/"demo"/"notebooks"/path.name
    notebook = json.loads((executed if executed.is_file() else path).read_text(encoding="utf-8"))
    cells = [shown for cell in notebook["cells"] if (shown := shown_cell(cell))]
    if path.parent.name == "pipelines" and not executed.is_file():
        note = "*Not part of the demo: shown without results.*"
        cells.insert(1, {"cell_type": "markdown", "id": "not-run", "metadata": {}, "source": note})
    if path in library():
        page = os.path.relpath(ROOT/"api"/f"{module_of(path)}.md", path.parent)
        names = f"API of this module: [`imaginet_nb.{module_of(path)}`]({page})."
        cells.insert(1, {"cell_type": "markdown", "id": "names", "metadata": {}, "source": names})
    metadata = {k: v for k, v in notebook["metadata"].items() if k in ("kernelspec", "language_info")}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**notebook, "cells": cells, "metadata": metadata}), encoding="utf-8")


def comments_of(source: str) -> dict[int, str]:
    "Line number -> the comment at the end of the line."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT and t.line[:t.start[1]].strip()}


def parameters(function: ast.FunctionDef, comments: dict[int, str]) -> Iterator[tuple[str, str, str]]:
    "Name, type and comment of each parameter, then of the result."
    given = function.args
    for arg in [*given.posonlyargs, *given.args, *filter(None, [given.vararg]), *given.kwonlyargs, *filter(None, [given.kwarg])]:
        if arg.arg in ("self", "cls"): continue
        beside = "" if arg.lineno == function.lineno else comments.get(arg.lineno, "")
        yield arg.arg, ast.unparse(arg.annotation) if arg.annotation else "", beside
    if function.returns and ast.unparse(function.returns) != "None":
        yield "returns", ast.unparse(function.returns), comments.get(function.returns.lineno, "")


def signature(function: ast.FunctionDef) -> str:
    "Parameters and defaults; the types are in the table."
    arguments = copy.deepcopy(function.args)
    for arg in ast.walk(arguments):
        if isinstance(arg, ast.arg): arg.annotation = None
    return f"({re.sub(r'^self(, )?', '', ast.unparse(arguments))})"


def table(rows: list[tuple[str, str, str]]) -> list[str]:
    "Name, type and meaning as a Markdown table; nothing if there are no rows."
    def safe(text: str) -> str: # Markdown syntax has to be escaped only outside code
        parts = text.replace("|", r"\|").split("`")
        return "`".join(re.sub(r"([<*])", r"\\\1", part) if i % 2 == 0 else part for i, part in enumerate(parts))
    def code(text: str) -> str: return f"`{text}`".replace("|", r"\|") if text else ""
    lines = [f"| {code(name)} | {code(kind)} | {safe(comment)} |" for name, kind, comment in rows]
    return ["| | | |", "|---|---|---|", *lines, ""] if lines else []


def entry(kind: str, name: str, body: list[str], fence: str = ":::") -> list[str]:
    "A Sphinx directive, so that the name is in the index and can be found by the search."
    return [f"{fence}{{py:{kind}}} {name}", "", *body, fence, ""]


def text_of(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    "The docstring."
    return [ast.get_docstring(node) or "", ""]


def function_entry(node: ast.FunctionDef, comments: dict[int, str], kind: str = "function") -> list[str]:
    "One function or method."
    return entry(kind, node.name + signature(node), [*text_of(node), *table(list(parameters(node, comments)))])


def class_entry(node: ast.ClassDef, comments: dict[int, str]) -> list[str]:
    "One class: its fields, the parameters of its constructor, its methods."
    methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
    fields = [(ast.unparse(f.target), ast.unparse(f.annotation), comments.get(f.lineno, ""))
              for f in node.body if isinstance(f, ast.AnnAssign)]
    body = [*text_of(node), *table(fields)]
    if "__init__" in methods: body += table(list(parameters(methods["__init__"], comments)))
    for name, method in methods.items():
        if not name.startswith("_"): body += function_entry(method, comments, "method")
    return entry("class", node.name + (signature(methods["__init__"]) if "__init__" in methods else ""), body, "::::")


def value_entry(node: ast.Assign | ast.AnnAssign, comments: dict[int, str]) -> tuple[str, list[str]]:
    "One constant, with its value if that is short."
    target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
    value = ast.unparse(node.value) if node.value else ""
    shown = f"`{value}`" if len(value) <= 160 and "`" not in value else ""
    return ast.unparse(target), entry("data", ast.unparse(target), [" ".join(filter(None, [shown, comments.get(node.lineno, "")])), ""])


def api_page(notebook: Path) -> str:
    "All public names of the module that a notebook exports."
    module = module_of(notebook)
    source = (ROOT/"imaginet_nb"/f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    tree, comments = ast.parse(source), comments_of(source)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef): found[node.name] = function_entry(node, comments)
        elif isinstance(node, ast.ClassDef): found[node.name] = class_entry(node, comments)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            name, lines = value_entry(node, comments)
            found[name] = lines
    public = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    link = f"[{notebook.stem}](../{notebook.relative_to(ROOT).as_posix()})"
    head = [f"# imaginet_nb.{module}", "", f"Explained and tested in the notebook {link}.", "",
            f"```{{py:module}} imaginet_nb.{module}", "```", ""]
    return "\n".join([*head, *(line for name in public for line in found.get(name, []))])


def command_page() -> str:
    "The help of every command."
    from imaginet_nb.apps.cli import app
    def helps(command: click.Command, path: str) -> Iterator[str]:
        context = click.Context(command, info_name=path, terminal_width=84, max_content_width=84)
        if path != "imaginet": yield f"## {path}\n"
        yield f"```text\n{command.get_help(context)}\n```\n"
        for name, inner in getattr(command, "commands", {}).items(): yield from helps(inner, f"{path} {name}")
    return "# The command line\n\n" + "\n".join(helps(typer.main.get_command(app), "imaginet"))


def site_markdown(path: Path) -> str:
    "A document for the site. Links within it stay links; a link to a Markdown file that is not a page of the site becomes a download."
    def linked(match: re.Match[str]) -> str:
        text, target = match.groups()
        if target.startswith("#"): return f'<a href="{target}">{text}</a>' # MyST would look for a function of that name
        file, _, anchor = target.partition("#")
        page = os.path.relpath((path.parent/file).resolve(), ROOT)
        if page == "README.md": # the first page of the site; its headings are reached by their names in HTML
            return f'<a href="{os.path.relpath(ROOT/"index.html", path.parent)}{"#" + anchor if anchor else ""}">{text}</a>'
        return f"[{text}](<path:{target}>)" if target.endswith(".md") and page not in DOCUMENTS else match[0]
    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", linked, path.read_text(encoding="utf-8"))


def toctree(pages: list[str], caption: str = "") -> str:
    "A part of the menu; what is below its pages is collapsed."
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["```{toctree}", *options, "", *pages, "```", ""])


def folder_page(title: str, text: str, entries: list[tuple[str, str, str]]) -> str:
    "A page for a folder; `entries` gives the title, the path from here and a sentence for each page in it."
    shown = [f"- [{name}]({path}): {sentence}" if sentence else f"- [{name}]({path})" for name, path, sentence in entries]
    return "\n".join([f"# {title}", "", text, "", *shown, "", toctree([f"{name} <{path}>" for name, path, _ in entries])])


def chapter_page(folder: str, text: str) -> str:
    "The page of a chapter: its subject, and the question that each notebook answers."
    paths = notebooks(f"{folder}/[0-9]*.ipynb")
    entries = [(f"{number_of(path)} {(about := title_and_question(path))[0]}", path.name, about[1]) for path in paths]
    return folder_page(f"{int(folder[:2])} {folder[3:].capitalize()}", text[0].upper() + text[1:] + ".", entries)


def pipeline_page() -> str:
    "The page of the pipeline notebooks; the site shows their executed copies."
    entries = [(title_and_question(path)[0], path.name, "") for path in notebooks("pipelines/p*.ipynb")]
    return folder_page("Demo: executed notebooks", "One notebook per item of the paper, in the order in which they run. "
                       "Each shows the tables and figures that it writes. All numbers are about the sandbox, not about ImagiNet.", entries)


def api_index() -> str:
    "All modules, by package."
    entries = [(module_of(path), f"{module_of(path)}.md", title_and_question(path)[1]) for path in library()]
    return folder_page("API: all public names", "Signatures, types and the comment after each parameter, taken from the source text.",
                       entries)


def benchmark_page() -> str:
    "Times compared with a plain baseline: first the ratios, then the details."
    from imaginet_nb.apps.benchmark import in_words  # with torch: not for the other pages
    tables = ROOT/"reports"/"benchmark"/"tables"
    def rows_of(name: str) -> list[dict[str, str]]: return list(csv.DictReader((tables/f"{name}.csv").open(encoding="utf-8")))
    def time(text: str) -> str: return f"{float(text):,.3g}" if float(text) < 1000 else f"{float(text):,.0f}"
    ratios = [f"| {in_words(row['group'], row['case'])} | {time(row['median'])} | {time(row['baseline_median'])} | {row['unit']} "
              f"| **{float(row['ratio']):.1f}** |" for row in rows_of("ratios")]
    machine = [f"| {row['fact']} | {row['value']} |" for row in rows_of("machine")]
    files = " · ".join(f"[{path.stem}](<path:tables/{path.name}>)" for path in sorted(tables.glob("*.csv")))
    return "\n".join([
        "# Benchmark: every stage compared with a plain baseline", "",
        "How many times faster each stage is than a plain implementation of the same computation, measured on one machine. "
        "`make bench` measures this on yours.", "", "![Ratios to the plain baseline](figures/ratios.png)", "",
        "| stage | time | plain baseline | unit | times as fast |", "|---|---:|---:|---|---:|", *ratios, "",
        "## Inference", "", "![Times of inference](figures/inference.png)", "",
        "## Memory needed for training", "", "![Memory](figures/memory.png)", "",
        "## The machine", "", "| | |", "|---|---|", *machine, "", "## More", "",
        "[How it became faster, step by step](../../nbs/tutorials/make_it_fast.ipynb).", "",
        f"All tables: {files}.", ""])


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def gather(folder: Path) -> None:
    "All pages of the site."
    shutil.rmtree(folder, ignore_errors=True)
    for pattern in FILES:
        for path in ROOT.glob(pattern):
            name = path.relative_to(ROOT)
            if set(name.parts) & set(UNWANTED) or name.parts[1:2] not in KEPT_REPORTS and name.parts[0] == "reports": continue
            (folder/name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder/name)
    documents = [name for name in DOCUMENTS if (ROOT/name).is_file()]
    for name in documents: # the pipeline's pages show the executed copies
        write(folder/name, site_markdown(ROOT/name).replace("](notebooks/", "](../../nbs/pipelines/"))
    groups = notebooks("tutorials/*.ipynb"), library(), notebooks("pipelines/p*.ipynb")
    for path in itertools.chain(*groups): copy_notebook(path, folder/path.relative_to(ROOT))
    for path in library(): write(folder/"api"/f"{module_of(path)}.md", api_page(path))
    about = chapters()
    for name in about: write(folder/"nbs"/name/"index.md", chapter_page(name, about[name]))
    for name, text in (("nbs/pipelines/index.md", pipeline_page()), ("api/index.md", api_index()), ("api/commands.md", command_page()),
                       ("reports/benchmark/README.md", benchmark_page())): write(folder/name, text)
    order = {name: i for i, name in enumerate(TUTORIALS)}
    first, *others = [p.relative_to(ROOT).as_posix() for p in sorted(groups[0], key=lambda p: order.get(p.stem, len(order)))]
    parts = {"Start here": [first],
             "Results": ["Demo: tables and figures <reports/demo/README.md>", "nbs/pipelines/index.md",
                         "Benchmark: times <reports/benchmark/README.md>", "Audit of ImagiNet's lists <reports/audit/README.md>",
                         "Published numbers <reports/published/README.md>", "reports/demo/model_card.md", "reports/demo/data_card.md",
                         "Files of each paper item <reports/README.md>"],
             "Tutorials": others,
             "Library": ["0 Core <nbs/00_core.ipynb>", *(f"nbs/{name}/index.md" for name in about)],
             "Reference": ["api/index.md", "api/commands.md", "data/README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md",
                           "genindex"]}
    # on the site, each folder of notebooks has its own page
    readme = (ROOT/"README.md").read_text(encoding="utf-8").replace("](reports/demo/notebooks)", "](nbs/pipelines)")
    readme = re.sub(r"\]\((nbs/\w+)\)", r"](\1/index.md)", readme)
    write(folder/"index.md", readme + "\n" + "\n".join(toctree(pages, caption) for caption, pages in parts.items()))


if __name__ == "__main__": gather(Path(sys.argv[1]))
