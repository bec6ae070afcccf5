"""Nothing is sent: every connection and every look-up of a name that a command or its children try is caught and noted.

The guard is tests/network_guard.py. tests/test_ray.py uses it for `predict --engine ray`.
"""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from network_guard import build_guard, noted
from onnx import helper

from imaginet_nb.core import repo_root, seed_everything
from imaginet_nb.data.images import save
from imaginet_nb.models.checkpoints import save_checkpoint
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import ImagiNetClassifier

ROOT, IMAGINET = repo_root(), (sys.executable, "-m", "imaginet_nb.apps.cli")
# of continuous integration and of test runs: with one of them set, a library keeps quiet that would speak to a user's network
QUIET_ELSEWHERE = ("CI", "GITHUB_ACTIONS", "TF_BUILD", "JENKINS_URL", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS", "HF_HUB_OFFLINE",
                   "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")


class Watched:
    "Runs programs under the guard, with an empty folder as home."
    def __init__(self, folder: Path, guard: Path):
        self.home, self.log = folder/"home", folder/"network.log"
        self.home.mkdir(parents=True)
        plain = {key: value for key, value in os.environ.items() if key not in QUIET_ELSEWHERE}
        self.environment = {**plain, "HOME": str(self.home), "TQDM_DISABLE": "1", "LD_PRELOAD": str(guard), "NETWORK_LOG": str(self.log),
                            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(self, *words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        done = subprocess.run(list(map(str, words)), cwd=cwd, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done

    def tried(self) -> list[str]:
        return noted(self.log)

    def traces(self) -> list[str]:
        "What a library that reports would leave below ~/.cache: an identifier of the device, a data base of what waits to be sent."
        files = [p for p in (self.home/".cache").rglob("*") if p.is_file()]
        return [str(p) for p in files if "device" in p.name.lower() or p.suffix in (".db", ".sqlite") or "Microsoft" in p.parts]


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> Path:
    built = build_guard(tmp_path_factory.mktemp("guard"))
    return built or pytest.skip("the guard needs Linux and a C compiler")


@pytest.fixture
def watched(guard, tmp_path) -> Watched:
    return Watched(tmp_path/"watched", guard)


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    "A detector of random weights, and labelled pictures: 8 real ones, 8 synthetic ones."
    folder = tmp_path_factory.mktemp("material")
    seed_everything(0)
    save_checkpoint(ImagiNetClassifier(create_backbone("resnet18", width=0.125), input_size=32), folder/"random.safetensors")
    generator = np.random.default_rng(0)
    for kind in ("real", "fake", "synthetic/some"):
        for i in range(8): save(generator.integers(0, 256, (96, 96, 3), dtype=np.uint8), folder/"pictures"/kind/f"{i}.png")
    return folder


def test_the_guard_notices_and_refuses(watched):
    "Without this, the tests below could pass because the guard sees nothing."
    watched.run(sys.executable, "-c", "\n".join([
        "import socket, subprocess, sys",
        "child = 'import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b\"x\", (\"192.0.2.2\", 9))'",
        "for act in (lambda: socket.create_connection(('192.0.2.1', 9)), lambda: socket.getaddrinfo('somewhere.example', 80)):",
        "    try: act()",
        "    except OSError: continue",
        "    raise SystemExit('not refused')",
        "assert subprocess.run([sys.executable, '-c', child], stderr=subprocess.DEVNULL).returncode == 1",
        "server = socket.create_server(('127.0.0.1', 0))",
        "socket.create_connection(('localhost', server.getsockname()[1]))"]))
    assert watched.tried() == ["connect 192.0.2.1", "getaddrinfo somewhere.example", "sendto 192.0.2.2"]


@pytest.mark.parametrize("words", [
    ("predict", "pictures/real", "--checkpoint", "random.safetensors", "--out", "{out}/preds.csv", "--html", "{out}/preds.html"),
    ("evaluate", "--root", "pictures", "--checkpoint", "random.safetensors", "--out", "{out}/evaluation"),
    ("audit", "pictures", "--out", "{out}/audit")], ids=lambda words: words[0])
def test_commands_send_nothing(watched, material, tmp_path, words):
    watched.run(*IMAGINET, *(word.format(out=tmp_path) for word in words), cwd=material)
    assert watched.tried() == [] and watched.traces() == []


def test_a_session_that_lives_long_sends_nothing(watched, tmp_path):
    "ONNX Runtime 1.32 uploads 13 s after its import; here it lives for 16 s."
    inputs = [helper.make_tensor_value_info("x", 1, ["B"]), helper.make_tensor_value_info("y", 1, None)]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", inputs[:1], inputs[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path/"relu.onnx")
    watched.run(sys.executable, "-c", "import sys, time; from imaginet_nb.models.graphs import onnx_session\n"
                                      "session = onnx_session(sys.argv[1]); time.sleep(16)", tmp_path/"relu.onnx")
    assert watched.tried() == [] and watched.traces() == []


TRAINING = """
import pandas as pd, torch
from pathlib import Path
from imaginet_nb.core import load_profile
from imaginet_nb.models.resnet import create_backbone
from imaginet_nb.models.selfcon import SelfConNet
from imaginet_nb.training.stages import pretrain
smoke = load_profile(profile)
smoke = smoke.model_copy(update={"pretrain": smoke.pretrain.model_copy(update={"epochs": 1, "batch_size": 8, "chunk_size": None})})
rows = [dict(path=f"{kind}/{i}.png", origin=origin, content_type="photos", generator_family=family, generator=generator, split="train")
        for kind, origin, family, generator in (("real", "real", "real", "real"), ("fake", "synthetic", "GAN", "StyleGAN3"))
        for i in range(8)]
model = SelfConNet(create_backbone("resnet18", width=0.125))
history = pretrain(model, pd.DataFrame(rows), Path(pictures), smoke, torch.device("cpu"))
assert len(history) == 1
"""


def test_a_notebook_that_trains_for_an_epoch_sends_nothing(watched, material, tmp_path):
    "In a kernel, that is in a child process, under papermill."
    cells = [dict(cell_type="code", execution_count=None, id=f"0000000{i}", metadata={"tags": tags}, outputs=[], source=source)
             for i, (tags, source) in enumerate([(["parameters"], 'profile: str = "smoke"\npictures: str = ""'), ([], TRAINING)])]
    kernel = dict(display_name="python3", language="python", name="python3")
    notebook = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    (tmp_path/"clone").mkdir()
    for name in ("settings.ini", "profiles"): os.symlink(ROOT/name, tmp_path/"clone"/name) # a clone is where settings.ini lies
    (tmp_path/"clone"/"train.ipynb").write_text(json.dumps(notebook))
    code = ("import sys; from imaginet_nb.apps.pipeline import run_notebook; "
            "run_notebook('train.ipynb', 'smoke', pictures=sys.argv[1])")
    watched.environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    watched.run(sys.executable, "-c", code, material/"pictures", cwd=tmp_path/"clone")
    assert (tmp_path/"clone"/"reports"/"smoke"/"notebooks"/"train.ipynb").is_file()
    assert watched.tried() == [] and watched.traces() == []


def test_libraries_are_told_before_anything_is_imported(watched):
    "The package itself imports nothing but the standard library; what it sets reaches its children."
    code = ("import sys; before = set(sys.modules); import imaginet_nb, os, subprocess; "
            "print(sorted({n.split('.')[0] for n in set(sys.modules) - before} - set(sys.stdlib_module_names))); "
            "subprocess.run(['env'])")
    lines = watched.run(sys.executable, "-c", code).stdout.splitlines()
    assert "['imaginet_nb']" in lines
    assert {"ORT_DISABLE_TELEMETRY=1", "HF_HUB_DISABLE_TELEMETRY=1", "DO_NOT_TRACK=1", "RAY_USAGE_STATS_ENABLED=0"} <= set(lines)
    # whoever has switched it on for something else sends nothing from here all the same
    watched.environment["ORT_DISABLE_TELEMETRY"] = "0"
    assert "ORT_DISABLE_TELEMETRY=1" in watched.run(sys.executable, "-c", code).stdout.splitlines()
    code = "import imaginet_nb; from huggingface_hub import constants; assert constants.HF_HUB_DISABLE_TELEMETRY"
    watched.run(sys.executable, "-c", code)


def test_onnxruntime_is_imported_in_one_place():
    found = []
    for path in [*(ROOT/"imaginet_nb").rglob("*.py"), *(ROOT/"docs").rglob("*.py"), *(ROOT/"tools").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            if "onnxruntime" in {str(name).split(".")[0] for name in names}: found.append(path.name)
    assert found == ["graphs.py"]


def test_jupyterlab_asks_for_no_news_and_no_newer_version(tmp_path):
    "The options of `make lab`, read back from JupyterLab itself: a mistyped option would only be a warning."
    line = subprocess.run(["make", "-n", "-o", "setup", "lab"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    options = re.findall(r"--LabApp\.\S+", line)
    code = ("import sys; from jupyterlab.labapp import LabApp; app = LabApp(); app.parse_command_line(sys.argv[1:]); "
            "print(app.news_url, app.check_for_updates_class.__name__, app.extension_manager)")
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path)})
    assert done.stdout.splitlines()[-1:] == ["None NeverCheckForUpdate readonly"], done.stderr
