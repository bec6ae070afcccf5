"""Sphinx settings for the site that `make docs` builds. The site loads nothing from the network, so it can be read offline."""
import gc
import html
import json
import posixpath
import re
from configparser import ConfigParser
from functools import cache
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from furo.navigation import get_navigation_tree
from sphinx.environment.adapters.toctree import TocTree
from sphinx.search.en import SearchEnglish

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
def first_menu(app):
    "The menu as the first page has it."
    options = dict(collapse=False, titles_only=True, maxdepth=-1, includehidden=True)
    return get_navigation_tree(app.builder.render_partial(TocTree(app.env).get_toctree_for("index", app.builder, **options))["fragment"])


def lines_that_hold(lines, page):
    "Numbers of the lines of a menu that open what holds a page, and of its own."
    opened, found = [], []
    for number, line in enumerate(lines):
        opened += [number]*len(re.findall("<(?:li|ul)[ >]", line))
        if f'href="{page}"' in line: found += opened
        closed = len(re.findall("</(?:li|ul)>", line))
        if closed: del opened[-closed:]
    return set(found)


def menu_of(page, menu):
    "The menu of the first page as another page has it: the addresses from there, and what holds the page unfolded."
    lines = menu.splitlines()
    for number in lines_that_hold(lines, page):
        own = f'href="{page}"' in lines[number]
        line = re.sub(r'class="(toctree-l\d)', r'class="\1 current', lines[number])
        line = re.sub(r'<input (aria-label="[^"]*")', r'<input \1 checked=""', line)
        if own: line = re.sub(r'(<li class="[^"]*)', r"\1 current-page", line).replace('class="reference', 'class="current reference')
        lines[number] = line if own else line.replace("<ul>", '<ul class="current">')
    def address(match): return f'href="{"#" if match[1] == page else relative(match[1], posixpath.dirname(page))}"'
    return re.sub(r'href="([^"#:]+)"', address, "\n".join(lines))


relative = cache(posixpath.relpath) # pages of one folder have the same addresses


def leave_out_menu(app, pagename, templatename, context, doctree):
    "The menu holds all pages, on every page: the theme would make it anew for each, half of the time of a build."
    context.pop("toctree", None)


def write_menu(app, pagename, templatename, context, doctree):
    context["furo_navigation_tree"] = menu_of(app.builder.get_target_uri(pagename), first_menu(app))


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
    app.connect("html-page-context", leave_out_menu, priority=400) # before the theme asks for it
    app.connect("html-page-context", write_menu, priority=600)
    app.connect("html-page-context", add_excerpts)
    app.connect("build-finished", write_excerpts)
    app.add_html_math_renderer("mathml", mathml(block=False), mathml(block=True))


html_math_renderer = "mathml"
gc.set_threshold(200_000, 50, 100) # a tree of a page has many nodes: a seventh of a build was the search for cycles among them
SearchEnglish.stem = cache(SearchEnglish.stem) # for all pages: Sphinx remembers the stems of one page alone, and a stem takes long
