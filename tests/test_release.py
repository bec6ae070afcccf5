"""What a published repository is known by: citation, archive, cards, CI, containers, launch links; each by its own schema or library."""
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path
from unittest.mock import patch

import jsonschema
import pytest
import release_check
import yaml
from addresses import badges, citation, launch_links, read_settings, with_launch_cells, write_addresses, zenodo
from huggingface_hub import DatasetCard, ModelCard
from packaging.requirements import Requirement
from render_documents import render_readme

from imaginet_nb.apps.cards import validate_card
from imaginet_nb.apps.info import EXTRAS
from imaginet_nb.audit.croissant import IMAGINET, write_croissant
from imaginet_nb.audit.files import container_format
from imaginet_nb.audit.report import audit_source, list_findings, list_tables
from imaginet_nb.core import published_address, repo_root

ROOT = repo_root()
LISTS = Path(os.environ.get("IMAGINET_ANNOTATIONS") or ROOT.parent/"shared"/"annotations")
ADDRESS = "https://github.com/someone/imaginet_nb"
AUTHOR = ("-c", "user.name=a", "-c", "user.email=a@b.example") # of a commit in a test


def schema(name: str) -> dict:
    "A schema that check-jsonschema carries."
    folder = resources.files("check_jsonschema")/"builtin_schemas"/"vendor"
    return json.loads((folder/f"{name}.json").read_text(encoding="utf-8"))


def text(value):
    "What YAML reads, as JSON has it: a date is a text, and the key `on` is no truth value."
    if isinstance(value, dict): return {"on" if key is True else key: text(part) for key, part in value.items()}
    if isinstance(value, list): return [text(part) for part in value]
    return value.isoformat() if isinstance(value, datetime.date) else value


def check(content, name: str) -> None: jsonschema.validate(text(content), schema(name))


