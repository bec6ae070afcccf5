"""Sphinx settings for the site that `make docs` builds. The site loads nothing from the network, so it can be read offline."""
import html
import json
import re
from configparser import ConfigParser
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).resolve().parents[1]/"settings.ini", encoding="utf-8")
project, release = settings["DEFAULT"]["lib_name"], settings["DEFAULT"]["version"]
copyright = settings["DEFAULT"]["copyright"]  # noqa: A001
html_show_search_summary = False # docs/static/search.js shows excerpts that need no server
html_static_path, html_css_files = ["static"], ["site.css"]
html_title = f"{project} {release}"
html_theme, html_show_sphinx, html_copy_source, html_show_sourcelink = "furo", False, False, False
extensions = ["myst_nb"]
exclude_patterns = ["reports/*/tables/*.md", "reports/audit/[a-z]*.md"] # tables, which the pages link to as files
nb_execution_mode = "off"                  # outputs are those of the notebooks
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing", "myst.header", "mystnb.unknown_mime_type"] # tests/test_site.py follows every link of the result


def mathml(block):
    "Formulas as MathML, which browsers display natively; Sphinx's default loads a script from the network."
    def visit(translator, node):
        formula = re.sub(r"\\[bB]ig+[lr]?(?![a-z])", "", node.astext()) # the converter does not support bracket sizes
        translator.body.append(tex2mathml(formula, as_block=block))
        raise nodes.SkipNode
    return visit, None


def add_excerpts(app, pagename, templatename, context, doctree):
    "Only the search page loads the texts of all pages."
    if pagename == "search":
        for name in ("excerpts.js", "search.js"): app.add_js_file(name, loading_method="defer") # after Sphinx's own scripts


@cache
def titles(app):
    "The table of contents of each page, without the headings below its title, which the menu does not show."
    tocs = {name: toc.deepcopy() for name, toc in app.env.tocs.items()}
    for entry in (entry for toc in tocs.values() for entry in toc if len(entry) > 1):
        below = list(entry.findall(addnodes.toctree))
        if below: entry[1][:] = below
        else: entry.pop(1)
    return tocs


def write_menu_from_titles(app, pagename, templatename, context, doctree):
    "Every page has a menu of all pages. By default, Sphinx copies all headings of the site to each, in half of the build time."
    whole = context["toctree"]
    def menu(**options):
        everything, app.env.tocs = app.env.tocs, titles(app)
        try: return whole(**options)
        finally: app.env.tocs = everything
    context["toctree"] = menu


def text_of(page):
    "The text of a finished page, without markup and the anchors of headings."
    article = re.search(r"<article[^>]*>(.*)</article>", page, re.S)
    text = re.sub(r'<(script|style|math|svg)\b.*?</\1>|<a class="headerlink".*?</a>', " ", article[1] if article else "", flags=re.S)
    text = re.sub(r"</?(span|a|code|em|strong)\b[^>]*>", "", text) # these occur inside words
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def write_excerpts(app, exception):
    "The text of every page, for the search; the first 40,000 characters of a long one."
    if exception or app.builder.name != "html": return
    pages = {name: Path(app.outdir)/f"{name}.html" for name in sorted(app.env.found_docs)}
    texts = {name: text_of(path.read_text(encoding="utf-8"))[:40_000] for name, path in pages.items() if path.is_file()}
    content = f"const EXCERPTS = {json.dumps(texts, ensure_ascii=False)};\n"
    (Path(app.outdir)/"_static"/"excerpts.js").write_text(content, encoding="utf-8")


def setup(app):
    app.connect("html-page-context", write_menu_from_titles, priority=400) # before the theme asks for the menu
    app.connect("html-page-context", add_excerpts)
    app.connect("build-finished", write_excerpts)
    app.add_html_math_renderer("mathml", mathml(block=False), mathml(block=True))


html_math_renderer = "mathml"
