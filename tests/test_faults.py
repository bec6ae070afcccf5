"""Faults really produced: full disks, read-only folders, damaged files, odd names, YAML bombs, dead workers, Ctrl-C, two runs at once."""
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from forks import imaginet
from PIL import Image
from typer.testing import CliRunner

from imaginet_nb.apps.cli import app
from imaginet_nb.core import ProfileError, load_profile, only_run, path_text, read_yaml, repo_root, text_path, write_csv
from imaginet_nb.data.images import ImageError, decode, save
from imaginet_nb.detectors.custom import DetectorError, read_settings

ROOT, PROGRAM = repo_root(), Path(sys.executable).with_name("imaginet")


def start(*words) -> subprocess.Popen:
    "The real program in a process group of its own."
    def heed() -> None: # a shell's background jobs, these tests perhaps, ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen([PROGRAM, *map(str, words)], cwd=ROOT, env={**os.environ, "TQDM_DISABLE": "1"}, text=True,
                            start_new_session=True, preexec_fn=heed, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str]:
    try: _, words = process.communicate(timeout=seconds)
    finally: process.poll() is None and os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, words


TINY = """
class Tiny:
    name, input_size = "Tiny", 32
    def score(self, images): return images.float().mean((1, 2, 3)) - 128
"""


def wait_for(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def pictures(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for i in range(6): save(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8), tmp_path/"pictures"/("real", "fake")[i % 2]/f"{i}.png")
    return tmp_path/"pictures"


# --- a disk that is full, a folder that cannot be written

def test_a_full_disk_leaves_no_half_written_table(pictures, tmp_path):
    run = imaginet("audit", pictures, "--out", tmp_path/"audit", limit=300)
    assert run.returncode == 1 and "File too large" in run.stderr and "Traceback" not in run.stderr
    assert all(p.stat().st_size < 300 and p.suffix != ".tmp" for p in (tmp_path/"audit").rglob("*") if p.is_file())
    assert not [p for p in (tmp_path/"audit").rglob("*.csv") if pd.read_csv(p).empty]


def test_a_full_disk_leaves_no_half_made_data_set(tmp_path):
    run = imaginet("data", "sandbox", "--out", tmp_path/"made", "--profile", "smoke", limit=2000)
    assert run.returncode == 1 and "File too large" in run.stderr and "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("data", "sandbox", "--profile", "smoke", "--out", "/proc/imaginet/made"),
                                   ("audit", "pictures", "--out", "/proc/imaginet/audit")])
def test_a_folder_that_cannot_be_written_is_named(words, pictures, tmp_path):
    run = imaginet(*words, cwd=tmp_path)
    assert run.returncode == 1 and "/proc/imaginet" in run.stderr and "Traceback" not in run.stderr


# --- files damaged at random

SEEDS = {"PNG": {}, "JPEG": {"quality": 80}, "WEBP": {"quality": 80}, "GIF": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}, "AVIF": {}}


