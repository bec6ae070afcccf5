"""What the documents say is true: their commands run, their links lead somewhere, the tests that they name exist."""
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import click
import forks
import numpy as np
import pytest
import torch
import typer
from render_documents import render_map

from imaginet_nb.apps.cli import app
from imaginet_nb.apps.pipeline import check_parameters
from imaginet_nb.core import load_profile, repo_root, seed_everything
from imaginet_nb.data.images import save
from imaginet_nb.models.checkpoints import save_checkpoint
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier
from imaginet_nb.training.stages import STAGES

ROOT = repo_root()
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
PAGES = [ROOT/name for name in ("README.md", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md", "data/README.md", "reports/README.md")]
PAGES += [ROOT/"reports"/name for name in ("audit/README.md", "published/README.md")]
PAGES += [ROOT/"reports"/"demo"/f"{name}.md" for name in ("README", "data_card", "model_card")]
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and p.name != "index.ipynb")


def text_of(path: Path) -> str:
    "A page, or the Markdown of a notebook."
    if path.suffix == ".md": return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def blocks(path: Path, *languages: str) -> list[str]:
    "Fenced blocks of a language."
    return [body for language, body in re.findall(r"^```(\w+)\n(.*?)^```", text_of(path), flags=re.M | re.S) if language in languages]


def commands(path: Path) -> list[str]:
    "Every command of a page's shell blocks."
    lines = "\n".join(blocks(path, "sh", "bash", "shell", "console")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


# every command that a document shows is executed in a folder with the files that it names, except these, which are parsed
PARSED_ONLY = {
    "make reproduce": "ten minutes; tests/test_pipeline.py runs the smaller profile, tests/test_look_alike.py the paper's way",
    "make test": "this very test is part of it",
    "make release-check": "builds the site and runs all tests; tests/test_release.py runs its checks",
    "make setup": "gigabytes; tests/test_release.py runs its steps with stand-ins for pip and uv",
    ".venv/bin/": "hooks of this clone, and tests that are run anyhow",
    "imaginet data download": "144 GB; tests/test_look_alike.py fetches, unpacks, verifies a look-alike of it",
    "imaginet data unpack": "see download",
    "imaginet data verify": "see download",
    "imaginet data sandbox": "a minute; tests/test_cli.py and tests/test_wheel.py make a smaller one",
    "papermill nbs/pipelines": "needs the predictions of a whole run; tests/test_pipeline.py runs one by hand",
    "accelerate launch": "eight GPUs; tests/test_distributed.py launches two processes",
    "srun bash -c": "a cluster",
    "srun ray symmetric-run": "a cluster",
    "snakemake --profile cluster/slurm": "a cluster; tests/test_distributed.py runs it dry and on this machine",
    "imaginet predict 's3://": "a cluster; tests/test_ray.py runs it with two actors",
    "pip ": "tests/test_wheel.py builds the wheel and installs it",
    "imaginet audit pictures/": "its notebook, which nbdev_test runs, calls the same function on such a folder",
    "imaginet evaluate --root pictures/": "see audit; tests/test_evaluate.py runs the command",
    "imaginet evaluate --manifest list.csv": "see audit; tests/test_evaluate.py runs the command",
    "imaginet predict my_pictures/ --detector hf:": "the hub; tests/test_hub.py loads classifiers from folders and the cache",
    "imaginet predict --detector hf:": "see above",
    "imaginet calibrate --detector model.onnx": "as its notebook; the command of the README is executed",
    "imaginet evaluate --root labelled_pictures": "as its notebook; tests/test_evaluate.py measures calibrations",
    "imaginet predict new_pictures": "see above; its notebook scores with a calibration",
    "imaginet evaluate --root my_data/ --out measured/ --detector A": "A and B stand for two; tests/test_evaluate.py compares detectors",
    "imaginet evaluate --root genimage/": "as its notebook; tests/test_evaluate.py runs the command",
    "imaginet evaluate --root hub/": "see above",
    "imaginet predict --detector spectrum:Spectrum": "its notebook, which nbdev_test runs, calls it with the class that it writes",
}
SHOWN = [(path, line) for path in [*PAGES, *NOTEBOOKS] for line in commands(path)]
IDS = [f"{path.stem}: {line[:60]}" for path, line in SHOWN]


def reason(line: str) -> str | None:
    "Why a command is not executed; None if it is."
    return next((why for start, why in PARSED_ONLY.items() if line.startswith(start)), None)


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    "The command of `imaginet` that words name, and the words that are left."
    command = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}): command, words = command.commands[words[0]], words[1:]
    assert not hasattr(command, "commands") or not words or words[0].startswith("-"), f"no command {words[0]!r}"
    return command, words