@pytest.fixture
def published(tmp_path) -> Path:
    "A copy of what addresses are written into, with a real address in its settings."
    for name in ("settings.ini", "CITATION.cff", "CHANGELOG.md", "nbs/index.ipynb", "nbs/tutorials/score_my_pictures.ipynb"):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_bytes((ROOT/name).read_bytes())
    tutorial = tmp_path/"nbs"/"tutorials"/"score_my_pictures.ipynb" # a published copy may already have the address below
    bare = with_launch_cells(json.loads(tutorial.read_text(encoding="utf-8")), {}, "")
    tutorial.write_text(json.dumps(bare, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    settings = (ROOT/"settings.ini").read_text(encoding="utf-8")
    settings = re.sub(r"^git_url = .*$", f"git_url = {ADDRESS}/", settings, flags=re.M) # a slash at the end does no harm
    settings = re.sub(r"^author_email = .*$", "author_email = someone@there.org", settings, flags=re.M)
    (tmp_path/"settings.ini").write_text(re.sub(r"^doc_host = .*$", "doc_host = https://someone.github.io", settings, flags=re.M))
    (tmp_path/"reports"/"demo").mkdir(parents=True)
    (tmp_path/"reports"/"demo"/"data_card.md").write_text("# Data card\n\nCode: imaginet_nb.\n\nText.\n")
    return tmp_path


# addresses

def test_with_placeholders_nothing_leads_anywhere():
    "As long as the committed address is a placeholder, it is in no file but settings.ini, and there is no badge and no launch link."
    settings = read_settings(ROOT)
    if published_address(settings["git_url"]): pytest.skip("published: the address is real")
    assert badges(settings) == launch_links(settings, "nbs/tutorials/score_my_pictures.ipynb") == ""
    for name in ("README.md", "CITATION.cff", ".zenodo.json", "reports/demo/data_card.md", "reports/demo/model_card.md",
                 *(p.relative_to(ROOT) for p in (ROOT/"nbs"/"tutorials").glob("*.ipynb"))):
        content = (ROOT/name).read_text(encoding="utf-8")
        assert settings["git_url"] not in content and settings["doc_host"] not in content, name
        assert not re.search(r"mybinder|colab\.research|badge\.svg", content), name


def test_committed_files_follow_from_the_settings():
    "Catches a version, a description or an address that was changed in settings.ini without `make prepare`."
    cited = (ROOT/"CITATION.cff").read_text(encoding="utf-8")
    assert cited == citation(cited, read_settings(ROOT), (ROOT/"CHANGELOG.md").read_text(encoding="utf-8")), "run `make prepare`"
    assert (ROOT/".zenodo.json").read_text(encoding="utf-8") == zenodo(cited), "run `make prepare`"
    for path in sorted((ROOT/"nbs"/"tutorials").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        assert notebook == with_launch_cells(notebook, read_settings(ROOT), path.relative_to(ROOT).as_posix()), "run `make prepare`"


def test_a_real_address_is_written_everywhere_and_a_placeholder_takes_it_away(published):
    tutorial = published/"nbs"/"tutorials"/"score_my_pictures.ipynb"
    before = {path: path.read_bytes() for path in (tutorial, published/"CITATION.cff", published/"reports"/"demo"/"data_card.md")}
    write_addresses(published)
    cited = yaml.safe_load((published/"CITATION.cff").read_text())
    check(cited, "citation-file-format")
    assert cited["repository-code"] == ADDRESS
    assert ADDRESS in {item["identifier"] for item in json.loads((published/".zenodo.json").read_text())["related_identifiers"]}
    assert f"Code: [imaginet_nb]({ADDRESS}).\n" in (published/"reports"/"demo"/"data_card.md").read_text()
    cells = ["".join(cell["source"]) for cell in json.loads(tutorial.read_text())["cells"]]
    assert cells[0].startswith("# ") and "/github/someone/imaginet_nb/blob/main/nbs/tutorials/score_my_pictures.ipynb)" in cells[1]
    readme = render_readme(published/"nbs"/"index.ipynb", published)
    assert f"# imaginet_nb\n\n[![tests]({ADDRESS}/actions/workflows/test.yml/badge.svg)]" in readme
    assert "(https://someone.github.io/imaginet_nb)\n\n> Detect" in readme
    again = tutorial.read_bytes()
    write_addresses(published) # a second time changes nothing
    assert tutorial.read_bytes() == again != before[tutorial]
    (published/"settings.ini").write_bytes((ROOT/"settings.ini").read_bytes())
    if published_address(read_settings(ROOT)["git_url"]): return
    write_addresses(published)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_badges_name_workflows_that_are_there(published):
    for name in re.findall(r"workflows/([\w.]+)\)", badges(read_settings(published))): assert (ROOT/".github"/"workflows"/name).is_file()


def test_another_host_has_its_address_and_no_github_links(published):
    settings = dict(read_settings(published)) | {"git_url": "https://code.org/someone/imaginet_nb"}
    assert badges(settings) == launch_links(settings, "nbs/x.ipynb") == ""
    cited = citation((ROOT/"CITATION.cff").read_text(), settings, "## 9.9.9, 2030-01-02\n")
    assert yaml.safe_load(cited)["repository-code"] == settings["git_url"] and yaml.safe_load(cited)["date-released"] == "2030-01-02"


@pytest.mark.parametrize("installed", [True, False])
def test_the_first_cell_of_a_tutorial_installs_what_is_missing(published, installed):
    path = published/"nbs"/"tutorials"/"score_my_pictures.ipynb"
    cells = with_launch_cells(json.loads(path.read_text()), read_settings(published), "nbs/tutorials/score_my_pictures.ipynb")["cells"]
    with patch("importlib.util.find_spec", lambda name: installed or None), patch("subprocess.run") as run:
        exec("".join(cells[2]["source"]), {})
    wanted = [sys.executable, "-m", "pip", "install", "--quiet", f"git+{ADDRESS}@main"]
    assert [call.args[0] for call in run.call_args_list] == [wanted]*(not installed)


# formats

def test_citation_is_valid():
    cited = yaml.safe_load((ROOT/"CITATION.cff").read_text(encoding="utf-8"))
    check(cited, "citation-file-format")
    with pytest.raises(jsonschema.ValidationError): check(cited | {"authors": []}, "citation-file-format")
    assert cited["version"] == read_settings(ROOT)["version"]


def test_archive_record_has_what_it_needs():
    record = json.loads((ROOT/".zenodo.json").read_text(encoding="utf-8"))
    assert record["upload_type"] == "software" and record["license"] == "Apache-2.0" and record["creators"] and record["description"]


@pytest.mark.parametrize("path", sorted((ROOT/".github"/"workflows").glob("*.yml")), ids=lambda p: p.stem)
def test_workflows_are_valid_and_run_what_everybody_runs(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    check(workflow, "github-workflows")
    for job in workflow["jobs"].values():
        for command in (step["run"] for step in job["steps"] if "run" in step):
            if command.startswith("make "): subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True)
            else: assert (ROOT/command).is_file() and os.access(ROOT/command, os.X_OK), command


def test_ci_covers_the_oldest_and_the_newest_python():
    workflow = yaml.safe_load((ROOT/".github"/"workflows"/"test.yml").read_text(encoding="utf-8"))
    versions = read_settings(ROOT)["pythons"].split()
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == [versions[0], versions[-1]]


@pytest.mark.parametrize("path", sorted((ROOT/".github"/"ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem)
def test_issue_forms_are_valid(path): check(yaml.safe_load(path.read_text(encoding="utf-8")), "github-issue-forms")


def test_containers_use_the_lock():
    "The dev container runs `make setup`; Binder installs the lock of `make setup` (tests/test_wheel.py runs its last step)."
    container = json.loads((ROOT/".devcontainer"/"devcontainer.json").read_text(encoding="utf-8"))
    program, *words = container["postCreateCommand"].split()
    subprocess.run([program, "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)
    pythons = read_settings(ROOT)["pythons"].split()
    assert container["image"].removeprefix("python:") in pythons
    assert (ROOT/"binder"/"runtime.txt").read_text().strip().removeprefix("python-") in pythons
    wanted = [line for line in (ROOT/"binder"/"requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert wanted == ["-r ../requirements.lock"] and (ROOT/"requirements.lock").is_file()


@pytest.mark.parametrize("uv", [True, False], ids=["uv", "pip"])
def test_setup_uses_uv_where_it_is_installed_and_pip_elsewhere(tmp_path, uv):
    "Stand-ins for both programs write down how `make setup` calls them."
    if not uv and shutil.which("uv", path="/usr/bin:/bin"): pytest.skip("this system has uv beside make")
    for name in ("Makefile", "settings.ini", "requirements.lock", "setup.py", "pyproject.toml"):
        (tmp_path/name).write_bytes((ROOT/name).read_bytes())
    programs = tmp_path/"programs"
    programs.mkdir()
    script = f'#!/bin/sh\necho "$(basename $0) $*" >> {tmp_path}/calls\n'
    venv = f'if [ "$2" = venv ]; then mkdir -p .venv/bin && cp {programs}/python3 .venv/bin/python; fi\n'
    for name in ["python3", "uv"][:1 + uv]:
        (programs/name).write_text(script + venv)
        (programs/name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin"}
    subprocess.run(["make", "setup"], cwd=tmp_path, check=True, capture_output=True, env=environment)
    subprocess.run(["make", "setup"], cwd=tmp_path, check=True, capture_output=True, env=environment) # nothing is left to do
    calls = (tmp_path/"calls").read_text().splitlines()[1:] # the first asks for the version
    installer = "python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile"
    if uv: installer = "uv pip install --python .venv/bin/python --no-deps --quiet"
    assert calls == ["python3 -m venv .venv", f"{installer} -r requirements.lock", f"{installer} --no-build-isolation -e .",
                     "python -m pip check", "python -m ipykernel install --sys-prefix --name imaginet_nb --display-name imaginet_nb"]


@pytest.mark.parametrize("kind, card", [("data", DatasetCard), ("model", ModelCard)], ids=["data", "model"])
@pytest.mark.parametrize("report", ["demo", "gpu"])
def test_committed_cards_are_read_by_their_library(report, kind, card):
    loaded = card((ROOT/"reports"/report/f"{kind}_card.md").read_text(encoding="utf-8"))
    validate_card(loaded)
    assert loaded.data.license and "synthetic-image-detection" in loaded.data.tags
    if kind == "model":
        assert loaded.data.pipeline_tag == "image-classification" and loaded.data.library_name == "imaginet_nb"
        assert all(0 <= result.metric_value <= 1 and result.dataset_name for result in loaded.data.eval_results)


# Croissant

def test_croissant_of_the_sandbox_is_valid_and_its_records_can_be_iterated(): assert release_check.check_croissant(ROOT) == []


@pytest.mark.skipif(not (LISTS/"test_annotations.txt").is_file(),
                    reason=f"the authors' annotation lists are not there ({LISTS}); set IMAGINET_ANNOTATIONS to their folder")
def test_croissant_of_imaginet_is_made_from_its_lists(tmp_path):
    """The findings of the audit of the published lists are its biases; nothing of the folder of the lists is named.

    Of each label and file format every twentieth image: shares stay exact, and tests/test_audit.py audits all 40,000."""
    source = audit_source(LISTS/"test_annotations.txt")
    nth = source.manifest.groupby([source.manifest["origin"], container_format(source.manifest["path"])]).cumcount()
    source = replace(source, manifest=source.manifest[nth % 20 == 0].reset_index(drop=True))
    assert len(source.manifest) == 2000
    findings = list_findings(source, list_tables(source))
    source = replace(source, manifest=source.manifest.head(100)) # mlcroissant takes long for many records
    written = write_croissant(source, findings, tmp_path)
    import mlcroissant  # takes seconds, for this test alone
    data = mlcroissant.Dataset(written)
    assert not data.metadata.issues.errors and data.metadata.name == IMAGINET.name and data.metadata.url == IMAGINET.url
    assert any("0.788" in sentence for sentence in data.metadata.data_biases)
    assert str(LISTS) not in written.read_text()
    assert [record["images/path"].decode() for record in data.records("images")] == source.manifest["path"].tolist()


# info

def test_info_names_every_extra_with_its_packages():
    "Catches an extra that was added to settings.ini alone."
    fields = {key.removesuffix("_requirements"): value for key, value in read_settings(ROOT).items() if key.endswith("_requirements")}
    wanted = {name: {Requirement(word).name for word in words.split()} for name, words in fields.items() if name != "dev"}
    assert {name: set(packages) for name, (packages, _) in EXTRAS.items()} == wanted


# release check

@pytest.fixture
def clone(published) -> Path:
    "A small repository that is ready: everything made from its settings, one link, a dated version, all committed."
    version = read_settings(published)["version"]
    (published/"CHANGELOG.md").write_text(f"# Changelog\n\n## {version}, 2026-11-27\n\n[citation](CITATION.cff) [far](https://there.org)\n")
    write_addresses(published)
    (published/"README.md").write_text(render_readme(published/"nbs"/"index.ipynb", published))
    (published/"reports"/"demo"/"data_card.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# Card\n")
    for words in (["init", "--quiet"], ["add", "-A"], [*AUTHOR, "commit", "--quiet", "-m", "a"]):
        subprocess.run(["git", *words], cwd=published, check=True)
    return published


def test_a_repository_that_is_ready_passes(clone):
    for name in ("tree", "address", "versions", "files", "cards"): assert release_check.CHECKS[name](clone) == [], name
    (clone/"README.md").unlink() # its links lead to chapters that this small copy lacks
    assert release_check.check_links(clone, alive=lambda url: url == "https://there.org") == []


def test_each_check_finds_what_is_wrong(clone):
    (clone/"README.md").unlink()
    assert release_check.check_links(clone, alive=lambda url: False) == ["CHANGELOG.md: https://there.org leads nowhere"]
    def silent(url): raise OSError("no route")
    assert "https://there.org did not answer (no route); check the network" in release_check.check_links(clone, alive=silent)[0]
    (clone/"CONTRIBUTING.md").write_text("[a](none.md) [b](nbs) [c](../outside)")
    found = release_check.check_links(clone, alive=lambda url: True)
    assert found == ["CONTRIBUTING.md: ../outside leads nowhere", "CONTRIBUTING.md: none.md leads nowhere"]
    assert "not committed: CONTRIBUTING.md" in release_check.check_tree(clone)
    (clone/"README.md").write_text("edited")
    assert release_check.check_files(clone) == ["README.md: out of date; run `make prepare`"]
    (clone/"reports"/"demo"/"data_card.md").write_text("---\ntags: [a]\n---\n")
    assert "names no license" in release_check.check_cards(clone)[0]
    (clone/"CHANGELOG.md").write_text("# Changelog\n\n## Unreleased\n\n## 0.0.1, 2020-01-01\n")
    settings = (clone/"settings.ini").read_text().replace("version = ", "version = 9.")
    (clone/"settings.ini").write_text(settings.replace(ADDRESS, "https://nowhere.example"))
    first, second = release_check.check_versions(clone)
    assert "the first heading has to be `## 9." in first and "CITATION.cff: version" in second
    assert "is a placeholder" in release_check.check_address(clone)[0]
    (clone/"settings.ini").write_bytes((ROOT/"settings.ini").read_bytes())
    if not published_address(read_settings(ROOT)["git_url"]): # also the site of the badge, which a reader would follow
        assert [problem.split()[1] for problem in release_check.check_address(clone)] == ["git_url", "doc_host", "author_email"]


def test_a_failed_check_is_counted_and_an_unknown_one_refused(clone, capsys):
    (clone/"more").touch()
    assert release_check.release_check(clone, ["tree", "address"]) == 1
    assert capsys.readouterr().out == "FAILED  tree\n        not committed: more\nok      address\n"
    with pytest.raises(ValueError, match="there are tree, address"): release_check.release_check(clone, ["trees"])
    assert release_check.passes("false")(clone) == ["`false` failed; see its output above"] and release_check.passes("true")(clone) == []


@pytest.mark.parametrize("name", [".gitconfig", "nbs/.last_checked"])
def test_the_hooks_of_a_clone_leave_its_tree_clean(name):
    "Catches a release check that fails on what nbdev's hooks write: the merge driver, and the time of the last merge."
    assert subprocess.run(["git", "check-ignore", "--quiet", name], cwd=ROOT).returncode == 0


def test_make_release_check_runs_the_named_checks():
    words = ["make", "--dry-run", "release-check", "CHECKS=tree links"]
    shown = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "tools/release_check.py tree links" in shown.stdout
    assert all(name in (ROOT/"CONTRIBUTING.md").read_text() for name in ("make release-check", "tree", "versions", "links"))