@pytest.mark.parametrize("kind", [k for k in SEEDS if k in Image.SAVE or (Image.init(), k in Image.SAVE)[1]])
def test_a_file_damaged_anywhere_gives_pixels_or_one_kind_of_error(kind):
    noise = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(noise.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(buffer, kind, **SEEDS[kind])
    whole, refused = buffer.getvalue(), 0
    for n in range(120):
        generator = np.random.default_rng(n)
        content = bytearray(whole[:generator.integers(1, len(whole))] if n % 3 == 0 else whole)
        for place in generator.integers(0, len(content), n % 3*4): content[place] = generator.integers(256)
        if n % 5 == 0: content[generator.integers(len(content)):0] = generator.bytes(7)
        try: assert decode(bytes(content), max_pixels=1_000_000).dtype == np.uint8
        except ImageError: refused += 1
    assert 10 < refused # and not one other exception, crash or hang


# --- names, labels and cells with odd characters

ODD = [b"\\", b"\\xff", b"\xff", b"\xc2\x85", b"\xe2\x80\xa8", b"\r", b"\n", b"\r\n", b"\x0b", b"\x0c", b"\x1c", b"\x1e", b"\t",
       b"=", b"+1", b"-", b"@", b"\"", b",", b"'", b" ", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"a", b".png",
       b"u2028", b"\xe2\x80\xae", b"NA"]


def odd_names(seed: int, n: int) -> list[bytes]:
    "File names of random bytes and of the pieces above."
    draw = np.random.default_rng(seed)
    mixed = [b"".join(ODD[i] for i in draw.integers(len(ODD), size=draw.integers(1, 7))) for _ in range(n)]
    plain = [bytes(draw.integers(1, 256, draw.integers(1, 30), dtype=np.uint8)).replace(b"/", b"_") for _ in range(n)]
    return sorted({name for name in mixed + plain if name not in (b".", b"..")})


@pytest.mark.parametrize("folder", [b"", b"some/folder/", b"/data/"])
def test_paths_and_their_texts_are_one_to_one(folder):
    paths = {Path(os.fsdecode(folder + name)) for name in odd_names(0, 3000)}
    texts = {path_text(path): path for path in paths}
    assert len(texts) == len(paths)
    for text, path in texts.items():
        assert text_path(text) == path and len(text.encode().decode().splitlines()) == 1 and json.loads(json.dumps(text)) == text
        assert not text.startswith(tuple("=+-@\t\r"))


def test_a_table_is_read_back_with_every_row_whatever_its_cells_hold(tmp_path):
    breaks = "\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    cells = sorted({name.decode(errors="ignore") for name in odd_names(1, 2000)} | {*breaks, *(2*c for c in breaks)})
    frame = pd.DataFrame({"label": cells, "n": range(len(cells)), "text": cells[::-1]})
    write_csv(frame, tmp_path/"table.csv")
    back = pd.read_csv(tmp_path/"table.csv", keep_default_na=False)
    assert back["n"].tolist() == frame["n"].tolist()
    with open(tmp_path/"table.csv", newline="", encoding="utf-8") as file: rows = list(csv.reader(file))
    assert rows == [["label", "n", "text"], *([a, str(n), b] for a, n, b in frame.itertuples(index=False, name=None))]
    assert back[["label", "text"]].to_numpy().tolist() == frame[["label", "text"]].to_numpy().tolist()


def test_every_table_is_written_by_the_one_writer():
    sources = [*(ROOT/"imaginet_nb").rglob("*.py"), *(ROOT/"nbs"/"pipelines").glob("*.ipynb"), ROOT/"Snakefile"]
    found = [(path.name, word) for path in sources for word in (".to_csv(", "csv.writer", "DictWriter", "yaml.safe_load", "yaml.load")
             if word in path.read_text(encoding="utf-8")]
    assert sorted(found) == [("core.py", ".to_csv("), ("core.py", "yaml.load")]


def test_pictures_with_odd_names_have_a_row_each_and_no_formula(tmp_path):
    names = [b"a\rb.png", b"a\\xff.png", b"a\xff.png", b"=1+1.png", b"-1.png", b"a\xe2\x80\xa8b.png", b"a\nb.png"]
    save(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8), tmp_path/"pictures"/"plain.png")
    for name in names: shutil.copy(tmp_path/"pictures"/"plain.png", os.fsencode(tmp_path/"pictures") + b"/" + name)
    (tmp_path/"tiny.py").write_text(TINY)
    run = imaginet("predict", ".", "--detector", "tiny:Tiny", "--out", tmp_path/"preds.csv", cwd=tmp_path/"pictures",
                   PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert run.returncode == 0, run.stderr
    rows = pd.read_csv(tmp_path/"preds.csv")
    assert sorted(map(text_path, rows["path"])) == sorted([Path("plain.png"), *(Path(os.fsdecode(name)) for name in names)])
    assert rows["error"].isna().all() and rows["logit"].nunique() == 1
    assert not rows["path"].str.startswith(("=", "+", "-", "@")).any()


# --- YAML that means harm

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}']*9)}]\n"
                                                      for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True))