def parse(line: str) -> None:
    "A command that is only parsed: its program has a rule here, and the rule finds nothing wrong."
    words = shlex.split(line, comments=True)
    program, words = words[0], words[1:]
    if program == "imaginet":
        command, rest = resolve(words)
        command.make_context(line, rest)
    elif program == "make":
        subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)
        known = set(re.findall(r"\$[({](\w+)", (ROOT/"Makefile").read_text()))
        assert {word.split("=")[0] for word in words if "=" in word} <= known, "make knows no such variable"
    elif program == "papermill":
        check_parameters(ROOT/words[0], dict(zip(words[words.index("-p") + 1::3], words[words.index("-p") + 2::3], strict=True)))
    elif program == "pip":
        assert words[0] in ("wheel", "install")
        version = re.search(r"imaginet_nb-([\d.]+)-", line)
        assert not version or version[1] == settings()["version"], "the wheel has another version"
    elif program == "accelerate":
        module, *rest = words[words.index("-m") + 1:]
        options = dict(zip(rest[::2], rest[1::2], strict=True))
        assert module == "imaginet_nb.training.stages" and options.keys() == {"--profile", "--stage"} and options["--stage"] in STAGES
        load_profile(options["--profile"])
    elif program == "srun": parse(shlex.join(words[words.index("--") + 1:]) if words[0] == "ray" else words[2])
    elif program.startswith(".venv/bin/"):
        assert shutil.which(Path(program).name, path=PATH), program
        assert all((ROOT/word).is_file() for word in words if word.endswith((".py", ".ipynb")))
    elif program == "snakemake": assert (ROOT/words[1]/"config.yaml").is_file()
    else: raise AssertionError(f"no rule for {program!r}: execute the command, or say here how to check it")


def settings() -> dict:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT/"settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


@pytest.fixture(scope="module")
def playground(tmp_path_factory) -> Path:
    "A folder that passes for a clone, with the files that the documents name: pictures, a detector, the authors' weights."
    folder = tmp_path_factory.mktemp("clone")
    for name in ("settings.ini", "profiles", "nbs", "Snakefile", "imaginet_nb"): (folder/name).symlink_to(ROOT/name)
    (folder/".venv").symlink_to(sys.prefix) # wherever `make setup` or somebody else made the environment of these tests
    seed_everything(0)
    save_checkpoint(ImagiNetClassifier(create_backbone("resnet18", width=0.125), input_size=32),
                    folder/"reports"/"demo"/"checkpoints"/"selfcon.safetensors", profile="demo")
    draw = np.random.default_rng(0)
    photos = [f"my_photos/{i}.jpg" for i in range(20)]
    labelled = [f"my_data/{kind}/{i}.{suffix}" for i in range(3) for kind, suffix in (("real", "jpg"), ("fake", "png"))]
    for name in ("my_pictures/a.png", "my_pictures/deep/b.jpg", *photos, *labelled):
        save(draw.integers(0, 256, (40, 50, 3), dtype=np.uint8), folder/name)
    (folder/"my_pictures"/"notes.txt").write_text("no picture")
    (folder/"mine.py").write_text("class Detector:\n    name, input_size = 'Mine', None\n"
                                  "    def score(self, images): return images.float().mean((1, 2, 3))\n")
    theirs = create_backbone("resnet50").state_dict()
    backbone = {f"encoder.{name.replace('downsample', 'shortcut')}": tensor for name, tensor in theirs.items()}
    linear = {"encoder.selfcon_layer.1": (512, 2048), "head.0": (2048, 2048), "head.2": (2048, 128),
              "sub_heads.0.0": (2048, 2048), "sub_heads.0.2": (2048, 128)}
    weights = {f"{name}.weight": torch.zeros(m, n) for name, (n, m) in linear.items()}
    weights |= {f"{name}.bias": torch.zeros(m) for name, (n, m) in linear.items()}
    torch.save({"model": backbone | weights}, folder/"authors.pth")
    return folder


