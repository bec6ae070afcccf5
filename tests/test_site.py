"""`make docs`: the site is complete, needs no network, and none of its links leads nowhere."""
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from browser import browser, needs_browser
from forks import python

from imaginet_nb.core import repo_root

ROOT = repo_root()


class Page(HTMLParser):
    "What a page links to, what it loads, and the anchors that it offers."
    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], {""}
        # the colours of code, most of the tags of a page, hold neither a link nor an anchor
        self.feed(re.sub(r'<span class="[^"<>]*">|</span>', "", path.read_text(encoding="utf-8")))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"): self.links.append(values["href"])
        if tag == "form" and values.get("action"): self.links.append(values["action"])
        for key in ("src", *(["href"] if tag == "link" else [])):
            if values.get(key): self.loads.append(values[key])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The site, built as `make docs` does; a warning is an error."
    folder = tmp_path_factory.mktemp("site")
    gathered = python("import runpy; runpy.run_path('docs/pages.py', run_name='__main__')", folder/"source", cwd=ROOT)
    assert gathered.returncode == 0, gathered.stderr[-3000:]
    words = ["-m", "sphinx", "-c", "docs", "-q", "-W", "--keep-going", "-j", "2", folder/"source", folder/"site"]
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder/"site"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_notebook_document_and_module_has_a_page(site):
    for notebook in (ROOT/"nbs").rglob("[!.]*.ipynb"):
        if notebook.name != "index.ipynb" and ".ipynb_checkpoints" not in notebook.parts:
            assert (site/notebook.relative_to(ROOT)).with_suffix(".html").is_file(), notebook.name
    for module in (ROOT/"imaginet_nb").rglob("[!_]*.py"):
        name = ".".join(module.relative_to(ROOT/"imaginet_nb").with_suffix("").parts)
        assert (site/"api"/f"{name}.html").is_file(), name
    cards = (f"reports/demo/{page}" for page in ("README", "data_card", "model_card"))
    for name in ("data/README", "reports/README", *cards, "CHANGELOG", "SECURITY"):
        assert (site/f"{name}.html").is_file(), name


@cache
def target_of(folder: Path, link: str) -> Path:
    "The file that the path of a link leads to."
    return (folder/unquote(link)).resolve()


def leads_somewhere(page: Path, link: str, pages: dict[Path, Page]) -> bool:
    "Whether a link leads to a file and, on a page, to an anchor; what is elsewhere is not asked for."
    parts = urlsplit(link)
    if parts.scheme in ("http", "https", "mailto", "data"): return True
    target = target_of(page.parent, parts.path) if parts.path else page
    return (target in pages or target.is_file()) and (target not in pages or unquote(parts.fragment) in pages[target].anchors)


def test_every_page_can_be_reached_from_the_first(site, pages):
    seen, todo = set(), [site/"index.html"]
    while todo:
        page = todo.pop()
        if page in seen or page not in pages: continue
        seen.add(page)
        todo += [target_of(page.parent, urlsplit(link).path) for link in pages[page].links if not urlsplit(link).scheme]
    assert not set(pages) - seen - {site/"py-modindex.html"}


def test_every_internal_link_leads_somewhere(pages):
    "A file that is missing, or a heading that has another name."
    wrong = [f"{page.parent.name}/{page.name}: {link}" for page, content in pages.items() for link in [*content.links, *content.loads]
             if not leads_somewhere(page, link, pages)]
    assert not wrong, "\n".join(wrong[:20])


def test_nothing_is_loaded_from_elsewhere(pages):
    for page, content in pages.items():
        assert not [a for a in content.loads if urlsplit(a).scheme not in ("", "data") or a.startswith("//")], page.name


def test_api_pages_have_names_types_and_meanings(site):
    text = (site/"api"/"training.losses.html").read_text(encoding="utf-8")
    assert 'id="imaginet_nb.training.losses.SelfConLoss"' in text and "divides every similarity" in text
    assert "imaginet data sandbox" in (site/"api"/"commands.html").read_text(encoding="utf-8")


def test_the_menu_begins_with_the_first_tutorial_then_the_results_and_folds_the_library(site):
    menu = (site/"index.html").read_text(encoding="utf-8").partition('class="sidebar-tree"')[2].partition("</nav>")[0]
    captions = re.findall(r'class="caption-text">([^<]+)<', menu)
    assert captions == ["Start here", "Results", "Tutorials", "Library", "Reference"]
    places = [menu.index(name) for name in ("00_imaginet_in_one_sitting.html", "reports/demo/README.html", "nbs/01_data/index.html",
                                            "api/index.html")]
    assert places == sorted(places)
    shown = re.findall(r'<li class="toctree-l1[^"]*">', menu)
    assert len(shown) < 45 < menu.count("<li "), "pages of a chapter are folded away below it"


def test_the_first_page_of_the_benchmark_leads_with_the_ratios(site):
    page = (site/"reports"/"benchmark"/"README.html").read_text(encoding="utf-8").partition("<article")[2]
    assert page.index("ratios.png") < page.index("<table") < page.index("inference.png")
    assert not re.search(r"\d\.\d{4}", page.partition("</table>")[0]), "three digits say enough of a time"
    assert "loading, stage 1 (packed)" in page and "loader_stage1" not in page and "loader stage1" not in page


@needs_browser
def test_code_is_not_cut_off_and_no_page_is_wider_than_its_window(site):
    for width in (1300, 420):
        with browser(width) as window:
            window.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
            for name in ("index", "nbs/03_training/00_losses", "nbs/pipelines/p50_detection", "reports/benchmark/README"):
                window.open((site/f"{name}.html").as_uri())
                assert window.ask(f"document.documentElement.scrollWidth <= {width}"), f"{name} at {width}"
                cut = window.ask("[...document.querySelectorAll('.cell_input pre, article > div pre')]"
                                 ".filter(p => p.scrollWidth > p.clientWidth + 1).length")
                assert not cut, f"{name} at {width}: {cut} blocks of code are wider than the page"


@needs_browser
def test_in_a_browser_every_page_opens_without_an_error_and_the_search_finds(site, pages, tmp_path):
    "Scripts run, nothing is asked from the network, and a search in the site's own index has results."
    with browser(height=100) as window: # nobody looks: what is not in sight is not painted
        for page in pages:
            window.open(page.as_uri())
            assert not window.errors, f"{page.name}: {window.errors}"
            assert window.ask("document.title && document.body.innerText.length > 50"), page.name
        window.open((site/"search.html").as_uri() + "?q=SelfConLoss")
        found = window.until("[...document.querySelectorAll('#search-results li a')].map(a => a.href).join(' ')")
        window.until("/finished/i.test(document.querySelector('#search-results p')?.innerText)") # what would be fetched is fetched by now
        assert "api/training.losses.html" in found
        pages_found = [address.partition("#")[0] for address in window.ask(
            "[...document.querySelectorAll('#search-results li a')].map(a => a.href).join(' ')").split()]
        assert len(pages_found) == len(set(pages_found)) > 2, "a page is found twice"
        excerpts = window.ask("[...document.querySelectorAll('#search-results .context')].map(p => p.innerText)")
        assert len(excerpts) == len(pages_found) and all("selfconloss" in text.lower() for text in excerpts)
        elsewhere = [address for address in window.requests if not address.startswith(("file:", "data:", "about:", "blob:"))]
        assert not elsewhere and not window.errors, (elsewhere, window.errors)