YAML = [BOMB, "["*30_000, "{"*30_000, "- "*30_000, "? "*20_000, "a: "*10_000, "seed: " + "9"*5000, "seed: 1" + ":1"*500 + ".5", "seed: 0b_",
        "seed: 99999999999999999999", "name: 2024-13-45", "seed: 2024-01-01", "name: !!timestamp x", "name: !!python/name:os.system",
        "<<: {name: demo}", "name: a\nname: b", "1: 2", "? [a]\n: b", "null: 1", "a: \0", "\0", b"\xff\xfe", b"name: \xe9", "#"*70_000,
        "%"*60_000, "a\n"*30_000, "!"*30_000, "|"*100, "a: 1\n---\nb: 2",
        "".join(f"k{i}: 1\n" for i in range(3000)),
        'name: "\\ud800"', 'a: "\\UFFFFFFFF"', 'a: "\\U00110000"',
        "seed: .nan", "seed: .inf", "a: *b", "\t", "a: [1,", "", "- 1", "x"]


@pytest.mark.parametrize("read, error", [(load_profile, ProfileError), (read_settings, DetectorError)])
@pytest.mark.parametrize("content", YAML, ids=range(len(YAML)))
def test_harmful_yaml_is_refused_at_once_with_the_name_of_the_file(content, read, error, tmp_path):
    path = tmp_path/"mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    begin = time.process_time()
    with pytest.raises(error) as caught: read(path)
    assert time.process_time() - begin < 1.5 and "mine.yaml" in str(caught.value) and len(str(caught.value)) < 20_000


def test_a_yaml_file_damaged_anywhere_is_read_or_refused_in_one_way(tmp_path):
    path, whole, refused = tmp_path/"demo.yaml", (ROOT/"profiles"/"demo.yaml").read_bytes(), 0
    pieces = [piece.encode() for piece in YAML[7:20] if isinstance(piece, str)]
    for n in range(150):
        draw = np.random.default_rng(n)
        content = bytearray(whole)
        for place in draw.integers(len(content), size=n % 4): content[place] = draw.integers(256)
        if n % 3 == 0: content[(place := draw.integers(len(content))):place] = pieces[draw.integers(len(pieces))]
        if n % 7 == 0: del content[draw.integers(len(content)):]
        path.write_bytes(content)
        try: load_profile(path)
        except ProfileError as error:
            refused += 1
            assert "demo.yaml" in str(error)
    assert refused > 75 # and not one other exception


def test_an_error_in_yaml_names_its_line(tmp_path):
    (tmp_path/"mine.yaml").write_text("a: 1\nb:\n  c: 2\n  c: 3\n")
    with pytest.raises(ValueError, match="mine.yaml, line 4: .*'c' occurs twice"): read_yaml(tmp_path/"mine.yaml")


# --- processes that die, are stopped, or meet each other

def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    "Processes of joblib that compute."
    try: return [p for p in psutil.Process(process.pid).children(recursive=True) if "popen_loky" in " ".join(p.cmdline())]
    except psutil.NoSuchProcess: return []


def test_a_worker_that_dies_is_reported_and_nothing_half_made_is_left(tmp_path):
    process = start("data", "sandbox", "--out", tmp_path/"made", "--profile", "smoke", "--images", 1000) # fewer need no workers
    wait_for(lambda: workers_of(process))[0].kill()
    code, words = finish(process)
    assert code == 1 and "Traceback" not in words and ("worker" in words or "process" in words), words
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_no_process_and_says_how_to_go_on(tmp_path):
    process = start("data", "sandbox", "--out", tmp_path/"made", "--profile", "smoke", "--images", 1000) # fewer need no workers
    family = [psutil.Process(process.pid), *wait_for(lambda: workers_of(process))]
    os.killpg(process.pid, signal.SIGINT)
    code, words = finish(process, 30)
    assert code == 130 and "run the same command again" in words # a worker that was just starting may complain as well
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert not list(tmp_path.iterdir())


