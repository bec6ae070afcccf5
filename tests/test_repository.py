"""Rules of the house that no single notebook can check."""
import ast
import json
import re
import subprocess
from pathlib import Path

import pytest
from render_documents import render_readme

import imaginet_nb
from imaginet_nb.apps.pipeline import notebook_parameters
from imaginet_nb.core import load_profile, repo_root

ROOT = repo_root()
LIBRARY = [*sorted((ROOT/"nbs").glob("[0-9]*.ipynb")), *sorted((ROOT/"nbs").glob("[0-9]*/[0-9]*.ipynb"))] # in reading order
PIPELINES = sorted((ROOT/"nbs"/"pipelines").glob("p*.ipynb"))


def cells(path: Path, kind: str = "code") -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def module_of(path: Path) -> str:
    found = [m[1] for cell in cells(path) if (m := re.match(r"#\| default_exp (\S+)", cell))]
    assert len(found) == 1, f"{path.name}: needs exactly one default_exp, found {found}"
    return found[0]


def file_of(module: str) -> Path: return ROOT/"imaginet_nb"/f"{module.replace('.', '/')}.py"


def imports(module: str) -> list[tuple[str, str]]:
    "Module and name of everything that a module imports from the library, inside functions too."
    found, package = [], ["imaginet_nb", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(file_of(module).read_text())):
        if not isinstance(node, ast.ImportFrom): continue
        start = package[:len(package) + 1 - node.level] if node.level else []
        parts = [*start, *(node.module or "").split(".")]
        if parts[0] == "imaginet_nb": found += [(".".join(parts[1:]), alias.name) for alias in node.names]
    return found


def test_every_notebook_has_a_module_of_its_name_and_no_module_is_an_orphan():
    modules = [module_of(p) for p in LIBRARY]
    assert modules == [".".join(part.split("_", 1)[1] for part in p.relative_to(ROOT/"nbs").with_suffix("").parts) for p in LIBRARY]
    exported = {p for p in (ROOT/"imaginet_nb").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")}
    assert exported == {file_of(module) for module in modules}


def test_imports_run_down_the_chapters():
    "A module imports only from earlier chapters and, within its own, from notebooks with lower numbers."
    order = [module_of(p) for p in LIBRARY]
    for row, module in enumerate(order):
        upward = {name for name, _ in imports(module)} - set(order[:row])
        assert not upward, f"{module} imports {upward}, which come after it"


def test_no_module_imports_a_private_name_of_another():
    private = [(module, name) for module in map(module_of, LIBRARY) for source, name in imports(module) if name.startswith("_")]
    assert not private, private


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_exported_cells_are_short(path):
    for cell in cells(path):
        assert not (cell.startswith("#| export") and len(cell.splitlines()) > 41), f"over 40 lines: {cell[:80]}"


def used_names(tree: ast.AST) -> set[str]:
    "Names that code reads: not those that it imports, assigns, annotates with, or only mentions in a text."
    class Reader(ast.NodeVisitor):
        def __init__(self): self.names: set[str] = set()
        def visit_Name(self, node: ast.Name): self.names |= {node.id} if isinstance(node.ctx, ast.Load) else set()
        def visit_Attribute(self, node: ast.Attribute):
            self.names.add(node.attr)
            self.visit(node.value)
        def visit_arg(self, node: ast.arg): pass
        def visit_AnnAssign(self, node: ast.AnnAssign):
            if node.value: self.visit(node.value)
        def visit_ClassDef(self, node: ast.ClassDef):
            for part in node.body: # the type of a field of a class is read when the class is made
                if isinstance(part, ast.AnnAssign): self.visit(part.annotation)
            self.generic_visit(node)
        def visit_FunctionDef(self, node: ast.FunctionDef):
            for part in (node.args, *node.body, *node.decorator_list): self.visit(part)
    reader = Reader()
    reader.visit(tree)
    return reader.names


def untried(exported: list[str], in_the_open: list[str]) -> set[str]:
    "Public functions and classes that no open cell runs, neither by name nor through a definition that it runs."
    nodes = [node for cell in exported for node in ast.parse(cell).body]
    definitions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    commands = {name for name, node in definitions.items() if any("command" in used_names(d) for d in node.decorator_list)}
    tables = {target.id: node for node in nodes if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)}
    tables |= {node.target.id: node for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    open_trees = [ast.parse(re.sub(r"^[%!].*$", "", cell, flags=re.M)) for cell in in_the_open]
    waiting = set().union(*map(used_names, open_trees), commands) # tests/test_cli.py runs the commands
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in reached: continue
        reached.add(name)
        if name in tables: waiting |= used_names(tables[name])
        if name in definitions: waiting |= used_names(definitions[name])
    bases = {name: set().union(*map(used_names, getattr(node, "bases", []))) for name, node in definitions.items()}
    interfaces = {name for name in definitions if "Protocol" in bases[name]}
    return {name for name in definitions if not name.startswith("_")} - reached - interfaces # which cannot be run


def test_a_mention_is_no_trial():
    exported = ["def a(): return b()", "def b(): return 1", "def c():\n    'As `a`.'\n    return c",
                "class Base: pass\nclass Made(Base): pass"]
    assert untried(exported, ["a() # and c, Made"]) == {"c", "Base", "Made"}
    assert untried(exported, ["from here import c, Made", "x: Made = 'a'", "'c'"]) == {"a", "b", "c", "Base", "Made"}
    assert untried(exported, ["c(); Made()", "module.a()"]) == set()
    assert untried([*exported, "TABLE = [a]"], ["c, Made"]) == {"a", "b"}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_every_public_name_is_tried_in_the_open(path):
    "A public function or class is run by a cell that neither exports nor hides."
    exported = [c for c in cells(path) if c.startswith("#| export")]
    missing = untried(exported, [c for c in cells(path) if not c.startswith(("#| export", "#| hide"))])
    assert not missing, f"{path.stem}: no open cell runs {', '.join(sorted(missing))}"


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: p.stem)
def test_pipeline_notebooks_are_templates(path):
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code": continue
        source = "".join(cell["source"])
        assert not cell["outputs"], f"committed with outputs: {source[:60]}"
        assert "#|" not in source, "papermill ignores nbdev directives"
        own = path.stem != "p95_benchmark" and re.search(r"^def |= lambda ", source, re.M)
        assert not own, f"functions belong in the library: {source[:60]}"
        assert not source.endswith("\nfigure"), "a bare figure is shown as text: show_figure"
    assert notebook["cells"][1]["metadata"].get("tags") == ["parameters"]
    assert notebook["metadata"]["kernelspec"]["language"] == "python"
    later = "\n".join(cells(path)[1:])
    for name, default in notebook_parameters(path).items():
        assert re.search(rf"\b{name}\b", later), f"parameter {name} is not read"
        assert name != "profile" or default == "smoke"