def test_the_documents_have_commands():
    "Catches a reader of blocks that finds none: then all tests below would pass."
    assert len(SHOWN) > 12 and sum(reason(line) is None for _, line in SHOWN) >= 4
    for start in PARSED_ONLY: assert any(line.startswith(start) for _, line in SHOWN), f"no document shows {start!r} any more"


@pytest.mark.parametrize("path, line", SHOWN, ids=IDS)
def test_commands_of_the_documents(playground, path, line):
    if reason(line): return parse(line)
    library = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, **forks.server(), "TQDM_DISABLE": "1", "PYTHONPATH": library}
    result = subprocess.run(["bash", "-c", line], cwd=playground, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, f"{line}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    words = shlex.split(line, comments=True)
    written = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("--out", "--html")]
    for name in written: assert (playground/name).exists(), f"{line}: {name} was not written"


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_of_the_documents(playground, path, monkeypatch):
    monkeypatch.chdir(playground)
    names = {"images": torch.zeros(2, 3, 48, 48, dtype=torch.uint8)}
    for block in blocks(path, "python"): exec(compile(block, path.name, "exec"), names)


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_commands_in_sentences_exist(path):
    "`imaginet data build` and `make prepare` amid prose: the command and its options are there; words in capitals stand for something."
    for words in re.findall(r"`(imaginet|make)((?: [^`\n]+)?)`", text_of(path)):
        rest = [word.strip(",") for word in words[1].split()]
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT/"Makefile").read_text(), re.M)
            assert {word for word in rest if "=" not in word} <= set(targets), words
        else:
            command, rest = resolve(rest)
            options = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
            assert {word.split("=")[0] for word in rest if word.startswith("--")} <= options | {"--help"}, words


@pytest.mark.parametrize("path", [*PAGES, ROOT/"nbs"/"index.ipynb", *NOTEBOOKS], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_links_of_the_documents(path):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", text_of(path), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    anchors = {*re.findall(r'id="([^"]+)"', text), *(re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings)}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if target: assert re.match(r"https://|mailto:", target) or (path.parent/target).exists(), f"{path.name}: {link} leads nowhere"
        else: assert anchor in anchors, f"{path.name}: no heading or anchor {anchor}"


def test_the_map_of_the_reports_is_current():
    text = (ROOT/"reports"/"README.md").read_text(encoding="utf-8")
    assert text == render_map(text, ROOT/"reports"/"demo"), "run `make prepare`"


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}


def test_each_promise_names_tests_that_exist():
    "A row without a test, or with one that was renamed."
    text = (ROOT/"SECURITY.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ") and not line.startswith("| failure |")]
    assert len(rows) > 20
    for failure, guarantee, tests in rows:
        named = re.findall(r"`([^`]+)`", tests)
        assert named and guarantee.strip(), f"no test for: {failure}"
        for name in named:
            file, _, function = name.partition("::")
            assert (ROOT/file).is_file(), f"{failure}: no file {file}"
            assert not file.endswith(".py") or function in functions(ROOT/file), f"{failure}: no test {name}"


def test_each_choice_names_its_source():
    """Paper and code side by side: no cell without its source, and none that has the source of the other column.

    Score calibration on test images and the half-compressed JPEG curve are the authors' code, not the paper's text."""
    _, first, text = text_of(ROOT/"nbs"/"tutorials"/"paper_and_code.ipynb").partition("## The network")
    assert first, "the first heading of the tables was renamed; name the new one here"
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    choices = {row[0]: row[1:3] for row in rows if row[0] != "point"}
    assert len(choices) > 20
    for point, cells in choices.items():
        for cell, allowed in zip(cells, ({"stated", "derived"}, {"code", "derived"}), strict=True):
            named = set(re.findall(r"\((stated|code|derived)\b", cell))
            assert named <= allowed and (named or cell == "–"), f"{point}: {cell}"
    for point in ("images of the score calibration", "JPEG curve of Figure 4a"): assert choices[point][0] == "–"


def test_the_changelog_has_this_version():
    assert re.search(rf"^## {re.escape(settings()['version'])}, \d{{4}}-\d\d-\d\d$", (ROOT/"CHANGELOG.md").read_text(), re.M)


def test_no_address_belongs_to_a_stranger():
    "A placeholder that could be registered by anybody would lead readers to them."
    found = settings()
    for key in ("doc_host", "git_url"): assert ".example" in found[key] or "imaginet-nb" not in found[key], f"{key}: {found[key]}"
