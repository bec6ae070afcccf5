"""`tools/render_documents.py`: README.md from its notebook, and the table of paper items in reports/README.md."""
import json
import re
import subprocess

import pandas as pd
import pytest
from render_documents import MAP_END, MAP_START, items_map, relink, render_documents, render_map, render_readme, state

from imaginet_nb.core import repo_root
from imaginet_nb.reporting.published import PaperItem
from imaginet_nb.reporting.tables import save_table


def _notebook(path, *cells):
    path.parent.mkdir(exist_ok=True)
    content = [{"cell_type": kind, "source": source.splitlines(keepends=True), "outputs": outputs} for kind, source, outputs in cells]
    path.write_text(json.dumps({"cells": content}), encoding="utf-8")
    return path


def test_readme_rewrites_links_of_the_notebook_folder(tmp_path):
    source = ("# T\n\n[a](01_data/01_manifest.ipynb) [b](pipelines/p05_data.ipynb#x) ![c](../reports/demo/c.png) <img src=\"../d.png\">\n"
              "[e](https://e.org/x) [f](#f)\n\n```sh\nls [g](../g)\n```")
    text = render_readme(_notebook(tmp_path/"nbs"/"index.ipynb", ("markdown", source, [])), tmp_path)
    for link in ("[a](nbs/01_data/01_manifest.ipynb)", "[b](nbs/pipelines/p05_data.ipynb#x)", "![c](reports/demo/c.png)",
                 "<img src=\"d.png\">", "[e](https://e.org/x)", "[f](#f)", "ls [g](../g)"): assert link in text, link
    assert text.startswith("<!-- rendered from nbs/index.ipynb by `make prepare`") and text.count("<!--") == 1


def test_readme_takes_outputs_and_code_as_marked(tmp_path):
    shown = [{"output_type": "display_data", "data": {"text/markdown": ["| m |\n", "|---|\n"], "text/plain": ["<Markdown>"]}}]
    plain = [{"output_type": "execute_result", "data": {"text/plain": ["42"]}}]
    path = _notebook(tmp_path/"nbs"/"index.ipynb", ("code", "#| hide\nsecret", plain[:0]), ("code", "#| echo: false\nquiet", shown),
                     ("code", "6*7", plain))
    text = render_readme(path, tmp_path)
    assert "secret" not in text and "quiet" not in text and "<Markdown>" not in text and "| m |\n|---|" in text
    assert "```python\n6*7\n```" in text and "42" in text
    with pytest.raises(ValueError, match="run the notebook"):
        render_readme(_notebook(tmp_path/"nbs"/"index.ipynb", ("code", "#| echo: false\nquiet", [])), tmp_path)


def test_readme_shows_what_a_reader_needs(tmp_path):
    (tmp_path/"nbs").mkdir()
    cells = [("markdown", "# A\n\n![p](../reports/p.png) [q](https://q.r/s) <img src=\"../x.png\">\n\n```sh\n[not](a link)\n```", []),
             ("code", "#| hide\nimport secret", []), ("code", "#| default_exp index", []),
             ("code", "1 + 1", [{"data": {"text/plain": ["2"]}}]),
             ("code", "#| echo: false\nshow()", [
                 {"data": {"text/html": "<b>", "text/markdown": ["| [t](../reports/t.csv) |"], "text/plain": "x"}}]),
             ("code", "picture", [{"data": {"image/png": "AAAA", "text/plain": "<Figure>"}}]),
             ("code", "print(3)", [{"name": "stdout", "text": ["3\n"]}])]
    notebook = tmp_path/"nbs"/"index.ipynb"
    notebook.write_text(json.dumps({"cells": [
        dict(cell_type=kind, source=source.splitlines(keepends=True), outputs=outputs) for kind, source, outputs in cells]}))
    text = render_readme(notebook, tmp_path)
    for wanted in ("![p](reports/p.png)", "(https://q.r/s)", '<img src="x.png">', "[not](a link)",
                   "```python\n1 + 1\n```\n\n```text\n2\n```", "| [t](reports/t.csv) |", "```text\n3\n```"): assert wanted in text, wanted
    for hidden in ("secret", "default_exp", "show()", "<b>", "<Figure>", "#|"): assert hidden not in text, hidden
    assert render_readme(notebook, tmp_path) == text


def test_relative_links_are_rewritten_outside_code():
    assert relink("![a](../reports/a.png) [b](00_core.ipynb#x) [c](https://d.e) [f](#g)", "nbs") == \
        "![a](reports/a.png) [b](nbs/00_core.ipynb#x) [c](https://d.e) [f](#g)"
    assert relink("```\n[a](b)\n```", "nbs") == "```\n[a](b)\n```"


# map of reports

@pytest.fixture
def report(tmp_path):
    "A report with one table that was run and one that was not."
    scores = pd.DataFrame(dict(detector="SelfCon (ours)", group=["GAN", "SD"], acc=[0.9, 0.7], note=""))
    save_table(scores, tmp_path/"reports"/"demo"/"tables"/"detection_by_family", "Made-up scores.")
    save_table(scores.assign(acc=None, note="not run: set not supplied"), tmp_path/"reports"/"demo"/"tables"/"corvi", "Nothing.")
    return tmp_path/"reports"/"demo"


def test_the_map_says_what_was_run_and_why_not(report):
    item = PaperItem("Table 3", "Detection", "p50_detection", ("detection_by_family",))
    assert state(report, item) == "yes"
    assert state(report, item._replace(tables=("none",))) == "not run"
    assert state(report, item._replace(tables=("corvi",))) == "not run: set not supplied"
    assert state(report, PaperItem("Figure 1", "Prompts")) == "–"
    assert "| `imaginet notebook p63_speed`" in items_map(report)


def test_the_map_is_put_between_its_marks(report):
    once = render_map(f"above\n{MAP_START}old{MAP_END}\nbelow", report)
    assert render_map(once, report) == once
    assert once.startswith("above\n") and once.endswith("\nbelow") and "old" not in once
    with pytest.raises(ValueError, match="no place for the map"): render_map("nothing", report)


def test_both_documents_are_written(report):
    root = report.parents[1]
    notebook = _notebook(root/"nbs"/"index.ipynb", ("markdown", "# A", []))
    (root/"reports"/"README.md").write_text(f"{MAP_START}{MAP_END}")
    render_documents(root)
    assert (root/"README.md").read_text() == render_readme(notebook, root)
    assert (root/"reports"/"README.md").read_text() == render_map(f"{MAP_START}{MAP_END}", report)


def test_the_picture_of_the_readme_has_as_many_images_as_its_text_says():
    record = json.loads((repo_root()/"reports"/"demo"/"figures"/"umap_family.provenance.json").read_text(encoding="utf-8"))
    n = re.search(r"([\d,]+) test images", record["caption"])[1]
    assert f"![Features of the detector for {n} test images" in (repo_root()/"README.md").read_text(encoding="utf-8")


def test_the_results_of_the_readme_are_those_of_the_committed_table():
    "The stored output of the index is as old as its last run. Both texts are those in git: a run on another processor gives other numbers."
    def committed(name: str) -> list[str]:
        return subprocess.run(["git", "show", f":{name}"], cwd=repo_root(), capture_output=True, check=True).stdout.decode().splitlines()
    table, shown = committed("reports/demo/tables/detection_by_family.md"), committed("README.md")
    means = [line for line in table if "| Mean " in line]
    assert means and [line for line in shown if "| Mean " in line] == means
    told = [line for line in table if line.startswith(("ACC: ", "AUC: "))]
    assert told and [line for line in shown if line.startswith(("ACC: ", "AUC: "))] == told