def test_pipeline_notebooks_and_rules_match():
    rules = set(re.findall(r"^rule (p\w+):", (ROOT/"Snakefile").read_text(), flags=re.M))
    assert rules | {"p95_benchmark"} == {p.stem for p in PIPELINES} # the benchmark is `make bench`, no part of the paper


@pytest.mark.parametrize("path", sorted((ROOT/"profiles").glob("*.yaml")), ids=lambda p: p.stem)
def test_profiles_load(path):
    assert load_profile(path.stem).about


@pytest.mark.parametrize("path", [*LIBRARY, *sorted((ROOT/"nbs"/"tutorials").glob("*.ipynb"))], ids=lambda p: p.stem)
def test_stored_outputs_are_quiet(path):
    "No temporary folder, no warning, no progress bar, and what a cell prints stands in one piece."
    for cell in json.loads(path.read_text())["cells"]:
        outputs = cell.get("outputs", [])
        assert not re.search(r"/tmp/|ipykernel_\d|Warning:|jupyter.widget-view", json.dumps(outputs)), cell["id"]
        streams = [o["name"] for o in outputs if o["output_type"] == "stream"]
        assert "stderr" not in streams and len(streams) < 2, f"{cell['id']}: {streams}"


def test_nothing_committed_names_a_folder_of_the_machine_that_made_it():
    words = ["git", "ls-files", "*.ipynb", "*.md", "*.html", "*.json"]
    for name in subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.splitlines():
        text = (ROOT/name).read_text()
        assert "site-packages" not in text and str(ROOT) not in text, name


def test_no_committed_report_loads_anything_from_elsewhere():
    pages = sorted((ROOT/"reports").glob("*/index.html"))
    elsewhere = re.compile(r'<(?:script|img|iframe|link|source)\b[^>]*\b(?:src|href)="(?:https?:)?//|\bimport\("https?:')
    assert pages
    for page in pages: assert not elsewhere.search(page.read_text(encoding="utf-8")), page


def test_readme_is_rendered_from_the_index():
    assert (ROOT/"README.md").read_text() == render_readme(ROOT/"nbs"/"index.ipynb", ROOT), "run `make prepare`"


def test_links_and_commands_of_the_readme_exist():
    text = (ROOT/"README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (ROOT/link).exists(), f"README links to {link}, which is not there"
    targets = re.findall(r"^([a-z-]+):", (ROOT/"Makefile").read_text(), flags=re.M)
    for target in re.findall(r"make ([a-z-]+)", text): assert target in targets, f"README names make {target}"


def test_version_is_written_once():
    assert f"version = {imaginet_nb.__version__}\n" in (ROOT/"settings.ini").read_text()
