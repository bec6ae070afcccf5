"""`tools/gpu_run.sh` on a CPU with smoke sizes: stopped in the middle, gone on with, called once more; what the archive holds."""
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import nbformat
import pytest

from imaginet_nb.core import load_profile, repo_root

ROOT = repo_root()
# in place of the benchmark, which takes minutes on a CPU: needs the wheel, and waits to be stopped if a file says so
CELLS = ['profile: str = "smoke"', """import os
import time
from pathlib import Path
import probe_of_wheels
folder = Path("reports")/Path(profile).stem/"tables"
folder.mkdir(parents=True, exist_ok=True)
(folder/"probe.csv").write_text(probe_of_wheels.WORD)
print("measured")""", """Path("kernel.pid").write_text(str(os.getpid()))
if Path("wait").exists(): time.sleep(300)"""]


def write_wheel(folder: Path) -> None:
    "A package that no environment has."
    folder.mkdir()
    info = "probe_of_wheels-1.0.dist-info"
    with zipfile.ZipFile(folder/"probe_of_wheels-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("probe_of_wheels.py", "WORD = 'from a wheel'\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: probe_of_wheels\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    "A copy of the working tree that runs one notebook of the pipeline; the folder of wheels is beside it."
    base = tmp_path_factory.mktemp("gpu")
    copy = base/"checkout"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if name.startswith(("reports/demo", "tests/")) or not (ROOT/name).is_file(): continue
        (copy/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/name, copy/name)
    plan = (copy/"Snakefile").read_text()
    whole = 'input: expand(REPORT + "/index.html", profile=SETTINGS)'
    assert plan.count(whole) == 1
    (copy/"Snakefile").write_text(plan.replace(whole, 'input: expand(REPORT + "/notebooks/p63_speed.ipynb", profile=SETTINGS)'))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, copy/"nbs"/"pipelines"/"p95_benchmark.ipynb")
    settings = (copy/"profiles"/"smoke.yaml").read_text()
    (copy/"profiles"/"smoke-benchmark.yaml").write_text(settings.replace("name: smoke", "name: smoke-benchmark"))
    for name in ("tables/inference_time.csv", "tables/inference_time.md", "tables/inference_time.tex",
                 "tables/inference_time.provenance.json", "notebooks/p63_speed.ipynb"): # of another machine, committed
        stale = copy/"reports"/"smoke"/name
        stale.parent.mkdir(parents=True, exist_ok=True)
        stale.write_text("measured elsewhere")
    write_wheel(base/"wheels")
    return copy


def start(checkout: Path) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PROFILE": "smoke", "BENCHMARK": "smoke-benchmark"}
    words = [checkout/"tools"/"gpu_run.sh", checkout.parent/"wheels", checkout.parent/"out"]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def archived(checkout: Path) -> dict[str, str]:
    "Text files of the archive, by name; other files are empty."
    path = checkout.parent/"out"/"gpu-reports.tar.gz"
    assert [p.name for p in path.parent.iterdir()] == [path.name] and path.stat().st_size < 16_000_000
    found = {}
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            readable = member.name.endswith((".csv", ".ipynb", ".log", ".txt"))
            found[member.name] = archive.extractfile(member).read().decode() if readable else ""
    assert not any(word in name for name in found for word in ("checkpoints", "predictions", "manifests"))
    return found


def alive(pid: int) -> bool:
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return True


def test_a_run_that_is_stopped_leaves_its_archive_and_the_next_one_continues(checkout):
    (checkout/"wait").touch()
    process, pid = start(checkout), checkout/"kernel.pid"
    try:
        for _ in range(3000):
            if pid.exists() and pid.read_text() or process.poll() is not None: break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[0]
    finally: process.kill()
    assert process.returncode == 143, said
    files = archived(checkout)
    assert files["reports/smoke-benchmark/tables/probe.csv"] == "from a wheel", said
    assert "measured" in files["reports/smoke-benchmark/notebooks/p95_benchmark.partial.ipynb"]
    log = files["reports/smoke/logs/gpu_run.log"]
    assert "reports/smoke/tables/inference_time.csv" not in files, "results of the checkout in the archive of this machine"
    assert "benchmark: begins" in log and "stopped by a signal" in log and "reproduce" not in log
    for _ in range(100):
        if not alive(int(pid.read_text())): break
        time.sleep(0.1)
    else: pytest.fail("the kernel of the notebook runs on")

    (checkout/"wait").unlink()
    second = start(checkout)
    said = second.communicate(timeout=500)[0]
    assert second.returncode == 0, said
    files = archived(checkout)
    assert "p63_speed" in files["reports/smoke/notebooks/p63_speed.ipynb"] and "SelfCon" in files["reports/smoke/tables/inference_time.csv"]
    assert "reports/smoke-benchmark/notebooks/p95_benchmark.ipynb" in files
    assert "torch" in files["reports/smoke/machine.txt"] == files["reports/smoke-benchmark/machine.txt"]

    times = {name: (checkout/name).stat().st_mtime for name in files if name.endswith(".ipynb")}
    third = start(checkout)
    said = third.communicate(timeout=500)[0]
    assert third.returncode == 0 and "benchmark: done by an earlier call" in said, said
    assert times == {name: (checkout/name).stat().st_mtime for name in times}, "the third call ran something again"


def test_without_wheels_nothing_begins(tmp_path):
    for words in ([], [tmp_path]):
        done = subprocess.run([ROOT/"tools"/"gpu_run.sh", *words], capture_output=True, text=True)
        assert done.returncode == 2 and "gpu_run.sh WHEELS OUT" in done.stderr
    for words in ([tmp_path/"none", tmp_path/"out"], [tmp_path, tmp_path/"out"]):
        done = subprocess.run([ROOT/"tools"/"gpu_run.sh", *words], capture_output=True, text=True)
        assert done.returncode == 2 and "tools/gpu_wheels.py" in done.stderr
    assert not (tmp_path/"out").exists()


def test_the_two_profiles_are_of_the_gpu_alone():
    "Notebooks that use the CPU run beside those on the GPU only where the profile says that there is one."
    benchmark, both = load_profile("benchmark-gpu"), load_profile("benchmark")
    assert load_profile("gpu").device == benchmark.device == "cuda" and both.device == "auto"
    same = {"name", "about", "device"}
    assert benchmark.model_dump(exclude=same) == both.model_dump(exclude=same)
