"""Whether the repository can be released: what `make release-check` runs, after the list in CONTRIBUTING.md.

    python tools/release_check.py                      # everything
    python tools/release_check.py tree versions links  # some of it

Each check is a function of the repository's folder that gives its problems in sentences, each with its remedy.
"""
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import mlcroissant
import yaml
from addresses import citation, read_settings, zenodo
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image
from render_documents import render_readme

from imaginet_nb.apps.cards import validate_card
from imaginet_nb.audit.croissant import write_croissant
from imaginet_nb.audit.report import audit_source, list_findings, list_tables
from imaginet_nb.core import repo_root
from imaginet_nb.data.sandbox import make_sandbox

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "data/README.md", "reports/README.md")


def committed(root: Path, *patterns: str) -> list[Path]:
    "Files that git knows."
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=root, check=True, capture_output=True, text=True).stdout
    return [root/name for name in listed.split("\0") if name]


def check_tree(root: Path) -> list[str]:
    "Everything is committed."
    status = subprocess.run(["git", "status", "--porcelain"], cwd=root, check=True, capture_output=True, text=True).stdout
    return [f"not committed: {line[3:]}" for line in status.splitlines()]


def check_address(root: Path) -> list[str]:
    "The addresses are real; those of a person count as well."
    settings, remedy = read_settings(root), "is a placeholder; put your own, then `make prepare`"
    hosts = {name: urlsplit(settings[name]).hostname or "" for name in ("git_url", "doc_host")}
    hosts["author_email"] = settings["author_email"].rpartition("@")[2]
    return [f"settings.ini: {name} {settings[name]} {remedy}" for name, host in hosts.items() if host.endswith("example")]


def check_versions(root: Path) -> list[str]:
    "Settings, changelog and citation name one version, and nothing is left under Unreleased."
    version = read_settings(root)["version"]
    headings = re.findall(r"^## (.+)$", (root/"CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    cited = yaml.safe_load((root/"CITATION.cff").read_text(encoding="utf-8"))["version"]
    problems = []
    if not headings or not re.fullmatch(rf"{re.escape(version)}, \d{{4}}-\d\d-\d\d", headings[0]):
        problems.append(f"CHANGELOG.md: the first heading has to be `## {version}, YYYY-MM-DD`, the version of settings.ini")
    if cited != version: problems.append(f"CITATION.cff: version {cited}, but settings.ini has {version}; run `make prepare`")
    return problems


def check_files(root: Path) -> list[str]:
    "What is made from settings.ini and the index is up to date."
    cited = (root/"CITATION.cff").read_text(encoding="utf-8")
    wanted = {"CITATION.cff": citation(cited, read_settings(root), (root/"CHANGELOG.md").read_text(encoding="utf-8")),
              ".zenodo.json": zenodo(cited), "README.md": render_readme(root/"nbs"/"index.ipynb", root)}
    return [f"{name}: out of date; run `make prepare`" for name, text in wanted.items() if (root/name).read_text(encoding="utf-8") != text]


def check_cards(root: Path) -> list[str]:
    "Committed cards have valid front matter."
    problems = []
    for path in committed(root, "reports/*_card.md"):
        kind = DatasetCard if path.stem == "data_card" else ModelCard
        try: validate_card(kind(path.read_text(encoding="utf-8")))
        except ValueError as error: problems.append(f"{path.relative_to(root)}: {error}; write it again with `imaginet cards`")
    return problems


def image_size(
    path: Path,
) -> tuple[int, int]: # width, height in pixels
    "Size of an image by its header."
    with Image.open(path) as image: return image.size


def check_croissant(root: Path) -> list[str]:
    "The Croissant file of a small sandbox is valid, and its records and pixels can be read."
    with tempfile.TemporaryDirectory() as folder:
        make_sandbox(Path(folder)/"sandbox", images=80, sides=(40, 48), decoder_steps=1)
        source = audit_source(Path(folder)/"sandbox")
        data = mlcroissant.Dataset(write_croissant(source, list_findings(source, list_tables(source)), folder))
        records = list(data.records("images"))
        problems = [f"Croissant: {error}" for error in data.metadata.issues.errors]
        if len(records) != len(source.manifest): problems.append(f"Croissant: {len(records)} records of {len(source.manifest)} images")
        images = [record for record in data.records("pixels") if record["pixels/path"]]
        sizes = {record["pixels/path"].decode(): record["pixels/image"].size for record in images}
        if sizes != {path: image_size(Path(folder)/"sandbox"/path) for path in source.manifest["path"]}:
            problems.append(f"Croissant: the pixels of {len(sizes)} images are not those of {len(source.manifest)} listed files")
        if not data.metadata.data_biases: problems.append("Croissant: the audit's findings are missing")
    return problems


def answers(url: str) -> bool:
    "Whether a server has something at an address. Raises `OSError` if no server answers."
    request = urllib.request.Request(url, headers={"User-Agent": "imaginet_nb release check"})
    try:
        with urllib.request.urlopen(request, timeout=30): return True
    except urllib.error.HTTPError as error: return error.code not in (404, 410) # others forbid machines, and are there


def check_links(
    root: Path,
    alive: Callable[[str], bool] = answers, # whether an address answers
) -> list[str]:
    "Links of the documents lead to files that are committed, or to addresses that answer."
    problems, known = [], {path.relative_to(root).as_posix() for path in committed(root)}
    folders = {parent.as_posix() for name in known for parent in Path(name).parents}
    for path in (root/name for name in DOCUMENTS if (root/name).is_file()):
        for link in sorted(set(re.findall(r"\]\(([^)\s#]+)[^)]*\)", path.read_text(encoding="utf-8")))):
            if link.startswith(("http://", "https://")):
                try: lives = alive(link)
                except OSError as error:
                    problems.append(f"{path.relative_to(root)}: {link} did not answer ({error}); check the network and run it again")
                    continue
            else:
                target = (path.parent/link).resolve()
                lives = target.is_relative_to(root.resolve()) and target.relative_to(root.resolve()).as_posix() in known | folders
            if not lives: problems.append(f"{path.relative_to(root)}: {link} leads nowhere")
    return problems


def passes(*command: str) -> Callable[[Path], list[str]]:
    "A check that is a command of its own."
    def check(root: Path) -> list[str]:
        return [] if subprocess.run(command, cwd=root).returncode == 0 else [f"`{' '.join(command)}` failed; see its output above"]
    return check


CHECKS: dict[str, Callable[[Path], list[str]]] = { # the quick ones first
    "tree": check_tree, "address": check_address, "versions": check_versions, "files": check_files, "cards": check_cards,
    "links": check_links, "croissant": check_croissant, "wheel": passes(sys.executable, "-m", "pytest", "-q", "tests/test_wheel.py"),
    "site": passes("make", "docs"), "tests": passes("make", "test")}


def release_check(
    root: Path,
    names: list[str], # of `CHECKS`; empty = all
) -> int: # number of checks that failed
    "Run checks and print what each found. Raises `ValueError` for an unknown name."
    if unknown := sorted(set(names) - CHECKS.keys()): raise ValueError(f"no check {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    failed = 0
    for name in names or CHECKS:
        problems = CHECKS[name](root)
        print(f"{'FAILED' if problems else 'ok':<7} {name}", *(f"        {problem}" for problem in problems), sep="\n", flush=True)
        failed += bool(problems)
    return failed


if __name__ == "__main__": sys.exit(1 if release_check(repo_root(), sys.argv[1:]) else 0)
