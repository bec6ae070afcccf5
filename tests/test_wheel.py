"""The package without its repository: built, installed into an environment of its own, used from an empty folder."""
import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from imaginet_nb.core import repo_root, seed_everything
from imaginet_nb.data.images import save
from imaginet_nb.models.checkpoints import save_checkpoint
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier

ROOT = repo_root()
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT/"settings.ini", encoding="utf-8")
ENVIRONMENT = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("PYTHONPATH", None)


def run(*words, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess:
    result = subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT)
    assert not ok or result.returncode == 0, f"{words}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "What is committed, packed into an archive of sources, and that archive built into a wheel."
    folder = tmp_path_factory.mktemp("wheel")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.split("\0")
    for name in filter(None, listed):
        if not (ROOT/name).is_file(): continue
        (folder/"sources"/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, folder/"sources"/name)
    run(sys.executable, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})", cwd=folder/"sources")
    shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder/"unpacked")
    unpacked = next((folder/"unpacked").iterdir())
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", folder, unpacked, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """An environment that has the wheel, and the packages of this one behind it; the result is its folder of programs.

    A path in a `.pth` file is searched for modules, but its own `.pth` files are not read: so this clone's editable
    installation stays out of sight.
    """
    folder = empty_environment(tmp_path_factory.mktemp("environment"))
    run(sys.executable, "-m", "pip", "--python", folder/"bin"/"python", "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=folder)
    return folder/"bin"


def empty_environment(folder: Path) -> Path:
    "An environment with nothing but the packages of this one behind it."
    venv.create(folder, with_pip=False, symlinks=True)
    site = run(folder/"bin"/"python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    (Path(site)/"packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_wheel_holds_the_package_and_what_it_reads_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    own = {n for n in names if ".dist-info/" not in n}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT/"imaginet_nb").rglob("*.py")}
    read = [*(ROOT/"profiles").glob("*.yaml"), *(ROOT/"data").glob("*.csv"), *(ROOT/"reports"/"published").glob("*.csv")]
    templates = {p.relative_to(ROOT).as_posix() for p in (ROOT/"imaginet_nb"/"reporting"/"templates").iterdir()}
    assert templates and own == modules | templates | {f"imaginet_nb/shipped/{p.relative_to(ROOT).as_posix()}" for p in read}
    assert any(n.endswith("LICENSE") for n in names)


def test_the_wheel_says_what_it_needs(wheel):
    with zipfile.ZipFile(wheel) as file:
        about = file.read(next(n for n in file.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    needs = {Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", about, flags=re.M) if "extra ==" not in line}
    assert needs == set(map(Requirement, SETTINGS["DEFAULT"]["requirements"].split()))
    assert f"Version: {SETTINGS['DEFAULT']['version']}" in about and f"Requires-Python: >={SETTINGS['DEFAULT']['min_python']}" in about
    pythons = re.findall(r"^Classifier: Programming Language :: Python :: (3\.\d+)$", about, flags=re.M)
    assert pythons == ["3.11", "3.12", "3.13"]


def test_everything_that_the_library_imports_is_required():
    "Catches a package that is only there because something else, or a development tool, brought it."
    extras = ("detectors", "hub", "heic", "croissant", "provenance", "ray")
    kinds = ("requirements", *(f"{extra}_requirements" for extra in extras))
    declared = " ".join(SETTINGS["DEFAULT"][key] for key in kinds).split()
    declared = {canonicalize_name(Requirement(r).name) for r in declared}
    # these come with a package that is declared and cannot do without them
    declared |= {"ipython", "markupsafe", "scipy", "nbclient", "nbformat", "requests", "threadpoolctl"}
    declared.add("h5py") # for `make bench` alone, in the environment of a clone
    owners = metadata.packages_distributions()
    for path in (ROOT/"imaginet_nb").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
            for name in {str(n).split(".")[0] for n in names} - set(sys.stdlib_module_names) - {"imaginet_nb"}:
                found = {canonicalize_name(d) for d in owners.get(name, [name])}
                assert found & declared, f"{path.name} imports {name} of {found}, which settings.ini does not require"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    "A folder with a detector, two pictures and a file that is none."
    folder = tmp_path_factory.mktemp("empty")
    seed_everything(0)
    save_checkpoint(ImagiNetClassifier(create_backbone("resnet18", width=0.125), input_size=32), folder/"random.safetensors")
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for i in range(2): save(picture[i:], folder/"pictures"/f"{i}.png")
    (folder/"pictures"/"notes.png").write_text("no picture")
    return folder


def test_the_installed_package_is_the_wheel(installed, pictures):
    "Without this, all tests below could be about the clone."
    code = "import imaginet_nb.core as c; print(c.__file__, c.repo_root())"
    where = run(installed/"python", "-c", code, cwd=pictures).stdout.split()
    assert Path(where[0]).is_relative_to(installed.parent) and Path(where[1]).resolve() == pictures.resolve()


def test_help_and_predict(installed, pictures):
    assert "predict" in run(installed/"imaginet", "--help", cwd=pictures).stdout
    run(installed/"imaginet", "predict", "pictures", "--checkpoint", "random.safetensors", "--out", "preds.csv", cwd=pictures)
    table = pd.read_csv(pictures/"preds.csv")
    assert len(table) == 3 and table["error"].notna().sum() == 1 and table["logit"].notna().sum() == 2
    missing = run(installed/"imaginet", "predict", "pictures", cwd=pictures, ok=False)
    assert missing.returncode == 1 and "--checkpoint" in missing.stderr and "Traceback" not in missing.stderr


def test_sandbox_with_your_own_profile_and_the_wheels(installed, pictures):
    own = (ROOT/"profiles"/"smoke.yaml").read_text().replace("name: smoke", "name: mine")
    (pictures/"mine.yaml").write_text(re.sub(r"decoder_steps: .*", "decoder_steps: 1", own))
    run(installed/"imaginet", "data", "sandbox", "--out", "sandbox", "--profile", "mine.yaml", "--images", 80, cwd=pictures)
    assert (pictures/"sandbox"/"annotations"/"test_annotations.txt").read_text()
    again = run(installed/"imaginet", "data", "sandbox", "--out", "pictures", "--profile", "demo", cwd=pictures, ok=False)
    assert again.returncode == 1 and "pictures" in again.stderr and "Traceback" not in again.stderr # the name is known, the folder taken
    unknown = run(installed/"imaginet", "data", "sandbox", "--out", "x", "--profile", "dmeo", cwd=pictures, ok=False)
    assert unknown.returncode == 1 and "known profiles: benchmark, benchmark-gpu, demo, " in unknown.stderr


@pytest.mark.parametrize("words", [("reproduce",), ("notebook", "p50_detection")])
def test_what_needs_a_clone_says_so(installed, pictures, words):
    result = run(installed/"imaginet", *words, cwd=pictures, ok=False)
    assert result.returncode == 1 and "clone of the repository" in result.stderr and "Traceback" not in result.stderr


def test_files_beside_the_library_are_found(installed, pictures):
    "The counts that `data verify` compares with, and the paper's numbers; without them both would go on in silence."
    code = ("from imaginet_nb.core import shipped; from imaginet_nb.reporting.published import published; "
            "print(shipped('data/test_split_counts.csv').is_file(), len(published('table3_detection_by_family')) > 0)")
    assert run(installed/"python", "-c", code, cwd=pictures).stdout == "True True\n"


def test_the_commit_of_another_repository_is_not_written_down(installed, tmp_path):
    run("git", "init", "--quiet", cwd=tmp_path)
    run("git", "-c", "user.name=a", "-c", "user.email=a@b.example", "commit", "--allow-empty", "--quiet", "-m", "other", cwd=tmp_path)
    code = "from imaginet_nb.core import load_profile, provenance; print(provenance('x', load_profile('demo'))['git_commit'])"
    assert run(installed/"python", "-c", code, cwd=tmp_path).stdout == "None\n"


def test_the_last_step_of_binder_gives_the_package_and_its_kernel(wheel, tmp_path):
    "In an environment that has the lock, as `binder/requirements.txt` makes it, and a copy of the repository."
    place, sources = empty_environment(tmp_path/"environment"), wheel.parent/"sources"
    environment = {**ENVIRONMENT, "PATH": f"{place/'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"}
    ended = subprocess.run([sources/"binder"/"postBuild"], cwd=sources, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert run(place/"bin"/"python", "-c", "import imaginet_nb; print(imaginet_nb.__file__)", cwd=tmp_path).stdout.startswith(str(sources))
    assert (place/"bin"/"imaginet").is_file() and (place/"share"/"jupyter"/"kernels"/"imaginet_nb"/"kernel.json").is_file()
