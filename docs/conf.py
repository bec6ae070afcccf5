"""Settings of Sphinx for the site that `make docs` builds. Nothing on it is fetched from elsewhere: it is read offline."""
import re
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).resolve().parents[1]/"settings.ini", encoding="utf-8")
project, release = settings["DEFAULT"]["lib_name"], settings["DEFAULT"]["version"]
copyright = settings["DEFAULT"]["copyright"]  # noqa: A001
html_show_search_summary = False # a summary would be fetched from the page, which browsers refuse for files without a server
html_title = f"{project} {release}"
html_theme, html_show_sphinx, html_copy_source, html_show_sourcelink = "furo", False, False, False
extensions = ["myst_nb"]
exclude_patterns = ["reports/*/tables/*.md", "reports/audit/[a-z]*.md"] # tables, which pages offer as files
nb_execution_mode = "off"                  # outputs are those of the notebooks
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing", "myst.header", "mystnb.unknown_mime_type"] # tests/test_site.py follows every link of the result


def mathml(block):
    "Formulas as MathML, which browsers show by themselves; Sphinx's own way loads a script from the network."
    def visit(translator, node):
        formula = re.sub(r"\\[bB]ig+[lr]?(?![a-z])", "", node.astext()) # the converter does not know sizes of brackets
        translator.body.append(tex2mathml(formula, as_block=block))
        raise nodes.SkipNode
    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", mathml(block=False), mathml(block=True))


html_math_renderer = "mathml"
