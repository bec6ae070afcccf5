"""Writes what settings.ini says about the repository into the files that other services read.

    python tools/addresses.py     # from the root of the repository; `make prepare` runs it

`user`, `git_url` and `version` stand in settings.ini alone. They go to CITATION.cff, .zenodo.json, the badges of the README
(`tools/render_documents.py` calls `badges`), the launch links of the tutorials and the cards of the reports. While `git_url` is a
placeholder, badges, links and the citation's `repository-code` are left out: nothing may lead to an address that is not ours.
"""
import json
import re
from collections.abc import Mapping
from configparser import ConfigParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import yaml

from imaginet_nb.apps.cards import code_line
from imaginet_nb.core import published_address, repo_root, write_text

LINKS_ID, INSTALL_ID = "ad0b1e55", "ad0b1e56" # of the cells that are written into tutorials
INSTALL = """#| hide
# a hosted notebook has no clone: install the package from the repository
import importlib.util

if importlib.util.find_spec("imaginet_nb") is None:
    import subprocess
    import sys
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "git+{url}@{branch}"], check=True)"""


def read_settings(
    root: Path, # folder of settings.ini
) -> Mapping[str, str]: # empty where there is none
    "The fields of settings.ini."
    parser = ConfigParser(delimiters=["="])
    parser.read(root/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def github(
    settings: Mapping[str, str],
) -> str | None: # owner/name
    "The repository as GitHub, Colab and Binder name it; None for a placeholder or another host, which have no badges and launch links."
    url = published_address(settings.get("git_url", ""))
    return urlsplit(url).path.strip("/") if url and urlsplit(url).hostname == "github.com" else None


def launch_links(
    settings: Mapping[str, str],
    notebook: str, # relative to the repository
) -> str: # Markdown; empty without an address
    "Links that start a notebook without an installation."
    name = github(settings)
    if name is None: return ""
    places = {"Colab": f"https://colab.research.google.com/github/{name}/blob/{settings['branch']}/{notebook}",
              "Binder": f"https://mybinder.org/v2/gh/{name}/{settings['branch']}?labpath={quote(notebook, safe='')}",
              "Codespaces": f"https://codespaces.new/{name}"}
    return "Start this notebook in " + ", ".join(f"[{place}]({url})" for place, url in places.items()) + "."


def badges(
    settings: Mapping[str, str],
) -> str: # Markdown; empty without an address
    "State of the tests and of the site."
    name = github(settings)
    if name is None: return ""
    runs = f"https://github.com/{name}/actions/workflows"
    return (f"[![tests]({runs}/test.yml/badge.svg)]({runs}/test.yml) "
            f"[![documentation]({runs}/docs.yml/badge.svg)]({settings['doc_host']}{settings['doc_baseurl']})")


def with_launch_cells(
    notebook: Mapping[str, Any], # content of a tutorial
    settings: Mapping[str, str],
    path: str, # of the notebook, relative to the repository
) -> dict[str, Any]: # with both cells after its title, or with neither
    "A tutorial with its launch links and a cell that installs the package where it is missing."
    cells = [cell for cell in notebook["cells"] if cell["id"] not in (LINKS_ID, INSTALL_ID)]
    links = launch_links(settings, path)
    if not links: return {**notebook, "cells": cells}
    source = INSTALL.format(url=published_address(settings["git_url"]), branch=settings["branch"])
    install = dict(cell_type="code", execution_count=None, id=INSTALL_ID, metadata={}, outputs=[], source=source.splitlines(keepends=True))
    return {**notebook, "cells": [cells[0], dict(cell_type="markdown", id=LINKS_ID, metadata={}, source=[links]), install, *cells[1:]]}


def citation(
    text: str, # of CITATION.cff
    settings: Mapping[str, str],
    changelog: str, # its newest heading with a date is the release
) -> str:
    "CITATION.cff with version, date and address; authors and the paper stay as they are written there."
    fields = {key: value for key, value in yaml.safe_load(text).items() if key != "repository-code"}
    fields |= dict(version=settings["version"], abstract=settings["description"], keywords=settings["keywords"].split())
    released = re.search(r"^## [^,\n]+, (\d{4}-\d\d-\d\d)$", changelog, flags=re.M)
    if released: fields["date-released"] = released[1]
    url = published_address(settings["git_url"])
    if url: fields["repository-code"] = url
    dated = {key: str(value) for key, value in fields.items() if key == "date-released"} # a date that YAML read is no text
    return yaml.safe_dump(fields | dated, sort_keys=False, allow_unicode=True, width=1000)


def zenodo(
    cited: str, # text of CITATION.cff
) -> str: # JSON
    "What an archive of a release says about it, from CITATION.cff."
    fields = yaml.safe_load(cited)
    paper = fields["preferred-citation"]
    related = [dict(identifier=paper["url"], relation="isSupplementTo", resource_type="publication-article")]
    if "repository-code" in fields:
        related.append(dict(identifier=fields["repository-code"], relation="isIdenticalTo", resource_type="software"))
    creators = [dict(name=author.get("name") or f"{author['family-names']}, {author['given-names']}") for author in fields["authors"]]
    record = dict(title=fields["title"], upload_type="software", description=fields["abstract"], creators=creators,
                  version=fields["version"], license=fields["license"], keywords=fields["keywords"], access_right="open",
                  related_identifiers=related)
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def write_addresses(
    root: Path, # folder of settings.ini
) -> None:
    "Write everything that follows from settings.ini but the README."
    settings = read_settings(root)
    cited = citation((root/"CITATION.cff").read_text(encoding="utf-8"), settings, (root/"CHANGELOG.md").read_text(encoding="utf-8"))
    texts = {root/"CITATION.cff": cited, root/".zenodo.json": zenodo(cited)}
    for path in sorted((root/"nbs"/"tutorials").glob("*.ipynb")):
        notebook = with_launch_cells(json.loads(path.read_text(encoding="utf-8")), settings, path.relative_to(root).as_posix())
        texts[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    line = code_line(published_address(settings["git_url"]))
    for path in sorted((root/"reports").glob("*/*_card.md")):
        texts[path] = re.sub(r"^Code: .*$", lambda _: line, path.read_text(encoding="utf-8"), flags=re.M)
    for path, text in texts.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text: write_text(text, path)


if __name__ == "__main__": write_addresses(repo_root())