def test_of_two_runs_at_once_in_one_folder_one_is_refused(tmp_path):
    for name in ("one", "two"): (tmp_path/name).mkdir() # temporary folders, as of two containers
    words = ("data", "sandbox", "--out", tmp_path/"made", "--profile", "smoke", "--images", 240)
    with ThreadPool(2) as pool: runs = pool.map(lambda name: imaginet(*words, TMPDIR=str(tmp_path/name)), ("one", "two"))
    assert sorted(run.returncode for run in runs) == [0, 1] and "another run" in "".join(run.stderr for run in runs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "one", "two"] # no lock is left


@pytest.mark.parametrize("words, out", [
    (("predict", "pictures", "--out", "preds.csv"), "preds.csv"), (("predict", "pictures", "--html", "page.html"), "page.html"),
    (("evaluate", "--root", "pictures", "--out", "found"), "found"), (("audit", "pictures", "--out", "found"), "found"),
    (("data", "sandbox", "--profile", "smoke", "--out", "made"), "made"), (("data", "pack", "pictures", "--out", "store"), "store"),
    (("data", "perturb", "pictures"), "pictures")])
def test_a_second_run_with_the_same_output_is_refused_before_it_begins(words, out, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    with only_run(out):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path/"elsewhere"))
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and f"another run is writing to {tmp_path/out}" in result.output
    assert tree(tmp_path) == before


def test_a_killed_run_locks_nobody_out(tmp_path):
    code = "import os, sys; from imaginet_nb.core import only_run\nwith only_run(sys.argv[1]): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, tmp_path/"preds.csv"], cwd=ROOT)
    assert list(tmp_path.iterdir()) # its lock file
    with only_run(tmp_path/"preds.csv"): pass
    assert not list(tmp_path.iterdir())


# --- a user id without a name

NOBODY = 12345


@pytest.fixture
def nameless(pictures):
    "A folder of pictures that everybody may use, as a user whom the system does not know has no other."
    if os.geteuid() != 0 or not shutil.which("setpriv"): pytest.skip("only root can become another user, with setpriv")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        shutil.copytree(pictures, Path(folder)/"pictures")
        (Path(folder)/"tiny.py").write_text(TINY)
        subprocess.run(["chmod", "-R", "a+rwX", folder], check=True)
        environment = {"PATH": os.environ["PATH"], "TMPDIR": folder, "TQDM_DISABLE": "1", "PYTHONPATH": f"{folder}:{ROOT}"}
        def run(*words):
            become = ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"]
            return subprocess.run(list(map(str, [*become, *words])), cwd=folder, env=environment, capture_output=True, text=True,
                                  timeout=300)
        if run(sys.executable, "-c", "import numpy").returncode: pytest.skip("this Python lies where no other user may read")
        yield run


@pytest.mark.parametrize("words", [("--help",), ("predict", "pictures/real", "--detector", "tiny:Tiny", "--out", "preds.csv")])
def test_the_program_works_for_a_user_id_without_a_name(nameless, words):
    result = nameless(PROGRAM, *words)
    assert result.returncode == 0, result.stderr


def test_the_library_works_for_a_user_id_without_a_name(nameless):
    code = """if True:
        import getpass, pathlib
        import imaginet_nb.training.stages
        from jupyter_core.paths import jupyter_runtime_dir
        from torch._inductor.runtime.cache_dir_utils import cache_dir
        import matplotlib.pyplot
        pathlib.Path(jupyter_runtime_dir()).mkdir(parents=True)
        pathlib.Path(cache_dir()).mkdir(parents=True, exist_ok=True)
        print(getpass.getuser(), pathlib.Path.home().stat().st_mode & 0o777 == 0o700)"""
    result = nameless(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [f"uid-{NOBODY}", "True"] and "Matplotlib" not in result.stderr
